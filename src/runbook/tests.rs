//! Whole runs at two simulated sites in virtual time, with faults at every
//! step; and the audit record against torn and changed lines.

#![allow(clippy::unwrap_used)]

mod simulated;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use farhaven_policies::runbook::plan::{Facts, Plan, plan};
use farhaven_policies::runbook::run::{Answer, Event, Moment, Next, Outcome, Run};
use farhaven_policies::runbook::{Kind, Mode, builtin, read};
use proptest::prelude::*;
use tempfile::TempDir;

use self::simulated::{Fault, Sites, Virtual, World};
use super::conduct::{Baton, ConductError, Conductor, Host, TellError};
use super::record::{AuditLog, RecordError};

fn built_in(mode: Mode) -> Plan {
    let groups = BTreeMap::from([("bank".to_owned(), vec!["db1".to_owned(), "app1".to_owned()])]);
    plan(&builtin::of_mode(mode, groups), mode, &Facts::default()).unwrap()
}

fn example(name: &str, mode: Mode) -> Plan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples/runbooks")
        .join(name);
    let mut facts = Facts::default();
    let branch = facts.groups.entry("branch-office".to_owned()).or_default();
    branch.guests.insert("till".to_owned());
    plan(&read::file(&path, None).unwrap(), mode, &facts).unwrap()
}

fn all_plans() -> Vec<Plan> {
    vec![
        built_in(Mode::Test),
        built_in(Mode::Planned),
        built_in(Mode::Unplanned),
        example("two-tier-move.toml", Mode::Planned),
        example("failover-with-approval.toml", Mode::Unplanned),
        example("monthly-drill.toml", Mode::Test),
    ]
}

const GUESTS: [&str; 3] = ["db1", "app1", "till"];

/// Whoever is on duty: approves, and answers what is asked.
async fn duty(mut baton: Baton, interrupted: Answer) {
    loop {
        let run = baton.run();
        match run.next(Moment(0)) {
            Next::AwaitApproval { .. } => {
                for by in ["anna", "ben"] {
                    let approved = Event::Approved {
                        comment: "go".to_owned(),
                    };
                    let _ = baton.tell(by, approved).await;
                }
            }
            Next::Ask(question) => {
                let wanted = match question.interrupted {
                    true => interrupted,
                    false => Answer::Rollback,
                };
                let answer = Some(wanted).filter(|answer| question.answers.contains(answer));
                let answer = answer.unwrap_or(if question.undo {
                    Answer::TakeAsDone
                } else {
                    Answer::End
                });
                let _ = baton.tell("anna", Event::Answered { answer }).await;
            }
            _ => {}
        }
        if !baton.changed().await {
            return;
        }
    }
}

/// Conducts to the end; a conductor that is killed is followed by another.
fn to_the_end(
    plan: &Plan,
    faults: &[(&str, bool, Fault)],
    interrupted: Answer,
) -> (Run, World, TempDir) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("r-1.jsonl");
    let time = Virtual::default();
    let sites = Sites::new(&time, &GUESTS, faults);
    let (mut conductor, mut baton) = Conductor::start(
        home.path(),
        "r-1",
        plan.clone(),
        "anna",
        sites.clone(),
        time.clone(),
    )
    .unwrap();
    for _ in 0..100 {
        let ended = time.run(async {
            tokio::select! {
                outcome = conductor.conduct() => Some(outcome.unwrap()),
                () = sites.killed.notified() => None,
                () = duty(baton.clone(), interrupted) => panic!("the conductor went away"),
            }
        });
        if ended.is_some() {
            let run = Run::resume(&AuditLog::read(&path).unwrap()).unwrap();
            assert_eq!(run.outcome(), ended);
            let world = sites.world.lock().unwrap().clone();
            return (run, world, home);
        }
        (conductor, baton) = Conductor::resume(&path, sites.clone(), time.clone()).unwrap();
    }
    panic!("it does not end");
}

fn named<'w>(states: &'w BTreeMap<String, &'static str>, guest: &str) -> &'w str {
    states.get(guest).copied().unwrap_or("absent")
}

