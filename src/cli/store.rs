//! `farhaven store`: looks after a store whose daemon is stopped.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use farhaven_storage_sync::store::{Damage, Store, StoreOptions};
use serde::Serialize;

use super::{Outcome, print_json, told};

#[derive(Debug, Subcommand)]
pub(super) enum StoreVerb {
    /// Read and verify every stored byte; stop the site's daemon first.
    ///
    /// Damage is named, with the recovery points that need what is damaged, and
    /// the exit status is 1. As when a daemon starts, what a crash left behind the
    /// last whole batch is cut off; nothing else is changed.
    Check {
        /// A site's directory of stores, or one store in it.
        #[arg(value_name = "DIR", default_value = "/var/lib/farhaven/store")]
        dir: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What was found in one store, for programs.
#[derive(Debug, Serialize)]
struct Checked {
    store: PathBuf,
    sound: bool,
    points: usize,
    batches: u64,
    manifests: u64,
    bytes: u64,
    torn_bytes: u64,
    /// Points that could not be opened at all.
    lost_points: Vec<Lost>,
    /// Bytes of segments that are no batch.
    bad_bytes: Vec<Bad>,
    damage: Vec<Damage>,
}

#[derive(Debug, Serialize)]
struct Lost {
    path: PathBuf,
    why: String,
}

#[derive(Debug, Serialize)]
struct Bad {
    path: PathBuf,
    offset: u64,
    bytes: u64,
    why: String,
    unreadable: bool,
}

pub(super) fn run(verb: StoreVerb) -> Outcome {
    match verb {
        StoreVerb::Check { dir, json } => check(&dir, json),
    }
}

fn check(dir: &Path, json: bool) -> Outcome {
    let stores = stores_in(dir)?;
    let mut checked = Vec::new();
    for store in stores {
        checked.push(one(&store)?);
    }
    let damaged = checked.iter().filter(|store| !store.sound).count();
    if json {
        print_json(&checked)?;
    } else {
        checked.iter().for_each(tell);
    }
    match damaged {
        0 => Ok(()),
        _ => Err(format!(
            "{damaged} of {} stores are damaged; check the disks under them. What is not \
             named above is whole",
            checked.len()
        )),
    }
}

/// A store itself, or those in a site's directory of them.
fn stores_in(dir: &Path) -> Result<Vec<PathBuf>, String> {
    if dir.join("segments").is_dir() {
        return Ok(vec![dir.to_path_buf()]);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| {
        let dir = dir.display();
        format!("cannot list {dir}: {e}; name the directory that `store.dir` names")
    });
    let mut stores: Vec<PathBuf> = entries?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("segments").is_dir())
        .collect();
    stores.sort();
    match stores.is_empty() {
        true => Err(format!(
            "there is no store in {}; name the directory that `store.dir` names",
            dir.display()
        )),
        false => Ok(stores),
    }
}

fn one(dir: &Path) -> Result<Checked, String> {
    let (store, opened) = Store::open(dir, StoreOptions::default()).map_err(told)?;
    let report = store.check();
    let lost_points = opened.damaged.into_iter().map(|point| Lost {
        path: point.path,
        why: point.why,
    });
    let bad_bytes = opened.log.bad.into_iter().map(|bad| Bad {
        path: bad.path,
        offset: bad.offset,
        bytes: bad.bytes,
        why: bad.why,
        unreadable: bad.unreadable,
    });
    let mut checked = Checked {
        store: dir.to_path_buf(),
        sound: false,
        points: opened.points,
        batches: report.batches,
        manifests: report.manifests,
        bytes: report.bytes,
        torn_bytes: opened.log.torn_bytes,
        lost_points: lost_points.collect(),
        bad_bytes: bad_bytes.collect(),
        damage: report.damage,
    };
    checked.sound =
        checked.lost_points.is_empty() && checked.bad_bytes.is_empty() && checked.damage.is_empty();
    Ok(checked)
}

fn tell(store: &Checked) {
    say!(
        "{}: {} points, {} batches, {} bytes verified",
        store.store.display(),
        store.points,
        store.batches,
        store.bytes
    );
    if store.torn_bytes > 0 {
        say!(
            "  {} bytes that a crash left were cut off",
            store.torn_bytes
        );
    }
    for lost in &store.lost_points {
        say!("  LOST POINT {}: {}", lost.path.display(), lost.why);
    }
    for bad in &store.bad_bytes {
        say!(
            "  DAMAGED {} from byte {}, {} bytes: {}",
            bad.path.display(),
            bad.offset,
            bad.bytes,
            bad.why
        );
    }
    for damage in &store.damage {
        say!("  DAMAGED {}: {}", damage.path.display(), damage.why);
        for (guest, point) in &damage.points {
            say!("    needed by point {point} of guest {guest}");
        }
    }
}
