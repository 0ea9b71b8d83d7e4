//! What cannot be right in a runbook whose values are each of the right type:
//! names that nothing has, values that cannot be kept ([`values`]), and orders
//! that lose data, run a guest twice or wait for ever ([`order`]).

use std::collections::{BTreeMap, BTreeSet};

use super::{Kind, MOST_GROUPS, MOST_STEPS, Mode, OnError, Runbook, Step};
use crate::files::PolicyFiles;
use crate::mistake::nearest_of;
use crate::units::Period;

mod actions;
mod order;

pub use self::order::order;

/// Longest name of a runbook, a step, a group or a guest.
const LONGEST_NAME: usize = 63;

/// Most mistakes that are told; who has mended those sees the next.
const MOST_WRONG: usize = 500;

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// In which step, counted from 0; None: in the runbook itself.
    pub step: Option<usize>,
    /// In which of its keys.
    pub key: String,
    /// What, and what to do, to be read after the key.
    pub what: String,
}

/// Groups and their guests as policy files name them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known(pub BTreeMap<String, BTreeSet<String>>);

impl Known {
    /// Those of policy files.
    pub fn of(files: &PolicyFiles) -> Known {
        let groups = files.groups.iter();
        Known(
            groups
                .map(|(name, group)| (name.clone(), group.guests.keys().cloned().collect()))
                .collect(),
        )
    }
}

/// All that is wrong with a runbook; nothing when it can be planned and run.
pub fn check(runbook: &Runbook, known: Option<&Known>) -> Vec<Wrong> {
    let mut wrong = values(runbook, known);
    wrong.extend(order(runbook));
    wrong
}

/// Whether this can be the name of a runbook or a step.
pub(super) fn is_name(name: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-')
}

/// Whether this can be the name of a group or a guest.
fn is_plain(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && !name.contains(char::is_control)
}

#[derive(Default)]
struct Finding(Vec<Wrong>);

impl Finding {
    fn add(&mut self, step: Option<usize>, key: &str, what: impl Into<String>) {
        let wrong = Wrong {
            step,
            key: key.to_owned(),
            what: what.into(),
        };
        if self.0.len() < MOST_WRONG && !self.0.contains(&wrong) {
            self.0.push(wrong);
        }
    }

    fn require(&mut self, holds: bool, step: usize, key: &str, what: impl FnOnce() -> String) {
        if !holds {
            self.add(Some(step), key, what());
        }
    }

    fn name(&mut self, step: Option<usize>, key: &str, name: &str, like: &str) {
        if name.is_empty() {
            self.add(
                step,
                key,
                format!("is missing; give one, like name = \"{like}\""),
            );
        } else if !is_name(name) {
            self.add(
                step,
                key,
                format!(
                    "is {name:?}; up to 63 small letters, digits, - and _ can be used, no - first"
                ),
            );
        }
    }
}

/// What is most like a word that nobody knows.
fn hint<'a>(known: impl Iterator<Item = &'a str>, word: &str) -> String {
    let known: Vec<&str> = known.collect();
    match nearest_of(known.iter().copied(), word) {
        Some(near) => format!("did you mean '{near}'?"),
        None if known.is_empty() => "there is none yet".to_owned(),
        None => {
            let some: Vec<_> = known.into_iter().take(5).collect();
            format!("known are {}", some.join(", "))
        }
    }
}

/// What is wrong with single values and names.
pub fn values(runbook: &Runbook, known: Option<&Known>) -> Vec<Wrong> {
    let mut found = Finding::default();
    found.name(None, "name", &runbook.name, "bank-failover");
    if runbook.modes.is_empty() {
        found.add(
            None,
            "modes",
            "is empty; name one of test, planned, unplanned, or take it out",
        );
    }
    if !(1..=MOST_STEPS).contains(&runbook.steps.len()) {
        let what = format!(
            "has {} steps; 1 to {MOST_STEPS} can be run",
            runbook.steps.len()
        );
        found.add(None, "steps", what);
    }
    found.groups(runbook, known);
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, step) in runbook.steps.iter().enumerate().take(MOST_STEPS) {
        found.name(Some(index), "name", &step.name, step.action.kind().word());
        if !step.name.is_empty()
            && let Some(first) = names.insert(&step.name, index)
        {
            let what = format!(
                "is the name of step {} as well; records and approvals go by names, choose another",
                first + 1
            );
            found.add(Some(index), "name", what);
        }
        found.scope(runbook, index, step);
        found.modes(runbook, index, step);
        found.failure(runbook, index, step);
        found.action(runbook, index, step);
    }
    found.0
}

