//! Reading what is stored: batches by number, maps by point.

use std::collections::HashMap;
use std::path::Path;

use super::{Inner, PointEntry, Suspect, held};
use crate::codec::{BatchError, BatchView, Body, Content, EntriesView, Expander};
use crate::files::is_bad_sector;
use crate::limits::MAP_LEAF;
use crate::log::LogError;
use crate::manifest::{self, ManifestError};
use crate::map::{PointMap, Run};
use crate::unit::{GuestId, Place};

/// Why a stored batch could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExpandError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Batch(#[from] BatchError),
}

/// Working memory to read batches with.
#[derive(Default)]
pub(crate) struct Reader {
    expander: Expander,
    bytes: Vec<u8>,
}

/// Which slots of batches with differences hold something: looked up once a batch.
pub(crate) type Sound = HashMap<u64, u64>;

/// Units that are placed between two looks at how much memory a map takes.
const STEP: u64 = 64 * MAP_LEAF as u64;

impl Inner {
    /// Reads, verifies and expands one batch. Differences are left as they are.
    /// One that is damaged is known as such from then on.
    pub(crate) fn expand(
        &self,
        seq: u64,
        reader: &mut Reader,
        body: &mut Body,
    ) -> Result<(), ExpandError> {
        let expanded = self.read_whole(seq, reader, body);
        let unreadable = match &expanded {
            Ok(()) | Err(ExpandError::Log(LogError::Missing { .. })) => return expanded,
            Err(ExpandError::Batch(_)) => false,
            Err(ExpandError::Log(LogError::File(error))) if is_bad_sector(&error.source) => true,
            Err(ExpandError::Log(_)) => return expanded,
        };
        // One that is pruned meanwhile is read where another lies by then.
        if let Err(error) = &expanded
            && self.log.locate(seq).is_some()
        {
            self.found_damaged(Suspect::Batch(seq), error.to_string(), unreadable);
        }
        expanded
    }

    fn read_whole(
        &self,
        seq: u64,
        reader: &mut Reader,
        body: &mut Body,
    ) -> Result<(), ExpandError> {
        self.log.read(seq, &mut reader.bytes)?;
        let view = BatchView::parse(&reader.bytes)?;
        if view.header().seq != seq {
            return Err(BatchError::Damaged {
                seq,
                part: "entries",
            }
            .into());
        }
        Ok(view.expand(&mut reader.expander, body)?)
    }

    /// Calls `each` with every entry of a stored batch.
    pub(crate) fn each_entry(
        &self,
        seq: u64,
        bytes: &mut Vec<u8>,
        each: &mut dyn FnMut(crate::codec::Entry),
    ) -> Result<(), ExpandError> {
        self.log.read_entries(seq, bytes)?;
        EntriesView::parse(bytes)?.entries().for_each(each);
        Ok(())
    }

    /// What is known of a point.
    pub(crate) fn entry(&self, guest: GuestId, point: u64) -> Option<PointEntry> {
        let state = held(&self.state);
        state.guests.get(&guest)?.points.get(&point).cloned()
    }

    /// Does this place hold a unit: a literal, or a difference whose base is here?
    ///
    /// # Errors
    /// When the disk would not tell: that is no answer.
    pub(crate) fn resolves(&self, place: Place, sound: &mut Sound) -> Result<bool, LogError> {
        let Some(at) = self.log.locate(place.seq()) else {
            return Ok(false);
        };
        if self.is_rotten(place.seq()) {
            return Ok(false);
        }
        Ok(place.index() < at.literals
            && (!at.deltas || self.sound_slots(place.seq(), sound)? >> place.index() & 1 == 1))
    }

