//! From a running guest to the machine that a recovery point becomes.

use std::io;
use std::path::Path;

use super::*;
use crate::activate::hydrate::HydrationState;
use crate::activate::machine::{BuildPlan, Builder, Machine};
use crate::activate::nbd::BlockSource;
use crate::guest::embedded::{Definition, SharedVmm};
use crate::guest::kvm::builder::KvmBuilder;
use crate::guest::kvm::machine::{Config, KvmMachine, KvmOptions};

/// A disk at a point: every byte tells its block.
struct Point(u64);

impl BlockSource for Point {
    fn size(&self) -> u64 {
        self.0
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(buf) {
            *byte = (at / 4096) as u8;
        }
        Ok(())
    }

    fn extents(&self, _: u64, length: u64) -> Vec<(u64, bool)> {
        vec![(length, false)]
    }
}

/// Counts; after a key reads block 3 and says so.
fn program() -> Vec<u8> {
    Code::default()
        .key()
        .out(0x600, 3)
        .out(0x604, 5 << 20)
        .out(0x608, 1)
        .keep(0x608, 0x20_0000)
        .say(b'r')
        .spin()
        .0
}

fn start(dir: &Path, irqchip: bool) -> (SharedVmm, Definition, File) {
    let ram_file = tempfile::tempfile().unwrap();
    let disk = TrackedDisk::open("data", &dir.join("data.img"), MIB).unwrap();
    let options = KvmOptions {
        vcpus: 2,
        ram: SMALL.ram,
        ram_file: ram_file.try_clone().unwrap(),
        program: program(),
        disk: Some(disk),
        terminal: Arc::new(Paper::default()),
        pace: PACE,
        irqchip,
    };
    let (vmm, definition) = KvmMachine::start(options).unwrap();
    (vmm, definition, ram_file)
}

fn build(definition: &Definition, run: &Path, ram: &Path) -> Box<dyn Machine> {
    let plan = BuildPlan {
        definition,
        run: run.to_owned(),
        ram: vec![ram.to_owned()],
        disks: vec![Arc::new(Point(MIB))],
        isolated: false,
    };
    KvmBuilder.build(plan).unwrap()
}

#[test]
fn a_point_comes_to_life() {
    if !here() {
        return;
    }
    use std::io::Write as _;
    for irqchip in [false, true] {
        let (source, peer) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (vmm, definition, memory) = start(source.path(), irqchip);
        assert_eq!(definition.vcpus, 2);
        assert_eq!(definition.ram, [("ram".to_owned(), SMALL.ram)]);
        assert_eq!(definition.disks, [("data".to_owned(), MIB)]);
        assert_eq!(KvmBuilder.check(&definition), []);
        let mut vmm = vmm.lock().unwrap();
        assert_eq!(vmm.running(), Some(true));
        vmm.pause().unwrap();
        let state = vmm.save().unwrap();

        let ram = peer.path().join("ram");
        std::fs::write(&ram, vec![0; SMALL.ram as usize]).unwrap();
        let mut machine = build(&definition, peer.path(), &ram);
        // Memory comes after the machine was built.
        io::copy(
            &mut copy(&memory, SMALL.ram),
            &mut File::options().write(true).open(&ram).unwrap(),
        )
        .unwrap();
        machine.serve(vec![Arc::new(Point(MIB))]).unwrap();
        assert!(machine.serve(vec![Arc::new(Point(2 * MIB))]).is_err());
        assert!(!machine.is_running().unwrap());
        machine.restore(&state).unwrap();
        assert!(!machine.is_running().unwrap());
        machine.run().unwrap();
        assert!(machine.is_running().unwrap());
        machine.announce().unwrap();
        let mut console =
            std::os::unix::net::UnixStream::connect(peer.path().join("console.sock")).unwrap();
        console.write_all(b"x").unwrap();
        let there = machine.vmm().unwrap();
        let read = |at: u64| {
            let mut byte = [0];
            there.lock().unwrap().read_ram(0, at, &mut byte).unwrap();
            byte[0]
        };
        wait("the block to be read", || read(5 * MIB) == 3);
        machine.hydrate(0).unwrap();
        wait("the disk to be copied", || {
            machine.hydration().unwrap()[0].state == HydrationState::Done
        });
        machine.stop().unwrap();
        assert!(!machine.is_running().unwrap());
        machine.stop().unwrap();
        machine.kill();
        assert_eq!(there.lock().unwrap().running(), None);
    }
}

