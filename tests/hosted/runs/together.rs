//! Runs over a protection group: its guests are held at one instant, or none is.

use farhaven::site::groups::GroupPointView;
use farhaven::site::view::Phase;

use super::stays::MOVED;
use super::*;
use crate::groups::{FILES, bank_by};

const AGREE: &str =
    "[[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"10m\"\n";

/// A planned runbook of these steps for the bank.
fn of_bank(pair: &Pair, steps: &str) -> String {
    let file = runbook(pair, "planned", steps);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("web = []", "bank = []")).unwrap();
    file
}

/// The bank, with a point of all of it.
fn protected() -> (Pair, [Console; 2]) {
    protected_by(FILES)
}

fn protected_by(policies: &str) -> (Pair, [Console; 2]) {
    let (pair, consoles) = bank_by(policies);
    pair.west
        .until("a whole point", LONG, |view| view.groups.first()?.rpo_ms);
    (pair, consoles)
}

fn there(pair: &Pair, guest: &str) -> Console {
    TestSite::console_of(&pair.west.target(guest).active.unwrap())
}

/// The points that the guests of the run run from are one point of the group.
fn are_of_one_instant(pair: &Pair, report: &Report) {
    let told = pair.west.cli(&["points", "bank", "--json"]).good();
    let whole: Vec<GroupPointView> = serde_json::from_str(&told.out).unwrap();
    let used: std::collections::BTreeMap<String, u64> = report
        .guests
        .iter()
        .map(|guest| (guest.guest.clone(), guest.point.unwrap()))
        .collect();
    assert_eq!(used.len(), 2, "{report:?}");
    let newest = whole.last().unwrap();
    assert_eq!(newest.points, used, "{whole:?}");
}

fn go_on_at_home(pair: &Pair, consoles: &[Console; 2]) {
    for console in consoles {
        let seen = console.last_beat().map_or(0, |beat| beat.number);
        console.await_beat(seen + 3, LONG);
        sound(console);
    }
    pair.east.until("all are protected", LONG, |view| {
        let mut phases = view.guests.iter().map(|guest| guest.phase);
        phases
            .all(|phase| matches!(phase, Phase::Protected | Phase::Shipping))
            .then_some(())
    });
}

#[test]
fn a_group_is_held_at_one_instant_and_runs_from_it() {
    let (pair, consoles) = protected();
    let file = of_bank(&pair, &format!("{MOVED}{AGREE}"));
    let run = begin(&pair.west, &file, "planned", &[]);
    at(&pair.west, &run, "agree");
    are_of_one_instant(&pair, &report(&pair.west, &run));
    let last = consoles
        .each_ref()
        .map(|console| console.last_beat().unwrap().number);
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    let report = report(&pair.west, &run);
    let instant = report
        .checks
        .iter()
        .find(|check| check.what == "one instant");
    let instant = instant.unwrap_or_else(|| panic!("{:?}", report.checks));
    assert_eq!(instant.guest, "bank");
    assert!(instant.good && instant.seen.starts_with("its 2 guests were stopped within"));
    for (guest, last) in ["db", "web"].into_iter().zip(last) {
        let console = there(&pair, guest);
        console.await_beat(last + 1, LONG);
        sound(&console);
    }
}

#[test]
fn none_of_a_group_is_held_when_one_would_stand_too_long() {
    let files = FILES.replace("rpo = \"1s\"", "rpo = \"1s\"\nmax_blackout = \"10ms\"");
    let (pair, consoles) = protected_by(&files);
    let file = of_bank(&pair, MOVED);
    let run = begin(&pair.west, &file, "planned", &[]);
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    let report = report(&pair.west, &run);
    assert!(report.guests.iter().all(|guest| !guest.source_stopped));
    let told = format!("{:?}", report.events);
    let mend = "there: farhaven move bank --accept-pause";
    assert!(told.contains(mend), "{told}");
    go_on_at_home(&pair, &consoles);
}

/// What is held for a run that gave up waiting goes on by itself.
#[test]
fn a_group_whose_run_gave_up_goes_on() {
    let (pair, consoles) = protected();
    // What web has to send takes minutes from here on.
    let limit = |rate| {
        let told = pair.east.cli(&["link", "limit", rate, "--guest", "web"]);
        told.good();
    };
    limit("1kbit");
    let timeout = "do = \"final-sync\"\ntimeout = \"8s\"";
    let stop = MOVED.replace("on-error = \"rollback\"", "on-error = \"stop\"");
    let file = of_bank(&pair, &stop.replace("do = \"final-sync\"", timeout));
    let run = begin(&pair.west, &file, "planned", &[]);
    until(&pair.west, &run, "a question", |view| view.question.clone());
    pair.west
        .cli(&["run", "decide", &run, "end", "--as", "anna"])
        .good();
    assert_eq!(over(&pair.west, &run), Outcome::Stopped);
    let report = report(&pair.west, &run);
    assert!(report.guests.iter().all(|guest| !guest.source_stopped));
    limit("none");
    go_on_at_home(&pair, &consoles);
}

