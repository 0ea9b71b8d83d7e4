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
use proptest::sample::select;

#[path = "runbooks/made.rs"]
mod made;

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
fn stopped_means_that_a_person_decides() {
    for (answer, outcome, begun) in [
        (
            Answer::Repeat,
            Outcome::Succeeded,
            "ready fence fence promote networks start healthy",
        ),
        (
            Answer::TakeAsDone,
            Outcome::Succeeded,
            "ready fence promote networks start healthy",
        ),
        (Answer::Rollback, Outcome::RolledBack, "ready fence -fence"),
        (Answer::End, Outcome::Stopped, "ready fence"),
    ] {
        let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Unplanned, group())));
        let first = kept.until_begun("fence");
        kept.tell(None, fault(Cause::Fault)).unwrap();
        let Next::Ask(question) = kept.next() else {
            panic!()
        };
        assert!(!question.interrupted && question.why == "broken");
        assert!(
            kept.tell(None, Event::Answered { answer })
                .unwrap_err()
                .contains("name is missing")
        );
        kept.tell(Some("ben"), Event::Answered { answer }).unwrap();
        if answer == Answer::Repeat {
            // It is known to have failed: a receiver is not to take this for the same.
            let again = kept.until_begun("fence");
            assert_eq!(
                (first.key.as_str(), again.key.as_str()),
                ("r-1/fence", "r-1/fence/2")
            );
            kept.tell(
                None,
                Event::Done {
                    note: String::new(),
                },
            )
            .unwrap();
        }
        assert_eq!(kept.finish(), outcome);
        assert_eq!(kept.begun().join(" "), begun);
    }
}

fn approval(approvals: u8, on_error: OnError) -> Runbook {
    let mut runbook = builtin::of_mode(Mode::Planned, group());
    let mut step = Step::new(
        "ask",
        Action::Approve {
            by: vec!["anna".to_owned(), "ben".to_owned()],
            approvals,
            message: String::new(),
        },
    );
    (step.timeout, step.on_error) = (Some(Period::from_secs(60)), on_error);
    runbook.steps.insert(3, step);
    runbook
}

#[test]
fn approvals_are_of_named_people_each_once_in_time() {
    let ok = || Event::Approved {
        comment: "go".to_owned(),
    };
    let mut kept = Kept::new(planned(&approval(2, OnError::Rollback)));
    kept.until_begun("ask");
    assert!(
        kept.tell(Some("carl"), ok())
            .unwrap_err()
            .contains("anna, ben may")
    );
    assert!(
        kept.tell(None, ok())
            .unwrap_err()
            .contains("name is missing")
    );
    assert!(
        kept.tell(
            None,
            Event::Done {
                note: String::new()
            }
        )
        .is_err()
    );
    assert!(kept.tell(None, fault(Cause::Clean)).is_err());
    kept.tell(Some("ben"), ok()).unwrap();
    assert!(
        kept.tell(Some("ben"), ok())
            .unwrap_err()
            .contains("another person")
    );
    assert!(matches!(
        kept.next(),
        Next::AwaitApproval { missing: 1, .. }
    ));
    // A restart does not forget who agreed, nor give more time.
    kept.tell(None, Event::Restarted).unwrap();
    kept.pass(59);
    kept.tell(Some("anna"), ok()).unwrap();
    assert_eq!(kept.state_of("ask").0, Forward::Done);
    assert_eq!(kept.finish(), Outcome::Succeeded);

    let mut kept = Kept::new(planned(&approval(1, OnError::Rollback)));
    kept.until_begun("ask");
    kept.tell(
        Some("anna"),
        Event::Refused {
            why: "not today".to_owned(),
        },
    )
    .unwrap();
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert!(
        kept.run.steps()[3]
            .said
            .contains("refused by anna: not today")
    );

    let mut kept = Kept::new(planned(&approval(1, OnError::Stop)));
    kept.until_begun("ask");
    kept.pass(60);
    assert!(
        kept.tell(Some("anna"), ok())
            .unwrap_err()
            .contains("the time for it is over")
    );
    assert_eq!(kept.next(), Next::Record(Event::TimedOut));
    kept.tell(None, Event::TimedOut).unwrap();
    // What named people must decide nobody else takes as decided.
    let Next::Ask(question) = kept.next() else {
        panic!()
    };
    assert_eq!(
        question.answers,
        [Answer::Repeat, Answer::Rollback, Answer::End]
    );
    let taken = Event::Answered {
        answer: Answer::TakeAsDone,
    };
    assert!(kept.tell(Some("carl"), taken).is_err());
}

