//! Protection the other way round: the guest that was moved or taken over
//! becomes a guest of this site, sent to the site that it came from.
//!
//! Four steps, each of which may be done already: that site makes a base of
//! what it has of the guest ([`super::base`]); the guest is written down as
//! this site's own, and its machine handed to what protects guests; protection
//! begins; its first point is sealed there. The base is compared unit by unit,
//! so only what differs is sent, whatever happened on either side.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use farhaven_policies::files::Mode;
use farhaven_policies::units::Period;
use farhaven_storage_sync::catalogue::Table;

use super::super::operate::{OperateError, failed};
use super::super::records::{Activation, GuestRecord, Owed, Protection};
use super::super::remote::{AskError, Remote};
use super::super::standby::{Standby, State, step};
use super::super::view::{ConsolePaths, Phase, bytes};
use super::super::{Site, guests};
use super::commit::not_here;
use super::view::ReprotectReport;
use crate::activate::place::Ready;
use crate::activate::point::boots;
use crate::activate::warm::ram_file;
use crate::guest::Definition;
use crate::guest::qemu::check::Severity;
use crate::replicate::message::{CommitTerms, Message, Opening, TurnMessage};

/// How often the other site is asked how far it is.
const POLL: Duration = Duration::from_millis(300);

/// The first point is waited for that long; protection goes on by itself.
const FIRST_POINT: Duration = Duration::from_secs(3600);

impl Site {
    /// Protects a guest that was moved or taken over to the site that it came
    /// from. Returns when its first point is sealed there.
    ///
    /// # Errors
    /// When it does not run here, was not committed, or its disks are not all
    /// here yet; when that site is not reached, or cannot take it. What was done
    /// stays, and the next call goes on from there.
    pub async fn reprotect(
        self: &Arc<Self>,
        name: &str,
        rpo: Option<Period>,
    ) -> Result<ReprotectReport, OperateError> {
        self.reprotect_owed(name, self.usually_owed(rpo)).await
    }

    /// As [`Site::reprotect`], by this policy.
    ///
    /// # Errors
    /// As of that.
    pub(in crate::site) async fn reprotect_owed(
        self: &Arc<Self>,
        name: &str,
        owed: Owed,
    ) -> Result<ReprotectReport, OperateError> {
        let begun = Instant::now();
        let mut before = "";
        let (to, base_bytes) = match self.standby_named(name) {
            Some(standby) => {
                let base_bytes = self.turn_here(&standby, owed).await?;
                (standby.from(), base_bytes)
            }
            // Asked for twice: whatever is missing is waited for.
            None => {
                before = "it was before; counted is all that was sent since";
                (self.protected_the_other_way(name)?, 0)
            }
        };
        let (point, changed_bytes, sent_bytes, mut note) = self.first_point(name).await?;
        if note.is_empty() {
            before.clone_into(&mut note);
        }
        Ok(ReprotectReport {
            guest: name.to_owned(),
            to,
            point,
            changed_bytes,
            sent_bytes,
            base_bytes,
            took_ms: begun.elapsed().as_millis() as u64,
            note,
        })
    }

    fn protected_the_other_way(&self, name: &str) -> Result<String, OperateError> {
        let record = self.guest(name)?;
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let turned = standbys
            .get(&record.id)
            .is_some_and(|standby| standby.is_turned());
        drop(standbys);
        let view = self.source_view(&record);
        match view.peer {
            Some(peer) if matches!(view.phase, Phase::Moved | Phase::Fenced) => Err(
                OperateError::Conflict(format!("'{name}' runs at '{peer}': run this there")),
            ),
            Some(peer) if turned => Ok(peer),
            _ => Err(OperateError::Conflict(format!(
                "'{name}' is a guest of this site and was not taken over from another; run: farhaven protect {name} --to SITE"
            ))),
        }
    }

    /// The first three steps; bytes of the base.
    async fn turn_here(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        owed: Owed,
    ) -> Result<u64, OperateError> {
        let mut owed = owed;
        if boots(&standby.opening().volumes) {
            // As it came: what is at the other site of it is disks, too.
            owed.policy.mode = Mode::DiskOnly;
            owed.policy.warm = false;
        }
        let remote = standby.remote().clone();
        self.may_turn(standby, &remote)?;
        self.hydrated(standby).await?;
        let base_bytes = self.base_is_made(standby, &remote).await?;
        if let Some(problem) = owed.policy.problems().first() {
            return Err(OperateError::Conflict(format!(
                "the policy cannot be kept: {} {}",
                problem.key, problem.what
            )));
        }
        let protection = Protection {
            guest: standby.guest,
            to: standby.from(),
            key: Some(remote.record.key),
            policy: owed.policy,
            schedule: owed.schedule,
            group: owed.group,
            share: owed.share,
            paused: false,
            seeded: false,
            moving: None,
            shut_down: false,
            held: None,
            moved: None,
            stopped: false,
            stopped_by: None,
            committed: false,
        };
        let mut state = standby.state.lock().await;
        let Some((active, ready)) = state.active.clone() else {
            return Err(not_here(standby));
        };
        let held = !ready.is_ended();
        let before = self
            .catalogue
            .find(Table::Guests, &standby.guest.to_string());
        let before = before.map_err(failed)?;
        let own = self.as_own(standby, &mut state, &active, &ready, &protection);
        let own = own.await;
        if own.is_err() && held && ready.is_ended() {
            // Let go of, and nobody else has it: else no newer term could stop it.
            self.not_own(standby, before);
            state.active = None;
            if let Err(error) = standby.adopt_in(&mut state, active.clone()).await {
                standby.keep_finding(active, &error);
            }
        }
        drop(state);
        let record = own?;
        tracing::warn!(
            guest = record.name,
            to = protection.to,
            "it turned round: it is protected to where it came from"
        );
        self.start_protection(protection)?;
        Ok(base_bytes)
    }

