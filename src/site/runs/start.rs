//! A run is started: read, checked, planned, kept, conducted.

use std::path::Path;
use std::sync::Arc;

use farhaven_policies::runbook::plan::{Facts, GroupFacts, Plan, plan};
use farhaven_policies::runbook::{Action, Kind, Mode, PointChoice, Runbook, read};

use super::facts::{FactsFile, now_ms};
use super::points::{by_group, whole_point};
use super::targets::{Target, of_group};
use super::view::{Hands, RunView, run_view};
use super::{MOST_OPEN, quiesce, readiness, shutdown};
use crate::runbook::perform::Failure;
use crate::site::Site;
use crate::site::operate::{OperateError, failed};

/// What a run is started with.
#[derive(Debug, Clone)]
pub struct StartRun {
    /// The runbook's text.
    pub text: String,
    /// What it is run for.
    pub mode: Mode,
    /// The point of every promote that names none.
    pub point: Option<u64>,
    /// Who starts it.
    pub by: String,
    /// Unplanned although the source answers: its guests are stopped.
    pub force: bool,
}

impl Site {
    /// Starts a run of a runbook; it goes on by itself from here.
    ///
    /// # Errors
    /// When the runbook has mistakes or is not for that mode, its guests are not
    /// here or in another run, or it cannot be written down.
    pub async fn start_run(self: &Arc<Self>, start: StartRun) -> Result<RunView, OperateError> {
        let runbook = read::text(Path::new("runbook"), &start.text, None)
            .map_err(|error| OperateError::Conflict(error.to_string()))?;
        self.start_runbook(&runbook, start).await
    }

    /// What a run would do, with what was measured here.
    ///
    /// # Errors
    /// As [`Site::start_run`].
    pub fn plan_run(self: &Arc<Self>, text: &str, mode: Mode) -> Result<Plan, OperateError> {
        let conflict = |error: &dyn ToString| OperateError::Conflict(error.to_string());
        let runbook =
            read::text(Path::new("runbook"), text, None).map_err(|error| conflict(&error))?;
        self.targets_of(&runbook)?;
        plan(&runbook, mode, &self.measured(&runbook)).map_err(|error| conflict(&error))
    }

    async fn start_runbook(
        self: &Arc<Self>,
        runbook: &Runbook,
        start: StartRun,
    ) -> Result<RunView, OperateError> {
        let mut planned = plan(runbook, start.mode, &self.measured(runbook))
            .map_err(|error| OperateError::Conflict(error.to_string()))?;
        let targets = self.targets_of(runbook)?;
        // Who is added to a group later is not in a run that began without them.
        for (group, guests) in &mut planned.groups {
            let of_group = targets.iter().filter(|t| t.group == *group);
            *guests = of_group.map(|t| t.name.clone()).collect();
        }
        if start.point.is_some() && runbook.groups.len() > 1 {
            return Err(OperateError::Conflict(
                "--point is of one group, and the runbook has several; name the point in its promote steps"
                    .to_owned(),
            ));
        }
        if let Some(point) = start.point {
            choose(&mut planned, point)?;
        }
        self.may_begin(&targets, &planned, start.force)?;
        shutdown::may_begin(&targets, &planned).await?;
        if start.mode != Mode::Planned && planned.has(Kind::Promote) {
            for (group, guests) in by_group(&targets) {
                if guests.len() > 1 {
                    let point = whole_point(self, group, &guests, start.point).await;
                    point.map_err(OperateError::Conflict)?;
                }
            }
        }
        let guests = targets.iter().map(|t| t.name.clone()).collect();
        let id = run_id(start.mode);
        let (site, text) = (self.clone(), start.text);
        let kept_id = id.clone();
        let kept = crate::work::spawn_blocking(move || {
            let directory = site.runs.directory();
            crate::site::files::replace(
                &directory.join(format!("{kept_id}.toml")),
                text.as_bytes(),
            )?;
            FactsFile::open(directory, &kept_id)
        });
        let facts = kept.await.map_err(failed)?.map_err(failed)?;
        for target in &targets {
            let (group, rpo) = (target.group.clone(), readiness::rpo_of(target));
            let noted = facts.note(&target.name, |guest| {
                guest.group = group;
                guest.rpo_target_ms = rpo.map(|rpo| rpo.as_millis() as u64);
            });
            noted.map_err(failed)?;
        }
        let forced = start.force;
        facts
            .change(|facts| facts.forced = forced)
            .map_err(failed)?;
        let baton = self.conduct_new(&id, planned, &start.by, facts, guests)?;
        tracing::warn!(run = id, mode = %start.mode, by = start.by, "a run was started");
        Ok(run_view(&baton.run(), &Hands::Conducted))
    }

    /// The guests of a runbook, each once.
    fn targets_of(self: &Arc<Self>, runbook: &Runbook) -> Result<Vec<Target>, OperateError> {
        let mut targets: Vec<Target> = Vec::new();
        for (group, guests) in &runbook.groups {
            let found = of_group(self, group, guests)
                .map_err(|Failure { why, .. }| OperateError::Conflict(why))?;
            for target in found {
                if let Some(other) = targets.iter().find(|t| t.name == target.name) {
                    return Err(OperateError::Conflict(format!(
                        "guest '{}' is in groups '{}' and '{group}' of the runbook; name it in one",
                        target.name, other.group
                    )));
                }
                targets.push(target);
            }
        }
        Ok(targets)
    }