    /// A bit for each slot of a batch with differences that can be read.
    fn sound_slots(&self, seq: u64, sound: &mut Sound) -> Result<u64, LogError> {
        if let Some(&slots) = sound.get(&seq) {
            return Ok(slots);
        }
        let mut slots = u64::MAX;
        let mut bytes = Vec::new();
        let read = self.each_entry(seq, &mut bytes, &mut |entry| {
            if let Content::Delta(delta) = entry.content {
                let base = self.log.locate(delta.base.seq());
                let lost = base.is_none_or(|base| delta.base.index() >= base.literals);
                if lost || self.is_rotten(delta.base.seq()) {
                    slots &= !(1 << delta.index);
                }
            }
        });
        match read {
            Ok(()) => {}
            // A disk that would not read it once may do so the next time: to say
            // "lost" would drop a point, or let a prune take what it needs.
            Err(ExpandError::Log(error @ LogError::File(_))) => return Err(error),
            // A damaged batch holds nothing; who needs it is told why then.
            Err(_) => slots = 0,
        }
        sound.insert(seq, slots);
        Ok(slots)
    }

    /// The first place of a map that holds nothing, if any.
    ///
    /// # Errors
    /// As for [`Inner::resolves`].
    pub(crate) fn dangling(&self, map: &PointMap) -> Result<Option<Place>, LogError> {
        let mut checked = 0; // Runs often follow one another in one batch.
        let mut sound = Sound::new();
        for run in map.all_runs() {
            for seq in run.seqs() {
                let first = run.place.max(Place(seq << 6));
                let last = Place(run.place.0 + run.count - 1).min(Place(seq << 6 | 63));
                if last.0 == checked {
                    continue;
                }
                if !self.resolves(last, &mut sound)? {
                    return Ok(Some(last));
                }
                if sound.contains_key(&seq) {
                    // Slots of this batch stand or fall each by itself.
                    for place in (first.0..last.0).map(Place) {
                        if !self.resolves(place, &mut sound)? {
                            return Ok(Some(place));
                        }
                    }
                } else {
                    checked = last.0;
                }
            }
        }
        Ok(None)
    }

    /// Builds the map of a point from its manifests, oldest first.
    pub(crate) fn load_map(&self, guest: GuestId, point: u64) -> Result<PointMap, ManifestError> {
        let mut chain = Vec::new();
        let mut at = point;
        while at != 0 {
            let path = manifest::path_of(&self.manifests, guest, at);
            chain.push(path.clone());
            let state = held(&self.state);
            let entry = state
                .guests
                .get(&guest)
                .and_then(|guest| guest.points.get(&at));
            let base = entry.map(|entry| entry.base);
            drop(state);
            at = match base {
                Some(base) => base,
                None => manifest::read_head(&*self.disk, &path)?.base,
            };
        }
        let mut map = PointMap::default();
        for path in chain.iter().rev() {
            self.apply(path, &mut map)?;
        }
        Ok(map)
    }

    /// A manifest names these places: the numbers in them were given, whatever became of
    /// their batches.
    pub(crate) fn names(&self, run: &Run) {
        if run.place != Place::ZERO {
            self.log.was_given(*run.seqs().end());
        }
    }

    /// Applies one manifest to the map of its base.
    pub(crate) fn apply(
        &self,
        path: &Path,
        map: &mut PointMap,
    ) -> Result<manifest::Head, ManifestError> {
        let most = self.options.map_bytes;
        let mut fits = true;
        let head = manifest::read(&*self.disk, path, &mut |run| {
            self.names(&run);
            // A few bytes may tell of more units than there is memory for.
            for part in run.parts(STEP) {
                fits = fits && leaf_bytes(map) <= most;
                if !fits {
                    break;
                }
                map.set(&part);
            }
        })?;
        if !fits {
            let why = format!("it needs more than map_bytes ({most}); raise it");
            return Err(ManifestError::Damaged {
                path: path.to_path_buf(),
                why,
            });
        }
        Ok(head)
    }
}

pub(crate) fn leaf_bytes(map: &PointMap) -> usize {
    map.leaves() * MAP_LEAF * size_of::<Place>()
}
