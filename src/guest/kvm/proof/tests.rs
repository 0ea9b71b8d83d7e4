//! The proving guest on our machine: right at any instant, and every planted
//! fault found, by itself when it goes on and from outside.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{ProofError, Verified, program, verify};
use crate::guest::embedded::Vmm;
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::kvm::facts::facts;
use crate::guest::kvm::machine::{Pace, Parts, Terminal, assemble};
use crate::guest::kvm::protected::KvmVmm;

const RAM: u64 = 16 << 20;
const VCPUS: u32 = 2;
/// A host may be busy.
const PATIENCE: Duration = Duration::from_secs(180);
const PACE: Pace = Pace {
    changes: 300,
    pages: 48,
    blocks: 24,
};

#[derive(Default)]
struct Paper {
    written: Mutex<Vec<u8>>,
    keys: Mutex<VecDeque<u8>>,
}

impl Terminal for Paper {
    fn write(&self, bytes: &[u8]) {
        self.written.lock().unwrap().extend(bytes);
    }

    fn typed(&self) -> Option<u8> {
        self.keys.lock().unwrap().pop_front()
    }
}

/// Memory, disk and device state of a guest, at one instant or patched together.
#[derive(Clone)]
struct Instance {
    ram: Vec<u8>,
    disk: Vec<u8>,
    state: Vec<u8>,
}

struct Running {
    vmm: KvmVmm,
    paper: Arc<Paper>,
    ram: File,
    disk: Arc<TrackedDisk>,
    _directory: tempfile::TempDir,
}

impl Running {
    fn new(from: Option<&Instance>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(RAM).unwrap();
        let bytes = u64::from(PACE.blocks) * 4096;
        let disk = TrackedDisk::open("disk", &directory.path().join("disk"), bytes).unwrap();
        if let Some(from) = from {
            ram.write_all_at(&from.ram, 0).unwrap();
            disk.write(0, &from.disk).unwrap();
        }
        let paper = Arc::new(Paper::default());
        let parts = Parts {
            vcpus: VCPUS,
            ram: RAM,
            ram_file: ram.try_clone().unwrap(),
            disk: Some(disk.clone()),
            terminal: paper.clone(),
            pace: PACE,
            irqchip: false,
        };
        let code = program();
        let code = from.is_none().then_some(code.as_slice());
        let mut vmm = assemble(parts, &facts().unwrap(), code).unwrap();
        if let Some(from) = from {
            vmm.restore(&from.state).unwrap();
        }
        vmm.resume().unwrap();
        Self {
            vmm,
            paper,
            ram,
            disk,
            _directory: directory,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.paper.written.lock().unwrap()).into_owned()
    }

