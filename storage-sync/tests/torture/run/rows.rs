//! The catalogue: power cuts, errors and flipped bits in its journal, with
//! sled's directory there or lost.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use farhaven_storage_sync::catalogue::{Catalogue, CatalogueReport, Table};
use farhaven_storage_sync::disk::Disk;
use farhaven_storage_sync::disk::simulated::{Fault, SimulatedDisk};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rows {
    pub cuts: u64,
    pub faults: u64,
    pub flips: u64,
    /// Flips that opening told of.
    pub told: u64,
}

const DIR: &str = "/var/farhaven/catalogue";

type Table1 = BTreeMap<String, u64>;

fn open(disk: &SimulatedDisk, sled: &Path) -> Result<(Catalogue, CatalogueReport), String> {
    let opened = Catalogue::open_on(Arc::new(disk.clone()), Path::new(DIR), sled);
    opened.map_err(|error| error.to_string())
}

fn rows(catalogue: &Catalogue) -> Result<Table1, String> {
    let rows = catalogue.list::<u64>(Table::Guests);
    Ok(rows
        .map_err(|error| error.to_string())?
        .into_iter()
        .collect())
}

/// All rows that were flushed, changed by any part of what came after.
fn holds(found: &Table1, flushed: &Table1, after: &[(String, Option<u64>)]) -> Result<(), String> {
    for key in found.keys().chain(flushed.keys()) {
        let now = found.get(key).copied();
        let may = after
            .iter()
            .filter(|(of, _)| of == key)
            .map(|(_, value)| *value);
        if now != flushed.get(key).copied() && !may.clone().any(|value| value == now) {
            return Err(format!(
                "row {key} is {now:?} and was {:?}",
                flushed.get(key)
            ));
        }
    }
    Ok(())
}

/// One life of a catalogue: rows are put, removed and flushed.
pub fn run(seed: u64, all: &mut Rows) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let disk = SimulatedDisk::new();
    let home = tempfile::tempdir().map_err(|error| error.to_string())?;
    let home = home.path();
    let lost = |at: u64| home.join(format!("lost-{at}"));
    let (catalogue, _) = open(&disk, &home.join("sled"))?;
    let (mut flushed, mut now) = (Table1::new(), Table1::new());
    for round in 0..6 {
        let mut after = Vec::new();
        disk.watch();
        for _ in 0..random.random_range(1..5) {
            let key = format!("guest{}", random.random_range(0..9));
            let value = random.random_bool(0.8).then(|| random.random::<u64>());
            match value {
                Some(value) => {
                    catalogue
                        .put(Table::Guests, &key, &value)
                        .map_err(|e| e.to_string())?;
                    now.insert(key.clone(), value);
                }
                None => {
                    catalogue
                        .remove(Table::Guests, &key)
                        .map_err(|e| e.to_string())?;
                    now.remove(&key);
                }
            }
            after.push((key, value));
        }
        catalogue.flush().map_err(|e| e.to_string())?;
        for moment in disk.moments() {
            let chance = [0.0, 0.5, 1.0][random.random_range(0..3)];
            let cut = moment.disk.power_cut(random.random(), chance);
            let (again, _) = open(&cut, &lost(all.cuts))?;
            holds(&rows(&again)?, &flushed, &after)
                .map_err(|why| format!("seed {seed}, power cut before {}: {why}", moment.what))?;
            drop(again);
            let _ = std::fs::remove_dir_all(lost(all.cuts));
            all.cuts += 1;
        }
        flushed.clone_from(&now);
        if round == 5 {
            break;
        }
    }
    drop(catalogue);
    // Every call fails once, in each way that it can, while it is opened, written and
    // flushed.
    let mut calls = 0;
    while fails(seed, &disk, home, &flushed, (calls + 1, Fault::Io))? {
        calls += 1;
    }
    all.faults += calls;
    for fault in [Fault::Full, Fault::Short] {
        for nth in 1..=calls {
            all.faults += u64::from(fails(seed, &disk, home, &flushed, (nth, fault))?);
        }
    }
    // A bit flips, or the journal is lost while sled is there.
    let journal = Path::new(DIR).join("catalogue.journal");
    for _ in 0..12 {
        let damaged = disk.copy();
        let what = damage(&damaged, &journal, &mut random)?;
        let lost = !damaged.exists(&journal).map_err(|e| e.to_string())?;
        for with_sled in [true, false] {
            if lost && !with_sled {
                continue;
            }
            let bad = |why: &str| Err(format!("seed {seed}, {what}, sled {with_sled}: {why}"));
            let sled = home.join("damaged");
            let fresh = || -> Result<(), String> {
                let _ = std::fs::remove_dir_all(&sled);
                match with_sled {
                    true => copy(&home.join("sled"), &sled),
                    false => Ok(()),
                }
            };
            fresh()?;
            let opened = damaged.copy();
            opened.watch();
            let (again, report) = open(&opened, &sled)?;
            let moments = opened.moments();
            all.flips += 1;
            let told = is_told(&report);
            all.told += u64::from(told);
            let first = rows(&again)?;
            if let Err(why) = sound(&first, &flushed, told, with_sled) {
                return bad(&why);
            }
            drop(again);
            // The power goes while it is mended: that costs nothing more.
            let nth = random.random_range(0..moments.len().max(1));
            if let Some(moment) = moments.get(nth) {
                let chance = [0.0, 0.5, 1.0][random.random_range(0..3)];
                let cut = moment.disk.power_cut(random.random(), chance);
                fresh()?;
                let (again, _) = open(&cut, &sled)?;
                if rows(&again)? != first {
                    let before = &moment.what;
                    return bad(&format!("power cut before {before}: other rows then"));
                }
                all.cuts += 1;
            }
        }
    }
    Ok(())
}

