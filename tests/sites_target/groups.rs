//! Two QEMU guests of a group: tested, moved as one, rolled back, and home again.

use farhaven::site::groups::{GroupDone, GroupMove, GroupTest};
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

#[test]
fn a_group_of_two_qemus_is_tested_moved_as_one_and_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut guests = Vec::new();
    for name in ["db", "web"] {
        let Some(guest) = small(&dir.path().join(name)) else {
            return;
        };
        guests.push((name, guest));
    }
    let mut pair = Pair::start(LINK, "", "");
    let files = dir.path().join("policies.toml");
    std::fs::write(&files, FILES).unwrap();
    assert!(pair.east.terminate());
    let config = pair.east.dir.join("site.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let named = format!("[site]\npolicy_files = \"{}\"", files.display());
    std::fs::write(&config, text.replacen("[site]", &named, 1)).unwrap();
    pair.east.start();
    for (name, guest) in &guests {
        guest.console.await_beat(5, PATIENCE);
        let qmp = guest.qmp.to_str().unwrap();
        pair.east.cli(&["guest", "add", name, "--qmp", qmp]).good();
    }
    pair.west.until("a whole point", PATIENCE * 4, |view| {
        view.groups.first()?.rpo_ms
    });

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
