//! Opening a store: the log, then every guest's manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::hints::Hints;
use super::{DamagedPoint, GuestState, Inner, OpenReport, PointEntry, State, Store, StoreError};
use super::{StoreOptions, held, kept};
use crate::codec::{BatchHeader, Sequence};
use crate::disk::{Access, Disk};
use crate::files::{FileError, is_bad_sector, lock, make_dir, set_aside, sync_dir};
use crate::limits::{IMAGE_SEQ, SEGMENT_BYTES_LEAST, SEGMENT_BYTES_MOST};
use crate::log::{Log, LogError};
use crate::manifest::{self, ManifestError};
use crate::unit::GuestId;

pub(super) fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    options: StoreOptions,
) -> Result<(Store, OpenReport), StoreError> {
    if !(SEGMENT_BYTES_LEAST..=SEGMENT_BYTES_MOST).contains(&options.segment_bytes) {
        return Err(StoreError::Options(options.segment_bytes));
    }
    let manifests = dir.join("manifests");
    make_dir(&*disk, dir)?;
    make_dir(&*disk, &manifests)?;
    // Names that a killed process made last forever from here on.
    sync_dir(&*disk, &manifests)?;
    let lock = lock(&*disk, dir)?;
    // Which batches belong to unsealed points is known once the manifests are:
    // until then only number, guest and point of each are noted.
    let mut noted = Vec::new();
    let (log, log_report) = Log::open(
        disk.clone(),
        &dir.join("segments"),
        options.segment_bytes,
        options.bytes_most,
        &mut |header| noted.push(*header),
    )?;
    let unreadable = log_report.bad.iter().filter(|bad| bad.unreadable);
    let unreadable = unreadable.map(|bad| bad.path.clone()).collect();
    let mut inner = Inner {
        hints: Mutex::new(Hints::open(
            disk.clone(),
            dir.join("hints"),
            options.hint_bytes,
        )),
        disk,
        manifests,
        log,
        state: Mutex::new(State::default()),
        image_numbers: Arc::new(Sequence::starting_at(IMAGE_SEQ + 1)),
        options,
        writing: Mutex::new(()),
        pruning: Mutex::new(()),
        unreadable,
        known: Mutex::default(),
        _lock: lock,
    };
    let mut report = OpenReport {
        log: log_report,
        ..OpenReport::default()
    };
    let manifests = &inner.manifests;
    let names = inner.disk.list(manifests);
    for name in names.map_err(FileError::at("list", manifests))? {
        if let Some(guest) = name.to_str().and_then(|name| name.parse().ok()) {
            load_guest(&mut inner, guest, &mut report)?;
        }
    }
    name_older(&inner, &noted);
    inner.image_numbers.raise_to(inner.log.last_image_seq() + 1);
    let mut state = held(&inner.state);
    // What was stored here by itself and not to its end is none: a prune frees its batches.
    let points = noted.iter().filter(|header| header.seq < IMAGE_SEQ);
    points.for_each(|header| state.belongs(header));
    let guests = state.guests.iter().filter(|(guest, _)| !guest.is_image());
    report.points = guests.map(|(_, guest)| guest.points.len()).sum();
    drop(state);
    Ok((Store(Arc::new(inner)), report))
}

fn load_guest(
    inner: &mut Inner,
    guest: GuestId,
    report: &mut OpenReport,
) -> Result<(), StoreError> {
    let dir = inner.manifests.join(guest.to_string());
    sync_dir(&*inner.disk, &dir)?;
    let mut state = GuestState::default();
    let (mut found, mut kept) = (BTreeMap::new(), BTreeMap::new());
    let mut aside = Vec::new();
    let names = inner.disk.list(&dir);
    for name in names.map_err(FileError::at("list", &dir))? {
        let path = dir.join(name);
        let number = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|s| s.parse().ok());
        match (
            path.extension().and_then(|extension| extension.to_str()),
            number,
        ) {
            (Some("man"), Some(point)) => {
                found.insert(point, path);
            }
            (Some("kept"), Some(point)) => {
                kept.insert(point, kept::read(&*inner.disk, &path));
            }
            // A manifest that was never renamed was never sealed.
            (Some("tmp"), _) => {
                let removed = inner.disk.remove(&path);
                removed.map_err(FileError::at("remove", &path))?;
            }
            _ => aside.extend(manifest::set_aside_as(&path).map(|point| (point, path))),
        }
    }
    for (point, path) in aside {
        // Its number was given, and is not given again.
        state.largest = state.largest.max(point);
        if !found.contains_key(&point) {
            report.damaged.push(DamagedPoint {
                guest: Some(guest),
                path,
                why: "it was found damaged, and set aside; the point is lost".into(),
            });
        }
    }
    for (point, path) in found {
        state.largest = state.largest.max(point);
        let mut damage = |why: String| {
            report.damaged.push(DamagedPoint {
                guest: Some(guest),
                path: path.clone(),
                why,
            });
        };
        let head = match manifest::read_head(&*inner.disk, &path) {
            Ok(head) => head,
            Err(ManifestError::File(error)) if is_bad_sector(&error.source) => {
                damage(error.to_string());
                inner.unreadable.push(path);
                continue;
            }
            Err(ManifestError::File(error)) => return Err(error.into()),
            // Left out, it would be forgotten, and a prune would take what it needs.
            Err(ManifestError::Newer { version, .. })
                if manifest::is_whole(&*inner.disk, &path) =>
            {
                return Err(FileError::newer(&path, format!("manifest {version}")).into());
            }
            Err(error) => {
                let path = put_aside(inner, &path);
                report.damaged.push(DamagedPoint {
                    guest: Some(guest),
                    path,
                    why: error.to_string(),
                });
                continue;
            }
        };
        if head.header.guest != guest || head.header.point != point {
            damage("it is the manifest of another point".into());
            continue;
        }
        let base = match (head.base, state.points.get(&head.base)) {
            (0, _) => None,
            (_, Some(base)) => Some(base),
            (base, None) => {
                // It is none, but may be one again.
                name_all(inner, &path);
                damage(lacks_base(base));
                continue;
            }
        };
        let length = (inner.disk.open(&path, Access::Read))
            .and_then(|file| file.bytes())
            .map_err(FileError::at("read", &path))?;
        let entry = PointEntry::new(Arc::new(head.header), base, length);
        state.points.insert(point, entry);
    }
    kept.retain(|point, _| state.points.contains_key(point));
    state.kept = kept;
    held(&inner.state).guests.insert(guest, state);
    choose_newest(inner, guest, report)
}

