//! What would happen: a runbook, a mode and measured facts -> steps in order,
//! each with the time that it is expected to take and where that figure comes
//! from. What was never measured is said to be unknown, not guessed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::{Action, Kind, Mode, Runbook, Step};
use crate::units::Period;

/// What was measured of the groups and the link; all of it may be unknown.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Facts {
    /// By group.
    pub groups: BTreeMap<String, GroupFacts>,
    /// What the link to the other site carries.
    pub link_bytes_per_second: Option<u64>,
}

/// What was measured of a group; times in milliseconds.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct GroupFacts {
    /// Its guests.
    pub guests: BTreeSet<String>,
    /// Its newest sealed point; Some(0): there is none.
    pub newest_point: Option<u64>,
    /// How old that is: what a failover now would lose.
    pub rpo_ms: Option<u64>,
    /// Memory of all guests together.
    pub memory_bytes: Option<u64>,
    /// Disks of all guests together.
    pub disk_bytes: Option<u64>,
    /// What the guests change in a second, as it goes on the link.
    pub dirty_bytes_per_second: Option<u64>,
    /// The pause of the last cut.
    pub last_pause_ms: Option<u64>,
    /// From the last cut until it was sealed.
    pub last_seal_ms: Option<u64>,
    /// How long the guests stood still in the last move.
    pub last_blackout_ms: Option<u64>,
    /// From the declaration until the guests ran, in the last failover or test.
    pub last_rto_ms: Option<u64>,
    /// How long they took then to be healthy.
    pub last_healthy_ms: Option<u64>,
}

/// What would happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The runbook's name.
    pub runbook: String,
    /// What it is run for.
    pub mode: Mode,
    /// The groups that it acts on, with their guests.
    pub groups: BTreeMap<String, Vec<String>>,
    /// Its steps, those that are skipped too.
    pub steps: Vec<PlannedStep>,
    /// What should be known before it is run.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A step of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlannedStep {
    /// The step.
    pub step: Step,
    /// The groups that it acts on.
    pub acts_on: Vec<String>,
    /// Why it is left out; None: it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// How long it is expected to take.
    pub expected: Expected,
    /// What a rollback would do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
}

/// How long a step is expected to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Expected {
    /// In milliseconds; None: nobody knows.
    pub millis: Option<u64>,
    /// Where that comes from, or why it is not known.
    pub basis: String,
    /// It has failed after this.
    pub limit: Option<Period>,
}

/// The runbook is not for this mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("runbook '{runbook}' is not for {mode} mode; it is for {its}")]
pub struct WrongMode {
    runbook: String,
    mode: Mode,
    its: String,
}

/// What `runbook` would do in `mode`.
///
/// # Errors
/// It is not for that mode.
pub fn plan(runbook: &Runbook, mode: Mode, facts: &Facts) -> Result<Plan, WrongMode> {
    if !runbook.modes.contains(&mode) {
        let its: Vec<_> = runbook.modes.iter().map(|mode| mode.word()).collect();
        return Err(WrongMode {
            runbook: runbook.name.clone(),
            mode,
            its: its.join(", "),
        });
    }
    let groups: BTreeMap<String, Vec<String>> = runbook
        .groups
        .iter()
        .map(|(name, guests)| {
            let known = facts.groups.get(name);
            let all = || known.map(|group| group.guests.iter().cloned().collect());
            let guests = match guests.is_empty() {
                true => all().unwrap_or_default(),
                false => guests.clone(),
            };
            (name.clone(), guests)
        })
        .collect();
    let steps = runbook.steps.iter().map(|step| {
        let acts_on: Vec<String> = runbook
            .groups_of(step)
            .into_iter()
            .map(str::to_owned)
            .collect();
        let skipped = (!step.runs_in(mode)).then(|| why_skipped(step, mode));
        let (millis, basis) = match &skipped {
            Some(_) => (Some(0), "skipped".to_owned()),
            None => expected(step, mode, &acts_on, facts),
        };
        PlannedStep {
            expected: Expected {
                millis,
                basis,
                limit: step.limit(),
            },
            undo: step.action.undo(mode).map(str::to_owned),
            step: step.clone(),
            acts_on,
            skipped,
        }
    });
    Ok(Plan {
        runbook: runbook.name.clone(),
        mode,
        steps: steps.collect(),
        warnings: warnings(runbook, mode, facts),
        groups,
    })
}

