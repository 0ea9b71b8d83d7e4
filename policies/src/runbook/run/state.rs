//! Transitions: an event, if it can happen now, makes the next state.
//!
//! `apply` is the only place that changes a run, for what happens now and for
//! what is read from the log alike: so a run that was resumed cannot differ.

use serde::{Deserialize, Serialize};

use super::super::plan::{Plan, PlannedStep};
use super::super::{ANYONE, Action, Kind, MOST_STEPS, Mode};
use super::event::cut;
use super::{Cause, Event, Moment, Record, Run};

/// Which way a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Direction {
    Forward,
    Back,
}

/// How far a step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forward {
    /// Its turn has not come, or it is to be begun again.
    Ahead,
    /// It has no part in this mode.
    Skipped,
    /// It is under way.
    Running,
    /// It waits for the other site.
    SourceAwaited,
    /// It ended well.
    Done,
    /// It did not.
    Failed {
        /// Nothing of it was done.
        clean: bool,
    },
}

/// How far its undoing has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Back {
    /// Nothing of it was undone.
    Standing,
    /// It is being undone.
    Running,
    /// That waits for the other site.
    SourceAwaited,
    /// It is undone.
    Undone,
    /// That failed.
    Failed,
}

/// What is known of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) forward: Forward,
    pub(super) back: Back,
    pub(super) attempts: u32,
    pub(super) undo_attempts: u32,
    /// How often it was repeated after it was known to have failed.
    pub(super) round: u32,
    pub(super) undo_round: u32,
    /// Of the attempt under way, or of those that belong to it.
    pub(super) since: Moment,
    pub(super) deadline: Option<Moment>,
    pub(super) approvals: Vec<String>,
    pub(super) begun: Option<Moment>,
    pub(super) ended: Option<Moment>,
    pub(super) said: String,
    pub(super) undo_said: String,
    /// An attempt of it may have changed something.
    pub(super) stained: bool,
}

/// The step at hand, in the direction of the run.
pub(super) enum State {
    Ready,
    Running {
        since: Moment,
        deadline: Option<Moment>,
    },
    SourceAwaited {
        deadline: Moment,
    },
}

/// Something that cannot happen now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub(super) String);

impl Refused {
    /// With the reason, for people.
    pub fn new(why: impl Into<String>) -> Refused {
        Refused(why.into())
    }
}

pub(super) fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

impl Progress {
    fn new() -> Progress {
        Progress {
            forward: Forward::Ahead,
            back: Back::Standing,
            attempts: 0,
            undo_attempts: 0,
            round: 0,
            undo_round: 0,
            since: Moment::default(),
            deadline: None,
            approvals: Vec::new(),
            begun: None,
            ended: None,
            said: String::new(),
            undo_said: String::new(),
            stained: false,
        }
    }

    /// What is said of it, or of its undoing: why it failed outlasts the way back.
    pub(super) fn words(&mut self, direction: Direction) -> &mut String {
        match direction {
            Direction::Forward => &mut self.said,
            Direction::Back => &mut self.undo_said,
        }
    }

    pub(super) fn state(&self, direction: Direction) -> State {
        let running = State::Running {
            since: self.since,
            deadline: self.deadline,
        };
        let awaited = State::SourceAwaited {
            deadline: self.deadline.unwrap_or(Moment(u64::MAX)),
        };
        match (direction, self.forward, self.back) {
            (Direction::Forward, Forward::Running, _) => running,
            (Direction::Forward, Forward::SourceAwaited, _) => awaited,
            (Direction::Back, _, Back::Running) => running,
            (Direction::Back, _, Back::SourceAwaited) => awaited,
            _ => State::Ready,
        }
    }
}

