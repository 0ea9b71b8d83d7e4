//! The floor of each recovery point in a store whose daemon has ended:
//! `cargo run --release --example point_floors -- STORE_DIR`
//!
//! One line of JSON for each point of the first guest: what zstd-3 makes of
//! its distinct non-zero units, in groups of 64, that no point before it held,
//! and their bytes as they are.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use farhaven_storage_sync::floor::Floor;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{UNIT, VolumeKind};

/// Units read at a time.
const PIECE: u64 = 64;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: point_floors STORE_DIR");
        return ExitCode::from(2);
    };
    match measure(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("point_floors: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The store of the first peer beneath a site's directory of stores.
fn peer_store(directory: &Path) -> Result<PathBuf, Failure> {
    std::fs::read_dir(directory)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.is_dir())
        .ok_or_else(|| format!("{} holds no peer's store", directory.display()).into())
}

fn measure(directory: &Path) -> Result<(), Failure> {
    let (store, _) = Store::open(&peer_store(directory)?, StoreOptions::default())?;
    let guest = *store.guests().first().ok_or("the store has no guest")?;
    let mut floor = Floor::new()?;
    let mut before: Option<Replica> = None;
    for header in store.points(guest) {
        let point = store.open_point(guest, header.point)?;
        let (so_far, units) = (floor.bytes()?, floor.distinct());
        match &before {
            Some(before) => {
                for run in point.changes_since(before) {
                    add(&mut floor, &point, run.volume, run.unit, run.count)?;
                }
            }
            None => add_all(&mut floor, &point)?,
        }
        let bytes = floor.bytes()? - so_far;
        let new = (floor.distinct() - units) * UNIT as u64;
        println!(
            "{{\"point\":{},\"new_bytes\":{new},\"floor_bytes\":{bytes}}}",
            header.point
        );
        before = Some(point);
    }
    Ok(())
}

fn add_all(floor: &mut Floor, point: &Replica) -> Result<(), Failure> {
    for (volume, kind) in (0..).zip(point.volumes().iter().map(|v| v.kind)) {
        if kind != VolumeKind::DeviceState {
            for (unit, count) in point.nonzero_runs(volume) {
                add(floor, point, volume, unit, count)?;
            }
        }
    }
    Ok(())
}

fn add(
    floor: &mut Floor,
    point: &Replica,
    volume: u16,
    unit: u64,
    count: u64,
) -> Result<(), Failure> {
    let (mut at, end) = (unit, unit + count);
    while at < end {
        let piece = (end - at).min(PIECE);
        let mut bytes = vec![0; piece as usize * UNIT];
        point.read(volume, at, piece, &mut bytes)?;
        for unit in bytes.chunks_exact(UNIT) {
            floor.unit(unit)?;
        }
        at += piece;
    }
    Ok(())
}