fn why_skipped(step: &Step, mode: Mode) -> String {
    let kind = step.action.kind();
    match (&step.modes, kind.refused_in(mode)) {
        (_, Some(why)) => why.to_owned(),
        (Some(modes), None) => {
            let modes: Vec<_> = modes.iter().map(|mode| mode.word()).collect();
            format!("it is for {} mode", modes.join(" and "))
        }
        (None, None) if matches!(kind, Kind::Exec | Kind::Webhook) => {
            "what reaches outside of the sites runs in a test only if its modes say so".to_owned()
        }
        (None, None) => format!(
            "{} does not run in {mode} mode unless its modes say so",
            kind.word()
        ),
    }
}

/// Of the step's groups the longest, if all are known: they go side by side.
fn longest(acts_on: &[String], facts: &Facts, of: fn(&GroupFacts) -> Option<u64>) -> Option<u64> {
    let each = acts_on
        .iter()
        .map(|group| facts.groups.get(group).and_then(of));
    let each: Option<Vec<u64>> = each.collect();
    each?.into_iter().max()
}

fn expected(step: &Step, mode: Mode, acts_on: &[String], facts: &Facts) -> (Option<u64>, String) {
    let measured =
        |of: fn(&GroupFacts) -> Option<u64>, basis: &str| match longest(acts_on, facts, of) {
            Some(millis) => (Some(millis), basis.to_owned()),
            None => (None, "never measured".to_owned()),
        };
    match &step.action {
        Action::Delay { period } => (
            Some(period.duration().as_millis() as u64),
            "as it says".to_owned(),
        ),
        Action::Approve { by, approvals, .. } => (
            None,
            format!("a decision of {approvals} of {}", by.join(", ")),
        ),
        Action::FinalSync if mode == Mode::Planned => final_sync(acts_on, facts),
        Action::Promote { .. } => measured(
            |group| group.last_rto_ms,
            "as in the last failover or test, with the start",
        ),
        Action::StartGroup if longest(acts_on, facts, |group| group.last_rto_ms).is_some() => {
            (Some(0), "counted with promote".to_owned())
        }
        Action::WaitHealthy { .. } => {
            measured(|group| group.last_healthy_ms, "as after the last start")
        }
        Action::Exec { .. } | Action::Webhook { .. } => {
            (None, "up to the program that is called".to_owned())
        }
        _ => (None, "never measured".to_owned()),
    }
}

/// What is left to send at the link's rate, and then the pause.
fn final_sync(acts_on: &[String], facts: &Facts) -> (Option<u64>, String) {
    let sum = |of: fn(&GroupFacts) -> Option<u64>| -> Option<u64> {
        let each = acts_on
            .iter()
            .map(|group| facts.groups.get(group).and_then(of));
        each.sum()
    };
    let dirty = sum(|group| group.dirty_bytes_per_second);
    let (Some(dirty), Some(link)) = (dirty, facts.link_bytes_per_second) else {
        return match longest(acts_on, facts, |group| group.last_blackout_ms) {
            Some(millis) => (
                Some(millis),
                "the guests' standstill in the last move".to_owned(),
            ),
            None => (
                None,
                "never measured; neither are the guests' changes and the link's rate".to_owned(),
            ),
        };
    };
    if dirty >= link {
        let what = "the guests change faster than the link carries: they are throttled within the policy first";
        return (None, what.to_owned());
    }
    // What changed since the last cut is sent while they run; what changes
    // meanwhile is sent after that, and so on: a geometric series.
    let age = longest(acts_on, facts, |group| group.rpo_ms).unwrap_or(0);
    let backlog = u128::from(dirty) * u128::from(age);
    let send = u64::try_from(backlog / u128::from(link - dirty)).unwrap_or(u64::MAX);
    let pause = longest(acts_on, facts, |group| group.last_pause_ms).unwrap_or(0);
    (
        Some(send.saturating_add(pause)),
        format!("estimated: {dirty} B/s change, the link carries {link} B/s"),
    )
}