impl Run {
    /// A run that somebody starts, and its first record.
    ///
    /// # Errors
    /// The plan has no steps, or nobody's name is given.
    pub fn new(id: &str, plan: Plan, by: &str, now: Moment) -> Result<(Run, Record), Refused> {
        let record = Record {
            number: 1,
            at: now,
            by: Some(by.to_owned()),
            step: None,
            undo: false,
            event: Event::Started {
                run: id.to_owned(),
                plan: Box::new(plan),
            },
        };
        Ok((Run::begin(&record)?, record))
    }

    fn begin(record: &Record) -> Result<Run, Refused> {
        let (Event::Started { run, plan }, Some(by)) = (&record.event, &record.by) else {
            return refused("the first record of a run says who started it, and this one does not");
        };
        if record.number != 1 || by.trim().is_empty() || run.is_empty() {
            return refused("a run starts with record 1, an id and a name of who started it");
        }
        if !(1..=MOST_STEPS).contains(&plan.steps.len()) {
            return refused(format!("a run has 1 to {MOST_STEPS} steps"));
        }
        Ok(Run {
            id: run.clone(),
            by: by.clone(),
            plan: (**plan).clone(),
            started: record.at,
            records: 1,
            progress: plan.steps.iter().map(|_| Progress::new()).collect(),
            direction: Direction::Forward,
            cursor: 0,
            paused: false,
            question: None,
            ending: None,
            outcome: None,
        })
    }