    fn may_begin(&self, targets: &[Target], plan: &Plan, force: bool) -> Result<(), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let mode = plan.mode;
        // Known before anything is begun, not in the midst of it.
        for step in plan.to_do() {
            let Some(what) = needs_agent(&step.action) else {
                continue;
            };
            let lacks = |target: &&Target| {
                let of_step = step.group.as_ref().is_none_or(|of| *of == target.group);
                of_step && !quiesce::has_agent(target)
            };
            if let Some(target) = targets.iter().find(lacks) {
                return conflict(format!(
                    "step '{}' {what}, and '{}' has no channel to a guest agent (see farhaven guest check {1} at its source); nothing was begun. Give it one, or take the step out of the runbook, or out of this mode",
                    step.name, target.name
                ));
            }
        }
        if self.runs.lock().len() >= MOST_OPEN {
            return conflict(format!(
                "{MOST_OPEN} runs are open already; end some of them: farhaven run list"
            ));
        }
        for target in targets {
            self.not_in_a_run(&target.name)?;
            if let Some(active) = target.standby.active() {
                return conflict(format!(
                    "'{}' was taken over before and runs here (term {})",
                    target.name, active.term.number
                ));
            }
            if mode == Mode::Unplanned && target.standby.remote().alive() && !force {
                return conflict(format!(
                    "site '{0}' is alive, and so may be '{1}' there. To move it with nothing lost, run the runbook in planned mode. To take it over all the same (it is stopped there first): --force",
                    target.standby.from(),
                    target.name
                ));
            }
        }
        Ok(())
    }

    /// What is known of a runbook's groups, for its plan.
    fn measured(self: &Arc<Self>, runbook: &Runbook) -> Facts {
        let mut facts = Facts::default();
        let last = self.last_measured();
        for (name, guests) in &runbook.groups {
            let Ok(targets) = of_group(self, name, guests) else {
                continue;
            };
            let mut group = GroupFacts::default();
            for target in targets {
                let view = target.standby.view();
                group.guests.insert(target.name.clone());
                let known = group.newest_point.unwrap_or(view.newest_point);
                group.newest_point = Some(known.min(view.newest_point));
                group.rpo_ms = group.rpo_ms.max(view.rpo_ms);
                let measured = last.get(&target.name).cloned().unwrap_or_default();
                group.last_rto_ms = group.last_rto_ms.max(measured.0);
                group.last_healthy_ms = group.last_healthy_ms.max(measured.1);
            }
            facts.groups.insert(name.clone(), group);
        }
        facts
    }

    /// Of each guest's last run: how long it took to start, and then to be healthy.
    fn last_measured(&self) -> std::collections::BTreeMap<String, (Option<u64>, Option<u64>)> {
        /// Older runs tell less of what is to be expected.
        const LOOKED_AT: usize = 20;
        let mut last = std::collections::BTreeMap::new();
        for id in self.runs.ids().iter().rev().take(LOOKED_AT) {
            let Ok(facts) = FactsFile::open(self.runs.directory(), id) else {
                continue;
            };
            for (guest, known) in facts.now().guests {
                let Some(start) = known.start_ms else {
                    continue;
                };
                let healthy = known.healthy_at.zip(known.started_at);
                let healthy = healthy.map(|(healthy, started)| healthy.saturating_sub(started));
                last.entry(guest)
                    .or_insert((Some(start.ceil() as u64), healthy));
            }
        }
        last
    }
}

/// What of a step only a guest's agent can do.
fn needs_agent(action: &Action) -> Option<&'static str> {
    match action {
        Action::Quiesce => Some("has guest agents freeze filesystems"),
        Action::WaitHealthy {
            agent: Some(true), ..
        } => Some("asks guest agents whether the guests are healthy"),
        _ => None,
    }
}

/// Every promote that takes the newest point takes this one.
fn choose(plan: &mut Plan, point: u64) -> Result<(), OperateError> {
    let mut chosen = 0;
    for planned in plan.steps.iter_mut().filter(|p| p.skipped.is_none()) {
        if let Action::Promote { point: of_step } = &mut planned.step.action
            && *of_step == PointChoice::Newest
        {
            *of_step = PointChoice::Number(point);
            chosen += 1;
        }
    }
    match (chosen, plan.mode) {
        (_, Mode::Planned) => Err(OperateError::Conflict(
            "a planned run goes on from its very last point; --point is for failovers and tests"
                .to_owned(),
        )),
        (0, _) => Err(OperateError::Conflict(
            "no step of the runbook promotes the newest point, so --point changes nothing"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// Ids sort by time, to the millisecond, and are told apart by their last digits.
pub(super) fn run_id(mode: Mode) -> String {
    let at = jiff::Timestamp::from_millisecond(now_ms() as i64).unwrap_or_default();
    let at = at.strftime("%Y%m%d-%H%M%S%3f");
    let more: u16 = rand::random();
    format!("{at}-{mode}-{more:04x}")
}
