//! The simulated guest: random writes into memory and a disk, in virtual time.
//! Its device state is the number of an instant, under which the [`Room`] keeps
//! what memory and disk were then.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use farhaven::activate::hydrate::Hydration;
use farhaven::activate::machine::{BuildPlan, Builder, Builders, Machine, MachineError};
use farhaven::activate::nbd::BlockSource;
use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::embedded::{Bitmap, Definition, RamBlock, SharedVmm, Vmm, VmmError};
use farhaven::guest::qemu::check::Finding;
use farhaven::work::lock;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::room::{Place, Room};

pub const PAGE: u64 = 4096;
pub const PAGES: u64 = 48;
pub const BLOCKS: u64 = 40;
pub const KIND: &str = "simulated";
/// Bytes of a device state's number.
const NUMBER: usize = 8;

/// The guest of a number, as its builder knows it.
pub fn definition(guest: u32) -> Definition {
    Definition {
        kind: KIND.to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), PAGES * PAGE)],
        disks: vec![("disk".to_owned(), BLOCKS * PAGE)],
        config: guest.to_le_bytes().to_vec(),
    }
}

struct Inner {
    /// `None`: ended.
    running: Option<bool>,
    dirty: Bitmap,
    random: StdRng,
}

struct Core {
    place: Place,
    room: Arc<Room>,
    inner: Mutex<Inner>,
    ram: File,
    disk: Arc<TrackedDisk>,
}

impl Core {
    /// Some writes, if it runs.
    fn step(&self) {
        let mut inner = self.inner.lock().unwrap();
        if inner.running != Some(true) || !self.room.lives(&self.place) {
            return;
        }
        let mut content = [0; PAGE as usize];
        for _ in 0..inner.random.random_range(0..4) {
            let page = inner.random.random_range(0..PAGES);
            fill(&mut inner.random, &mut content);
            self.ram.write_all_at(&content, page * PAGE).unwrap();
            inner.dirty.set(page);
        }
        for _ in 0..inner.random.random_range(0..3) {
            let block = inner.random.random_range(0..BLOCKS);
            fill(&mut inner.random, &mut content);
            self.disk.write(block * PAGE, &content).unwrap();
        }
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; (PAGES * PAGE) as usize];
        self.ram.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn content(&self) -> std::io::Result<[blake3::Hash; 2]> {
        let mut disk = vec![0; (BLOCKS * PAGE) as usize];
        self.disk.read(0, &mut disk)?;
        Ok([blake3::hash(&self.memory()), blake3::hash(&disk)])
    }

    fn turn(&self, to: Option<bool>) {
        let mut inner = self.inner.lock().unwrap();
        if inner.running.is_none() || inner.running == to {
            return;
        }
        inner.running = to;
        self.room.turned(&self.place, to);
    }
}

/// Noise, zeros, or one of a few contents that guests share.
fn fill(random: &mut StdRng, content: &mut [u8]) {
    match random.random_range(0..10) {
        0 => content.fill(0),
        1 | 2 => {
            let which: u8 = random.random_range(1..6);
            content.fill(which);
        }
        3..6 => {
            content.fill(7);
            let at = random.random_range(0..content.len() - 64);
            random.fill_bytes(&mut content[at..at + 64]);
        }
        _ => random.fill_bytes(content),
    }
}

async fn work(core: Weak<Core>, mut random: StdRng, busy: u64) {
    loop {
        tokio::time::sleep(Duration::from_millis(random.random_range(1..busy))).await;
        match core.upgrade() {
            Some(core) => core.step(),
            None => return,
        }
    }
}

/// The monitor of one guest.
pub struct Monitor {
    core: Arc<Core>,
    blocks: [RamBlock; 1],
    disks: [Arc<TrackedDisk>; 1],
}

impl Monitor {
    fn new(place: Place, room: Arc<Room>, ram: &Path, disk: Arc<TrackedDisk>) -> Self {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(ram).unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        let seed = room.draw();
        let core = Arc::new(Core {
            place,
            room: room.clone(),
            inner: Mutex::new(Inner {
                running: Some(false),
                dirty: Bitmap::none(PAGES),
                random: StdRng::seed_from_u64(seed),
            }),
            ram: file,
            disk: disk.clone(),
        });
        let random = StdRng::seed_from_u64(seed ^ 1);
        tokio::spawn(work(Arc::downgrade(&core), random, room.busy()));
        Self {
            core,
            blocks: [RamBlock {
                name: "ram".to_owned(),
                bytes: PAGES * PAGE,
            }],
            disks: [disk],
        }
    }