    /// The first whole line that begins so and comes after so many bytes.
    fn line(&self, after: usize, begins: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let text = self.text();
            let mut lines = text[after..].split_inclusive('\n');
            if let Some(line) = lines.find(|l| l.starts_with(begins) && l.ends_with('\n')) {
                return line.trim().to_owned();
            }
            assert!(
                Instant::now() < end && self.vmm.running().is_some(),
                "no {begins} came ({}): {text}",
                self.vmm.ended_because()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn check(&self) -> String {
        let after = self.text().len();
        self.paper.keys.lock().unwrap().push_back(b'c');
        self.line(after, "CHECK")
    }

    /// One instant; the guest stands then.
    fn cut(&mut self) -> Instance {
        self.vmm.pause().unwrap();
        let (mut ram, mut disk) = (vec![0; RAM as usize], vec![0; PACE.blocks as usize * 4096]);
        self.ram.read_exact_at(&mut ram, 0).unwrap();
        self.disk.read(0, &mut disk).unwrap();
        Instance {
            ram,
            disk,
            state: self.vmm.save().unwrap(),
        }
    }

    /// Waits for so many page writes.
    fn wait_for_writes(&self, wanted: u64) {
        let end = Instant::now() + PATIENCE;
        let writes = || -> Option<u64> {
            let text = self.text();
            let last = text.rsplit_once(" seq=")?.1;
            last.split(' ').next()?.parse().ok()
        };
        while writes().is_none_or(|writes| writes < wanted) {
            assert!(
                Instant::now() < end,
                "it writes too little: {}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn outside(instance: &Instance) -> Result<Verified, ProofError> {
    let read = |from: Vec<u8>| {
        move |at: u64, into: &mut [u8]| {
            let part = from
                .get(at as usize..)
                .and_then(|rest| rest.get(..into.len()));
            into.copy_from_slice(part.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    };
    verify(
        &mut read(instance.ram.clone()),
        &mut read(instance.disk.clone()),
    )
}

fn word(instance: &Instance, at: u64) -> u64 {
    u64::from_le_bytes(instance.ram[at as usize..][..8].try_into().unwrap())
}

/// Is there a KVM? Says so when not.
fn here() -> bool {
    facts()
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .is_ok()
}

#[test]
fn a_guest_at_work_is_right_at_every_instant() {
    if !here() {
        return;
    }
    let mut guest = Running::new(None);
    guest.wait_for_writes(1);
    let mut writes = 0;
    for turn in 0..12u64 {
        std::thread::sleep(Duration::from_micros(700 * turn));
        let verified = outside(&guest.cut()).unwrap();
        assert!(verified.page_writes >= writes, "{verified:?}");
        writes = verified.page_writes;
        assert_eq!(verified.pages, 48 + 256 + 2 * 16);
        assert_eq!(verified.blocks, 24);
        guest.vmm.resume().unwrap();
    }
    let check = guest.check();
    assert!(
        check.ends_with("mem=ok disk=ok pages=304 blocks=24"),
        "{check}"
    );
}

/// Addresses that `program.s` laid out.
struct Layout<'a>(&'a Instance);

impl Layout<'_> {
    fn global(&self, at: u64) -> u64 {
        word(self.0, 0x1f_0000 + at)
    }

    /// Entry of an item in the ledger.
    fn entry(&self, item: u64) -> u64 {
        self.global(0x20) + item * 8
    }

    fn page(&self, item: u64) -> u64 {
        self.global(0x30) + (item >> 4) * self.global(0x28) + (item & 15) * 4096
    }

    /// Items that no vCPU is about to write.
    fn at_rest(&self, items: std::ops::Range<u64>) -> impl Iterator<Item = u64> + '_ {
        items.filter(|item| (0..2).all(|v| word(self.0, 0x20_0018 + v * 4096) != item + 1))
    }
}

fn copy(to: &mut [u8], from: &[u8], at: u64, bytes: usize) {
    to[at as usize..][..bytes].copy_from_slice(&from[at as usize..][..bytes]);
}

#[test]
fn every_planted_fault_is_found_from_inside_and_outside() {
    if !here() {
        return;
    }
    let mut guest = Running::new(None);
    guest.wait_for_writes(100);
    let old = guest.cut();
    guest.vmm.resume().unwrap();
    guest.wait_for_writes(100 + 3 * 48);
    let new = guest.cut();
    drop(guest);

    let lay = Layout(&new);
    let mut pages = lay
        .at_rest(0..24)
        .filter(|p| word(&new, lay.page(*p) + 16) > 0);
    let (page, other) = (pages.next().unwrap(), pages.next().unwrap());
    let changed = |item: &u64| word(&new, lay.entry(*item)) != word(&old, lay.entry(*item));
    let block = lay.at_rest(48..72).find(changed).unwrap() - 48;
    let block_at = block * 4096;
    let cache = lay.at_rest(72..72 + 32).find(changed).unwrap();
    let cache_at = lay.global(0x68) + (cache - 72) * 4096;
    let (page_at, other_at) = (lay.page(page), lay.page(other));
    assert!(changed(&page));
    let plant = |plant: &dyn Fn(&mut Instance)| {
        let mut instance = new.clone();
        plant(&mut instance);
        instance
    };

    let mut faults: Vec<(Instance, String)> = vec![
        (new.clone(), String::new()),
        (old.clone(), String::new()),
        (
            plant(&|i| copy(&mut i.ram, &old.ram, page_at, 4096)),
            format!("page-{page}-older"),
        ),
        (
            plant(&|i| i.ram[page_at as usize..][..4096].fill(0)),
            format!("page-{page}-lost"),
        ),
        (
            plant(&|i| i.ram[page_at as usize + 4095] ^= 1),
            format!("page-{page}-torn"),
        ),
        (
            plant(&|i| {
                let from = i.ram[other_at as usize..][..4096].to_vec();
                i.ram[page_at as usize..][..4096].copy_from_slice(&from);
            }),
            format!("page-{page}-swapped"),
        ),
        (
            plant(&|i| copy(&mut i.disk, &old.disk, block_at, 4096)),
            format!("block-{block}-"),
        ),
        (
            plant(&|i| i.disk[block_at as usize + 2048] ^= 4),
            format!("block-{block}-torn"),
        ),
        (
            plant(&|i| copy(&mut i.ram, &old.ram, cache_at, 4096)),
            format!("cache-{}-", cache - 72),
        ),
        (
            plant(&|i| i.ram[lay.global(0x38) as usize + 5000] ^= 1),
            "fill-1-differs".to_owned(),
        ),
    ];
    // Memory and device state of one point, disk of another.
    let mut mixed = old.clone();
    mixed.disk.clone_from(&new.disk);
    faults.push((mixed, "block-".to_owned()));
    // Disk of an earlier point.
    faults.push((
        plant(&|i| i.disk.clone_from(&old.disk)),
        "block-".to_owned(),
    ));
    for (instance, wanted) in &faults {
        match outside(instance) {
            Ok(_) => assert!(wanted.is_empty(), "not found from outside: {wanted}"),
            Err(ProofError::Fault(found)) if !wanted.is_empty() => {
                assert!(found.starts_with(wanted), "{found}, wanted {wanted}");
            }
            Err(error) => panic!("{error}, wanted {wanted:?}"),
        }
        let check = Running::new(Some(instance)).check();
        match wanted.is_empty() {
            true => assert!(check.contains("mem=ok disk=ok"), "{check}"),
            false => assert!(
                check.contains(&format!("BAD:{wanted}")),
                "{check}: {wanted}"
            ),
        }
    }

    // What only the guest's own registers can tell: memory of another point.
    let mut torn_in_time = new.clone();
    torn_in_time.ram.clone_from(&old.ram);
    torn_in_time.disk.clone_from(&old.disk);
    // Their stacks stay theirs: with others the guest would just fault.
    copy(&mut torn_in_time.ram, &new.ram, 0, 1 << 20);
    assert!(outside(&torn_in_time).is_ok());
    let check = Running::new(Some(&torn_in_time)).check();
    assert!(check.contains("mem=BAD:"), "{check}");
    // A ledger's page of another point.
    let ledger = plant(&|i| copy(&mut i.ram, &old.ram, lay.global(0x20), 4096));
    assert!(outside(&ledger).is_err());
    let check = Running::new(Some(&ledger)).check();
    assert!(check.contains("mem=BAD:"), "{check}");
}

#[test]
fn bytes_that_are_no_such_guest_are_refused() {
    let mut nothing = |_: u64, into: &mut [u8]| {
        into.fill(0);
        Ok(())
    };
    let mut ones = |_: u64, into: &mut [u8]| {
        into.fill(0xff);
        Ok(())
    };
    let mut huge = |at: u64, into: &mut [u8]| {
        into.fill(0x7f);
        if at == 0x1f_0000 {
            into[..8].copy_from_slice(&1u64.to_le_bytes());
        }
        Ok(())
    };
    let mut none = |_: u64, _: &mut [u8]| Err(std::io::ErrorKind::UnexpectedEof.into());
    let not_at_work = |error| matches!(error, Err(ProofError::NotAtWork(_)));
    assert!(not_at_work(verify(&mut nothing, &mut none)));
    assert!(not_at_work(verify(&mut ones, &mut none)));
    assert!(not_at_work(verify(&mut huge, &mut none)));
    assert!(matches!(
        verify(&mut none, &mut nothing),
        Err(ProofError::Read { what: "memory", .. })
    ));
}
