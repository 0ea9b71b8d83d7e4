//! What each piece of the way from a guest to the store and back costs:
//!
//!     cargo bench -p farhaven-storage-sync --features bench
//!
//! Times are CPU time of the whole process, which a busy machine does not
//! stretch; the log's alone are wall time, for they are the disk's. What is
//! compressed is this very program. Tables: docs/performance.md.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark stops at the first error"
)]

use std::hint::black_box;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{
    Bases, Batch, Chain, DedupIndex, Encoder, LEVELS, Sequence, delta,
};
use farhaven_storage_sync::digest::{DigestKey, is_zero};
use farhaven_storage_sync::store::{Seal, Store, StoreOptions};
use farhaven_storage_sync::unit::{Digest, GROUP, GuestId, Place, UNIT, Volume, VolumeKind};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const GUEST: GuestId = GuestId([1; 16]);

/// CPU time of all threads.
struct Cpu;

impl Measurement for Cpu {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// Real bytes that compress as programs and their symbols do.
fn program(units: usize) -> Vec<u8> {
    let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    bytes.into_iter().cycle().take(units * UNIT).collect()
}

/// Units of records: a word out of 500, then a number.
fn records(units: usize, random: &mut StdRng) -> Vec<u8> {
    let words: Vec<[u8; 7]> = (0..500)
        .map(|_| random.random::<[u8; 7]>().map(|b| b % 26 + b'a'))
        .collect();
    let mut bytes = Vec::with_capacity(units * UNIT + 16);
    while bytes.len() < units * UNIT {
        bytes.extend_from_slice(&words[random.random_range(0..words.len())]);
        bytes.push(b' ');
        if random.random_range(0..3) == 0 {
            bytes.extend_from_slice(&random.random::<u32>().to_le_bytes());
        }
    }
    bytes.truncate(units * UNIT);
    bytes
}

fn noise(units: usize, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = vec![0; units * UNIT];
    random.fill_bytes(&mut bytes);
    bytes
}

/// What a source's encoders share.
struct Source {
    key: DigestKey,
    seqs: Arc<Sequence>,
    index: Arc<Mutex<DedupIndex>>,
    bases: Arc<Mutex<Bases>>,
}

impl Source {
    fn new() -> Source {
        Source {
            key: DigestKey::new([3; 32]),
            seqs: Arc::new(Sequence::starting_at(1)),
            index: Arc::new(Mutex::new(DedupIndex::new(64 << 20))),
            bases: Arc::new(Mutex::new(Bases::new(64 << 20))),
        }
    }

    fn encoder(&self, point: u64, level: i32) -> Encoder {
        Encoder::new(GUEST, point, self.seqs.clone(), self.index.clone(), level)
            .with_bases(self.bases.clone())
    }

    /// Batches of `units` from unit `first` on, `step` apart.
    fn encode(&self, point: u64, first: u64, step: u64, units: &[u8]) -> Vec<Batch> {
        let mut encoder = self.encoder(point, 3);
        let mut digests = Vec::new();
        self.key.digests(units, &mut digests);
        let mut batches = Vec::new();
        for (at, (unit, digest)) in (0..).zip(units.chunks(UNIT).zip(&digests)) {
            batches.extend(encoder.unit(0, first + at * step, unit, *digest).unwrap());
        }
        batches.extend(encoder.flush());
        batches
    }

    fn append(&self, store: &Store, batches: &[Batch]) {
        let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
        for seq in store.append(&bytes).unwrap() {
            self.index.lock().unwrap().acknowledge(seq);
            self.bases.lock().unwrap().acknowledge(seq);
        }
    }
}

fn seal(point: u64, units: u64, batches: &[Batch]) -> Seal {
    let mut chain = Chain::new();
    batches
        .iter()
        .for_each(|batch| chain.push(batch.seq, &batch.hash));
    Seal {
        guest: GUEST,
        point,
        parent: point - 1,
        cut_at_unix_ns: 1,
        volumes: vec![Volume {
            name: "ram".into(),
            kind: VolumeKind::Ram,
            bytes: units * UNIT as u64,
        }],
        batches: chain.count(),
        chain: chain.finish(),
        context: Vec::new(),
        stats: PointStats::default(),
    }
}

fn hash(criterion: &mut Criterion<Cpu>) {
    let units = records(4096, &mut StdRng::seed_from_u64(1));
    let zeros = vec![0; 4096 * UNIT];
    let key = DigestKey::new([3; 32]);
    let mut group = criterion.benchmark_group("hash");
    group.throughput(Throughput::Bytes(units.len() as u64));
    let mut digests = Vec::new();
    group.bench_function("digests", |bench| {
        bench.iter(|| {
            digests.clear();
            key.digests(black_box(&units), &mut digests);
        });
    });
    group.bench_function("zeros", |bench| {
        bench.iter(|| {
            black_box(&zeros)
                .chunks(UNIT)
                .filter(|unit| is_zero(unit))
                .count()
        });
    });
}

/// What a scan of RAM does to each chunk of a page file that has not changed: a
/// private copy, its digests, and whether they are those known.
fn scan(criterion: &mut Criterion<Cpu>) {
    const CHUNKS: usize = 256;
    let ram = program(CHUNKS * GROUP);
    let key = DigestKey::new([4; 32]);
    let mut known = Vec::new();
    key.digests(&ram, &mut known);
    let mut copy = vec![0; GROUP * UNIT];
    let mut digests = Vec::with_capacity(GROUP);
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(ram.len() as u64));
    group.bench_function("64 MiB unchanged", |bench| {
        bench.iter(|| {
            for (chunk, known) in ram.chunks(GROUP * UNIT).zip(known.chunks(GROUP)) {
                copy.copy_from_slice(chunk);
                digests.clear();
                key.digests(&copy, &mut digests);
                assert_eq!(digests, known);
            }
        });
    });
}

