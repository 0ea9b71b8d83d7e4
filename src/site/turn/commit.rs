//! A move or failover stays: no rollback any more.
//!
//! It is this site's decision alone, and durable here first. The source is told
//! now or when it is back; until it is, its copy stays as it was.

use std::sync::Arc;
use std::time::SystemTime;

use super::super::operate::{OperateError, failed};
use super::super::standby::Standby;
use super::super::{Site, unix_ns};
use super::view::CommitReport;
use crate::replicate::message::{Message, TurnMessage};

impl Site {
    /// Ends the window in which a guest that was moved or taken over can be
    /// rolled back. With `discard` its source ends the copy that it keeps at
    /// once; else that stays for a reprotection, which then sends less.
    ///
    /// # Errors
    /// When it does not run here, is being rolled back, or the commit cannot be
    /// written down; with `discard` also when the source cannot be told.
    pub async fn commit(
        self: &Arc<Self>,
        name: &str,
        discard: bool,
    ) -> Result<CommitReport, OperateError> {
        let standby = self.taken_over_named(name)?;
        let (from, committed_at) = {
            let mut state = standby.state.lock().await;
            let Some((active, _)) = &mut state.active else {
                return Err(not_here(&standby));
            };
            if active.returning.is_some() {
                return Err(OperateError::Conflict(format!(
                    "'{name}' is being rolled back to '{}'; see farhaven status",
                    standby.from()
                )));
            }
            let at = *active
                .committed_at
                .get_or_insert_with(|| unix_ns(SystemTime::now()));
            let kept = active.clone();
            self.keep_activation(&kept).map_err(failed)?;
            standby.see(|s| s.active = Some(kept));
            (standby.from(), at)
        };
        let told = self.tell_commit(&standby, discard).await;
        if discard && let Err(why) = &told {
            return Err(OperateError::Failed(format!(
                "'{name}' is committed, but its copy at '{from}' is still kept: {why}. Run this again when that site is back"
            )));
        }
        let note = match &told {
            Ok(()) => String::new(),
            Err(why) => format!("'{from}' is told when it is back ({why})"),
        };
        tracing::info!(guest = name, from, told = told.is_ok(), "committed");
        Ok(CommitReport {
            guest: name.to_owned(),
            from,
            committed_at,
            told: told.is_ok(),
            note,
        })
    }

    /// A guest of a peer that runs here.
    pub(in crate::site) fn taken_over_named(
        &self,
        name: &str,
    ) -> Result<Arc<Standby>, OperateError> {
        if let Some(standby) = self.standby_named(name) {
            return match standby.active() {
                Some(_) => Ok(standby),
                None => Err(not_here(&standby)),
            };
        }
        let record = self.guest(name)?;
        let view = self.source_view(&record);
        Err(OperateError::Conflict(match (view.phase, view.peer) {
            (super::super::view::Phase::Moved | super::super::view::Phase::Fenced, Some(peer)) => {
                format!("'{name}' runs at '{peer}': run this there")
            }
            _ => format!(
                "'{name}' is a guest of this site, and neither a move nor a failover of it waits for anything here"
            ),
        }))
    }

    /// Tells the source that the guest stays here.
    pub(super) async fn tell_commit(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        discard: bool,
    ) -> Result<(), String> {
        let guest = standby.guest;
        let told = Message::Turn(Box::new(TurnMessage::Commit { guest, discard }));
        let told = standby.remote().ask(told).await;
        told.map_err(|error| error.to_string())?;
        let mut state = standby.state.lock().await;
        if let Some((active, _)) = &mut state.active
            && active.committed_at.is_some()
            && !active.commit_told
        {
            active.commit_told = true;
            let kept = active.clone();
            // Else it is told once more.
            let _ = self.keep_activation(&kept);
            standby.see(|s| s.active = Some(kept));
        }
        Ok(())
    }
}

/// It is a peer's, and does not run here.
pub(in crate::site) fn not_here(standby: &Standby) -> OperateError {
    OperateError::Conflict(format!(
        "'{}' does not run here; it is protected to here from '{}'",
        standby.name(),
        standby.from()
    ))
}
