//! What is shown of runs.

use std::collections::BTreeMap;

use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::run::{Moment, Next, Outcome, Question, Run, StepView};
use serde::{Deserialize, Serialize};

use super::facts::now_ms;

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunView {
    /// Its id.
    pub id: String,
    /// The runbook's name.
    pub runbook: String,
    /// What it is run for; none where its record cannot be read.
    pub mode: Option<Mode>,
    /// Who started it.
    pub by: String,
    /// When, milliseconds since 1970.
    pub started: u64,
    /// The groups, with their guests; an empty list means all of the group.
    pub groups: BTreeMap<String, Vec<String>>,
    /// Its steps; their times in milliseconds since 1970.
    pub steps: Vec<StepView>,
    /// How it stands, in a few words.
    pub standing: String,
    /// The approval that it waits for.
    pub awaits: Option<Awaits>,
    /// What a person must decide.
    pub question: Option<Question>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// It is conducted now.
    pub conducted: bool,
}

/// An approval that a run waits for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Awaits {
    /// The step.
    pub step: String,
    /// Who may decide.
    pub by: Vec<String>,
    /// How many more must agree.
    pub missing: usize,
    /// The latest, milliseconds since 1970.
    pub until: u64,
    /// What they are asked.
    pub message: String,
}

impl RunView {
    /// One whose record cannot be read.
    pub(super) fn broken(id: &str, why: String) -> Self {
        Self {
            id: id.to_owned(),
            runbook: String::new(),
            mode: None,
            by: String::new(),
            started: 0,
            groups: BTreeMap::new(),
            steps: Vec::new(),
            standing: why,
            awaits: None,
            question: None,
            outcome: None,
            conducted: false,
        }
    }
}

/// Who goes on with a run that is not over.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hands {
    /// The daemon, step by step.
    Conducted,
    /// Whoever ends this test, which was begun without a runbook.
    Test(String),
    /// Nobody.
    None,
}

/// How a run stands.
pub(super) fn run_view(run: &Run, hands: &Hands) -> RunView {
    let next = run.next(Moment(now_ms()));
    let at_hand = |words: &str| match run.at_hand_name() {
        Some(step) => format!("{words} {step}"),
        None => words.to_owned(),
    };
    let way = if run.goes_back() {
        "rolling back"
    } else {
        "at"
    };
    let standing = match &next {
        Next::Over(outcome) => outcome.to_string(),
        Next::Paused => at_hand("paused before"),
        Next::Ask(question) => format!("asks about {}: {}", question.step, question.why),
        Next::AwaitApproval { step, .. } => format!("waits for the approval of {step}"),
        Next::AwaitSource { .. } => at_hand("waits for the other site, at"),
        _ => match hands {
            Hands::Conducted => at_hand(way),
            Hands::Test(name) => format!("runs until: farhaven test cleanup {name}"),
            Hands::None => at_hand("not conducted; it stands at"),
        },
    };
    let awaits = match next {
        Next::AwaitApproval {
            step,
            missing,
            until,
        } => {
            let planned = run.plan().steps.iter().find(|p| p.step.name == step);
            let (by, message) = match planned.map(|p| &p.step.action) {
                Some(farhaven_policies::runbook::Action::Approve { by, message, .. }) => {
                    (by.clone(), message.clone())
                }
                _ => (Vec::new(), String::new()),
            };
            Some(Awaits {
                step,
                by,
                missing,
                until: until.0,
                message,
            })
        }
        _ => None,
    };
    RunView {
        id: run.id().to_owned(),
        runbook: run.plan().runbook.clone(),
        mode: Some(run.mode()),
        by: run.by().to_owned(),
        started: run.started().0,
        groups: run.plan().groups.clone(),
        steps: run.steps(),
        standing,
        awaits,
        question: run.question().cloned(),
        outcome: run.outcome(),
        conducted: *hands == Hands::Conducted,
    }
}
