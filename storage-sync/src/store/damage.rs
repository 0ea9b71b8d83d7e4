//! What is known to be damaged, and who needs it.
//!
//! A scrub finds it, or whoever reads a batch and cannot. From then on a new
//! point may not refer to it ([`Inner::is_rotten`]), so what the source sends
//! anew makes the next point whole; a batch that is appended again, or read
//! well, is damaged no more. It is kept in memory: a site that wants to know it
//! after a restart keeps [`Store::suspects`] and tells them again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::scrub::{Damage, Damaged, Scrub, ScrubOptions};
use super::{Inner, PointEntry, Reader, Store, held};
use crate::codec::{Body, Content};
use crate::files::{FileError, is_bad_sector};
use crate::manifest::{self, ManifestError};
use crate::map::{PointMap, Run};
use crate::unit::{GuestId, Place, VolumeIndex};

/// Most runs that one [`Need`] names; what is beyond them is named once these are there.
pub const NEED_RUNS: usize = 65_536;

/// Something that was found damaged, by its name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Suspect {
    /// A batch.
    Batch(u64),
    /// The manifest of a guest's point.
    Manifest(GuestId, u64),
    /// A guest's point, which needs what is not here at all.
    Point(GuestId, u64),
}

/// What the newest point of a guest needs and cannot have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// The guest.
    pub guest: GuestId,
    /// Its newest point.
    pub point: u64,
    /// Units whose content is damaged: volume, first unit, how many.
    pub units: Vec<(VolumeIndex, u64, u64)>,
    /// Batches that nothing may refer to any more: the damaged ones, and those
    /// with differences from them.
    pub batches: Vec<u64>,
}

#[derive(Debug, Clone)]
struct Found {
    why: String,
    /// The disk would not read it: another day it may.
    unreadable: bool,
}

/// What is known to be damaged in one store.
#[derive(Default)]
pub(crate) struct Known {
    found: BTreeMap<Suspect, Found>,
    /// Counts what was found, and what was found whole again.
    changes: u64,
}

/// Slots of batches with differences whose base is damaged, and where that is listed.
pub(super) type Unsound = BTreeMap<u64, BTreeMap<u8, usize>>;

impl Inner {
    /// Something is damaged.
    pub(crate) fn found_damaged(&self, suspect: Suspect, why: String, unreadable: bool) {
        let mut known = held(&self.known);
        let found = Found { why, unreadable };
        if known.found.insert(suspect, found).is_none() {
            known.changes += 1;
        }
    }

    /// It is not, or not any more.
    pub(crate) fn found_whole(&self, suspect: Suspect) {
        let mut known = held(&self.known);
        if known.found.remove(&suspect).is_some() {
            known.changes += 1;
        }
    }

    /// Is this batch known to hold nothing that can be read? One that the disk
    /// only would not read is not: it may do so the next time.
    pub(crate) fn is_rotten(&self, seq: u64) -> bool {
        let known = held(&self.known);
        let found = known.found.get(&Suspect::Batch(seq));
        found.is_some_and(|found| !found.unreadable)
    }

    fn damaged_batches(&self) -> BTreeMap<u64, String> {
        let known = held(&self.known);
        let batches = known.found.iter().filter_map(|(suspect, found)| {
            let Suspect::Batch(seq) = suspect else {
                return None;
            };
            Some((*seq, found.why.clone()))
        });
        batches
            .filter(|(seq, _)| self.log.locate(*seq).is_some())
            .collect()
    }

    /// Reads something anew that was found damaged.
    fn look_at(&self, suspect: Suspect) {
        match suspect {
            // Reading it tells of it.
            Suspect::Batch(seq) if self.log.locate(seq).is_some() => {
                if self
                    .expand(seq, &mut Reader::default(), &mut Body::new())
                    .is_ok()
                {
                    self.found_whole(suspect);
                }
            }
            Suspect::Manifest(guest, point) if self.entry(guest, point).is_some() => {
                let _writing = held(&self.writing);
                let path = manifest::path_of(&self.manifests, guest, point);
                match manifest::read(&*self.disk, &path, &mut |_| {}) {
                    Ok(_) => self.found_whole(suspect),
                    Err(error) => {
                        let unreadable = matches!(&error, ManifestError::File(error) if is_bad_sector(&error.source));
                        self.found_damaged(suspect, error.to_string(), unreadable);
                    }
                }
            }
            Suspect::Point(guest, point) if self.entry(guest, point).is_some() => {
                let _writing = held(&self.writing);
                let map = self
                    .load_map(guest, point)
                    .map_err(|error| error.to_string());
                let dangling =
                    map.and_then(|map| self.dangling(&map).map_err(|error| error.to_string()));
                match dangling {
                    Ok(None) => self.found_whole(suspect),
                    Ok(Some(place)) => self.found_damaged(suspect, lacks(place), false),
                    Err(why) => self.found_damaged(suspect, why, false),
                }
            }
            // It was dropped, and its damage with it.
            _ => self.found_whole(suspect),
        }
    }

