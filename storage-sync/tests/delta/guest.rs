//! A source and its guests, whose units change by a few bytes or all over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{Bases, Batch, Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{Seal, Store};
use farhaven_storage_sync::unit::{GuestId, Place, UNIT, Volume, VolumeKind};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

pub(crate) type Unit = [u8; UNIT];
pub(crate) type Volumes = Vec<Vec<Unit>>;

pub(crate) fn noise(random: &mut StdRng) -> Unit {
    let mut unit = [0; UNIT];
    random.fill_bytes(&mut unit);
    unit
}

/// A source: what its guests share, and what it must forget.
pub(crate) struct Source {
    pub(crate) key: DigestKey,
    pub(crate) seqs: Arc<Sequence>,
    pub(crate) index: Arc<Mutex<DedupIndex>>,
    pub(crate) bases: Arc<Mutex<Bases>>,
}

impl Source {
    pub(crate) fn starting_at(next: u64, bytes: usize) -> Source {
        Source {
            key: DigestKey::new([9; 32]),
            seqs: Arc::new(Sequence::starting_at(next)),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
            bases: Arc::new(Mutex::new(Bases::new(bytes))),
        }
    }

    /// After a restart: the index comes from the peer, old versions are gone.
    pub(crate) fn restarted(store: &Store, bytes: usize) -> Source {
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

    pub(crate) fn encoder(&self, guest: GuestId, point: u64) -> Encoder {
        let (seqs, index) = (self.seqs.clone(), self.index.clone());
        // Now at the usual level, now at one that has no time to weigh.
        let level = if point.is_multiple_of(3) { -5 } else { 1 };
        Encoder::new(guest, point, seqs, index, level).with_bases(self.bases.clone())
    }

    pub(crate) fn acknowledge(&self, seq: u64) {
        self.index.lock().unwrap().acknowledge(seq);
        self.bases.lock().unwrap().acknowledge(seq);
    }

    pub(crate) fn forget(&self, seqs: &BTreeSet<u64>) {
        self.index.lock().unwrap().remove_seqs(seqs);
        self.bases.lock().unwrap().remove_seqs(seqs);
    }
}

pub(crate) struct Guest {
    pub(crate) id: GuestId,
    pub(crate) now: Volumes,
    /// Units that the newest sealed point does not hold as they are.
    pub(crate) dirty: BTreeSet<(usize, usize)>,
    pub(crate) sealed: BTreeMap<u64, Volumes>,
}

impl Guest {
    pub(crate) fn new(id: u8, units: &[usize]) -> Guest {
        Guest {
            id: GuestId([id; 16]),
            now: units.iter().map(|&units| vec![[0; UNIT]; units]).collect(),
            dirty: BTreeSet::new(),
            sealed: BTreeMap::new(),
        }
    }

    pub(crate) fn set(&mut self, volume: usize, unit: usize, bytes: Unit) {
        self.now[volume][unit] = bytes;
        self.dirty.insert((volume, unit));
    }

    pub(crate) fn change(&mut self, random: &mut StdRng) {
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

    pub(crate) fn encode(&self, source: &Source, point: u64) -> Vec<Batch> {
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

    pub(crate) fn seal_of(&self, store: &Store, point: u64, batches: &[Batch]) -> Seal {
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

    pub(crate) fn was_sealed(&mut self, point: u64) {
        self.dirty.clear();
        self.sealed.insert(point, self.now.clone());
    }

    /// Encodes, sends, acknowledges and seals.
    pub(crate) fn step(&mut self, source: &Source, store: &Store, point: u64) -> Vec<Batch> {
        let batches = self.encode(source, point);
        append(store, &batches);
        batches
            .iter()
            .for_each(|batch| source.acknowledge(batch.seq));
        store.seal(self.seal_of(store, point, &batches)).unwrap();
        self.was_sealed(point);
        batches
    }

    pub(crate) fn check(&self, store: &Store) {
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

pub(crate) fn append(store: &Store, batches: &[Batch]) {
    let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
    store.append(&bytes).unwrap();
}

/// A guest whose first unit went twice: whole in batch 1, as a difference in batch 2.
pub(crate) fn two(store: &Store) -> (Source, Guest, Vec<Batch>) {
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
