//! Letting points go: plan, tell the source, then perform.
//!
//! The plan names the points to drop, the segments worth removing and the
//! batches that would go with them. The source must forget those batches (it
//! might refer to them) and say so; only then is the plan performed, after
//! everything was checked again: what came to be needed in the meantime stays.
//!
//! A crash at any moment loses nothing. A point that builds on a dropped one
//! is first written anew on a kept one; then dropped manifests are removed,
//! newest first; then live batches are copied to the end of the log and
//! synced; then segments are removed. Each step leaves a whole store.

mod perform;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::PathBuf;

use crate::codec::{BatchError, Content, EntriesView};
use crate::files::FileError;
use crate::log::LogError;
use crate::manifest::{self, ManifestError};
use crate::map::{PointMap, Run};
use crate::store::{ExpandError, Inner, PointEntry, Store, held};
use crate::unit::{GuestId, Place};

/// A segment is rewritten when at least one in this many bytes is dead.
const WORTH: u64 = 4;

/// The points to keep, per guest. Guests that are not named keep all of theirs.
/// The newest point of a guest is kept too, unless its list is empty: then the
/// guest is given up altogether. Points that have a name stay, and a guest with
/// such points is not given up.
pub type Keep = BTreeMap<GuestId, BTreeSet<u64>>;

/// What a prune will do. Its `Display` is for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// Points to drop.
    pub dropped: Vec<(GuestId, u64)>,
    /// Points that would be dropped but are open: they stay.
    pub pinned: Vec<(GuestId, u64)>,
    /// Batches that will go: the source must forget them first.
    pub retire: Vec<u64>,
    /// Some of `retire` that stay after all, for other units in them. They hold
    /// differences whose bases go, which the source must not refer to.
    pub stay: BTreeSet<u64>,
    /// Segments to remove.
    pub segments: Vec<SegmentPlan>,
}

/// One segment to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentPlan {
    /// Its number.
    pub segment: u32,
    /// Its size.
    pub bytes: u64,
    /// Bytes in it that are needed and will be copied first.
    pub live_bytes: u64,
}

impl PrunePlan {
    /// Bytes of disk that it will free.
    pub fn bytes_freed(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.bytes - segment.live_bytes)
            .sum()
    }

    /// Is there nothing to do?
    pub fn is_empty(&self) -> bool {
        self.dropped.is_empty() && self.segments.is_empty()
    }
}

impl fmt::Display for PrunePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (guest, point) in &self.dropped {
            writeln!(f, "drop point {point} of {guest}")?;
        }
        for (guest, point) in &self.pinned {
            writeln!(f, "keep point {point} of {guest}: it is in use")?;
        }
        for plan in &self.segments {
            let SegmentPlan {
                segment,
                bytes,
                live_bytes,
            } = plan;
            writeln!(
                f,
                "remove segment {segment} ({bytes} bytes, {live_bytes} copied first)"
            )?;
        }
        let batches = self.retire.len() - self.stay.len();
        let freed = self.bytes_freed();
        write!(f, "{batches} batches go, {freed} bytes are freed")
    }
}

/// What a prune did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Points dropped.
    pub points: usize,
    /// Batches gone.
    pub batches: usize,
    /// Batches of the plan that were needed again and stayed.
    pub revived: usize,
    /// Segments removed.
    pub segments: usize,
    /// Segments that stay, because something that is needed in them is damaged.
    pub damaged: usize,
    /// Bytes that the log is smaller now.
    pub bytes_freed: u64,
}

/// Why a prune stopped. The store is whole; planning again goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// What cannot be read may be needed by points that cannot be read either.
    #[error(
        "nothing is pruned: {} could not be read when the store was opened; check that disk and \
         restart the daemon, or move the file away if it is lost for good", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
    },
    /// A manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A stored batch is damaged.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The log refused.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<ExpandError> for PruneError {
    fn from(error: ExpandError) -> PruneError {
        match error {
            ExpandError::Log(error) => error.into(),
            ExpandError::Batch(error) => error.into(),
        }
    }
}

/// Points to drop, per guest.
type Drops = BTreeMap<GuestId, BTreeSet<u64>>;

