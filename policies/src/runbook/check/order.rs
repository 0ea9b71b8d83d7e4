//! Orders that cannot be right. Each mode is walked by itself, group by group,
//! with what is so far true of the group; a step that contradicts it is wrong,
//! and so is what should have come and did not.

use std::collections::BTreeSet;

use super::super::{Kind, MOST_GROUPS, Mode, OnError, Runbook, Step};
use super::{Finding, Wrong};

/// What is wrong with the order of steps, in any mode that the runbook is for.
pub fn order(runbook: &Runbook) -> Vec<Wrong> {
    let mut found = Finding::default();
    if runbook.groups.len() > MOST_GROUPS {
        return found.0;
    }
    for mode in &runbook.modes {
        found.rollbacks(runbook, *mode);
        let running = || runbook.steps.iter().any(|step| step.runs_in(*mode));
        if !running() && !runbook.steps.is_empty() {
            let what = format!("has {mode}, but no step runs in it; take it out");
            found.add(None, "modes", what);
        }
        for (group, members) in &runbook.groups {
            Walk::new(runbook, *mode, group, members).go(&mut found);
        }
    }
    found.0
}

impl Finding {
    /// `on-error = "rollback"` where there is no way back any more.
    fn rollbacks(&mut self, runbook: &Runbook, mode: Mode) {
        let mut committed = None;
        for (index, step) in runbook.steps.iter().enumerate() {
            if !step.runs_in(mode) {
                continue;
            }
            if step.action.kind() == Kind::Commit {
                committed.get_or_insert(&step.name);
            } else if let Some(commit) = committed
                && step.on_error == OnError::Rollback
            {
                let what = format!(
                    "is rollback, but '{commit}' comes before it, and there is no way back from a commit; use stop or continue"
                );
                self.add(Some(index), "on-error", what);
            }
        }
    }
}

/// One group in one mode.
struct Walk<'r> {
    runbook: &'r Runbook,
    mode: Mode,
    group: &'r str,
    /// Its guests, if the runbook names them.
    members: BTreeSet<&'r str>,
    /// The first step of a kind so far: its index.
    done: Vec<(Kind, usize)>,
    /// Guests that were started by name, and whether all were.
    started: BTreeSet<&'r str>,
    all_started: bool,
}

impl<'r> Walk<'r> {
    fn new(runbook: &'r Runbook, mode: Mode, group: &'r str, members: &'r [String]) -> Walk<'r> {
        Walk {
            runbook,
            mode,
            group,
            members: members.iter().map(String::as_str).collect(),
            done: Vec::new(),
            started: BTreeSet::new(),
            all_started: false,
        }
    }

    /// The steps that run in this mode and touch this group.
    fn steps(&self) -> impl Iterator<Item = (usize, &'r Step)> {
        let indexed = self.runbook.steps.iter().enumerate();
        indexed.filter(|(_, step)| {
            step.runs_in(self.mode) && Runbook::acts_on(step, self.group) && self.touches(step)
        })
    }

    /// A step that names guests touches only the groups that they are in.
    fn touches(&self, step: &Step) -> bool {
        let known = || {
            step.guests
                .iter()
                .any(|guest| self.members.contains(guest.as_str()))
        };
        step.guests.is_empty() || self.members.is_empty() || known()
    }

    fn has(&self, kind: Kind) -> bool {
        self.done.iter().any(|(done, _)| *done == kind)
    }

    /// A later step of this kind, if there is one.
    fn later(&self, after: usize, kind: Kind) -> Option<&'r Step> {
        let mut steps = self.steps().skip_while(|(index, _)| *index <= after);
        steps
            .find(|(_, step)| step.action.kind() == kind)
            .map(|(_, step)| step)
    }

    fn go(mut self, found: &mut Finding) {
        let steps: Vec<_> = self.steps().collect();
        for (index, step) in steps {
            let kind = step.action.kind();
            if let Some((key, what)) = self.contradiction(index, step) {
                found.add(Some(index), key, what);
            }
            if kind == Kind::StartGroup {
                self.all_started |= step.guests.is_empty();
                self.started.extend(step.guests.iter().map(String::as_str));
            }
            self.done.push((kind, index));
        }
        self.left_over(found);
    }

