//! The fewest bytes that plain compression would need: what the demo's
//! figures are held against.

use std::path::Path;

use farhaven_storage_sync::floor::Floor;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{UNIT, VolumeKind};

use crate::replicate::message::PointContext;

/// Floors of a guest's points, read from the target's store when its daemon has ended.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Floors {
    /// Of RAM and disks at the first point.
    pub(super) first: u64,
    /// Of everything in later points that was not there before.
    pub(super) steady: u64,
    /// Bytes of the batches of those points.
    pub(super) steady_sent: u64,
}

/// Computes them.
pub(super) fn compute(site: &Path) -> Result<Floors, String> {
    let store = std::fs::read_dir(site.join("store"))
        .map_err(|e| e.to_string())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.is_dir())
        .ok_or("the target has no store")?;
    let (store, _) = Store::open(&store, StoreOptions::default()).map_err(|e| e.to_string())?;
    let guest = *store
        .guests()
        .first()
        .ok_or("the target's store has no guest")?;
    let points = store.points(guest);
    let first = points.first().ok_or("the target's store has no point")?;
    let mut before = store
        .open_point(guest, first.point)
        .map_err(|e| e.to_string())?;
    let mut floor = Floor::new().map_err(|e| e.to_string())?;
    for (volume, kind) in (0..).zip(before.volumes().iter().map(|v| v.kind)) {
        if kind != VolumeKind::DeviceState {
            for (unit, count) in before.nonzero_runs(volume) {
                add(&mut floor, &before, volume, unit, count)?;
            }
        }
    }
    let mut floors = Floors {
        first: bytes(&mut floor)?,
        ..Floors::default()
    };
    // One accumulator goes on: what was there before does not count again, and
    // groups are closed at each point, as they must be on the wire.
    for header in points.iter().skip(1) {
        let replica = store
            .open_point(guest, header.point)
            .map_err(|e| e.to_string())?;
        let so_far = bytes(&mut floor)?;
        for run in replica.changes_since(&before) {
            add(&mut floor, &replica, run.volume, run.unit, run.count)?;
        }
        floors.steady += bytes(&mut floor)? - so_far;
        let context = PointContext::of(&replica);
        floors.steady_sent += context.map_or(0, |c| c.sent_bytes);
        before = replica;
    }
    Ok(floors)
}

fn bytes(floor: &mut Floor) -> Result<u64, String> {
    floor.bytes().map_err(|e| e.to_string())
}

fn add(
    floor: &mut Floor,
    replica: &Replica,
    volume: u16,
    unit: u64,
    count: u64,
) -> Result<(), String> {
    let (mut at, end) = (unit, unit + count);
    while at < end {
        let piece = (end - at).min(64);
        let mut bytes = vec![0; piece as usize * UNIT];
        replica
            .read(volume, at, piece, &mut bytes)
            .map_err(|e| e.to_string())?;
        for unit in bytes.chunks_exact(UNIT) {
            floor.unit(unit).map_err(|e| e.to_string())?;
        }
        at += piece;
    }
    Ok(())
}