    fn may_turn(&self, standby: &Standby, remote: &Remote) -> Result<(), OperateError> {
        let (name, from) = (standby.name(), standby.from());
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let Some(active) = standby.active() else {
            return Err(not_here(standby));
        };
        if active.committed_at.is_none() {
            return conflict(format!(
                "'{name}' is not committed, and this uses up what a rollback returns to. Run first: farhaven commit {name}"
            ));
        }
        if !remote.connected() {
            return conflict(format!(
                "site '{from}' is not reached, and nothing was done; run this again when it is back"
            ));
        }
        if self
            .guest_records()
            .iter()
            .any(|r| r.name == name && r.id != standby.guest)
        {
            return conflict(format!(
                "this site has a guest named '{name}' of its own; end or remove that first: farhaven guest remove {name}"
            ));
        }
        Ok(())
    }

    /// Waits until its disks are all here.
    async fn hydrated(&self, standby: &Standby) -> Result<(), OperateError> {
        loop {
            let seen = standby.seen();
            match seen.active {
                Some(active) if active.hydrated => return Ok(()),
                Some(_) if seen.trouble.contains("stay on the store") => {
                    return Err(OperateError::Conflict(format!(
                        "'{}' still reads its disks from the store here, so nothing else can protect it: {}",
                        standby.name(),
                        seen.trouble
                    )));
                }
                Some(_) => tokio::time::sleep(POLL).await,
                None => return Err(not_here(standby)),
            }
        }
    }

