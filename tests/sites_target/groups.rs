//! Two QEMU guests of a group: tested, moved as one, rolled back, and home again.

use farhaven::site::groups::{GroupDone, GroupFailover, GroupMove, GroupTest};
use farhaven::site::health::CheckOutcome;
use farhaven::site::turn::view::RollbackReport;

use super::*;

const FILES: &str = "[sites.west]\n[policies.gold]\nrpo = \"2s\"\n[groups.bank]\npolicy = \"gold\"\npeer = \"west\"\n[groups.bank.guests.db]\n[groups.bank.guests.web]\nafter = [\"db\"]\n";

fn told<T: serde::de::DeserializeOwned>(site: &TestSite, args: &[&str]) -> T {
    let told = site.cli(args).good();
    serde_json::from_str(&told.out).unwrap()
}

fn goes_on(console: &Console) {
    let seen = console.last_beat().map_or(0, |beat| beat.number);
    let beat = console.await_beat(seen + 3, PATIENCE);
    let words = (beat.memory.as_str(), beat.disk.as_str());
    assert_eq!(words, ("ok", "ok"), "{beat:?}");
}

fn two_guests(directory: &Path) -> Option<[(&'static str, GuestVm); 2]> {
    let db = small(&directory.join("db"))?;
    Some([("db", db), ("web", small(&directory.join("web"))?)])
}

#[test]
fn a_group_of_two_qemus_is_tested_moved_as_one_and_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guests) = two_guests(dir.path()) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    let files = dir.path().join("policies.toml");
    std::fs::write(&files, FILES).unwrap();
    follows(&mut pair.east, &files);
    protected_as_one(&pair, &guests);

    let test: GroupTest = told(&pair.west, &["test", "bank", "--json"]);
    assert_eq!(test.remains, "", "{test:?}");
    for member in &test.members {
        let console = member.report.as_ref().unwrap().console.as_ref().unwrap();
        goes_on(&Console {
            log: console.log.clone(),
            socket: console.socket.clone(),
        });
    }
    pair.west.cli(&["test", "cleanup", "bank"]).good();
    for (_, guest) in &guests {
        goes_on(&guest.console);
    }

    let moved: GroupMove = told(&pair.east, &["move", "bank", "--accept-pause", "--json"]);
    assert_eq!(moved.remains, "", "{moved:?}");
    println!(
        "skew {:.2} ms, blackout {:.0} ms",
        moved.skew_ms, moved.blackout_ms
    );
    for (name, guest) in &guests {
        assert_eq!(pair.east.source(name).phase, Phase::Moved);
        let last = guest.console.last_beat().unwrap().number;
        let there = TestSite::console_of(&pair.west.target(name).active.unwrap());
        there.await_beat(last + 1, PATIENCE);
        goes_on(&there);
        assert_eq!(
            guest.console.last_beat().unwrap().number,
            last,
            "it stands still"
        );
    }
    let back: GroupDone<RollbackReport> = told(&pair.west, &["rollback", "bank", "--json"]);
    assert_eq!(back.remains, "", "{back:?}");
    for (_, guest) in &guests {
        goes_on(&guest.console);
    }
}

/// The guest that is started as number `place` is healthy when so many beat at west.
fn beats_there(west: &TestSite, guest: &str, place: usize) -> String {
    let run = west.dir.join("run");
    let program = format!(
        "test $(find {} -name console.log -exec grep -lE '^HB [0-9]+ ' {{}} + | wc -l) -ge {place}",
        run.display()
    );
    format!(
        "[groups.bank.guests.{guest}.health.beats]\nscript = [\"/bin/sh\", \"-c\", \"{program}\"]\nevery = \"100ms\"\ntimeout = \"80s\"\n"
    )
}

#[test]
fn a_group_of_two_qemus_whose_site_is_lost_runs_at_the_other_and_is_healthy() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guests) = two_guests(dir.path()) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    let files = dir.path().join("policies.toml");
    let checks = ["db", "web"].into_iter().zip(1..);
    let checks = checks.map(|(guest, place)| beats_there(&pair.west, guest, place));
    std::fs::write(&files, FILES.to_owned() + &checks.collect::<String>()).unwrap();
    follows(&mut pair.east, &files);
    // A program that only the lost site names would not be run.
    follows(&mut pair.west, &files);
    protected_as_one(&pair, &guests);
    pair.west.cli(&["failover", "bank"]).bad("is alive");

    pair.east.kill();
    for (_, guest) in &mut guests {
        guest.kill();
    }
    pair.west.until("the site's silence", PATIENCE, |view| {
        (!view.peers[0].connected).then_some(())
    });
    let done: GroupFailover = told(&pair.west, &["failover", "bank", "--json"]);
    println!(
        "failover: the last guest ran after {:.0} ms, all were healthy after {:.0} ms",
        done.rto_ms, done.checked_ms
    );
    let order: Vec<_> = done.members.iter().map(|m| m.guest.as_str()).collect();
    assert_eq!(order, ["db", "web"]);
    for member in &done.members {
        assert_eq!(member.error, "", "{done:?}");
        let outcomes: Vec<_> = member.checks.iter().map(|check| check.outcome).collect();
        assert_eq!(outcomes, [CheckOutcome::Passed], "{done:?}");
        println!(
            "{}: healthy {} ms after it ran",
            member.guest, member.checks[0].took_ms
        );
        let active = pair.west.target(&member.guest).active.unwrap();
        goes_on(&TestSite::console_of(&active));
    }
}
