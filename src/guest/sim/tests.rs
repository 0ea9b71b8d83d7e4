#![allow(clippy::unwrap_used)]

use std::io;
use std::time::{Duration, Instant};

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, VolumeIndex};
use proptest::prelude::*;

use super::mutator::{Registers, World};
use super::*;
use crate::activate::hydrate::HydrationState;
use crate::activate::machine::{BuildPlan, Builder, Machine};
use crate::activate::nbd::BlockSource;
use crate::guest::embedded::EmbeddedGuest;
use crate::guest::{After, Guest, Sink, SinkError};

/// Memory and disks of a guest without threads.
#[derive(Clone)]
struct Bytes {
    ram: Vec<Content>,
    disks: Vec<Vec<Content>>,
}

impl World for Bytes {
    fn read_page(&mut self, page: u64, into: &mut Content) -> io::Result<()> {
        *into = self.ram[page as usize];
        Ok(())
    }
    fn write_page(&mut self, page: u64, content: &Content) -> io::Result<()> {
        self.ram[page as usize] = *content;
        Ok(())
    }
    fn read_block(&mut self, disk: usize, block: u64, into: &mut Content) -> io::Result<()> {
        *into = self.disks[disk][block as usize];
        Ok(())
    }
    fn write_blocks(&mut self, disk: usize, block: u64, content: &[u8]) -> io::Result<()> {
        for (at, content) in (block as usize..).zip(content.as_chunks::<UNIT>().0) {
            self.disks[disk][at] = *content;
        }
        Ok(())
    }
}

const RAM: u64 = 3 << 20;
const DISKS: [u64; 2] = [2 << 20, (1 << 20) + 100];

fn new(seed: u64, workload: Workload) -> (Mutator, Bytes) {
    let mutator = Mutator::new(seed, workload, Layout::new(RAM, &DISKS, workload));
    let all = |count: u64, compose: &dyn Fn(u64, &mut Content)| {
        let content = |at| {
            let mut content = [0; UNIT];
            compose(at, &mut content);
            content
        };
        (0..count).map(content).collect()
    };
    let disk = |index: usize| {
        all(mutator.layout.disks[index].blocks, &|at, out| {
            mutator.block(index, at, out)
        })
    };
    let bytes = Bytes {
        ram: all(mutator.layout.pages, &|at, out| mutator.page(at, out)),
        disks: (0..DISKS.len()).map(disk).collect(),
    };
    (mutator, bytes)
}

/// A guest with these parts looks at everything it has.
fn verdict(mutator: &mut Mutator, bytes: &mut Bytes) -> String {
    mutator.registers.checking = Some(0);
    loop {
        if let Some(line) = mutator.check_all(64, bytes) {
            return line;
        }
    }
}