#[test]
fn the_other_site_is_waited_for_as_long_as_the_step_has_time() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    let first = kept.until_begun("final-sync");
    kept.pass(600);
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    assert!(matches!(kept.next(), Next::AwaitSource { .. }));
    kept.pass(600);
    kept.tell(None, Event::SourceBack).unwrap();
    let again = kept.until_begun("final-sync");
    assert_eq!((again.key, again.attempt), (first.key, 2));
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    // Thirty minutes in all.
    kept.pass(599);
    assert!(matches!(kept.next(), Next::AwaitSource { .. }));
    kept.pass(1);
    assert_eq!(kept.next(), Next::Record(Event::TimedOut));
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(
        kept.begun().join(" "),
        "ready final-sync final-sync -final-sync"
    );

    // What was tried in vain is undone even if it was about to be tried again.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    kept.until_begun("final-sync");
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    kept.tell(None, Event::SourceBack).unwrap();
    kept.tell(Some("anna"), Event::Aborted { rollback: true })
        .unwrap();
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(kept.begun().join(" "), "ready final-sync -final-sync");

    // Where it is taken to be lost, nobody waits.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Unplanned, group())));
    kept.until_begun("fence");
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    assert!(matches!(kept.next(), Next::Ask(_)));
}

#[test]
fn what_may_not_be_repeated_is_asked_about_after_a_restart() {
    for repeatable in [false, true] {
        let mut runbook = builtin::of_mode(Mode::Planned, group());
        let run = vec!["/bin/pay".to_owned()];
        let exec = Action::Exec {
            run,
            undo: vec![],
            repeatable,
        };
        runbook.steps.insert(1, Step::new("pay", exec));
        let mut kept = Kept::new(planned(&runbook));
        let first = kept.until_begun("pay");
        kept.tell(None, Event::Restarted).unwrap();
        if repeatable {
            let again = kept.until_begun("pay");
            assert_eq!((again.key, again.attempt), (first.key, 2));
            continue;
        }
        let Next::Ask(question) = kept.next() else {
            panic!()
        };
        assert!(question.interrupted);
        // Another restart asks the same.
        kept.tell(None, Event::Restarted).unwrap();
        assert_eq!(kept.next(), Next::Ask(question));
        kept.tell(
            Some("anna"),
            Event::Answered {
                answer: Answer::Repeat,
            },
        )
        .unwrap();
        let again = kept.until_begun("pay");
        assert_eq!((again.key, again.attempt), (first.key, 2));
    }
}

#[test]
fn there_is_no_way_back_from_a_commit() {
    let mut runbook = builtin::of_mode(Mode::Planned, group());
    runbook.steps.push(Step::new("commit", Action::Commit));
    let mut kept = Kept::new(planned(&runbook));
    kept.until_begun("commit");
    let back = || Event::Aborted { rollback: true };
    assert!(
        kept.tell(Some("anna"), back())
            .unwrap_err()
            .contains("no way back")
    );
    kept.tell(None, fault(Cause::Fault)).unwrap();
    let Next::Ask(question) = kept.next() else {
        panic!()
    };
    assert!(!question.answers.contains(&Answer::Rollback));
    kept.tell(Some("anna"), Event::Aborted { rollback: false })
        .unwrap();
    assert_eq!(kept.finish(), Outcome::Stopped);
}

