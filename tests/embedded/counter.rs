//! A monitor as its author would write it: a guest that counts. Step `n`
//! writes `n` into page `n % PAGES` of its memory, then into block
//! `n % BLOCKS` of its disk; `n` itself is its device state. So memory, disk
//! and state of different instants, or a lost write, are seen at once.

mod build;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::embedded::{Bitmap, Definition, RamBlock, Vmm, VmmError};

pub use build::CounterBuilder;

pub const PAGES: u64 = 64;
pub const BLOCKS: u64 = 48;
pub const PAGE: u64 = 4096;
pub const KIND: &str = "counter";

struct Inner {
    n: u64,
    /// `None`: ended.
    running: Option<bool>,
    dirty: Bitmap,
    /// The first thing that was not as it must be.
    bad: Option<String>,
    /// So many stops, and so many tries to go on, fail from here on.
    failing: (u32, u32),
    /// As above, once it is moved.
    failing_once_moved: Option<(u32, u32)>,
    /// A try to go on that fails lets it go on.
    goes_on_all_the_same: bool,
    /// Done by whoever attaches to it next, who is told how far it is.
    when_attached: Option<Box<dyn FnOnce(u64) + Send>>,
    /// So many stops take too long from here on.
    slow: u32,
    goes_on_after: Duration,
    /// What its config is by now.
    config: Option<Vec<u8>>,
}

struct Shared {
    inner: Mutex<Inner>,
    turned: Condvar,
    ram: File,
    disk: Arc<TrackedDisk>,
    salt: u64,
}

impl Shared {
    fn page(&self, page: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read_exact_at(&mut bytes, page * PAGE).unwrap();
        self.told(bytes)
    }

    fn block(&self, block: u64) -> u64 {
        let mut bytes = [0; 8];
        self.disk.read(block * PAGE, &mut bytes).unwrap();
        self.told(bytes)
    }

    /// The step that is written so. A guest with a library writes its own way: else two
    /// that count side by side have pages in common, which are stored once.
    fn told(&self, bytes: [u8; 8]) -> u64 {
        u64::from_le_bytes(bytes).saturating_sub(self.salt)
    }

    fn written(&self, n: u64) -> [u8; 8] {
        (n + self.salt).to_le_bytes()
    }

    /// What a slot of `slots` holds after step `n`.
    fn owed(n: u64, slot: u64, slots: u64) -> u64 {
        match n {
            n if n < slot => 0,
            n => n - (n - slot) % slots,
        }
    }

    fn check(&self, n: u64) -> Option<String> {
        let page = (0..PAGES).find(|p| self.page(*p) != Self::owed(n, *p, PAGES));
        let block = (0..BLOCKS).find(|b| self.block(*b) != Self::owed(n, *b, BLOCKS));
        match (page, block) {
            (None, None) => None,
            wrong => Some(format!("at step {n}: page, block {wrong:?}")),
        }
    }

