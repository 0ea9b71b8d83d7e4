//! Bits that flip at rest, in every kind of file.

use std::collections::BTreeMap;
use std::path::Path;

use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::store::Store;
use farhaven_storage_sync::unit::GuestId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::check::{self, Wrong};
use super::cuts::{answered, perform};
use super::trial::{Expectation, Trial, open};

/// What was found of the bits that were flipped.
#[derive(Debug, Clone, Default)]
pub struct Flips {
    pub flips: u64,
    /// Told when the store was opened.
    pub at_open: u64,
    /// Not then, but by the scrub.
    pub by_scrub: u64,
    /// Not refused by anything: bytes that mean nothing.
    pub harmless: u64,
    /// Flips per kind of file.
    pub kinds: BTreeMap<String, u64>,
    /// Points that a flip made unreadable, each time with an error.
    pub points_refused: u64,
}

/// A disk with a store that has lived, what it holds, and what it told then.
type Lived = (SimulatedDisk, Expectation, Told);

/// Numbers that a flipped bit must not raise: the source goes on from them.
#[derive(Debug, Clone)]
struct Told {
    last_seq: u64,
    guests: Vec<(GuestId, u64)>,
    /// Kept points, with their names.
    names: Vec<(GuestId, u64, String)>,
}

fn told(store: &Store) -> Told {
    let guests = store.guests().into_iter();
    Told {
        last_seq: store.last_seq(),
        guests: guests
            .map(|guest| (guest, store.next_point(guest)))
            .collect(),
        names: Vec::new(),
    }
}

fn lived(seed: u64) -> Result<Lived, String> {
    let disk = SimulatedDisk::new();
    let mut trial = Trial::new(seed);
    let mut store = open(&disk).map_err(|error| error.to_string())?.0;
    for _ in 0..14 {
        trial.step(&mut store, &mut |trial, store| {
            perform(trial, store)?;
            answered(trial);
            Ok::<(), String>(())
        })?;
    }
    // And the files beside the data: names of kept points, and hints.
    let mut names = Vec::new();
    for guest in &trial.expect.guests {
        if let Some(&point) = guest.sealed.keys().next_back() {
            let name = format!("before upgrade {point}");
            let kept = store.keep_point(guest.id, point, &name);
            kept.map_err(|error| error.to_string())?;
            names.push((guest.id, point, name));
        }
    }
    store.hint_with(&trial.key);
    while store.fill_hints() {}
    let told = Told {
        names,
        ..told(&store)
    };
    Ok((disk, trial.expect, told))
}

fn kind(path: &Path) -> String {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    match &*extension {
        "seg" => "segments".into(),
        "man" => "manifests".into(),
        "kept" => "names of kept points".into(),
        _ => path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    }
}

/// Flips one bit at a time, `count` times.
pub fn run(seed: u64, count: u64) -> Result<Flips, String> {
    let mut found = Flips::default();
    let mut random = StdRng::seed_from_u64(seed);
    let mut worlds = Vec::new();
    for at in 0..4 {
        worlds.push(lived(seed ^ at << 32)?);
    }
    while found.flips < count {
        let (disk, expect, before) = &worlds[random.random_range(0..worlds.len())];
        let files = disk.files();
        let (path, bytes) = &files[random.random_range(0..files.len())];
        if bytes.is_empty() {
            continue;
        }
        let (byte, bit) = (
            random.random_range(0..bytes.len()),
            random.random_range(0..8),
        );
        let disk = disk.copy();
        disk.flip(path, byte, bit);
        *found.kinds.entry(kind(path)).or_default() += 1;
        found.flips += 1;
        one(&disk, expect, before, &mut found).map_err(|why| {
            format!(
                "seed {seed}, bit {bit} of byte {byte} of {}: {why}",
                path.display()
            )
        })?;
    }
    Ok(found)
}

fn one(
    disk: &SimulatedDisk,
    expect: &Expectation,
    before: &Told,
    found: &mut Flips,
) -> Result<(), String> {
    let (store, report) = match open(disk) {
        Ok(opened) => opened,
        Err(error) => return Err(format!("the whole store does not open: {error}")),
    };
    let at_open =
        !report.damaged.is_empty() || !report.log.bad.is_empty() || report.log.torn_bytes > 0;
    let now = told(&store);
    let known = |at: &(GuestId, u64)| {
        let mut guests = before.guests.iter();
        guests.any(|(guest, next)| *guest == at.0 && at.1 <= *next)
    };
    if now.last_seq > before.last_seq || !now.guests.iter().all(known) {
        return Err(format!(
            "it made numbers up: {now:?}, and before {before:?}"
        ));
    }
    let scrubbed = store.check();
    if scrubbed.damage.len() > 1 && report.log.bad.is_empty() && report.log.torn_bytes == 0 {
        let all = &scrubbed.damage;
        return Err(format!("one bit damaged more than one thing: {all:?}"));
    }
    for (guest, point, name) in &before.names {
        let now = store.kept(*guest).remove(point);
        let listed = store.points(*guest).iter().any(|p| p.point == *point);
        let told = at_open || !scrubbed.damage.is_empty();
        // A point that is listed stays kept, whatever became of its name.
        if (listed && now.is_none()) || (now.as_ref() != Some(name) && !told) {
            return Err(format!(
                "point {point} was kept as '{name}', and is as {now:?}"
            ));
        }
    }
    let mut refused = 0;
    for guest in &expect.guests {
        for (&number, content) in &guest.sealed {
            let damaged = |at: &(_, u64)| *at == (guest.id, number);
            match check::point(&store, guest.id, number, content) {
                Ok(()) => {}
                Err(Wrong::Data(why)) => return Err(format!("served as good: {why}")),
                Err(Wrong::Error(why)) => {
                    refused += 1;
                    let named = scrubbed
                        .damage
                        .iter()
                        .any(|damage| damage.points.iter().any(damaged));
                    let listed = store
                        .points(guest.id)
                        .iter()
                        .any(|header| header.point == number);
                    if listed && !named {
                        return Err(format!("no scrub names point {number}, and yet: {why}"));
                    }
                    if !listed && report.damaged.is_empty() {
                        return Err(format!("nothing names point {number}: {why}"));
                    }
                }
            }
        }
    }
    found.points_refused += refused;
    match (at_open, scrubbed.damage.is_empty()) {
        (true, _) => found.at_open += 1,
        (false, false) => found.by_scrub += 1,
        (false, true) if refused > 0 => return Err("refused, and not found by a scrub".into()),
        (false, true) => {
            let lost = expect
                .acknowledged
                .iter()
                .find(|&&seq| !store.contains(seq));
            if let Some(lost) = lost {
                return Err(format!("batch {lost} is gone and nothing says so"));
            }
            found.harmless += 1;
        }
    }
    Ok(())
}
