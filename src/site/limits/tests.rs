//! Windows by the clocks on the wall, and whose word holds.

use super::*;

const NIGHT: &str = "[site]\nname = \"a\"\n[link]\nrate_limit = \"50mbit\"\n\
    time_zone = \"Europe/Berlin\"\n\
    [link.windows.office]\ndays = \"mon-fri\"\nfrom = \"08:00\"\nuntil = \"18:00\"\nbandwidth = \"20mbit\"\n\
    [link.windows.early]\ndays = \"sun\"\nfrom = \"02:00\"\nuntil = \"03:00\"\nbandwidth = \"5mbit\"\n\
    [protect]\nbandwidth = \"8mbit\"\npriority = 50\n";

fn config(text: &str, directory: &Path) -> SiteConfig {
    let file = directory.join("site.toml");
    let text = text.replace(
        "name = \"a\"\n",
        &format!(
            "name = \"a\"\nstate_dir = {:?}\n",
            directory.display().to_string()
        ),
    );
    std::fs::write(&file, text).unwrap();
    farhaven_policies::load::load(Some(&file), "FARHAVEN_TEST_OF_LIMITS", &[]).unwrap()
}

fn limits(directory: &Path) -> Limits {
    Limits::open(&config(NIGHT, directory)).unwrap()
}

#[tokio::test]
async fn windows_are_of_the_zone_in_summer_and_in_winter() {
    let directory = tempfile::tempdir().unwrap();
    let limits = limits(directory.path());
    let cap = |at: &str| {
        limits.apply(at.parse().unwrap());
        limits.shares.cap() / 1_000_000
    };
    // Monday, in winter: 08:00 in Berlin is 07:00 UTC.
    assert_eq!(cap("2026-11-23T06:59:59Z"), 50);
    assert_eq!(cap("2026-11-23T07:00:00Z"), 20);
    assert_eq!(cap("2026-11-23T16:59:59Z"), 20);
    assert_eq!(cap("2026-11-23T17:00:00Z"), 50);
    // In summer it is 06:00.
    assert_eq!(cap("2026-07-06T05:59:59Z"), 50);
    assert_eq!(cap("2026-07-06T06:00:00Z"), 20);
    // Sunday, 29 March 2026: 02:00 to 03:00 does not exist.
    assert_eq!(cap("2026-03-29T00:59:59Z"), 50);
    assert_eq!(cap("2026-03-29T01:00:00Z"), 50);
    // Sunday, 25 October 2026: it comes twice.
    assert_eq!(cap("2026-10-24T23:59:59Z"), 50);
    assert_eq!(cap("2026-10-25T00:00:00Z"), 5);
    assert_eq!(cap("2026-10-25T01:59:59Z"), 5);
    assert_eq!(cap("2026-10-25T02:00:00Z"), 50);
    // QUIC's own headers have room beside it.
    let controllers = limits.controllers().load(Ordering::Relaxed);
    assert_eq!(controllers, 53_000_000);
}

#[tokio::test]
async fn an_operators_word_wins_and_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let limits = limits(directory.path());
    let guest = GuestId([7; 16]);
    let peer = SiteKey::from_bytes([1; 32]);
    let flow = limits.join(guest, "web1", peer).unwrap();
    let part = |limits: &Limits| {
        let guest = limits.view().guests[0].clone();
        (guest.limit.to_string(), guest.by, guest.priority)
    };
    assert_eq!(part(&limits), ("8mbit".into(), "configuration".into(), 50));
    let change = |limit: &str| SetLimit {
        limit: Some(limit.parse().unwrap()),
        ..SetLimit::default()
    };
    limits.set(None, &change("3mbit")).unwrap();
    assert_eq!(limits.shares.cap(), 3_000_000);
    let more = SetLimit {
        priority: Some(200),
        ..SetLimit::default()
    };
    limits.set(Some(guest), &more).unwrap();
    assert_eq!(part(&limits), ("8mbit".into(), "operator".into(), 200));
    limits.set(Some(guest), &change("none")).unwrap();
    assert_eq!(part(&limits), ("none".into(), "operator".into(), 200));
    assert!(limits.set(None, &more).is_err());
    drop(flow);

    // As after a restart.
    let again = Limits::open(&config(NIGHT, directory.path())).unwrap();
    assert_eq!(again.shares.cap(), 3_000_000);
    let _flow = again.join(guest, "web1", peer).unwrap();
    assert_eq!(part(&again), ("none".into(), "operator".into(), 200));
    let back = SetLimit {
        configured: true,
        ..SetLimit::default()
    };
    again.set(None, &back).unwrap();
    again.set(Some(guest), &back).unwrap();
    assert_eq!(part(&again), ("8mbit".into(), "configuration".into(), 50));
    assert_ne!(again.view().by, "operator");

    // The configuration is read anew: what is set anew holds at once.
    let other = NIGHT.replace("8mbit", "9mbit").replace("50mbit", "40mbit");
    again.configure(&config(&other, directory.path())).unwrap();
    assert_eq!(part(&again).0, "9mbit");
    again.apply("2026-11-22T12:00:00Z".parse().unwrap());
    assert_eq!(again.shares.cap(), 40_000_000);
    let unknown = NIGHT.replace("Europe/Berlin", "Europe/Berlni");
    let told = again.configure(&config(&unknown, directory.path()));
    assert!(told.unwrap_err().to_string().contains("Europe/Berlni"));
    assert_eq!(part(&again).0, "9mbit");
}

