//! The engine against a model of the peer, over random interleavings of guest
//! writes, rounds, cuts, failures of every kind, seals and give-backs.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::*;
use crate::activate::nbd::BlockSource;
use crate::guest::SinkError;
use crate::guest::embedded::RamBlock;
use crate::guest::embedded::disk::TrackedDisk;

/// A guest without vCPUs: whoever holds it writes as if it ran.
struct Machine {
    random: StdRng,
    ram: Vec<Vec<u8>>,
    dirty: Vec<Bitmap>,
    disks: Vec<Arc<TrackedDisk>>,
    runs: bool,
    ended: bool,
    /// One call in so many fails; 0: none.
    fails: u32,
    /// `resume` fails so often.
    stuck: u32,
    throttle: u8,
    /// What everything was when the state was last saved.
    saved: Vec<Vec<u8>>,
}

use std::sync::Arc;

impl Machine {
    fn new(seed: u64, directory: &Path) -> Arc<Mutex<Self>> {
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
    fn run(&mut self) {
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

    fn runs_a_while(&mut self) {
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
    fn everything(&self) -> Vec<Vec<u8>> {
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

struct Below(Vec<u8>);

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

struct Monitor {
    blocks: Vec<RamBlock>,
    disks: Vec<Arc<TrackedDisk>>,
    machine: Arc<Mutex<Machine>>,
}

impl Monitor {
    fn of(machine: &Arc<Mutex<Machine>>) -> SharedVmm {
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

enum Change {
    Unit(VolumeIndex, u64, Vec<u8>),
    Zeros(VolumeIndex, u64, u64),
    /// Everything up to here is of this point.
    Point(u64),
}

/// Takes changes while the guest writes on, until it refuses.
struct Taker {
    key: DigestKey,
    machine: Arc<Mutex<Machine>>,
    calls: u32,
    taken: Vec<Change>,
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
struct Peer {
    sealed: Vec<Vec<u8>>,
    newest: u64,
    pending: Vec<Change>,
    truth: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl Peer {
    fn seal(&mut self, point: u64) {
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

struct Story {
    random: StdRng,
    machine: Arc<Mutex<Machine>>,
    guest: Option<EmbeddedGuest>,
    key: DigestKey,
    peer: Peer,
    next: u64,
    sealed: u64,
    failed_cuts: u64,
}

impl Story {
    fn new(seed: u64, directory: &Path) -> Self {
        let machine = Machine::new(seed, directory);
        let sealed = machine.lock().unwrap().everything();
        let sealed = sealed.iter().map(|volume| vec![0; volume.len()]).collect();
        let mut story = Story {
            random: StdRng::seed_from_u64(seed ^ 0xfade),
            machine,
            guest: None,
            key: DigestKey::new([seed as u8; 32]),
            peer: Peer {
                sealed,
                newest: 0,
                pending: Vec::new(),
                truth: BTreeMap::new(),
            },
            next: 1,
            sealed: 0,
            failed_cuts: 0,
        };
        story.attach();
        story
    }

    /// A session begins; what was pending in the one before is gone.
    fn attach(&mut self) {
        self.guest = None;
        assert_eq!(self.machine.lock().unwrap().throttle, 0);
        self.peer.pending.clear();
        let buffer = [60 * UNIT, 2000 * UNIT][self.random.random_range(0..2)];
        let vmm = Monitor::of(&self.machine);
        let mut guest = EmbeddedGuest::attach(vmm, self.key.clone(), buffer).unwrap();
        if self.peer.newest > 0 {
            for (index, held) in self.peer.sealed.iter().enumerate() {
                let unsure = self.random.random_bool(0.3);
                let mut digest = |unit: &[u8]| match unsure && self.random.random_bool(0.2) {
                    true => Digest::UNKNOWN,
                    false => self.key.of(unit),
                };
                let digests = held.chunks(UNIT).map(&mut digest).collect();
                guest
                    .baseline(self.peer.newest, index as VolumeIndex, digests)
                    .unwrap();
            }
        }
        if self.random.random_bool(0.3) {
            guest.throttle(40).unwrap();
        }
        self.guest = Some(guest);
    }

    fn taker(&mut self, failing: f64) -> Taker {
        let calls = match self.random.random_bool(failing) {
            true => self.random.random_range(0..30),
            false => u32::MAX,
        };
        Taker {
            key: self.key.clone(),
            machine: self.machine.clone(),
            calls,
            taken: Vec::new(),
        }
    }

    fn go(&mut self) {
        self.machine.lock().unwrap().runs_a_while();
        self.machine.lock().unwrap().fails = match self.random.random_bool(0.2) {
            true => 6,
            false => 0,
        };
        match self.random.random_range(0..20) {
            0..5 => self.round(),
            5..13 => self.cut(),
            13..17 => self.seal(),
            17..19 => {
                self.peer.pending.clear();
                self.guest.as_mut().unwrap().give_back();
            }
            _ => self.attach(),
        }
    }

    fn round(&mut self) {
        let mut taker = self.taker(0.3);
        // Whatever was handed over stays so, also when the round fails.
        let _ = self.guest.as_mut().unwrap().round(&mut taker);
        self.peer.pending.append(&mut taker.taken);
    }

    fn cut(&mut self) {
        let point = self.next;
        self.next += self.random.random_range(1..3);
        let after = match self.random.random_bool(0.2) {
            true => After::Hold,
            false => After::Continue,
        };
        let stuck = match self.random.random_range(0..30) {
            0 => u32::MAX,
            1..4 => 3,
            _ => 0,
        };
        self.machine.lock().unwrap().stuck = stuck;
        let mut taker = self.taker(0.2);
        let made = self.guest.as_mut().unwrap().cut(point, after, &mut taker);
        let stopped = !self.machine.lock().unwrap().runs;
        self.machine.lock().unwrap().stuck = 0;
        let mut cut = match made {
            Ok(cut) => cut,
            Err(error) => {
                let told = matches!(error, GuestError::LeftStopped { .. });
                assert_eq!(stopped, told, "{error}");
                self.guest.as_mut().unwrap().resume().unwrap();
                // The sink's content may be dropped, and may be sent.
                if self.random.random_bool(0.3) {
                    self.peer.pending.append(&mut taker.taken);
                }
                self.failed_cuts += 1;
                return;
            }
        };
        assert_eq!(stopped, after == After::Hold);
        assert_eq!(cut.device_state, [7; 100]);
        let truth = self.machine.lock().unwrap().saved.clone();
        if self.random.random_bool(0.5) {
            self.guest.as_mut().unwrap().resume().unwrap();
        }
        self.peer.pending.append(&mut taker.taken);
        let mut shipped = true;
        for disk in &mut cut.disks {
            let mut taker = self.taker(0.1);
            shipped = shipped && disk.changed(&mut taker).is_ok();
            self.peer.pending.append(&mut taker.taken);
        }
        let guest = self.guest.as_mut().unwrap();
        match shipped {
            true => {
                guest.finish_cut(cut, true).unwrap();
                self.peer.pending.push(Change::Point(point));
                self.peer.truth.insert(point, truth);
            }
            // A driver that dies on the way leaves it unfinished.
            false if self.random.random_bool(0.5) => drop(cut),
            false => guest.finish_cut(cut, false).unwrap(),
        }
        guest.resume().unwrap();
    }

    fn seal(&mut self) {
        let point = self.peer.pending.iter().find_map(|change| match change {
            Change::Point(point) => Some(*point),
            _ => None,
        });
        if let Some(point) = point {
            self.peer.seal(point);
            self.guest.as_mut().unwrap().sealed(point);
            self.sealed += 1;
        }
    }
}

/// Stories of 40 chapters.
const SEEDS: u64 = 500;

/// Images that are never synced need no disk.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

#[test]
fn every_sealed_point_is_what_the_guest_was() {
    let (mut sealed, mut failed) = (0, 0);
    for seed in 0..SEEDS {
        let directory = scratch();
        let mut story = Story::new(seed, directory.path());
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..40 {
                story.go();
            }
            (story.sealed, story.failed_cuts)
        }));
        let Ok(told) = told else {
            panic!("seed {seed} fails");
        };
        sealed += told.0;
        failed += told.1;
    }
    assert!(
        sealed > 2 * SEEDS && failed > SEEDS,
        "{sealed} points, {failed} failed cuts"
    );
}

/// Counts what it takes.
#[derive(Default)]
struct Counter {
    units: BTreeMap<VolumeIndex, u64>,
    zeros: BTreeMap<VolumeIndex, u64>,
    progress: Option<(u64, u64)>,
}

impl Sink for Counter {
    fn units(
        &mut self,
        volume: VolumeIndex,
        _: u64,
        _: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        *self.units.entry(volume).or_default() += digests.len() as u64;
        Ok(())
    }
    fn zeros(&mut self, volume: VolumeIndex, _: u64, count: u64) -> Result<(), SinkError> {
        *self.zeros.entry(volume).or_default() += count;
        Ok(())
    }
    fn progress(&mut self, done: u64, total: u64) {
        self.progress = Some((done, total));
    }
}

fn still_machine(directory: &Path, pages: usize) -> Arc<Mutex<Machine>> {
    let machine = Machine::new(1, directory);
    {
        let mut held = machine.lock().unwrap();
        held.ram = vec![vec![0; pages * UNIT]];
        held.dirty = vec![Bitmap::none(pages as u64)];
        held.runs = false;
        held.disks = vec![TrackedDisk::open("d", &directory.join("d"), 1 << 20).unwrap()];
    }
    machine
}

#[test]
fn only_what_differs_and_what_changed_is_handed_over() {
    let directory = tempfile::tempdir().unwrap();
    let machine = still_machine(directory.path(), 100);
    machine.lock().unwrap().ram[0][..10 * UNIT].fill(1);
    machine.lock().unwrap().disks[0]
        .write(5 * 4096, &[2; 100])
        .unwrap();
    let key = DigestKey::new([1; 32]);
    let attach = || EmbeddedGuest::attach(Monitor::of(&machine), key.clone(), 1 << 20).unwrap();
    let mut guest = attach();
    let names: Vec<_> = guest.volumes().iter().map(|v| v.name.clone()).collect();
    assert_eq!(names, ["ram0", "d", "device-state"]);
    // A new replica reads as zeros.
    let mut first = Counter::default();
    guest.round(&mut first).unwrap();
    assert_eq!(first.units, BTreeMap::from([(0, 10), (1, 1)]));
    assert_eq!(
        (first.zeros.len(), first.progress.unwrap().0),
        (0, 356 * 4096)
    );
    let mut again = Counter::default();
    guest.round(&mut again).unwrap();
    assert!(again.units.is_empty() && again.zeros.is_empty());
    // What became zeros is told as zeros.
    machine.lock().unwrap().ram[0][..2 * UNIT].fill(0);
    machine.lock().unwrap().dirty[0].set_run(0, 2);
    let mut cut_sink = Counter::default();
    let cut = guest.cut(1, After::Hold, &mut cut_sink).unwrap();
    assert_eq!(
        (cut_sink.units.len(), cut_sink.zeros),
        (0, BTreeMap::from([(0, 2)]))
    );
    assert_eq!(cut.times.ram_scanned_bytes, 2 * 4096);
    assert_eq!(guest.volumes()[2].bytes, 100);
    guest.finish_cut(cut, true).unwrap();
    guest.give_back();
    let mut back = Counter::default();
    guest.round(&mut back).unwrap();
    assert_eq!(back.units, BTreeMap::from([(0, 8), (1, 1)]));
    assert_eq!(back.zeros, BTreeMap::from([(0, 2)]));
    // A peer that holds most of it gets the rest.
    drop(guest);
    let mut guest = attach();
    let ones = key.of(&[1; UNIT]);
    let mut held = vec![Digest::ZERO_UNIT; 100];
    held[2..9].fill(ones);
    held[50] = ones;
    guest.baseline(3, 0, held).unwrap();
    assert!(guest.baseline(3, 1, vec![Digest::UNKNOWN; 2]).is_err());
    guest.baseline(3, 1, vec![Digest::ZERO_UNIT; 256]).unwrap();
    let mut rest = Counter::default();
    guest.round(&mut rest).unwrap();
    assert_eq!(rest.units, BTreeMap::from([(0, 1), (1, 1)]));
    assert_eq!(rest.zeros, BTreeMap::from([(0, 1)]));
}

#[test]
fn a_guest_that_ended_is_told_as_gone_and_one_too_busy_is_not_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let machine = still_machine(directory.path(), 100);
    let key = DigestKey::new([1; 32]);
    let vmm = Monitor::of(&machine);
    let mut guest = EmbeddedGuest::attach(vmm.clone(), key.clone(), 50 * UNIT).unwrap();
    machine.lock().unwrap().fails = 1;
    let full = guest
        .cut(1, After::Hold, &mut Counter::default())
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(full, GuestError::Sink(SinkError::Full)), "{full}");
    machine.lock().unwrap().fails = 0;
    guest.round(&mut Counter::default()).unwrap();
    let cut = guest.cut(2, After::Hold, &mut Counter::default()).unwrap();
    guest.finish_cut(cut, true).unwrap();
    guest.throttle(120).unwrap();
    assert_eq!(machine.lock().unwrap().throttle, 99);
    guest.detach();
    assert_eq!(machine.lock().unwrap().throttle, 0);
    guest.let_go().unwrap();
    assert_eq!(guest.running(), None);
    let gone = guest
        .cut(3, After::Continue, &mut Counter::default())
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&gone, GuestError::Gone(why) if why.contains("triple fault")),
        "{gone}"
    );
    assert!(EmbeddedGuest::attach(vmm, key, 1).is_err());
}

/// What this thread used of a core: others may be busy too.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Measured: the pause with 1,000 dirty pages, and a first round's speed.
#[test]
fn the_pause_grows_with_what_changed_and_not_with_memory() {
    let key = DigestKey::new([1; 32]);
    for megabytes in [64, 512] {
        let directory = tempfile::tempdir().unwrap();
        let pages = megabytes << 8;
        let machine = still_machine(directory.path(), pages);
        {
            let mut held = machine.lock().unwrap();
            for (page, number) in held.ram[0].chunks_mut(UNIT).zip(0u64..) {
                if number % 3 > 0 {
                    page[..8].copy_from_slice(&number.to_le_bytes());
                }
            }
        }
        let mut guest =
            EmbeddedGuest::attach(Monitor::of(&machine), key.clone(), 64 << 20).unwrap();
        let begun = cpu_time();
        guest.round(&mut Counter::default()).unwrap();
        let rate = (megabytes << 20) as f64 / (cpu_time() - begun).as_secs_f64() / 1e9;
        let mut pauses = Vec::new();
        for point in 1..20 {
            for dirty in 0..1000 {
                let page = (dirty * 7919 + point * 13) % pages as u64;
                machine.lock().unwrap().dirty[0].set(page);
            }
            let cut = guest
                .cut(point, After::Hold, &mut Counter::default())
                .unwrap();
            // The model copies everything for its own purposes when it saves.
            pauses.push(cut.times.ram_scan + cut.times.disks);
            guest.finish_cut(cut, true).unwrap();
            guest.sealed(point);
        }
        pauses.sort();
        println!(
            "{megabytes} MiB: {rate:.2} GB/s of a core, pause without state {:?}",
            pauses[9]
        );
        assert!(pauses[0] < Duration::from_millis(5), "{pauses:?}");
        assert!(rate > 1.0, "{rate} GB/s of a core");
    }
}
