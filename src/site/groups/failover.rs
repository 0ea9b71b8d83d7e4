//! A group is run here whose site is lost: all of its guests from one instant,
//! the terms of all taken at once, then started in their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::NamedMember;
use crate::activate::fence::{OVERRULES, Term};
use crate::replicate::message::ActivationTimes;
use crate::site::Site;
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::records::Activation;
use crate::site::standby::{Standby, step};
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
    /// Why it does not, and what to do.
    pub error: String,
}

impl Site {
    /// Runs all guests of a peer's group here, from their newest whole point or
    /// that of a cut's number. Either the terms of all are taken, or of none;
    /// one that does not start then keeps no other from starting.
    ///
    /// # Errors
    /// When its source is alive and `force` is not set, there is no such whole
    /// point, or one of its guests runs here already: nothing was done.
    pub async fn fail_over_group(
        self: &Arc<Self>,
        name: &str,
        cut: Option<u64>,
        force: bool,
    ) -> Result<GroupFailover, OperateError> {
        let declared = Instant::now();
        let group = self.group(name)?;
        self.not_in_a_run(name)?;
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let mut members = Vec::new();
        for member in self.members_here(&group) {
            let standby = self.standby_here(&member.name)?;
            if let Some(active) = standby.active() {
                return conflict(format!(
                    "'{}' of group '{name}' runs here already (term {}); run the others one by one: farhaven failover GUEST",
                    member.name, active.term.number
                ));
            }
            if standby.remote().alive() && !force {
                return conflict(format!(
                    "site '{0}' is alive, and so may be the guests of '{name}' there. To move them with nothing lost, run there: farhaven move GUEST. To take them over all the same (they are stopped there first): --force",
                    standby.from()
                ));
            }
            members.push((member, standby));
        }
        let points = self.group_points(name).await?;
        let point = match cut {
            Some(cut) => points.into_iter().find(|point| point.cut == cut),
            None => points.into_iter().next_back(),
        };
        let Some(point) = point else {
            return conflict(format!(
                "there is no {} of group '{name}' here, with all of its guests; see farhaven points {name}. Its guests can be run one by one, each from its own newest point: farhaven failover GUEST",
                cut.map_or_else(
                    || "whole point".to_owned(),
                    |cut| format!("whole point {cut}")
                )
            ));
        };
        let mut chosen = Vec::new();
        for (member, standby) in members {
            // One that joined the group after that cut is not part of it.
            if let Some(number) = point.points.get(&member.name) {
                standby.make_room().await;
                standby.prepare_failover(*number).await.map_err(failed)?;
                chosen.push((member, standby, *number));
            }
        }
        let guests: Vec<GuestId> = chosen.iter().map(|(m, _, _)| m.guest).collect();
        let began = Instant::now();
        let site = self.clone();
        let terms = step(move || site.fence.overrule_all(&guests, site.key()));
        let terms = terms.await.map_err(failed)?.map_err(failed)?;
        let took = began.elapsed();
        if let Some((_, standby, _)) = chosen.first() {
            let announced = self.announce_terms(standby.remote(), terms.clone()).await;
            announced.map_err(|why| failed(ActivateError::SourceRuns(name.to_owned(), why)))?;
        }
        let terms: BTreeMap<GuestId, Term> = terms.into_iter().map(|t| (t.group, t)).collect();
        let mut done = Vec::new();
        let last = chosen.iter().map(|(m, _, _)| m.wave).max().unwrap_or(0);
        for wave in 0..=last {
            let mut starting = Vec::new();
            for (member, standby, number) in chosen.iter().filter(|(m, _, _)| m.wave == wave) {
                let Some(term) = terms.get(&member.guest).copied() else {
                    continue;
                };
                let (standby, number) = (standby.clone(), *number);
                let run = async move { standby.run_under(number, term, declared, took).await };
                starting.push((member.clone(), number, tokio::spawn(run)));
            }
            for (member, number, run) in starting {
                let ran = run.await.map_err(|e| ActivateError::Step(e.to_string()));
                done.push(outcome(
                    &member,
                    number,
                    point.age_ms,
                    ran.and_then(|ran| ran),
                ));
            }
        }
        let ran = done.iter().filter_map(|m| m.report.as_ref());
        Ok(GroupFailover {
            group: name.to_owned(),
            cut: point.cut,
            rpo_ms: point.age_ms,
            rto_ms: ran.map(|r| r.rto_ms).fold(0.0, f64::max),
            members: done,
        })
    }
}

fn outcome(
    member: &NamedMember,
    point: u64,
    rpo_ms: u64,
    ran: Result<Activation, ActivateError>,
) -> MemberFailover {
    let guest = member.name.clone();
    match ran {
        Ok(active) => MemberFailover {
            report: Some(FailoverReport {
                guest: guest.clone(),
                point,
                rpo_ms,
                rto_ms: active.times.total.as_secs_f64() * 1e3,
                term: active.term.number,
                console: ConsolePaths::beside(active.directory()),
                qmp: active.qmp.map(|qmp| qmp.display().to_string()),
                pid: active.pid,
                times: active.times,
                note: String::new(),
            }),
            error: String::new(),
            guest,
        },
        Err(error) => MemberFailover {
            error: format!(
                "{error}. Its term is taken; try again: farhaven failover {guest} --point {point} --force"
            ),
            report: None,
            guest,
        },
    }
}

impl Standby {
    /// What can fail is done before a living source stops its guest.
    async fn prepare_failover(self: &Arc<Self>, point: u64) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
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
    async fn run_under(
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