#[test]
fn definitions_that_lie_are_refused() {
    if !here() {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    let (vmm, good, _memory) = start(source.path(), false);
    vmm.lock().unwrap().end();
    let refused = |change: &dyn Fn(&mut Definition), wanted: &str| {
        let peer = tempfile::tempdir().unwrap();
        let ram = peer.path().join("ram");
        File::create(&ram).unwrap().set_len(SMALL.ram).unwrap();
        let mut definition = good.clone();
        change(&mut definition);
        let plan = BuildPlan {
            definition: &definition,
            run: peer.path().to_owned(),
            ram: vec![ram],
            disks: definition
                .disks
                .iter()
                .map(|_| Arc::new(Point(MIB)) as _)
                .collect(),
            isolated: false,
        };
        let Err(error) = KvmBuilder.build(plan) else {
            panic!("{wanted}: built");
        };
        assert!(error.to_string().contains(wanted), "{error}");
        assert!(!peer.path().join("disk.img").exists(), "{wanted}");
    };
    refused(&|d| d.kind = "sim".into(), "kind \"sim\"");
    refused(&|d| d.vcpus = 0, "0 vCPUs");
    refused(&|d| d.vcpus = u32::MAX, "4294967295 vCPUs");
    refused(&|d| d.vcpus = 3, "its config 2");
    refused(&|d| d.ram[0].1 = 1 << 60, "one block");
    refused(&|d| d.ram[0].1 = 2 * SMALL.ram, "the memory file has");
    refused(&|d| d.ram[0].1 = 12345, "4 KiB");
    refused(&|d| d.ram.clear(), "0 blocks");
    refused(&|d| d.disks.push(("more".into(), MIB)), "2 disks");
    refused(&|d| d.disks[0].1 = 7, "7 bytes");
    refused(&|d| d.disks[0].1 = 1 << 50, "more than 4096 GiB");
    refused(&|d| d.config.truncate(20), "damaged");
    refused(&|d| d.config = vec![0; 300 << 10], "more than");
    let mut odd = good.clone();
    odd.config.clear();
    assert_eq!(KvmBuilder.check(&odd)[0].code, "kvm-definition");
}

#[test]
fn memory_is_reserved_before_it_is_mapped() {
    if !here() {
        return;
    }
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (vmm, _, memory) = start(dir.path(), false);
    // A page that lacked room would kill this process.
    assert!(memory.metadata().unwrap().blocks() * 512 >= SMALL.ram);
    vmm.lock().unwrap().end();
}

#[test]
fn what_a_guest_began_to_use_is_told() {
    if !here() {
        return;
    }
    const LSTAR: u32 = 0xc000_0082;
    // mov ecx, LSTAR; mov eax, 0x1000; xor edx, edx; wrmsr
    let program = Code::default()
        .key()
        .raw(&[
            0xb9, 0x82, 0, 0, 0xc0, 0xb8, 0, 0x10, 0, 0, 0x31, 0xd2, 0x0f, 0x30,
        ])
        .say(b'u')
        .spin();
    let paper = Arc::new(Paper::default());
    let options = KvmOptions {
        vcpus: 2,
        ram: SMALL.ram,
        ram_file: tempfile::tempfile().unwrap(),
        program: program.0,
        disk: None,
        terminal: paper.clone(),
        pace: PACE,
        irqchip: false,
    };
    let (vmm, mut definition) = KvmMachine::start(options).unwrap();
    let uses = |definition: &Definition| {
        let needs = Config::of(definition).unwrap().needs;
        needs.msrs.contains(&(LSTAR, true))
    };
    assert!(!uses(&definition));
    // One of the two vCPUs takes the key.
    paper.keys.lock().unwrap().push_back(b'x');
    paper.wait_for("u");
    let mut vmm = vmm.lock().unwrap();
    definition.config = vmm.config().unwrap().unwrap();
    assert!(uses(&definition));
    assert_eq!(vmm.running(), Some(true));
    vmm.end();
}
