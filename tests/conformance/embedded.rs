//! Guests whose monitor lives in this process, whichever it is: they prove
//! themselves on their console. Their monitor fails a call when it is told to.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farhaven::activate::hydrate::HydrationState;
use farhaven::activate::machine::{BuildPlan, Builder};
use farhaven::activate::nbd::BlockSource;
use farhaven::guest::Guest;
use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::embedded::engine::EmbeddedGuest;
use farhaven::guest::embedded::{Bitmap, Definition, RamBlock, SharedVmm, Vmm, VmmError};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::UNIT;

use crate::subject::{PATIENCE, Subject, Work};
use crate::support::Console;
use crate::support::model::KEY;

/// Most changed memory of a cut.
const BUFFER: usize = 64 << 20;

pub struct Embedded {
    pub vmm: SharedVmm,
    pub definition: Definition,
    pub builder: Arc<dyn Builder>,
    pub console: Console,
    /// Ends after the guest.
    pub _dir: tempfile::TempDir,
    /// Least work that shows that it goes on.
    pub some: Work,
    pub calls: Arc<AtomicI64>,
    /// So often it does not go on.
    pub stuck: Arc<AtomicU64>,
    /// Panics unless memory and disks are of one instant.
    pub judge: fn(&[Vec<u8>]),
}

/// Where a guest's console is.
pub fn console(directory: &Path) -> Console {
    Console {
        log: directory.join("console.log"),
        socket: directory.join("console.sock"),
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.vmm.lock().unwrap().end();
    }
}

impl Subject for Embedded {
    fn attach(&mut self) -> Box<dyn Guest> {
        let vmm = self.vmm.lock().unwrap();
        let faulty = Faulty {
            ram: vmm.ram().to_vec(),
            disks: vmm.disks().to_vec(),
            inner: self.vmm.clone(),
            calls: self.calls.clone(),
            stuck: self.stuck.clone(),
            reads: AtomicI64::new(0),
        };
        drop(vmm);
        let vmm: SharedVmm = Arc::new(Mutex::new(faulty));
        Box::new(EmbeddedGuest::attach(vmm, DigestKey::new(KEY), BUFFER).expect("attaches"))
    }

    fn work(&self) -> Work {
        // What a guest wrote before it stopped is on its way to the log.
        let stands = self.vmm.lock().unwrap().running() != Some(true);
        std::thread::sleep(Duration::from_millis(if stands { 150 } else { 5 }));
        let beat = self.console.await_beat(1, PATIENCE);
        assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
        Work {
            memory: beat.memory_writes,
            disk: beat.disk_writes,
        }
    }

    fn some(&self) -> Work {
        self.some
    }

    fn content(&self) -> Vec<Vec<u8>> {
        let vmm = self.vmm.lock().unwrap();
        assert_eq!(vmm.running(), Some(false));
        let mut content = Vec::new();
        for (index, block) in vmm.ram().iter().enumerate() {
            let mut bytes = vec![0; block.bytes as usize];
            vmm.read_ram(index, 0, &mut bytes).expect("reads");
            content.push(bytes);
        }
        for disk in vmm.disks() {
            let mut bytes = vec![0; disk.bytes() as usize];
            disk.read(0, &mut bytes).expect("reads");
            bytes.resize(bytes.len().next_multiple_of(UNIT), 0);
            content.push(bytes);
        }
        content
    }

    fn assert_one_instant(&self, volumes: &[Vec<u8>]) {
        (self.judge)(volumes);
    }

