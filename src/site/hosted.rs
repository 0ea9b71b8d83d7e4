//! Guests whose monitor lives in this process: made known, reached by their
//! drivers, ended. They end with the daemon; their records stay, and say so.

use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::GuestId;

use super::Site;
use super::guests::ended_with_daemon;
use super::operate::{OperateError, failed};
use super::records::{GuestRecord, Protection};
use super::standby::{Standby, step};
use super::view::ConsolePaths;
use crate::activate::machine::Builders;
use crate::guest::embedded::engine::EmbeddedGuest;
use crate::guest::embedded::{self, SharedVmm, Vmm};
use crate::guest::qemu::check::Finding;
use crate::guest::sim::{self, SimBuilder};
use crate::guest::{Definition, Guest, GuestError};

/// A step with a machine is waited for that long when the daemon stops.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// Builders of the guests that this crate brings, by their kind.
pub fn builders() -> Builders {
    let mut builders = Builders::new();
    builders.insert(sim::KIND.to_owned(), Arc::new(SimBuilder));
    #[cfg(target_arch = "x86_64")]
    builders.insert(
        crate::guest::kvm::machine::KIND.to_owned(),
        Arc::new(crate::guest::kvm::KvmBuilder),
    );
    builders
}

impl Site {
    /// Makes a guest known whose monitor lives in this process. From then on it
    /// is protected, moved and taken over as any other, by name. It ends with
    /// this process; its record stays, so that its points can be found, and a
    /// later process takes the record over with a guest of the same name,
    /// memory and disks.
    ///
    /// # Errors
    /// When the name is taken, or the definition tells of other memory or
    /// disks than the monitor has.
    pub fn embed(
        self: &Arc<Self>,
        name: &str,
        vmm: SharedVmm,
        definition: embedded::Definition,
    ) -> Result<GuestRecord, OperateError> {
        let known = self.guest_records().into_iter().find(|r| r.name == name);
        let id = match known {
            Some(record) => self.may_return(&record, &definition)?,
            None => {
                self.free_name(name)?;
                GuestId::random()
            }
        };
        self.embed_as(id, name, vmm, definition)
    }

