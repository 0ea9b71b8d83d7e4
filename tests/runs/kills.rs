//! A run whose daemon is killed at every boundary between two steps ends as one
//! that was not.

use super::*;
use farhaven::site::view::Phase;

/// Steps with a delay before each, in which the daemon is killed.
fn with_delays(steps: &[&str]) -> (String, Vec<String>) {
    let (mut text, mut names) = (String::new(), Vec::new());
    for (n, step) in steps.iter().enumerate() {
        let name = format!("wait{n}");
        text.push_str(&format!(
            "[[steps]]\nname = \"{name}\"\ndo = \"delay\"\nfor = \"1500ms\"\n[[steps]]\nname = \"step{n}\"\n{step}\n"
        ));
        names.push(name);
    }
    (text, names)
}

/// Kills a site in every delay of the run.
fn kill_in_each(site: &mut TestSite, run: &str, waits: &[String]) {
    for wait in waits {
        at(site, run, wait);
        site.kill();
        site.start();
    }
}

#[test]
fn an_unplanned_run_outlives_its_daemon() {
    let (mut pair, _console) = stage();
    pair.east.kill();
    pair.west.until("the link is down", LONG, |view| {
        (!view.peers[0].connected).then_some(())
    });
    let (steps, waits) = with_delays(&[
        "do = \"check\"",
        "do = \"fence\"",
        "do = \"promote\"",
        "do = \"remap\"",
        "do = \"start-group\"",
        "do = \"wait-healthy\"",
    ]);
    let file = runbook(&pair, "unplanned", &steps);
    let run = begin(&pair.west, &file, "unplanned", &[]);
    kill_in_each(&mut pair.west, &run, &waits);
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let there = there(&pair);
    there.await_beat(3, LONG);
    sound(&there);

    // The old source learns of the term before anything else.
    pair.east.start();
    pair.east.until("fenced or lost", LONG, |view| {
        matches!(view.guests[0].phase, Phase::Fenced | Phase::Lost).then_some(())
    });
    let report = report(&pair.west, &run);
    let restarts = report
        .events
        .iter()
        .filter(|event| event.what == "the daemon was restarted");
    assert_eq!(restarts.count(), waits.len());
    assert!(report.rpo_ms.is_some() && report.rto_ms.is_some());
    assert!(!report.guests[0].source_stopped);
}

#[test]
fn a_planned_run_outlives_both_daemons() {
    let (mut pair, console) = stage();
    let (steps, waits) = with_delays(&[
        "do = \"check\"",
        "do = \"final-sync\"",
        "do = \"promote\"",
        "do = \"remap\"",
        "do = \"start-group\"",
        "do = \"wait-healthy\"",
    ]);
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    kill_in_each(&mut pair.west, &run, &waits[..3]);
    let last = console.last_beat().unwrap();
    // The guest stands still there, and its source asks what becomes of it.
    assert_eq!(pair.east.source("web").phase, Phase::Held);
    at(&pair.west, &run, &waits[3]);
    pair.east.kill();
    pair.west.kill();
    pair.west.start();
    pair.east.start();
    kill_in_each(&mut pair.west, &run, &waits[4..]);
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let there = there(&pair);
    there.await_beat(last.number + 1, LONG);
    sound(&there);
    pair.east.until("it has moved", LONG, |view| {
        (view.guests[0].phase == Phase::Moved).then_some(())
    });
    let report = report(&pair.west, &run);
    assert_eq!(report.rpo_ms, Some(0));
    assert!(report.guests[0].blackout_ms.is_some());
}

#[test]
fn a_test_outlives_its_daemon_and_leaves_nothing() {
    let (mut pair, console) = stage();
    let before = pair.west.target("web");
    let (steps, waits) = with_delays(&[
        "do = \"check\"",
        "do = \"promote\"",
        "do = \"remap\"",
        "do = \"start-group\"",
        "do = \"wait-healthy\"",
        "do = \"cleanup\"",
    ]);
    let file = runbook(&pair, "test", &steps);
    let run = begin(&pair.west, &file, "test", &[]);
    kill_in_each(&mut pair.west, &run, &waits);
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let after = pair.west.target("web");
    assert!(after.test.is_none() && after.active.is_none());
    assert_eq!(after.term, before.term);
    assert!(before.tested_at.is_none() && after.tested_at.is_some());
    let places = [
        pair.west.dir.join("run").join(&after.id).join("test"),
        pair.west.dir.join("ram").join(format!("{}-test", after.id)),
    ];
    assert!(places.iter().all(|place| !place.exists()));
    let report = report(&pair.west, &run);
    assert!(report.guests[0].gone.len() == 3, "{:?}", report.guests);
    assert!(report.guests[0].console.is_some());
    // Nobody at the source noticed.
    let beat = console.last_beat().unwrap();
    console.await_beat(beat.number + 5, LONG);
    sound(&console);
}
