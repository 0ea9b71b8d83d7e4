//! `failover`, `move` and `test` without a runbook, recorded as runs of the
//! built-in one.
//!
//! They keep their own short way: nothing waits between two steps, and no step
//! waits for the record. That one was asked for is durable beside its work;
//! how it went is written when it has ended, with the times that were measured.
//! One that a restart interrupted is not gone on with: its record ends there.

use std::sync::Arc;

use farhaven_policies::runbook::Mode;

pub(super) use self::recorded::{Quick, interrupted};
use super::facts::now_ms;
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::view::{FailoverReport, MoveReport, TestEnded, TestReport};

mod recorded;

/// Who asked, where that is not known: whoever may use the socket.
const SOMEBODY: &str = "operator";

/// That something cannot be recorded stops no failover; it is told.
fn not_kept(error: &dyn std::fmt::Display) {
    tracing::error!(%error, "the record of this run is not complete");
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    crate::work::spawn_blocking(work).await.ok()
}

impl Site {
    async fn begin_quick(self: &Arc<Self>, mode: Mode, guest: &str, by: &str) -> Option<Quick> {
        let (site, guest, by) = (self.clone(), guest.to_owned(), by.to_owned());
        let begun = blocking(move || Quick::begin(&site, mode, &guest, &by)).await?;
        begun.inspect_err(|error| not_kept(error)).ok()
    }

    /// [`Site::fail_over`], recorded as a run of the built-in runbook.
    ///
    /// # Errors
    /// As there.
    pub async fn fail_over_recorded(
        self: &Arc<Self>,
        name: &str,
        point: Option<u64>,
        force: bool,
        by: Option<String>,
    ) -> Result<FailoverReport, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        // Refused before anything was begun: that is no run.
        self.standby_here(name)?;
        let declared = now_ms();
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Unplanned, name, &by),
            self.fail_over(name, point, force)
        );
        if let Some(mut quick) = begun {
            let (guest, told) = (
                name.to_owned(),
                done.as_ref().map(Clone::clone).map_err(ToString::to_string),
            );
            let picture = self.picture_of(name);
            let _ = blocking(move || {
                let kept = match &told {
                    Ok(report) => quick.failed_over(&guest, report, declared, picture, &by, force),
                    Err(why) => quick.fail(&by, why),
                };
                kept.unwrap_or_else(|error| not_kept(&error));
            })
            .await;
        }
        done
    }

    /// [`Site::move_guest`], recorded as a run of the built-in runbook, at the source.
    ///
    /// # Errors
    /// As there.
    pub async fn move_recorded(
        self: &Arc<Self>,
        name: &str,
        accept_pause: bool,
        by: Option<String>,
    ) -> Result<MoveReport, OperateError> {
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        self.guest(name)?;
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Planned, name, &by),
            self.move_guest(name, accept_pause)
        );
        if let Some(mut quick) = begun {
            let (guest, told) = (
                name.to_owned(),
                done.as_ref().map(Clone::clone).map_err(ToString::to_string),
            );
            let _ = blocking(move || {
                let kept = match &told {
                    Ok(report) => quick.moved(&guest, report, &by),
                    Err(why) => quick.fail(&by, why),
                };
                kept.unwrap_or_else(|error| not_kept(&error));
            })
            .await;
        }
        done
    }

    /// [`Site::test`], recorded as a run of the built-in runbook that goes on
    /// until [`Site::end_test_recorded`].
    ///
    /// # Errors
    /// As there.
    pub async fn test_recorded(
        self: &Arc<Self>,
        name: &str,
        point: Option<u64>,
        by: Option<String>,
    ) -> Result<TestReport, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        self.standby_here(name)?;
        let (begun, done) = tokio::join!(
            self.begin_quick(Mode::Test, name, &by),
            self.test(name, point)
        );
        if let Some(mut quick) = begun {
            let (guest, told) = (
                name.to_owned(),
                done.as_ref().map(Clone::clone).map_err(ToString::to_string),
            );
            let kept = blocking(move || {
                let kept = match &told {
                    Ok(report) => quick.tested(&guest, report, &by),
                    Err(why) => quick.fail(&by, why),
                };
                kept.unwrap_or_else(|error| not_kept(&error));
                quick
            })
            .await;
            if let Some(quick) = kept.filter(|quick| quick.run.outcome().is_none()) {
                let mut tests = self.runs.tests();
                tests.insert(name.to_owned(), quick);
            }
        }
        done
    }

    /// [`Site::end_test`], which ends the run that [`Site::test_recorded`] began.
    ///
    /// # Errors
    /// As there.
    pub async fn end_test_recorded(
        self: &Arc<Self>,
        name: &str,
        by: Option<String>,
    ) -> Result<TestEnded, OperateError> {
        self.not_in_a_run(name)?;
        let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
        let picture = self.picture_of(name);
        let healthy = self.test_runs(name).await;
        let places = self.standby_here(name)?.test_places();
        let ended = self.end_test(name).await?;
        let quick = self.runs.tests().remove(name);
        if let (Some(mut quick), Ok(places)) = (quick, places) {
            let (guest, told) = (name.to_owned(), ended.clone());
            let _ = blocking(move || {
                let gone: Vec<String> = places
                    .iter()
                    .filter(|place| !crate::site::exists(place))
                    .map(|place| format!("{} is not there", place.display()))
                    .collect();
                let noted = quick.facts.note(&guest, |known| {
                    known.picture = picture;
                    known.removed.clone_from(&told.removed);
                    known.gone.clone_from(&gone);
                    if healthy {
                        known.healthy_at = Some(now_ms());
                        known.healthy_by = "it runs".to_owned();
                    }
                });
                noted.unwrap_or_else(|error| not_kept(&error));
                quick
                    .test_ended(&told, healthy, gone.len() == places.len(), &by)
                    .unwrap_or_else(|error| not_kept(&error));
            })
            .await;
        }
        Ok(ended)
    }
}