#[test]
fn every_runbook_runs_to_its_end() {
    for plan in all_plans() {
        let (run, world, _home) = to_the_end(&plan, &[], Answer::Repeat);
        assert_eq!(run.outcome(), Some(Outcome::Succeeded), "{}", plan.runbook);
        let (source, target) = (
            named(&world.at_source, "db1"),
            named(&world.at_target, "db1"),
        );
        let expected = match plan.mode {
            Mode::Test => ("running", "absent"),
            Mode::Planned => ("held", "running"),
            Mode::Unplanned => ("fenced", "running"),
        };
        assert_eq!((source, target), expected, "{}", plan.runbook);
        let commits = plan
            .steps
            .iter()
            .any(|planned| planned.step.action.kind() == Kind::Commit);
        assert_eq!(world.committed, commits);
    }
}

#[test]
fn any_fault_at_any_step_leaves_the_guests_at_one_site_or_says_so() {
    for plan in all_plans() {
        for planned in plan
            .steps
            .iter()
            .filter(|planned| planned.skipped.is_none())
        {
            for fault in [
                Fault::Clean,
                Fault::Dirty,
                Fault::Hang,
                Fault::Lost(20),
                Fault::Gone,
            ] {
                let step = planned.step.name.as_str();
                let faults = [(step, false, fault)];
                let (run, world, _home) = to_the_end(&plan, &faults, Answer::Repeat);
                let outcome = run.outcome().unwrap();
                let told = format!(
                    "{}: {fault:?} at {step}: {outcome}, {world:?}",
                    plan.runbook
                );
                let (source, target) = (
                    named(&world.at_source, "db1"),
                    named(&world.at_target, "db1"),
                );
                match outcome {
                    Outcome::RolledBack if fault != Fault::Gone => {
                        assert_eq!((source, target), ("running", "absent"), "{told}");
                    }
                    // Undoing what the source has to do is taken as done by a person.
                    Outcome::RolledBack => assert_eq!(target, "absent", "{told}"),
                    Outcome::Stopped => {
                        assert!(world.committed || run.question().is_none(), "{told}")
                    }
                    Outcome::Succeeded | Outcome::SucceededInPart if plan.mode == Mode::Test => {
                        assert_eq!((source, target), ("running", "absent"), "{told}");
                    }
                    Outcome::Succeeded | Outcome::SucceededInPart => {
                        assert_eq!(target, "running", "{told}");
                    }
                }
            }
        }
    }
}

#[test]
fn killed_before_and_after_the_effect_of_each_step_it_ends_as_if_not() {
    for plan in all_plans() {
        // Everything goes well; and everything is undone from the last step that can be.
        let undone = plan.steps.iter().rev().find(|planned| {
            planned.skipped.is_none() && planned.step.action.kind() == Kind::WaitHealthy
        });
        let last = undone.unwrap().step.name.clone();
        for back in [false, true] {
            let broken: Vec<(&str, bool, Fault)> = match back {
                true => vec![(last.as_str(), false, Fault::Hang)],
                false => vec![],
            };
            let whole = to_the_end(&plan, &broken, Answer::Repeat);
            for planned in plan
                .steps
                .iter()
                .filter(|planned| planned.skipped.is_none())
            {
                let step = planned.step.name.as_str();
                for fault in [Fault::KilledBefore, Fault::KilledAfter] {
                    for undo in [false, true] {
                        if (back && step == last) || (undo && !back) {
                            continue;
                        }
                        let faults = [&broken[..], &[(step, undo, fault)]].concat();
                        // Of what may not be repeated somebody finds out how far it came.
                        let first = match (planned.step.action.is_repeatable(), fault) {
                            (true, _) => Answer::Repeat,
                            (false, Fault::KilledBefore) => Answer::Repeat,
                            (false, _) => Answer::TakeAsDone,
                        };
                        let (run, world, _home) = to_the_end(&plan, &faults, first);
                        let told = format!(
                            "{}: {fault:?} at {step}, undo {undo}, back {back}",
                            plan.runbook
                        );
                        assert_eq!(run.ends(), whole.0.ends(), "{told}");
                        assert_eq!(world, whole.1, "{told}");
                    }
                }
            }
        }
    }
}