    /// A guest of a program at this site, in a directory: it stands still yet.
    pub fn start(place: Place, room: Arc<Room>, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        let image = directory.join("disk.img");
        let disk = TrackedDisk::open("disk", &image, BLOCKS * PAGE).unwrap();
        // Its memory is what it was made of anew.
        let _ = std::fs::remove_file(directory.join("ram"));
        Self::new(place, room, &directory.join("ram"), disk)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.core.turn(None);
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
        if self.core.room.refuses(&self.core.place) {
            // Not one that is tried again at once: time stands still in such a try.
            return Err(VmmError::Kvm {
                call: "stopping vCPU 0".to_owned(),
                why: "it does not stop, as the run has it".to_owned(),
            });
        }
        if !self.core.room.ignores_stop() {
            self.core.turn(Some(false));
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.core.turn(Some(true));
        Ok(())
    }

    fn running(&self) -> Option<bool> {
        self.core.inner.lock().unwrap().running
    }

    fn ended_because(&self) -> String {
        "it was told to".to_owned()
    }

    fn dirty(&mut self, _block: usize) -> Result<Bitmap, VmmError> {
        let mut inner = self.core.inner.lock().unwrap();
        let mut dirty = inner.dirty.take();
        if self.core.room.forgets_page()
            && let Some((first, _)) = dirty.run_from(0, 1)
        {
            dirty.clear(first);
        }
        Ok(dirty)
    }

    fn read_ram(&self, _block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        let read = self.core.ram.read_exact_at(into, offset);
        read.map_err(|source| VmmError::Io {
            what: "reading memory".to_owned(),
            source,
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let content = self.core.content().map_err(|source| VmmError::Io {
            what: "reading the disk".to_owned(),
            source,
        })?;
        let number = self.core.room.keep_instant(&self.core.place, content);
        let mut state = number.to_le_bytes().to_vec();
        // As long as a state is by chance, of bytes that follow from the number.
        state.resize(NUMBER + (number * 977 % 6_000) as usize, number as u8);
        Ok(state)
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmmError> {
        Ok(())
    }

    fn end(&mut self) {
        self.core.turn(None);
    }
}

/// Builds guests that peers send, for one process.
struct SimulatedBuilder {
    room: Arc<Room>,
    side: usize,
    process: u64,
}

/// The builders of a process of a site.
pub fn builders(room: &Arc<Room>, side: usize, process: u64) -> Builders {
    let builder: Arc<dyn Builder> = Arc::new(SimulatedBuilder {
        room: room.clone(),
        side,
        process,
    });
    Builders::from([(KIND.to_owned(), builder)])
}

impl Builder for SimulatedBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let failed = |e: std::io::Error| MachineError::Other(e.to_string());
        let config = plan.definition.config.as_slice().try_into();
        let config = config.map_err(|_| MachineError::Other("no number".to_owned()))?;
        let (Some(below), Some(ram)) = (plan.disks.first(), plan.ram.first()) else {
            return Err(MachineError::Other("it has no disk".to_owned()));
        };
        let image = plan.run.join("disk.img");
        let disk = TrackedDisk::above("disk", &image, below.clone()).map_err(failed)?;
        let place = Place {
            guest: u32::from_le_bytes(config),
            side: self.side,
            process: self.process,
            test: plan.isolated,
            machine: self.room.machine(),
        };
        let monitor = Monitor::new(place, self.room.clone(), ram, disk.clone());
        Ok(Box::new(SimulatedMachine {
            core: monitor.core.clone(),
            monitor: Arc::new(Mutex::new(monitor)),
            disk,
        }))
    }

    fn can_isolate(&self) -> bool {
        true
    }

    fn check(&self, _definition: &Definition) -> Vec<Finding> {
        Vec::new()
    }
}

struct SimulatedMachine {
    core: Arc<Core>,
    monitor: Arc<Mutex<Monitor>>,
    disk: Arc<TrackedDisk>,
}

impl Machine for SimulatedMachine {
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError> {
        for below in disks {
            let replaced = self.disk.replace_below(below);
            replaced.map_err(|e| MachineError::Other(e.to_string()))?;
        }
        Ok(())
    }

    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError> {
        let number = number_of(device_state);
        let number = number.ok_or_else(|| MachineError::Other("no number".to_owned()))?;
        let content = self.core.content();
        let content = content.map_err(|e| MachineError::Other(e.to_string()))?;
        self.core.room.restored(&self.core.place, number, &content);
        Ok(())
    }

    fn run(&mut self) -> Result<(), MachineError> {
        Ok(lock(&self.monitor).resume()?)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError> {
        let begun = self.disk.hydrate(bytes_per_second);
        begun.map_err(|e| MachineError::Other(e.to_string()))
    }

    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError> {
        Ok(vec![self.disk.hydration()])
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(lock(&self.monitor).pause()?)
    }

    fn is_running(&mut self) -> Result<bool, MachineError> {
        Ok(lock(&self.monitor).running() == Some(true))
    }

    fn kill(self: Box<Self>) {
        lock(&self.monitor).end();
        self.disk.end();
    }

    fn vmm(&self) -> Option<SharedVmm> {
        Some(self.monitor.clone())
    }
}

/// The instant that a device state is of.
pub fn number_of(device_state: &[u8]) -> Option<u64> {
    device_state
        .first_chunk::<NUMBER>()
        .map(|bytes| u64::from_le_bytes(*bytes))
}
