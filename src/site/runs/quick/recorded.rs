//! The record of a verb without a runbook: the steps of the built-in one, with
//! the times that were measured.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farhaven_policies::runbook::plan::plan;
use farhaven_policies::runbook::run::{Cause, Event, Moment, Next, Run};
use farhaven_policies::runbook::{Kind, Mode, builtin, write};

use super::not_kept;
use crate::runbook::conduct::ConductError;
use crate::runbook::record::AuditLog;
use crate::site::Site;
use crate::site::runs::facts::{FactsFile, GuestFacts, now_ms};
use crate::site::runs::start::run_id;
use crate::site::view::{FailoverReport, MoveReport, TestEnded, TestReport};

/// The record of one that is under way.
pub(in crate::site::runs) struct Quick {
    pub(in crate::site::runs) run: Run,
    log: AuditLog,
    pub(super) facts: FactsFile,
}

/// How a step of it went.
struct Went {
    kind: Kind,
    took: Duration,
    note: String,
}

fn went(kind: Kind, took: Duration, note: impl Into<String>) -> Went {
    let note = note.into();
    Went { kind, took, note }
}

/// Guests, each with what came of it.
pub(super) type Each<R> = [(String, R)];

/// Of several, each by its name.
fn told<R>(each: &Each<R>, words: impl Fn(&R) -> String) -> String {
    match each {
        [(_, one)] => words(one),
        many => {
            let each = many
                .iter()
                .map(|(guest, one)| format!("{guest}: {}", words(one)));
            each.collect::<Vec<_>>().join("; ")
        }
    }
}

fn names<R>(each: &Each<R>) -> String {
    let names: Vec<&str> = each.iter().map(|(guest, _)| guest.as_str()).collect();
    names.join(", ")
}

/// They are started side by side: the longest of them counts.
fn longest<R>(each: &Each<R>, of: impl Fn(&R) -> Duration) -> Duration {
    let times = each.iter().map(|(_, one)| of(one));
    times.max().unwrap_or_default()
}

/// How far all guests of it came.
#[derive(Clone, Debug)]
pub(super) enum Came {
    /// They run, and are healthy by this word.
    Healthy(String),
    /// They run.
    Run,
    /// Not all of them do.
    NotAll,
}

impl Came {
    /// The steps that came to pass, of those that would have.
    fn so_far(&self, mut steps: Vec<Went>) -> Vec<Went> {
        match self {
            Came::Healthy(by) => steps.push(went(Kind::WaitHealthy, Duration::ZERO, by.clone())),
            Came::Run => {}
            Came::NotAll => steps.retain(|step| step.kind != Kind::StartGroup),
        }
        steps
    }

    /// By what they are healthy.
    fn healthy_by(&self) -> Option<&str> {
        match self {
            Came::Healthy(by) => Some(by),
            Came::Run | Came::NotAll => None,
        }
    }
}

impl Quick {
    pub(super) fn begin(
        site: &Arc<Site>,
        mode: Mode,
        group: &str,
        guests: &[String],
        by: &str,
    ) -> Result<Quick, String> {
        let said = |error: &dyn ToString| error.to_string();
        let runbook = builtin::of_mode(mode, [(group.to_owned(), guests.to_vec())].into());
        let facts = Default::default();
        let planned = plan(&runbook, mode, &facts).map_err(|e| said(&e))?;
        let id = run_id(mode);
        let directory = site.runs.directory();
        let text = write(&runbook);
        crate::site::files::replace(&directory.join(format!("{id}.toml")), text.as_bytes())
            .map_err(|e| said(&e))?;
        let facts = FactsFile::open(directory, &id).map_err(|e| said(&e))?;
        let noted = facts.change(|facts| {
            facts.quick = true;
            for guest in guests {
                let known = facts.guests.entry(guest.clone()).or_default();
                known.group = group.to_owned();
                known.rpo_target_ms = site.rpo_target_of(guest);
            }
        });
        noted.map_err(|e| said(&e))?;
        let (run, first) = Run::new(&id, planned, by, Moment(now_ms())).map_err(|e| said(&e))?;
        let mut log = AuditLog::create(directory, &id).map_err(|e| said(&e))?;
        log.append(&first).map_err(|e| said(&e))?;
        Ok(Quick { run, log, facts })
    }