/// A bit flips, or the whole journal is lost. What was done.
fn damage(disk: &SimulatedDisk, journal: &Path, random: &mut StdRng) -> Result<String, String> {
    let bytes = disk.files().into_iter().find(|(path, _)| path == journal);
    let length = bytes.map_or(0, |(_, bytes)| bytes.len());
    if random.random_range(0..12) == 0 {
        let lost = disk
            .remove(journal)
            .and_then(|()| disk.sync_dir(Path::new(DIR)));
        return lost
            .map(|()| "journal lost".to_owned())
            .map_err(|e| e.to_string());
    }
    let (byte, bit) = (random.random_range(0..length), random.random_range(0..8));
    disk.flip(journal, byte, bit);
    Ok(format!("bit {bit} of byte {byte}"))
}

fn is_told(report: &CatalogueReport) -> bool {
    report.torn_bytes > 0 || report.journal_rebuilt || !report.set_aside.is_empty()
}

/// The rows are as they were, or opening said so; sled, where it is there, had them.
fn sound(found: &Table1, flushed: &Table1, told: bool, with_sled: bool) -> Result<(), String> {
    if !told && found != flushed {
        return Err("served as good".to_owned());
    }
    // A removal that rotted at the very end may come back; no row goes.
    let kept = |(key, value): (&String, &u64)| found.get(key) == Some(value);
    match with_sled && !flushed.iter().all(kept) {
        true => Err("sled had the rows".to_owned()),
        false => Ok(()),
    }
}

/// A row is put while that call fails; what was flushed stays. True: there was such a
/// call, and it can fail so.
fn fails(
    seed: u64,
    disk: &SimulatedDisk,
    home: &Path,
    flushed: &Table1,
    (nth, fault): (u64, Fault),
) -> Result<bool, String> {
    let (lost, again) = (home.join("lost"), home.join("again"));
    let disk = disk.copy();
    disk.fail(nth, fault);
    let after = vec![("guest1".to_string(), Some(7))];
    let wrote = open(&disk, &lost).and_then(|(catalogue, _)| {
        let row = catalogue.put(Table::Guests, "guest1", &7_u64);
        let flush = row.and_then(|()| catalogue.flush());
        flush.map_err(|error| error.to_string())
    });
    let _ = std::fs::remove_dir_all(&lost);
    if let Err(error) = &wrote
        && !error.contains("/")
    {
        return Err(format!(
            "seed {seed}: the error does not say where: {error}"
        ));
    }
    let hit = disk.heal();
    let mut expected = flushed.clone();
    if wrote.is_ok() {
        expected.insert("guest1".into(), 7);
    }
    for disk in [disk.power_cut(nth, 0.5), disk.power_cut(nth, 0.0), disk] {
        let (catalogue, _) = open(&disk, &again)?;
        holds(&rows(&catalogue)?, &expected, &after)
            .map_err(|why| format!("seed {seed}, {hit:?}: {why}"))?;
        drop(catalogue);
        let _ = std::fs::remove_dir_all(&again);
    }
    Ok(hit.is_some())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::create_dir_all(to).map_err(|error| error.to_string())?;
    for entry in std::fs::read_dir(from).map_err(|error| error.to_string())? {
        let entry = entry.map_err(|error| error.to_string())?;
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            std::fs::copy(entry.path(), to).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}