impl Finding {
    fn groups(&mut self, runbook: &Runbook, known: Option<&Known>) {
        let acted = runbook
            .steps
            .iter()
            .any(|step| step.action.kind().takes_group());
        if runbook.groups.is_empty() && acted {
            self.add(
                None,
                "groups",
                "is missing; name what is moved and its guests, like [groups] bank = [\"db1\", \"app1\"]",
            );
        }
        if runbook.groups.len() > MOST_GROUPS {
            let count = runbook.groups.len();
            let what = format!("has {count} groups; at most {MOST_GROUPS} can go in one run");
            return self.add(None, "groups", what);
        }
        let mut homes: BTreeMap<&str, &str> = BTreeMap::new();
        for (group, guests) in &runbook.groups {
            let key = format!("groups.{group}");
            for name in guests.iter().chain([group]).filter(|name| !is_plain(name)) {
                let what = format!(
                    "has the name {name:?}; 1 to {LONGEST_NAME} letters without control characters can be one"
                );
                self.add(None, &key, what);
            }
            for guest in guests {
                match homes.insert(guest, group) {
                    Some(other) if other == group => {
                        self.add(None, &key, format!("names {guest:?} twice"));
                    }
                    Some(other) => {
                        let what = format!(
                            "has {guest:?}, and so has group '{other}'; a guest has one group"
                        );
                        self.add(None, &key, what);
                    }
                    None => {}
                }
            }
            let Some(Known(known)) = known else { continue };
            let Some(members) = known.get(group) else {
                let hint = hint(known.keys().map(String::as_str), group);
                self.add(
                    None,
                    &key,
                    format!("is no group of the policy files; {hint}"),
                );
                continue;
            };
            for guest in guests.iter().filter(|guest| !members.contains(*guest)) {
                let hint = hint(members.iter().map(String::as_str), guest);
                let what = format!("names {guest:?}, which is not in that group; {hint}");
                self.add(None, &key, what);
            }
            let left: Vec<_> = members
                .iter()
                .filter(|guest| !guests.contains(guest))
                .collect();
            if !guests.is_empty()
                && let Some(first) = left.first()
            {
                let what = format!(
                    "lacks {first:?}, which is in that group now, {} in all; a group goes as a whole, add them or write [] for all",
                    left.len()
                );
                self.add(None, &key, what);
            }
        }
    }

    fn scope(&mut self, runbook: &Runbook, index: usize, step: &Step) {
        let kind = step.action.kind();
        if let Some(group) = &step.group {
            self.require(kind.takes_group(), index, "group", || {
                format!("has no meaning for {}; take it out", kind.word())
            });
            self.require(runbook.groups.contains_key(group), index, "group", || {
                let hint = hint(runbook.groups.keys().map(String::as_str), group);
                format!("names {group:?}, which is not in [groups]; {hint}")
            });
        }
        if step.guests.is_empty() {
            return;
        }
        self.require(kind.takes_guests(), index, "guests", || {
            format!(
                "has no meaning for {}: a group goes as a whole; take it out",
                kind.word()
            )
        });
        let groups = runbook.groups_of(step);
        let members: Vec<&Vec<String>> = groups
            .iter()
            .filter_map(|group| runbook.groups.get(*group))
            .collect();
        // A group that lists nobody has whoever the policy says.
        if members.is_empty() || members.iter().any(|members| members.is_empty()) {
            return;
        }
        let all: BTreeSet<&str> = members
            .iter()
            .flat_map(|members| members.iter().map(String::as_str))
            .collect();
        for guest in &step.guests {
            self.require(all.contains(guest.as_str()), index, "guests", || {
                let hint = hint(all.iter().copied(), guest);
                let groups = groups.join(", ");
                format!("names {guest:?}, which is not in {groups}; {hint}")
            });
        }
    }

