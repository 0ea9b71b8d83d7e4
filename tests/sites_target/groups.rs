//! Two QEMU guests of a group: tested, moved as one, rolled back, and home again.

use farhaven::runbook::report::Report;
use farhaven::site::groups::{GroupDone, GroupFailover, GroupMove, GroupPointView, GroupTest};
use farhaven::site::health::CheckOutcome;
use farhaven::site::runs::view::RunView;
use farhaven::site::turn::view::RollbackReport;
use farhaven_policies::runbook::run::Outcome;

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

const BOOK: &str = r#"
name = "book"
modes = ["planned"]
[groups]
bank = []
[[steps]]
name = "sync"
do = "final-sync"
on-error = "stop"
[[steps]]
name = "agree"
do = "approve"
by = ["*"]
timeout = "1h"
[[steps]]
name = "promote"
do = "promote"
[[steps]]
name = "start"
do = "start-group"
[[steps]]
name = "healthy"
do = "wait-healthy"
"#;

/// Waits until the run wants its approval; what failed meanwhile is done again.
#[track_caller]
fn wants_approval(site: &TestSite, run: &str) {
    let deadline = std::time::Instant::now() + PATIENCE * 2;
    loop {
        let view: RunView = told(site, &["run", "show", run, "--json"]);
        if view.awaits.is_some() {
            return;
        }
        if let Some(question) = &view.question {
            println!("asked: {}", question.why);
            site.cli(&["run", "decide", run, "repeat", "--as", "anna"])
                .good();
        }
        let over = view.outcome.is_some() || std::time::Instant::now() > deadline;
        assert!(!over, "{view:#?}\n{}", site.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Both daemons are killed while the guests of the group come to stand still, and
/// when they do: what they run from is one point of the group all the same.
#[test]
fn a_run_holds_a_group_of_two_qemus_at_one_instant() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guests) = two_guests(dir.path()) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    let files = dir.path().join("policies.toml");
    let patient = FILES.replace("rpo = \"2s\"", "rpo = \"2s\"\nmax_blackout = \"10s\"");
    std::fs::write(&files, patient).unwrap();
    follows(&mut pair.east, &files);
    protected_as_one(&pair, &guests);
    let book = dir.path().join("book.toml");
    std::fs::write(&book, BOOK).unwrap();
    let book = book.to_str().unwrap();
    let start = ["runbook", "run", book, "--mode", "planned", "--as", "anna"];
    let run: RunView = told(&pair.west, &[&start[..], &["--json"]].concat());
    let run = run.id;
    for (site, wait) in [("east", 900), ("west", 2500), ("east", 300), ("west", 700)] {
        std::thread::sleep(Duration::from_millis(wait));
        let site = match site {
            "east" => &mut pair.east,
            _ => &mut pair.west,
        };
        site.kill();
        site.start();
    }
    wants_approval(&pair.west, &run);
    let stood = guests
        .each_ref()
        .map(|(_, guest)| guest.console.last_beat().unwrap().number);
    pair.west.kill();
    pair.east.kill();
    pair.east.start();
    pair.west.start();
    pair.west
        .cli(&["approve", &run, "agree", "--as", "anna"])
        .good();
    let outcome = super::runs::until(&pair.west, &run, "its end", |view| view.outcome);
    assert_eq!(outcome, Outcome::Succeeded);
    let report: Report = told(&pair.west, &["report", &run, "--json"]);
    let whole: Vec<GroupPointView> = told(&pair.west, &["points", "bank", "--json"]);
    let newest = whole.last().unwrap();
    println!("stopped within {} ms", newest.skew_ms);
    assert_eq!(report.guests.len(), 2);
    for guest in &report.guests {
        let of = (guest.point, newest.points.get(&guest.guest).copied());
        assert!(of.0.is_some() && of.0 == of.1, "{of:?} {whole:?}");
    }
    for ((name, guest), stood) in guests.iter().zip(stood) {
        let there = TestSite::console_of(&pair.west.target(name).active.unwrap());
        there.await_beat(stood + 1, PATIENCE);
        goes_on(&there);
        assert_eq!(guest.console.last_beat().unwrap().number, stood);
    }
}
