//! Sealing: a point's batches become a manifest, or nothing changes.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{ExpandError, Inner, PointEntry, Reader, Sound, Waiting, held, leaf_bytes};
use crate::codec::{BatchError, Body, Chain, Content, EntriesView};
use crate::files::{FileError, make_dir};
use crate::limits::{CONTEXT_BYTES, POINT};
use crate::log::LogError;
use crate::manifest::{self, PointHeader, PointStats, check_volumes};
use crate::map::{PointMap, Run};
use crate::unit::{GuestId, Place, Volume};

/// What the source asks to be sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// Whose point.
    pub guest: GuestId,
    /// Its number, above all earlier ones.
    pub point: u64,
    /// The newest sealed point, on which it builds; 0: on nothing, every unit
    /// that its batches do not tell reads as zeros.
    pub parent: u64,
    /// The instant of the cut, nanoseconds since 1970.
    pub cut_at_unix_ns: u64,
    /// The guest's volumes at that instant.
    pub volumes: Vec<Volume>,
    /// How many batches belong to it.
    pub batches: u64,
    /// [`Chain`] over them.
    pub chain: [u8; 32],
    /// Opaque: what is needed to launch the guest. At most 1 MiB.
    pub context: Vec<u8>,
    /// What the source measured.
    pub stats: PointStats,
}

/// Why a point was not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Not all of its batches are here.
    #[error("point {point} has {want} batches, {have} are here; send the others and seal again")]
    MissingBatches {
        /// The point.
        point: u64,
        /// Batches here.
        have: u64,
        /// Batches announced.
        want: u64,
    },
    /// The batches here are not those that were announced.
    #[error(
        "the batches of point {point} here are not the ones its source sent; \
         the source must start a new point"
    )]
    ChainMismatch {
        /// The point.
        point: u64,
    },
    /// It builds on a point that is not the newest.
    #[error(
        "point {point} builds on {parent}, but the newest sealed point is {newest}; \
         the source must start again from {newest}"
    )]
    ParentMismatch {
        /// The point.
        point: u64,
        /// What it builds on.
        parent: u64,
        /// The newest one; 0: none.
        newest: u64,
    },
    /// The number was used before.
    #[error("point number {point} is not above {largest}; the source must take a higher one")]
    Number {
        /// The number.
        point: u64,
        /// The largest one so far.
        largest: u64,
    },
    /// A batch refers to content that is not here, or tells a difference from
    /// it that does not come out right.
    #[error(
        "batch {seq} builds on content of batch {missing}, which is not here or not as told; \
         the source must forget that batch and send the unit again"
    )]
    Dangling {
        /// The batch.
        seq: u64,
        /// The one it refers to.
        missing: u64,
    },
    /// A batch tells units that its volume does not have.
    #[error("batch {seq} tells unit {unit} of volume {volume}, which has no such unit")]
    Range {
        /// The batch.
        seq: u64,
        /// The volume.
        volume: u16,
        /// The last unit it tells.
        unit: u64,
    },
    /// The request breaks a limit.
    #[error("the seal of point {point} is refused: {why}")]
    Limit {
        /// The point.
        point: u64,
        /// Which limit.
        why: &'static str,
    },
    /// The map would be too large.
    #[error("the map of guest {guest} needs more than {limit} bytes; raise the store's map_bytes")]
    Map {
        /// The guest.
        guest: GuestId,
        /// The limit.
        limit: usize,
    },
    /// A stored batch is damaged.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A stored batch cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The manifest cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
}

pub(super) fn seal(inner: &Inner, seal: Seal) -> Result<PointHeader, SealError> {
    let _writing = held(&inner.writing);
    check(&seal)?;
    let (seqs, rebuilt, parent_map, parent_entry) = {
        let mut state = held(&inner.state);
        let guest = state.guests.entry(seal.guest).or_default();
        if let Some(sealed) = guest.points.get(&seal.point) {
            return match sealed.header.chain == seal.chain {
                true => Ok((*sealed.header).clone()),
                false => Err(SealError::ChainMismatch { point: seal.point }),
            };
        }
        let newest = guest.newest_point();
        if seal.parent != 0 && seal.parent != newest {
            let (point, parent) = (seal.point, seal.parent);
            return Err(SealError::ParentMismatch {
                point,
                parent,
                newest,
            });
        }
        if seal.point <= guest.largest {
            return Err(SealError::Number {
                point: seal.point,
                largest: guest.largest,
            });
        }
        let seqs = guest.unsealed.get(&seal.point).cloned().unwrap_or_default();
        let rebuilt = guest.rebuilt.clone();
        match seal.parent {
            0 => (seqs, rebuilt, Arc::new(PointMap::default()), None),
            parent => (
                seqs,
                rebuilt,
                guest.newest.clone(),
                guest.points.get(&parent).cloned(),
            ),
        }
    };
    let (have, want) = (seqs.len() as u64, seal.batches);
    if have < want {
        return Err(SealError::MissingBatches {
            point: seal.point,
            have,
            want,
        });
    }
    let mut map = (*parent_map).clone();
    if let Some(parent) = &parent_entry {
        fit(&mut map, &parent.header.volumes, &seal.volumes);
    }
    let mut chain = Chain::new();
    let mut stored_bytes = 0;
    let mut bytes = Vec::new();
    let mut sound = Sound::new();
    for &seq in &seqs {
        inner.log.read_entries(seq, &mut bytes)?;
        let view = EntriesView::parse(&bytes)?;
        if view.header.seq != seq {
            return Err(BatchError::Damaged {
                seq,
                part: "entries",
            }
            .into());
        }
        chain.push(seq, &view.header.hash);
        stored_bytes += view.header.bytes() as u64;
        apply(inner, &seal, &view, &mut map, &mut sound)?;
        if view.header.deltas && !rebuilt.contains(&seq) {
            right(inner, seq)?;
        }
    }
    if chain.count() != seal.batches || chain.finish() != seal.chain {
        return Err(SealError::ChainMismatch { point: seal.point });
    }
    let changes = map.since(&parent_map);
    let header = PointHeader {
        guest: seal.guest,
        point: seal.point,
        parent: seal.parent,
        cut_at_unix_ns: seal.cut_at_unix_ns,
        sealed_at_unix_ns: now(),
        volumes: seal.volumes,
        batches: seal.batches,
        chain: seal.chain,
        stored_bytes,
        changed_units: changes.iter().map(|run| run.count).sum(),
        stats: seal.stats,
    };
    let entry = write(
        inner,
        header,
        parent_entry.as_ref(),
        &seal.context,
        &map,
        &changes,
    )?;
    let header = (*entry.header).clone();
    let mut state = held(&inner.state);
    let guest = state.guests.entry(header.guest).or_default();
    guest.largest = header.point;
    guest.newest = Arc::new(map);
    guest.points.insert(header.point, entry);
    // Batches of this and of earlier attempts stay in the log for dedup only.
    guest.unsealed = guest.unsealed.split_off(&(header.point + 1));
    guest.rebuilt.retain(|seq| !seqs.contains(seq));
    Ok(header)
}

