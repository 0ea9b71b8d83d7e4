//! The engine against a model of the peer, over random interleavings of guest
//! writes, rounds, cuts, failures of every kind, seals and give-backs.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::guest::SinkError;
use crate::guest::embedded::disk::TrackedDisk;
use model::{Change, Machine, Monitor, Peer, Taker};

mod model;

struct Story {
    random: StdRng,
    machine: Arc<Mutex<Machine>>,
    guest: Option<EmbeddedGuest>,
    key: DigestKey,
    peer: Peer,
    next: u64,
    sealed: u64,
    failed_cuts: u64,
    waited: u64,
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
            waited: 0,
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
        let guest = self.guest.as_mut().unwrap();
        if guest.round(&mut taker).is_ok() {
            self.waited += guest.waiting();
        }
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
const SEEDS: u64 = 250;

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
    let (mut sealed, mut failed, mut waited) = (0, 0, 0);
    for seed in 0..SEEDS {
        let directory = scratch();
        let mut story = Story::new(seed, directory.path());
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..40 {
                story.go();
            }
            (story.sealed, story.failed_cuts, story.waited)
        }));
        let Ok(told) = told else {
            panic!("seed {seed} fails");
        };
        sealed += told.0;
        failed += told.1;
        waited += told.2;
    }
    assert!(
        sealed > 2 * SEEDS && failed > SEEDS && waited > SEEDS,
        "{sealed} points, {failed} failed cuts, {waited} units waited"
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
/// `cargo test --profile ci --lib engine -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
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
    }
}

/// A fence of a guest that has ended has nothing to stop.
#[test]
fn a_guest_that_has_ended_is_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::new(5, directory.path());
    let key = DigestKey::new([1; 32]);
    let mut guest = EmbeddedGuest::attach(Monitor::of(&machine), key, 1 << 20).unwrap();
    machine.lock().unwrap().ended = true;
    guest.stop().unwrap();
}
