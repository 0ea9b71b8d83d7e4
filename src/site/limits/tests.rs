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
