//! Differences: whatever happens to acknowledgements, points and batches in
//! between, what was sealed restores bit for bit, and what does not fit
//! together is refused.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::open;
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{
    Bases, Batch, BatchError, BatchView, Body, Chain, Content, DedupIndex, Encoder, Expander,
    Sequence, Slot,
};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::limits::BATCH_HEADER;
use farhaven_storage_sync::replica::ReplicaError;
use farhaven_storage_sync::store::{Seal, SealError, Store};
use farhaven_storage_sync::unit::{Digest, GuestId, Place, UNIT, Volume, VolumeKind};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

type Unit = [u8; UNIT];
type Volumes = Vec<Vec<Unit>>;

fn noise(random: &mut StdRng) -> Unit {
    let mut unit = [0; UNIT];
    random.fill_bytes(&mut unit);
    unit
}

/// A source: what its guests share, and what it must forget.
struct Source {
    key: DigestKey,
    seqs: Arc<Sequence>,
    index: Arc<Mutex<DedupIndex>>,
    bases: Arc<Mutex<Bases>>,
}

impl Source {
    fn starting_at(next: u64, bytes: usize) -> Source {
        Source {
            key: DigestKey::new([9; 32]),
            seqs: Arc::new(Sequence::starting_at(next)),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
            bases: Arc::new(Mutex::new(Bases::new(bytes))),
        }
    }

    /// After a restart: the index comes from the peer, old versions are gone.
    fn restarted(store: &Store, bytes: usize) -> Source {
        let source = Source::starting_at(store.last_seq() + 1, bytes);
        let mut from = Some(1);
        while let Some(at) = from {
            let page = store.live_digests(&source.key, at, 7);
            for (seq, digests) in page.batches {
                for (index, digest) in digests.iter().enumerate() {
                    let place = Place::new(seq, index as u8);
                    source.index.lock().unwrap().insert(*digest, place);
                }
            }
            from = page.next;
        }
        source
    }

    fn encoder(&self, guest: GuestId, point: u64) -> Encoder {
        let (seqs, index) = (self.seqs.clone(), self.index.clone());
        // Now at the usual level, now at one that has no time to weigh.
        let level = if point % 3 == 0 { -5 } else { 1 };
        Encoder::new(guest, point, seqs, index, level).with_bases(self.bases.clone())
    }

    fn acknowledge(&self, seq: u64) {
        self.index.lock().unwrap().acknowledge(seq);
        self.bases.lock().unwrap().acknowledge(seq);
    }

    fn forget(&self, seqs: &BTreeSet<u64>) {
        self.index.lock().unwrap().remove_seqs(seqs);
        self.bases.lock().unwrap().remove_seqs(seqs);
    }
}

struct Guest {
    id: GuestId,
    now: Volumes,
    /// Units that the newest sealed point does not hold as they are.
    dirty: BTreeSet<(usize, usize)>,
    sealed: BTreeMap<u64, Volumes>,
}

impl Guest {
    fn new(id: u8, units: &[usize]) -> Guest {
        Guest {
            id: GuestId([id; 16]),
            now: units.iter().map(|&units| vec![[0; UNIT]; units]).collect(),
            dirty: BTreeSet::new(),
            sealed: BTreeMap::new(),
        }
    }

    fn set(&mut self, volume: usize, unit: usize, bytes: Unit) {
        self.now[volume][unit] = bytes;
        self.dirty.insert((volume, unit));
    }

    fn change(&mut self, random: &mut StdRng) {
        for _ in 0..random.random_range(1..60) {
            let volume = random.random_range(0..self.now.len());
            // A few units are hot.
            let most = if random.random() {
                12
            } else {
                self.now[volume].len()
            };
            let unit = random.random_range(0..most);
            let mut bytes = self.now[volume][unit];
            match random.random_range(0..10) {
                0 => bytes = [0; UNIT],
                1 => bytes = noise(random),
                2 => bytes = self.now[volume][random.random_range(0..most)],
                3 => {
                    let start = random.random_range(0..UNIT / 2);
                    random.fill_bytes(&mut bytes[start..start + UNIT / 2]);
                }
                _ => {
                    for _ in 0..random.random_range(1..9) {
                        bytes[random.random_range(0..UNIT)] = random.random();
                    }
                }
            }
            self.set(volume, unit, bytes);
        }
    }