    fn goes_on_elsewhere(&self, volumes: &[Vec<u8>], device_state: &[u8]) {
        let there = tempfile::Builder::new().prefix("fh").tempdir().unwrap();
        let (memory, disks) = volumes.split_at(self.definition.ram.len());
        let ram: Vec<PathBuf> = memory
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                let path = there.path().join(format!("{index}.ram"));
                std::fs::write(&path, bytes).expect("written");
                path
            })
            .collect();
        let sizes = self.definition.disks.iter().map(|(_, bytes)| *bytes);
        let disks = disks.iter().zip(sizes).map(|(bytes, size)| {
            let disk: Arc<dyn BlockSource> = Arc::new(Below(bytes[..size as usize].to_vec()));
            disk
        });
        let run = there.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let plan = BuildPlan {
            definition: &self.definition,
            run: run.clone(),
            ram,
            disks: disks.collect(),
            isolated: false,
        };
        let findings = self.builder.check(&self.definition);
        assert!(findings.is_empty(), "{findings:?}");
        let mut machine = self.builder.build(plan).expect("builds");
        machine.restore(device_state).expect("restores");
        assert!(!machine.is_running().unwrap());
        let last = self.console.last_beat().map_or(0, |beat| beat.number);
        machine.run().expect("runs");
        machine.announce().expect("announces");
        machine.hydrate(0).expect("hydrates");
        let console = console(&run);
        let first = console.await_beat(1, PATIENCE);
        assert!(first.number <= last + 1, "{first:?} {last}");
        let beat = console.await_beat(first.number + 10, PATIENCE);
        assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
        assert!(beat.memory_writes > first.memory_writes && beat.disk_writes > first.disk_writes);
        let check = console.check(PATIENCE);
        assert_eq!((check.memory.as_str(), check.disk.as_str()), ("ok", "ok"));
        assert!(check.pages > 0 && check.blocks > 0, "{check:?}");
        let begun = Instant::now();
        while !machine
            .hydration()
            .unwrap()
            .iter()
            .all(|h| h.state == HydrationState::Done)
        {
            assert!(begun.elapsed() < PATIENCE, "its disks are not copied");
            std::thread::sleep(Duration::from_millis(10));
        }
        machine.stop().expect("stops");
        assert!(!machine.is_running().unwrap());
        machine.kill();
    }

    fn runs(&self) -> bool {
        self.vmm.lock().unwrap().running() == Some(true)
    }

    fn end(&mut self) {
        self.vmm.lock().unwrap().end();
    }

    fn traces(&self) -> Vec<String> {
        Vec::new()
    }

    fn fail_request(&mut self, after: u64) {
        self.calls.store(after as i64, Ordering::SeqCst);
    }

    fn mend(&mut self) -> bool {
        self.calls.swap(i64::MAX, Ordering::SeqCst) == MET
    }

    fn fail_to_go_on(&mut self, times: u64) -> bool {
        self.stuck.store(times, Ordering::SeqCst);
        true
    }

    fn every(&self) -> usize {
        1
    }
}

/// A point's disk.
struct Below(Vec<u8>);

impl BlockSource for Below {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn extents(&self, _: u64, length: u64) -> Vec<(u64, bool)> {
        vec![(length, false)]
    }
}

/// A call has failed.
const MET: i64 = -1;

/// A monitor of which one call fails, as its contract allows: then nothing was done.
struct Faulty {
    ram: Vec<RamBlock>,
    disks: Vec<Arc<TrackedDisk>>,
    inner: SharedVmm,
    calls: Arc<AtomicI64>,
    stuck: Arc<AtomicU64>,
    reads: AtomicI64,
}

impl Faulty {
    fn call<T>(
        &self,
        what: &str,
        call: impl FnOnce(&mut dyn Vmm) -> Result<T, VmmError>,
    ) -> Result<T, VmmError> {
        let left = self
            .calls
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                (left != i64::MAX && left != MET).then(|| left - 1)
            });
        if left == Ok(0) {
            return Err(VmmError::Kvm {
                call: what.to_owned(),
                why: "planted".to_owned(),
            });
        }
        call(&mut *self.inner.lock().unwrap())
    }
}

impl Vmm for Faulty {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.disks
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.call("pause", |vmm| vmm.pause())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        let less = |left: u64| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.stuck.fetch_update(order, order, less).is_ok() {
            return Err(VmmError::State("planted".to_owned()));
        }
        self.call("resume", |vmm| vmm.resume())
    }

    fn running(&self) -> Option<bool> {
        self.inner.lock().unwrap().running()
    }

    fn ended_because(&self) -> String {
        self.inner.lock().unwrap().ended_because()
    }

    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError> {
        self.call("dirty", |vmm| vmm.dirty(block))
    }

    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        // There are many of these: one in sixteen may fail.
        if self.reads.fetch_add(1, Ordering::Relaxed) % 16 > 0 {
            return self.inner.lock().unwrap().read_ram(block, offset, into);
        }
        self.call("read_ram", |vmm| vmm.read_ram(block, offset, into))
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        self.call("save", |vmm| vmm.save())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.call("throttle", |vmm| vmm.throttle(percent))
    }

    fn end(&mut self) {
        self.inner.lock().unwrap().end();
    }
}