#[test]
fn people_are_heard_while_steps_are_under_way() {
    let home = tempfile::tempdir().unwrap();
    let time = Virtual::default();
    let sites = Sites::new(&time, &GUESTS, &[("final-sync", false, Fault::Hang)]);
    let plan = built_in(Mode::Planned);
    let start = |id: &str| {
        let (plan, sites) = (plan.clone(), sites.clone());
        Conductor::start(home.path(), id, plan, "anna", sites, time.clone())
    };
    let (conductor, baton) = start("r-2").unwrap();
    let twice = start("r-2").err();
    assert!(matches!(
        twice,
        Some(ConductError::Record(RecordError::Io { .. }))
    ));
    let outside = start("../r").err();
    assert!(matches!(
        outside,
        Some(ConductError::Record(RecordError::Id(_)))
    ));
    let path = home.path().join("r-2.jsonl");
    let people = async {
        time.sleep(Duration::from_secs(5)).await;
        let other = Conductor::resume(&path, sites.clone(), time.clone()).err();
        assert!(matches!(
            other,
            Some(ConductError::Record(RecordError::InUse(_)))
        ));
        let comment = String::new();
        let wrong = baton.tell("carl", Event::Approved { comment }).await;
        assert!(matches!(wrong, Err(TellError::Refused(_))));
        let forged = baton
            .tell(
                "carl",
                Event::Done {
                    note: String::new(),
                },
            )
            .await;
        assert!(matches!(forged, Err(TellError::Refused(_))));
        baton.tell("ben", Event::Paused).await.unwrap();
        baton
            .tell("ben", Event::Aborted { rollback: true })
            .await
            .unwrap();
    };
    let (outcome, ()) = time.run(async { tokio::join!(conductor.conduct(), people) });
    assert_eq!(outcome.unwrap(), Outcome::RolledBack);
    let late = time.run(baton.tell("ben", Event::Paused));
    assert!(matches!(late, Err(TellError::Over)));
    assert_eq!(
        named(&sites.world.lock().unwrap().at_source, "db1"),
        "running"
    );
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(
        text.contains("\"by\":\"ben\"") && text.contains("\"at\":\"2026-"),
        "{text}"
    );
}

/// A run's record, and its file.
fn kept() -> (TempDir, std::path::PathBuf, usize) {
    let plan = built_in(Mode::Test);
    let (run, _, home) = to_the_end(&plan, &[], Answer::Repeat);
    let path = home.path().join("r-1.jsonl");
    (home, path, run.records() as usize)
}

#[test]
fn a_torn_last_line_is_dropped_and_a_changed_one_found() {
    let (home, path, count) = kept();
    let whole = std::fs::read(&path).unwrap();
    let ends: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
    assert_eq!(ends.len(), count);
    let before_last = ends[count - 2] + 1;
    let torn = home.path().join("torn.jsonl");
    for length in before_last..whole.len() {
        std::fs::write(&torn, &whole[..length]).unwrap();
        let (mut log, records) = AuditLog::open(&torn).unwrap();
        assert_eq!(records.len(), count - 1);
        // What is appended afterwards follows.
        let mut run = Run::resume(&records).unwrap();
        let at = records.last().unwrap().at;
        let Next::Record(event) = run.next(at) else {
            panic!()
        };
        log.append(&run.happened(at, None, event).unwrap()).unwrap();
        drop(log);
        assert_eq!(AuditLog::read(&torn).unwrap().len(), count);
    }
    // Blocks of the last line that never came.
    let mut zeros = whole.clone();
    zeros[before_last + 5..ends[count - 1]].fill(0);
    std::fs::write(&torn, &zeros).unwrap();
    assert_eq!(AuditLog::read(&torn).unwrap().len(), count - 1);
    // Lines taken out, doubled, exchanged.
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    for at in 0..count - 1 {
        let mut fewer = lines.clone();
        fewer.remove(at);
        std::fs::write(&torn, fewer.concat()).unwrap();
        let error = AuditLog::read(&torn).unwrap_err();
        assert!(
            matches!(error, RecordError::Changed { line, .. } if line == at as u64 + 1),
            "{error}"
        );
    }
}

#[test]
fn any_byte_that_is_changed_is_found() {
    let (home, path, _) = kept();
    let whole = std::fs::read(&path).unwrap();
    let last = whole.len() - 1;
    let other = home.path().join("other.jsonl");
    proptest!(ProptestConfig::with_cases(300), |(at in 0..last, bit in 0u32..8)| {
        let mut changed = whole.clone();
        changed[at] ^= 1 << bit;
        std::fs::write(&other, &changed).unwrap();
        prop_assert!(AuditLog::read(&other).is_err());
    });
    proptest!(ProptestConfig::with_cases(300), |(bytes in proptest::collection::vec(any::<u8>(), 0..400))| {
        std::fs::write(&other, &bytes).unwrap();
        let _ = AuditLog::read(&other);
    });
}
