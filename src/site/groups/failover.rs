//! A group is run here whose site is lost: all of its guests from one instant,
//! the terms of all taken at once, then started in their order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::waves::{Start, Started, Waves};
use super::{GroupPointView, GroupRecord, NamedMember};
use crate::activate::fence::{OVERRULES, Term};
use crate::replicate::message::ActivationTimes;
use crate::site::Site;
use crate::site::events::EventKind;
use crate::site::health::{self, CheckView};
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::records::Activation;
use crate::site::standby::Standby;
use crate::site::view::{ConsolePaths, FailoverReport};

/// What the failover of a group did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupFailover {
    /// The group.
    pub group: String,
    /// The cut that all of its guests run from.
    pub cut: u64,
    /// What was lost: from that cut until the declaration.
    pub rpo_ms: u64,
    /// From the declaration until the last guest ran, of those that do.
    pub rto_ms: f64,
    /// From the declaration until all health checks were looked at.
    #[serde(default)]
    pub checked_ms: f64,
    /// Each guest, in the order in which they were started.
    pub members: Vec<MemberFailover>,
}

/// What came of one guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberFailover {
    /// Its name.
    pub guest: String,
    /// Set when it runs here.
    pub report: Option<FailoverReport>,
    /// Its health checks.
    #[serde(default)]
    pub checks: Vec<CheckView>,
    /// Why it does not, and what to do.
    pub error: String,
}

/// How a group is failed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FailOverGroup {
    /// The number of a cut; the newest whole point when absent.
    pub cut: Option<u64>,
    /// Even if the source is alive.
    pub force: bool,
    /// Guests are started without waiting for those before to be healthy.
    pub no_checks: bool,
}

impl Site {
    /// Runs all guests of a peer's group here, from their newest whole point or
    /// that of a cut's number. Either the terms of all are taken, or of none;
    /// then they start in waves, each of which waits for the health checks of
    /// those that it starts after. One that does not start keeps no other from
    /// starting but those that start after it, if the policy says so
    /// (`on_error`). Done again, it goes on with those that do not run.
    ///
    /// # Errors
    /// When its source is alive and `force` is not set, there is no such whole
    /// point, or all of its guests run here already: nothing was done.
    pub async fn fail_over_group(
        self: &Arc<Self>,
        name: &str,
        how: FailOverGroup,
    ) -> Result<GroupFailover, OperateError> {
        let declared = Instant::now();
        let group = self.group(name)?;
        self.not_in_a_run(name)?;
        let (running, idle) = self.may_fail_over(&group, how.force)?;
        let point = self.point_for(&group, how.cut, &running).await?;
        let mut starting: Vec<(NamedMember, Start<Activation>)> = Vec::new();
        let mut chosen = Vec::new();
        for (member, standby) in idle {
            // One that joined the group after that cut is not part of it.
            if let Some(number) = point.points.get(&member.name) {
                standby.make_room().await;
                standby.prepare_failover(*number).await.map_err(failed)?;
                chosen.push((member, standby, *number));
            }
        }
        let began = Instant::now();
        let terms = self.terms_of_all(&chosen).await?;
        let took = began.elapsed();
        for (member, active) in running {
            // It runs, and is looked at for those that start after it.
            starting.push((member, Box::pin(async move { Ok(active) })));
        }
        for (member, standby, number) in chosen {
            let Some(term) = terms.get(&member.guest).copied() else {
                continue;
            };
            let (site, guest) = (self.clone(), member.name.clone());
            let start = Box::pin(async move {
                let ran = standby.run_under(number, term, declared, took).await;
                if ran.is_ok() {
                    let what = format!(
                        "'{guest}' was taken over from point {number}, under term {}",
                        term.number
                    );
                    site.note(EventKind::FailedOver, &guest, &what);
                }
                ran.map_err(|error| {
                    format!(
                        "{error}. Its term is taken; try again: farhaven failover {guest} --point {number} --force"
                    )
                })
            });
            starting.push((member, start));
        }
        let order = |(member, _): &(NamedMember, Start<Activation>)| member.wave;
        starting.sort_by_key(order);
        let waves = Waves {
            group: &group,
            mode: "failover",
            isolated: false,
            unchecked: how.no_checks,
            go_on: format!(
                "When it is, or without waiting (--no-checks): farhaven failover {name}"
            ),
        };
        let started = waves.start(self, starting).await;
        let members: Vec<_> = started
            .into_iter()
            .map(|started| outcome(started, &point))
            .collect();
        let ran = members.iter().filter_map(|m| m.report.as_ref());
        Ok(GroupFailover {
            group: name.to_owned(),
            cut: point.cut,
            rpo_ms: point.age_ms,
            rto_ms: ran.map(|r| r.rto_ms).fold(0.0, f64::max),
            checked_ms: declared.elapsed().as_secs_f64() * 1e3,
            members,
        })
    }