    fn keep(&mut self, at: u64, by: Option<&str>, event: Event) -> Result<(), ConductError> {
        let record = self.run.happened(Moment(at), by, event);
        Ok(self.log.append(&record.map_err(ConductError::Senseless)?)?)
    }

    /// Goes through the steps until one that did not come to pass.
    fn follow(&mut self, mut at: u64, by: &str, steps: &[Went]) -> Result<u64, ConductError> {
        loop {
            match self.run.next(Moment(at)) {
                Next::Record(event) => self.keep(at, None, event)?,
                Next::Begin(attempt) => {
                    let kind = attempt.step.action.kind();
                    let Some(went) = steps.iter().find(|step| step.kind == kind) else {
                        return Ok(at);
                    };
                    self.keep(at, None, attempt.begun())?;
                    at += went.took.as_millis() as u64;
                    let note = went.note.clone();
                    match kind {
                        Kind::Approve => {
                            let comment = note;
                            self.keep(at, Some(by), Event::Approved { comment })?;
                        }
                        _ => self.keep(at, None, Event::Done { note })?,
                    }
                }
                _ => return Ok(at),
            }
        }
    }

    /// The step at hand failed; what was done is undone already, by the verb itself.
    pub(super) fn fail(&mut self, by: &str, why: &str) -> Result<(), ConductError> {
        let at = now_ms();
        let mut failed = false;
        loop {
            match self.run.next(Moment(at)) {
                Next::Over(_) => return Ok(()),
                Next::Record(event) => self.keep(at, None, event)?,
                Next::Begin(attempt) => {
                    self.keep(at, None, attempt.begun())?;
                    let event = match (attempt.undo, failed) {
                        (true, _) => Event::Done {
                            note: "nothing of it was left".to_owned(),
                        },
                        (false, _) => Event::Failed {
                            why: why.to_owned(),
                            cause: Cause::Fault,
                        },
                    };
                    failed = true;
                    self.keep(at, None, event)?;
                }
                _ => self.keep(at, Some(by), Event::Aborted { rollback: false })?,
            }
        }
    }
}

/// One that a restart of the daemon interrupted ends there. Blocks.
pub(in crate::site::runs) fn interrupted(path: &Path) -> Result<(), ConductError> {
    let (log, records) = AuditLog::open(path)?;
    let run = Run::resume(&records).map_err(ConductError::Senseless)?;
    let facts = path.with_extension("facts");
    let id = run.id().to_owned();
    let directory = facts.parent().unwrap_or(Path::new("."));
    let facts = FactsFile::open(directory, &id).map_err(|e| ConductError::Writer(e.to_string()))?;
    let mut quick = Quick { run, log, facts };
    let at = now_ms();
    quick.keep(at, None, Event::Restarted)?;
    loop {
        match quick.run.next(Moment(at)) {
            Next::Over(_) => return Ok(()),
            Next::Record(event) => quick.keep(at, None, event)?,
            _ => quick.keep(
                at,
                Some("the daemon, started anew"),
                Event::Aborted { rollback: false },
            )?,
        }
    }
}

fn millis(span: Duration) -> Duration {
    span.max(Duration::from_millis(1))
}