    fn encode(&self, source: &Source, point: u64) -> Vec<Batch> {
        let mut encoder = source.encoder(self.id, point);
        let mut batches = Vec::new();
        for &(volume, unit) in &self.dirty {
            let bytes = &self.now[volume][unit];
            let digest = source.key.of(bytes);
            let batch = encoder.unit(volume as u16, unit as u64, bytes, digest);
            batches.extend(batch.unwrap());
        }
        batches.extend(encoder.flush());
        batches
    }

    fn seal_of(&self, store: &Store, point: u64, batches: &[Batch]) -> Seal {
        let mut chain = Chain::new();
        for batch in batches {
            chain.push(batch.seq, &batch.hash);
        }
        let volume = |units: &Vec<Unit>| Volume {
            name: format!("volume of {}", units.len()),
            kind: VolumeKind::Ram,
            bytes: (units.len() * UNIT) as u64,
        };
        Seal {
            guest: self.id,
            point,
            parent: store.newest(self.id).map_or(0, |newest| newest.point),
            cut_at_unix_ns: point,
            volumes: self.now.iter().map(volume).collect(),
            batches: chain.count(),
            chain: chain.finish(),
            context: Vec::new(),
            stats: PointStats::default(),
        }
    }

    fn was_sealed(&mut self, point: u64) {
        self.dirty.clear();
        self.sealed.insert(point, self.now.clone());
    }

    /// Encodes, sends, acknowledges and seals.
    fn step(&mut self, source: &Source, store: &Store, point: u64) -> Vec<Batch> {
        let batches = self.encode(source, point);
        append(store, &batches);
        batches
            .iter()
            .for_each(|batch| source.acknowledge(batch.seq));
        store.seal(self.seal_of(store, point, &batches)).unwrap();
        self.was_sealed(point);
        batches
    }

    fn check(&self, store: &Store) {
        for (&point, volumes) in &self.sealed {
            let replica = store.open_point(self.id, point).unwrap();
            for (volume, units) in volumes.iter().enumerate() {
                let index = volume as u16;
                let expected = units.as_flattened();
                let mut read = vec![1; expected.len()];
                replica
                    .read(index, 0, units.len() as u64, &mut read)
                    .unwrap();
                assert!(read == expected, "point {point} reads differently");
                let shared = Mutex::new(vec![0; expected.len()]);
                let take = |unit: u64, bytes: &[u8]| {
                    shared.lock().unwrap()[unit as usize * UNIT..][..UNIT].copy_from_slice(bytes);
                };
                replica.fill_parallel(index, 2, &take).unwrap();
                assert!(
                    *shared.lock().unwrap() == expected,
                    "point {point} fills differently"
                );
                shared.lock().unwrap().fill(0);
                replica.fill(index, take).unwrap();
                assert!(*shared.lock().unwrap() == expected);
            }
        }
    }
}

fn append(store: &Store, batches: &[Batch]) {
    let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
    store.append(&bytes).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_history_restores_bit_for_bit(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let bytes = [0, 64 * 1024, 4 << 20][random.random_range(0..3)];
        let mut source = Source::starting_at(1, bytes);
        let mut guests = [Guest::new(1, &[90, 40]), Guest::new(2, &[60])];
        let mut deltas = 0u64;
        for point in 1..random.random_range(8..30) {
            let guest = &mut guests[random.random_range(0..2)];
            guest.change(&mut random);
            let batches = guest.encode(&source, point);
            deltas += batches.iter().map(|batch| u64::from(batch.deltas)).sum::<u64>();
            match random.random_range(0..8) {
                // The link is lost before all arrived: the point is given up.
                0 => {
                    let arrived = random.random_range(0..=batches.len());
                    append(&store, &batches[..arrived]);
                    batches[..arrived].iter().for_each(|batch| {
                        if random.random() { source.acknowledge(batch.seq) }
                    });
                    source.forget(&batches[arrived..].iter().map(|batch| batch.seq).collect());
                    store.abandon(guest.id);
                }
                // Acknowledgements are lost, or late.
                1 => {
                    append(&store, &batches);
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                    batches.iter().for_each(|batch| {
                        if random.random() { source.acknowledge(batch.seq) }
                    });
                }
                // The peer restarts between append and seal.
                2 => {
                    append(&store, &batches);
                    drop(store);
                    let (again, report) = open(dir.path());
                    prop_assert!(report.damaged.is_empty() && report.log.bad.is_empty());
                    store = again;
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                    batches.iter().for_each(|batch| source.acknowledge(batch.seq));
                }
                // The source restarts.
                3 => {
                    append(&store, &batches);
                    store.abandon(guest.id);
                    source = Source::restarted(&store, bytes);
                }
                _ => {
                    append(&store, &batches);
                    batches.iter().for_each(|batch| source.acknowledge(batch.seq));
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                }
            }
            if random.random_range(0..4) == 0 {
                let mut keep = BTreeMap::new();
                for guest in &mut guests {
                    let newest = guest.sealed.keys().last().copied();
                    guest.sealed.retain(|&at, _| Some(at) == newest || random.random_range(0..4) == 0);
                    if !guest.sealed.is_empty() {
                        keep.insert(guest.id, guest.sealed.keys().copied().collect());
                    }
                }
                let plan = store.plan_prune(&keep).unwrap();
                source.forget(&plan.retire.iter().copied().collect());
                let report = store.perform_prune(&plan).unwrap();
                prop_assert_eq!(report.revived, 0);
                for seq in &plan.retire {
                    prop_assert_eq!(store.contains(*seq), plan.stay.contains(seq));
                }
            }
            if random.random_range(0..4) == 0 {
                guests.iter().for_each(|guest| guest.check(&store));
            }
        }
        prop_assert!(deltas > 0 || bytes == 0);
        guests.iter().for_each(|guest| guest.check(&store));
        drop(store);
        let (store, report) = open(dir.path());
        prop_assert!(report.damaged.is_empty(), "{:?}", report);
        guests.iter().for_each(|guest| guest.check(&store));
    }
}

