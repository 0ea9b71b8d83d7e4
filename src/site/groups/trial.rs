//! The test of a group: all of its guests run here from one whole point,
//! isolated, while their protection goes on; then all of it is thrown away.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::all::{GroupDone, MemberDone};
use super::waves::{Start, Waves};
use super::{GroupPointView, GroupRecord, NamedMember};
use crate::site::Site;
use crate::site::drill::needed_for;
use crate::site::health::{self, CheckView};
use crate::site::operate::OperateError;
use crate::site::view::{TestEnded, TestReport};

/// What the test of a group did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupTest {
    /// The group.
    pub group: String,
    /// The cut that all of its guests run from.
    pub cut: u64,
    /// How old that was: what a failover in its place would have lost.
    pub age_ms: u64,
    /// From the command until the last guest ran, of those that do.
    pub rto_ms: f64,
    /// From the command until all checks were looked at.
    pub checked_ms: f64,
    /// Each guest, in the order in which they were started.
    pub members: Vec<MemberTest>,
    /// What does not run or is not healthy, and what to do; empty when all is well.
    pub remains: String,
}

/// What came of one guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberTest {
    /// Its name.
    pub guest: String,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// Set when its test runs.
    pub report: Option<TestReport>,
    /// Its health checks.
    pub checks: Vec<CheckView>,
    /// Why it does not run; empty when it does.
    pub error: String,
}

impl Site {
    /// Runs all guests of a peer's group here as a test, isolated, from their
    /// newest whole point or that of a cut's number; in waves, each waiting for
    /// the checks of the one before. Protection goes on.
    ///
    /// # Errors
    /// When there is no such whole point, a test or a guest of it runs here, or
    /// there is no room for all: nothing was begun.
    pub async fn test_group(
        self: &Arc<Self>,
        name: &str,
        cut: Option<u64>,
    ) -> Result<GroupTest, OperateError> {
        let declared = Instant::now();
        let group = self.group(name)?;
        let members = self.may_test(&group)?;
        let point = self.whole_point(&group, cut).await?;
        let starting = members.into_iter().filter_map(|member| {
            // One that joined the group after that cut is not part of it.
            let number = point.points.get(&member.name).copied()?;
            let (site, guest) = (self.clone(), member.name.clone());
            let start: Start<TestReport> = Box::pin(async move {
                let tested = site.test_since(&guest, Some(number), declared).await;
                tested.map_err(|error| error.to_string())
            });
            Some((member, start))
        });
        let waves = Waves {
            group: &group,
            mode: "test",
            isolated: true,
            unchecked: false,
            go_on: "The policy's on_error = \"continue\" would start it all the same".to_owned(),
        };
        let started = waves.start(self, starting.collect()).await;
        let members: Vec<MemberTest> = started
            .into_iter()
            .map(|started| {
                let (report, error) = match started.ran {
                    Ok(report) => (Some(report), String::new()),
                    Err(error) => (None, error),
                };
                MemberTest {
                    guest: started.member.name,
                    wave: started.member.wave,
                    report,
                    checks: started.checks,
                    error,
                }
            })
            .collect();
        let bad: Vec<&str> = members
            .iter()
            .filter(|m| m.report.is_none() || health::fault(&m.checks).is_some())
            .map(|m| m.guest.as_str())
            .collect();
        let remains = match bad.as_slice() {
            [] => String::new(),
            bad => format!(
                "{} of {} guests do not run or are not healthy ({}). What runs stays for you to look at. End all of it: farhaven test cleanup {name}",
                bad.len(),
                members.len(),
                bad.join(", ")
            ),
        };
        let ran = members.iter().filter_map(|m| m.report.as_ref());
        let since = |report: &TestReport| report.rto_ms;
        Ok(GroupTest {
            group: name.to_owned(),
            cut: point.cut,
            age_ms: point.age_ms,
            rto_ms: ran.map(since).fold(0.0, f64::max),
            checked_ms: declared.elapsed().as_secs_f64() * 1e3,
            members,
            remains,
        })
    }

    /// None of them is tested or runs here, and there is room for all.
    fn may_test(self: &Arc<Self>, group: &GroupRecord) -> Result<Vec<NamedMember>, OperateError> {
        let members = self.members_here(group);
        let mut definitions = Vec::new();
        for member in &members {
            let standby = self.standby_here(&member.name)?;
            if let Some(active) = standby.active() {
                return Err(OperateError::Conflict(format!(
                    "'{}' of group '{}' was taken over and runs here (term {}); its points here are of before that. Protect the group to its peer and test it there: farhaven commit {1}, then farhaven reprotect {1}",
                    member.name, group.name, active.term.number
                )));
            }
            if standby.tested().is_some() {
                return Err(OperateError::Conflict(format!(
                    "a test of '{}' runs already; end it first: farhaven test cleanup {}",
                    member.name, group.name
                )));
            }
            definitions.push(standby.opening().definition);
        }
        let (needed, free) = needed_for(&definitions, &self.config.ram_dir());
        if needed > free {
            return Err(OperateError::Conflict(format!(
                "a test of group '{}' needs {} MiB of memory, and {} MiB are free in {}; end other tests, or free memory",
                group.name,
                needed.div_ceil(1 << 20),
                free >> 20,
                self.config.ram_dir().display()
            )));
        }
        Ok(members)
    }

    /// A whole point of a group: the newest, or that of a cut's number.
    ///
    /// # Errors
    /// When there is none.
    pub(super) async fn whole_point(
        &self,
        group: &GroupRecord,
        cut: Option<u64>,
    ) -> Result<GroupPointView, OperateError> {
        let name = &group.name;
        let points = self.group_points(name).await?;
        let point = match cut {
            Some(cut) => points.into_iter().find(|point| point.cut == cut),
            None => points.into_iter().next_back(),
        };
        point.ok_or_else(|| {
            OperateError::Conflict(format!(
                "there is no {} of group '{name}' here, with all of its guests; see farhaven points {name}. Its guests can be run one by one, each from its own newest point: farhaven failover GUEST, farhaven test GUEST",
                cut.map_or_else(
                    || "whole point".to_owned(),
                    |cut| format!("whole point {cut}")
                )
            ))
        })
    }

    /// Ends the tests of all guests of a group and removes all of them, those
    /// that started last first. Where none runs there is nothing to do.
    ///
    /// # Errors
    /// When there is no such group.
    pub async fn end_group_test(
        self: &Arc<Self>,
        name: &str,
    ) -> Result<GroupDone<TestEnded>, OperateError> {
        let group = self.group(name)?;
        let mut rows = Vec::new();
        for member in self.members_here(&group).iter().rev() {
            let standby = self.standby_named(&member.name);
            let tested = standby.is_some_and(|standby| standby.tested().is_some());
            rows.push(match tested {
                true => MemberDone::of(member, self.end_test(&member.name).await),
                false => MemberDone::left(member, "no test of it ran"),
            });
        }
        rows.reverse();
        let again = format!("Go on: farhaven test cleanup {name}");
        Ok(GroupDone::of(name, rows, &again))
    }
}