    /// Slots of batches with differences whose base lies in one of `lost`.
    pub(super) fn unsound(&self, lost: &BTreeMap<u64, usize>) -> Unsound {
        let mut with = Vec::new();
        if !lost.is_empty() {
            self.log.each(&mut |seq, location| {
                if location.deltas && !lost.contains_key(&seq) {
                    with.push(seq);
                }
            });
        }
        let mut unsound = Unsound::new();
        let mut bytes = Vec::new();
        for seq in with {
            let read = self.each_entry(seq, &mut bytes, &mut |entry| {
                if let Content::Delta(delta) = entry.content
                    && let Some(&at) = lost.get(&delta.base.seq())
                {
                    unsound.entry(seq).or_default().insert(delta.index, at);
                }
            });
            if let Err(error) = read {
                tracing::warn!(seq, %error, "its differences were not looked at");
            }
        }
        unsound
    }

    /// The damage that a manifest builds on, itself included.
    fn chain_damage(&self, guest: GuestId, point: u64) -> Option<String> {
        let mut at = point;
        while at != 0 {
            let known = held(&self.known);
            if let Some(found) = known.found.get(&Suspect::Manifest(guest, at)) {
                return Some(found.why.clone());
            }
            drop(known);
            at = self.entry(guest, at)?.base;
        }
        None
    }

    /// May new manifests be told against this one?
    pub(super) fn is_sound_base(&self, entry: &PointEntry) -> bool {
        let header = &entry.header;
        self.chain_damage(header.guest, header.point).is_none()
    }
}

/// The parts of a map's run that lie in damaged batches, as places.
fn damaged_parts<'a>(
    run: &'a Run,
    lost: &'a BTreeMap<u64, usize>,
    unsound: &'a Unsound,
) -> impl Iterator<Item = Place> + 'a {
    let hit = move |seq: &u64| lost.contains_key(seq) || unsound.contains_key(seq);
    let places = run.seqs().filter(hit).flat_map(move |seq| {
        let first = run.place.max(Place(seq << 6));
        let last = Place(run.place.0 + run.count - 1).min(Place(seq << 6 | 63));
        (first.0..=last.0).map(Place)
    });
    places.filter(move |place| {
        lost.contains_key(&place.seq())
            || unsound
                .get(&place.seq())
                .is_some_and(|slots| slots.contains_key(&place.index()))
    })
}

impl Store {
    /// Counts what was found damaged, or whole again: when it is as it was,
    /// [`Store::damage`] is too, but for points that came or went.
    pub fn damage_changes(&self) -> u64 {
        held(&self.0.known).changes
    }

    /// Is nothing known to be damaged?
    pub fn is_sound(&self) -> bool {
        held(&self.0.known).found.is_empty()
    }

    /// By name what is known to be damaged, for [`Store::suspect`] after a restart.
    pub fn suspects(&self) -> Vec<Suspect> {
        held(&self.0.known).found.keys().copied().collect()
    }

    /// Reads these: those that are damaged still are known from here on.
    pub fn suspect(&self, suspects: &[Suspect]) {
        suspects.iter().for_each(|suspect| self.0.look_at(*suspect));
    }

    /// What is known to be damaged, and the points that cannot be restored in
    /// full for it. Manifests, and what the disk would not read, are read again.
    pub fn damage(&self) -> Vec<Damage> {
        let inner = &self.0;
        let again: Vec<Suspect> = {
            let known = held(&inner.known);
            let found = known.found.iter();
            let again =
                found.filter(|(s, found)| found.unreadable || matches!(s, Suspect::Manifest(..)));
            again.map(|(suspect, _)| *suspect).collect()
        };
        self.suspect(&again);
        let (mut gone, mut damage) = (Vec::new(), Vec::new());
        let mut points = 0;
        for (suspect, found) in &held(&inner.known).found {
            let (what, path) = match suspect {
                Suspect::Batch(seq) => match inner.log.locate(*seq) {
                    Some(at) => (Damaged::Batch(*seq), inner.log.path_of(at.segment)),
                    None => {
                        gone.push(*suspect);
                        continue;
                    }
                },
                Suspect::Manifest(guest, point) => (
                    Damaged::Manifest,
                    manifest::path_of(&inner.manifests, *guest, *point),
                ),
                // Found again below, unless it was dropped.
                Suspect::Point(guest, point) => {
                    match inner.entry(*guest, *point) {
                        Some(_) => points += 1,
                        None => gone.push(*suspect),
                    }
                    continue;
                }
            };
            damage.push(of(what, path, found));
        }
        gone.into_iter().for_each(|gone| inner.found_whole(gone));
        if damage.is_empty() && points == 0 {
            return damage;
        }
        let mut scrub = Scrub::new(inner, ScrubOptions::default());
        scrub.report.damage = damage;
        scrub.points();
        scrub.report.damage
    }