/// Gives a manifest that rotted another name, so that no later start takes it for one: its
/// front may be whole, and the rest of it needed. Returns what it is called now.
fn put_aside(inner: &Inner, path: &Path) -> PathBuf {
    // What a whole one says may only be too much for this machine.
    if !manifest::is_rotten(&*inner.disk, path) {
        return path.to_path_buf();
    }
    set_aside(&*inner.disk, path).unwrap_or_else(|error| {
        tracing::error!(%error, "a damaged manifest stays where it is");
        path.to_path_buf()
    })
}

fn lacks_base(base: u64) -> String {
    format!("point {base}, on which it builds, is missing or damaged")
}

/// Has it known which numbers a manifest names. What is wrong with it is told elsewhere.
fn name_all(inner: &Inner, path: &Path) {
    if let Err(error) = manifest::read(&*inner.disk, path, &mut |run| inner.names(&run)) {
        tracing::debug!(%error, "nobody knows which batches it names");
    }
}

/// A batch that was lost may have had a number above all that are here, and an older
/// point may be the only one that names it. A guest's batches have rising numbers: points
/// before one of which something is here name nothing above that.
fn name_older(inner: &Inner, noted: &[BatchHeader]) {
    let mut here: BTreeMap<GuestId, u64> = BTreeMap::new();
    for header in noted.iter().filter(|header| header.seq < IMAGE_SEQ) {
        let point = here.entry(header.guest).or_default();
        *point = header.point.max(*point);
    }
    let mut older = Vec::new();
    for (&guest, state) in &held(&inner.state).guests {
        let from = here.get(&guest).copied().unwrap_or(0);
        // The newest was read already.
        let newest = state.newest_point();
        let points = state.points.range(from.min(newest)..newest);
        older.extend(points.map(|(&point, _)| manifest::path_of(&inner.manifests, guest, point)));
    }
    older.iter().for_each(|path| name_all(inner, path));
}

/// The newest point must be whole, for the next one builds on it.
fn choose_newest(
    inner: &mut Inner,
    guest: GuestId,
    report: &mut OpenReport,
) -> Result<(), StoreError> {
    loop {
        let mut unreadable = false;
        let newest = held(&inner.state)
            .guests
            .get(&guest)
            .map_or(0, GuestState::newest_point);
        let why = match inner.load_map(guest, newest) {
            Ok(map) => match inner.dangling(&map) {
                Ok(None) => {
                    if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
                        state.newest = Arc::new(map);
                    }
                    return Ok(());
                }
                Ok(Some(place)) => format!("it needs unit {place:?}, which the log has lost"),
                Err(LogError::File(error)) if is_bad_sector(&error.source) => {
                    unreadable = true;
                    error.to_string()
                }
                Err(error) => return Err(error.into()),
            },
            Err(ManifestError::File(error)) if is_bad_sector(&error.source) => {
                unreadable = true;
                error.to_string()
            }
            Err(ManifestError::File(error)) => return Err(error.into()),
            Err(error) => {
                if let Some(rotten) = rotten_below(inner, guest, newest) {
                    leave_out(inner, guest, rotten, error.to_string(), report);
                    continue;
                }
                error.to_string()
            }
        };
        let path = manifest::path_of(&inner.manifests, guest, newest);
        if unreadable {
            inner.unreadable.push(path.clone());
        }
        report.damaged.push(DamagedPoint {
            guest: Some(guest),
            path,
            why,
        });
        if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
            state.points.remove(&newest);
        }
    }
}

/// The point whose manifest rotted, of those that this one builds on, itself included.
fn rotten_below(inner: &Inner, guest: GuestId, point: u64) -> Option<u64> {
    let mut at = point;
    while at != 0 {
        let path = manifest::path_of(&inner.manifests, guest, at);
        if manifest::is_rotten(&*inner.disk, &path) {
            return Some(at);
        }
        at = inner.entry(guest, at)?.base;
    }
    None
}

/// Leaves out a point whose manifest rotted, and all that build on it.
fn leave_out(inner: &Inner, guest: GuestId, rotten: u64, why: String, report: &mut OpenReport) {
    let path = manifest::path_of(&inner.manifests, guest, rotten);
    report.damaged.push(DamagedPoint {
        guest: Some(guest),
        path: put_aside(inner, &path),
        why,
    });
    let mut gone = BTreeSet::from([rotten]);
    if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
        // Upward: each builds on a lower one.
        state.points.retain(|&point, entry| {
            let goes = point == rotten || gone.contains(&entry.base);
            if goes {
                gone.insert(point);
            }
            !goes
        });
    }
    for point in gone.into_iter().filter(|&point| point != rotten) {
        let path = manifest::path_of(&inner.manifests, guest, point);
        name_all(inner, &path);
        report.damaged.push(DamagedPoint {
            guest: Some(guest),
            path,
            why: lacks_base(rotten),
        });
    }
}
