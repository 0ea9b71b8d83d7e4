//! What a daemon's death leaves of a group's point that not all guests had
//! sealed: nothing that is offered.

use farhaven::site::groups::{GroupFailover, GroupPointView};
use farhaven::site::view::PointView;

use super::*;

pub(crate) const FILES: &str = "[sites.west]\n[policies.gold]\nrpo = \"1s\"\n[groups.bank]\npolicy = \"gold\"\npeer = \"west\"\n[groups.bank.guests.db]\n[groups.bank.guests.web]\nafter = [\"db\"]\n";

/// The pair, with a bank of two small guests at east that is protected.
fn bank() -> (Pair, [Console; 2]) {
    bank_by(FILES)
}

pub(crate) fn bank_by(policies: &str) -> (Pair, [Console; 2]) {
    let mut pair = Pair::start(LINK, "", "");
    let files = pair.dir.path().join("policies.toml");
    std::fs::write(&files, policies).unwrap();
    assert!(pair.east.terminate());
    let config = pair.east.dir.join("site.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let named = format!("[site]\npolicy_files = \"{}\"", files.display());
    std::fs::write(&config, text.replacen("[site]", &named, 1)).unwrap();
    pair.east.start();
    let consoles = ["db", "web"].map(|name| start(&pair.east, name, "sim"));
    for name in ["db", "web"] {
        pair.east.until("it is protected", LONG, |view| {
            let mut guests = view.guests.into_iter();
            guests.find(|g| g.name == name && g.points_sealed >= 1)
        });
    }
    (pair, consoles)
}

/// It goes on, and finds its memory and disks as they must be.
fn sound(console: &Console) {
    let seen = console.last_beat().map_or(0, |beat| beat.number);
    let beat = console.await_beat(seen + 3, LONG);
    let words = (beat.memory.as_str(), beat.disk.as_str());
    assert_eq!(words, ("ok", "ok"), "{beat:?}");
}

fn whole(site: &TestSite) -> Vec<u64> {
    let told = site.cli(&["points", "bank", "--json"]).good();
    let points: Vec<GroupPointView> = serde_json::from_str(&told.out).unwrap();
    points.into_iter().map(|point| point.cut).collect()
}