    /// The run that these records tell of: the same as the one that made them.
    ///
    /// # Errors
    /// A record does not follow from those before it.
    pub fn resume<'r>(records: impl IntoIterator<Item = &'r Record>) -> Result<Run, Refused> {
        let mut records = records.into_iter();
        let first = records.next();
        let mut run = Run::begin(first.ok_or_else(|| Refused("there is no record".to_owned()))?)?;
        for record in records {
            run.apply(record).map_err(|Refused(why)| {
                Refused(format!("record {} does not follow: {why}", record.number))
            })?;
        }
        Ok(run)
    }

    /// Takes in what happened. The record is to be kept before anything else is done.
    ///
    /// # Errors
    /// It cannot happen now; nothing is changed then.
    pub fn happened(
        &mut self,
        now: Moment,
        by: Option<&str>,
        event: Event,
    ) -> Result<Record, Refused> {
        let step = self.at_hand().filter(|_| event.of_step());
        let record = Record {
            number: self.records + 1,
            at: now,
            by: by.map(|by| {
                let mut by = by.to_owned();
                cut(&mut by);
                by
            }),
            step: step.map(|(planned, _)| planned.step.name.clone()),
            undo: event.of_step() && self.direction == Direction::Back,
            event: event.bounded(),
        };
        self.apply(&record)?;
        Ok(record)
    }

    pub(super) fn at_hand(&self) -> Option<(&PlannedStep, &Progress)> {
        self.plan
            .steps
            .get(self.cursor)
            .zip(self.progress.get(self.cursor))
    }

    fn apply(&mut self, record: &Record) -> Result<(), Refused> {
        if record.number != self.records + 1 {
            return refused(format!("it should be number {}", self.records + 1));
        }
        if self.outcome.is_some() {
            return refused("the run is over");
        }
        let named = record.by.as_deref().is_some_and(|by| !by.trim().is_empty());
        if record.event.needs_person() && !named {
            return refused("a person does this; their name is missing");
        }
        let name = self
            .at_hand()
            .map(|(planned, _)| planned.step.name.as_str());
        let of_step = record.event.of_step();
        if (of_step && record.step.as_deref() != name) || (!of_step && record.step.is_some()) {
            return refused(format!("the step at hand is {}", name.unwrap_or("none")));
        }
        if record.undo != (of_step && self.direction == Direction::Back) {
            return refused("it goes the other way");
        }
        self.transition(record)?;
        self.records = record.number;
        Ok(())
    }

    /// Refuses before it changes anything.
    fn transition(&mut self, record: &Record) -> Result<(), Refused> {
        let at = record.at;
        if let Some(outcome) = self.ending {
            return match record.event {
                Event::Ended { outcome: told } if told == outcome => {
                    self.outcome = Some(outcome);
                    Ok(())
                }
                Event::Restarted => Ok(()),
                _ => refused("the run has come to its end"),
            };
        }
        match &record.event {
            Event::Started { .. } => return refused("the run is started already"),
            Event::Ended { .. } => return refused("the run has not come to its end"),
            Event::Skipped { .. } => {
                let fits =
                    self.question.is_none() && !self.paused && self.direction == Direction::Forward;
                let (planned, progress) = self.hand()?;
                if !fits || planned.skipped.is_none() || progress.forward != Forward::Ahead {
                    return refused("the step is not to be skipped");
                }
                progress.forward = Forward::Skipped;
                self.advance();
            }
            Event::Begun { attempt, key } => self.begun(at, *attempt, key)?,
            Event::Done { note } => {
                let (planned, running) = self.running()?;
                match (&planned.step.action, running) {
                    (Action::Approve { .. }, _) if self.direction == Direction::Forward => {
                        return refused("people end this step, by approving it");
                    }
                    (Action::Delay { period }, since) if at < since.after(*period) => {
                        return refused("the delay lasts on");
                    }
                    _ => self.done(at, note),
                }
            }
            Event::Failed { why, cause } => {
                let (planned, _) = self.running()?;
                let action = &planned.step.action;
                if matches!(action.kind(), Kind::Approve | Kind::Delay) {
                    return refused("this step ends by itself");
                }
                let waits =
                    action.kind().waits_for_source(self.plan.mode) && action.is_repeatable();
                let waited_for = *cause == Cause::SourceLost && waits;
                let direction = self.direction;
                let (_, progress) = self.hand()?;
                if waited_for && progress.deadline.is_some_and(|deadline| at < deadline) {
                    progress.words(direction).clone_from(why);
                    progress.stained = true;
                    self.mark(Forward::SourceAwaited, Back::SourceAwaited);
                } else {
                    self.failed(at, why, *cause == Cause::Clean);
                }
            }
            Event::TimedOut => self.timed_out(at)?,
            Event::SourceBack => {
                let awaited = self.at_hand().is_some_and(|(_, progress)| {
                    matches!(progress.state(self.direction), State::SourceAwaited { .. })
                });
                if !awaited {
                    return refused("the other site is not awaited");
                }
                self.mark(Forward::Ahead, Back::Standing);
            }
            Event::Approved { comment } => {
                let (by, limit) = self.may_decide(record)?;
                let (_, progress) = self.hand()?;
                if progress.approvals.contains(&by) {
                    return refused(format!("{by} approved it already; another person must"));
                }
                progress.approvals.push(by);
                if progress.approvals.len() >= limit {
                    let by = progress.approvals.join(", ");
                    let said = match comment.as_str() {
                        "" => format!("approved by {by}"),
                        comment => format!("approved by {by}: {comment}"),
                    };
                    self.done(at, &said);
                }
            }
            Event::Refused { why } => {
                let (by, _) = self.may_decide(record)?;
                self.failed(at, &format!("refused by {by}: {why}"), true);
            }
            Event::Paused if self.paused => return refused("the run is paused already"),
            Event::Paused => self.paused = true,
            Event::Continued if !self.paused => return refused("the run is not paused"),
            Event::Continued => self.paused = false,
            Event::Aborted { rollback } => self.abort(at, *rollback)?,
            Event::Answered { answer } => self.answer(at, *answer)?,
            Event::Restarted => self.restarted(at),
        }
        Ok(())
    }

    pub(super) fn hand(&mut self) -> Result<(&PlannedStep, &mut Progress), Refused> {
        let planned = self.plan.steps.get(self.cursor);
        let both = planned.zip(self.progress.get_mut(self.cursor));
        both.ok_or_else(|| Refused("no step is at hand".to_owned()))
    }

    /// The step at hand, which is under way, and since when.
    pub(super) fn running(&self) -> Result<(&PlannedStep, Moment), Refused> {
        match self
            .at_hand()
            .map(|(planned, progress)| (planned, progress.state(self.direction)))
        {
            Some((planned, State::Running { since, .. })) if self.question.is_none() => {
                Ok((planned, since))
            }
            _ => refused("no step is under way"),
        }
    }

    /// Moves the step at hand on, in the direction of the run.
    pub(super) fn mark(&mut self, forward: Forward, back: Back) {
        let direction = self.direction;
        if let Some(progress) = self.progress.get_mut(self.cursor) {
            match direction {
                Direction::Forward => progress.forward = forward,
                Direction::Back => progress.back = back,
            }
        }
    }

    fn begun(&mut self, at: Moment, attempt: u32, key: &str) -> Result<(), Refused> {
        let ready = match self.at_hand() {
            Some((planned, progress)) => {
                let skipped = planned.skipped.is_some() && self.direction == Direction::Forward;
                matches!(progress.state(self.direction), State::Ready) && !skipped
            }
            None => false,
        };
        if !ready || self.paused || self.question.is_some() {
            return refused("no step is to be begun");
        }
        let expected = self.attempt();
        if expected.attempt != attempt || expected.key != key {
            return refused("it is another attempt");
        }
        let direction = self.direction;
        let (planned, progress) = self.hand()?;
        // What waited for the other site has the time that it was given at first.
        let limit = planned.step.limit().map(|limit| at.after(limit));
        progress.deadline = progress.deadline.or(limit);
        progress.since = at;
        match direction {
            Direction::Forward => {
                progress.attempts = attempt;
                progress.begun.get_or_insert(at);
            }
            Direction::Back => progress.undo_attempts = attempt,
        }
        self.mark(Forward::Running, Back::Running);
        Ok(())
    }

    fn timed_out(&mut self, at: Moment) -> Result<(), Refused> {
        let Some((planned, progress)) = self.at_hand().filter(|_| self.question.is_none()) else {
            return refused("nothing is under way");
        };
        let approve = matches!(planned.step.action, Action::Approve { .. });
        let said = match self.direction {
            Direction::Forward => &progress.said,
            Direction::Back => &progress.undo_said,
        };
        let (deadline, why) = match progress.state(self.direction) {
            State::Running {
                deadline: Some(deadline),
                ..
            } if approve => (deadline, "nobody decided in time".to_owned()),
            State::Running {
                deadline: Some(deadline),
                ..
            } => (
                deadline,
                "it took too long; what it did is not known".to_owned(),
            ),
            State::SourceAwaited { deadline } => (
                deadline,
                format!("the other site did not come back in time: {said}"),
            ),
            _ => return refused("nothing is under way that could take too long"),
        };
        if at < deadline {
            return refused("its time is not over");
        }
        self.failed(at, &why, approve);
        Ok(())
    }

    /// Whether who is named by the record may decide the step at hand, and how many must agree.
    fn may_decide(&self, record: &Record) -> Result<(String, usize), Refused> {
        let (planned, _) = self.running()?;
        let (Action::Approve { by, approvals, .. }, Some(name)) =
            (&planned.step.action, &record.by)
        else {
            return refused("the step at hand is not for people to decide");
        };
        if !by.iter().any(|may| may == ANYONE || may == name) {
            return refused(format!(
                "{name} may not decide '{}'; {} may",
                planned.step.name,
                by.join(", ")
            ));
        }
        let deadline = self.at_hand().and_then(|(_, progress)| progress.deadline);
        if deadline.is_some_and(|deadline| record.at >= deadline) {
            return refused("the time for it is over");
        }
        Ok((name.clone(), usize::from(*approvals)))
    }

    /// What it is run for.
    pub fn mode(&self) -> Mode {
        self.plan.mode
    }
}
