//! Reading what is stored: batches by number, maps by point.

use std::path::Path;

use super::{Inner, held};
use crate::codec::{BatchError, BatchView, Expander};
use crate::limits::MAP_LEAF;
use crate::log::LogError;
use crate::manifest::{self, ManifestError};
use crate::map::PointMap;
use crate::unit::{GuestId, Place};

/// Why a stored batch could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExpandError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Batch(#[from] BatchError),
}

impl Inner {
    /// Reads, verifies and expands one batch.
    pub(crate) fn expand(
        &self,
        seq: u64,
        expander: &mut Expander,
        bytes: &mut Vec<u8>,
        literals: &mut Vec<u8>,
    ) -> Result<(), ExpandError> {
        self.log.read(seq, bytes)?;
        let view = BatchView::parse(bytes)?;
        if view.header().seq != seq {
            return Err(BatchError::Damaged {
                seq,
                part: "entries",
            }
            .into());
        }
        Ok(view.literals(expander, literals)?)
    }

    /// Does this place hold a literal?
    pub(crate) fn resolves(&self, place: Place) -> bool {
        self.log
            .locate(place.seq())
            .is_some_and(|at| place.index() < at.literals)
    }

    /// The first place of a map that holds nothing, if any.
    pub(crate) fn dangling(&self, map: &PointMap) -> Option<Place> {
        let mut checked = 0; // Runs often follow one another in one batch.
        for run in map.all_runs() {
            for seq in run.seqs() {
                let last = Place(run.place.0 + run.count - 1);
                let last = if last.seq() == seq {
                    last
                } else {
                    Place::new(seq, 63)
                };
                if last.0 == checked {
                    continue;
                }
                if !self.resolves(last) {
                    return Some(last);
                }
                checked = last.0;
            }
        }
        None
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
                None => manifest::read_head(&path)?.base,
            };
        }
        let mut map = PointMap::default();
        for path in chain.iter().rev() {
            self.apply(path, &mut map)?;
        }
        Ok(map)
    }

    /// Applies one manifest to the map of its base.
    pub(crate) fn apply(
        &self,
        path: &Path,
        map: &mut PointMap,
    ) -> Result<manifest::Head, ManifestError> {
        let most = self.options.map_bytes;
        let mut fits = true;
        let head = manifest::read(path, &mut |run| {
            fits = fits && leaf_bytes(map) <= most;
            if fits {
                map.set(&run);
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
