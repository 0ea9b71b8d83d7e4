//! Performing a plan: each step leaves a whole store.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::{Drops, PruneError, PrunePlan, PruneReport, live_batches, unsealed, walk};
use crate::codec::BatchView;
use crate::files::{FileError, is_bad_sector, sync_dir};
use crate::log::LogError;
use crate::manifest;
use crate::map::PointMap;
use crate::store::{GuestState, Inner, PointEntry, held};
use crate::unit::GuestId;

pub(super) fn perform(inner: &Inner, plan: &PrunePlan) -> Result<PruneReport, PruneError> {
    let mut report = PruneReport::default();
    let writing = held(&inner.writing);
    let drops = still_to_drop(inner, plan);
    for (&guest, drops) in &drops {
        rebase(inner, guest, drops)?;
        report.points += drop_points(inner, guest, drops)?;
    }
    // Names of manifests that went, now or in a prune that failed, stay away
    // before anything goes that they need.
    let names = inner.disk.list(&inner.manifests);
    for guest in names.map_err(FileError::at("list", &inner.manifests))? {
        sync_dir(&*inner.disk, &inner.manifests.join(guest))?;
    }
    // Everything that stays, read once at leisure, and once more what arrived
    // meanwhile, under the lock that new batches need to count.
    let mut live = live_batches(inner, &Drops::new())?;
    let mut read = HashSet::new();
    live.extend(unsealed(inner, &BTreeSet::new(), &mut read)?);
    live.extend(unsealed(inner, &BTreeSet::new(), &mut read)?);
    live.extend(inner.log.last_kept());
    let retire = plan.retire.iter().filter(|seq| !plan.stay.contains(seq));
    let (revived, dead): (Vec<u64>, Vec<u64>) = retire.partition(|&seq| live.contains(seq));
    report.revived = revived.len();
    report.batches = dead.len();
    inner.log.forget(&dead);
    // Copying takes long, and neither seals nor a failover wait for it.
    drop(writing);
    let before = inner.log.bytes();
    for plan in &plan.segments {
        if let Err(error) = move_live(inner, plan.segment) {
            match error {
                // It is not copied as if it were whole, nor removed: others go.
                PruneError::Batch(_) => {}
                PruneError::Log(LogError::File(ref file)) if is_bad_sector(&file.source) => {}
                other => return Err(other),
            }
            tracing::error!(segment = plan.segment, %error, "a damaged segment stays");
            report.damaged += 1;
            continue;
        }
        inner.log.remove_segment(plan.segment)?;
        report.segments += 1;
    }
    report.bytes_freed = before.saturating_sub(inner.log.bytes());
    Ok(report)
}

/// The plan's points, without those that were opened since.
fn still_to_drop(inner: &Inner, plan: &PrunePlan) -> Drops {
    let state = held(&inner.state);
    let mut drops = Drops::new();
    for &(guest, point) in &plan.dropped {
        let Some(known) = state.guests.get(&guest) else {
            continue;
        };
        let needed = known.pins.contains_key(&point) || known.kept.contains_key(&point);
        if known.points.contains_key(&point) && !needed {
            drops.entry(guest).or_default().insert(point);
        }
    }
    drops
}

/// Writes kept points that build on dropped ones anew, on the kept one before.
fn rebase(inner: &Inner, guest: GuestId, drops: &BTreeSet<u64>) -> Result<(), PruneError> {
    let mut kept: Option<(PointEntry, PointMap)> = None;
    walk(inner, guest, Some(drops), &mut |entry, map, head| {
        let point = entry.header.point;
        if drops.contains(&point) {
            return Ok(());
        }
        let mut entry = entry.clone();
        let on = kept.as_ref().filter(|(on, _)| on.may_be_base());
        if drops.contains(&entry.base) {
            let nothing = PointMap::default();
            let (base, below) = on.map_or((None, &nothing), |(base, map)| (Some(base), map));
            let number = base.map_or(0, |base| base.header.point);
            let runs = map.since(below).into_iter();
            let bytes = manifest::encode(&entry.header, number, &head.context, runs);
            let path = manifest::path_of(&inner.manifests, guest, point);
            let written = manifest::write(&*inner.disk, &path, &bytes);
            if let Err(unplaced) = written {
                if unplaced.named {
                    // The new one is what is read from now on, whether it lasts or not.
                    entry = PointEntry::new(entry.header, base, bytes.len() as u64);
                    if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
                        state.points.insert(point, entry);
                    }
                }
                return Err(PruneError::File(unplaced.into()));
            }
            entry = PointEntry::new(entry.header, base, bytes.len() as u64);
        }
        if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
            state.points.insert(point, entry.clone());
        }
        kept = Some((entry, map.clone()));
        Ok(())
    })
}