#[test]
fn none_of_a_group_is_held_when_one_is_paused() {
    let (pair, consoles) = protected();
    pair.east.cli(&["pause", "web"]).good();
    let file = of_bank(&pair, MOVED);
    let run = begin(&pair.west, &file, "planned", &[]);
    assert_eq!(over(&pair.west, &run), Outcome::RolledBack);
    let why = report(&pair.west, &run);
    let told = format!("{:?}", why.events);
    assert!(
        told.contains("no guest of group 'bank' is held: 'web' is paused"),
        "{told}"
    );
    pair.east.cli(&["resume", "web"]).good();
    go_on_at_home(&pair, &consoles);
}

#[test]
fn a_group_s_run_whose_conductor_is_killed_at_any_time() {
    let (mut pair, consoles) = protected();
    let file = of_bank(&pair, &format!("{MOVED}{AGREE}"));
    let run = begin(&pair.west, &file, "planned", &[]);
    for pause in [50, 200, 400, 30, 600, 100, 10, 60] {
        std::thread::sleep(Duration::from_millis(pause));
        pair.west.kill();
        pair.west.start();
    }
    at(&pair.west, &run, "agree");
    are_of_one_instant(&pair, &report(&pair.west, &run));
    agree(&pair.west, &run, "agree");
    assert_eq!(over(&pair.west, &run), Outcome::Succeeded);
    for (guest, console) in ["db", "web"].into_iter().zip(&consoles) {
        let last = console.last_beat().unwrap();
        let there = there(&pair, guest);
        there.await_beat(last.number + 1, LONG);
        sound(&there);
    }
}

fn whole(site: &TestSite) -> Vec<GroupPointView> {
    let told = site.cli(&["points", "bank", "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

/// A point of the group is named, tested by its name, and let go; what is done with
/// the group without a runbook is a run of the built-in one all the same.
#[test]
fn what_is_done_with_a_group_is_recorded_and_its_points_have_names() {
    let (pair, consoles) = protected();
    let (east, west) = (&pair.east, &pair.west);
    let keep = ["point", "keep", "bank", "--name", "before upgrade"];
    let told = east.cli(&keep).good().out;
    assert!(told.contains("of group 'bank' is kept"), "{told}");
    let named = |point: &&GroupPointView| point.name.is_some();
    let kept = whole(west).iter().find(named).cloned().unwrap();
    assert_eq!(kept.name.as_deref(), Some("before upgrade"));
    assert_eq!(kept.points.len(), 2);
    west.cli(&["point", "keep", "bank", "--name", "x", "--point", "none"])
        .bad("no whole point \"none\" of group 'bank'");
    let told = west.cli(&["prune", "plan", "bank"]).good().out;
    assert_eq!(
        told.matches("kept as \"before upgrade\"").count(),
        2,
        "{told}"
    );

    west.cli(&["test", "bank", "--point", "before upgrade"])
        .good();
    let [test] = &runs(west)[..] else {
        panic!("one run");
    };
    assert!(test.outcome.is_none(), "{test:?}");
    for guest in ["db", "web"] {
        assert_eq!(west.target(guest).test.unwrap().point, kept.points[guest]);
    }
    west.cli(&["test", "cleanup", "bank"]).good();
    let told = report(west, &test.id);
    assert_eq!(told.outcome, Some(Outcome::Succeeded), "{told:?}");
    assert_eq!(told.guests.len(), 2);
    for guest in &told.guests {
        assert_eq!(guest.group, "bank");
        assert_eq!(guest.point, Some(kept.points[&guest.guest]));
        assert!(!guest.removed.is_empty() && guest.gone.len() == 2);
        assert!(guest.healthy_at.is_some(), "{guest:?}");
    }
    let release = ["point", "release", "bank", "--point", "before upgrade"];
    west.cli(&release).good();
    west.cli(&release).bad("no whole point");
    assert!(whole(west).iter().all(|point| point.name.is_none()));

    west.cli(&["failover", "bank"]).bad("--force");
    let refused = &runs(west)[0];
    assert_eq!(refused.outcome, Some(Outcome::Stopped), "{refused:?}");

    let last = consoles.each_ref().map(|console| console.last_beat());
    east.cli(&["move", "bank", "--accept-pause"]).good();
    let [moved] = &runs(east)[..] else {
        panic!("one run");
    };
    let told = report(east, &moved.id);
    assert_eq!(told.outcome, Some(Outcome::Succeeded), "{told:?}");
    assert_eq!((told.rpo_ms, told.guests.len()), (Some(0), 2));
    assert!(told.guests.iter().all(|guest| guest.healthy_at.is_some()));
    for (guest, last) in ["db", "web"].into_iter().zip(last) {
        let console = there(&pair, guest);
        console.await_beat(last.map_or(0, |beat| beat.number) + 1, LONG);
    }
}