fn warnings(runbook: &Runbook, mode: Mode, facts: &Facts) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, guests) in &runbook.groups {
        let Some(group) = facts.groups.get(name) else {
            warnings.push(format!(
                "nothing is known of group '{name}' here: all of its times are unknown"
            ));
            continue;
        };
        for guest in guests.iter().filter(|guest| !group.guests.contains(*guest)) {
            warnings.push(format!(
                "guest '{guest}' of group '{name}' is not known here"
            ));
        }
        if group.newest_point == Some(0) && mode != Mode::Planned {
            warnings.push(format!(
                "group '{name}' has no sealed point: there is nothing to run it from"
            ));
        } else if let (Some(age), Mode::Unplanned) = (group.rpo_ms, mode) {
            warnings.push(format!(
                "what group '{name}' wrote in the last {} would be lost",
                Period::from_millis(age)
            ));
        }
    }
    warnings
}

impl Plan {
    /// The steps that are done, in their order: those that are not skipped.
    pub fn to_do(&self) -> impl Iterator<Item = &Step> {
        let done = self.steps.iter().filter(|step| step.skipped.is_none());
        done.map(|planned| &planned.step)
    }

    /// Whether a step of this kind is done.
    pub fn has(&self, kind: Kind) -> bool {
        self.to_do().any(|step| step.action.kind() == kind)
    }

    /// Milliseconds of all steps that run and are known, and how many are not.
    pub fn known_time(&self) -> (u64, usize) {
        let running = || self.steps.iter().filter(|step| step.skipped.is_none());
        let known = running().filter_map(|step| step.expected.millis);
        let unknown = running().filter(|step| step.expected.millis.is_none());
        (known.fold(0, u64::saturating_add), unknown.count())
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let groups: Vec<_> = self
            .groups
            .iter()
            .map(|(name, guests)| match guests.as_slice() {
                [] => name.clone(),
                guests => format!("{name} ({})", guests.join(", ")),
            })
            .collect();
        let _ = writeln!(
            text,
            "{} in {} mode: {}",
            self.runbook,
            self.mode,
            groups.join("; ")
        );
        let widest =
            |of: &dyn Fn(&PlannedStep) -> usize| self.steps.iter().map(of).max().unwrap_or(0);
        let name = widest(&|step| step.step.name.len());
        let kind = widest(&|step| step.step.action.kind().word().len());
        for (index, planned) in self.steps.iter().enumerate() {
            let (step, expected) = (&planned.step, &planned.expected);
            let _ = write!(
                text,
                "{:3}  {:name$}  {:kind$}  ",
                index + 1,
                step.name,
                step.action.kind().word()
            );
            if let Some(why) = &planned.skipped {
                let _ = writeln!(text, "skipped: {why}");
                continue;
            }
            let time = expected.millis.map_or("unknown".to_owned(), |millis| {
                Period::from_millis(millis).to_string()
            });
            let limit = expected
                .limit
                .map_or(String::new(), |limit| format!(", at most {limit}"));
            let _ = writeln!(
                text,
                "{time} ({}){limit}; on error {}",
                expected.basis,
                step.on_error.word()
            );
            if !step.guests.is_empty() {
                let _ = writeln!(text, "       guests {}", step.guests.join(", "));
            }
            if !step.description.is_empty() {
                let _ = writeln!(text, "       {}", step.description);
            }
            if !step.action.is_repeatable() {
                let _ = writeln!(
                    text,
                    "       after a restart a person is asked whether it ran"
                );
            }
            if let Some(undo) = &planned.undo {
                let _ = writeln!(text, "       a rollback would {undo}");
            }
        }
        let (known, unknown) = self.known_time();
        let _ = match unknown {
            0 => writeln!(text, "Expected in all: {}", Period::from_millis(known)),
            1 => writeln!(
                text,
                "Expected in all: {} and one step of unknown time",
                Period::from_millis(known)
            ),
            more => writeln!(
                text,
                "Expected in all: {} and {more} steps of unknown time",
                Period::from_millis(known)
            ),
        };
        for warning in &self.warnings {
            let _ = writeln!(text, "! {warning}");
        }
        text
    }
}
