//! The source's part of a runbook's `shutdown-source`: a guest is shut down here,
//! cleanly, and stands until the run, or an operator, starts it again.
//!
//! That is written down before the guest is asked: a daemon that comes back knows
//! why it stands. Its points go on meanwhile, all of the disks that it left.

use std::sync::Arc;
use std::time::Duration;

use farhaven_policies::files::Mode;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;
use tokio::sync::oneshot;

use super::hold::{driver_of, have_driver_do, not_protected};
use crate::guest::Guest;
use crate::replicate::message::{Message, Refusal};
use crate::site::Site;
use crate::site::answer::refused;
use crate::site::commands::Command;
use crate::site::driver::{Attached, DriveError, Driver};
use crate::site::records::GuestRecord;
use crate::site::remote::Remote;
use crate::site::steps::{blocking, take};

/// Longest that a guest may take, whatever a peer says: its protection waits for it.
const LONGEST: Duration = Duration::from_secs(900);

/// To whom it is told that a guest is down, or runs.
type Reply = oneshot::Sender<Result<(), String>>;

/// What a run at the peer, or an operator, has done with a guest's power.
#[derive(Debug)]
pub(in crate::site) enum PowerOrder {
    /// Shut it down within this time.
    Off(Duration, Reply),
    /// Boot it, if it does not run.
    On(Reply),
}

/// Answers a target that has a guest shut down, or asks whether it could be.
pub(super) async fn shut_down(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    guest: GuestId,
    within_ms: Option<u64>,
) -> Message {
    if driver_of(site, remote, guest).is_none() {
        return not_protected();
    }
    if let Some(why) = cannot_shut_down(site, guest) {
        return refused(Refusal::Unable, why);
    }
    match within_ms {
        None => Message::Done,
        Some(ms) => {
            let within = Duration::from_millis(ms).min(LONGEST);
            let off = |reply| Command::Power(PowerOrder::Off(within, reply));
            have_driver_do(site, remote, guest, off).await
        }
    }
}

/// Answers a target that has a guest started again.
pub(super) async fn start_again(site: &Arc<Site>, remote: &Arc<Remote>, guest: GuestId) -> Message {
    let on = |reply| Command::Power(PowerOrder::On(reply));
    have_driver_do(site, remote, guest, on).await
}

/// Why a guest is not shut down for a run, as far as that is known beforehand.
fn cannot_shut_down(site: &Site, guest: GuestId) -> Option<String> {
    let record = site
        .catalogue
        .find::<GuestRecord>(Table::Guests, &guest.to_string());
    let Ok(Some(record)) = record else {
        return Some("that guest is not known there".to_owned());
    };
    if record.definition.is_embedded() {
        return Some(format!(
            "'{}' runs inside of the daemon, and cannot be shut down from outside, nor boot at the peer; it is moved running",
            record.name
        ));
    }
    (site.mode_of(guest) != Mode::DiskOnly).then(|| {
        format!(
            "'{0}' is protected with its memory, and goes on from that at the peer without any boot; it is moved running. To have it shut down first: set mode = \"disk-only\" in its policy, then farhaven unprotect {0} --discard there and protect it anew",
            record.name
        )
    })
}

impl Driver {
    /// It is down for a run, or is not any more: for the catalogue and the status.
    pub(in crate::site) fn is_shut_down(&mut self, down: bool) {
        self.protection.shut_down = down;
        self.view.send_modify(|v| v.shut_down = down);
    }

    /// What is asked of an attached guest.
    pub(in crate::site) async fn power(
        &mut self,
        attached: &mut Attached,
        order: PowerOrder,
    ) -> Result<(), DriveError> {
        let (done, reply) = match order {
            PowerOrder::Off(within, reply) => (self.power_off(attached, within).await, reply),
            PowerOrder::On(reply) => (self.power_on(attached).await, reply),
        };
        match done {
            Ok(()) => {
                let _ = reply.send(Ok(()));
                Ok(())
            }
            // It runs as before, and its protection goes on in this attempt.
            Err(DriveError::TooLong(why)) => {
                let _ = reply.send(Err(why));
                Ok(())
            }
            Err(error) => {
                let _ = reply.send(Err(format!("'{}': {error}", self.record.name)));
                Err(error)
            }
        }
    }