fn dedup(criterion: &mut Criterion<Cpu>) {
    let mut random = StdRng::seed_from_u64(2);
    let mut index = DedupIndex::new(64 << 20);
    let known: Vec<Digest> = (0..1_000_000).map(|_| Digest(random.random())).collect();
    for (at, digest) in (64u64..).zip(&known) {
        index.insert(*digest, Place(at));
    }
    let mut group = criterion.benchmark_group("dedup, a million units");
    group.throughput(Throughput::Elements(1));
    group.bench_function("known", |bench| {
        bench.iter(|| index.get_for(GUEST, known[random.random_range(0..known.len())]));
    });
    group.bench_function("unknown", |bench| {
        bench.iter(|| index.get_for(GUEST, Digest(random.random())));
    });
    group.bench_function("inserted", |bench| {
        bench.iter(|| index.insert(Digest(random.random()), Place::new(9, 9)));
    });
}

fn differences(criterion: &mut Criterion<Cpu>) {
    let mut random = StdRng::seed_from_u64(3);
    let base: [u8; UNIT] = program(1).try_into().unwrap();
    let other: [u8; UNIT] = noise(1, &mut random).try_into().unwrap();
    let mut words = base;
    for at in 0..8 {
        random.fill_bytes(&mut words[at * 500..at * 500 + 8]);
    }
    let mut out = Vec::new();
    let mut group = criterion.benchmark_group("delta");
    group.throughput(Throughput::Bytes(UNIT as u64));
    for (name, unit) in [("eight words", &words), ("all new, given up", &other)] {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                out.clear();
                delta::diff(black_box(&base), unit, &mut out)
            });
        });
    }
    out.clear();
    delta::diff(&base, &words, &mut out).unwrap();
    group.bench_function("applied and verified", |bench| {
        bench.iter(|| {
            let mut unit = base;
            delta::apply(&out, &mut unit).unwrap();
            delta::check_of(&unit)
        });
    });
    // A whole group of changed units: looked up, weighed, compressed.
    let source = Source::new();
    let mut units = program(GROUP);
    let batches = source.encode(1, 0, 1, &units);
    batches
        .iter()
        .for_each(|batch| source.bases.lock().unwrap().acknowledge(batch.seq));
    for unit in units.chunks_mut(UNIT) {
        for at in 0..8 {
            random.fill_bytes(&mut unit[at * 500..at * 500 + 8]);
        }
    }
    let mut encoder = source.encoder(2, 3);
    group.throughput(Throughput::Bytes((GROUP * UNIT) as u64));
    group.bench_function("a group encoded", |bench| {
        bench.iter(|| encode_group(&mut encoder, &units));
    });
}

/// Units without digests, so that none is known the second time.
fn encode_group(encoder: &mut Encoder, units: &[u8]) -> usize {
    let mut bytes = 0;
    for (at, unit) in (0..).zip(units.chunks(UNIT)) {
        let batch = encoder.unit(0, at, unit, Digest::UNKNOWN).unwrap();
        bytes += batch.map_or(0, |batch| batch.bytes.len());
    }
    bytes
}

fn compress(criterion: &mut Criterion<Cpu>) {
    // 32 groups from all over the program.
    let mut random = StdRng::seed_from_u64(4);
    let all = program(32 * GROUP);
    let noise = noise(32 * GROUP, &mut random);
    let mut group = criterion.benchmark_group("8 MiB encoded");
    group.throughput(Throughput::Bytes(all.len() as u64));
    let mut cases: Vec<(i32, &[u8])> = LEVELS.iter().map(|&level| (level, &all[..])).collect();
    cases.push((3, &noise));
    for (level, units) in cases {
        let source = Source::new();
        let mut encoder = Encoder::new(GUEST, 1, source.seqs, source.index, level);
        let bytes = encode_group(&mut encoder, units);
        let percent = bytes as f64 * 100.0 / units.len() as f64;
        let name = format!("zstd {level}, to {percent:.1} %");
        group.bench_function(name, |bench| {
            bench.iter(|| encode_group(&mut encoder, units))
        });
    }
}

