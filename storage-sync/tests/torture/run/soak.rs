//! Virtual days on a real disk: points, retention, prunes, scrubs, restarts; memory, disk and
//! file handles must not grow once retention has filled.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::catalogue::{Catalogue, Table};
use farhaven_storage_sync::codec::{Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{Seal, Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT, Volume, VolumeKind};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// What a soak is to be.
pub struct Soak {
    pub seed: u64,
    /// Virtual days, at most.
    pub days: u64,
    /// Points of each guest in one of them.
    pub points_a_day: u64,
    /// Real time, at most.
    pub at_most: Duration,
}

/// What one day's end looked like.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub day: u64,
    pub rss_kib: u64,
    pub disk_bytes: u64,
    pub files: u64,
    pub handles: u64,
    pub points: u64,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Soaked {
    pub points: u64,
    pub prunes: u64,
    pub dropped: u64,
    pub scrubs: u64,
    pub restarts: u64,
    pub samples: Vec<Sample>,
}

/// Days until retention is full: a week of daily points.
const FULL: u64 = 9;
const GUESTS: usize = 2;
const UNITS: usize = 1500;

struct Source {
    key: DigestKey,
    seqs: Arc<Sequence>,
    index: Arc<Mutex<DedupIndex>>,
}

struct Guest {
    id: GuestId,
    now: Vec<u64>,
}

fn unit(of: u64) -> Vec<u8> {
    let mut bytes = vec![0; UNIT];
    if of > 0 {
        StdRng::seed_from_u64(of).fill_bytes(&mut bytes[..UNIT / 4]);
    }
    bytes
}

impl Guest {
    /// A day's work is mostly on the same few units, now and then anywhere.
    fn work(&mut self, random: &mut StdRng) -> BTreeSet<usize> {
        let mut changed = BTreeSet::new();
        for _ in 0..random.random_range(1..12) {
            let most = if random.random_range(0..8) == 0 {
                UNITS
            } else {
                60
            };
            let at = random.random_range(0..most);
            self.now[at] = match random.random_range(0..10) {
                0 => 0,
                1..3 => random.random_range(1..50),
                _ => random.random_range(1..1 << 50),
            };
            changed.insert(at);
        }
        changed
    }

    fn seal(
        &self,
        store: &Store,
        source: &Source,
        changed: &BTreeSet<usize>,
        at: u64,
    ) -> Result<u64, String> {
        let point = store.next_point(self.id);
        let (seqs, index) = (source.seqs.clone(), source.index.clone());
        let mut encoder = Encoder::new(self.id, point, seqs, index, 1);
        let mut batches = Vec::new();
        for &unit_at in changed {
            let bytes = unit(self.now[unit_at]);
            let digest = source.key.of(&bytes);
            let told = encoder.unit(0, unit_at as u64, &bytes, digest);
            batches.extend(told.map_err(|error| error.to_string())?);
        }
        batches.extend(encoder.flush());
        let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
        let mut chain = Chain::new();
        batches
            .iter()
            .for_each(|batch| chain.push(batch.seq, &batch.hash));
        let durable = store.append(&bytes).map_err(|error| error.to_string())?;
        for seq in durable {
            source.index.lock().unwrap().acknowledge(seq);
        }
        let sealed = store.seal(Seal {
            guest: self.id,
            point,
            parent: store.newest(self.id).map_or(0, |newest| newest.point),
            cut_at_unix_ns: at,
            volumes: vec![Volume {
                name: "ram".to_owned(),
                kind: VolumeKind::Ram,
                bytes: (UNITS * UNIT) as u64,
            }],
            batches: chain.count(),
            chain: chain.finish(),
            context: b"soak".to_vec(),
            stats: PointStats::default(),
        });
        sealed
            .map(|header| header.point)
            .map_err(|error| error.to_string())
    }

    fn check(&self, store: &Store) -> Result<(), String> {
        let newest = store.newest(self.id).ok_or("no point")?;
        let replica = store
            .open_point(self.id, newest.point)
            .map_err(|error| error.to_string())?;
        let mut read = vec![0; UNITS * UNIT];
        replica
            .read(0, 0, UNITS as u64, &mut read)
            .map_err(|error| error.to_string())?;
        for (at, of) in self.now.iter().enumerate() {
            if read[at * UNIT..][..UNIT] != unit(*of) {
                return Err(format!(
                    "point {}: unit {at} reads differently",
                    newest.point
                ));
            }
        }
        Ok(())
    }
}

/// Which of a guest's points stay: all of the last hour, one of each hour of a day, one of
/// each day of a week. Ages are in points.
fn kept(store: &Store, guest: GuestId, now: u64, a_day: u64) -> BTreeSet<u64> {
    let hour = (a_day / 24).max(1);
    let (mut keep, mut hours, mut days) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for header in store.points(guest).iter().rev() {
        let at = header.cut_at_unix_ns;
        let age = now.saturating_sub(at);
        let stays = match age {
            _ if age < hour => true,
            _ if age < a_day => hours.insert(at / hour),
            _ if age < 7 * a_day => days.insert(at / a_day),
            _ => false,
        };
        if stays || keep.is_empty() {
            keep.insert(header.point);
        }
    }
    keep
}

fn sample(dir: &Path, day: u64, points: u64) -> Sample {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let rss = rss.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let (mut disk_bytes, mut files) = (0, 0);
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(of) if of.is_dir() => dirs.push(entry.path()),
                Ok(of) => (disk_bytes, files) = (disk_bytes + of.len(), files + 1),
                Err(_) => {}
            }
        }
    }
    Sample {
        day,
        rss_kib: rss.unwrap_or(0),
        disk_bytes,
        files,
        handles: fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count() as u64),
        points,
    }
}