impl Quick {
    pub(super) fn failed_over(
        &mut self,
        ran: &Each<FailoverReport>,
        declared: u64,
        came: &Came,
        by: &str,
        force: bool,
    ) -> Result<(), ConductError> {
        let noted = self.facts.change(|facts| {
            facts.forced = force;
            for (guest, report) in ran {
                let known = facts.guests.entry(guest.clone()).or_default();
                let ran = declared + report.rto_ms as u64;
                known.point = Some(report.point);
                known.cut_at = Some(declared.saturating_sub(report.rpo_ms));
                known.rpo_ms = Some(report.rpo_ms);
                known.started_at = Some(ran);
                known.start_ms = Some(report.rto_ms);
                known.is_healthy(came, ran);
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let steps = came.so_far(vec![
            went(Kind::Check, Duration::ZERO, "a point is here"),
            went(
                Kind::Fence,
                longest(ran, |report| report.times.term),
                told(ran, |report| format!("term {}", report.term)),
            ),
            went(
                Kind::Promote,
                longest(ran, |report| report.times.ram.max(report.times.launch)),
                told(ran, |r| format!("point {}, {} ms old", r.point, r.rpo_ms)),
            ),
            went(Kind::Remap, Duration::ZERO, "as configured"),
            went(
                Kind::StartGroup,
                longest(ran, |report| report.times.restore),
                names(ran),
            ),
        ]);
        self.follow(self.run.started().0.max(declared), by, &steps)?;
        Ok(())
    }

    pub(super) fn moved(
        &mut self,
        moved: &Each<MoveReport>,
        came: &Came,
        by: &str,
    ) -> Result<(), ConductError> {
        let now = now_ms();
        let span = |ms: f64| Duration::from_secs_f64((ms / 1e3).max(0.0));
        let noted = self.facts.change(|facts| {
            for (guest, report) in moved {
                let known = facts.guests.entry(guest.clone()).or_default();
                let stood = span(report.blackout_ms).as_millis() as u64;
                known.point = Some(report.point);
                known.rpo_ms = Some(0);
                known.final_bytes = Some(report.final_bytes);
                known.source_stopped = true;
                known.stopped_at = Some(now.saturating_sub(stood));
                known.started_at = Some(now);
                known.start_ms = Some(report.times.total.as_secs_f64() * 1e3);
                known.is_healthy(came, now);
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let there = longest(moved, |report| report.times.ram + report.times.restore);
        let total = longest(moved, |report| span(report.total_ms));
        let steps = came.so_far(vec![
            went(Kind::Check, Duration::ZERO, "it is protected"),
            went(
                Kind::FinalSync,
                total.saturating_sub(there),
                told(moved, |r| {
                    format!("point {}, {} bytes", r.point, r.final_bytes)
                }),
            ),
            went(
                Kind::Promote,
                longest(moved, |report| report.times.ram),
                told(moved, |report| format!("point {}", report.point)),
            ),
            went(Kind::Remap, Duration::ZERO, "as configured there"),
            went(
                Kind::StartGroup,
                longest(moved, |report| report.times.restore),
                told(moved, |r| format!("at '{}', term {}", r.to, r.term)),
            ),
        ]);
        self.follow(self.run.started().0, by, &steps)?;
        Ok(())
    }

    pub(super) fn tested(
        &mut self,
        ran: &Each<TestReport>,
        came: &Came,
        by: &str,
    ) -> Result<(), ConductError> {
        let started = self.run.started().0;
        let noted = self.facts.change(|facts| {
            for (guest, report) in ran {
                let known = facts.guests.entry(guest.clone()).or_default();
                let ran = started + report.rto_ms as u64;
                known.point = Some(report.point);
                known.cut_at = Some(report.cut_at_unix_ns / 1_000_000);
                known.rpo_ms = Some(report.age_ms);
                known.started_at = Some(ran);
                known.start_ms = Some(report.rto_ms);
                known.is_healthy(came, ran);
            }
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let steps = came.so_far(vec![
            went(Kind::Check, Duration::ZERO, "a point is here"),
            went(
                Kind::Promote,
                longest(ran, |report| report.times.ram.max(report.times.launch)),
                told(ran, |r| format!("point {}, {} ms old", r.point, r.age_ms)),
            ),
            went(Kind::Remap, Duration::ZERO, "isolated"),
            went(
                Kind::StartGroup,
                millis(longest(ran, |report| report.times.restore)),
                names(ran),
            ),
        ]);
        self.follow(started, by, &steps)?;
        Ok(())
    }

    pub(super) fn test_ended(
        &mut self,
        ended: &Each<TestEnded>,
        healthy: bool,
        gone: bool,
        by: &str,
    ) -> Result<(), ConductError> {
        if !healthy {
            return self.fail(by, "it did not run any more when the test was ended");
        }
        let now = now_ms();
        let looked = [
            went(Kind::WaitHealthy, Duration::ZERO, "it runs"),
            went(
                Kind::Approve,
                Duration::ZERO,
                "ended by farhaven test cleanup",
            ),
        ];
        self.follow(now, by, &looked)?;
        if !gone {
            return self.fail(by, "not all of it could be removed; see the log");
        }
        let removed = [went(
            Kind::Cleanup,
            Duration::ZERO,
            told(ended, |ended| ended.removed.join(", ")),
        )];
        self.follow(now, by, &removed)?;
        Ok(())
    }
}

impl GuestFacts {
    fn is_healthy(&mut self, came: &Came, at: u64) {
        if let Some(by) = came.healthy_by() {
            self.healthy_at = Some(at);
            self.healthy_by = by.to_owned();
        }
    }
}