    /// Its record may go on with a guest of this definition.
    fn may_return(
        &self,
        record: &GuestRecord,
        definition: &embedded::Definition,
    ) -> Result<GuestId, OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let name = &record.name;
        let Definition::Embedded(before) = &record.definition else {
            return conflict(format!("guest '{name}' is known already, as a QEMU"));
        };
        if self.hosted(record.id).is_some() {
            return conflict(format!("guest '{name}' is here already"));
        }
        if let Err(error) = self.fence.may_run(record.id, self.key()) {
            return conflict(error.to_string());
        }
        // Its term is written down before the peer runs it: until the peer's word
        // comes, the fence alone does not tell.
        let kept = self
            .catalogue
            .find::<Protection>(Table::Protections, &record.id.to_string())
            .map_err(failed)?;
        if let Some(held) = kept.filter(|kept| kept.moving.is_some()) {
            return conflict(format!(
                "'{name}' was stopped for a move to '{0}', and may run there: its word is waited for (see farhaven status). If that site is lost for good: farhaven take-back {name} --force, then start it again",
                held.to
            ));
        }
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        if drivers.contains_key(&record.id) && before != definition {
            return conflict(format!(
                "guest '{name}' is protected, and was another machine before; run first: farhaven unprotect {name} --discard"
            ));
        }
        Ok(record.id)
    }

    pub(super) fn embed_as(
        &self,
        id: GuestId,
        name: &str,
        vmm: SharedVmm,
        definition: embedded::Definition,
    ) -> Result<GuestRecord, OperateError> {
        let definition = Definition::from(definition);
        if let Some(why) = definition.unsound() {
            return Err(OperateError::Conflict(format!("'{name}': {why}")));
        }
        {
            let vmm = lock(&vmm);
            let ram: Vec<_> = vmm
                .ram()
                .iter()
                .map(|b| (b.name.as_str(), b.bytes))
                .collect();
            let disks: Vec<_> = vmm.disks().iter().map(|d| (d.name(), d.bytes())).collect();
            if ram != definition.ram() || disks != definition.disks() {
                return Err(OperateError::Conflict(format!(
                    "the definition of '{name}' tells of other memory or disks than its monitor has; tell the same names and sizes in both"
                )));
            }
        }
        let record = GuestRecord {
            id,
            name: name.to_owned(),
            qmp: None,
            console: ConsolePaths::beside(&self.run_directory(id)),
            run: None,
            definition,
        };
        self.keep_guest(&record)?;
        let mut hosted = self.hosted.write().unwrap_or_else(PoisonError::into_inner);
        hosted.insert(id, vmm);
        Ok(record)
    }

    /// The guest's monitor, while it is here.
    pub(super) fn hosted(&self, guest: GuestId) -> Option<SharedVmm> {
        let hosted = self.hosted.read().unwrap_or_else(PoisonError::into_inner);
        hosted.get(&guest).cloned()
    }

    /// How many guests are in this process and end with it.
    pub(super) fn hosted_count(&self) -> usize {
        let hosted = self.hosted.read().unwrap_or_else(PoisonError::into_inner);
        let own = hosted.values().filter(|vmm| lock(vmm).running().is_some());
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let active = standbys.values().filter_map(|s| s.active());
        own.count() + active.filter(|active| active.pid.is_none()).count()
    }

    /// Its monitor is not needed any more: the guest has ended.
    pub(super) fn forget_hosted(&self, guest: GuestId) {
        let mut hosted = self.hosted.write().unwrap_or_else(PoisonError::into_inner);
        let gone = hosted.remove(&guest);
        drop(hosted);
        // Its memory is freed here, and nobody waits for that.
        drop(gone);
    }

    /// What stops the protection of such a guest, as far as it is seen here.
    pub(super) fn check_hosted(&self, record: &GuestRecord) -> Vec<Finding> {
        let name = &record.name;
        let Some(vmm) = self.hosted(record.id) else {
            return vec![Finding::blocks(
                "guest-lost",
                ended_with_daemon(name),
                format!("farhaven guest remove {name}, then start it again"),
            )];
        };
        let vmm = lock(&vmm);
        match vmm.running() {
            Some(true) => Vec::new(),
            Some(false) => vec![Finding::warns(
                "not-running",
                "the guest does not run; it would be protected as it is and stay so at the peer",
                "let it go on in its monitor",
            )],
            None => vec![Finding::blocks(
                "guest-ended",
                format!("the guest has ended: {}", vmm.ended_because()),
                format!("farhaven guest end {name}, then start it again"),
            )],
        }
    }

    /// The record with what the guest asks of a host by now; a running guest is
    /// stopped for a moment.
    pub(super) fn as_it_is(&self, mut record: GuestRecord) -> GuestRecord {
        if let Definition::Embedded(definition) = &mut record.definition
            && let Some(vmm) = self.hosted(record.id)
        {
            match lock(&vmm).config() {
                Ok(Some(config)) => definition.config = config,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(guest = %record.name, %error, "checked by what it asked of a host when it was started");
                }
            }
        }
        record
    }

    /// Why such a guest does not run here any more, without waiting for it;
    /// empty while it does, or may.
    pub(super) fn hosted_lost(&self, record: &GuestRecord) -> String {
        let Some(vmm) = self.hosted(record.id) else {
            return ended_with_daemon(&record.name);
        };
        let vmm = match vmm.try_lock() {
            Ok(vmm) => vmm,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return String::new(),
        };
        match vmm.running() {
            Some(_) => String::new(),
            None => format!("it has ended: {}", vmm.ended_because()),
        }
    }

    /// Attaches to it.
    pub(super) fn attach_hosted(
        &self,
        record: &GuestRecord,
        key: DigestKey,
    ) -> Result<Box<dyn Guest>, GuestError> {
        let gone = || GuestError::Gone(ended_with_daemon(&record.name));
        let vmm = self.hosted(record.id).ok_or_else(gone)?;
        let buffer = self.config.protect.capture_buffer.bytes();
        let buffer = usize::try_from(buffer).unwrap_or(usize::MAX);
        Ok(Box::new(EmbeddedGuest::attach(vmm, key, buffer)?))
    }

    /// Stops it; one that is gone is stopped.
    pub(super) fn stop_hosted(&self, record: &GuestRecord) -> Result<(), GuestError> {
        let Some(vmm) = self.hosted(record.id) else {
            return Ok(());
        };
        Ok(embedded::stop(&mut *lock(&vmm), embedded::STOP_WITHIN)?)
    }

    /// Lets it run on; it was held.
    pub(super) fn resume_hosted(&self, record: &GuestRecord) -> Result<(), GuestError> {
        let gone = || GuestError::Gone(ended_with_daemon(&record.name));
        let vmm = self.hosted(record.id).ok_or_else(gone)?;
        Ok(lock(&vmm).resume()?)
    }

    /// Ends an embedded guest: one of this site that is not protected, or a
    /// peer's that was taken over and runs inside of this daemon.
    ///
    /// # Errors
    /// When there is none, it is protected, or a QEMU.
    pub async fn end_guest(self: &Arc<Self>, name: &str) -> Result<(), OperateError> {
        let own = self.guest_records().iter().any(|r| r.name == name);
        if let Some(standby) = self.standby_named(name).filter(|_| !own) {
            return standby.end_active().await;
        }
        let record = self.guest(name)?;
        if !record.definition.is_embedded() {
            return Err(OperateError::Conflict(format!(
                "'{name}' is a QEMU of its own, which this daemon does not end; to forget it: farhaven guest remove {name}"
            )));
        }
        let protected = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.contains_key(&record.id)
        };
        if protected {
            return Err(OperateError::Conflict(format!(
                "'{name}' is protected; run first: farhaven unprotect {name}"
            )));
        }
        let (site, id) = (self.clone(), record.id);
        let ended = crate::work::spawn_blocking(move || site.end_hosted(id)).await;
        ended.map_err(failed)?;
        self.remove_guest(name)
    }

    /// What an ended guest leaves in its directory.
    pub(super) fn clear_hosted(&self, record: &GuestRecord) {
        if !record.definition.is_embedded() {
            return;
        }
        let directory = self.run_directory(record.id);
        if let Err(error) = std::fs::remove_dir_all(&directory)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %directory.display(), "stays behind");
        }
        // Its own, unless it has activations, too.
        let _ = directory.parent().map(std::fs::remove_dir);
    }

    /// Ends it; one that is gone has ended.
    pub(super) fn end_hosted(&self, guest: GuestId) {
        if let Some(vmm) = self.hosted(guest) {
            lock(&vmm).end();
        }
        self.forget_hosted(guest);
    }
}

