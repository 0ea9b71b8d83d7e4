//! A plan being performed: a state machine whose every transition is a record.
//!
//! [`Run::next`] says what is to be done, given the time; whoever conducts the
//! run does it and tells [`Run::happened`] what came of it, which answers with
//! the [`Record`] to be kept **before** anything else is done. [`Run::resume`]
//! makes the same run of the records. Time and results are arguments; nothing
//! is begun, awaited or written here.
//!
//! A step whose begin is recorded and whose end is not may have had its effect
//! or not. All kinds but exec and webhook find out by themselves and may be
//! begun again; for those two a person is asked, unless they say that they are
//! repeatable. An attempt that repeats has the same key, so that a receiver can
//! tell; a repetition of what is known to have failed has a new one.

use serde::{Deserialize, Serialize};

use super::plan::Plan;

mod event;
mod follow;
mod next;
mod state;
mod view;

pub use self::event::{Answer, Cause, Event, Moment, Outcome, Record};
pub use self::next::{Attempt, Next, Question};
pub use self::state::{Back, Forward, Refused};
pub use self::view::StepView;

use self::state::{Direction, Progress};

/// Longest text in a record, in bytes; what is longer is cut off.
pub const LONGEST_TEXT: usize = 4096;

/// A run: what [`Run::next`] and [`Run::happened`] go by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    id: String,
    by: String,
    plan: Plan,
    started: Moment,
    /// How many records there are.
    records: u64,
    progress: Vec<Progress>,
    direction: Direction,
    /// The step at hand.
    cursor: usize,
    paused: bool,
    question: Option<Question>,
    /// How it is to end, as soon as that is recorded.
    ending: Option<Outcome>,
    outcome: Option<Outcome>,
}
