//! What comes after the start: commit, rollback and reprotect as steps; and what
//! becomes of the source's stopped copy.

use super::*;
use farhaven::site::view::Phase;

pub(super) const MOVED: &str = r#"
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
[[steps]]
name = "healthy"
do = "wait-healthy"
"#;

#[test]
fn a_move_is_committed_and_protected_the_other_way_round() {
    let (mut pair, console) = stage();
    let steps = format!(
        "{MOVED}[[steps]]\nname = \"stays\"\ndo = \"commit\"\n[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"anna\"]\ntimeout = \"10m\"\n[[steps]]\nname = \"turn\"\ndo = \"reprotect\"\ntimeout = \"10m\"\n"
    );
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    let last = console.last_beat().unwrap();
    // The source has heard that its guest runs there, and keeps its copy.
    pair.east.until("it has moved", LONG, |view| {
        (view.guests[0].phase == Phase::Moved).then_some(())
    });
    pair.west
        .cli(&["run", "abort", &run, "--rollback", "--as", "anna"])
        .bad("no way back from a commit");
    pair.west.cli(&["rollback", "web"]).bad("run abort");
    let active = pair.west.target("web").active.unwrap();
    assert!(active.commit.is_none_or(|commit| commit.committed));
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let report = report(&pair.west, &run);
    let guest = &report.guests[0];
    assert!(guest.committed_at.is_some() && guest.reprotected_bytes.is_some());
    let home = pair.west.source("web");
    assert_eq!(home.peer.as_deref(), Some("east"));
    pair.west.until_sealed("web", 2, LONG);
    assert!(last.number > 0);
    // And back home by a run at the site that it came from.
    let file = runbook(&pair, "planned", MOVED);
    let run = begin(&pair.east, &file, "planned", &[]);
    assert_eq!(over(&pair.east, &run), Outcome::Succeeded);
    let active = pair.east.target("web").active.unwrap();
    let back = TestSite::console_of(&active);
    back.await_beat(last.number + 2, LONG);
    sound(&back);
    pair.east.terminate();
}

#[test]
fn a_rollback_step_returns_a_moved_guest() {
    let (pair, console) = stage();
    let steps = format!(
        "{MOVED}[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n[[steps]]\nname = \"home\"\ndo = \"rollback\"\n"
    );
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    let last = console.last_beat().unwrap();
    there(&pair).await_beat(last.number + 2, LONG);
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    assert!(pair.west.target("web").active.is_none());
    // Unchanged there: it goes on after its own last beat.
    console.await_beat(last.number + 3, LONG);
    sound(&console);
    pair.east.until("protected again", LONG, |view| {
        (view.guests[0].phase == Phase::Protected).then_some(())
    });
}

#[test]
fn what_runs_here_is_not_discarded_when_nothing_is_left_at_the_source() {
    let (mut pair, _console) = stage();
    let steps = format!(
        "{MOVED}[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n"
    );
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    // Guests inside of a daemon end with it: there is nothing to go back to.
    pair.east.kill();
    pair.east.start();
    // By what the new daemon sees: the other may not know yet that the old one is gone.
    for site in [&pair.east, &pair.west] {
        site.until("the link is up", LONG, |view| {
            view.peers[0].connected.then_some(())
        });
    }
    pair.west
        .cli(&["run", "abort", &run, "--rollback", "--as", "anna"])
        .good();
    let question = until(&pair.west, &run, "a question", |view| view.question.clone());
    assert!(question.why.contains("runs on here"), "{question:?}");
    let there = there(&pair);
    let beat = there.last_beat().map_or(0, |beat| beat.number);
    there.await_beat(beat + 3, LONG);
    sound(&there);
    pair.west
        .cli(&["run", "decide", &run, "end", "--as", "anna"])
        .good();
    assert_eq!(over(&pair.west, &run), Outcome::Stopped);
    assert!(pair.west.target("web").active.is_some());
}

/// The source asks what became of its guest while an operator's word comes in: that
/// is heard when the answer is here.
#[test]
fn a_held_guest_hears_what_it_is_told_while_its_source_asks() {
    let (pair, console) = stage();
    let promote = "[[steps]]\nname = \"promote\"";
    let agree = "[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n";
    let steps = MOVED.replace(promote, &format!("{agree}{promote}"));
    let file = runbook(&pair, "planned", &steps);
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    let last = console.last_beat().unwrap();
    pair.west.freeze();
    // By then its question is under way; and the link is not given up yet.
    std::thread::sleep(Duration::from_secs(1));
    let told = std::thread::scope(|scope| {
        let told = scope.spawn(|| pair.east.cli(&["take-back", "web", "--force"]));
        std::thread::sleep(Duration::from_millis(700));
        pair.west.wake();
        let deadline = Instant::now() + LONG / 2;
        while !told.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        if !told.is_finished() {
            // No answer any more: the wait of the source ends.
            pair.west.freeze();
            panic!("the source does not hear its operator\n{}", pair.east.log());
        }
        told.join().unwrap()
    });
    told.good();
    console.await_beat(last.number + 2, LONG);
    sound(&console);
}

#[test]
fn what_only_an_agent_could_do_is_refused_before_anything_is_begun() {
    let (pair, console) = stage();
    for step in [
        "do = \"quiesce\"",
        "do = \"shutdown-source\"",
        "do = \"wait-healthy\"\nagent = true",
    ] {
        let at_end = step.contains("agent");
        let extra = format!("[[steps]]\nname = \"agents\"\n{step}\n");
        let steps = match at_end {
            true => format!("{MOVED}{extra}"),
            false => format!("{extra}{MOVED}"),
        };
        let file = runbook(&pair, "planned", &steps);
        let start = ["runbook", "run", &file, "--mode", "planned", "--as", "anna"];
        let told = match step.contains("shutdown") {
            true => "runs inside of the daemon",
            false => "'web' has no channel to a guest agent",
        };
        pair.west.cli(&start).bad(told);
    }
    let beat = console.last_beat().unwrap();
    console.await_beat(beat.number + 2, LONG);
    assert!(pair.west.target("web").active.is_none());
}