#[tokio::test]
async fn a_damaged_file_does_not_stop_the_site() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("limits.json"), b"{\"site\": 7").unwrap();
    let limits = limits(directory.path());
    assert_ne!(limits.view().by, "operator");
}

#[tokio::test]
async fn a_groups_share_is_of_the_link_and_of_all_its_guests_together() {
    let directory = tempfile::tempdir().unwrap();
    let limits = limits(directory.path());
    let peer = SiteKey::from_bytes([1; 32]);
    let protection = |guest: u8, percent, among, link: &str| Protection {
        guest: GuestId([guest; 16]),
        to: "west".to_owned(),
        key: None,
        policy: farhaven_policies::policy::Policy {
            priority: 100,
            ..Default::default()
        },
        schedule: None,
        group: Some("bank".to_owned()),
        share: Some(GroupShare {
            percent,
            among,
            link: link.parse().unwrap(),
        }),
        paused: false,
        seeded: false,
        moving: None,
        shut_down: false,
        held: None,
        moved: None,
        stopped: false,
        stopped_by: None,
        committed: false,
    };
    let protections = [
        protection(1, 60, 2, "none"),
        protection(2, 60, 2, "none"),
        protection(3, 30, 1, "none"),
        protection(4, 100, 1, "none"),
        protection(5, 25, 1, "40mbit"),
    ];
    let mut flows = Vec::new();
    for protection in &protections {
        let guest = protection.guest;
        flows.push(
            limits
                .join(guest, &format!("{}", guest.0[0]), peer)
                .unwrap(),
        );
        limits.owe(protection);
    }
    let told = |at: &str| {
        limits.apply(at.parse().unwrap());
        let state = limits.state();
        let minute = minute_of_week(at.parse().unwrap(), &state.configured.zone);
        let of = |p: &Protection| {
            let (limit, by, priority) = state.guest(p.guest, minute);
            let weight = state.weight(p.guest, priority);
            (limit.to_string(), by, weight)
        };
        protections.iter().map(of).collect::<Vec<_>>()
    };
    let expect = |limit: &str, by: &str, weight| (limit.to_owned(), by.to_owned(), weight);
    // The link carries 50 Mbit/s at night: 60 percent of it are two guests'.
    let night = [
        expect("15mbit", "share", 150),
        expect("15mbit", "share", 150),
        expect("15mbit", "share", 300),
        expect("none", "policy", 300),
        expect("10mbit", "share", 300),
    ];
    assert_eq!(told("2026-11-23T17:00:00Z"), night);
    // And 20 in office hours.
    let day = told("2026-11-23T07:00:00Z");
    let limits_then: Vec<_> = day.iter().map(|(limit, ..)| limit.as_str()).collect();
    assert_eq!(limits_then, ["6mbit", "6mbit", "6mbit", "none", "5mbit"]);
    // What is moved goes before others, by itself.
    limits.favour(protections[0].guest, true);
    let state = limits.state();
    assert_eq!(state.weight(protections[0].guest, u8::MAX), 765);
}
