//! A recovery point as readable volumes.
//!
//! A [`Replica`] reads whatever was true at its cut, while new points are
//! sealed beside it. Every batch is verified again on the way out: a damaged
//! one is a named error, never data. While a replica is open, its point is
//! pinned: prune leaves it.

mod fill;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::codec::{BatchError, Body, Slot};
use crate::limits::BATCH_BODY_RAW;
use crate::log::LogError;
use crate::manifest::{self, ManifestError, PointHeader};
use crate::map::{PointMap, Run};
use crate::store::{ExpandError, Reader, Store, Unbuilt, held, rebuild};
use crate::unit::{GuestId, Place, UNIT, Volume, VolumeIndex};

/// Why a point cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// There is no such point.
    #[error("guest {guest} has no recovery point {point} here{}", newest_is(*newest))]
    NoPoint {
        /// The guest.
        guest: GuestId,
        /// The number asked for.
        point: u64,
        /// The newest one there is; 0: none.
        newest: u64,
    },
    /// The log has lost what the point needs.
    #[error(
        "point {point} needs unit {place:?}, which the log has lost; \
         use another point, and check the disk of the store"
    )]
    Lost {
        /// The point.
        point: u64,
        /// The first place that holds nothing.
        place: Place,
    },
    /// Asked for units beyond the volume, or into a buffer of another size.
    #[error("units {unit}+{count} of volume {volume} do not exist, or the buffer has another size")]
    Range {
        /// The volume.
        volume: VolumeIndex,
        /// First unit.
        unit: u64,
        /// Units.
        count: u64,
    },
    /// A stored batch is damaged.
    #[error(
        "batch {seq}, which this point needs, is damaged on disk ({source}); \
         use an older point, and check the disk of the store"
    )]
    Batch {
        /// The batch.
        seq: u64,
        /// Which check failed.
        #[source]
        source: BatchError,
    },
    /// A unit told as a difference does not come out right.
    #[error(
        "point {point} needs a unit told against {base:?}, and the two do not fit together; \
         use an older point, and check the disk of the store"
    )]
    Difference {
        /// The point.
        point: u64,
        /// What it is told against.
        base: Place,
    },
    /// A stored batch cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The point's manifest is damaged or cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

fn unexpanded(seq: u64, error: ExpandError) -> ReplicaError {
    match error {
        ExpandError::Log(error) => error.into(),
        ExpandError::Batch(source) => ReplicaError::Batch { seq, source },
    }
}

fn newest_is(newest: u64) -> String {
    match newest {
        0 => "; it has none at all".into(),
        newest => format!("; the newest is {newest}, `farhaven points` lists them"),
    }
}

#[derive(Default)]
struct Cache {
    batches: HashMap<u64, (u64, Arc<Body>)>,
    tick: u64,
}

/// One recovery point, open for reading from any thread.
pub struct Replica {
    store: Store,
    header: Arc<PointHeader>,
    context: Vec<u8>,
    map: Arc<PointMap>,
    cache: Mutex<Cache>,
    cached_most: usize,
    readers: Mutex<Vec<Reader>>,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Replica({} point {})",
            self.header.guest, self.header.point
        )
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.store.unpin(self.header.guest, self.header.point);
    }
}

impl Store {
    /// Opens a recovery point for reading.
    ///
    /// # Errors
    /// When it does not exist, or cannot be restored in full.
    pub fn open_point(&self, guest: GuestId, point: u64) -> Result<Replica, ReplicaError> {
        let replica = self.open_in_part(guest, point)?;
        match self.0.dangling(&replica.map)? {
            None => Ok(replica),
            Some(place) => Err(ReplicaError::Lost { point, place }),
        }
    }

    /// As [`Store::open_point`], also when not all of it can be read: what cannot
    /// is an error of [`Replica::read`].
    ///
    /// # Errors
    /// When it does not exist, or its manifest cannot be read.
    pub fn open_in_part(&self, guest: GuestId, point: u64) -> Result<Replica, ReplicaError> {
        let (header, newest) = {
            let mut state = held(&self.0.state);
            let state = state.guests.get_mut(&guest);
            let newest = state.as_ref().map_or(0, |state| state.newest_point());
            let missing = ReplicaError::NoPoint {
                guest,
                point,
                newest,
            };
            let Some(state) = state else {
                return Err(missing);
            };
            let Some(entry) = state.points.get(&point) else {
                return Err(missing);
            };
            *state.pins.entry(point).or_default() += 1;
            (
                entry.header.clone(),
                (newest == point).then(|| state.newest.clone()),
            )
        };
        // From here on, dropping the replica unpins.
        let cached_most = (self.0.options.cache_bytes / BATCH_BODY_RAW).max(1);
        let mut replica = Replica {
            store: self.clone(),
            header,
            context: Vec::new(),
            map: Arc::default(),
            cache: Mutex::default(),
            cached_most,
            readers: Mutex::default(),
        };
        let path = manifest::path_of(&self.0.manifests, guest, point);
        replica.context = manifest::read_head(&*self.0.disk, &path)?.context;
        replica.map = match newest {
            Some(map) => map,
            None => {
                // A prune may be giving manifests another base: not now.
                let _writing = held(&self.0.writing);
                Arc::new(self.0.load_map(guest, point)?)
            }
        };
        Ok(replica)
    }