impl Store {
    /// Plans a prune. From now until it is performed or given up
    /// ([`Store::give_up_prune`]), the batches to retire are not offered to
    /// sources any more.
    ///
    /// # Errors
    /// When manifests or batches cannot be read.
    pub fn plan_prune(&self, keep: &Keep) -> Result<PrunePlan, PruneError> {
        let inner = &self.0;
        let _pruning = held(&inner.pruning);
        let _writing = held(&inner.writing);
        if let Some(path) = inner.unreadable.first() {
            let path = path.clone();
            return Err(PruneError::Unreadable { path });
        }
        let mut plan = PrunePlan::default();
        let mut drops = Drops::new();
        for (&guest, state) in &held(&inner.state).guests {
            let Some(keep) = keep.get(&guest) else {
                continue;
            };
            let newest = state.newest_point();
            let given_up = keep.is_empty() && state.kept.is_empty();
            for &point in state.points.keys() {
                let named = state.kept.contains_key(&point);
                if keep.contains(&point) || named || point == newest && !given_up {
                    continue;
                }
                if state.pins.contains_key(&point) {
                    plan.pinned.push((guest, point));
                    continue;
                }
                plan.dropped.push((guest, point));
                drops.entry(guest).or_default().insert(point);
            }
        }
        let given_up: BTreeSet<GuestId> = emptied(keep);
        let mut live = live_batches(inner, &drops)?;
        live.extend(unsealed(inner, &given_up, &mut HashSet::new())?);
        live.extend(inner.log.last_kept());
        let mut sizes: BTreeMap<u32, (u64, Vec<u64>)> = BTreeMap::new();
        inner.log.each(&mut |seq, location| {
            let (live_bytes, dead) = sizes.entry(location.segment).or_default();
            match live.contains(&seq) {
                true if *live_bytes == 0 => *live_bytes = location.front() + location.stored(),
                true => *live_bytes += location.stored(),
                false => dead.push(seq),
            }
        });
        for (segment, bytes) in inner.log.closed_segments() {
            let (live_bytes, dead) = sizes.remove(&segment).unwrap_or_default();
            let gone = bytes.saturating_sub(live_bytes);
            if bytes == 0 || gone * WORTH >= bytes && gone > 0 {
                plan.segments.push(SegmentPlan {
                    segment,
                    bytes,
                    live_bytes,
                });
                plan.retire.extend(dead);
            }
        }
        // What needs no copy goes first: on a full disk that makes the room.
        plan.segments
            .sort_by_key(|segment| (segment.live_bytes, segment.segment));
        let orphans = orphans(inner, &plan.retire)?;
        plan.stay = orphans.intersection(&live).copied().collect();
        plan.retire.extend(orphans);
        plan.retire.sort_unstable();
        held(&inner.state).retiring.extend(&plan.retire);
        Ok(plan)
    }

    /// The plan will not be performed.
    pub fn give_up_prune(&self, plan: &PrunePlan) {
        let mut state = held(&self.0.state);
        for seq in &plan.retire {
            state.retiring.remove(seq);
        }
    }

    /// Performs a plan whose batches the source has forgotten. What came to be
    /// needed since stays.
    ///
    /// # Errors
    /// See [`PruneError`]: the store is whole, and may have shrunk.
    pub fn perform_prune(&self, plan: &PrunePlan) -> Result<PruneReport, PruneError> {
        let _pruning = held(&self.0.pruning);
        let outcome = perform::perform(&self.0, plan);
        self.give_up_prune(plan);
        outcome
    }
}

fn emptied(keep: &Keep) -> BTreeSet<GuestId> {
    keep.iter()
        .filter(|(_, points)| points.is_empty())
        .map(|(&guest, _)| guest)
        .collect()
}