    async fn power_off(
        &mut self,
        attached: &mut Attached,
        within: Duration,
    ) -> Result<(), DriveError> {
        let name = self.record.name.clone();
        self.is_shut_down(true);
        if let Err(why) = self.keep_protection().await {
            self.is_shut_down(false);
            return Err(DriveError::Other(format!(
                "it runs on: that it is to be shut down cannot be written down: {why}"
            )));
        }
        self.view.send_modify(|v| {
            v.trouble = format!("'{name}' shuts down here, as a run at its peer wants it");
        });
        let why = match self.have_shut_down(attached, within, false).await {
            Ok(true) => {
                tracing::warn!(guest = %name, "it is shut down here for a run at its peer");
                let told = self.down_for_a_run();
                self.view.send_modify(|v| v.trouble = told);
                return Ok(());
            }
            Ok(false) => DriveError::TooLong(format!(
                "'{name}' was asked to shut down and had not within {within:?}: neither by its agent nor by its power button. It runs on (and may shut down still; its QEMU ends then). Shut it down by hand, or start its guest agent"
            )),
            Err(error) => error,
        };
        self.is_shut_down(false);
        let _ = self.keep_protection().await;
        self.view.send_modify(|v| v.trouble.clear());
        Err(why)
    }

    async fn power_on(&mut self, attached: &mut Attached) -> Result<(), DriveError> {
        self.site.fence.may_run(self.record.id, self.site.key())?;
        let mut guest = take(&mut attached.guest)?;
        let (guest, booted) = blocking(move || {
            let booted = boot(&mut *guest);
            (guest, booted)
        })
        .await?;
        attached.guest = Some(guest);
        booted?;
        self.runs_again().await
    }

    /// What is asked of a guest that nobody is attached to.
    pub(in crate::site) async fn power_alone(&mut self, order: PowerOrder) {
        let (done, reply) = match order {
            // The last changes of one that is held were taken when it was down.
            PowerOrder::Off(_, reply) if self.protection.shut_down => (Ok(()), reply),
            PowerOrder::Off(_, reply) => (Err(self.not_attached()), reply),
            PowerOrder::On(reply) if self.protection.moving.is_some() => {
                let why = format!(
                    "'{}' is held for a move, whose end is not known yet; see farhaven status there",
                    self.record.name
                );
                (Err(why), reply)
            }
            PowerOrder::On(reply) => {
                let booted = self.boot_unattached().await;
                (booted.map_err(|error| error.to_string()), reply)
            }
        };
        let _ = reply.send(done);
    }

    async fn boot_unattached(&mut self) -> Result<(), DriveError> {
        self.site.fence.may_run(self.record.id, self.site.key())?;
        let (site, record) = (self.site.clone(), self.record.clone());
        blocking(move || {
            let mut guest = site.attach(&record, site.tracking_key.clone(), 1)?;
            // Attaching may have taken a while.
            site.still_ours(record.id)?;
            boot(&mut *guest)
        })
        .await??;
        self.runs_again().await
    }

    async fn runs_again(&mut self) -> Result<(), DriveError> {
        if !self.protection.shut_down {
            return Ok(());
        }
        self.is_shut_down(false);
        self.view.send_modify(|v| v.trouble.clear());
        tracing::warn!(guest = %self.record.name, "it was shut down for a run, and boots here again");
        self.keep_protection().await.map_err(DriveError::Other)
    }

    fn down_for_a_run(&self) -> String {
        format!(
            "'{0}' is shut down here for a run at '{1}', which starts it there, or here again when it is rolled back (there: farhaven run list). If no run has it any more: farhaven take-back {0} --force boots it here",
            self.record.name, self.protection.to
        )
    }

    /// What to tell of a guest that stood before its last cut; `None` if it runs.
    pub(in crate::site) async fn why_it_stands(&mut self, running: Option<bool>) -> Option<String> {
        match running {
            Some(false) if self.protection.shut_down => Some(self.down_for_a_run()),
            Some(false) => Some(format!(
                "'{}' is stopped here, and was before its last cut; its points go on, all of the instant at which it stopped. If it should run, let it go on where it was stopped",
                self.record.name
            )),
            Some(true) if self.protection.shut_down => {
                // By hand, or it never went down before this daemon's end.
                self.is_shut_down(false);
                let _ = self.keep_protection().await;
                None
            }
            _ => None,
        }
    }
}

fn boot(guest: &mut dyn Guest) -> Result<(), crate::guest::GuestError> {
    match guest.running() {
        Some(true) => Ok(()),
        _ => guest.resume(),
    }
}