/// Drops points, and removes their manifests.
fn drop_points(inner: &Inner, guest: GuestId, drops: &BTreeSet<u64>) -> Result<usize, PruneError> {
    let known = match held(&inner.state).guests.get(&guest) {
        Some(state) => state.points.clone(),
        None => return Ok(0),
    };
    // Where the newest goes and an older one stays, that one is what the next builds on:
    // its map is there before anything goes, or nothing does.
    let newest = match known.last_key_value() {
        Some((newest, _)) if drops.contains(newest) => {
            let left = known.keys().rfind(|point| !drops.contains(point));
            Some(inner.load_map(guest, left.copied().unwrap_or(0))?)
        }
        _ => None,
    };
    if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
        state.points.retain(|point, _| !drops.contains(point));
        if let Some(map) = newest {
            state.newest = Arc::new(map);
        }
    }
    if let Err((failed, error)) = remove_manifests(inner, guest, drops, &known) {
        let mut back = known;
        back.retain(|point, _| *point <= failed && drops.contains(point));
        put_back(inner, guest, back);
        return Err(error.into());
    }
    if let Some(state) = held(&inner.state).guests.get_mut(&guest)
        && state.points.is_empty()
    {
        state.unsealed.clear();
        state.rebuilt.clear();
    }
    Ok(drops.len())
}

/// Removes manifests, newest first, so that none is left without its base. An error
/// comes with the point from which on, downward, they are still there.
fn remove_manifests(
    inner: &Inner,
    guest: GuestId,
    drops: &BTreeSet<u64>,
    known: &BTreeMap<u64, PointEntry>,
) -> Result<(), (u64, FileError)> {
    let dir = inner.manifests.join(guest.to_string());
    let mut removed: Option<&PointEntry> = None;
    for &point in drops.iter().rev() {
        // A disk may keep one removal and lose another: a base goes when it is
        // sure that what builds on it has gone.
        if removed.is_some_and(|above| above.base == point) {
            sync_dir(&*inner.disk, &dir).map_err(|error| (point, error))?;
        }
        removed = known.get(&point);
        let path = manifest::path_of(&inner.manifests, guest, point);
        match inner.disk.remove(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err((point, FileError::at("remove", &path)(error)));
            }
            _ => {}
        }
    }
    sync_dir(&*inner.disk, &dir).map_err(|error| (0, error))
}

/// Points whose manifests could not be removed are there as before, for the next prune.
fn put_back(inner: &Inner, guest: GuestId, mut back: BTreeMap<u64, PointEntry>) {
    let left = held(&inner.state)
        .guests
        .get(&guest)
        .map_or(0, GuestState::newest_point);
    let mut newest = None;
    while let Some((&point, _)) = back.last_key_value()
        && point > left
        && newest.is_none()
    {
        match inner.load_map(guest, point) {
            Ok(map) => newest = Some(Arc::new(map)),
            // As when the store is opened: the newest point must be whole.
            Err(error) => {
                tracing::error!(%guest, point, %error, "a point that was to be dropped is left out");
                back.remove(&point);
            }
        }
    }
    if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
        state.points.extend(back);
        if let Some(map) = newest {
            state.newest = map;
        }
    }
}

/// Copies what is needed of a segment to the end of the log.
fn move_live(inner: &Inner, segment: u32) -> Result<(), PruneError> {
    let mut seqs = Vec::new();
    inner.log.each(&mut |seq, location| {
        if location.segment == segment {
            seqs.push(seq);
        }
    });
    for seqs in seqs.chunks(16) {
        let mut copies = Vec::new();
        for &seq in seqs {
            let mut bytes = Vec::new();
            inner.log.read(seq, &mut bytes)?;
            copies.push(bytes);
        }
        let mut batches = Vec::new();
        for bytes in &copies {
            // A damaged batch is not copied as if it were whole: the prune stops.
            let view = BatchView::parse(bytes)?;
            batches.push((*view.header(), &bytes[..]));
        }
        inner.log.move_to_end(&batches)?;
    }
    Ok(())
}
