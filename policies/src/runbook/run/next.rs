//! What is to be done now.

use serde::{Deserialize, Serialize};

use super::super::{Action, Step};
use super::state::{Direction, Forward, State};
use super::{Answer, Event, Moment, Outcome, Run};

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Tell the run that this happened.
    Record(Event),
    /// Tell the run that this is begun, then do it.
    Begin(Box<Attempt>),
    /// What was begun is under way; it has failed if it has not ended by then.
    Await {
        /// The latest.
        until: Option<Moment>,
    },
    /// People's decision is awaited.
    AwaitApproval {
        /// The step.
        step: String,
        /// How many more must agree.
        missing: usize,
        /// The latest.
        until: Moment,
    },
    /// A delay is under way.
    Sleep {
        /// Its end.
        until: Moment,
    },
    /// The other site is awaited.
    AwaitSource {
        /// The latest.
        until: Moment,
    },
    /// A person must say what follows.
    Ask(Question),
    /// Somebody paused the run.
    Paused,
    /// Nothing, for ever.
    Over(Outcome),
}

/// A step, or its undoing, to be performed once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The step.
    pub step: Step,
    /// The groups that it acts on.
    pub groups: Vec<String>,
    /// Undo it.
    pub undo: bool,
    /// How often it was begun, this time included.
    pub attempt: u32,
    /// The same for every attempt that may repeat one of unknown end.
    pub key: String,
}

impl Attempt {
    /// What the run is told when this is begun.
    pub fn begun(&self) -> Event {
        Event::Begun {
            attempt: self.attempt,
            key: self.key.clone(),
        }
    }
}

/// What a person must decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Question {
    /// About which step.
    pub step: String,
    /// It is about its undoing.
    pub undo: bool,
    /// It was interrupted: whether it was done is not known.
    pub interrupted: bool,
    /// What happened.
    pub why: String,
    /// The answers that can be given.
    pub answers: Vec<Answer>,
}

impl Run {
    /// What is to be done at this time. Asking changes nothing.
    pub fn next(&self, now: Moment) -> Next {
        if let Some(outcome) = self.outcome {
            return Next::Over(outcome);
        }
        if let Some(outcome) = self.ending {
            return Next::Record(Event::Ended { outcome });
        }
        if let Some(question) = &self.question {
            return Next::Ask(question.clone());
        }
        let Some((planned, progress)) = self.at_hand() else {
            // The cursor always stands on a step while the run has no ending.
            return Next::Record(Event::Ended {
                outcome: Outcome::Stopped,
            });
        };
        match progress.state(self.direction) {
            State::Running { since, deadline } => match &planned.step.action {
                Action::Delay { period } => match since.after(*period) {
                    end if now >= end => Next::Record(Event::Done {
                        note: format!("waited {period}"),
                    }),
                    until => Next::Sleep { until },
                },
                _ if deadline.is_some_and(|deadline| now >= deadline) => {
                    Next::Record(Event::TimedOut)
                }
                Action::Approve { approvals, .. } => Next::AwaitApproval {
                    step: planned.step.name.clone(),
                    missing: usize::from(*approvals).saturating_sub(progress.approvals.len()),
                    until: deadline.unwrap_or(Moment(u64::MAX)),
                },
                _ => Next::Await { until: deadline },
            },
            State::SourceAwaited { deadline } if now >= deadline => Next::Record(Event::TimedOut),
            State::SourceAwaited { deadline } => Next::AwaitSource { until: deadline },
            State::Ready if self.paused => Next::Paused,
            State::Ready => match (&planned.skipped, self.direction) {
                (Some(why), Direction::Forward) => {
                    Next::Record(Event::Skipped { why: why.clone() })
                }
                _ => Next::Begin(Box::new(self.attempt())),
            },
        }
    }

    /// The attempt that would be begun now.
    pub(super) fn attempt(&self) -> Attempt {
        let (planned, progress) = self
            .at_hand()
            .expect("only asked for while a step is at hand");
        let undo = self.direction == Direction::Back;
        let (attempts, round) = match self.direction {
            Direction::Forward => (progress.attempts, progress.round),
            Direction::Back => (progress.undo_attempts, progress.undo_round),
        };
        let mut key = format!("{}/{}", self.id, planned.step.name);
        if undo {
            key.push_str("/undo");
        }
        if round > 0 {
            key.push_str(&format!("/{}", round + 1));
        }
        Attempt {
            step: planned.step.clone(),
            groups: planned.acts_on.clone(),
            undo,
            attempt: attempts.saturating_add(1),
            key,
        }
    }

    /// Whether a commit was begun: then there is no way back.
    pub(super) fn committed(&self) -> Option<&str> {
        let both = self.plan.steps.iter().zip(&self.progress);
        let begun = both.filter(|(planned, progress)| {
            let under_way = matches!(progress.forward, Forward::Running | Forward::SourceAwaited);
            planned.step.action == Action::Commit && (progress.stained || under_way)
        });
        begun.map(|(planned, _)| planned.step.name.as_str()).next()
    }
}
