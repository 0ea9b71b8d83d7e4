//! What is done with a whole group without a runbook, recorded as one run of the
//! built-in one.

use std::sync::Arc;

use farhaven_policies::runbook::Mode;

use super::recorded::Came;
use super::{Quick, RUNS, SOMEBODY, in_words, not_kept};
use crate::site::Site;
use crate::site::groups::{
    FailOverGroup, GroupDone, GroupFailover, GroupMove, GroupTest, MemberFailover, MemberTest,
};
use crate::site::health::{self, CheckOutcome, CheckView};
use crate::site::operate::OperateError;
use crate::site::runs::facts::{Seen, now_ms};
use crate::site::view::TestEnded;

/// A guest, whether it runs, why not, and its health checks.
type Member<'a> = (&'a str, bool, &'a str, &'a [CheckView]);

/// How far the guests of a group came, and what is not well with them.
fn came(members: &[Member<'_>]) -> (Came, String) {
    let faults: Vec<String> = members
        .iter()
        .filter_map(|(guest, _, error, checks)| match error.is_empty() {
            false => Some(format!("'{guest}': {error}")),
            true => health::fault(checks).map(|fault| format!("'{guest}': {fault}")),
        })
        .collect();
    let came = match members.iter().all(|(_, runs, ..)| *runs) {
        false => Came::NotAll,
        true if !faults.is_empty() => Came::Run,
        true => Came::Healthy(match members.iter().all(|(.., checks)| checks.is_empty()) {
            true => RUNS.to_owned(),
            false => "its health checks".to_owned(),
        }),
    };
    (came, faults.join("; "))
}

impl Quick {
    /// What health checks saw, for the report.
    fn saw(&self, members: &[Member<'_>]) {
        let noted = self.facts.change(|facts| {
            for (guest, _, _, checks) in members {
                facts.checks.extend(checks.iter().map(|check| Seen {
                    at: now_ms(),
                    step: "healthy".to_owned(),
                    guest: (*guest).to_owned(),
                    what: check.check.clone(),
                    good: check.outcome == CheckOutcome::Passed,
                    seen: check.seen.clone(),
                }));
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
    }
}

fn of_failover(member: &MemberFailover) -> Member<'_> {
    let runs = member.report.is_some();
    (&member.guest, runs, &member.error, &member.checks)
}

fn of_test(member: &MemberTest) -> Member<'_> {
    let runs = member.report.is_some();
    (&member.guest, runs, &member.error, &member.checks)
}

impl Site {
    /// The names here of a group's guests.
    fn guests_of_group(&self, name: &str) -> Result<Vec<String>, OperateError> {
        let group = self.group(name)?;
        let members = self.members_here(&group).into_iter();
        Ok(members.map(|member| member.name).collect())
    }

    /// [`Site::fail_over_group`], recorded as a run of the built-in runbook.
    ///
    /// # Errors
    /// As there.
    pub async fn fail_over_group_recorded(
        self: &Arc<Self>,
        name: &str,
        how: FailOverGroup,
        by: Option<String>,
    ) -> Result<GroupFailover, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        let guests = self.guests_of_group(name)?;
        let declared = now_ms();
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Unplanned, name, guests, &by),
            self.fail_over_group(name, how)
        );
        if let Some(quick) = begun {
            let told = in_words(&done);
            let members = told.iter().flat_map(|report| &report.members);
            let pictures: Vec<_> = members
                .map(|member| (member.guest.clone(), self.picture_of(&member.guest)))
                .collect();
            quick
                .with(move |quick| {
                    let report = match &told {
                        Ok(report) => report,
                        Err(why) => return quick.fail(&by, why),
                    };
                    quick.pictures(pictures);
                    let members: Vec<_> = report.members.iter().map(of_failover).collect();
                    let (came, faults) = came(&members);
                    quick.saw(&members);
                    let ran = reports(&report.members, |m| (&m.guest, m.report.as_ref()));
                    quick.failed_over(&ran, declared, &came, &by, how.force)?;
                    quick.fail_unless_well(&by, &faults)
                })
                .await;
        }
        done
    }

    /// [`Site::move_group`], recorded as a run of the built-in runbook, at the source.
    ///
    /// # Errors
    /// As there.
    pub async fn move_group_recorded(
        self: &Arc<Self>,
        name: &str,
        accept_pause: bool,
        by: Option<String>,
    ) -> Result<GroupMove, OperateError> {
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        let guests = self.guests_of_group(name)?;
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Planned, name, guests, &by),
            self.move_group(name, accept_pause)
        );
        if let Some(quick) = begun {
            let told = in_words(&done);
            quick
                .with(move |quick| {
                    let report = match &told {
                        Ok(report) => report,
                        Err(why) => return quick.fail(&by, why),
                    };
                    let members = report.members.iter();
                    let members: Vec<Member<'_>> = members
                        .map(|m| {
                            (
                                m.guest.as_str(),
                                m.report.as_ref().is_some_and(|report| report.runs),
                                m.error.as_str(),
                                &[][..],
                            )
                        })
                        .collect();
                    let (came, faults) = match came(&members) {
                        (Came::Healthy(_), faults) => {
                            let by_there = format!("site '{}' says that it runs", report.to);
                            (Came::Healthy(by_there), faults)
                        }
                        other => other,
                    };
                    let moved = reports(&report.members, |m| (&m.guest, m.report.as_ref()));
                    quick.moved(&moved, &came, &by)?;
                    quick.fail_unless_well(&by, &faults)
                })
                .await;
        }
        done
    }

    /// [`Site::test_group`], recorded as a run of the built-in runbook that goes on
    /// until [`Site::end_group_test_recorded`].
    ///
    /// # Errors
    /// As there.
    pub async fn test_group_recorded(
        self: &Arc<Self>,
        name: &str,
        cut: Option<u64>,
        by: Option<String>,
    ) -> Result<GroupTest, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        let guests = self.guests_of_group(name)?;
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Test, name, guests, &by),
            self.test_group(name, cut)
        );
        if let Some(quick) = begun {
            let told = in_words(&done);
            let kept = quick.with(move |quick| {
                let report = match &told {
                    Ok(report) => report,
                    Err(why) => return quick.fail(&by, why),
                };
                let members: Vec<_> = report.members.iter().map(of_test).collect();
                let (came, faults) = came(&members);
                quick.saw(&members);
                let ran = reports(&report.members, |m| (&m.guest, m.report.as_ref()));
                quick.tested(&ran, &came, &by)?;
                quick.fail_unless_well(&by, &faults)
            });
            self.keep_test(name, kept.await);
        }
        done
    }

    /// [`Site::end_group_test`], which ends the run that
    /// [`Site::test_group_recorded`] began.
    ///
    /// # Errors
    /// As there.
    pub async fn end_group_test_recorded(
        self: &Arc<Self>,
        name: &str,
        by: Option<String>,
    ) -> Result<GroupDone<TestEnded>, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        let mut before = Vec::new();
        for guest in self.guests_of_group(name)? {
            // No test of one that is not kept here runs: that is said of it below.
            if self.standby_named(&guest).is_some() {
                before.push(self.tested_before(&guest).await?);
            }
        }
        let done = self.end_group_test(name).await?;
        let quick = match done.remains.is_empty() {
            true => self.runs.tests().remove(name),
            // It goes on until all of it is removed.
            false => None,
        };
        if let Some(quick) = quick {
            let ended = reports(&done.members, |m| (&m.guest, m.report.as_ref()));
            quick
                .with(move |quick| quick.cleaned_up(&ended, before, &by))
                .await;
        }
        Ok(done)
    }
}

impl Quick {
    /// Its record ends where something is not well.
    fn fail_unless_well(
        &mut self,
        by: &str,
        faults: &str,
    ) -> Result<(), crate::runbook::conduct::ConductError> {
        match faults {
            "" => Ok(()),
            faults => self.fail(by, faults),
        }
    }
}

/// Of those of which there is one.
fn reports<M, R: Clone>(
    members: &[M],
    of: impl Fn(&M) -> (&String, Option<&R>),
) -> Vec<(String, R)> {
    let each = members.iter().filter_map(|member| match of(member) {
        (guest, Some(report)) => Some((guest.clone(), report.clone())),
        (_, None) => None,
    });
    each.collect()
}
