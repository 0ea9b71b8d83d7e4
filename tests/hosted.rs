//! Guests that the daemon itself hosts (`farhaven guest start`), by the real
//! program: protected, lost, taken over, moved, ended.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

#[path = "hosted/groups.rs"]
mod groups;
#[path = "hosted/private.rs"]
mod private;
#[path = "hosted/runs/mod.rs"]
mod runs;
mod support;

use std::time::Duration;

use farhaven::site::records::GuestRecord;
use farhaven::site::view::Phase;
use support::Console;
use support::site::{Pair, TestSite};

const LINK: &str = "200mbit,20ms";
const LONG: Duration = Duration::from_secs(90);

/// Starts a small guest; its console.
fn start(site: &TestSite, name: &str, kind: &str) -> Console {
    let told = site.cli(&[
        "guest", "start", name, "--kind", kind, "--ram", "32MiB", "--disk", "8MiB", "--json",
    ]);
    let record: GuestRecord = serde_json::from_str(&told.good().out).unwrap();
    let paths = record.console.unwrap();
    Console {
        log: paths.log,
        socket: paths.socket,
    }
}

fn ok(console: &Console) {
    let beat = console.check(LONG);
    let words = (beat.memory.as_str(), beat.disk.as_str());
    assert!(
        words == ("ok", "ok") && beat.pages > 0 && beat.blocks > 0,
        "{beat:?}"
    );
}

/// Failover of a lost site, restarts of both, and the end.
fn is_taken_over(kind: &str) {
    let mut pair = Pair::start(LINK, "", "");
    let console = start(&pair.east, "trial", kind);
    console.await_beat(3, LONG);
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "1s"])
        .good();
    pair.east.until_sealed("trial", 3, LONG);
    ok(&console);
    pair.east
        .cli(&["guest", "end", "trial"])
        .bad("is protected");
    let last = console.last_beat().unwrap();
    pair.east.kill();
    pair.west.until("the link is down", LONG, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "trial"]).good();
    let there = TestSite::console_of(&pair.west.target("trial").active.unwrap());
    there.await_beat(last.number + 10, LONG);
    ok(&there);

    // The source hears that it is not the owner any more; its guest is gone anyway.
    pair.east.start();
    pair.east.until("fenced or lost", LONG, |v| {
        matches!(v.guests[0].phase, Phase::Fenced | Phase::Lost).then_some(())
    });
    // The target's daemon takes its guest with it, and says so.
    assert!(pair.west.terminate());
    pair.west.start();
    let view = pair.west.target("trial");
    assert!(view.active.is_none() && view.trouble.contains("ended with it"));
    pair.west.cli(&["failover", "trial", "--force"]).good();
    let there = TestSite::console_of(&pair.west.target("trial").active.unwrap());
    there.await_beat(3, LONG);
    ok(&there);
    pair.west.cli(&["guest", "end", "trial"]).good();
    assert!(pair.west.target("trial").active.is_none());
    pair.west
        .cli(&["guest", "end", "trial"])
        .bad("does not run here");
}

#[test]
fn a_sim_guest_outlives_its_site() {
    is_taken_over("sim");
}

#[test]
fn a_kvm_guest_outlives_its_site() {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        eprintln!("skipped: /dev/kvm cannot be opened");
        return;
    }
    is_taken_over("kvm");
}

#[test]
fn a_move_loses_no_heartbeat_and_ends_the_source() {
    let pair = Pair::start(LINK, "", "");
    let console = start(&pair.east, "trial", "sim");
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "1s"])
        .good();
    pair.east.until_sealed("trial", 2, LONG);
    pair.east.cli(&["move", "trial"]).good();
    let last = console.last_beat().unwrap();
    assert_eq!(pair.east.source("trial").phase, Phase::Moved);
    let there = TestSite::console_of(&pair.west.target("trial").active.unwrap());
    there.await_beat(last.number + 1, LONG);
    let log = std::fs::read_to_string(&there.log).unwrap();
    let next = format!("HB {} ", last.number + 1);
    assert!(
        log.lines().any(|l| l.starts_with(&next)),
        "no {next} in {log}"
    );
    ok(&there);
}

