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
        let mut bad = |registers: &Registers, bytes: &Bytes| {
            mutator.registers = registers.clone();
            verdict(&mut mutator, &mut bytes.clone()).contains("BAD")
        };
        let now = mutator_registers(&mut bad, &old_registers, &old, seed, workload, before + steps);
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

/// The registers after so many steps, found by making them anew.
fn mutator_registers(
    _: &mut impl FnMut(&Registers, &Bytes) -> bool,
    _: &Registers,
    _: &Bytes,
    seed: u64,
    workload: Workload,
    steps: usize,
) -> Registers {
    let (mut mutator, mut bytes) = new(seed, workload);
    for _ in 0..steps {
        mutator.step(&mut bytes);
    }
    mutator.registers
}