#[test]
fn a_pause_begins_nothing_and_an_abort_undoes() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Test, group())));
    kept.until_begun("promote");
    kept.tell(Some("anna"), Event::Paused).unwrap();
    assert!(kept.tell(Some("anna"), Event::Paused).is_err());
    kept.tell(
        None,
        Event::Done {
            note: String::new(),
        },
    )
    .unwrap();
    assert_eq!(kept.next(), Next::Paused);
    kept.tell(Some("ben"), Event::Continued).unwrap();
    kept.until_begun("networks");
    kept.tell(Some("anna"), Event::Aborted { rollback: true })
        .unwrap();
    assert!(
        kept.tell(Some("anna"), Event::Aborted { rollback: true })
            .is_err()
    );
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(
        kept.begun().join(" "),
        "ready promote networks -networks -promote"
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

/// One thing that may happen, if it can.
fn any_event() -> impl Strategy<Value = (u8, u64, bool)> {
    (
        any::<u8>(),
        select(vec![0u64, 1, 30, 61, 400, 2_000, 90_000]),
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens in whatever order: what is refused changes nothing, what is
    /// taken in resumes as the same run after every record, what is undone was begun
    /// and is undone backwards, nothing is undone after a commit was done, and a run
    /// comes to an end when all goes well from then on.
    #[test]
    fn any_sequence_of_events(runbook in made::sound_runbook(), events in proptest::collection::vec(any_event(), 0..120)) {
        let mut kept = Kept::new(planned(&runbook));
        for (what, secs, flag) in events {
            kept.pass(secs);
            let who = if flag { "anna" } else { "ben" };
            let (by, event) = match what {
                0..=119 => { let next = kept.next(); kept.well(next); continue }
                120..=139 => (None, fault(Cause::Fault)),
                140..=149 => (None, fault(Cause::Clean)),
                150..=159 => (None, fault(Cause::SourceLost)),
                160..=169 => (None, Event::SourceBack),
                170..=189 => (None, Event::Restarted),
                190..=194 => (Some(who), Event::Refused { why: "no".to_owned() }),
                195..=199 => (Some(who), Event::Paused),
                200..=204 => (Some(who), Event::Aborted { rollback: flag }),
                205..=214 => (Some(who), Event::Answered { answer: Answer::TakeAsDone }),
                215..=219 => (Some(who), Event::Answered { answer: Answer::Rollback }),
                220..=221 => (Some(who), Event::Answered { answer: Answer::End }),
                222..=231 => (None, Event::TimedOut),
                232..=241 => (None, Event::Done { note: "x".repeat(5_000) }),
                242..=251 => (Some(who), Event::Approved { comment: String::new() }),
                _ => (None, Event::Ended { outcome: Outcome::Succeeded }),
            };
            let _ = kept.tell(by, event);
        }
        let outcome = kept.finish();
        let names: Vec<_> = runbook.steps.iter().map(|step| step.name.as_str()).collect();
        let place = |name: &str| names.iter().position(|known| *known == name).unwrap();
        let begun = kept.begun();
        let mut undone = begun.iter().filter_map(|name| name.strip_prefix('-')).map(place).collect::<Vec<_>>();
        for place in &undone {
            prop_assert!(begun.iter().any(|name| name == names[*place]));
        }
        undone.dedup();
        prop_assert!(undone.windows(2).all(|pair| pair[0] > pair[1]), "{undone:?}");
        if runbook.steps.iter().any(|step| step.action == Action::Commit) && outcome == Outcome::RolledBack {
            prop_assert!(!begun.iter().any(|name| name == "commit"));
        }
    }

    /// A log of which lines are missing, doubled or exchanged is refused or is a run; never a panic.
    #[test]
    fn damaged_logs_never_panic(runbook in made::sound_runbook(), cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..5)) {
        let mut kept = Kept::new(planned(&runbook));
        kept.finish();
        let mut log = kept.log.clone();
        for (from, to) in cuts {
            let (from, to) = (from.index(log.len()), to.index(log.len()));
            let record = log[from].clone();
            log[to] = Record { number: log[to].number, ..record };
        }
        let _ = Run::resume(&log);
    }
}

/// What the steps did to the world: effects by their keys, each at most once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct World {
    /// Step by step: whether it stands.
    stands: BTreeMap<String, bool>,
    /// Of what may not be repeated: how often it was done.
    paid: BTreeMap<String, u32>,
}

impl World {
    fn perform(&mut self, attempt: &Attempt) {
        self.stands.insert(attempt.step.name.clone(), !attempt.undo);
        if !attempt.step.action.is_repeatable() {
            *self.paid.entry(attempt.key.clone()).or_default() += 1;
        }
    }
}

/// Where a conductor is killed within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// After the begin is recorded, before the effect.
    Begun,
    /// After the effect, before its end is recorded.
    Done,
    /// After the end is recorded.
    Recorded,
}