    /// Why a point cannot be restored in full, as far as is known.
    pub fn damaged_point(&self, guest: GuestId, point: u64) -> Option<String> {
        let inner = &self.0;
        if self.is_sound() {
            return None;
        }
        if let Some(why) = inner.chain_damage(guest, point) {
            return Some(why);
        }
        if let Some(found) = held(&inner.known).found.get(&Suspect::Point(guest, point)) {
            return Some(found.why.clone());
        }
        let batches = inner.damaged_batches();
        if batches.is_empty() {
            return None;
        }
        let lost = batches.keys().copied().zip(0..).collect();
        let unsound = inner.unsound(&lost);
        let map = {
            let _writing = held(&inner.writing);
            inner.load_map(guest, point)
        };
        let map = match map {
            Ok(map) => map,
            Err(error) => return Some(error.to_string()),
        };
        let hit = map
            .all_runs()
            .find_map(|run| damaged_parts(&run, &lost, &unsound).next())?;
        let seq = match lost.contains_key(&hit.seq()) {
            true => hit.seq(),
            false => {
                let at = *unsound.get(&hit.seq())?.get(&hit.index())?;
                *batches.keys().nth(at)?
            }
        };
        batches.get(&seq).cloned()
    }

    /// What the newest points need of what is damaged, for each guest that does.
    pub fn needs(&self) -> Vec<Need> {
        let inner = &self.0;
        let batches = inner.damaged_batches();
        if batches.is_empty() {
            return Vec::new();
        }
        let lost: BTreeMap<u64, usize> = batches.keys().copied().zip(0..).collect();
        let unsound = inner.unsound(&lost);
        let newest: Vec<(GuestId, u64, Arc<PointMap>)> = {
            let state = held(&inner.state);
            let guests = state.guests.iter().filter(|(guest, _)| !guest.is_image());
            guests
                .map(|(guest, state)| (*guest, state.newest_point(), state.newest.clone()))
                .collect()
        };
        let mut needs = Vec::new();
        for (guest, point, map) in newest {
            let mut units: Vec<(VolumeIndex, u64, u64)> = Vec::new();
            'map: for run in map.all_runs() {
                for place in damaged_parts(&run, &lost, &unsound) {
                    let unit = run.unit + (place.0 - run.place.0);
                    let full = units.len() == NEED_RUNS;
                    match units.last_mut() {
                        Some((volume, first, count))
                            if *volume == run.volume && *first + *count == unit =>
                        {
                            *count += 1;
                        }
                        _ if full => break 'map,
                        _ => units.push((run.volume, unit, 1)),
                    }
                }
            }
            if !units.is_empty() {
                let refused: BTreeSet<u64> = lost.keys().chain(unsound.keys()).copied().collect();
                needs.push(Need {
                    guest,
                    point,
                    units,
                    batches: refused.into_iter().collect(),
                });
            }
        }
        needs
    }

    /// Writes manifests of newest points anew that build on damaged ones, from
    /// their maps in memory, as far as what else they hold can be read. Returns
    /// how many.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn mend_manifests(&self) -> Result<usize, FileError> {
        let inner = &self.0;
        let guests: BTreeSet<GuestId> = {
            let known = held(&inner.known);
            let manifests = known.found.keys().filter_map(|suspect| match suspect {
                Suspect::Manifest(guest, _) => Some(*guest),
                Suspect::Batch(_) | Suspect::Point(..) => None,
            });
            manifests.collect()
        };
        let mut mended = 0;
        for guest in guests {
            let _writing = held(&inner.writing);
            let newest = {
                let state = held(&inner.state);
                let state = state.guests.get(&guest);
                state.map(|state| (state.newest_point(), state.newest.clone()))
            };
            let Some((point, map)) = newest else { continue };
            let Some(entry) = inner.entry(guest, point) else {
                continue;
            };
            if inner.chain_damage(guest, point).is_none() {
                continue;
            }
            let path = manifest::path_of(&inner.manifests, guest, point);
            // Without the definition of its guest a point cannot be run.
            let Ok(head) = manifest::read_head(&*inner.disk, &path) else {
                continue;
            };
            if head.header != *entry.header {
                continue;
            }
            let bytes = manifest::encode(&entry.header, 0, &head.context, map.all_runs());
            let written = manifest::write(&*inner.disk, &path, &bytes);
            if written.as_ref().err().is_none_or(|unplaced| unplaced.named) {
                // The new one is what is read from now on, whether it lasts or not.
                let entry = PointEntry::new(entry.header, None, bytes.len() as u64);
                if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
                    state.points.insert(point, entry);
                }
                inner.found_whole(Suspect::Manifest(guest, point));
            }
            written?;
            tracing::warn!(%guest, point, "its manifest was damaged, and was written anew");
            mended += 1;
        }
        Ok(mended)
    }
}

/// What is told of a point that needs a place that holds nothing.
pub(super) fn lacks(place: Place) -> String {
    format!("it needs unit {place:?}, which the log has lost")
}

fn of(what: Damaged, path: PathBuf, found: &Found) -> Damage {
    Damage {
        what,
        path,
        why: found.why.clone(),
        unreadable: found.unreadable,
        points: Vec::new(),
    }
}
