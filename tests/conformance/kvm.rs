//! The guest of our own monitor over KVM: its program proves itself, and every
//! point of it is looked at from outside, too.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use farhaven::guest::embedded::console::Console;
use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::kvm::{KvmBuilder, KvmMachine, KvmOptions, Pace, facts, proof};

use crate::embedded::{Embedded, console};
use crate::subject::{PATIENCE, Work};
use crate::support::skip;

/// Bytes of memory, and of the disk.
const RAM: u64 = 32 << 20;
const DISK: u64 = 16 << 20;

fn start() -> Option<Embedded> {
    if let Err(why) = facts() {
        skip(&format!("no KVM guest can run here: {why}"));
        return None;
    }
    let dir = tempfile::Builder::new().prefix("fh").tempdir().unwrap();
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let ram_file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.path().join("kvm.ram"))
        .unwrap();
    let disk = TrackedDisk::open("disk", &run.join("disk.img"), DISK).unwrap();
    let (vmm, definition) = KvmMachine::start(KvmOptions {
        vcpus: 2,
        ram: RAM,
        ram_file,
        program: proof::program(),
        disk: Some(disk),
        terminal: Arc::new(Console::open(&run).unwrap()),
        pace: Pace {
            changes: 2000,
            pages: 512,
            blocks: 256,
        },
        irqchip: false,
    })
    .expect("starts");
    let console = console(&run);
    console.await_beat(2, PATIENCE);
    Some(Embedded {
        vmm,
        definition,
        builder: Arc::new(KvmBuilder),
        console,
        _dir: dir,
        some: Work {
            memory: 24,
            disk: 5,
        },
        calls: Arc::new(AtomicI64::new(i64::MAX)),
        stuck: Arc::default(),
        judge: sound,
    })
}

/// As the program's own checks, but from outside, and of any instant.
fn sound(volumes: &[Vec<u8>]) {
    let [memory, disk] = volumes else {
        panic!("{} volumes", volumes.len());
    };
    let read = |bytes: &[u8], at: u64, into: &mut [u8]| {
        into.copy_from_slice(&bytes[at as usize..][..into.len()]);
        Ok(())
    };
    let verified = proof::verify(
        &mut |at, into: &mut [u8]| read(memory, at, into),
        &mut |at, into: &mut [u8]| read(disk, at, into),
    )
    .expect("one instant");
    assert!(verified.pages > 0 && verified.blocks > 0, "{verified:?}");
}

conforms!(start);
