//! Guests that run here: known, checked, protected, moved, as operators ask for it.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use farhaven_policies::files::Mode;
use farhaven_policies::units::Period;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;

use super::Site;
use super::commands::Convoy;
use super::driver::{Command, NotMoved};
use super::events::EventKind;
use super::operate::{OperateError, failed};
use super::records::{GuestRecord, Owed, Protection};
use super::view::{MoveOutlook, MoveReport, Phase};
use crate::replicate::message::Message;

/// The peer may have to wait for the end of shipments before it drops points.
const CLOSE: Duration = Duration::from_secs(330);

impl Site {
    pub(super) fn guest_records(&self) -> Vec<GuestRecord> {
        match self.catalogue.list::<GuestRecord>(Table::Guests) {
            Ok(records) => records.into_iter().map(|(_, record)| record).collect(),
            Err(error) => {
                tracing::error!(%error, "the catalogue cannot be read");
                Vec::new()
            }
        }
    }

    /// A guest that runs here, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn guest(&self, name: &str) -> Result<GuestRecord, OperateError> {
        let records = self.guest_records();
        if let Some(record) = records.iter().find(|r| r.name == name) {
            return Ok(record.clone());
        }
        let known: Vec<_> = records.iter().map(|r| r.name.as_str()).collect();
        let from = self.standby_named(name).map(|s| s.from());
        Err(OperateError::Unknown(match (from, known.as_slice()) {
            (Some(from), _) => format!(
                "'{name}' is a guest of site '{from}', protected to here; ask there, or take it over: farhaven failover {name}"
            ),
            (None, []) => {
                format!("no guest '{name}'; add it: farhaven guest add {name} --qmp PATH")
            }
            (None, known) => format!("no guest '{name}' here; known: {}", known.join(", ")),
        }))
    }

    /// May a new guest be called so?
    pub(super) fn free_name(&self, name: &str) -> Result<(), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if !is_guest_name(name) {
            return conflict(format!(
                "'{name}' is no name for a guest: use up to 63 letters, digits, '-', '_' and '.'"
            ));
        }
        let records = self.guest_records();
        if let Some(other) = records.iter().find(|r| r.name == name) {
            return conflict(match &other.qmp {
                Some(qmp) => format!("guest '{name}' is known already, at {}", qmp.display()),
                None => match self.hosted_lost(other).as_str() {
                    "" => format!("guest '{name}' is known already, inside of this daemon"),
                    lost => lost.to_owned(),
                },
            });
        }
        if self.standby_named(name).is_some() {
            return conflict(format!(
                "a peer protects a guest named '{name}' to here; choose another name"
            ));
        }
        Ok(())
    }

    /// Makes a running QEMU known as a guest.
    ///
    /// # Errors
    /// When the name is taken, or QEMU cannot be asked.
    pub async fn add_guest(
        self: &Arc<Self>,
        name: &str,
        qmp: &Path,
    ) -> Result<GuestRecord, OperateError> {
        self.free_name(name)?;
        let records = self.guest_records();
        if let Some(other) = records.iter().find(|r| r.qmp.as_deref() == Some(qmp)) {
            return Err(OperateError::Conflict(format!(
                "guest '{}' is known already, at {}",
                other.name,
                qmp.display()
            )));
        }
        let path = qmp.to_owned();
        let definition = crate::work::spawn_blocking(move || super::guests::define(&path))
            .await
            .map_err(failed)?
            .map_err(failed)?;
        let record = GuestRecord {
            id: GuestId::random(),
            name: name.to_owned(),
            qmp: Some(qmp.to_owned()),
            console: None,
            run: None,
            definition,
        };
        self.keep_guest(&record)?;
        Ok(record)
    }

    /// Puts a guest into the catalogue, durably. Of two that came at once with
    /// one name, one is refused.
    pub(super) fn keep_guest(&self, record: &GuestRecord) -> Result<(), OperateError> {
        let _one_at_a_time = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let name = &record.name;
        let mut records = self.guest_records().into_iter();
        if records.any(|r| r.name == *name && r.id != record.id) {
            return Err(OperateError::Conflict(format!(
                "guest '{name}' is known already"
            )));
        }
        self.note_guest(record);
        self.catalogue
            .put(Table::Guests, &record.id.to_string(), record)
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)
    }

    /// Forgets a guest that is not protected; it runs on.
    ///
    /// # Errors
    /// When there is none, or it is protected.
    pub fn remove_guest(&self, name: &str) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        if drivers.contains_key(&record.id) {
            return Err(OperateError::Conflict(format!(
                "'{name}' is protected; run first: farhaven unprotect {name}"
            )));
        }
        drop(drivers);
        self.unless_seeding(record.id, || Ok(()))?;
        if self.hosted(record.id).is_some() {
            return Err(OperateError::Conflict(format!(
                "'{name}' lives in this daemon, and forgotten it could not be reached any more; to end it: farhaven guest end {name}"
            )));
        }
        self.clear_hosted(&record);
        self.drop_guest_notes(record.id);
        self.catalogue
            .remove(Table::Guests, &record.id.to_string())
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)
    }

    /// Protects a guest to a peer.
    ///
    /// # Errors
    /// When it is protected already, or its check finds what blocks it.
    pub async fn protect(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        rpo: Option<Period>,
    ) -> Result<(), OperateError> {
        self.begin_protection(name, to, self.usually_owed(rpo), false)
            .await
    }

    /// As [`Site::protect`], but the first copy comes by a seed
    /// ([`Site::export_seed`]): nothing is sent before the peer has imported it.
    ///
    /// # Errors
    /// As of [`Site::protect`].
    pub async fn protect_seeded(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        rpo: Option<Period>,
    ) -> Result<(), OperateError> {
        self.begin_protection(name, to, self.usually_owed(rpo), true)
            .await
    }

    /// What a guest is owed by the site's configuration and an operator's word.
    pub(super) fn usually_owed(&self, rpo: Option<Period>) -> Owed {
        let mut policy = self.config.protect.clone();
        policy.rpo = rpo.unwrap_or(policy.rpo);
        Owed {
            policy,
            schedule: None,
            group: None,
            share: None,
        }
    }

    pub(super) async fn begin_protection(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        owed: Owed,
        seeded: bool,
    ) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let remote = self.remote(to).ok_or_else(|| self.no_peer(to))?;
        let elsewhere = self.fence.may_run(record.id, self.key());
        if let Err(error) = elsewhere {
            return Err(OperateError::Conflict(error.to_string()));
        }
        let current = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers
                .get(&record.id)
                .and_then(|d| d.view.borrow().peer.clone())
        };
        if let Some(peer) = current {
            return Err(OperateError::Conflict(format!(
                "'{name}' is protected to '{peer}' already; to change that: farhaven unprotect {name}"
            )));
        }
        self.unless_seeding(record.id, || Ok(()))?;
        if owed.policy.mode == Mode::DiskOnly && record.definition.is_embedded() {
            return Err(OperateError::Conflict(format!(
                "'{name}' lives in this daemon and cannot boot from its disks, which is all that mode disk-only copies; protect it with its memory (mode = \"memory\")"
            )));
        }
        self.unblocked(name, to, owed.policy.mode).await?;
        if let Some(problem) = owed.policy.problems().first() {
            return Err(OperateError::Conflict(format!(
                "the policy cannot be kept: {} {}",
                problem.key, problem.what
            )));
        }
        self.start_protection(Protection {
            guest: record.id,
            to: to.to_owned(),
            key: Some(remote.record.key),
            policy: owed.policy,
            schedule: owed.schedule,
            group: owed.group,
            share: owed.share,
            paused: false,
            seeded,
            moving: None,
            shut_down: false,
            held: None,
            moved: None,
            stopped: false,
            stopped_by: None,
            committed: false,
        })
    }

    pub(super) fn start_protection(
        self: &Arc<Self>,
        protection: Protection,
    ) -> Result<(), OperateError> {
        // Not beside an export: two would be attached to one guest.
        self.unless_seeding(protection.guest, || {
            self.keep_protection(&protection).map_err(failed)?;
            self.drive(protection).map_err(OperateError::Failed)
        })
    }

    pub(super) async fn command(&self, name: &str, command: Command) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let driver = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.get(&record.id).cloned()
        };
        let driver = driver.ok_or_else(|| {
            OperateError::Conflict(format!(
                "'{name}' is not protected; run: farhaven protect {name} --to SITE"
            ))
        })?;
        driver.commands.try_send(command).map_err(|_| {
            OperateError::Conflict(format!("'{name}' has too many commands waiting; try again"))
        })
    }

    /// Stops cutting until resumed.
    ///
    /// # Errors
    /// When the guest is not protected.
    pub async fn pause(&self, name: &str) -> Result<(), OperateError> {
        self.command(name, Command::Pause).await
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// When the guest is not protected.
    pub async fn resume(&self, name: &str) -> Result<(), OperateError> {
        self.command(name, Command::Resume).await
    }

    /// Ends protection. With `discard` the peer drops its points, too.
    ///
    /// # Errors
    /// When the guest is not protected, or the peer refuses to discard.
    pub async fn unprotect(&self, name: &str, discard: bool) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        self.in_no_file(&record)?;
        if self.unprotect_left(&record)? {
            return match discard {
                false => Ok(()),
                true => Err(OperateError::Failed(format!(
                    "protection of '{name}' has ended, but its points are still at a site that is paired no more"
                ))),
            };
        }
        let view = self.source_view(&record);
        if view.phase == Phase::Held {
            return Err(OperateError::Conflict(format!(
                "'{name}' is held for a move whose end is not known; see farhaven status"
            )));
        }
        if view.shut_down {
            return Err(OperateError::Conflict(format!(
                "'{name}' is shut down here for a run at its peer, which is to start it again (there: farhaven run abort RUN --rollback). If no run has it any more: farhaven take-back {name} --force, then unprotect it"
            )));
        }
        self.command(name, Command::End).await?;
        let driver = {
            let mut drivers = self.drivers.write().unwrap_or_else(PoisonError::into_inner);
            drivers.remove(&record.id)
        };
        if let Some(driver) = driver {
            // Its end drops the receiver: nothing is attached to the guest any more.
            let _ = tokio::time::timeout(Duration::from_secs(30), driver.commands.closed()).await;
        }
        // Not before: until its end the driver may write it.
        self.drop_protection_note(record.id);
        self.catalogue
            .remove(Table::Protections, &record.id.to_string())
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        self.sealed.forget(record.id);
        if let Some(remote) = view.peer.as_deref().and_then(|p| self.remote(p)) {
            let closed = remote
                .ask_within(
                    Message::Close {
                        guest: record.id,
                        discard,
                    },
                    CLOSE,
                )
                .await;
            if let (Err(error), true) = (closed, discard) {
                return Err(OperateError::Failed(format!(
                    "protection of '{name}' has ended, but its points at the peer are still there: {error}"
                )));
            }
        }
        Ok(())
    }

    /// Moves a guest to its peer, if it will stand no longer than its policy
    /// allows (`protect.max_blackout`), or that is accepted.
    ///
    /// # Errors
    /// When it is not protected at this moment, it would stand too long
    /// ([`OperateError::TooLong`]), or the move failed; the message says where
    /// the guest runs.
    pub async fn move_guest(
        &self,
        name: &str,
        accept_pause: bool,
    ) -> Result<MoveReport, OperateError> {
        self.move_among(name, accept_pause, None).await
    }

    /// As [`Site::move_guest`], as one of many.
    pub(super) async fn move_among(
        &self,
        name: &str,
        accept_pause: bool,
        convoy: Option<Convoy>,
    ) -> Result<MoveReport, OperateError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let order = Command::Move {
            accept_pause,
            convoy,
            reply,
        };
        self.command(name, order).await?;
        let moved = answer
            .await
            .map_err(|_| OperateError::Failed("the daemon is shutting down".to_owned()))?;
        if let Ok(report) = &moved {
            let what = format!("'{name}' was moved to '{}', nothing was lost", report.to);
            self.note(EventKind::Moved, name, &what);
        }
        moved.map_err(|why| match why {
            NotMoved::TooLong(why) => OperateError::TooLong(why),
            NotMoved::GivenUp(why) => OperateError::Conflict(why),
            NotMoved::Failed(why) => OperateError::Failed(why),
        })
    }

    /// What a move now would take, by what its newest point showed: nothing is
    /// done. A move takes rounds, and throttles, so it may do better.
    ///
    /// # Errors
    /// When the guest is not protected, or nothing was measured yet.
    pub fn move_outlook(&self, name: &str) -> Result<MoveOutlook, OperateError> {
        let view = self.source_view(&self.guest(name)?);
        let measured = view.outlook.ok_or_else(|| {
            OperateError::Conflict(format!(
                "nothing was measured of '{name}' yet: that takes a point that was sealed since this daemon started (see farhaven status)"
            ))
        })?;
        Ok(measured.under(self.limits.together()))
    }

    /// Runs a held guest here again, by an operator's decision.
    ///
    /// # Errors
    /// Without `force`; when it is not held; when it cannot be resumed.
    pub async fn take_back(self: &Arc<Self>, name: &str, force: bool) -> Result<(), OperateError> {
        if !force {
            return Err(OperateError::Conflict(format!(
                "taking '{name}' back without the peer's word may leave it running twice. Make sure that it does not run at the peer, then add --force"
            )));
        }
        if let Some(standby) = self.standby_named(name) {
            return self.take_back_here(&standby).await;
        }
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.command(name, Command::TakeBack(reply)).await?;
        answer
            .await
            .map_err(|_| OperateError::Failed("the daemon is shutting down".to_owned()))?
            .map_err(OperateError::Failed)
    }
}

/// May a guest be called so?
pub(super) fn is_guest_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 63 && name.chars().all(plain) && !name.starts_with(['-', '.'])
}
