//! A run whose daemon is killed at every boundary between two steps, or at any
//! time, ends as one that was not.

use super::*;
use farhaven::site::view::Phase;

/// Steps with an approval before each: there the daemon is killed.
fn with_stops(steps: &[&str]) -> (String, Vec<String>) {
    let (mut text, mut names) = (String::new(), Vec::new());
    for (n, step) in steps.iter().enumerate() {
        let name = format!("stop{n}");
        text.push_str(&format!(
            "[[steps]]\nname = \"{name}\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n[[steps]]\nname = \"step{n}\"\n{step}\n"
        ));
        names.push(name);
    }
    (text, names)
}

/// Kills a site at each of these stops of the run, and lets it go on.
fn kill_at_each(site: &mut TestSite, run: &str, stops: &[String]) {
    for stop in stops {
        at(site, run, stop);
        site.kill();
        site.start();
        agree(site, run, stop);
    }
}

/// Kills a site again and again while its run is under way, or waits for the
/// approval at its end: what a run started runs again after each.
fn kill_at_any_time(site: &mut TestSite, pauses: &[u64]) {
    for pause in pauses {
        std::thread::sleep(Duration::from_millis(*pause));
        site.kill();
        site.start();
    }
}

/// These steps, and an approval at their end.
fn then_approved(steps: &[&str]) -> String {
    let numbered = steps.iter().enumerate();
    let mut text: String = numbered
        .map(|(n, step)| format!("[[steps]]\nname = \"step{n}\"\n{step}\n"))
        .collect();
    text.push_str(
        "[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n",
    );
    text
}

const UNPLANNED: [&str; 6] = [
    "do = \"check\"",
    "do = \"fence\"",
    "do = \"promote\"",
    "do = \"remap\"",
    "do = \"start-group\"",
    "do = \"wait-healthy\"",
];

const PLANNED: [&str; 6] = [
    "do = \"check\"",
    "do = \"final-sync\"",
    "do = \"promote\"",
    "do = \"remap\"",
    "do = \"start-group\"",
    "do = \"wait-healthy\"",
];

/// A stage whose source is lost.
fn lost() -> Pair {
    let (mut pair, _console) = stage();
    pair.east.kill();
    pair.west.until("the link is down", LONG, |view| {
        (!view.peers[0].connected).then_some(())
    });
    pair
}

/// The old source learns of the term before anything else.
fn comes_back_fenced(pair: &mut Pair) {
    pair.east.start();
    pair.east.until("fenced or lost", LONG, |view| {
        matches!(view.guests[0].phase, Phase::Fenced | Phase::Lost).then_some(())
    });
}

#[test]
fn an_unplanned_run_outlives_its_daemon() {
    let mut pair = lost();
    let (steps, stops) = with_stops(&UNPLANNED);
    let file = runbook(&pair, "unplanned", &steps);
    let run = begin(&pair.west, &file, "unplanned", &[]);
    kill_at_each(&mut pair.west, &run, &stops);
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let there = there(&pair);
    there.await_beat(3, LONG);
    sound(&there);
    comes_back_fenced(&mut pair);
    let report = report(&pair.west, &run);
    let restarts = report
        .events
        .iter()
        .filter(|event| event.what == "the daemon was restarted");
    assert_eq!(restarts.count(), stops.len());
    assert!(report.rpo_ms.is_some() && report.rto_ms.is_some());
    assert!(!report.guests[0].source_stopped);
    let agreed = report.events.iter().filter(|e| e.approval == Some(true));
    assert_eq!(agreed.count(), stops.len());
}

#[test]
fn an_unplanned_run_that_is_killed_at_any_time() {
    let mut pair = lost();
    let file = runbook(&pair, "unplanned", &then_approved(&UNPLANNED));
    let run = begin(&pair.west, &file, "unplanned", &[]);
    kill_at_any_time(&mut pair.west, &[0, 5, 20, 40, 10, 80]);
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let there = there(&pair);
    there.await_beat(3, LONG);
    sound(&there);
    comes_back_fenced(&mut pair);
}

#[test]
fn a_planned_run_outlives_both_daemons() {
    let (mut pair, console) = stage();
    let (steps, stops) = with_stops(&PLANNED);
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    // Until its last changes are here, the source's guest must live on.
    kill_at_each(&mut pair.west, &run, &stops[..2]);
    at(&pair.west, &run, &stops[2]);
    let last = console.last_beat().unwrap();
    // The guest stands still there, and its source asks what becomes of it.
    assert_eq!(pair.east.source("web").phase, Phase::Held);
    for stop in &stops[2..] {
        at(&pair.west, &run, stop);
        pair.east.kill();
        pair.west.kill();
        pair.west.start();
        pair.east.start();
        agree(&pair.west, &run, stop);
    }
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
fn a_planned_run_whose_conductor_is_killed_at_any_time() {
    let (mut pair, console) = stage();
    let file = runbook(&pair, "planned", &then_approved(&PLANNED));
    let run = begin(&pair.west, &file, "planned", &[]);
    kill_at_any_time(&mut pair.west, &[50, 200, 400, 30, 100, 10, 60]);
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let last = console.last_beat().unwrap();
    let there = there(&pair);
    there.await_beat(last.number + 1, LONG);
    sound(&there);
    pair.east.until("it has moved", LONG, |view| {
        (view.guests[0].phase == Phase::Moved).then_some(())
    });
}

#[test]
fn a_rollback_outlives_its_daemon() {
    let (mut pair, console) = stage();
    let file = runbook(&pair, "planned", &then_approved(&PLANNED));
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    let last = console.last_beat().unwrap();
    there(&pair).await_beat(last.number + 1, LONG);
    pair.west
        .cli(&["run", "abort", &run, "--rollback", "--as", "anna"])
        .good();
    kill_at_any_time(&mut pair.west, &[0, 10, 40, 20]);
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    assert!(pair.west.target("web").active.is_none());
    console.await_beat(last.number + 5, LONG);
    sound(&console);
    pair.east.until("protected again", LONG, |view| {
        (view.guests[0].phase == Phase::Protected).then_some(())
    });
}

#[test]
fn a_test_outlives_its_daemon_and_leaves_nothing() {
    let (mut pair, console) = stage();
    let before = pair.west.target("web");
    let (steps, stops) = with_stops(&[
        "do = \"check\"",
        "do = \"promote\"",
        "do = \"remap\"",
        "do = \"start-group\"",
        "do = \"wait-healthy\"",
        "do = \"cleanup\"",
    ]);
    let file = runbook(&pair, "test", &steps);
    let run = begin(&pair.west, &file, "test", &[]);
    kill_at_each(&mut pair.west, &run, &stops);
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
    // That it went well is known after a restart, too.
    pair.west.kill();
    pair.west.start();
    assert_eq!(pair.west.target("web").tested_at, after.tested_at);
}
