//! A model of guests for the tests: what each unit held at each point.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use farhaven_storage_sync::codec::{Batch, Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{OpenReport, Seal, SealError, Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT, Volume, VolumeKind};
use farhaven_storage_sync::{PointHeader, PointStats};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

pub const SMALL: u64 = 64 * 1024;

pub fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: SMALL,
        ..StoreOptions::default()
    }
}

pub fn open(dir: &Path) -> (Store, OpenReport) {
    Store::open(dir, options()).unwrap()
}

/// A unit whose content is told by a number; 0 is zeros. Half of it compresses.
pub fn unit(of: u64) -> Vec<u8> {
    let mut bytes = vec![0; UNIT];
    if of > 0 {
        let mut random: StdRng = SeedableRng::seed_from_u64(of);
        random.fill_bytes(&mut bytes[..UNIT / 2]);
    }
    bytes
}

/// What a site sends for its guests: shared numbers and index.
pub struct Site {
    pub key: DigestKey,
    pub seqs: Arc<Sequence>,
    pub index: Arc<Mutex<DedupIndex>>,
}

impl Site {
    pub fn new() -> Site {
        Site {
            key: DigestKey::new([9; 32]),
            seqs: Arc::new(Sequence::starting_at(1)),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
        }
    }
}

pub type Content = Vec<Vec<u64>>;

/// A guest of two volumes whose units hold numbers.
pub struct Model {
    pub id: GuestId,
    pub now: Content,
    pub sealed: BTreeMap<u64, Content>,
}

impl Model {
    pub fn new(id: u8, units: &[usize]) -> Model {
        let now = units.iter().map(|&units| vec![0; units]).collect();
        Model {
            id: GuestId([id; 16]),
            now,
            sealed: BTreeMap::new(),
        }
    }

    pub fn volumes(&self) -> Vec<Volume> {
        let volume = |(at, units): (usize, &Vec<u64>)| Volume {
            name: format!("volume{at}"),
            kind: if at == 0 {
                VolumeKind::Ram
            } else {
                VolumeKind::Disk
            },
            bytes: (units.len() * UNIT) as u64,
        };
        self.now.iter().enumerate().map(volume).collect()
    }

    /// Changes some units, and encodes them as `point`, some of them twice.
    pub fn change(&mut self, site: &Site, point: u64, random: &mut StdRng) -> Vec<Batch> {
        let mut encoder = Encoder::new(self.id, point, site.seqs.clone(), site.index.clone(), 1);
        let mut batches = Vec::new();
        for _ in 0..random.random_range(1..8) {
            let volume = random.random_range(0..self.now.len());
            let start = random.random_range(0..self.now[volume].len());
            let most = self.now[volume].len() - start;
            let count = random.random_range(1..=most.min(90));
            let kind = random.random_range(0..4);
            if kind == 0 {
                self.now[volume][start..start + count].fill(0);
                batches.extend(
                    encoder
                        .zeros(volume as u16, start as u64, count as u64)
                        .unwrap(),
                );
                continue;
            }
            for at in start..start + count {
                let of = random.random_range(0..if kind == 1 { 40 } else { 1 << 40 });
                self.now[volume][at] = of;
                let bytes = unit(of);
                let digest = site.key.of(&bytes);
                batches.extend(
                    encoder
                        .unit(volume as u16, at as u64, &bytes, digest)
                        .unwrap(),
                );
            }
        }
        batches.extend(encoder.flush());
        batches
    }

    /// Encodes everything the guest holds as `point`.
    pub fn tell_all(&self, site: &Site, point: u64) -> Vec<Batch> {
        let mut encoder = Encoder::new(self.id, point, site.seqs.clone(), site.index.clone(), 1);
        let mut batches = Vec::new();
        for (volume, units) in self.now.iter().enumerate() {
            for (at, &of) in units.iter().enumerate() {
                let bytes = unit(of);
                let digest = site.key.of(&bytes);
                batches.extend(
                    encoder
                        .unit(volume as u16, at as u64, &bytes, digest)
                        .unwrap(),
                );
            }
        }
        batches.extend(encoder.flush());
        batches
    }

