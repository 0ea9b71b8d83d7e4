//! A guest without vCPUs, and a peer: what the engine stands between.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::super::*;
use crate::activate::nbd::BlockSource;
use crate::guest::SinkError;
use crate::guest::embedded::RamBlock;
use crate::guest::embedded::disk::TrackedDisk;

/// A guest without vCPUs: whoever holds it writes as if it ran.
pub(super) struct Machine {
    pub(super) random: StdRng,
    pub(super) ram: Vec<Vec<u8>>,
    pub(super) dirty: Vec<Bitmap>,
    pub(super) disks: Vec<Arc<TrackedDisk>>,
    pub(super) runs: bool,
    pub(super) ended: bool,
    /// One call in so many fails; 0: none.
    pub(super) fails: u32,
    /// `resume` fails so often.
    pub(super) stuck: u32,
    pub(super) throttle: u8,
    /// What everything was when the state was last saved.
    pub(super) saved: Vec<Vec<u8>>,
}

impl Machine {
    pub(super) fn new(seed: u64, directory: &Path) -> Arc<Mutex<Self>> {
        let mut random = StdRng::seed_from_u64(seed);
        let pages = [random.random_range(1..200), random.random_range(1..70)];
        let mut below = vec![0; random.random_range(1..400_000)];
        for unit in below.chunks_mut(UNIT).step_by(2) {
            random.fill_bytes(unit);
        }
        let disks = vec![
            TrackedDisk::open("vda", &directory.join("a"), random.random_range(1..600_000))
                .unwrap(),
            TrackedDisk::above("vdb", &directory.join("b"), Arc::new(Below(below))).unwrap(),
        ];
        let mut machine = Machine {
            ram: pages.iter().map(|pages| vec![0; pages * UNIT]).collect(),
            dirty: pages
                .iter()
                .map(|pages| Bitmap::none(*pages as u64))
                .collect(),
            disks,
            runs: true,
            ended: false,
            fails: 0,
            stuck: 0,
            throttle: 0,
            saved: Vec::new(),
            random,
        };
        for _ in 0..100 {
            machine.run();
        }
        Arc::new(Mutex::new(machine))
    }

    /// The guest does something, if it runs.
    pub(super) fn run(&mut self) {
        if !self.runs {
            return;
        }
        let block = self
            .random
            .random_range(0..self.ram.len() + self.disks.len());
        let zeros = self.random.random_bool(0.2);
        let mut content = vec![0; self.random.random_range(1..12_000)];
        if !zeros {
            // Few values, so that pages become again what they were.
            content.fill(self.random.random_range(0..4));
            if self.random.random_bool(0.5) {
                self.random.fill_bytes(&mut content);
            }
        }
        let size = |bytes: usize, content: &mut Vec<u8>, at: usize| {
            let at = at % bytes;
            content.truncate(bytes - at);
            at
        };
        let at = self.random.random_range(0..1 << 30);
        if let Some(ram) = self.ram.get_mut(block) {
            let mut at = size(ram.len(), &mut content, at);
            if self.random.random_bool(0.5) {
                at = at / UNIT * UNIT;
            }
            ram[at..at + content.len()].copy_from_slice(&content);
            let (first, end) = (at / UNIT, (at + content.len()).div_ceil(UNIT));
            self.dirty[block].set_run(first as u64, (end - first) as u64);
        } else {
            let disk = &self.disks[block - self.ram.len()];
            let at = size(disk.bytes() as usize, &mut content, at);
            disk.write(at as u64, &content).unwrap();
        }
    }

    pub(super) fn runs_a_while(&mut self) {
        for _ in 0..self.random.random_range(0..3) {
            self.run();
        }
    }

    fn failure(&mut self, what: &str) -> Result<(), VmmError> {
        if self.fails > 0 && self.random.random_range(0..self.fails) == 0 {
            return Err(VmmError::State(format!("{what} fails")));
        }
        Ok(())
    }

    /// Every volume, padded to whole units.
    pub(super) fn everything(&self) -> Vec<Vec<u8>> {
        let disk = |disk: &Arc<TrackedDisk>| {
            let mut bytes = vec![0; disk.bytes() as usize];
            disk.read(0, &mut bytes).unwrap();
            bytes.resize(bytes.len().next_multiple_of(UNIT), 0);
            bytes
        };
        self.ram
            .iter()
            .cloned()
            .chain(self.disks.iter().map(disk))
            .collect()
    }
}

pub(super) struct Below(Vec<u8>);

impl BlockSource for Below {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn extents(&self, _: u64, length: u64) -> Vec<(u64, bool)> {
        vec![(length, false)]
    }
}

pub(super) struct Monitor {
    pub(super) blocks: Vec<RamBlock>,
    pub(super) disks: Vec<Arc<TrackedDisk>>,
    pub(super) machine: Arc<Mutex<Machine>>,
}