/// Walks a guest's points upward with the map of each, without building one twice. One that
/// is dropped and whose manifest rotted is passed by: nothing that stays can build on it.
fn walk(
    inner: &Inner,
    guest: GuestId,
    drops: Option<&BTreeSet<u64>>,
    each: &mut dyn FnMut(&PointEntry, &PointMap, manifest::Head) -> Result<(), PruneError>,
) -> Result<(), PruneError> {
    let entries: Vec<PointEntry> = match held(&inner.state).guests.get(&guest) {
        Some(state) => state.points.values().cloned().collect(),
        None => return Ok(()),
    };
    let mut before = 0;
    let mut map = PointMap::default();
    for entry in &entries {
        let point = entry.header.point;
        let path = manifest::path_of(&inner.manifests, guest, point);
        if entry.base == 0 {
            map = PointMap::default();
        }
        let below = match entry.base {
            base if base == 0 || base == before => Ok(()),
            base => inner.load_map(guest, base).map(|loaded| map = loaded),
        };
        let head = match below.and_then(|()| inner.apply(&path, &mut map)) {
            Ok(head) => head,
            Err(ManifestError::Damaged { .. } | ManifestError::Newer { .. })
                if drops.is_some_and(|drops| drops.contains(&point)) =>
            {
                before = 0;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        before = point;
        each(entry, &map, head)?;
    }
    Ok(())
}

/// Which slots are needed of batches with differences: a bit each.
type Needed = BTreeMap<u64, u64>;

/// Notes `count` places from `first` on, if their batches have differences.
fn need(inner: &Inner, needed: &mut Needed, first: Place, count: u64) {
    let end = first.0 + count;
    let mut at = first;
    while at.0 < end {
        let next = Place((at.seq() + 1) << 6).0.min(end);
        if inner.log.locate(at.seq()).is_some_and(|found| found.deltas) {
            let slots = needed.entry(at.seq()).or_default();
            (at.0..next).for_each(|place| *slots |= 1 << Place(place).index());
        }
        at = Place(next);
    }
}

/// Adds the batches of the bases that needed differences are told against. A
/// base is a literal: there is nothing behind it.
fn add_bases(inner: &Inner, needed: &Needed, live: &mut HashSet<u64>) -> Result<(), PruneError> {
    let mut bytes = Vec::new();
    for (&seq, slots) in needed {
        inner.each_entry(seq, &mut bytes, &mut |entry| {
            if let Content::Delta(delta) = entry.content
                && slots >> delta.index & 1 == 1
            {
                live.insert(delta.base.seq());
            }
        })?;
    }
    Ok(())
}

/// Batches that would stay, but have differences whose base goes: nobody needs
/// those now, and the source must refer to them no more either.
fn orphans(inner: &Inner, retire: &[u64]) -> Result<HashSet<u64>, PruneError> {
    let retire: BTreeSet<u64> = retire.iter().copied().collect();
    let mut found = HashSet::new();
    if retire.is_empty() {
        return Ok(found);
    }
    let mut with = Vec::new();
    inner.log.each(&mut |seq, location| {
        if location.deltas && !retire.contains(&seq) {
            with.push(seq);
        }
    });
    let mut bytes = Vec::new();
    for seq in with {
        let mut orphan = false;
        inner.each_entry(seq, &mut bytes, &mut |entry| {
            orphan |= matches!(entry.content, Content::Delta(delta)
                if retire.contains(&delta.base.seq()));
        })?;
        if orphan {
            found.insert(seq);
        }
    }
    Ok(found)
}

/// Batches that the points which stay need.
fn live_batches(inner: &Inner, drops: &Drops) -> Result<HashSet<u64>, PruneError> {
    let guests: Vec<GuestId> = held(&inner.state).guests.keys().copied().collect();
    let mut live = HashSet::new();
    let mut needed = Needed::new();
    for guest in guests {
        let mut kept = PointMap::default();
        let drops = drops.get(&guest);
        walk(inner, guest, drops, &mut |entry, map, _| {
            if drops.is_some_and(|drops| drops.contains(&entry.header.point)) {
                return Ok(());
            }
            let changes: Vec<Run> = map.since(&kept);
            for run in changes.iter().filter(|run| run.place != Place::ZERO) {
                live.extend(run.seqs());
                need(inner, &mut needed, run.place, run.count);
            }
            kept = map.clone();
            Ok(())
        })?;
    }
    add_bases(inner, &needed, &mut live)?;
    Ok(live)
}

/// Batches of points that are not sealed yet, and what they refer to. `read`
/// has those that were looked at before; they are not read again.
fn unsealed(
    inner: &Inner,
    given_up: &BTreeSet<GuestId>,
    read: &mut HashSet<u64>,
) -> Result<HashSet<u64>, PruneError> {
    let seqs: Vec<u64> = {
        let state = held(&inner.state);
        let guests = state
            .guests
            .iter()
            .filter(|(guest, _)| !given_up.contains(guest));
        guests
            .flat_map(|(_, guest)| guest.unsealed.values().flatten().copied())
            .collect()
    };
    let mut live = HashSet::new();
    let mut needed = Needed::new();
    let mut bytes = Vec::new();
    for seq in seqs {
        if !read.insert(seq) {
            continue;
        }
        live.insert(seq);
        inner.log.read_entries(seq, &mut bytes)?;
        let view = EntriesView::parse(&bytes)?;
        for entry in view.entries() {
            match entry.content {
                Content::Refs(place) => {
                    live.insert(place.seq());
                    need(inner, &mut needed, place, entry.count);
                }
                Content::Delta(delta) => {
                    live.insert(delta.base.seq());
                }
                Content::Zeros | Content::Literals(_) => {}
            }
        }
    }
    add_bases(inner, &needed, &mut live)?;
    Ok(live)
}
