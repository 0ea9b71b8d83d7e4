//! Runbooks: the ordered steps by which groups are moved, taken over and tested.
//!
//! A [`Runbook`] is data. [`read`] makes one of a TOML file and tells every
//! mistake at once; [`check`] knows which orders cannot be right; [`builtin`]
//! holds the ones in force without a file, and [`write`](write()) prints any of them.
//! [`plan`](plan::plan) says what would happen in one [`Mode`], with times from measured
//! facts, and [`run`] performs a plan as a pure state machine, each transition
//! a record. Times and results are arguments: nothing here knows a clock, a
//! site or a guest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

use crate::units::Period;

mod action;
pub mod builtin;
pub mod check;
mod fields;
pub mod plan;
pub mod read;
pub mod run;
mod write;

pub use self::action::{Action, Kind, Method, PointChoice, Readiness};
pub use self::write::write;

/// Most steps of a runbook; more is a file gone wrong.
pub const MOST_STEPS: usize = 256;
/// Most groups of a runbook.
pub const MOST_GROUPS: usize = 100;
/// Most guests, approvers or words of a command in one list.
pub const MOST_NAMES: usize = 1000;
/// Longest text of one value, in bytes.
pub const LONGEST_TEXT: usize = 4096;
/// In the place of a name: whoever may operate this site.
pub const ANYONE: &str = "*";

/// Why a runbook is run.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// On an isolated network, from a point, while protection goes on.
    Test,
    /// Both sites live: nothing is lost.
    Planned,
    /// The source is lost, or is taken to be.
    Unplanned,
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 3] = [Mode::Test, Mode::Planned, Mode::Unplanned];

    /// As in a file.
    pub const fn word(self) -> &'static str {
        match self {
            Mode::Test => "test",
            Mode::Planned => "planned",
            Mode::Unplanned => "unplanned",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What follows when a step fails, is refused or takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Nothing more is begun until a person decides: repeat, take as done, roll back or end.
    #[default]
    Stop,
    /// The failure is recorded, and the next step begins.
    Continue,
    /// What was done is undone, the last first.
    Rollback,
}

impl OnError {
    /// All of them.
    pub const ALL: [OnError; 3] = [OnError::Stop, OnError::Continue, OnError::Rollback];

    /// As in a file.
    pub const fn word(self) -> &'static str {
        match self {
            OnError::Stop => "stop",
            OnError::Continue => "continue",
            OnError::Rollback => "rollback",
        }
    }
}

/// Ordered steps for groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Runbook {
    /// How it is called in plans, records and reports.
    pub name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it may be run for; all modes if not given.
    #[serde(default = "all_modes")]
    pub modes: BTreeSet<Mode>,
    /// The groups that it acts on, each with its guests; an empty list means
    /// all guests that the group has.
    pub groups: BTreeMap<String, Vec<String>>,
    /// The steps, in order.
    pub steps: Vec<Step>,
}

fn all_modes() -> BTreeSet<Mode> {
    Mode::ALL.into()
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// How it is called; no two have the same name.
    pub name: String,
    /// What it does.
    #[serde(flatten)]
    pub action: Action,
    /// For people: shown when its turn comes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The group that it acts on; all of the runbook's if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Those guests of the group alone (start-group, wait-healthy).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<String>,
    /// In which modes it runs; those of its kind if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modes: Option<BTreeSet<Mode>>,
    /// It has failed if it has not ended by then; by its kind if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Period>,
    /// What follows when it fails.
    #[serde(default)]
    pub on_error: OnError,
}

impl Runbook {
    /// The names of groups that a step acts on, in order of names.
    pub fn groups_of<'a>(&'a self, step: &'a Step) -> Vec<&'a str> {
        match (&step.group, step.action.kind().takes_group()) {
            (_, false) => Vec::new(),
            (Some(group), true) => vec![group],
            (None, true) => self.groups.keys().map(String::as_str).collect(),
        }
    }

    /// Whether a step acts on a group of the runbook.
    pub(crate) fn acts_on(step: &Step, group: &str) -> bool {
        let named = step.group.as_deref();
        step.action.kind().takes_group() && named.is_none_or(|named| named == group)
    }

    /// What may be in a file, for editors: a JSON Schema.
    pub fn schema() -> Schema {
        let mut schema = schema_for!(Runbook);
        schema.insert("title".into(), "Farhaven runbook".into());
        schema
    }
}

impl Step {
    /// A step with the defaults of its kind.
    pub fn new(name: impl Into<String>, action: Action) -> Step {
        Step {
            name: name.into(),
            action,
            description: String::new(),
            group: None,
            guests: Vec::new(),
            modes: None,
            timeout: None,
            on_error: OnError::Stop,
        }
    }

    /// Whether it runs in this mode.
    pub fn runs_in(&self, mode: Mode) -> bool {
        match &self.modes {
            Some(modes) => modes.contains(&mode),
            None => self.action.kind().default_modes().contains(&mode),
        }
    }

    /// When it has failed, counted from its begin. None for what ends by itself.
    pub fn limit(&self) -> Option<Period> {
        match self.action {
            Action::Delay { .. } => None,
            _ => self.timeout.or(self.action.kind().timeout()),
        }
    }
}
