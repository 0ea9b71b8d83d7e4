//! The report of a run, gathered from its record and its facts.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use farhaven_policies::runbook::Kind;
use farhaven_policies::runbook::run::{Answer, Cause, Event, Record, Run, StepView};

use super::facts::{FactsFile, GuestFacts, Picture};
use super::view::run_view;
use crate::activate::point::boots;
use crate::runbook::report::{CheckReport, EventReport, GuestReport, Report};
use crate::site::Site;
use crate::site::operate::{OperateError, failed};

/// Most bytes of all screens in one report.
const MOST_SCREENS: usize = 24 << 20;

impl Site {
    /// All that is told of a run.
    ///
    /// # Errors
    /// When there is none, or its record cannot be read.
    pub fn report(&self, id: &str) -> Result<Report, OperateError> {
        let records = self.records_of(id)?;
        let run = Run::resume(&records).map_err(failed)?;
        let facts = FactsFile::open(self.runs.directory(), id).map_err(failed)?;
        let facts = facts.now();
        let mut room = MOST_SCREENS;
        let guests: Vec<GuestReport> = facts
            .guests
            .iter()
            .map(|(name, known)| self.guest_report(name, known, &mut room))
            .collect();
        let steps = run.steps();
        let ran = |guest: &GuestReport| guest.healthy_at.or(guest.started_at);
        // As long as one does not run, nobody has recovered.
        let last = guests.iter().map(ran).collect::<Option<Vec<_>>>();
        let last = last.and_then(|each| each.into_iter().max());
        let record = crate::runbook::record::last_chain(&self.runs.record(id)).map_err(failed)?;
        Ok(Report {
            run: run.id().to_owned(),
            site: self.config.site.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            plan: run.plan().clone(),
            by: run.by().to_owned(),
            started: run.started().0,
            ended: run.outcome().and(records.last()).map(|record| record.at.0),
            outcome: run.outcome(),
            standing: run_view(&run, &self.runs.hands(id)).standing,
            forced: facts.forced,
            rpo_ms: guests.iter().filter_map(|guest| guest.rpo_ms).max(),
            rto_ms: last.map(|at| at.saturating_sub(run.started().0)),
            people_ms: people_ms(&steps, last),
            guests,
            steps,
            checks: facts
                .checks
                .into_iter()
                .map(|seen| CheckReport {
                    at: seen.at,
                    step: seen.step,
                    guest: seen.guest,
                    what: seen.what,
                    good: seen.good,
                    seen: seen.seen,
                })
                .collect(),
            events: records.iter().map(event_report).collect(),
            record,
        })
    }

    fn is_of_disks(&self, name: &str, point: Option<u64>) -> bool {
        let Some(standby) = self.standby_named(name) else {
            return false;
        };
        let points = standby.points();
        let used = points.iter().find(|header| Some(header.point) == point);
        used.is_some_and(|header| boots(&header.volumes))
    }

    fn guest_report(&self, name: &str, known: &GuestFacts, room: &mut usize) -> GuestReport {
        let (mut screen, mut console, mut pictured_at) = (None, None, None);
        // Right after its start it had shown nothing yet.
        let runs = self
            .standby_named(name)
            .and_then(|standby| standby.active());
        let runs = runs.filter(|active| Some(active.point) == known.point);
        let now = || runs.and_then(|_| self.picture_of(name));
        match &known
            .picture
            .as_ref()
            .filter(|picture| picture.shows())
            .cloned()
            .or_else(now)
        {
            Some(Picture::Console { at, text }) => {
                (console, pictured_at) = (Some(text.clone()), Some(*at));
            }
            Some(Picture::Screen { at, file }) if !file.contains('/') => {
                let png = std::fs::read(self.runs.directory().join(file));
                if let Ok(png) = png.map_err(|_| ()).and_then(|png| {
                    *room = room.checked_sub(png.len()).ok_or(())?;
                    Ok(png)
                }) {
                    (screen, pictured_at) = (Some(STANDARD.encode(png)), Some(*at));
                }
            }
            _ => {}
        }
        let stood = known.stopped_at.zip(known.started_at);
        GuestReport {
            guest: name.to_owned(),
            group: known.group.clone(),
            point: known.point,
            disks_only: self.is_of_disks(name, known.point),
            cut_at: known.cut_at,
            rpo_ms: known.rpo_ms,
            rpo_target_ms: known.rpo_target_ms,
            term: known.term.map(|term| term.number),
            source_stopped: known.source_stopped,
            final_bytes: known.final_bytes,
            quiesced: known.quiesced,
            blackout_ms: stood.map(|(stopped, ran)| ran.saturating_sub(stopped)),
            started_at: known.started_at,
            healthy_at: known.healthy_at,
            healthy_by: known.healthy_by.clone(),
            committed_at: known.committed_at,
            lost_ms: known.lost_ms,
            reprotected_bytes: known.reprotected_bytes,
            pictured_at,
            screen,
            console,
            removed: known.removed.clone(),
            gone: known.gone.clone(),
        }
    }
}

/// How long people were waited for until then.
fn people_ms(steps: &[StepView], until: Option<u64>) -> u64 {
    let approvals = steps.iter().filter(|step| step.kind == Kind::Approve);
    let each = approvals.filter_map(|step| {
        let ended = step.ended?.0.min(until.unwrap_or(u64::MAX));
        Some(ended.saturating_sub(step.begun?.0))
    });
    each.sum()
}

fn event_report(record: &Record) -> EventReport {
    let undo = if record.undo { "undoing it " } else { "" };
    let what = match &record.event {
        Event::Started { plan, .. } => format!("started '{}' in {} mode", plan.runbook, plan.mode),
        Event::Skipped { why } => format!("left out: {why}"),
        Event::Begun { attempt: 1, .. } => format!("{undo}began"),
        Event::Begun { attempt, .. } => format!("{undo}began, for the {attempt}. time"),
        Event::Done { note } if note.is_empty() => format!("{undo}is done"),
        Event::Done { note } => format!("{undo}is done: {note}"),
        Event::Failed { why, cause } => match cause {
            Cause::Fault => format!("{undo}failed: {why}"),
            Cause::Clean => format!("{undo}failed, and changed nothing: {why}"),
            Cause::SourceLost => format!("{undo}lost the other site: {why}"),
        },
        Event::TimedOut => format!("{undo}took too long"),
        Event::SourceBack => "the other site is back".to_owned(),
        Event::Approved { comment } if comment.is_empty() => "approved".to_owned(),
        Event::Approved { comment } => format!("approved: {comment}"),
        Event::Refused { why } => format!("refused: {why}"),
        Event::Paused => "paused the run".to_owned(),
        Event::Continued => "let the run go on".to_owned(),
        Event::Aborted { rollback: true } => "aborted the run, to be rolled back".to_owned(),
        Event::Aborted { rollback: false } => "aborted the run where it was".to_owned(),
        Event::Answered { answer } => match answer {
            Answer::Repeat => "decided: repeat it",
            Answer::TakeAsDone => "decided: take it as done",
            Answer::Rollback => "decided: roll back",
            Answer::End => "decided: end the run where it is",
        }
        .to_owned(),
        Event::Restarted => "the daemon was restarted".to_owned(),
        Event::Ended { outcome } => format!("the run ended: {outcome}"),
    };
    EventReport {
        number: record.number,
        at: record.at.0,
        by: record.by.clone(),
        step: record.step.clone(),
        what,
        approval: match record.event {
            Event::Approved { .. } => Some(true),
            Event::Refused { .. } => Some(false),
            _ => None,
        },
    }
}