/// Conducts a run; a step of `fails` fails as often as it is begun under a new key.
/// Before each record it is killed as `kill` says, and the run goes on from the log.
fn conduct(
    plan: &Plan,
    fails: &BTreeSet<(String, bool)>,
    kill: &dyn Fn(usize) -> Option<Killed>,
) -> (Run, World) {
    let mut kept = Kept::new(plan.clone());
    let (mut world, mut begun) = (World::default(), 0);
    let mut asked = 0;
    for _ in 0..2_000 {
        let restart = |kept: &mut Kept| {
            kept.run = Run::resume(&kept.log).unwrap();
            kept.tell(None, Event::Restarted).unwrap();
        };
        match kept.next() {
            Next::Over(_) => return (kept.run, world),
            Next::Begin(attempt) => {
                let killed = kill(begun);
                begun += 1;
                kept.tell(None, attempt.begun()).unwrap();
                if matches!(attempt.step.action.kind(), Kind::Approve | Kind::Delay) {
                    if killed.is_some() {
                        restart(&mut kept);
                    }
                    continue;
                }
                if killed == Some(Killed::Begun) {
                    restart(&mut kept);
                    // A person looks, and sees that it was not done.
                    if matches!(kept.next(), Next::Ask(_)) {
                        kept.tell(
                            Some("anna"),
                            Event::Answered {
                                answer: Answer::Repeat,
                            },
                        )
                        .unwrap();
                    }
                    continue;
                }
                let failing = fails.contains(&(attempt.step.name.clone(), attempt.undo));
                world.perform(&attempt);
                if killed == Some(Killed::Done) {
                    restart(&mut kept);
                    // A person looks, and sees that it was done, or that it failed.
                    if !matches!(kept.next(), Next::Ask(_)) {
                        continue;
                    }
                    if !failing {
                        kept.tell(
                            Some("anna"),
                            Event::Answered {
                                answer: Answer::TakeAsDone,
                            },
                        )
                        .unwrap();
                        continue;
                    }
                    // Told to repeat, it fails at once: the receiver knows the key.
                    kept.tell(
                        Some("anna"),
                        Event::Answered {
                            answer: Answer::Repeat,
                        },
                    )
                    .unwrap();
                    let Next::Begin(again) = kept.next() else {
                        panic!()
                    };
                    assert_eq!(again.key, attempt.key);
                    kept.tell(None, again.begun()).unwrap();
                }
                let end = if failing {
                    fault(Cause::Fault)
                } else {
                    Event::Done {
                        note: String::new(),
                    }
                };
                kept.tell(None, end).unwrap();
                if killed == Some(Killed::Recorded) {
                    restart(&mut kept);
                }
            }
            Next::Ask(question) => {
                // The same person, the same answers.
                asked += 1;
                let answer = match (asked, question.undo) {
                    (_, true) => Answer::TakeAsDone,
                    (1, _) if question.answers.contains(&Answer::Rollback) => Answer::Rollback,
                    _ => Answer::End,
                };
                kept.tell(Some("anna"), Event::Answered { answer }).unwrap();
            }
            next => kept.well(next),
        }
        kept.pass(1);
    }
    panic!("it does not end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The figure of the issue: a run killed at every boundary of every step, one at
    /// a time and all of them, ends as one that was not killed: every step, the
    /// outcome, and the world that it leaves.
    #[test]
    fn killed_at_every_boundary_it_ends_as_if_not(
        runbook in made::sound_runbook(),
        fails in proptest::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..3),
    ) {
        let plan = planned(&runbook);
        let fails: BTreeSet<(String, bool)> = fails.into_iter().map(|(index, undo)| (index.get(&runbook.steps).name.clone(), undo)).collect();
        let (whole, world) = conduct(&plan, &fails, &|_| None);
        let boundaries = 2 * runbook.steps.len() + 2;
        for how in [Killed::Begun, Killed::Done, Killed::Recorded] {
            for boundary in 0..boundaries {
                let (run, left) = conduct(&plan, &fails, &|begun| (begun == boundary).then_some(how));
                prop_assert_eq!(run.ends(), whole.ends(), "{:?} at {}", how, boundary);
                prop_assert_eq!(&left, &world, "{:?} at {}", how, boundary);
            }
        }
        // At every one, but for those that never get anywhere then.
        let (run, left) = conduct(&plan, &fails, &|begun| match begun % 3 {
            0 => Some(Killed::Recorded),
            1 => Some(Killed::Done),
            _ => None,
        });
        prop_assert_eq!(run.ends(), whole.ends());
        prop_assert_eq!(&left, &world);
    }
}