fn points(site: &TestSite, guest: &str) -> Vec<PointView> {
    let told = site.cli(&["points", guest, "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

/// Waits for a whole point of a cut after this one.
fn whole_after(pair: &Pair, cut: u64) -> u64 {
    let deadline = std::time::Instant::now() + LONG;
    loop {
        if let Some(newest) = whole(&pair.west).last().filter(|newest| **newest > cut) {
            return *newest;
        }
        assert!(std::time::Instant::now() < deadline, "none is whole");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits for a cut that db has sealed and web will not have for minutes.
fn half_a_point(pair: &Pair) -> u64 {
    let newest = |guest: &str| {
        let points = points(&pair.west, guest);
        let marks = points.iter().filter_map(|point| point.group.as_ref());
        marks.map(|mark| mark.cut).max().unwrap_or_default()
    };
    // What web has to send takes minutes from here on; db's is sealed at once.
    pair.east
        .cli(&["link", "limit", "1kbit", "--guest", "web"])
        .good();
    let before = newest("db").max(newest("web"));
    let deadline = std::time::Instant::now() + LONG;
    loop {
        let cut = newest("db");
        // One that was under way before the limit may be whole soon.
        if cut > before && newest("web") < cut {
            return cut;
        }
        assert!(std::time::Instant::now() < deadline, "none is half");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_kill_between_the_seals_of_two_guests_leaves_no_point_of_the_group() {
    let (mut pair, consoles) = bank();
    for console in &consoles {
        console.await_beat(3, LONG);
    }
    whole_after(&pair, 0);
    let half = half_a_point(&pair);
    pair.west.kill();
    pair.west.start();
    let of_db = points(&pair.west, "db");
    let marks: Vec<u64> = of_db
        .iter()
        .filter_map(|p| Some(p.group.as_ref()?.cut))
        .collect();
    assert!(marks.contains(&half), "db's own point is there: {marks:?}");
    let offered = whole(&pair.west);
    assert!(
        !offered.contains(&half) && !offered.is_empty(),
        "{offered:?}"
    );
    pair.west
        .cli(&["failover", "bank", "--point", &half.to_string(), "--force"])
        .bad("no whole point");

    // Now the source is lost between two seals: the group runs from the newest
    // point that is whole.
    pair.east
        .cli(&["link", "limit", "none", "--guest", "web"])
        .good();
    whole_after(&pair, half);
    let half = half_a_point(&pair);
    pair.east.kill();
    pair.west.until("the link is down", LONG, |view| {
        (!view.peers[0].connected).then_some(())
    });
    let offered = whole(&pair.west);
    assert!(!offered.contains(&half), "{offered:?}");
    let told = pair.west.cli(&["failover", "bank", "--json"]).good();
    let done: GroupFailover = serde_json::from_str(&told.out).unwrap();
    assert_eq!(Some(&done.cut), offered.last());
    assert!(done.cut < half, "{} is not before {half}", done.cut);
    for member in &done.members {
        let active = pair.west.target(&member.guest).active.unwrap();
        let there = TestSite::console_of(&active);
        sound(&there);
    }
}

/// Where all guests of the bank are, once that is settled: at west?
fn settled(pair: &Pair) -> bool {
    pair.east.until("all are on one side", LONG, |view| {
        let phases: Vec<Phase> = view.guests.iter().map(|guest| guest.phase).collect();
        let all = |of: &[Phase]| phases.len() == 2 && phases.iter().all(|p| of.contains(p));
        match phases {
            _ if all(&[Phase::Moved]) => Some(true),
            _ if all(&[Phase::Protected, Phase::Shipping]) => Some(false),
            // They lived in the daemon that was killed.
            _ if all(&[Phase::Lost]) => Some(false),
            _ => None,
        }
    })
}

/// Begins the move, and waits until one of its guests is in this phase.
fn moving(pair: &Pair, phase: Phase) -> std::process::Child {
    let socket = pair.east.dir.join("api.sock");
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_farhaven"))
        .args(["--api", socket.to_str().unwrap()])
        .args(["move", "bank", "--accept-pause", "--json"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let there = [phase, Phase::Held, Phase::Moved];
    pair.east.until("the move is there", LONG, |view| {
        let mut guests = view.guests.iter();
        guests
            .any(|guest| there.contains(&guest.phase))
            .then_some(())
    });
    child
}

/// Milliseconds after a phase was seen.
const KILLS: [(Phase, u64); 5] = [
    (Phase::Moving, 0),
    (Phase::Moving, 300),
    (Phase::Held, 0),
    (Phase::Held, 60),
    (Phase::Held, 200),
];

#[test]
fn a_group_s_move_whose_target_is_killed_ends_on_one_side() {
    let mut pair = None;
    for (phase, wait) in KILLS {
        let (mut sites, consoles) = pair.take().unwrap_or_else(bank);
        sites
            .west
            .until("a whole point", LONG, |view| view.groups.first()?.rpo_ms);
        let mut child = moving(&sites, phase);
        std::thread::sleep(Duration::from_millis(wait));
        sites.west.kill();
        sites.west.start();
        let _ = child.wait();
        let moved = settled(&sites);
        println!("{phase:?} + {wait} ms: moved {moved}");
        for guest in ["db", "web"] {
            let there = sites.west.target(guest);
            // What had run there ended with its daemon, and is run from its last point.
            let ended = there.active.is_none();
            assert!(moved || ended, "{guest} runs twice: {there:?}");
            if moved && ended {
                sites.west.until("it is west's", LONG, |view| {
                    let mut all = view.standbys.iter();
                    let active = all.any(|s| s.name == guest && s.active.is_some());
                    let told = there.trouble.contains("ended with it");
                    (active || told).then_some(())
                });
            }
        }
        if !moved {
            for console in &consoles {
                sound(console);
            }
            pair = Some((sites, consoles));
        }
    }
}

/// Seen first where the third kill of the test above fell between two starts:
/// one guest was given back, the other started.
#[test]
fn a_target_killed_between_the_starts_of_two_guests_has_them_both() {
    let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = door.local_addr().unwrap();
    drop(door);
    // web waits until db is healthy, which it is once somebody listens there.
    let files = format!(
        "{FILES}[groups.bank.guests.db.health.port]\ntcp = \"{port}\"\nevery = \"100ms\"\ntimeout = \"80s\"\n"
    );
    let (mut pair, _) = bank_by(&files);
    pair.west
        .until("a whole point", LONG, |view| view.groups.first()?.rpo_ms);
    let mut child = moving(&pair, Phase::Moving);
    pair.west.until("db runs there", LONG, |view| {
        let mut standbys = view.standbys.into_iter();
        standbys.find(|s| s.name == "db")?.active
    });
    assert!(pair.west.target("web").active.is_none(), "web waits for db");
    pair.west.kill();
    let _door = std::net::TcpListener::bind(port).unwrap();
    pair.west.start();
    let _ = child.wait();
    assert!(settled(&pair), "they are at west");
    for guest in ["db", "web"] {
        let active = pair.west.until("it runs there", LONG, |view| {
            let mut standbys = view.standbys.into_iter();
            standbys.find(|s| s.name == guest)?.active
        });
        sound(&TestSite::console_of(&active));
    }
}

#[test]
fn a_group_s_move_whose_source_is_killed_ends_on_one_side() {
    for (phase, wait) in KILLS {
        let (mut sites, _) = bank();
        sites
            .west
            .until("a whole point", LONG, |view| view.groups.first()?.rpo_ms);
        let mut child = moving(&sites, phase);
        std::thread::sleep(Duration::from_millis(wait));
        sites.east.kill();
        let _ = child.wait();
        sites.east.start();
        let moved = settled(&sites);
        println!("{phase:?} + {wait} ms: moved {moved}");
        for guest in ["db", "web"] {
            let active = sites.west.target(guest).active;
            assert_eq!(active.is_some(), moved, "{guest}");
            if let Some(active) = active {
                sound(&TestSite::console_of(&active));
            }
        }
    }
}