    /// The other site makes a base of what it has; the bytes that it takes there.
    async fn base_is_made(
        &self,
        standby: &Arc<Standby>,
        remote: &Arc<Remote>,
    ) -> Result<u64, OperateError> {
        let told = standby.opening();
        let term = self.fence.current(standby.guest);
        let term = term.ok_or_else(|| failed("this guest has no term"))?;
        let opening = Opening {
            source: self.config.site.name.clone(),
            term,
            warm: self.config.protect.warm,
            retention: self.config.protect.retention.clone(),
            commit: CommitTerms::of(&self.config.protect),
            ..told
        };
        loop {
            let ask = Message::Turn(Box::new(TurnMessage::Turn(Box::new(opening.clone()))));
            match remote.ask(ask).await {
                Ok(Message::Turn(answer)) => match *answer {
                    TurnMessage::Turned { bytes, .. } => return Ok(bytes),
                    TurnMessage::Turning { done, total } => {
                        let site = standby.from();
                        standby.see(|s| {
                            s.trouble = format!(
                                "to be protected to '{site}': what is there of it is read, {} of {}",
                                bytes(done),
                                bytes(total)
                            );
                        });
                    }
                    _ => return Err(failed(AskError::Unfitting(standby.from()))),
                },
                Ok(_) => return Err(failed(AskError::Unfitting(standby.from()))),
                Err(AskError::Refused { why, .. }) => {
                    standby.see(|s| s.trouble.clear());
                    return Err(OperateError::Failed(format!(
                        "'{}' runs on here, unprotected: site '{}' refused: {why}",
                        standby.name(),
                        standby.from()
                    )));
                }
                // It goes on there, and is asked again.
                Err(AskError::Unreachable(_) | AskError::TimedOut(..)) => remote.reachable().await,
                Err(error) => return Err(failed(error)),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The guest is written down as this site's own, and its machine let go of.
    /// Nothing of it stops.
    async fn as_own(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        active: &Activation,
        ready: &Arc<Ready>,
        protection: &Protection,
    ) -> Result<GuestRecord, OperateError> {
        let (_, context) = standby.open_in_part(active.point).map_err(failed)?;
        let ram = self.ram_of_its_own(standby, active).map_err(failed)?;
        let record = match &context.definition {
            Definition::Embedded(definition) => {
                let vmm = ready.vmm().ok_or_else(|| failed("its monitor is gone"))?;
                let record =
                    self.embed_as(standby.guest, &standby.name(), vmm, definition.clone())?;
                let record = GuestRecord {
                    console: ConsolePaths::beside(active.directory()),
                    run: Some(active.directory().to_owned()),
                    ..record
                };
                self.keep_guest(&record)?;
                record
            }
            Definition::Qemu(_) => {
                let qmp = active.qmp.clone();
                let qmp = qmp.ok_or_else(|| failed("its QEMU has no control socket"))?;
                // QEMU has one client at a time.
                let releasing = ready.clone();
                step(move || releasing.release()).await.map_err(failed)?;
                let asked = qmp.clone();
                let definition = step(move || guests::define(&asked)).await.map_err(failed)?;
                let record = GuestRecord {
                    id: standby.guest,
                    name: standby.name(),
                    qmp: Some(qmp),
                    console: ConsolePaths::beside(active.directory()),
                    run: Some(active.directory().to_owned()),
                    definition: placed(definition.map_err(failed)?, &ram),
                };
                let fits = self.fits_at(&record, standby.remote());
                self.unless_overruled(&[standby.guest], fits).await??;
                self.keep_guest(&record)?;
                record
            }
        };
        // In this order: a daemon that starts anew goes by the protection.
        self.keep_protection(protection).map_err(failed)?;
        standby.turn(true, standby.base());
        self.keep_standby(standby).map_err(failed)?;
        standby.forget_activation(self).map_err(failed)?;
        state.active = None;
        standby.see(|s| {
            s.active = None;
            s.hydration = None;
            s.trouble.clear();
        });
        Ok(record)
    }

    /// It did not become this site's own: it is the other's still, taken over here. What
    /// cannot be taken back of that goes with the daemon's next start.
    fn not_own(&self, standby: &Standby, before: Option<GuestRecord>) {
        let key = standby.guest.to_string();
        standby.turn(false, standby.base());
        let kept = self.keep_standby(standby);
        let unprotected = self.catalogue.remove(Table::Protections, &key).map(drop);
        let forgotten = match before {
            Some(record) => self.catalogue.put(Table::Guests, &key, &record),
            None => {
                self.drop_guest_notes(standby.guest);
                self.catalogue.remove(Table::Guests, &key).map(drop)
            }
        };
        for done in [kept, unprotected, forgotten, self.catalogue.flush()] {
            if let Err(error) = done {
                tracing::error!(guest = key, %error, "the catalogue cannot be written");
            }
        }
    }

    /// What stops it from running at the other site.
    async fn fits_at(&self, record: &GuestRecord, remote: &Remote) -> Result<(), OperateError> {
        let findings = guests::check_at_peer(record, remote).await;
        let mut blocks = findings.iter().filter(|f| f.severity == Severity::Blocks);
        match blocks.next() {
            Some(finding) => Err(OperateError::Conflict(format!(
                "'{}' runs on here and cannot be protected to '{}': {}; {}",
                record.name, remote.record.site, finding.what, finding.mend
            ))),
            None => Ok(()),
        }
    }

    /// Its RAM files, under a name that no point of a peer is filled into.
    fn ram_of_its_own(&self, standby: &Standby, active: &Activation) -> std::io::Result<PathBuf> {
        let shared = self.config.ram_dir().join(standby.guest.to_string());
        let own = shared.with_file_name(format!("{}-t{}", standby.guest, active.term.number));
        if !super::super::exists(&own) && super::super::exists(&shared) {
            std::fs::rename(&shared, &own)?;
        }
        Ok(own)
    }

    /// Waits for its first point; what that took.
    async fn first_point(&self, name: &str) -> Result<(u64, u64, u64, String), OperateError> {
        let record = self.guest(name)?;
        let until = Instant::now() + FIRST_POINT;
        loop {
            let view = self.source_view(&record);
            let (changed, sent) = (view.guest_bytes, view.wan_bytes);
            if view.points_sealed > 0 {
                return Ok((view.newest_point, changed, sent, String::new()));
            }
            // One that has just begun has no phase yet.
            let driven = self.driver_of(record.id).is_some();
            if !driven || matches!(view.phase, Phase::Fenced | Phase::Moved) {
                return Err(OperateError::Failed(format!(
                    "'{name}' is {} now; see farhaven status",
                    view.phase.words()
                )));
            }
            if Instant::now() > until {
                let note = format!(
                    "its first point is still under way ({}); see farhaven status",
                    view.trouble
                );
                return Ok((0, changed, sent, note));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// A daemon that was killed amid a reprotection starts anew: what was left
    /// of the takeover is forgotten, once the guest is this site's own.
    pub(in crate::site) fn finish_turning(self: &Arc<Self>, standby: &Standby) {
        let key = standby.guest.to_string();
        let kept = self.keep_standby(standby);
        let forgotten = kept.and_then(|()| match self.activation(standby.guest)? {
            Some(_) => standby.forget_activation(self),
            None => Ok(()),
        });
        if let Err(error) = forgotten {
            tracing::error!(guest = key, table = ?Table::Activations, %error, "the catalogue cannot be written");
        }
    }
}

/// The definition with its RAM files where they are by now.
fn placed(definition: Definition, ram: &Path) -> Definition {
    let Definition::Qemu(mut qemu) = definition else {
        return definition;
    };
    for block in &mut qemu.ram {
        let moved = ram_file(ram, &block.id);
        if super::super::exists(&moved) {
            block.path = Some(moved);
        }
    }
    Definition::Qemu(qemu)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
