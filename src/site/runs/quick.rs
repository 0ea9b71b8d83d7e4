//! `failover`, `move` and `test` without a runbook, recorded as runs of the
//! built-in one.
//!
//! They keep their own short way: nothing waits between two steps, and no step
//! waits for the record. That one was asked for is durable beside its work;
//! how it went is written when it has ended, with the times that were measured.
//! One that a restart interrupted is not gone on with: its record ends there.

use std::path::PathBuf;
use std::sync::Arc;

use farhaven_policies::runbook::Mode;

use self::recorded::{Came, Each};
pub(super) use self::recorded::{Quick, interrupted};
use super::facts::{Picture, now_ms};
use crate::runbook::conduct::ConductError;
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::view::{FailoverReport, MoveReport, TestEnded, TestReport};

mod groups;
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

/// A guest that runs, and of which nothing else is known.
const RUNS: &str = "it runs";

/// A guest with what came of it.
fn one<R: Clone>(name: &str, report: &R) -> [(String, R); 1] {
    [(name.to_owned(), report.clone())]
}

/// What came of it, to be told in a record.
fn in_words<R: Clone, E: ToString>(done: &Result<R, E>) -> Result<R, String> {
    match done {
        Ok(report) => Ok(report.clone()),
        Err(error) => Err(error.to_string()),
    }
}

impl Quick {
    /// Its record is told of it, in the background; and given back.
    async fn with(
        mut self,
        record: impl FnOnce(&mut Quick) -> Result<(), ConductError> + Send + 'static,
    ) -> Option<Quick> {
        blocking(move || {
            record(&mut self).unwrap_or_else(|error| not_kept(&error));
            self
        })
        .await
    }
}

impl Site {
    /// What a guest's points may be old: by its source's word, or by its protection here.
    fn rpo_target_of(&self, name: &str) -> Option<u64> {
        match self.standby_named(name) {
            Some(standby) => standby.opening().rpo_ms,
            None => self.guest_view(&self.guest(name).ok()?).rpo_target_ms,
        }
    }

    async fn begin_quick(
        self: &Arc<Self>,
        mode: Mode,
        group: &str,
        guests: Vec<String>,
        by: &str,
    ) -> Option<Quick> {
        let (site, group, by) = (self.clone(), group.to_owned(), by.to_owned());
        let begun = blocking(move || Quick::begin(&site, mode, &group, &guests, &by)).await?;
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
            self.begin_quick(Mode::Unplanned, name, vec![name.to_owned()], &by),
            self.fail_over(name, point, force)
        );
        if let Some(quick) = begun {
            let (guest, told) = (name.to_owned(), in_words(&done));
            let picture = self.picture_of(name);
            quick
                .with(move |quick| match &told {
                    Ok(report) => {
                        quick.pictures([(guest.clone(), picture)]);
                        let came = Came::Healthy(RUNS.to_owned());
                        let ran = one(&guest, report);
                        quick.failed_over(&ran, declared, &came, &by, force)
                    }
                    Err(why) => quick.fail(&by, why),
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
            self.begin_quick(Mode::Planned, name, vec![name.to_owned()], &by),
            self.move_guest(name, accept_pause)
        );
        if let Some(quick) = begun {
            let (guest, told) = (name.to_owned(), in_words(&done));
            quick
                .with(move |quick| match &told {
                    Ok(report) => {
                        let by_there = format!("site '{}' says that it runs", report.to);
                        quick.moved(&one(&guest, report), &Came::Healthy(by_there), &by)
                    }
                    Err(why) => quick.fail(&by, why),
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
            self.begin_quick(Mode::Test, name, vec![name.to_owned()], &by),
            self.test(name, point)
        );
        if let Some(quick) = begun {
            let (guest, told) = (name.to_owned(), in_words(&done));
            let kept = quick.with(move |quick| match &told {
                Ok(report) => quick.tested(&one(&guest, report), &Came::Run, &by),
                Err(why) => quick.fail(&by, why),
            });
            self.keep_test(name, kept.await);
        }
        done
    }

    /// The record of a test goes on until it is ended.
    fn keep_test(&self, name: &str, quick: Option<Quick>) {
        if let Some(quick) = quick.filter(|quick| quick.run.outcome().is_none()) {
            let mut tests = self.runs.tests();
            tests.insert(name.to_owned(), quick);
        }
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
        let before = self.tested_before(name).await?;
        let ended = self.end_test(name).await?;
        let quick = self.runs.tests().remove(name);
        if let Some(quick) = quick {
            let told = one(name, &ended);
            quick
                .with(move |quick| quick.cleaned_up(&told, vec![before], &by))
                .await;
        }
        Ok(ended)
    }

    /// What is seen of a test before it is ended.
    async fn tested_before(&self, name: &str) -> Result<Tested, OperateError> {
        let standby = self.standby_here(name)?;
        Ok(Tested {
            guest: name.to_owned(),
            picture: self.picture_of(name),
            healthy: self.test_runs(name).await,
            places: standby.test_places().ok().map(Vec::from),
        })
    }
}

/// A test as it was before its end.
struct Tested {
    guest: String,
    picture: Option<Picture>,
    healthy: bool,
    /// Where its parts are; `None` where that is not known.
    places: Option<Vec<PathBuf>>,
}

impl Quick {
    /// What the guests showed.
    fn pictures(&self, shown: impl IntoIterator<Item = (String, Option<Picture>)>) {
        let noted = self.facts.change(|facts| {
            for (guest, picture) in shown {
                facts.guests.entry(guest).or_default().picture = picture;
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
    }

    /// The tests were ended, and what was of them is looked for. Blocks.
    fn cleaned_up(
        &mut self,
        ended: &Each<TestEnded>,
        before: Vec<Tested>,
        by: &str,
    ) -> Result<(), ConductError> {
        let (mut healthy, mut all_gone) = (true, true);
        let noted = self.facts.change(|facts| {
            for tested in before {
                let places = tested.places.unwrap_or_default();
                let gone: Vec<String> = places
                    .iter()
                    .filter(|place| !crate::site::exists(place))
                    .map(|place| format!("{} is not there", place.display()))
                    .collect();
                all_gone &= gone.len() == places.len();
                healthy &= tested.healthy;
                let removed = ended.iter().find(|(guest, _)| *guest == tested.guest);
                let known = facts.guests.entry(tested.guest).or_default();
                known.picture = tested.picture;
                known.removed = removed
                    .map(|(_, end)| end.removed.clone())
                    .unwrap_or_default();
                known.gone = gone;
                if tested.healthy && known.healthy_at.is_none() {
                    known.healthy_at = Some(now_ms());
                    known.healthy_by = RUNS.to_owned();
                }
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        self.test_ended(ended, healthy, all_gone, by)
    }
}