/// A guest whose first unit went twice: whole in batch 1, as a difference in batch 2.
fn two(store: &Store) -> (Source, Guest, Vec<Batch>) {
    let mut random = StdRng::seed_from_u64(5);
    let source = Source::starting_at(1, 1 << 20);
    let mut guest = Guest::new(1, &[70]);
    (0..10).for_each(|unit| guest.set(0, unit, noise(&mut random)));
    let mut batches = guest.step(&source, store, 1);
    for unit in 0..10 {
        let mut bytes = guest.now[0][unit];
        bytes[100 * unit] ^= 0x55;
        guest.set(0, unit, bytes);
    }
    batches.extend(guest.encode(&source, 2));
    (source, guest, batches)
}

#[test]
fn ten_changed_bytes_cost_a_few_bytes_each() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (source, mut guest, batches) = two(&store);
    let [_, second] = &batches[..] else {
        panic!("{} batches", batches.len());
    };
    assert_eq!((second.literals, second.deltas), (10, 10));
    assert!(
        second.bytes.len() < BATCH_HEADER + 10 * 20,
        "{}",
        second.bytes.len()
    );
    source.forget(&BTreeSet::from([2]));
    guest.step(&source, &store, 3);
    guest.check(&store);
    // Units of text that are rewritten go whole: they compress to less.
    let plain = (0..64).map(|unit| {
        let mut bytes = [b' '; UNIT];
        bytes[..8].copy_from_slice(&u64::to_le_bytes(unit));
        bytes
    });
    plain
        .enumerate()
        .for_each(|(unit, bytes)| guest.set(0, unit, bytes));
    guest.step(&source, &store, 4);
    for unit in 0..64 {
        let fill = [b'a' + (unit % 16) as u8; 1500];
        let mut bytes = guest.now[0][unit];
        bytes[200..1700].copy_from_slice(&fill);
        guest.set(0, unit, bytes);
    }
    let batches = guest.step(&source, &store, 5);
    assert!(batches.iter().all(|batch| batch.deltas == 0));
    guest.check(&store);
}

#[test]
fn differences_never_make_a_batch_larger() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let (with, without) = (Source::starting_at(1, 4 << 20), Source::starting_at(1, 0));
        let mut random = StdRng::seed_from_u64(seed);
        let mut guest = Guest::new(1, &[64]);
        // Records of half text, half noise, alike or not, rewritten in part.
        let record = noise(&mut random);
        for unit in 0..64 {
            let mut bytes = [b'x'; UNIT];
            let of = if seed % 2 == 0 {
                record
            } else {
                noise(&mut random)
            };
            bytes[..2048].copy_from_slice(&of[..2048]);
            bytes[4000] = unit as u8;
            guest.set(0, unit, bytes);
        }
        guest.encode(&without, 1);
        guest.step(&with, &store, 1);
        for unit in 0..64 {
            let mut bytes = guest.now[0][unit];
            let count = 1 << (seed % 12);
            let new = noise(&mut random);
            bytes[1000..1000 + count].copy_from_slice(&new[..count]);
            guest.set(0, unit, bytes);
        }
        let plain: usize = guest
            .encode(&without, 2)
            .iter()
            .map(|batch| batch.bytes.len())
            .sum();
        let ours: usize = guest
            .encode(&with, 2)
            .iter()
            .map(|batch| batch.bytes.len())
            .sum();
        assert!(
            ours <= plain,
            "{ours} bytes with differences, {plain} without"
        );
        // Where units are alike, the group's own compression does nearly as well.
        let small = seed % 2 == 1 && seed < 7;
        assert!(
            !small || ours * 10 < plain,
            "seed {seed}: {ours} of {plain} bytes"
        );
    }
}