#[test]
fn an_end_amid_hydration_is_no_trouble() {
    let pair = Pair::start(LINK, "", "hydrate_rate = \"4mbit\"");
    let console = start(&pair.east, "trial", "sim");
    console.await_beat(3, LONG);
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "1s"])
        .good();
    pair.east.until_sealed("trial", 1, LONG);
    pair.east.cli(&["move", "trial"]).good();
    let active = pair.west.target("trial").active.unwrap();
    assert!(!active.hydrated, "too quick to be ended amid it");
    pair.west.cli(&["guest", "end", "trial"]).good();
    // The copying notices within a step of it.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        let view = pair.west.target("trial");
        assert!(view.active.is_none());
        assert!(
            view.trouble.contains("ended by an operator"),
            "{}",
            view.trouble
        );
    }
}

#[test]
fn what_cannot_be_started_is_said_and_leaves_nothing() {
    let pair = Pair::start(LINK, "", "");
    let bad = |more: &[&str], words: &str| {
        let told = pair
            .east
            .cli(&[&["guest", "start", "x", "--kind"], more].concat());
        told.bad(words);
    };
    bad(&["smi"], "did you mean 'sim'?");
    bad(
        &["sim", "--workload", "databse"],
        "did you mean 'database'?",
    );
    bad(&["sim", "--workload", "noise:0"], "noise");
    bad(&["sim", "--ram", "0MiB"], "at least");
    bad(&["sim", "--ram", "1000TiB"], "free");
    bad(&["sim", "--disk", "1000TiB"], "free");
    bad(&["sim", "--disk", "3"], "");
    bad(&["kvm", "--vcpus", "9999"], "1 to");
    pair.east
        .cli(&["guest", "start", "../x", "--kind", "sim"])
        .bad("no name");
    assert!(pair.east.view().guests.is_empty());
    let run = pair.east.dir.join("run");
    let left: Vec<_> = std::fs::read_dir(&run).unwrap().flatten().collect();
    let left = left.iter().filter(|e| e.path().is_dir());
    let parts = left.flat_map(|e| std::fs::read_dir(e.path()).unwrap().flatten());
    assert_eq!(parts.count(), 0);

    start(&pair.east, "x", "sim");
    bad(&["sim"], "known already");
    pair.east.cli(&["guest", "remove", "x"]).bad("guest end");
    pair.east.cli(&["guest", "end", "x"]).good();
    pair.east.cli(&["guest", "end", "x"]).bad("no guest 'x'");
}

/// A guest that writes faster than the link carries, and may not be throttled:
/// it stays, protected as before, and that is told with the figure.
#[test]
fn a_move_that_would_stand_too_long_stays_unless_that_is_accepted() {
    let policy = "[protect]\nmax_throttle = 0\nmax_blackout = \"400ms\"";
    let pair = Pair::start("20mbit,40ms", policy, "");
    start_noise(&pair.east);
    pair.east.cli(&["move", "trial"]).bad("is not protected");
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "2s"])
        .good();
    pair.east.until_sealed("trial", 2, LONG);
    let outlook = pair.east.cli(&["move", "trial", "--dry-run"]).good();
    assert!(
        outlook.out.contains("link") && outlook.out.contains("left"),
        "{}",
        outlook.out
    );

    let told = pair.east.cli(&["move", "trial"]);
    assert_eq!(told.status, Some(3), "{}{}", told.out, told.err);
    for words in [
        "runs on here, protected as before",
        "protect.max_blackout is 400ms",
        "--accept-pause",
        "/s",
    ] {
        assert!(told.err.contains(words), "no '{words}' in: {}", told.err);
    }
    let view = pair.east.source("trial");
    let outlook = view.outlook.clone().unwrap();
    assert!(outlook.expected_blackout_ms > 400.0 && !outlook.within);
    assert_eq!(outlook.throttle_percent, 0);
    assert!(pair.west.target("trial").active.is_none());
    pair.east
        .until_sealed("trial", view.points_sealed + 2, LONG);

    let told = pair
        .east
        .cli(&["move", "trial", "--accept-pause", "--json"])
        .good();
    let report: serde_json::Value = serde_json::from_str(&told.out).unwrap();
    assert!(
        report["expected_blackout_ms"].as_f64().unwrap() > 400.0,
        "{report}"
    );
    assert!(
        report["note"].as_str().unwrap().contains("stand still"),
        "{report}"
    );
    assert_eq!(pair.east.source("trial").phase, Phase::Moved);
}