impl Monitor {
    pub(super) fn of(machine: &Arc<Mutex<Machine>>) -> SharedVmm {
        let held = machine.lock().unwrap();
        let block = |(index, ram): (usize, &Vec<u8>)| RamBlock {
            name: format!("ram{index}"),
            bytes: ram.len() as u64,
        };
        Arc::new(Mutex::new(Monitor {
            blocks: held.ram.iter().enumerate().map(block).collect(),
            disks: held.disks.clone(),
            machine: machine.clone(),
        }))
    }
}

impl Vmm for Monitor {
    fn ram(&self) -> &[RamBlock] {
        &self.blocks
    }
    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.disks
    }
    fn pause(&mut self) -> Result<(), VmmError> {
        let mut machine = self.machine.lock().unwrap();
        if machine.ended {
            return Err(VmmError::Ended("triple fault".to_owned()));
        }
        machine.runs_a_while();
        machine.failure("pause")?;
        machine.runs = false;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), VmmError> {
        let mut machine = self.machine.lock().unwrap();
        if machine.stuck > 0 {
            machine.stuck -= 1;
            return Err(VmmError::State("resume fails".to_owned()));
        }
        machine.runs = true;
        machine.runs_a_while();
        Ok(())
    }
    fn running(&self) -> Option<bool> {
        let machine = self.machine.lock().unwrap();
        (!machine.ended).then_some(machine.runs)
    }
    fn ended_because(&self) -> String {
        "triple fault".to_owned()
    }
    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError> {
        let mut machine = self.machine.lock().unwrap();
        machine.runs_a_while();
        let dirty = machine.dirty[block].take();
        // A log that fails is lost.
        machine.failure("dirty")?;
        machine.runs_a_while();
        Ok(dirty)
    }
    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        let mut machine = self.machine.lock().unwrap();
        machine.runs_a_while();
        machine.failure("read")?;
        let (first, rest) = into.split_at_mut(into.len() / 2);
        let offset = offset as usize;
        first.copy_from_slice(&machine.ram[block][offset..offset + first.len()]);
        machine.runs_a_while();
        rest.copy_from_slice(&machine.ram[block][offset + first.len()..][..rest.len()]);
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let mut machine = self.machine.lock().unwrap();
        assert!(!machine.runs, "saved while it runs");
        machine.failure("save")?;
        machine.saved = machine.everything();
        Ok(vec![7; 100])
    }
    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.machine.lock().unwrap().throttle = percent;
        Ok(())
    }
    fn end(&mut self) {
        let mut machine = self.machine.lock().unwrap();
        (machine.runs, machine.ended) = (false, true);
    }
}

pub(super) enum Change {
    Unit(VolumeIndex, u64, Vec<u8>),
    Zeros(VolumeIndex, u64, u64),
    /// Everything up to here is of this point.
    Point(u64),
}

/// Takes changes while the guest writes on, until it refuses.
pub(super) struct Taker {
    pub(super) key: DigestKey,
    pub(super) machine: Arc<Mutex<Machine>>,
    pub(super) calls: u32,
    pub(super) taken: Vec<Change>,
}

impl Taker {
    fn call(&mut self) -> Result<(), SinkError> {
        self.machine.lock().unwrap().runs_a_while();
        self.calls = self.calls.checked_sub(1).ok_or(SinkError::Stalled)?;
        Ok(())
    }
}

impl Sink for Taker {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        self.call()?;
        assert_eq!(bytes.len(), digests.len() * UNIT);
        for ((unit, bytes), digest) in (unit..).zip(bytes.chunks(UNIT)).zip(digests) {
            assert_eq!(self.key.of(bytes), *digest);
            self.taken.push(Change::Unit(volume, unit, bytes.to_vec()));
        }
        Ok(())
    }
    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        self.call()?;
        self.taken.push(Change::Zeros(volume, unit, count));
        Ok(())
    }
}

/// What the peer holds: its newest sealed point, and what came since.
pub(super) struct Peer {
    pub(super) sealed: Vec<Vec<u8>>,
    pub(super) newest: u64,
    pub(super) pending: Vec<Change>,
    pub(super) truth: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Peer {
    pub(super) fn seal(&mut self, point: u64) {
        let end = self
            .pending
            .iter()
            .position(|change| matches!(change, Change::Point(p) if *p == point))
            .unwrap();
        for change in self.pending.drain(..=end) {
            match change {
                Change::Unit(volume, unit, bytes) => {
                    self.sealed[usize::from(volume)][unit as usize * UNIT..][..UNIT]
                        .copy_from_slice(&bytes);
                }
                Change::Zeros(volume, unit, count) => {
                    self.sealed[usize::from(volume)][unit as usize * UNIT..]
                        [..count as usize * UNIT]
                        .fill(0);
                }
                Change::Point(_) => {}
            }
        }
        self.newest = point;
        let truth = self.truth.remove(&point).unwrap();
        for (volume, (held, was)) in self.sealed.iter().zip(&truth).enumerate() {
            let differs = held.iter().zip(was).position(|(a, b)| a != b);
            assert_eq!(
                (differs.map(|at| at / UNIT), held.len()),
                (None, was.len()),
                "volume {volume} of point {point}: first unit that differs"
            );
        }
    }
}