    /// Which key of a step contradicts what came before, and why.
    fn contradiction(&self, index: usize, step: &Step) -> Option<(&'static str, String)> {
        let (kind, mode, group) = (step.action.kind(), self.mode, self.group);
        let here = |what: String| {
            Some((
                "do",
                format!("is {} {what} ({mode} mode, group {group})", kind.word()),
            ))
        };
        // What a group goes through once.
        let once = matches!(
            kind,
            Kind::FinalSync | Kind::Fence | Kind::Promote | Kind::Commit
        ) || matches!(kind, Kind::Reprotect | Kind::Rollback | Kind::Cleanup);
        if let Some((_, first)) = self.done.iter().find(|(done, _)| once && *done == kind) {
            let first = self.runbook.steps.get(*first).map_or("", |step| &step.name);
            return here(format!("a second time, after '{first}'; take one out"));
        }
        if self.has(Kind::Rollback) && !matches!(kind, Kind::Check | Kind::WaitHealthy) {
            return here("after a rollback, when the group is at its source again; take it out, or the rollback".to_owned());
        }
        if self.has(Kind::Cleanup) && kind != Kind::Check {
            return here("after cleanup, which removed everything; put it before".to_owned());
        }
        let before = |kind: Kind| self.has(kind);
        match kind {
            Kind::Quiesce if before(Kind::FinalSync) => {
                here("after final-sync, when the guests stand still already; put it before".to_owned())
            }
            Kind::Quiesce if before(Kind::ShutdownSource) => {
                here("after shutdown-source, when nobody is there to freeze; take it out".to_owned())
            }
            Kind::ShutdownSource if mode == Mode::Planned && before(Kind::FinalSync) => here(
                "after final-sync: what the guests write while they shut down would be lost; put it before".to_owned(),
            ),
            Kind::ShutdownSource | Kind::FinalSync if before(Kind::Promote) => {
                here("after promote, when the group is taken over already; put it before".to_owned())
            }
            Kind::FinalSync if mode == Mode::Unplanned && before(Kind::Fence) => {
                here("after fence, when the source may not send any more; put it before".to_owned())
            }
            Kind::Fence if mode == Mode::Planned && !before(Kind::FinalSync) => here(
                "before final-sync: the source would stop with its last changes unsent; put it after".to_owned(),
            ),
            Kind::Fence if before(Kind::Promote) => None, // Told of the promote.
            Kind::Promote if mode == Mode::Unplanned && !before(Kind::Fence) => here(
                "without fence before it: the source could come back and run its guests, too; put a fence before it".to_owned(),
            ),
            Kind::Promote if mode == Mode::Planned && !before(Kind::FinalSync) => here(
                "without final-sync before it: what was written since the last point would be lost; put a final-sync before it".to_owned(),
            ),
            Kind::Remap | Kind::StartGroup if !before(Kind::Promote) => {
                here("without promote before it, so there is nothing to act on; put it after promote".to_owned())
            }
            Kind::Remap if before(Kind::StartGroup) => {
                here("after start-group: the guests run on their networks already; put it before".to_owned())
            }
            Kind::WaitHealthy if !before(Kind::Rollback) => self.waits_in_vain(step),
            Kind::Commit if !before(Kind::StartGroup) => here(
                "without start-group before it: there would be no way back, and nothing runs; put it last".to_owned(),
            ),
            Kind::Commit => {
                let later = self.later(index, Kind::WaitHealthy)?;
                here(format!("before '{}': whether the guests are healthy would be known too late to go back; put it after", later.name))
            }
            Kind::Rollback if before(Kind::Commit) => {
                here("after commit, from which there is no way back; take one of them out".to_owned())
            }
            Kind::Rollback | Kind::Cleanup if !before(Kind::Promote) => {
                here("without promote before it, so there is nothing to take back; put it after".to_owned())
            }
            Kind::Reprotect if !before(Kind::Commit) => here(
                "without commit before it: it overwrites what a rollback would return to; put it after a commit".to_owned(),
            ),
            _ => None,
        }
    }

    fn waits_in_vain(&self, step: &Step) -> Option<(&'static str, String)> {
        let (mode, group) = (self.mode, self.group);
        if !self.has(Kind::StartGroup) {
            let what = format!(
                "is wait-healthy without start-group before it, so nobody can be healthy; put it after ({mode} mode, group {group})"
            );
            return Some(("do", what));
        }
        let members = &self.members;
        let mut waited = step
            .guests
            .iter()
            .filter(|guest| members.is_empty() || members.contains(guest.as_str()));
        let idle =
            waited.find(|guest| !self.all_started && !self.started.contains(guest.as_str()))?;
        let what = format!(
            "names {idle:?}, which no start-group has started by then ({mode} mode); start it before"
        );
        Some(("guests", what))
    }

    /// What should have come.
    fn left_over(&self, found: &mut Finding) {
        let (mode, group) = (self.mode, self.group);
        let first = |kind: Kind| {
            self.done
                .iter()
                .find(|(done, _)| *done == kind)
                .map(|(_, index)| *index)
        };
        if let Some(promote) = first(Kind::Promote) {
            if !self.has(Kind::StartGroup) {
                let what = format!(
                    "is promote, but no start-group follows: nothing would run ({mode} mode, group {group})"
                );
                found.add(Some(promote), "do", what);
            }
            if mode == Mode::Test && !self.has(Kind::Cleanup) {
                let what = format!(
                    "is promote in a test, but no cleanup follows: it would stay for ever; end with one (group {group})"
                );
                found.add(Some(promote), "do", what);
            }
        } else {
            for (kind, why) in [
                (
                    Kind::FinalSync,
                    "the source would stand still, and nothing run here",
                ),
                (
                    Kind::Fence,
                    "the source may not run, and nothing would run here",
                ),
            ] {
                if let Some(index) = first(kind) {
                    let what = format!(
                        "is {}, but no promote follows: {why} ({mode} mode, group {group})",
                        kind.word()
                    );
                    found.add(Some(index), "do", what);
                }
            }
        }
        // Guests of a group that is started in tiers, all of whom are known.
        let forgotten = self
            .members
            .iter()
            .find(|guest| !self.started.contains(*guest));
        if let (false, Some(start), Some(guest)) =
            (self.all_started, first(Kind::StartGroup), forgotten)
        {
            let what = format!(
                "leaves out {guest:?} of group {group}, and no other start-group starts it ({mode} mode)"
            );
            found.add(Some(start), "guests", what);
        }
    }
}
