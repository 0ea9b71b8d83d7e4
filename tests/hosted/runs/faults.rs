//! Failures, refusals, hooks that hang, sources that are lost: the guest runs
//! where it should, and the record tells why.

use super::*;
use farhaven::site::view::Phase;

const PLANNED: &str = r#"
[[steps]]
name = "sync"
do = "final-sync"
on-error = "rollback"
[[steps]]
name = "promote"
do = "promote"
on-error = "rollback"
[[steps]]
name = "start"
do = "start-group"
on-error = "rollback"
"#;

#[test]
fn a_hook_that_fails_gives_the_guest_back() {
    let (pair, console) = stage();
    let steps = format!(
        "{PLANNED}[[steps]]\nname = \"dns\"\ndo = \"exec\"\nrun = [\"/bin/sh\", \"-c\", \"echo no >&2; exit 3\"]\non-error = \"rollback\"\n"
    );
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    assert!(pair.west.target("web").active.is_none());
    // Unchanged: it goes on with the very next beat, and is protected as before.
    let last = console.last_beat().unwrap();
    console.await_beat(last.number + 5, LONG);
    sound(&console);
    pair.east.until("protected again", LONG, |view| {
        (view.guests[0].phase == Phase::Protected).then_some(())
    });
    let report = report(&pair.west, &run);
    let why = report
        .events
        .iter()
        .find(|e| e.what.contains("exit status: 3"));
    assert!(
        why.is_some_and(|e| e.what.contains("no")),
        "{:#?}",
        report.events
    );
    // And may be moved by the next one.
    let file = runbook(&pair, "planned", PLANNED);
    let run = begin(&pair.west, &file, "planned", &[]);
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let last = console.last_beat().unwrap();
    there(&pair).await_beat(last.number + 1, LONG);
    pair.east.until("it has moved", LONG, |view| {
        (view.guests[0].phase == Phase::Moved).then_some(())
    });
}

#[test]
fn hooks_that_hang_and_people_who_do_not_decide() {
    let (pair, console) = stage();
    let steps = r#"
[[steps]]
name = "hang"
do = "exec"
run = ["/bin/sleep", "1000"]
timeout = "1s"
modes = ["test"]
on-error = "continue"
[[steps]]
name = "agree"
do = "approve"
by = ["ben"]
timeout = "1s"
[[steps]]
name = "promote"
do = "promote"
on-error = "rollback"
[[steps]]
name = "start"
do = "start-group"
on-error = "rollback"
[[steps]]
name = "cleanup"
do = "cleanup"
"#;
    let file = runbook(&pair, "test", steps);
    let run = begin(&pair.west, &file, "test", &[]);
    until(&pair.west, &run, "a question", |view| view.question.clone());
    pair.west
        .cli(&["failover", "web", "--force"])
        .bad("run abort");
    pair.west
        .cli(&["approve", &run, "agree", "--as", "ben"])
        .bad("awaits no approval");
    pair.west
        .cli(&["run", "decide", &run, "take-as-done", "--as", "anna"])
        .bad("no answer to what is asked");
    pair.west
        .cli(&["run", "decide", &run, "repeat", "--as", "anna"])
        .good();
    at(&pair.west, &run, "agree");
    pair.west
        .cli(&["approve", &run, "agree", "--as", "carl"])
        .bad("ben may");
    pair.west
        .cli(&[
            "approve",
            &run,
            "agree",
            "--as",
            "ben",
            "--refuse",
            "--why",
            "not today",
        ])
        .good();
    until(&pair.west, &run, "a question", |view| view.question.clone());
    pair.west
        .cli(&["run", "abort", &run, "--as", "anna"])
        .good();
    assert_eq!(
        view(&pair.west, &run)
            .outcome
            .or_else(|| Some(over(&pair.west, &run))),
        Some(Outcome::Stopped)
    );
    pair.west
        .cli(&["run", "abort", &run, "--as", "anna"])
        .bad("is over");
    assert!(pair.west.target("web").test.is_none());
    sound(&console);
    let report = report(&pair.west, &run);
    let by_ben = report
        .events
        .iter()
        .find(|e| e.by.as_deref() == Some("ben"));
    assert_eq!(by_ben.unwrap().what, "refused: not today");
}

#[test]
fn a_source_that_is_lost_in_the_sync_is_waited_for() {
    let (mut pair, _console) = stage();
    let file = runbook(
        &pair,
        "planned",
        &format!(
            "[[steps]]\nname = \"wait\"\ndo = \"delay\"\nfor = \"2s\"\n{}",
            PLANNED.replacen("on-error = \"rollback\"", "timeout = \"12s\"", 1)
        ),
    );
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "wait");
    pair.east.kill();
    let question = until(&pair.west, &run, "a question", |view| view.question.clone());
    assert!(
        question.why.contains("did not come back in time"),
        "{question:?}"
    );
    // What was to be a move becomes a failover.
    pair.west
        .cli(&["run", "abort", &run, "--as", "anna"])
        .good();
    let told = pair.west.cli(&["failover", "web", "--json"]).good();
    let report: serde_json::Value = serde_json::from_str(&told.out).unwrap();
    assert!(report["rto_ms"].as_f64().unwrap() > 0.0);
    let there = there(&pair);
    there.await_beat(3, LONG);
}

#[test]
fn an_unplanned_run_is_given_back() {
    let (pair, console) = stage();
    let steps = r#"
[[steps]]
name = "fence"
do = "fence"
[[steps]]
name = "promote"
do = "promote"
[[steps]]
name = "start"
do = "start-group"
[[steps]]
name = "agree"
do = "approve"
by = ["*"]
timeout = "10m"
"#;
    let file = runbook(&pair, "unplanned", steps);
    pair.west
        .cli(&[
            "runbook",
            "run",
            &file,
            "--mode",
            "unplanned",
            "--as",
            "anna",
        ])
        .bad("--force");
    let run = begin(&pair.west, &file, "unplanned", &["--force"]);
    at(&pair.west, &run, "agree");
    assert_eq!(pair.east.source("web").phase, Phase::Fenced);
    there(&pair).await_beat(3, LONG);
    let last = console.last_beat().unwrap();
    pair.west
        .cli(&["run", "abort", &run, "--rollback", "--as", "anna"])
        .good();
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    assert!(pair.west.target("web").active.is_none());
    console.await_beat(last.number + 5, LONG);
    sound(&console);
    let sealed = pair.east.source("web").newest_point;
    pair.east.until("protected again", LONG, |view| {
        (view.guests[0].newest_point > sealed).then_some(())
    });
    assert!(report(&pair.west, &run).forced);
}