/// The same guest, throttled within a policy that suffices, is moved: the
/// throttle is what makes the difference, and it ends with the move. The point
/// before the last cut alone would leave too much for that: short rounds follow.
#[test]
fn a_guest_that_outruns_the_link_is_throttled_and_moved() {
    let policy = "[protect]\nmax_throttle = 95\nmax_blackout = \"700ms\"";
    let pair = Pair::start("20mbit,40ms", policy, "");
    let console = start_noise(&pair.east);
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "2s"])
        .good();
    pair.east.until_sealed("trial", 2, LONG);
    let told = pair.east.cli(&["move", "trial", "--json"]).good();
    let report: serde_json::Value = serde_json::from_str(&told.out).unwrap();
    assert!(
        report["expected_blackout_ms"].as_f64().unwrap() <= 700.0,
        "{report}"
    );
    let outlook = pair.east.source("trial").outlook.unwrap();
    assert!(outlook.rounds >= 2 && outlook.within, "{outlook}");
    assert!(
        report["note"].as_str().unwrap().contains("throttled by"),
        "{report}"
    );
    assert!(told.err.contains("moving 'trial': round 1"), "{}", told.err);
    let last = console.last_beat().unwrap();
    let there = TestSite::console_of(&pair.west.target("trial").active.unwrap());
    there.await_beat(last.number + 1, LONG);
    ok(&there);
}

fn start_noise(site: &TestSite) -> Console {
    let told = site.cli(&[
        "guest",
        "start",
        "trial",
        "--kind",
        "sim",
        "--ram",
        "64MiB",
        "--disk",
        "4MiB",
        "--workload",
        "noise:8",
        "--json",
    ]);
    let record: GuestRecord = serde_json::from_str(&told.good().out).unwrap();
    let paths = record.console.unwrap();
    Console {
        log: paths.log,
        socket: paths.socket,
    }
}

#[test]
fn what_a_guest_inside_of_the_daemon_cannot_do_is_said() {
    let pair = Pair::start(LINK, "[protect]\nmode = \"disk-only\"", "");
    start(&pair.east, "trial", "sim");
    pair.east
        .cli(&["protect", "trial", "--to", "west"])
        .bad("cannot boot from its disks");
    let policy = "[protect]\nquiesce = \"agent\"\nquiesce_timeout = \"500ms\"";
    let pair = Pair::start(LINK, policy, "");
    start(&pair.east, "trial", "sim");
    pair.east
        .cli(&["protect", "trial", "--to", "west", "--rpo", "1s"])
        .good();
    pair.east.until_sealed("trial", 2, LONG);
    let told = pair.west.cli(&["points", "trial"]).good().out;
    assert!(told.contains("crash (not frozen)"), "{told}");
    let trouble = pair.east.until("the reason", LONG, |view| {
        let guest = view.guests.into_iter().next()?;
        (!guest.trouble.is_empty()).then_some(guest.trouble)
    });
    assert!(trouble.contains("no guest agent"), "{trouble}");
}