fn workloads() -> impl Strategy<Value = Workload> {
    prop_oneof![
        Just(Workload::Idle),
        Just(Workload::Database(500)),
        Just(Workload::Files(8)),
        Just(Workload::Noise(8)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn goes_on_exactly_from_any_step(
        seed: u64,
        workload in workloads(),
        before in 0usize..1500,
        after in 0usize..1500,
    ) {
        let (mut mutator, mut bytes) = new(seed, workload);
        for _ in 0..before {
            mutator.step(&mut bytes);
        }
        let (mut other, _) = new(seed, workload);
        other.registers = mutator.registers.clone();
        let mut copy = bytes.clone();
        for _ in 0..after {
            mutator.step(&mut bytes);
            other.step(&mut copy);
        }
        prop_assert_eq!(&mutator.registers, &other.registers);
        prop_assert!(bytes.ram == copy.ram && bytes.disks == copy.disks);
        let line = verdict(&mut other, &mut copy);
        prop_assert_eq!(line, "CHECK 0 mem=ok disk=ok pages=768 blocks=768\n");
        prop_assert!(other.registers.plausible());
    }

    #[test]
    fn every_planted_fault_is_found(
        seed: u64,
        workload in workloads(),
        before in 1usize..2000,
        steps in 1usize..2000,
        which: prop::sample::Index,
        torn in 0usize..UNIT,
    ) {
        let (mut mutator, mut bytes) = new(seed, workload);
        for _ in 0..before {
            mutator.step(&mut bytes);
        }
        let (old, old_registers) = (bytes.clone(), mutator.registers.clone());
        for _ in 0..steps {
            mutator.step(&mut bytes);
        }
        let now = mutator.registers.clone();
        let mut bad = |registers: &Registers, bytes: &Bytes| {
            mutator.registers = registers.clone();
            verdict(&mut mutator, &mut bytes.clone()).contains("BAD")
        };
        // A page or block that was lost, is of another instant, or is torn.
        let pages: Vec<_> = (0..old.ram.len()).filter(|at| old.ram[*at] != bytes.ram[*at]).collect();
        if !pages.is_empty() {
            let page = *which.get(&pages);
            let mut planted = bytes.clone();
            planted.ram[page] = old.ram[page];
            prop_assert!(bad(&now, &planted), "page {} of before", page);
            planted.ram[page] = bytes.ram[page];
            planted.ram[page][torn..].copy_from_slice(&old.ram[page][torn..]);
            if planted.ram[page] != bytes.ram[page] {
                prop_assert!(bad(&now, &planted), "page {} torn at {}", page, torn);
            }
        }
        for disk in 0..DISKS.len() {
            let differ = |at: &usize| old.disks[disk][*at] != bytes.disks[disk][*at];
            let blocks: Vec<_> = (0..old.disks[disk].len()).filter(differ).collect();
            if !blocks.is_empty() {
                let block = *which.get(&blocks);
                let mut planted = bytes.clone();
                planted.disks[disk][block] = old.disks[disk][block];
                prop_assert!(bad(&now, &planted), "block {} of before", block);
            }
        }
        // Parts of two points.
        let of = |ram: &Bytes, disks: &Bytes| Bytes {
            ram: ram.ram.clone(),
            disks: disks.disks.clone(),
        };
        if old.ram != bytes.ram {
            prop_assert!(bad(&now, &of(&old, &bytes)), "memory of before");
            prop_assert!(bad(&old_registers, &of(&bytes, &old)), "memory of after");
        }
        if old.disks != bytes.disks {
            prop_assert!(bad(&now, &of(&bytes, &old)), "disks of before");
            prop_assert!(bad(&old_registers, &of(&old, &bytes)), "disks of after");
        }
        prop_assert!(!bad(&now, &bytes) && !bad(&old_registers, &old), "no fault");
    }
}

/// The peer: what every volume holds.
struct Held(Vec<Vec<u8>>);

impl Sink for Held {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        _: &[Digest],
    ) -> Result<(), SinkError> {
        self.0[usize::from(volume)][unit as usize * UNIT..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        self.0[usize::from(volume)][unit as usize * UNIT..][..count as usize * UNIT].fill(0);
        Ok(())
    }
}

struct Point(Vec<u8>);

impl BlockSource for Point {
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

fn options(directory: &Path, workload: &str) -> SimOptions {
    SimOptions {
        seed: 42,
        ram_bytes: 8 << 20,
        disks: vec![
            ("vda".to_owned(), 6 << 20),
            ("vdb".to_owned(), (1 << 20) + 100),
        ],
        workload: workload.parse().unwrap(),
        run: directory.join("run"),
        ram: directory.join("ram"),
    }
}

fn said(run: &Path, word: &str) -> String {
    let begun = Instant::now();
    loop {
        let log = std::fs::read_to_string(run.join("console.log")).unwrap();
        if let Some(line) = log.lines().find(|line| line.starts_with(word)) {
            return line.to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{log}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ask_for_check(run: &Path) -> String {
    let mut console = std::os::unix::net::UnixStream::connect(run.join("console.sock")).unwrap();
    io::Write::write_all(&mut console, b"c").unwrap();
    said(run, "CHECK")
}

fn build(definition: &Definition, directory: &Path, held: &Held) -> Box<dyn Machine> {
    let run = directory.join("peer");
    std::fs::create_dir(&run).unwrap();
    let ram = directory.join("peer-ram");
    std::fs::write(&ram, vec![0; held.0[0].len()]).unwrap();
    let disks = definition.disks.iter().zip(&held.0[1..]);
    let disks = disks
        .map(|((_, bytes), held)| -> Arc<dyn BlockSource> {
            Arc::new(Point(held[..*bytes as usize].to_vec()))
        })
        .collect();
    let plan = BuildPlan {
        definition,
        run,
        ram: vec![ram.clone()],
        disks,
        isolated: false,
    };
    let machine = SimBuilder.build(plan).unwrap();
    std::fs::write(ram, &held.0[0]).unwrap();
    machine
}

#[test]
fn a_guest_goes_on_at_the_peer_from_any_cut() {
    for workload in ["idle", "database:3000", "files:20", "noise:20"] {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), workload);
        let (source_run, ram_bytes) = (options.run.clone(), options.ram_bytes as usize);
        let (vmm, definition) = SimGuest::start(options).unwrap();
        assert!(SimBuilder.check(&definition).is_empty());
        let key = DigestKey::new([7; 32]);
        let mut guest = EmbeddedGuest::attach(vmm.clone(), key, 64 << 20).unwrap();
        let volume = |volume: &farhaven_storage_sync::unit::Volume| {
            vec![0; (volume.units() * UNIT as u64) as usize]
        };
        let mut held = Held(guest.volumes().iter().map(volume).collect());
        assert_eq!(held.0[0].len(), ram_bytes);
        guest.round(&mut held).unwrap();
        let mut state = Vec::new();
        for point in 1..=20 {
            std::thread::sleep(Duration::from_millis(15));
            let after = if point == 20 {
                After::Hold
            } else {
                After::Continue
            };
            let mut cut = guest.cut(point, after, &mut held).unwrap();
            for disk in &mut cut.disks {
                disk.changed(&mut held).unwrap();
            }
            state = cut.device_state.clone();
            assert!(cut.times.ram_scanned_bytes < 8 << 20);
            guest.finish_cut(cut, true).unwrap();
            guest.sealed(point);
        }
        assert_eq!(guest.running(), Some(false));
        let mut machine = build(&definition, directory.path(), &held);
        machine.restore(&state).unwrap();
        let peer = machine.vmm().unwrap();
        assert_eq!(peer.lock().unwrap().save().unwrap(), state, "{workload}");
        assert!(!machine.is_running().unwrap());
        machine.run().unwrap();
        machine.announce().unwrap();
        machine.hydrate(0).unwrap();
        assert!(machine.serve(Vec::new()).is_err());
        let run = directory.path().join("peer");
        let line = ask_for_check(&run);
        assert!(
            line.ends_with("mem=ok disk=ok pages=2048 blocks=1792"),
            "{workload}: {line}"
        );
        assert!(said(&run, "HB").ends_with("mem=ok disk=ok"));
        let begun = Instant::now();
        let done = |machine: &mut Box<dyn Machine>| {
            let all = machine.hydration().unwrap();
            all.iter().all(|disk| disk.state == HydrationState::Done)
        };
        while !done(&mut machine) {
            assert!(begun.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(5));
        }
        machine.stop().unwrap();
        assert!(!machine.is_running().unwrap());
        machine.kill();
        assert_eq!(peer.lock().unwrap().running(), None);
        // Taken back, the source goes on too.
        guest.resume().unwrap();
        assert!(ask_for_check(&source_run).contains("mem=ok disk=ok"));
        guest.let_go().unwrap();
        assert!(vmm.lock().unwrap().running().is_none());
    }
}

#[test]
fn memory_of_one_point_and_a_disk_of_another_are_told_on_the_console() {
    let directory = tempfile::tempdir().unwrap();
    let (vmm, definition) = SimGuest::start(options(directory.path(), "database:3000")).unwrap();
    let key = DigestKey::new([7; 32]);
    let mut guest = EmbeddedGuest::attach(vmm, key, 64 << 20).unwrap();
    let mut held = Held(vec![
        vec![0; 8 << 20],
        vec![0; 6 << 20],
        vec![0; (1 << 20) + UNIT],
    ]);
    let mut old = Vec::new();
    let mut state = Vec::new();
    guest.round(&mut held).unwrap();
    for point in 1..3 {
        old = held.0[1].clone();
        std::thread::sleep(Duration::from_millis(200));
        let mut cut = guest.cut(point, After::Continue, &mut held).unwrap();
        for disk in &mut cut.disks {
            disk.changed(&mut held).unwrap();
        }
        state = cut.device_state.clone();
        guest.finish_cut(cut, true).unwrap();
    }
    held.0[1] = old;
    let mut machine = build(&definition, directory.path(), &held);
    machine.restore(&state).unwrap();
    machine.run().unwrap();
    let line = ask_for_check(&directory.path().join("peer"));
    assert!(line.contains("disk=BAD:disk-0-block-"), "{line}");
    machine.kill();
}

#[test]
fn a_throttled_guest_does_less() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), "database:2000");
    let definition = options.definition();
    let (mutator, bytes) = program(&definition).unwrap();
    std::fs::create_dir(&options.run).unwrap();
    let ram = fill_ram(&options.ram, bytes, &mutator).unwrap();
    let disks = (0..2)
        .map(|index| {
            let (name, bytes) = &definition.disks[index];
            fill_disk(name, &image(&options.run, index), *bytes, index, &mutator).unwrap()
        })
        .collect();
    let console = Console::open(&options.run).unwrap();
    let mut vmm = SimVmm::new(mutator, ram, bytes, disks, console).unwrap();
    let mut steps = |percent: u8| {
        use crate::guest::embedded::Vmm;
        vmm.throttle(percent).unwrap();
        let before = vmm.registers();
        vmm.resume().unwrap();
        std::thread::sleep(Duration::from_millis(800));
        vmm.pause().unwrap();
        let after = vmm.registers();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(vmm.registers(), after, "a stopped guest does nothing");
        after.steps - before.steps
    };
    let (freely, held_back) = (steps(0), steps(95));
    assert!(freely > 3 * held_back, "{freely} steps, {held_back} at 5 %");
}

#[test]
fn definitions_and_states_of_no_sim_guest_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let good = options(directory.path(), "idle").definition();
    let refused = |change: &dyn Fn(&mut Definition)| {
        let mut bad = good.clone();
        change(&mut bad);
        let findings = SimBuilder.check(&bad);
        assert_eq!(findings.len(), 1, "{bad:?}");
        let plan = BuildPlan {
            definition: &bad,
            run: directory.path().to_owned(),
            ram: vec![directory.path().join("none")],
            disks: Vec::new(),
            isolated: false,
        };
        assert!(SimBuilder.build(plan).is_err());
    };
    assert!(SimBuilder.check(&good).is_empty());
    refused(&|d| d.kind = "kvm".to_owned());
    refused(&|d| d.config.truncate(5));
    refused(&|d| d.config = vec![0x9f; 4096]);
    refused(&|d| d.config = vec![0; 5000]);
    refused(&|d| d.ram.clear());
    refused(&|d| d.ram[0].1 = 1 << 50);
    refused(&|d| d.ram[0].1 += 1);
    refused(&|d| d.disks[0].1 = 5);
    refused(&|d| d.disks[0].0 = d.disks[1].0.clone());
    refused(&|d| d.disks = vec![("d".to_owned(), 1 << 20); 17]);
    let held = Held(vec![
        vec![0; 8 << 20],
        vec![0; 6 << 20],
        vec![0; (1 << 20) + UNIT],
    ]);
    let mut machine = build(&good, directory.path(), &held);
    assert!(machine.restore(&[]).is_err());
    assert!(machine.restore(&[0x9f; 1000]).is_err());
    assert!(machine.restore(&vec![0; 1 << 20]).is_err());
    let vmm = machine.vmm().unwrap();
    let mut state = vmm.lock().unwrap().save().unwrap();
    machine.restore(&state).unwrap();
    // A transaction has five steps.
    let phase = state
        .windows(5)
        .position(|bytes| bytes == b"phase")
        .unwrap()
        + 5;
    state[phase] = 9;
    assert!(machine.restore(&state).is_err());
    // One that has ended is stopped.
    vmm.lock().unwrap().end();
    machine.stop().unwrap();
    // A plan that fails leaves nothing.
    let run = directory.path().join("other");
    std::fs::create_dir(&run).unwrap();
    let plan = BuildPlan {
        definition: &good,
        run: run.clone(),
        ram: vec![directory.path().join("peer-ram")],
        disks: vec![
            Arc::new(Point(vec![0; 6 << 20])),
            Arc::new(Point(vec![0; 5])),
        ],
        isolated: false,
    };
    assert!(SimBuilder.build(plan).is_err());
    assert_eq!(std::fs::read_dir(run).unwrap().count(), 0);
}

proptest! {
    #[test]
    fn no_bytes_of_a_peer_panic(mut bytes: Vec<u8>, at: prop::sample::Index, value: u8) {
        let directory = tempfile::tempdir().unwrap();
        let mut definition = options(directory.path(), "noise").definition();
        let place = at.index(definition.config.len());
        definition.config[place] = value;
        let _ = program(&definition);
        std::mem::swap(&mut definition.config, &mut bytes);
        let _ = program(&definition);
    }
}