    fn modes(&mut self, runbook: &Runbook, index: usize, step: &Step) {
        let kind = step.action.kind();
        for mode in step.modes.iter().flatten() {
            if let Some(why) = kind.refused_in(*mode) {
                self.add(
                    Some(index),
                    "modes",
                    format!("has {mode}, where {} has no place: {why}", kind.word()),
                );
            }
        }
        let given = step.modes.as_ref();
        if given.is_some_and(BTreeSet::is_empty) {
            self.add(
                Some(index),
                "modes",
                "is empty: it would never run; take it out or name one",
            );
        } else if !runbook.modes.iter().any(|mode| step.runs_in(*mode)) {
            let its: Vec<_> = Mode::ALL
                .into_iter()
                .filter(|mode| step.runs_in(*mode))
                .collect();
            let what = format!(
                "never lets it run: {}, and the runbook is for {}",
                match given {
                    Some(_) => format!("it is for {}", list(&its)),
                    None => format!(
                        "{} runs in {} unless it says otherwise",
                        kind.word(),
                        list(&its)
                    ),
                },
                list(&runbook.modes.iter().copied().collect::<Vec<_>>())
            );
            self.add(Some(index), "modes", what);
        }
    }

    /// Timeouts, and what follows a failure.
    fn failure(&mut self, runbook: &Runbook, index: usize, step: &Step) {
        let kind = step.action.kind();
        match (kind, step.timeout) {
            (Kind::Approve, None) => self.add(
                Some(index),
                "timeout",
                "is missing; a decision that nobody takes would hold the run for ever, try 15m",
            ),
            (Kind::Delay, Some(_)) => {
                self.add(
                    Some(index),
                    "timeout",
                    "has no meaning for delay: it ends by itself; take it out",
                );
            }
            (_, Some(Period::ZERO)) => {
                self.add(
                    Some(index),
                    "timeout",
                    "is 0s; nothing ends in no time, try 1m",
                );
            }
            _ => {}
        }
        let why = match (kind, step.on_error) {
            (Kind::Approve, OnError::Continue) => "a refusal would be passed over",
            (Kind::Fence, OnError::Continue) => "a guest could run at both sites",
            (Kind::Promote, OnError::Continue) => "there would be nothing to run",
            (Kind::FinalSync, OnError::Continue) if runs(runbook, step, Mode::Planned) => {
                "what the guests wrote last would be lost without a word"
            }
            (Kind::ShutdownSource, OnError::Continue) if runs(runbook, step, Mode::Planned) => {
                "the last changes would be taken from guests that may still write"
            }
            (Kind::Rollback, OnError::Rollback) => "it is the rollback",
            _ => "",
        };
        if !why.is_empty() {
            let what = format!("is {}, so {why}; use stop", step.on_error.word());
            self.add(Some(index), "on-error", what);
        }
        if matches!(kind, Kind::FinalSync | Kind::ShutdownSource)
            && runs(runbook, step, Mode::Unplanned)
            && step.on_error != OnError::Continue
        {
            let what = format!(
                "must be continue in unplanned mode, where the source is most often lost; or leave unplanned out of its modes ({})",
                kind.word()
            );
            self.add(Some(index), "on-error", what);
        }
    }
}

fn list(modes: &[Mode]) -> String {
    let words: Vec<_> = modes.iter().map(|mode| mode.word()).collect();
    match words.as_slice() {
        [] => "no mode".to_owned(),
        _ => words.join(" and "),
    }
}

/// Whether a step runs in a mode that the runbook is for.
fn runs(runbook: &Runbook, step: &Step, mode: Mode) -> bool {
    runbook.modes.contains(&mode) && step.runs_in(mode)
}
