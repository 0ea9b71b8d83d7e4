//! What can happen to a run, and how it is recorded.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::plan::Plan;
use crate::units::Period;

/// A time: milliseconds since 1970, UTC.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Moment(pub u64);

impl Moment {
    /// So much later.
    #[must_use]
    pub fn after(self, period: Period) -> Moment {
        Moment(self.0.saturating_add(period.duration().as_millis() as u64))
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "event",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Event {
    /// Somebody started the run; the first of its records.
    Started {
        /// The run's id.
        run: String,
        /// What is performed.
        plan: Box<Plan>,
    },
    /// The step has no part in this mode.
    Skipped {
        /// Why.
        why: String,
    },
    /// The step, or its undoing, is begun.
    Begun {
        /// How often it was begun, this time included.
        attempt: u32,
        /// The same for every attempt that may repeat one of unknown end.
        key: String,
    },
    /// It has ended well.
    Done {
        /// What came of it.
        note: String,
    },
    /// It has failed.
    Failed {
        /// Why, and what to do.
        why: String,
        /// In which way.
        cause: Cause,
    },
    /// Its time is over.
    TimedOut,
    /// The other site answers again.
    SourceBack,
    /// A person agreed.
    Approved {
        /// In their words.
        comment: String,
    },
    /// A person refused.
    Refused {
        /// Why.
        why: String,
    },
    /// Nothing more is to be begun for now.
    Paused,
    /// The pause is over.
    Continued,
    /// A person gave the run up.
    Aborted {
        /// Whether what was done is to be undone.
        rollback: bool,
    },
    /// A person decided what follows a failure.
    Answered {
        /// What.
        answer: Answer,
    },
    /// Whoever conducts the run was restarted: what was under way is not any more.
    Restarted,
    /// The run has ended.
    Ended {
        /// How.
        outcome: Outcome,
    },
}

/// In which way a step failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It may have been done in part.
    Fault,
    /// Nothing was changed, so there is nothing to undo.
    Clean,
    /// The other site does not answer; what was done there is not known.
    SourceLost,
}

/// What a person decides about a step that failed or was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Do it again.
    Repeat,
    /// It is done, by other means: go on.
    TakeAsDone,
    /// Undo what was done.
    Rollback,
    /// Leave everything as it is.
    End,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every step that had a part was done.
    Succeeded,
    /// The last step was reached, but some failed that were to be passed over.
    SucceededInPart,
    /// What was done was undone.
    RolledBack,
    /// A person ended it where it was.
    Stopped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Succeeded => "succeeded",
            Outcome::SucceededInPart => "succeeded in part",
            Outcome::RolledBack => "rolled back",
            Outcome::Stopped => "stopped",
        })
    }
}

/// A line of the audit log: who, when, what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counted from 1, without a gap.
    pub number: u64,
    /// When.
    pub at: Moment,
    /// Who, where a person did it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// Which step, where it concerns one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// It is the step's undoing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undo: bool,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

impl Event {
    /// Whether a person does it, whose name must be known.
    pub fn needs_person(&self) -> bool {
        matches!(
            self,
            Event::Started { .. }
                | Event::Approved { .. }
                | Event::Refused { .. }
                | Event::Paused
                | Event::Continued
                | Event::Aborted { .. }
                | Event::Answered { .. }
        )
    }

    /// Whether it concerns the step at hand.
    pub(super) fn of_step(&self) -> bool {
        !matches!(
            self,
            Event::Started { .. }
                | Event::Paused
                | Event::Continued
                | Event::Restarted
                | Event::Ended { .. }
        )
    }

    /// With texts that are not longer than a record takes.
    pub(super) fn bounded(mut self) -> Event {
        if let Event::Done { note: text }
        | Event::Failed { why: text, .. }
        | Event::Refused { why: text }
        | Event::Approved { comment: text } = &mut self
        {
            cut(text);
        }
        self
    }
}

pub(super) fn cut(text: &mut String) {
    if text.len() > super::LONGEST_TEXT {
        let mut end = super::LONGEST_TEXT - '…'.len_utf8();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
}
