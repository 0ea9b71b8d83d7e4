//! A source with two guests that share content, and a store on a simulated disk.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{Bases, Batch, Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::prune::Keep;
use farhaven_storage_sync::store::{OpenReport, Seal, Store, StoreError, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT, Volume, VolumeKind};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Where the store is on the simulated disk.
pub const DIR: &str = "/var/farhaven/store";

/// Units of the volumes of every guest.
pub const VOLUMES: [usize; 2] = [24, 12];

/// What each unit of each volume holds: 0 is zeros.
pub type Content = Vec<Vec<u64>>;

thread_local! {
    static UNITS: RefCell<HashMap<u64, Arc<[u8; UNIT]>>> = RefCell::default();
}

/// The unit of a number. Numbers that differ in their lowest byte only name
/// units that differ in a few bytes only.
pub fn unit(of: u64) -> Arc<[u8; UNIT]> {
    UNITS.with_borrow_mut(|units| {
        if units.len() > 4096 {
            units.clear();
        }
        let made = units.entry(of).or_insert_with(|| {
            let mut bytes = [0; UNIT];
            if of > 0 {
                let mut random = StdRng::seed_from_u64(of >> 8);
                let length = random.random_range(40..900);
                random.fill_bytes(&mut bytes[..length]);
                bytes[(of >> 8) as usize % 40] ^= of as u8;
            }
            Arc::new(bytes)
        });
        made.clone()
    })
}

pub fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: 8 * 1024,
        ..StoreOptions::default()
    }
}

pub fn open(disk: &SimulatedDisk) -> Result<(Store, OpenReport), StoreError> {
    Store::open_on(Arc::new(disk.clone()), Path::new(DIR), options())
}

/// What a source does next, or was doing when the lights went out.
#[derive(Debug, Clone)]
pub enum Doing {
    Nothing,
    Append(Vec<Bytes>),
    Seal(usize, Vec<Bytes>, Box<Seal>, Content),
    Prune(Keep),
}

/// What must hold of one guest.
#[derive(Debug, Clone)]
pub struct Expected {
    pub id: GuestId,
    /// Points whose seal was answered.
    pub sealed: BTreeMap<u64, Content>,
    /// Points that may be there or not; if they are, they hold this.
    pub may_be: BTreeMap<u64, Content>,
}

/// What must hold, whatever happens.
#[derive(Debug, Clone)]
pub struct Expectation {
    pub guests: Vec<Expected>,
    /// Batches that were acknowledged and not retired.
    pub acknowledged: BTreeSet<u64>,
    pub doing: Doing,
}

pub struct Trial {
    pub random: StdRng,
    pub key: DigestKey,
    pub seqs: Arc<Sequence>,
    pub index: Arc<Mutex<DedupIndex>>,
    pub bases: Arc<Mutex<Bases>>,
    pub now: Vec<Content>,
    pub dirty: Vec<BTreeSet<(usize, usize)>>,
    pub expect: Expectation,
}

impl Trial {
    pub fn new(seed: u64) -> Trial {
        let expected = |id: u8| Expected {
            id: GuestId([id; 16]),
            sealed: BTreeMap::new(),
            may_be: BTreeMap::new(),
        };
        let content: Content = VOLUMES.iter().map(|&units| vec![0; units]).collect();
        Trial {
            random: StdRng::seed_from_u64(seed),
            key: DigestKey::new([9; 32]),
            seqs: Arc::new(Sequence::starting_at(1)),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
            bases: Arc::new(Mutex::new(Bases::new(1 << 20))),
            now: vec![content.clone(), content],
            dirty: vec![BTreeSet::new(); 2],
            expect: Expectation {
                guests: vec![expected(1), expected(2)],
                acknowledged: BTreeSet::new(),
                doing: Doing::Nothing,
            },
        }
    }

    /// The guest writes to some of its units.
    pub fn write(&mut self, guest: usize) {
        for _ in 0..self.random.random_range(1..14) {
            let volume = self.random.random_range(0..VOLUMES.len());
            let unit = self.random.random_range(0..VOLUMES[volume]);
            let old = self.now[guest][volume][unit];
            self.now[guest][volume][unit] = match self.random.random_range(0..10) {
                0 => 0,
                // The same in both guests, again and again.
                1..4 => self.random.random_range(1..30) << 8,
                4..7 if old > 0 => old & !0xff | u64::from(self.random.random::<u8>()),
                _ => self.random.random_range(30..1 << 40) << 8,
            };
            self.dirty[guest].insert((volume, unit));
        }
    }

