//! `failover`, `move` and `test` without a runbook leave a record and a report;
//! what the command line shows of runs.

use super::*;

#[test]
fn verbs_without_a_runbook_are_recorded() {
    let (pair, _console) = stage();
    pair.west.cli(&["test", "web"]).good();
    let [test] = &runs(&pair.west)[..] else {
        panic!("one run");
    };
    assert!(test.outcome.is_none());
    assert_eq!(test.standing, "runs until: farhaven test cleanup web");
    // It has shown something before it is thrown away.
    pair.west.until("a line on its console", LONG, |view| {
        let log = view.standbys[0]
            .test
            .as_ref()?
            .console
            .as_ref()?
            .log
            .clone();
        (std::fs::metadata(log).ok()?.len() > 0).then_some(())
    });
    pair.west.cli(&["test", "cleanup", "web"]).good();
    assert_eq!(view(&pair.west, &test.id).outcome, Some(Outcome::Succeeded));
    assert!(pair.west.target("web").tested_at.is_some());
    let told = report(&pair.west, &test.id);
    assert!(!told.guests[0].removed.is_empty() && told.guests[0].gone.len() == 2);
    assert!(told.guests[0].console.is_some());
    assert!(told.guests[0].rpo_target_ms.is_some(), "{told:#?}");

    pair.west.cli(&["failover", "web"]).bad("--force");
    pair.west.cli(&["failover", "web", "--force"]).good();
    there(&pair).await_beat(3, LONG);
    let all = runs(&pair.west);
    assert_eq!(all[0].outcome, Some(Outcome::Succeeded), "{all:#?}");
    assert_eq!(all[1].outcome, Some(Outcome::Stopped), "{all:#?}");
    let told = report(&pair.west, &all[0].id);
    assert!(told.forced && told.rto_ms.is_some() && told.rpo_ms.is_some());
    assert!(told.guests[0].rpo_target_ms.is_some(), "{told:#?}");
    let file = pair.dir.path().join("report.html");
    pair.west
        .cli(&["report", &all[0].id, "--html", file.to_str().unwrap()])
        .good();
    let page = std::fs::read_to_string(&file).unwrap();
    for words in ["<svg", "Failover: failover", "Who did what", "HB "] {
        assert!(page.contains(words), "no {words}");
    }
    assert!(!page.contains("<script") && !page.contains("http://"));

    // Whatever guests, peers and people write stays text.
    let hostile = "</td><script>alert(1)</script>\"' onload='x\u{202e}";
    let mut told = told;
    told.by = hostile.to_owned();
    told.standing = hostile.to_owned();
    told.plan.runbook = hostile.to_owned();
    for guest in &mut told.guests {
        guest.guest = hostile.to_owned();
        guest.console = Some(hostile.to_owned());
        guest.screen = Some(format!("{hostile}\""));
        guest.removed = vec![hostile.to_owned()];
        guest.healthy_by = hostile.to_owned();
    }
    for step in &mut told.steps {
        step.name = hostile.to_owned();
        step.said = hostile.to_owned();
    }
    for event in &mut told.events {
        event.what = hostile.to_owned();
        event.by = Some(hostile.to_owned());
    }
    let page = farhaven::runbook::report::html::page(&told);
    assert!(page.contains("&lt;script&gt;"));
    for harm in ["<script", "' onload", "\u{202e}", "data:image"] {
        assert!(!page.contains(harm), "{harm}");
    }
}

#[test]
fn a_move_is_recorded_at_its_source() {
    let (pair, _console) = stage();
    pair.east.cli(&["move", "web"]).good();
    let [moved] = &runs(&pair.east)[..] else {
        panic!("one run");
    };
    assert_eq!(moved.outcome, Some(Outcome::Succeeded), "{moved:#?}");
    let told = report(&pair.east, &moved.id);
    assert_eq!(told.rpo_ms, Some(0));
    assert!(told.guests[0].rpo_target_ms.is_some(), "{told:#?}");
}

#[test]
fn what_cannot_be_run_is_said() {
    let (pair, _console) = stage();
    let file = runbook(&pair, "test", "[[steps]]\nname = \"x\"\ndo = \"promot\"\n");
    let start = ["runbook", "run", &file, "--mode", "test", "--as", "anna"];
    pair.west.cli(&start).bad("promote");
    let steps = "[[steps]]\nname = \"ready\"\ndo = \"check\"\n[[steps]]\nname = \"promote\"\ndo = \"promote\"\n[[steps]]\nname = \"start\"\ndo = \"start-group\"\n[[steps]]\nname = \"cleanup\"\ndo = \"cleanup\"\n";
    let file = runbook(&pair, "test", steps);
    let start = ["runbook", "run", &file, "--mode", "test", "--as", "anna"];
    pair.east.cli(&start).bad("run this there");
    let plan = ["runbook", "plan", &file, "--mode", "test"];
    let told = pair.east.cli(&plan).good();
    assert!(told.out.contains("run this there"), "{}", told.out);
    let twice = runbook(&pair, "test", &format!("also = [\"web\"]\n{steps}"));
    let plan_twice = ["runbook", "plan", &twice, "--mode", "test"];
    let told = pair.west.cli(&plan_twice).good();
    assert!(told.out.contains("name it in one"), "{}", told.out);
    let file = runbook(&pair, "test", steps);
    pair.west.cli(&["run", "show", "../x"]).bad("no run");
    pair.west.cli(&["run", "show", "nothing"]).bad("no run");
    let told = pair.west.cli(&[&start[..], &["--follow"]].concat()).good();
    assert!(told.out.contains("succeeded"), "{}{}", told.out, told.err);
    let told = pair.west.cli(&plan).good();
    assert!(told.out.contains("web (web)"), "{}", told.out);
    assert!(!told.out.contains("would not be run"), "{}", told.out);
    let run = begin(&pair.west, &file, "test", &["--point", "4711"]);
    let question = until(&pair.west, &run, "a question", |view| view.question.clone());
    assert!(question.why.contains("no point 4711"), "{question:?}");
    pair.west
        .cli(&["run", "decide", &run, "end", "--as", "anna"])
        .good();
    assert_eq!(over(&pair.west, &run), Outcome::Stopped);
}