fn log(criterion: &mut Criterion) {
    let mut random = StdRng::seed_from_u64(5);
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let source = Source::new();
    let mut group = criterion.benchmark_group("log");
    // 4 MiB of noise, synced once.
    let units = 16 * GROUP;
    group.throughput(Throughput::Bytes((units * UNIT) as u64));
    group.bench_function("append of 16 batches, 4 MiB", |bench| {
        bench.iter_batched(
            || {
                let batches = source.encode(1, 0, 1, &noise(units, &mut random));
                batches
                    .into_iter()
                    .map(|batch| batch.bytes)
                    .collect::<Vec<_>>()
            },
            |batches| store.append(&batches).unwrap(),
            BatchSize::PerIteration,
        );
    });
}

fn manifest(criterion: &mut Criterion<Cpu>) {
    const UNITS: u64 = 131_072;
    const CHANGED: usize = 1107;
    let mut random = StdRng::seed_from_u64(6);
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let source = Source::new();
    let mut batches = Vec::new();
    for first in (0..27_000).step_by(1000) {
        let units = source.encode(1, first, 1, &records(1000, &mut random));
        source.append(&store, &units);
        batches.extend(units);
    }
    store.seal(seal(1, UNITS, &batches)).unwrap();
    let mut point = 1;
    let mut group = criterion.benchmark_group("manifest");
    group.throughput(Throughput::Elements(CHANGED as u64));
    group.bench_function("seal of 1107 of 131072 units", |bench| {
        bench.iter_batched(
            || {
                point += 1;
                let units = records(CHANGED, &mut random);
                let batches = source.encode(point, random.random_range(0..20), 97, &units);
                source.append(&store, &batches);
                seal(point, UNITS, &batches)
            },
            |seal| store.seal(seal).unwrap(),
            BatchSize::PerIteration,
        );
    });
}

fn restore(criterion: &mut Criterion<Cpu>) {
    const UNITS: usize = 16 * 1024;
    let mut random = StdRng::seed_from_u64(7);
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let source = Source::new();
    // The cache of old versions holds about 15,600: most of these.
    let mut units = records(UNITS, &mut random);
    let batches = source.encode(1, 0, 1, &units);
    source.append(&store, &batches);
    store.seal(seal(1, UNITS as u64, &batches)).unwrap();
    for unit in units.chunks_mut(UNIT) {
        random.fill_bytes(&mut unit[2000..2008]);
    }
    let batches = source.encode(2, 0, 1, &units);
    let deltas: usize = batches.iter().map(|batch| usize::from(batch.deltas)).sum();
    source.append(&store, &batches);
    store.seal(seal(2, UNITS as u64, &batches)).unwrap();
    let mut group = criterion.benchmark_group("restore of 64 MiB");
    group.throughput(Throughput::Bytes((UNITS * UNIT) as u64));
    for (point, what) in [
        (1, "literals".to_owned()),
        (2, format!("{deltas} differences")),
    ] {
        let replica = store.open_point(GUEST, point).unwrap();
        for threads in [1, 2] {
            group.bench_function(format!("{what}, {threads} threads"), |bench| {
                bench.iter(|| {
                    let take = |unit: u64, bytes: &[u8]| {
                        black_box((unit, bytes[0]));
                    };
                    replica.fill_parallel(0, threads, &take).unwrap();
                });
            });
        }
    }
    group.throughput(Throughput::Bytes(UNIT as u64));
    for (point, what) in [(1, "of a literal"), (2, "of a difference")] {
        let replica = store.open_point(GUEST, point).unwrap();
        let mut random = StdRng::seed_from_u64(8);
        let mut out = [0; UNIT];
        group.bench_function(format!("one unit at random, {what}"), |bench| {
            bench.iter(|| {
                let unit = random.random_range(0..UNITS as u64);
                replica.read(0, unit, 1, &mut out).unwrap();
            });
        });
    }
}

fn configured<M: Measurement>(criterion: Criterion<M>) -> Criterion<M> {
    criterion
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
}

criterion_group! {
    name = pieces;
    config = configured(Criterion::default().with_measurement(Cpu));
    targets = hash, scan, dedup, differences, compress, manifest, restore
}
criterion_group! {
    name = disk;
    config = configured(Criterion::default());
    targets = log
}
criterion_main!(pieces, disk);