fn open(dir: &Path) -> Result<(Store, Catalogue), String> {
    let options = StoreOptions {
        segment_bytes: 1 << 20,
        hint_bytes: 4 << 20,
        ..StoreOptions::default()
    };
    let (store, report) = Store::open(&dir.join("store"), options).map_err(|e| e.to_string())?;
    if !report.damaged.is_empty() || !report.log.bad.is_empty() {
        return Err(format!("{report:?}"));
    }
    let catalogue = Catalogue::open(&dir.join("catalogue")).map_err(|e| e.to_string())?;
    Ok((store, catalogue.0))
}

/// Soaks in `dir`. `told` is called at each day's end.
pub fn run(soak: &Soak, dir: &Path, told: &mut dyn FnMut(&Sample)) -> Result<Soaked, String> {
    let begun = Instant::now();
    let mut random = StdRng::seed_from_u64(soak.seed);
    let source = Source {
        key: DigestKey::new([9; 32]),
        seqs: Arc::new(Sequence::starting_at(1)),
        index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
    };
    let mut guests: Vec<Guest> = (0..GUESTS)
        .map(|index| Guest {
            id: GuestId([index as u8 + 1; 16]),
            now: (0..UNITS)
                .map(|_| random.random_range(0..1 << 40))
                .collect(),
        })
        .collect();
    let (mut store, mut catalogue) = open(dir)?;
    let mut done = Soaked::default();
    let mut now = 0;
    for guest in &guests {
        guest.seal(&store, &source, &(0..UNITS).collect(), now)?;
    }
    for day in 1..=soak.days {
        for _ in 0..soak.points_a_day {
            now += 1;
            for guest in &mut guests {
                let changed = guest.work(&mut random);
                let point = guest.seal(&store, &source, &changed, now)?;
                let row = format!("{}/{point}", guest.id);
                catalogue
                    .put(Table::Points, &row, &now)
                    .map_err(|e| e.to_string())?;
                done.points += 1;
            }
            catalogue.flush().map_err(|e| e.to_string())?;
            if now % (soak.points_a_day / 24).max(1) == 0 {
                prune(
                    &store,
                    &catalogue,
                    &source,
                    &guests,
                    (now, soak.points_a_day),
                    &mut done,
                )?;
            }
        }
        for guest in &guests {
            guest.check(&store)?;
        }
        let found = store.check();
        if !found.damage.is_empty() {
            return Err(format!("day {day}: {:?}", found.damage));
        }
        done.scrubs += 1;
        if day % 3 == 0 {
            drop((store, catalogue));
            (store, catalogue) = open(dir)?;
            done.restarts += 1;
        }
        let points = guests
            .iter()
            .map(|guest| store.points(guest.id).len() as u64)
            .sum();
        let sample = sample(dir, day, points);
        told(&sample);
        done.samples.push(sample);
        if begun.elapsed() > soak.at_most {
            break;
        }
    }
    flat(&done.samples)?;
    Ok(done)
}

fn prune(
    store: &Store,
    catalogue: &Catalogue,
    source: &Source,
    guests: &[Guest],
    (now, a_day): (u64, u64),
    done: &mut Soaked,
) -> Result<(), String> {
    let stays = |guest: &Guest| (guest.id, kept(store, guest.id, now, a_day));
    let keep: BTreeMap<_, _> = guests.iter().map(stays).collect();
    let plan = store.plan_prune(&keep).map_err(|error| error.to_string())?;
    let retired = plan.retire.iter().copied().collect();
    source.index.lock().unwrap().remove_seqs(&retired);
    store
        .perform_prune(&plan)
        .map_err(|error| error.to_string())?;
    for (guest, point) in &plan.dropped {
        let row = format!("{guest}/{point}");
        catalogue
            .remove(Table::Points, &row)
            .map_err(|e| e.to_string())?;
    }
    done.prunes += 1;
    done.dropped += plan.dropped.len() as u64;
    Ok(())
}

/// Nothing grows: of the days since retention was full, the last third is no higher than the
/// first third, but for noise.
fn flat(samples: &[Sample]) -> Result<(), String> {
    let full: Vec<&Sample> = samples.iter().filter(|sample| sample.day > FULL).collect();
    let third = full.len() / 3;
    if third == 0 {
        return Err(format!(
            "{} days are too few to see whether anything grows",
            samples.len()
        ));
    }
    let (first, last) = (&full[..third], &full[full.len() - third..]);
    type Figure = fn(&Sample) -> u64;
    let figures: [(&str, Figure, u64, u64); 5] = [
        ("memory (KiB)", |s| s.rss_kib, 10, 8 << 10),
        ("disk (bytes)", |s| s.disk_bytes, 15, 2 << 20),
        ("files", |s| s.files, 15, 8),
        ("file handles", |s| s.handles, 0, 2),
        ("points", |s| s.points, 5, 4),
    ];
    for (name, figure, percent, noise) in figures {
        let highest = |of: &[&Sample]| of.iter().map(|s| figure(s)).max().unwrap_or(0);
        let (before, after) = (highest(first), highest(last));
        if after > before + before * percent / 100 + noise {
            return Err(format!("{name} grew from {before} to {after}"));
        }
    }
    Ok(())
}