    pub fn seal_of(&self, point: u64, parent: u64, batches: &[Batch]) -> Seal {
        let mut chain = Chain::new();
        for batch in batches {
            chain.push(batch.seq, &batch.hash);
        }
        Seal {
            guest: self.id,
            point,
            parent,
            cut_at_unix_ns: 1_000 + point,
            volumes: self.volumes(),
            batches: chain.count(),
            chain: chain.finish(),
            context: format!("definition {point}").into_bytes(),
            stats: PointStats {
                pause_ns: point,
                ..PointStats::default()
            },
        }
    }

    /// Changes, sends and seals.
    pub fn step(
        &mut self,
        site: &Site,
        store: &Store,
        point: u64,
        random: &mut StdRng,
    ) -> Result<PointHeader, SealError> {
        let batches = self.change(site, point, random);
        send(site, store, &batches);
        let parent = store.newest(self.id).map_or(0, |newest| newest.point);
        let header = store.seal(self.seal_of(point, parent, &batches))?;
        self.sealed.insert(point, self.now.clone());
        Ok(header)
    }

    /// Every sealed point reads back bit for bit, in every way there is.
    pub fn check(&self, store: &Store) {
        let numbers: Vec<u64> = store
            .points(self.id)
            .iter()
            .map(|header| header.point)
            .collect();
        assert_eq!(numbers, self.sealed.keys().copied().collect::<Vec<_>>());
        for (&point, content) in &self.sealed {
            check_point(store, self.id, point, content);
        }
    }
}

pub fn send(site: &Site, store: &Store, batches: &[Batch]) {
    let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
    for seq in store.append(&bytes).unwrap() {
        site.index.lock().unwrap().acknowledge(seq);
    }
}

pub fn check_point(store: &Store, guest: GuestId, point: u64, content: &Content) {
    let replica = store.open_point(guest, point).unwrap();
    assert_eq!(replica.context(), format!("definition {point}").as_bytes());
    for (volume, units) in content.iter().enumerate() {
        let expected: Vec<u8> = units.iter().flat_map(|&of| unit(of)).collect();
        let index = volume as u16;
        let mut read = vec![1; expected.len()];
        replica
            .read(index, 0, units.len() as u64, &mut read)
            .unwrap();
        assert!(
            read == expected,
            "point {point} volume {volume} reads differently"
        );
        let mut filled = vec![0; expected.len()];
        replica
            .fill(index, |unit, bytes| {
                filled[unit as usize * UNIT..][..UNIT].copy_from_slice(bytes);
            })
            .unwrap();
        assert!(
            filled == expected,
            "point {point} volume {volume} fills differently"
        );
        let shared = Mutex::new(vec![0; expected.len()]);
        replica
            .fill_parallel(index, 2, &|unit, bytes| {
                shared.lock().unwrap()[unit as usize * UNIT..][..UNIT].copy_from_slice(bytes);
            })
            .unwrap();
        assert!(shared.into_inner().unwrap() == expected);
        let nonzero: usize = units.iter().filter(|&&of| of != 0).count();
        let runs: u64 = replica.nonzero_runs(index).map(|(_, count)| count).sum();
        assert_eq!(runs, nonzero as u64);
        for (unit, count) in replica.nonzero_runs(index) {
            assert!(
                units[unit as usize..(unit + count) as usize]
                    .iter()
                    .all(|&of| of != 0)
            );
        }
    }
}

/// Gives the first units of a guest new content, and encodes all it holds.
pub fn literal_batches(site: &Site, guest: &mut Model, point: u64, units: usize) -> Vec<Batch> {
    let mut random = StdRng::seed_from_u64(point << 8 | u64::from(guest.id.0[0]));
    guest.now[0][..units].fill_with(|| random.random_range(1..1 << 50));
    guest.tell_all(site, point)
}
