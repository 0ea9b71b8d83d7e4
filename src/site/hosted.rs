//! Guests whose monitor lives in this process: made known, reached by their
//! drivers, ended. They end with the daemon; their records stay, and say so.

use std::sync::PoisonError;

use super::Site;
use super::guests::ended_with_daemon;
use super::records::GuestRecord;
use crate::activate::machine::Builders;
use crate::guest::embedded::SharedVmm;
use crate::guest::qemu::check::Finding;
use crate::guest::{Guest, GuestError};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::GuestId;

/// Builders of the guests that this crate brings.
pub fn builders() -> Builders {
    Builders::new()
}

impl Site {
    /// The guest's monitor, while it is here.
    pub(super) fn hosted(&self, guest: GuestId) -> Option<SharedVmm> {
        let hosted = self.hosted.read().unwrap_or_else(PoisonError::into_inner);
        hosted.get(&guest).cloned()
    }

    /// What stops the protection of such a guest, as far as it is seen here.
    pub(super) fn check_hosted(&self, record: &GuestRecord) -> Vec<Finding> {
        match self.hosted(record.id) {
            Some(_) => Vec::new(),
            None => vec![Finding::blocks(
                "guest-lost",
                ended_with_daemon(&record.name),
                "start it again",
            )],
        }
    }

    /// Attaches to it.
    pub(super) fn attach_hosted(
        &self,
        record: &GuestRecord,
        key: DigestKey,
    ) -> Result<Box<dyn Guest>, GuestError> {
        let _ = key;
        Err(GuestError::Gone(ended_with_daemon(&record.name)))
    }

    /// Stops it; one that is gone is stopped.
    pub(super) fn stop_hosted(&self, record: &GuestRecord) -> Result<(), GuestError> {
        if let Some(vmm) = self.hosted(record.id) {
            vmm.lock().unwrap_or_else(PoisonError::into_inner).pause()?;
        }
        Ok(())
    }
}