    /// Is the newest term of this guest this site's?
    pub(in crate::site) fn is_ours(&self, guest: GuestId) -> bool {
        let term = self.fence.current(guest);
        term.is_some_and(|term| term.owner == self.key())
    }

    /// Its guests that run here, and those that do not.
    #[allow(clippy::type_complexity, reason = "two lists of two things each")]
    fn may_fail_over(
        self: &Arc<Self>,
        group: &GroupRecord,
        force: bool,
    ) -> Result<
        (
            Vec<(NamedMember, Activation)>,
            Vec<(NamedMember, Arc<Standby>)>,
        ),
        OperateError,
    > {
        let name = &group.name;
        let (mut running, mut idle) = (Vec::new(), Vec::new());
        for member in self.members_here(group) {
            let standby = self.standby_here(&member.name)?;
            match standby.active() {
                Some(active) => running.push((member, active)),
                None => idle.push((member, standby)),
            }
        }
        if idle.is_empty() {
            return Err(OperateError::Conflict(format!(
                "all guests of group '{name}' that are known here run here already"
            )));
        }
        for (member, standby) in &idle {
            // One whose term is this site's runs nowhere else.
            let ours = self.is_ours(member.guest);
            if standby.remote().alive() && !force && !ours {
                return Err(OperateError::Conflict(format!(
                    "site '{0}' is alive, and so may be the guests of '{name}' there. To move them with nothing lost, run there: farhaven move {name}. To take them over all the same (they are stopped there first): --force",
                    standby.from()
                )));
            }
        }
        Ok((running, idle))
    }

    /// The point of a failover: the one that those which run here already run from.
    async fn point_for(
        &self,
        group: &GroupRecord,
        cut: Option<u64>,
        running: &[(NamedMember, Activation)],
    ) -> Result<GroupPointView, OperateError> {
        if running.is_empty() {
            return self.whole_point(group, cut).await;
        }
        let points = self.group_points(&group.name).await?.into_iter();
        let mut asked = points.filter(|point| cut.is_none_or(|cut| point.cut == cut));
        let fits = |point: &GroupPointView| {
            let of = |member: &NamedMember| point.points.get(&member.name).copied();
            running
                .iter()
                .all(|(member, active)| of(member) == Some(active.point))
        };
        asked.rfind(fits).ok_or_else(|| {
            let names: Vec<&str> = running.iter().map(|(m, _)| m.name.as_str()).collect();
            OperateError::Conflict(format!(
                "{} of group '{}' run here already, from no point of that cut of the whole group; run the others one by one: farhaven failover GUEST",
                names.join(", "),
                group.name
            ))
        })
    }
}

fn outcome(started: Started<Activation>, point: &GroupPointView) -> MemberFailover {
    let guest = started.member.name;
    let (report, error) = match started.ran {
        Ok(active) => {
            let note = match health::fault(&started.checks) {
                Some(fault) => format!("it runs, and is not healthy: {fault}"),
                None => String::new(),
            };
            let report = FailoverReport {
                guest: guest.clone(),
                point: active.point,
                rpo_ms: point.age_ms,
                rto_ms: active.times.total.as_secs_f64() * 1e3,
                term: active.term.number,
                console: ConsolePaths::beside(active.directory()),
                qmp: active.qmp.map(|qmp| qmp.display().to_string()),
                pid: active.pid,
                times: active.times,
                note,
            };
            (Some(report), String::new())
        }
        Err(error) => (None, error),
    };
    MemberFailover {
        guest,
        report,
        checks: started.checks,
        error,
    }
}

impl Standby {
    /// What can fail is done before a living source stops its guest.
    async fn prepare_failover(self: &Arc<Self>, point: u64) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        self.refuse_damaged(point)?;
        self.refuse_missing_networks().await?;
        self.end_evidence(&mut state).await;
        if self.remote().alive() && state.ready.is_none() {
            let site = self.site()?;
            let number = site.fence.current(self.guest).map_or(0, |t| t.number) + OVERRULES;
            self.fill(&mut state, point).await?;
            state.ready = Some(self.launch(point, number).await?);
        }
        Ok(())
    }

    /// Runs it under a term that is this site's already.
    pub(super) async fn run_under(
        self: &Arc<Self>,
        point: u64,
        term: Term,
        declared: Instant,
        took: Duration,
    ) -> Result<Activation, ActivateError> {
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        let site = self.site()?;
        if site.fence.current(self.guest) != Some(term) {
            return Err(ActivateError::Superseded(self.name()));
        }
        let times = ActivationTimes {
            term: took,
            ..ActivationTimes::default()
        };
        self.run(&mut state, point, term, declared, times).await?;
        let active = state.active.as_ref().map(|(active, _)| active.clone());
        active.ok_or_else(|| ActivateError::Step("not active".to_owned()))
    }
}