impl Standby {
    /// The daemon stops. What was taken over and runs inside of it ends here,
    /// not at some later moment, when another site of this process may run it
    /// again. Its record stays and tells the next daemon.
    pub(super) async fn end_with_daemon(self: &Arc<Self>) {
        let Ok(mut state) = tokio::time::timeout(SHUTDOWN, self.state.lock()).await else {
            tracing::warn!(guest = %self.name(), "a step under way is not waited for any longer; its machine ends with this process");
            return;
        };
        self.discard(&mut state).await;
        self.end_evidence(&mut state).await;
        let inside = state.active.take_if(|(_, ready)| ready.pid().is_none());
        if let Some((_, ready)) = inside {
            let _ = step(move || ready.end()).await;
            self.see(|s| {
                s.active = None;
                s.trouble = "it ran inside this daemon and ended with it".to_owned();
            });
        }
    }

    /// An operator ends a guest that was taken over and runs inside of this
    /// daemon. Its points stay, and it can be taken over again.
    ///
    /// # Errors
    /// When it does not run here, or is a QEMU.
    pub(super) async fn end_active(self: &Arc<Self>) -> Result<(), OperateError> {
        let mut state = self.state.lock().await;
        let name = self.name();
        let conflict = |why: String| Err(OperateError::Conflict(why));
        let Some((active, ready)) = &state.active else {
            // What was stopped for good may go.
            return match state.evidence.is_some() {
                true => {
                    self.end_evidence(&mut state).await;
                    Ok(())
                }
                false => conflict(format!("'{name}' does not run here")),
            };
        };
        if let Some(qmp) = &active.qmp {
            return conflict(format!(
                "'{name}' is a QEMU of its own, which this daemon does not end; `quit` at {} does",
                qmp.display()
            ));
        }
        let ready = ready.clone();
        let ended = step(move || {
            ready.end();
            std::fs::remove_dir_all(ready.run_directory())
        });
        if let Err(error) = ended.await.map_err(failed)? {
            tracing::warn!(guest = name, %error, "its directory stays behind");
        }
        state.active = None;
        self.see(|s| {
            s.active = None;
            s.hydration = None;
            s.trouble = "it was taken over here and then ended by an operator; it can be taken over again: farhaven failover".to_owned();
        });
        let site = self.site().map_err(failed)?;
        self.leave_evidence(&mut state, &site);
        Ok(())
    }
}

pub(super) fn lock(vmm: &SharedVmm) -> MutexGuard<'_, dyn Vmm + 'static> {
    crate::work::lock(vmm)
}
