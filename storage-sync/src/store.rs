//! The store of one origin site: batches in, recovery points out.
//!
//! [`Store::append`] verifies batches and makes them durable. [`Store::seal`]
//! turns a point's batches into a manifest. [`Store::open_point`] gives a point
//! to read. [`Store::plan_prune`] and [`Store::perform_prune`] let points go.
//! A `Store` is a handle: clones share one store, from any thread.

mod answers;
mod damage;
mod digests;
mod hints;
mod images;
mod kept;
mod local;
mod open;
mod read;
mod rebuild;
mod scrub;
mod seal;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::codec::{BatchError, BatchHeader, BatchView, Body, Expander, Sequence};
use crate::disk::{Disk, OpenFile, SystemDisk};
use crate::files::{FileError, LockError};
use crate::limits::{
    HINT_BYTES, IMAGE_SEQ, MANIFEST_CHAIN, SEGMENT_BYTES_LEAST, SEGMENT_BYTES_MOST,
};
use crate::log::{Log, LogError, ScanReport};
use crate::manifest::PointHeader;
use crate::map::PointMap;
use crate::unit::GuestId;

pub use answers::{Held, HeldBatch};
pub use damage::{NEED_RUNS, Need, Suspect};
pub use digests::DigestPage;
pub use hints::Prefix;
use hints::{Hints, hints_of};
pub use images::{Image, ImageError, ImageProgress};
pub use kept::{KeepError, NAME_LOST};
pub use local::{LocalError, LocalPoint, LocalSeal};
pub(crate) use read::{ExpandError, Reader, Sound, leaf_bytes};
pub(crate) use rebuild::{Unbuilt, Waiting, rebuild};
pub use scrub::{Damage, Damaged, ScrubOptions, ScrubProgress, ScrubReport};
pub use seal::{Seal, SealError};

/// How a store is kept.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Size at which a segment is closed: 4 KiB to 2 GiB.
    pub segment_bytes: u64,
    /// Bytes of segments at which appending is refused; `None`: the disk decides.
    pub bytes_most: Option<u64>,
    /// Memory for the map of each guest's newest point: 0.2 % of what the guest
    /// has in use. A seal that would need more is refused.
    pub map_bytes: usize,
    /// Memory for expanded batches, per open point.
    pub cache_bytes: usize,
    /// Memory for hints which batch holds which content.
    pub hint_bytes: usize,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            segment_bytes: 64 << 20,
            bytes_most: None,
            map_bytes: 1 << 30,
            cache_bytes: 8 << 20,
            hint_bytes: HINT_BYTES,
        }
    }
}

/// Why a store did not open, or refused data.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An option out of range.
    #[error("segment_bytes is {0}; it must be from {SEGMENT_BYTES_LEAST} to {SEGMENT_BYTES_MOST}")]
    Options(u64),
    /// Taken by another process.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A batch is damaged or none.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The log refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A point that is there but cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedPoint {
    /// The guest, when it could be told.
    pub guest: Option<GuestId>,
    /// Its manifest.
    pub path: PathBuf,
    /// What is wrong.
    pub why: String,
}

/// What opening found. Everything in here is worth telling the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The segments.
    pub log: ScanReport,
    /// Points that can be restored.
    pub points: usize,
    /// Points that cannot.
    pub damaged: Vec<DamagedPoint>,
}

#[derive(Debug, Clone)]
pub(crate) struct PointEntry {
    pub(crate) header: Arc<PointHeader>,
    pub(crate) base: u64,
    /// Bytes of its manifest.
    pub(crate) bytes: u64,
    /// Manifests below this one, itself included, down to a full one.
    pub(crate) depth: usize,
    /// Bytes of that full one, and of those above it.
    pub(crate) full_bytes: u64,
    pub(crate) delta_bytes: u64,
}

impl PointEntry {
    /// The entry of a manifest of `bytes` on `base` (`None`: a full one).
    pub(crate) fn new(
        header: Arc<PointHeader>,
        base: Option<&PointEntry>,
        bytes: u64,
    ) -> PointEntry {
        match base {
            None => PointEntry {
                header,
                base: 0,
                bytes,
                depth: 1,
                full_bytes: bytes,
                delta_bytes: 0,
            },
            Some(on) => PointEntry {
                header,
                base: on.header.point,
                bytes,
                depth: on.depth + 1,
                full_bytes: on.full_bytes,
                delta_bytes: on.delta_bytes + bytes,
            },
        }
    }

    /// Should another manifest build on this one, or be a full one?
    pub(crate) fn may_be_base(&self) -> bool {
        self.depth < MANIFEST_CHAIN && self.delta_bytes <= self.full_bytes.max(64 * 1024)
    }
}