    /// What the newest sealed point does not hold as it is, as batches of `point`.
    pub fn encode(&mut self, guest: usize, point: u64) -> Vec<Batch> {
        let (seqs, index) = (self.seqs.clone(), self.index.clone());
        let id = self.expect.guests[guest].id;
        let mut encoder = Encoder::new(id, point, seqs, index, 1).with_bases(self.bases.clone());
        let mut batches = Vec::new();
        for &(volume, at) in &self.dirty[guest] {
            let bytes = unit(self.now[guest][volume][at]);
            let digest = self.key.of(&bytes[..]);
            let told = encoder.unit(volume as u16, at as u64, &bytes[..], digest);
            batches.extend(told.unwrap());
            if self.random.random_range(0..8) == 0 {
                batches.extend(encoder.flush());
            }
        }
        batches.extend(encoder.flush());
        batches
    }

    pub fn seal_of(&self, guest: usize, point: u64, parent: u64, batches: &[Batch]) -> Seal {
        let mut chain = Chain::new();
        for batch in batches {
            chain.push(batch.seq, &batch.hash);
        }
        let volume = |(at, &units): (usize, &usize)| Volume {
            name: format!("volume{at}"),
            kind: VolumeKind::Disk,
            bytes: (units * UNIT) as u64,
        };
        Seal {
            guest: self.expect.guests[guest].id,
            point,
            parent,
            cut_at_unix_ns: 1_000 + point,
            volumes: VOLUMES.iter().enumerate().map(volume).collect(),
            batches: chain.count(),
            chain: chain.finish(),
            context: format!("definition {point}").into_bytes(),
            stats: PointStats::default(),
        }
    }

    pub fn acknowledge(&mut self, seqs: &[u64]) {
        for &seq in seqs {
            self.index.lock().unwrap().acknowledge(seq);
            self.bases.lock().unwrap().acknowledge(seq);
            self.expect.acknowledged.insert(seq);
        }
    }

    pub fn forget(&mut self, seqs: &BTreeSet<u64>) {
        self.index.lock().unwrap().remove_seqs(seqs);
        self.bases.lock().unwrap().remove_seqs(seqs);
        self.expect.acknowledged.retain(|seq| !seqs.contains(seq));
    }

    /// Some points of each guest, the newest always.
    pub fn keep_some(&mut self) -> Keep {
        let mut keep = Keep::new();
        for guest in &self.expect.guests {
            let newest = guest.sealed.keys().last().copied();
            let mut points = BTreeSet::new();
            for &point in guest.sealed.keys() {
                if Some(point) == newest || self.random.random_range(0..3) == 0 {
                    points.insert(point);
                }
            }
            if !points.is_empty() {
                keep.insert(guest.id, points);
            }
        }
        keep
    }

    /// The points that `keep` lets go are neither here nor gone from now on.
    pub fn letting_go(&mut self, keep: &Keep) {
        for guest in &mut self.expect.guests {
            let Some(keep) = keep.get(&guest.id) else {
                continue;
            };
            let goes = |point: &u64| !keep.contains(point);
            let gone: Vec<u64> = guest.sealed.keys().copied().filter(goes).collect();
            for point in gone {
                if let Some(content) = guest.sealed.remove(&point) {
                    guest.may_be.insert(point, content);
                }
            }
        }
    }

    /// A prune that came to its end.
    pub fn let_go(&mut self) {
        self.expect
            .guests
            .iter_mut()
            .for_each(|guest| guest.may_be.clear());
    }

    /// One round of a guest: it writes, is told of, and is sealed; or a prune.
    /// `each` performs what [`Expectation::doing`] says and must come to its end.
    pub fn step<E>(
        &mut self,
        store: &mut Store,
        each: &mut dyn FnMut(&mut Trial, &mut Store) -> Result<(), E>,
    ) -> Result<(), E> {
        let guest = self.random.random_range(0..2);
        if self.random.random_range(0..6) == 0 {
            self.expect.doing = Doing::Prune(self.keep_some());
            each(self, store)?;
        }
        self.write(guest);
        let expected = &self.expect.guests[guest];
        let point = store.next_point(expected.id) + self.random.random_range(0..2);
        let parent = store.newest(expected.id).map_or(0, |newest| newest.point);
        let batches = self.encode(guest, point);
        let bytes: Vec<Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
        for some in bytes.chunks(self.random.random_range(1..4)) {
            self.expect.doing = Doing::Append(some.to_vec());
            each(self, store)?;
        }
        let seal = self.seal_of(guest, point, parent, &batches);
        let content = self.now[guest].clone();
        self.expect.doing = Doing::Seal(guest, bytes, Box::new(seal), content);
        each(self, store)?;
        self.dirty[guest].clear();
        Ok(())
    }
}