#[test]
fn a_base_that_the_peer_does_not_have_is_named_by_the_seal() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, guest, batches) = two(&store);
    let other = tempfile::tempdir().unwrap();
    let (empty, _) = open(other.path());
    append(&empty, &batches[1..]);
    let seal = guest.seal_of(&empty, 2, &batches[1..]);
    let error = empty.seal(seal.clone()).unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 2, missing: 1 }),
        "{error}"
    );
    // And is taken once the base arrived.
    append(&empty, &batches[..1]);
    empty.seal(seal).unwrap();
}

#[test]
fn a_base_with_other_content_is_refused_and_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, guest, batches) = two(&store);
    let other = tempfile::tempdir().unwrap();
    let (wrong, _) = open(other.path());
    // Batch 1 with the content of another guest.
    let source = Source::starting_at(1, 0);
    let mut stranger = Guest::new(2, &[70]);
    let mut random = StdRng::seed_from_u64(99);
    (0..10).for_each(|unit| stranger.set(0, unit, noise(&mut random)));
    append(&wrong, &stranger.encode(&source, 1));
    append(&wrong, &batches[1..]);
    let error = wrong
        .seal(guest.seal_of(&wrong, 2, &batches[1..]))
        .unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 2, missing: 1 }),
        "{error}"
    );
    // A source that lost its index gets no digest for what cannot be rebuilt.
    let page = wrong.live_digests(&source.key, 2, 1);
    assert_eq!(page.batches, [(2, vec![Digest::UNKNOWN; 10])]);
}

#[test]
fn a_difference_from_a_difference_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, mut guest, batches) = two(&store);
    append(&store, &batches[1..]);
    store.seal(guest.seal_of(&store, 2, &batches[1..])).unwrap();
    guest.was_sealed(2);
    // A forged batch 3 that is batch 2 but for its number, so that its bases,
    // counted from its own number, are the differences of batch 2.
    let mut bytes = batches[1].bytes.to_vec();
    bytes[8..16].copy_from_slice(&3u64.to_le_bytes());
    bytes[32..40].copy_from_slice(&3u64.to_le_bytes());
    seal_by_hand(&mut bytes);
    let hash = *BatchView::parse(&bytes).unwrap().header();
    let forged = Batch {
        seq: 3,
        bytes: bytes.into(),
        hash: hash.hash,
        point: 3,
        ..batches[1].clone()
    };
    let forged = [forged];
    append(&store, &forged);
    let error = store.seal(guest.seal_of(&store, 3, &forged)).unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 3, missing: 2 }),
        "{error}"
    );
    guest.check(&store);
}

/// Puts both hashes right after the bytes were changed.
fn seal_by_hand(bytes: &mut [u8]) {
    let entries = u32::from_le_bytes(bytes[40..44].try_into().unwrap()) as usize;
    let Some(end) = BATCH_HEADER
        .checked_add(entries)
        .filter(|&end| end <= bytes.len())
    else {
        return;
    };
    let body = blake3::hash(&bytes[end..]);
    bytes[56..88].copy_from_slice(body.as_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&bytes[..88])
        .update(&bytes[BATCH_HEADER..end]);
    bytes[88..120].copy_from_slice(hasher.finalize().as_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    /// A peer that hashes its garbage properly: only the rules help.
    #[test]
    fn well_hashed_garbage_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        in_entries: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let (_, guest, batches) = two(&store);
        let mut bytes = batches[1].bytes.to_vec();
        for (at, value) in changes {
            let end = if in_entries { 250.min(bytes.len()) } else { bytes.len() };
            let from = if in_entries { BATCH_HEADER } else { 6 };
            let at = from + at.index(end - from);
            bytes[at] = value;
        }
        seal_by_hand(&mut bytes);
        if let Ok(view) = BatchView::parse(&bytes) {
            let header = *view.header();
            let mut body = Body::new();
            if view.expand(&mut Expander::new(), &mut body).is_ok() {
                prop_assert_eq!(body.len(), usize::from(header.literals));
                for index in 0..header.literals {
                    if let Slot::Difference(delta, bytes) = body.slot(index).unwrap() {
                        prop_assert!(delta.base.seq() > 0 && delta.base.seq() < header.seq);
                        prop_assert_eq!(usize::from(delta.length), bytes.len());
                    }
                }
            }
            let forged = [Batch { seq: header.seq, bytes: bytes.into(), hash: header.hash, ..batches[1].clone() }];
            let taken = store.append(std::slice::from_ref(&forged[0].bytes)).is_ok();
            if taken && store.seal(guest.seal_of(&store, 2, &forged)).is_ok() {
                let replica = store.open_point(guest.id, 2).unwrap();
                let mut out = vec![0; 70 * UNIT];
                replica.read(0, 0, 70, &mut out).unwrap();
                replica.fill(0, |_, _| {}).unwrap();
            }
        }
    }
}