#[derive(Default)]
pub(crate) struct GuestState {
    pub(crate) points: BTreeMap<u64, PointEntry>,
    /// Map of the last of `points`.
    pub(crate) newest: Arc<PointMap>,
    /// Largest point number ever sealed and seen: no lower one is taken again.
    pub(crate) largest: u64,
    /// The largest point number in any batch received.
    pub(crate) claimed: u64,
    /// Batches of points that are not sealed yet.
    pub(crate) unsealed: BTreeMap<u64, BTreeSet<u64>>,
    /// Those of `unsealed` whose differences were rebuilt and are right.
    pub(crate) rebuilt: BTreeSet<u64>,
    pub(crate) pins: HashMap<u64, usize>,
    /// Points that have a name: no prune drops them.
    pub(crate) kept: BTreeMap<u64, String>,
}

impl GuestState {
    pub(crate) fn newest_point(&self) -> u64 {
        self.points.last_key_value().map_or(0, |(&point, _)| point)
    }
}

/// Where batches come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The paired site.
    Source,
    /// An image that an operator stored here.
    Image,
    /// What is here of a guest that ran here.
    Local,
}

impl Origin {
    /// Have its batches numbers that no source gives, and an identity that no guest has?
    fn numbers_and_guest(self) -> (bool, bool) {
        match self {
            Origin::Source => (false, false),
            Origin::Image => (true, true),
            Origin::Local => (true, false),
        }
    }
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) guests: BTreeMap<GuestId, GuestState>,
    /// Batches that a prune is about to remove: not offered for dedup any more.
    pub(crate) retiring: BTreeSet<u64>,
}

pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) manifests: PathBuf,
    pub(crate) options: StoreOptions,
    pub(crate) log: Log,
    pub(crate) state: Mutex<State>,
    pub(crate) hints: Mutex<Hints>,
    /// Numbers for the batches of images.
    pub(crate) image_numbers: Arc<Sequence>,
    /// Held through a seal or a prune: they write manifests.
    pub(crate) writing: Mutex<()>,
    /// Held through a prune: one at a time.
    pub(crate) pruning: Mutex<()>,
    /// Files that the disk would not read when the store was opened.
    pub(crate) unreadable: Vec<PathBuf>,
    /// What was found damaged since.
    pub(crate) known: Mutex<damage::Known>,
    _lock: OpenFile,
}

/// A handle to the store. See the module's page.
#[derive(Clone)]
pub struct Store(pub(crate) Arc<Inner>);

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.0.manifests.display())
    }
}

