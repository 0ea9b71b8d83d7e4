//! A first copy by parcel: [`export`] writes a guest's first point to a medium,
//! [`import`] takes it at the peer, which was told its key and numbers before
//! ([`announced`]). What is on the medium is [`crate::replicate::seed`]'s.

pub(super) mod announced;
mod export;
mod import;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Site;
use super::operate::OperateError;
use super::view::Phase;
use crate::replicate::seed::SeedProgress;

/// What a seed is at, at this site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeedState {
    /// It is being written here.
    Exporting,
    /// It is being taken here.
    Importing,
    /// A peer announced it; it has not been imported here.
    Awaited,
}

/// A seed that is under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SeedView {
    /// Of which guest.
    pub guest: String,
    /// The other site.
    pub peer: String,
    /// What it is at.
    pub state: SeedState,
    /// Of the pass under way: bytes looked at and to look at.
    pub progress: Option<(u64, u64)>,
    /// Bytes of the file, written or read so far.
    pub file_bytes: u64,
    /// When it was announced, nanoseconds since 1970; of one that is awaited.
    #[serde(default)]
    pub announced_at: Option<u64>,
}

/// What an export did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SeedExported {
    /// The guest's name.
    pub guest: String,
    /// The site that can import it.
    pub to: String,
    /// The file.
    pub file: std::path::PathBuf,
    /// Its length.
    pub file_bytes: u64,
    /// The point that it holds.
    pub point: u64,
    /// Guest data in it, zeros and duplicates included.
    pub guest_bytes: u64,
    /// How long the guest was stopped for it.
    pub pause_ms: f64,
    /// How long it took.
    pub took_ms: u64,
}

/// What an import did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SeedImported {
    /// The guest's name.
    pub guest: String,
    /// The site that it comes from.
    pub from: String,
    /// This site, which it is protected to.
    #[serde(default)]
    pub to: String,
    /// The point that is sealed now.
    pub point: u64,
    /// When the guest was stopped for it.
    pub cut_at: String,
    /// How old that point is.
    pub age_ms: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Batches in it.
    pub batches: u64,
    /// How long it took.
    pub took_ms: u64,
}

/// A seed being written or taken.
pub(super) struct Working {
    name: String,
    peer: String,
    state: SeedState,
    progress: Arc<SeedProgress>,
}

impl Working {
    fn progress(&self) -> Option<(u64, u64)> {
        let (done, total) = (
            self.progress.done.load(Relaxed),
            self.progress.total.load(Relaxed),
        );
        (total > 0).then_some((done.min(total), total))
    }
}

/// Keeps others from the guest until it is dropped.
struct Busy {
    site: Arc<Site>,
    guest: GuestId,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let working = &self.site.seeding;
        let mut working = working.lock().unwrap_or_else(PoisonError::into_inner);
        working.remove(&self.guest);
    }
}

/// Whoever asked is gone: the work ends, and leaves nothing.
struct StopWhenDropped(Arc<SeedProgress>);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Site {
    /// Begins to work on a guest's seed, if nobody works on the guest.
    fn begin_seeding(
        self: &Arc<Self>,
        guest: GuestId,
        name: &str,
        peer: &str,
        state: SeedState,
    ) -> Result<(Busy, Arc<SeedProgress>), OperateError> {
        let mut working = self.seeding.lock().unwrap_or_else(PoisonError::into_inner);
        if working.contains_key(&guest) {
            return Err(OperateError::Conflict(format!(
                "a seed of '{name}' is being written or imported already"
            )));
        }
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = drivers.get(&guest)
            && state == SeedState::Exporting
        {
            let view = driver.view.borrow();
            let peer = view.peer.clone().unwrap_or_default();
            return Err(OperateError::Conflict(match view.phase {
                Phase::AwaitingSeed => format!(
                    "'{name}' is protected to '{peer}' already, and waits for a seed that was to be written before. To write one, run first: farhaven unprotect {name}"
                ),
                _ => format!(
                    "'{name}' is protected to '{peer}' already: its first copy goes over the link. To seed it instead, run first: farhaven unprotect {name} --discard"
                ),
            }));
        }
        let progress = Arc::new(SeedProgress::default());
        let entry = Working {
            name: name.to_owned(),
            peer: peer.to_owned(),
            state,
            progress: progress.clone(),
        };
        working.insert(guest, entry);
        let site = self.clone();
        Ok((Busy { site, guest }, progress))
    }

    /// May the guest be protected, or removed, now? Held while `then` runs.
    pub(super) fn unless_seeding<T>(
        &self,
        guest: GuestId,
        then: impl FnOnce() -> Result<T, OperateError>,
    ) -> Result<T, OperateError> {
        let working = self.seeding.lock().unwrap_or_else(PoisonError::into_inner);
        match working.get(&guest) {
            Some(work) => Err(OperateError::Conflict(format!(
                "a seed of '{}' is being written; wait for its end (farhaven seed list), or stop it with Ctrl-C where it was begun",
                work.name
            ))),
            None => then(),
        }
    }

    /// Ends every export and import: the daemon stops.
    pub(super) fn stop_seeding(&self) {
        let working = self.seeding.lock().unwrap_or_else(PoisonError::into_inner);
        working.values().for_each(|work| work.progress.stop());
    }

    /// How far the guest's export is, where one is under way. Takes the lock
    /// that is taken before those of drivers.
    pub(super) fn exporting(&self, guest: GuestId) -> Option<Option<(u64, u64)>> {
        let working = self.seeding.lock().unwrap_or_else(PoisonError::into_inner);
        let work = working.get(&guest)?;
        (work.state == SeedState::Exporting).then(|| work.progress())
    }

    /// Seeds that are written or taken here, and those that peers announced.
    pub fn seeds(&self) -> Vec<SeedView> {
        let working = self.seeding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut views: Vec<SeedView> = working
            .values()
            .map(|work| SeedView {
                guest: work.name.clone(),
                peer: work.peer.clone(),
                state: work.state,
                progress: work.progress(),
                file_bytes: work.progress.file_bytes.load(Relaxed),
                announced_at: None,
            })
            .collect();
        let awaited = self.seeds.awaited().into_iter();
        let awaited = awaited.filter(|seed| {
            !working
                .get(&seed.guest)
                .is_some_and(|w| w.state == SeedState::Importing)
        });
        views.extend(awaited.map(|seed| SeedView {
            guest: seed.name,
            peer: self.name_of(&seed.from),
            state: SeedState::Awaited,
            progress: None,
            file_bytes: 0,
            announced_at: Some(seed.announced_at),
        }));
        views
    }
}