    fn work(&self) {
        loop {
            let mut inner = self.inner.lock().unwrap();
            while inner.running == Some(false) {
                inner = self.turned.wait(inner).unwrap();
            }
            if inner.running.is_none() {
                return;
            }
            let n = inner.n + 1;
            let page = n % PAGES;
            let block = n % BLOCKS;
            if self.page(page) != Self::owed(n - 1, page, PAGES)
                || self.block(block) != Self::owed(n - 1, block, BLOCKS)
            {
                inner.bad.get_or_insert(format!("found at step {n}"));
            }
            self.ram
                .write_all_at(&self.written(n), page * PAGE)
                .unwrap();
            inner.dirty.set(page);
            self.disk.write(block * PAGE, &self.written(n)).unwrap();
            inner.n = n;
            drop(inner);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The monitor.
pub struct Counter {
    shared: Arc<Shared>,
    ram: [RamBlock; 1],
    disks: [Arc<TrackedDisk>; 1],
    /// Where it was built; names its guest. Empty where it was started.
    run: PathBuf,
}

impl Counter {
    fn new(ram: &Path, disk: Arc<TrackedDisk>, running: bool) -> Self {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(ram);
        let file = file.unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                n: 0,
                running: Some(running),
                dirty: Bitmap::none(PAGES),
                bad: None,
                failing: (0, 0),
                failing_once_moved: None,
                goes_on_all_the_same: false,
                when_attached: None,
                slow: 0,
                goes_on_after: Duration::ZERO,
                config: None,
            }),
            turned: Condvar::new(),
            ram: file,
            salt: (disk.bytes() / PAGE - BLOCKS) << 32,
            disk: disk.clone(),
        });
        let worker = shared.clone();
        std::thread::spawn(move || worker.work());
        Self {
            shared,
            ram: [RamBlock {
                name: "ram".to_owned(),
                bytes: PAGES * PAGE,
            }],
            disks: [disk],
            run: PathBuf::new(),
        }
    }

    /// A guest that counts from 1, in a directory.
    pub fn start(directory: &Path) -> (Arc<Mutex<Self>>, Definition) {
        Self::start_on(directory, BLOCKS)
    }

    /// The same, with a disk of so many blocks, of which it uses the first.
    pub fn start_on(directory: &Path, blocks: u64) -> (Arc<Mutex<Self>>, Definition) {
        std::fs::create_dir_all(directory).unwrap();
        let disk = TrackedDisk::open("disk", &directory.join("disk.img"), blocks * PAGE);
        let counter = Self::new(&directory.join("ram"), disk.unwrap(), true);
        let definition = Definition {
            disks: vec![("disk".to_owned(), blocks * PAGE)],
            ..definition()
        };
        (Arc::new(Mutex::new(counter)), definition)
    }

    /// The same, with so many blocks more that it never writes: each has content of
    /// its own.
    pub fn start_with_library(directory: &Path, blocks: u64) -> (Arc<Mutex<Self>>, Definition) {
        let (counter, definition) = Self::start_on(directory, BLOCKS + blocks);
        for block in 0..blocks {
            let disk = counter.lock().unwrap().shared.disk.clone();
            disk.write((BLOCKS + block) * PAGE, &book(block)).unwrap();
        }
        (counter, definition)
    }

    /// Is the library as it was made?
    pub fn library_is_whole(&self, blocks: u64) -> bool {
        let mut read = vec![0; PAGE as usize];
        (0..blocks).all(|block| {
            let disk = &self.shared.disk;
            disk.read((BLOCKS + block) * PAGE, &mut read).unwrap();
            read == book(block)
        })
    }

    /// Was it built for this guest?
    pub fn is_of(&self, guest: &str) -> bool {
        self.run.components().any(|part| part.as_os_str() == guest)
    }

    /// How far it is.
    pub fn count(&self) -> u64 {
        self.shared.inner.lock().unwrap().n
    }

    /// What it found wrong with itself, all of it looked at now.
    pub fn fault(&self) -> Option<String> {
        let inner = self.shared.inner.lock().unwrap();
        inner.bad.clone().or_else(|| self.shared.check(inner.n))
    }

    /// So many stops, and so many tries to go on, fail from here on.
    pub fn fail(&self, stops: u32, goings_on: u32) {
        self.shared.inner.lock().unwrap().failing = (stops, goings_on);
    }

    /// So many stops, and so many tries to go on, fail from when its next move begins:
    /// what it asks of a host is looked at then.
    pub fn fail_once_moved(&self, stops: u32, goings_on: u32) {
        self.shared.inner.lock().unwrap().failing_once_moved = Some((stops, goings_on));
    }

    /// From here on, a try to go on that fails lets it go on all the same.
    pub fn goes_on_all_the_same(&self) {
        self.shared.inner.lock().unwrap().goes_on_all_the_same = true;
    }

    /// Has this done by whoever attaches to it next, who is told how far it is then.
    pub fn when_attached(&self, then: impl FnOnce(u64) + Send + 'static) {
        self.shared.inner.lock().unwrap().when_attached = Some(Box::new(then));
    }

    /// So many stops take too long from here on.
    pub fn slow_to_stop(&self, stops: u32) {
        self.shared.inner.lock().unwrap().slow = stops;
    }

    /// It takes that long to go on, the next time.
    pub fn slow_to_go_on(&self, takes: Duration) {
        self.shared.inner.lock().unwrap().goes_on_after = takes;
    }

    /// Of those, how many are still to come.
    pub fn slow_stops_left(&self) -> u32 {
        self.shared.inner.lock().unwrap().slow
    }

    /// Asks for something else of a host from here on.
    pub fn ask_for(&self, config: &[u8]) {
        self.shared.inner.lock().unwrap().config = Some(config.to_vec());
    }

    fn may_fail(&self, which: impl Fn(&mut (u32, u32)) -> &mut u32) -> Result<(), VmmError> {
        let mut inner = self.shared.inner.lock().unwrap();
        let left = which(&mut inner.failing);
        if *left == 0 {
            return Ok(());
        }
        *left -= 1;
        Err(VmmError::Io {
            what: "as the test asked".to_owned(),
            source: std::io::ErrorKind::Other.into(),
        })
    }

    fn turn(&self, to: Option<bool>) {
        let mut inner = self.shared.inner.lock().unwrap();
        if inner.running.is_some() {
            inner.running = to;
        }
        self.shared.turned.notify_all();
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.turn(None);
    }
}