    fn unpin(&self, guest: GuestId, point: u64) {
        let mut state = held(&self.0.state);
        let Some(state) = state.guests.get_mut(&guest) else {
            return;
        };
        if let Some(pins) = state.pins.get_mut(&point) {
            *pins -= 1;
            if *pins == 0 {
                state.pins.remove(&point);
            }
        }
    }
}

impl Replica {
    /// What is told of the point.
    pub fn header(&self) -> &PointHeader {
        &self.header
    }

    /// The guest's volumes at the cut.
    pub fn volumes(&self) -> &[Volume] {
        &self.header.volumes
    }

    /// What the source gave along: how to launch the guest.
    pub fn context(&self) -> &[u8] {
        &self.context
    }

    /// Reads `count` units of `volume` from `unit` on into `out`, which has
    /// exactly `count` × 4 KiB.
    ///
    /// # Errors
    /// See [`ReplicaError`]; `out` may be partly written then.
    pub fn read(
        &self,
        volume: VolumeIndex,
        unit: u64,
        count: u64,
        out: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let range = ReplicaError::Range {
            volume,
            unit,
            count,
        };
        let units = self
            .volumes()
            .get(usize::from(volume))
            .map_or(0, Volume::units);
        let (out, rest) = out.as_chunks_mut::<UNIT>();
        let fits = unit.checked_add(count).is_some_and(|end| end <= units);
        if !fits || out.len() as u64 != count || !rest.is_empty() {
            return Err(range);
        }
        let mut batch: Option<(u64, Arc<Body>)> = None;
        for (unit, out) in (unit..).zip(out) {
            let place = self.map.place(volume, unit);
            if place == Place::ZERO {
                out.fill(0);
                continue;
            }
            let body = match &batch {
                Some((seq, body)) if *seq == place.seq() => body,
                _ => &batch.insert((place.seq(), self.batch(place.seq())?)).1,
            };
            match body.slot(place.index()) {
                Some(Slot::Whole(unit)) => *out = *unit,
                Some(Slot::Difference(delta, difference)) => {
                    let base = delta.base;
                    // A base is a literal: it needs no other batch.
                    let body = self.batch(base.seq())?;
                    let unit = rebuild(&body, &delta, difference);
                    *out = unit.ok_or(self.unbuilt(Unbuilt { base, source: None }))?;
                }
                None => return Err(self.lost(place)),
            }
        }
        Ok(())
    }

    fn lost(&self, place: Place) -> ReplicaError {
        ReplicaError::Lost {
            point: self.header.point,
            place,
        }
    }

    fn unbuilt(&self, Unbuilt { base, source }: Unbuilt) -> ReplicaError {
        match source {
            Some(error) => unexpanded(base.seq(), error),
            None => ReplicaError::Difference {
                point: self.header.point,
                base,
            },
        }
    }

    /// A batch's body, from the cache or from disk.
    fn batch(&self, seq: u64) -> Result<Arc<Body>, ReplicaError> {
        {
            let mut cache = held(&self.cache);
            cache.tick += 1;
            let tick = cache.tick;
            if let Some((used, body)) = cache.batches.get_mut(&seq) {
                *used = tick;
                return Ok(body.clone());
            }
        }
        let mut body = Body::new();
        self.expand(seq, &mut body)?;
        let body = Arc::new(body);
        let mut cache = held(&self.cache);
        while cache.batches.len() >= self.cached_most {
            let oldest = cache.batches.iter().min_by_key(|(_, (used, _))| *used);
            let Some(oldest) = oldest.map(|(&seq, _)| seq) else {
                break;
            };
            cache.batches.remove(&oldest);
        }
        let tick = cache.tick;
        cache.batches.insert(seq, (tick, body.clone()));
        Ok(body)
    }

    fn expand(&self, seq: u64, body: &mut Body) -> Result<(), ReplicaError> {
        let mut reader = held(&self.readers).pop().unwrap_or_default();
        let outcome = self.store.0.expand(seq, &mut reader, body);
        held(&self.readers).push(reader);
        outcome.map_err(|error| unexpanded(seq, error))
    }

    /// Runs of `volume` that are not zeros: (first unit, count), ascending.
    pub fn nonzero_runs(&self, volume: VolumeIndex) -> impl Iterator<Item = (u64, u64)> {
        let mut runs = self.map.runs(volume).peekable();
        std::iter::from_fn(move || {
            let Run {
                unit, mut count, ..
            } = runs.next()?;
            while let Some(next) = runs.next_if(|next| next.unit == unit + count) {
                count += next.count;
            }
            Some((unit, count))
        })
    }

    /// Runs of `volume` that are not zeros, with the place of the first unit:
    /// what a source needs to take up its tables again.
    pub fn map_pages(&self, volume: VolumeIndex) -> impl Iterator<Item = Run> {
        self.map.runs(volume)
    }

    /// Runs that may read differently here than at `old` (an older or newer
    /// point of the same guest), zeros included.
    pub fn changes_since(&self, old: &Replica) -> Vec<Run> {
        self.map.since(&old.map)
    }
}
