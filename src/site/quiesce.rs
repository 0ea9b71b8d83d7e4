//! Filesystems frozen by the guest's agent for its points: when that is asked,
//! and what is told of it.

use std::time::Duration;

mod thaw;

use farhaven_policies::alert::Severity;
use farhaven_policies::files::Quiesce;
use tokio::sync::oneshot;

use super::alerts::{Alert, Kind};
use super::cut::Made;
use super::driver::{Attached, DriveError, Driver};
use super::steps::{blocking, take};
use crate::guest::{After, Quiesced};

/// An agent answers a question within this time.
const ANSWER: Duration = Duration::from_secs(5);

/// Cuts that a runbook has frozen when it asks for a point: those of a group are
/// asked one after the other, and the second is the first of all of them.
const CUTS: u8 = 2;

impl Driver {
    /// Is the next cut to be one of frozen filesystems? How long its agent has for that.
    ///
    /// A guest that is handed over goes on from its memory: its last cut is one
    /// of frozen filesystems only where a runbook says so.
    pub(super) fn quiesces(&self, after: After) -> Option<Duration> {
        if self.protection.shut_down {
            // It has written everything, and nobody is there to freeze.
            return None;
        }
        let policy = &self.protection.policy;
        let by_policy = policy.quiesce == Quiesce::Agent && after == After::Continue;
        let asked = by_policy || self.quiesce_next > 0;
        asked.then(|| policy.quiesce_timeout.duration())
    }

    /// What came of it.
    pub(super) fn was_quiesced(&mut self, made: &mut Made, asked: Option<Duration>) {
        if asked.is_none() {
            if self.protection.policy.quiesce == Quiesce::None {
                self.site.clear(Kind::NotQuiesced, &self.record.name);
            }
            return;
        }
        self.quiesce_next = self.quiesce_next.saturating_sub(1);
        if made.quiesced == Quiesced::NotAsked {
            let why = match self.record.definition.is_embedded() {
                true => "a guest inside of the daemon has no guest agent",
                false => "the guest is stopped, and so is its agent",
            };
            made.quiesced = Quiesced::Failed(why.to_owned());
        }
        let name = &self.record.name;
        match &made.quiesced {
            Quiesced::Failed(why) => self.site.raise(Alert::new(
                Kind::NotQuiesced,
                name,
                Severity::Warning,
                format!("point {} of '{name}' is crash-consistent, not application-consistent: {why}", made.point),
                format!("see: farhaven guest check {name}; start qemu-guest-agent in the guest, or take quiesce = \"agent\" out of its policy"),
            )),
            Quiesced::Frozen { filesystems } => {
                tracing::debug!(guest = name, filesystems, "frozen for this cut");
                self.site.clear(Kind::NotQuiesced, name);
            }
            Quiesced::NotAsked => {}
        }
    }

    /// A run at the peer asks whether the agent answers.
    pub(super) async fn ask_agent(
        &mut self,
        attached: &mut Attached,
        next_points: bool,
        reply: oneshot::Sender<Result<(), String>>,
    ) -> Result<(), DriveError> {
        let mut guest = take(&mut attached.guest)?;
        let asked = blocking(move || {
            let answered = guest.ask_agent(ANSWER);
            (guest, answered)
        });
        let (guest, answered) = self.finishing(asked).await?;
        attached.guest = Some(guest);
        if answered.is_ok() && next_points {
            self.quiesce_next = CUTS;
        }
        let name = &self.record.name;
        let _ = reply.send(answered.map_err(|why| format!("'{name}': {why}")));
        Ok(())
    }
}
