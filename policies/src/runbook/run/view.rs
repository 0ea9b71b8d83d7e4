//! What can be seen of a run.

use serde::{Deserialize, Serialize};

use super::super::Kind;
use super::super::plan::Plan;
use super::state::Direction;
use super::{Back, Forward, Moment, Outcome, Question, Run};

/// A step of a run, for status and reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StepView {
    /// Its name.
    pub name: String,
    /// What it does.
    pub kind: Kind,
    /// How far it came.
    pub forward: Forward,
    /// How far its undoing came.
    pub back: Back,
    /// How often it was begun.
    pub attempts: u32,
    /// When it was begun first.
    pub begun: Option<Moment>,
    /// When it, or its undoing, ended last.
    pub ended: Option<Moment>,
    /// What was said of it last: how it was done, or why it failed.
    pub said: String,
    /// What was said last of its undoing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub undo_said: String,
}

impl StepView {
    /// What was said of it and of its undoing, for people.
    pub fn words(&self) -> String {
        match (self.said.as_str(), self.undo_said.as_str()) {
            (said, "") => said.to_owned(),
            ("", undone) => undone.to_owned(),
            (said, undone) => format!("{said}; on the way back: {undone}"),
        }
    }
}

impl Run {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Who started it.
    pub fn by(&self) -> &str {
        &self.by
    }

    /// When it was started.
    pub fn started(&self) -> Moment {
        self.started
    }

    /// What it performs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it ended; None while it has not.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }

    /// What a person is asked.
    pub fn question(&self) -> Option<&Question> {
        self.question.as_ref()
    }

    /// The step at hand; None when the run has come to its end.
    pub fn at_hand_name(&self) -> Option<&str> {
        let at_hand = self.at_hand().filter(|_| self.ending.is_none());
        at_hand.map(|(planned, _)| planned.step.name.as_str())
    }

    /// Whether what was done is being undone.
    pub fn goes_back(&self) -> bool {
        self.direction == Direction::Back
    }

    /// How many records it has made.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Its steps.
    pub fn steps(&self) -> Vec<StepView> {
        let both = self.plan.steps.iter().zip(&self.progress);
        both.map(|(planned, progress)| StepView {
            name: planned.step.name.clone(),
            kind: planned.step.action.kind(),
            forward: progress.forward,
            back: progress.back,
            attempts: progress.attempts,
            begun: progress.begun,
            ended: progress.ended,
            said: progress.said.clone(),
            undo_said: progress.undo_said.clone(),
        })
        .collect()
    }

    /// How each step ended and how the run did: what two runs have in common
    /// that took different ways to the same end.
    pub fn ends(&self) -> (Vec<(Forward, Back)>, Option<Outcome>) {
        let each = self.progress.iter();
        let each = each.map(|progress| (progress.forward, progress.back));
        (each.collect(), self.outcome)
    }
}