/// Rebuilds a batch's differences: after a restart, or when that failed before.
fn right(inner: &Inner, seq: u64) -> Result<(), SealError> {
    let mut body = Body::new();
    match inner.expand(seq, &mut Reader::default(), &mut body) {
        Ok(()) => {}
        Err(ExpandError::Log(error)) => return Err(error.into()),
        Err(ExpandError::Batch(error)) => return Err(error.into()),
    }
    let mut waiting = Waiting::new();
    waiting.add_all(&body, seq);
    match inner.wrong(waiting).first_key_value() {
        Some((&seq, &missing)) => Err(SealError::Dangling { seq, missing }),
        None => Ok(()),
    }
}

fn check(seal: &Seal) -> Result<(), SealError> {
    let limit = |why| {
        Err(SealError::Limit {
            point: seal.point,
            why,
        })
    };
    if seal.point == 0 || seal.point > POINT || seal.parent >= seal.point {
        return limit("its number is out of range");
    }
    if seal.context.len() > CONTEXT_BYTES {
        return limit("its context is over 1 MiB");
    }
    check_volumes(&seal.volumes).or_else(limit)
}

/// What the volumes lost since the parent reads as zeros if they grow again.
fn fit(map: &mut PointMap, before: &[Volume], after: &[Volume]) {
    for (index, before) in before.iter().enumerate() {
        let units = after.get(index).map_or(0, Volume::units);
        if units < before.units() {
            map.truncate(index as u16, units);
        }
    }
}

fn apply(
    inner: &Inner,
    seal: &Seal,
    view: &EntriesView<'_>,
    map: &mut PointMap,
    sound: &mut Sound,
) -> Result<(), SealError> {
    let seq = view.header.seq;
    for entry in view.entries() {
        let end = entry.unit + entry.count;
        let units = seal
            .volumes
            .get(usize::from(entry.volume))
            .map_or(0, Volume::units);
        if end > units {
            return Err(SealError::Range {
                seq,
                volume: entry.volume,
                unit: end - 1,
            });
        }
        let needed = match entry.content {
            Content::Refs(place) => place.0..place.0 + entry.count,
            Content::Delta(delta) => delta.base.0..delta.base.0 + 1,
            Content::Zeros | Content::Literals(_) => 0..0,
        };
        for place in needed.map(Place) {
            if !inner.resolves(place, sound)? {
                let missing = place.seq();
                return Err(SealError::Dangling { seq, missing });
            }
        }
        let (volume, unit, count) = (entry.volume, entry.unit, entry.count);
        map.set(&Run {
            volume,
            unit,
            count,
            place: entry.place(seq),
        });
        if leaf_bytes(map) > inner.options.map_bytes {
            return Err(SealError::Map {
                guest: seal.guest,
                limit: inner.options.map_bytes,
            });
        }
    }
    Ok(())
}

fn write(
    inner: &Inner,
    header: PointHeader,
    parent: Option<&PointEntry>,
    context: &[u8],
    map: &PointMap,
    changes: &[Run],
) -> Result<PointEntry, FileError> {
    let path = manifest::path_of(&inner.manifests, header.guest, header.point);
    if parent.is_none()
        && let Some(dir) = path.parent()
    {
        make_dir(&*inner.disk, dir)?;
    }
    let base = parent.filter(|parent| parent.may_be_base() && inner.is_sound_base(parent));
    let bytes = match base {
        None => manifest::encode(&header, 0, context, map.all_runs()),
        Some(base) => {
            manifest::encode(&header, base.header.point, context, changes.iter().copied())
        }
    };
    if let Err(unplaced) = manifest::write(&*inner.disk, &path, &bytes) {
        if unplaced.named {
            // Not answered, so not sealed: a restart must not find it half alive,
            // with batches that a prune has taken since.
            let _ = inner.disk.remove(&path);
        }
        return Err(unplaced.into());
    }
    Ok(PointEntry::new(Arc::new(header), base, bytes.len() as u64))
}

fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