/// The content of a block of the library: it does not compress.
fn book(block: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

pub fn definition() -> Definition {
    Definition {
        kind: KIND.to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), PAGES * PAGE)],
        disks: vec![("disk".to_owned(), BLOCKS * PAGE)],
        config: b"counts".to_vec(),
    }
}

impl Vmm for Counter {
    /// Asked for by who attaches to it, and by nobody later.
    fn ram(&self) -> &[RamBlock] {
        let mut inner = self.shared.inner.lock().unwrap();
        let (count, then) = (inner.n, inner.when_attached.take());
        drop(inner);
        if let Some(then) = then {
            then(count);
        }
        &self.ram
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.disks
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.may_fail(|(stops, _)| stops)?;
        let mut inner = self.shared.inner.lock().unwrap();
        if inner.slow > 0 {
            inner.slow -= 1;
            return Err(VmmError::DoesNotStop {
                what: "its only vCPU".to_owned(),
                within: Duration::from_millis(1),
            });
        }
        drop(inner);
        self.turn(Some(false));
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        let fails = self.may_fail(|(_, goings_on)| goings_on);
        if fails.is_err() && !self.shared.inner.lock().unwrap().goes_on_all_the_same {
            return fails;
        }
        let takes = std::mem::take(&mut self.shared.inner.lock().unwrap().goes_on_after);
        std::thread::sleep(takes);
        self.turn(Some(true));
        fails
    }

    fn running(&self) -> Option<bool> {
        self.shared.inner.lock().unwrap().running
    }

    fn ended_because(&self) -> String {
        "it was told to".to_owned()
    }

    fn dirty(&mut self, _block: usize) -> Result<Bitmap, VmmError> {
        let mut inner = self.shared.inner.lock().unwrap();
        Ok(std::mem::replace(&mut inner.dirty, Bitmap::none(PAGES)))
    }

    fn read_ram(&self, _block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        let read = self.shared.ram.read_exact_at(into, offset);
        read.map_err(|source| VmmError::Io {
            what: "reading memory".to_owned(),
            source,
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        Ok(self.count().to_le_bytes().to_vec())
    }

    fn config(&mut self) -> Result<Option<Vec<u8>>, VmmError> {
        let mut inner = self.shared.inner.lock().unwrap();
        if let Some(failing) = inner.failing_once_moved.take() {
            inner.failing = failing;
        }
        Ok(inner.config.clone())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmmError> {
        Ok(())
    }

    fn end(&mut self) {
        self.turn(None);
    }
}
