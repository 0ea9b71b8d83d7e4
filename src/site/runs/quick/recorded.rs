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
use crate::site::runs::facts::{FactsFile, GuestFacts, Picture, now_ms};
use crate::site::runs::start::run_id;
use crate::site::view::{FailoverReport, MoveReport, TestEnded, TestReport};

/// The record of one that is under way.
pub(in crate::site::runs) struct Quick {
    pub(super) run: Run,
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

impl Quick {
    pub(super) fn begin(
        site: &Arc<Site>,
        mode: Mode,
        guest: &str,
        by: &str,
    ) -> Result<Quick, String> {
        let told = |error: &dyn ToString| error.to_string();
        let runbook = builtin::of_mode(mode, [(guest.to_owned(), vec![guest.to_owned()])].into());
        let facts = Default::default();
        let planned = plan(&runbook, mode, &facts).map_err(|e| told(&e))?;
        let id = run_id(mode);
        let directory = site.runs.directory();
        let text = write(&runbook);
        crate::site::files::replace(&directory.join(format!("{id}.toml")), text.as_bytes())
            .map_err(|e| told(&e))?;
        let facts = FactsFile::open(directory, &id).map_err(|e| told(&e))?;
        let noted = facts.change(|facts| {
            facts.quick = true;
            facts.guests.entry(guest.to_owned()).or_default().group = guest.to_owned();
        });
        noted.map_err(|e| told(&e))?;
        let (run, first) = Run::new(&id, planned, by, Moment(now_ms())).map_err(|e| told(&e))?;
        let mut log = AuditLog::create(directory, &id).map_err(|e| told(&e))?;
        log.append(&first).map_err(|e| told(&e))?;
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
        guest: &str,
        report: &FailoverReport,
        declared: u64,
        picture: Option<Picture>,
        by: &str,
        force: bool,
    ) -> Result<(), ConductError> {
        let times = &report.times;
        let noted = self.facts.change(|facts| {
            facts.forced = force;
            let known = facts.guests.entry(guest.to_owned()).or_default();
            *known = GuestFacts {
                group: guest.to_owned(),
                point: Some(report.point),
                cut_at: Some(declared.saturating_sub(report.rpo_ms)),
                rpo_ms: Some(report.rpo_ms),
                started_at: Some(declared + report.rto_ms as u64),
                start_ms: Some(report.rto_ms),
                healthy_at: Some(declared + report.rto_ms as u64),
                healthy_by: "it runs".to_owned(),
                term: known.term,
                picture,
                ..known.clone()
            };
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let ready = times.ram.max(times.launch);
        let steps = [
            went(Kind::Check, Duration::ZERO, "a point is here"),
            went(Kind::Fence, times.term, format!("term {}", report.term)),
            went(
                Kind::Promote,
                ready,
                format!("point {}, {} ms old", report.point, report.rpo_ms),
            ),
            went(Kind::Remap, Duration::ZERO, "as configured"),
            went(Kind::StartGroup, times.restore, guest),
            went(Kind::WaitHealthy, Duration::ZERO, "it runs"),
        ];
        self.follow(self.run.started().0.max(declared), by, &steps)?;
        Ok(())
    }

    pub(super) fn moved(
        &mut self,
        guest: &str,
        report: &MoveReport,
        by: &str,
    ) -> Result<(), ConductError> {
        let now = now_ms();
        let stood = Duration::from_secs_f64((report.blackout_ms / 1e3).max(0.0));
        let total = Duration::from_secs_f64((report.total_ms / 1e3).max(0.0));
        let times = &report.times;
        let noted = self.facts.note(guest, |known| {
            known.point = Some(report.point);
            known.rpo_ms = Some(0);
            known.final_bytes = Some(report.final_bytes);
            known.source_stopped = true;
            known.stopped_at = Some(now.saturating_sub(stood.as_millis() as u64));
            known.started_at = Some(now);
            known.start_ms = Some(times.total.as_secs_f64() * 1e3);
            known.healthy_at = Some(now);
            known.healthy_by = format!("site '{}' says that it runs", report.to);
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let there = times.ram + times.restore;
        let steps = [
            went(Kind::Check, Duration::ZERO, "it is protected"),
            went(
                Kind::FinalSync,
                total.saturating_sub(there),
                format!("point {}, {} bytes", report.point, report.final_bytes),
            ),
            went(Kind::Promote, times.ram, format!("point {}", report.point)),
            went(Kind::Remap, Duration::ZERO, "as configured there"),
            went(
                Kind::StartGroup,
                times.restore,
                format!("at '{}', term {}", report.to, report.term),
            ),
            went(Kind::WaitHealthy, Duration::ZERO, "it runs there"),
        ];
        self.follow(self.run.started().0, by, &steps)?;
        Ok(())
    }

    pub(super) fn tested(
        &mut self,
        guest: &str,
        report: &TestReport,
        by: &str,
    ) -> Result<(), ConductError> {
        let started = self.run.started().0;
        let noted = self.facts.note(guest, |known| {
            known.point = Some(report.point);
            known.cut_at = Some(started.saturating_sub(report.age_ms));
            known.rpo_ms = Some(report.age_ms);
            known.started_at = Some(started + report.rto_ms as u64);
            known.start_ms = Some(report.rto_ms);
        });
        noted.unwrap_or_else(|error| not_kept(&error));
        let times = &report.times;
        let steps = [
            went(Kind::Check, Duration::ZERO, "a point is here"),
            went(
                Kind::Promote,
                times.ram.max(times.launch),
                format!("point {}, {} ms old", report.point, report.age_ms),
            ),
            went(Kind::Remap, Duration::ZERO, "isolated"),
            went(Kind::StartGroup, millis(times.restore), guest),
        ];
        self.follow(started, by, &steps)?;
        Ok(())
    }

    pub(super) fn test_ended(
        &mut self,
        ended: &TestEnded,
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
            ended.removed.join(", "),
        )];
        self.follow(now, by, &removed)?;
        Ok(())
    }
}