#[test]
fn the_flag_and_the_entries_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, _, batches) = two(&store);
    for batch in &batches {
        let mut bytes = batch.bytes.to_vec();
        bytes[6] ^= 1;
        seal_by_hand(&mut bytes);
        let error = BatchView::parse(&bytes).unwrap_err();
        assert!(matches!(error, BatchError::Invalid(_)), "{error}");
    }
}

#[test]
fn a_base_that_rots_on_disk_is_an_error_and_never_data() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (source, mut guest, _) = two(&store);
    source.forget(&BTreeSet::from([2]));
    guest.step(&source, &store, 3);
    drop(store);
    let segment = dir.path().join("segments/00000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[BATCH_HEADER + 5000] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    // The last segment is verified when it is opened: the batch is lost.
    let (store, report) = open(dir.path());
    assert_eq!(report.log.bad.len(), 1);
    assert_eq!(report.damaged.len(), 2, "both points need batch 1");
    assert!(matches!(
        store.open_point(guest.id, 3).unwrap_err(),
        ReplicaError::NoPoint { .. }
    ));
    let page = store.live_digests(&source.key, 2, 9);
    assert!(
        page.batches
            .iter()
            .flat_map(|(_, all)| all)
            .all(|d| *d == Digest::UNKNOWN)
    );
}

#[test]
fn a_difference_keeps_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    // The golden batches: noise that blake3 makes, so that it never changes.
    let unit = |seed: u32| -> Unit {
        let mut bytes = [0; UNIT];
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    };
    let source = Source::starting_at(1000, 1 << 20);
    let mut guest = Guest {
        id: GuestId(*b"golden guest 001"),
        ..Guest::new(1, &[70, 20])
    };
    for at in 0..4u32 {
        guest.set(0, at as usize, unit(at));
    }
    guest.set(1, 7, unit(7));
    let first = guest.step(&source, &store, 300);
    for (volume, at) in [(0, 0), (0, 2), (0, 3), (1, 7)] {
        let mut bytes = guest.now[volume][at];
        bytes[at * 100..at * 100 + 8].copy_from_slice(b"farhaven");
        bytes[UNIT - 1] ^= 0xff;
        guest.set(volume, at, bytes);
    }
    guest.set(0, 9, unit(9));
    guest.set(0, 10, guest.now[0][2]);
    let second = guest.step(&source, &store, 301);
    guest.check(&store);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/delta-1.bin");
    let written = [&first[0].bytes[..], &second[0].bytes].concat();
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        std::fs::write(&path, &written).unwrap();
    }
    let kept = std::fs::read(&path).unwrap();
    assert!(
        kept == written,
        "this version writes other bytes than the golden file has"
    );
    // What the file says is read back, not what the encoder had in mind.
    let view = BatchView::parse(&kept[first[0].bytes.len()..]).unwrap();
    let deltas: Vec<_> = view
        .entries()
        .filter_map(|entry| match entry.content {
            Content::Delta(delta) => Some((entry.volume, entry.unit, delta.index, delta.base)),
            _ => None,
        })
        .collect();
    let base = |index| Place::new(1000, index);
    let expected = [
        (0, 0, 0, base(0)),
        (0, 2, 1, base(2)),
        (0, 3, 2, base(3)),
        (1, 7, 4, base(4)),
    ];
    assert_eq!(deltas, expected);
}
