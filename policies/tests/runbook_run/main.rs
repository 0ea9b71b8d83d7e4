//! Runs as a state machine: whatever happens, a run that is killed and resumed
//! is the same run, and comes to the same end.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use farhaven_policies::runbook::plan::{Facts, Plan, plan};
use farhaven_policies::runbook::run::{
    Answer, Attempt, Back, Cause, Event, Forward, Moment, Next, Outcome, Record, Run,
};
use farhaven_policies::runbook::{Action, Kind, Mode, OnError, Runbook, Step, builtin};
use farhaven_policies::units::Period;
use proptest::prelude::*;

mod any;
mod kills;
#[path = "../runbooks/made.rs"]
mod made;
mod persons;

fn planned(runbook: &Runbook) -> Plan {
    let mode = *runbook.modes.iter().next().unwrap();
    plan(runbook, mode, &Facts::default()).unwrap()
}

/// A run with its log: every record is checked to resume as the run that made it.
struct Kept {
    run: Run,
    log: Vec<Record>,
    now: Moment,
}

impl Kept {
    fn new(plan: Plan) -> Kept {
        let now = Moment(1_000_000);
        let (run, first) = Run::new("r-1", plan, "anna", now).unwrap();
        Kept {
            run,
            log: vec![first],
            now,
        }
    }

    fn tell(&mut self, by: Option<&str>, event: Event) -> Result<(), String> {
        let before = self.run.clone();
        match self.run.happened(self.now, by, event) {
            Ok(record) => {
                // As it is kept: through JSON.
                let json = serde_json::to_string(&record).unwrap();
                let read: Record = serde_json::from_str(&json).unwrap();
                assert_eq!(read, record);
                self.log.push(read);
                assert_eq!(Run::resume(&self.log).unwrap(), self.run);
                Ok(())
            }
            Err(refused) => {
                assert_eq!(before, self.run, "refused, yet changed: {refused}");
                Err(refused.to_string())
            }
        }
    }

    fn next(&self) -> Next {
        self.run.next(self.now)
    }

    fn pass(&mut self, secs: u64) {
        self.now = self.now.after(Period::from_secs(secs));
    }

    /// Goes on, with everything ending well, until a step of this name is begun.
    fn until_begun(&mut self, name: &str) -> Attempt {
        for _ in 0..500 {
            match self.next() {
                Next::Begin(attempt) => {
                    self.tell(None, attempt.begun()).unwrap();
                    if attempt.step.name == name {
                        return *attempt;
                    }
                }
                next => self.well(next),
            }
        }
        panic!("'{name}' is never begun");
    }

    /// What ends well.
    fn well(&mut self, next: Next) {
        match next {
            Next::Record(event) => self.tell(None, event).unwrap(),
            Next::Begin(attempt) => self.tell(None, attempt.begun()).unwrap(),
            Next::Await { .. } => self
                .tell(
                    None,
                    Event::Done {
                        note: String::new(),
                    },
                )
                .unwrap(),
            Next::AwaitApproval { .. } => {
                let approved = || Event::Approved {
                    comment: String::new(),
                };
                if self.tell(Some("anna"), approved()).is_err() {
                    self.tell(Some("ben"), approved()).unwrap();
                }
            }
            Next::Sleep { until } | Next::AwaitSource { until } => self.now = until,
            Next::Ask(question) => {
                let answer = question.answers[0];
                self.tell(Some("anna"), Event::Answered { answer }).unwrap();
            }
            Next::Paused => self.tell(Some("anna"), Event::Continued).unwrap(),
            Next::Over(_) => {}
        }
    }

    fn finish(&mut self) -> Outcome {
        for _ in 0..2_000 {
            match self.next() {
                Next::Over(outcome) => return outcome,
                next => self.well(next),
            }
        }
        panic!("it does not end: {:#?}", self.run);
    }

    fn state_of(&self, name: &str) -> (Forward, Back) {
        let steps = self.run.steps();
        let step = steps.iter().find(|step| step.name == name).unwrap();
        (step.forward, step.back)
    }

    /// Begun steps, as `name` and `-name` for an undoing.
    fn begun(&self) -> Vec<String> {
        let begun = self
            .log
            .iter()
            .filter(|record| matches!(record.event, Event::Begun { .. }));
        begun
            .map(|record| {
                let sign = if record.undo { "-" } else { "" };
                format!("{sign}{}", record.step.as_deref().unwrap())
            })
            .collect()
    }
}

fn group() -> BTreeMap<String, Vec<String>> {
    [("bank".to_owned(), vec!["db".to_owned()])].into()
}

fn fault(cause: Cause) -> Event {
    Event::Failed {
        why: "broken".to_owned(),
        cause,
    }
}

#[test]
fn the_built_in_runbooks_run_to_their_end() {
    for (mode, steps) in [
        (
            Mode::Planned,
            "ready final-sync promote networks start healthy",
        ),
        (
            Mode::Unplanned,
            "ready fence promote networks start healthy",
        ),
        (
            Mode::Test,
            "ready promote networks start healthy looked-at cleanup",
        ),
    ] {
        let mut kept = Kept::new(planned(&builtin::of_mode(mode, group())));
        assert_eq!(kept.finish(), Outcome::Succeeded);
        assert_eq!(kept.begun().join(" "), steps);
        assert!(
            kept.tell(None, Event::Restarted)
                .unwrap_err()
                .contains("over")
        );
    }
}

#[test]
fn a_failure_goes_back_the_way_it_came_and_undoes_only_what_was_begun() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    kept.until_begun("networks");
    kept.tell(None, fault(Cause::Fault)).unwrap();
    assert_eq!(kept.finish(), Outcome::RolledBack);
    let all = kept.begun().join(" ");
    assert_eq!(
        all,
        "ready final-sync promote networks -networks -promote -final-sync"
    );
    // Why it failed is known after the way back, too.
    let steps = kept.run.steps();
    let failed = steps.iter().find(|step| step.name == "networks").unwrap();
    assert_eq!(failed.back, Back::Undone);
    assert_eq!(failed.said, "broken");
    assert_eq!(failed.words(), "broken");
    // What changed nothing is not undone.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    kept.until_begun("networks");
    kept.tell(None, fault(Cause::Clean)).unwrap();
    kept.finish();
    assert_eq!(
        kept.begun().join(" "),
        "ready final-sync promote networks -promote -final-sync"
    );
    // A time that is over is a failure of unknown extent.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Test, group())));
    kept.until_begun("start");
    kept.pass(301);
    assert_eq!(kept.next(), Next::Record(Event::TimedOut));
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(
        kept.begun().join(" "),
        "ready promote networks start -start -networks -promote"
    );
    assert_eq!(
        kept.state_of("start"),
        (Forward::Failed { clean: false }, Back::Undone)
    );
}

#[test]
fn records_that_do_not_follow_are_refused_by_their_number() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Test, group())));
    kept.finish();
    assert!(Run::resume(&[]).is_err());
    assert!(Run::resume(&kept.log[1..]).is_err());
    for gap in 1..kept.log.len() {
        let mut log = kept.log.clone();
        log.remove(gap);
        let told = Run::resume(&log).map(|run| run.outcome());
        // Only without its last record it is a run: one that has not ended.
        if gap + 1 == kept.log.len() {
            assert_eq!(told, Ok(None));
        } else {
            assert!(
                told.unwrap_err()
                    .to_string()
                    .starts_with(&format!("record {}", gap + 2))
            );
        }
    }
}