pub(crate) fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a whole step, so a panic leaves them valid.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the store in `dir`, making it if needed. Reads the headers of all
    /// batches and points; damage is told in the report, never hidden.
    ///
    /// # Errors
    /// When the directory is taken, cannot be written, or cannot be read.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<(Store, OpenReport), StoreError> {
        Store::open_on(Arc::new(SystemDisk), dir, options)
    }

    /// [`Store::open`] on another file system than the machine's own.
    ///
    /// # Errors
    /// As for [`Store::open`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: StoreOptions,
    ) -> Result<(Store, OpenReport), StoreError> {
        open::open(disk, dir, options)
    }

    /// Verifies batches, appends them and syncs once. Returns the numbers of
    /// all of them: each is durable now. Batches that are there already count.
    ///
    /// # Errors
    /// One damaged batch refuses them all. After a log error some may be
    /// durable; sending them again is harmless.
    pub fn append(&self, batches: &[Bytes]) -> Result<Vec<u64>, StoreError> {
        self.append_of(batches, Origin::Source)
    }

    fn append_of(&self, batches: &[Bytes], origin: Origin) -> Result<Vec<u64>, StoreError> {
        let mut verified = Vec::with_capacity(batches.len());
        let key = held(&self.0.hints).key();
        let (mut hints, mut digests) = (Vec::new(), Vec::new());
        let mut expander = Expander::new();
        let mut body = Body::new();
        let mut waiting = Waiting::new();
        for bytes in batches {
            let view = BatchView::parse(bytes)?;
            // A batch that would not expand is worth nothing: tell its sender now.
            view.expand(&mut expander, &mut body)?;
            let header = *view.header();
            if (header.seq >= IMAGE_SEQ, header.guest.is_image()) != origin.numbers_and_guest() {
                let why = "its number or guest is kept for what is stored here by itself";
                return Err(BatchError::Invalid(why).into());
            }
            if let Some(key) = &key {
                hints.push((header.seq, hints_of(key, &body, &mut digests)));
            }
            verified.push((header, &bytes[..]));
            if header.deltas {
                waiting.add_all(&body, header.seq);
            }
        }
        self.0.log.append(&verified)?;
        if !self.is_sound() {
            // What was damaged of them is whole again.
            let seqs = verified.iter().map(|(header, _)| header.seq);
            seqs.for_each(|seq| self.0.found_whole(Suspect::Batch(seq)));
        }
        self.0.add_hints(&hints);
        // A difference that does not come out right is not refused here: the
        // seal asks again, and the source gets an answer that it can act on.
        let wrong = self.0.wrong(waiting);
        let mut state = held(&self.0.state);
        for (header, _) in &verified {
            state.belongs(header);
            if header.deltas && !wrong.contains_key(&header.seq) {
                let guest = state.guests.entry(header.guest).or_default();
                if header.point > guest.largest {
                    guest.rebuilt.insert(header.seq);
                }
            }
        }
        Ok(verified.iter().map(|(header, _)| header.seq).collect())
    }

    /// Is this batch durable here?
    pub fn contains(&self, seq: u64) -> bool {
        self.0.log.locate(seq).is_some()
    }

    /// The largest number of a source's batch that is or was in the log, as far as is
    /// known; 0 when there is none. The next one is to have a larger number.
    pub fn last_seq(&self) -> u64 {
        self.0.log.last_seq()
    }

    /// The `count` largest batch numbers in the log, descending.
    pub fn newest_seqs(&self, count: usize) -> Vec<u64> {
        self.0.log.newest(count)
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.0.log.bytes()
    }

    /// Seals a recovery point: see [`Seal`]. When this returns, the manifest is
    /// durable. Sealing the same point again gives the same answer.
    ///
    /// # Errors
    /// See [`SealError`]; nothing has changed then.
    pub fn seal(&self, seal: Seal) -> Result<PointHeader, SealError> {
        seal::seal(&self.0, seal)
    }

    /// A guest's points, oldest first.
    pub fn points(&self, guest: GuestId) -> Vec<PointHeader> {
        let state = held(&self.0.state);
        let points = state
            .guests
            .get(&guest)
            .into_iter()
            .flat_map(|guest| guest.points.values());
        points.map(|entry| (*entry.header).clone()).collect()
    }

    /// A guest's newest point.
    pub fn newest(&self, guest: GuestId) -> Option<PointHeader> {
        let state = held(&self.0.state);
        let (_, entry) = state.guests.get(&guest)?.points.last_key_value()?;
        Some((*entry.header).clone())
    }

    /// Guests that have points here, or batches on their way to one.
    pub fn guests(&self) -> Vec<GuestId> {
        let state = held(&self.0.state);
        let known = state.guests.iter();
        let known =
            known.filter(|(_, guest)| !guest.points.is_empty() || !guest.unsealed.is_empty());
        let known = known.map(|(&guest, _)| guest);
        known.filter(|guest| !guest.is_image()).collect()
    }

    /// The batches that were received for a point that is not sealed.
    pub fn unsealed(&self, guest: GuestId, point: u64) -> Vec<u64> {
        let state = held(&self.0.state);
        let unsealed = state
            .guests
            .get(&guest)
            .and_then(|guest| guest.unsealed.get(&point));
        unsealed.into_iter().flatten().copied().collect()
    }

    /// The lowest number that a guest's next point may have: above every point
    /// sealed, and above every point that batches here claim to belong to.
    pub fn next_point(&self, guest: GuestId) -> u64 {
        let state = held(&self.0.state);
        state
            .guests
            .get(&guest)
            .map_or(1, |guest| guest.largest.max(guest.claimed) + 1)
    }

    /// Gives up what was received for one point that is not sealed; its batches
    /// stay as in [`Store::abandon`], and count again if they come again.
    pub fn abandon_point(&self, guest: GuestId, point: u64) {
        if let Some(guest) = held(&self.0.state).guests.get_mut(&guest) {
            for seq in guest.unsealed.remove(&point).unwrap_or_default() {
                guest.rebuilt.remove(&seq);
            }
        }
    }

    /// Gives up what was received for points that are not sealed: the next
    /// attempt has a new number. The batches stay for dedup until a prune.
    pub fn abandon(&self, guest: GuestId) {
        if let Some(guest) = held(&self.0.state).guests.get_mut(&guest) {
            guest.unsealed.clear();
            guest.rebuilt.clear();
        }
    }
}

impl State {
    /// Counts a batch to its point, unless that is sealed already.
    pub(crate) fn belongs(&mut self, header: &BatchHeader) {
        let guest = self.guests.entry(header.guest).or_default();
        guest.claimed = guest.claimed.max(header.point);
        if header.point > guest.largest {
            guest
                .unsealed
                .entry(header.point)
                .or_default()
                .insert(header.seq);
        }
    }
}
