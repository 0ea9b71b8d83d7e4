//! The sim guest's monitor: a thread that makes the program's steps, one at a
//! time under a short lock, and notes which pages they write.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farhaven_storage_sync::unit::UNIT;
use serde::{Deserialize, Serialize};

use super::VERSION;
use super::content::Content;
use super::mutator::{Mutator, Registers, World};
use crate::guest::embedded::console::Console;
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Bitmap, RamBlock, Vmm, VmmError};

/// The program's steps are made up to the clock this often.
const TICK: Duration = Duration::from_millis(10);
/// A heartbeat, in microseconds of the guest's clock.
const BEAT: u64 = 100_000;
/// Steps of so much time are made up for after a delay; more are left out.
const BACKLOG: f64 = 0.1;
/// Items looked at in a tick, always.
const LOOKS: u64 = 8;
/// Items of a full check looked at under one lock, and how long at a stretch.
const FULL_LOOKS: u64 = 32;
const STRETCH: Duration = Duration::from_millis(20);
/// Longest saved state.
const MOST_STATE: usize = 16 << 10;

/// A sim guest's monitor. Dropping it ends the guest.
pub(super) struct SimVmm {
    blocks: Vec<RamBlock>,
    disks: Vec<Arc<TrackedDisk>>,
    ram: Arc<File>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    guest: Mutex<Running>,
    /// Something of `Running` changed.
    changed: Condvar,
    /// Somebody wants the lock to stop the guest: no further step is begun.
    pausing: AtomicBool,
}

struct Running {
    mutator: Mutator,
    hardware: Hardware,
    console: Console,
    runs: bool,
    ended: Option<String>,
    throttle: u8,
}

/// Memory and disks with what was written.
struct Hardware {
    ram: Arc<File>,
    dirty: Bitmap,
    disks: Vec<Arc<TrackedDisk>>,
}

impl World for Hardware {
    fn read_page(&mut self, page: u64, into: &mut Content) -> io::Result<()> {
        self.ram.read_exact_at(into, page * UNIT as u64)
    }

    fn write_page(&mut self, page: u64, content: &Content) -> io::Result<()> {
        self.dirty.set(page);
        self.ram.write_all_at(content, page * UNIT as u64)
    }

    fn read_block(&mut self, disk: usize, block: u64, into: &mut Content) -> io::Result<()> {
        self.disk(disk)?.read(block * UNIT as u64, into)
    }

    fn write_blocks(&mut self, disk: usize, block: u64, content: &[u8]) -> io::Result<()> {
        self.disk(disk)?.write(block * UNIT as u64, content)
    }
}

impl Hardware {
    fn disk(&self, index: usize) -> io::Result<&TrackedDisk> {
        let disk = self.disks.get(index).map(AsRef::as_ref);
        disk.ok_or_else(|| io::Error::other("no such disk"))
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u8,
    registers: Registers,
}

impl Saved {
    /// From bytes of a peer.
    fn read(device_state: &[u8]) -> Result<Self, VmmError> {
        if device_state.len() > MOST_STATE {
            return Err(VmmError::State(
                "it is longer than any of a sim guest".to_owned(),
            ));
        }
        let saved: Self = ciborium::from_reader(device_state)
            .map_err(|error| VmmError::State(format!("it cannot be read: {error}")))?;
        if saved.version != VERSION {
            return Err(VmmError::State(format!(
                "it has version {}, this site knows {VERSION}; bring both sites to one version of farhaven",
                saved.version
            )));
        }
        if !saved.registers.plausible() {
            return Err(VmmError::State(
                "its registers cannot be a sim guest's".to_owned(),
            ));
        }
        Ok(saved)
    }
}

/// A device state of a peer alone.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(device_state: &[u8]) {
    let _ = Saved::read(device_state);
}

impl SimVmm {
    /// A guest that stands still.
    pub(super) fn new(
        mutator: Mutator,
        ram: File,
        ram_bytes: u64,
        disks: Vec<Arc<TrackedDisk>>,
        console: Console,
    ) -> io::Result<Self> {
        let ram = Arc::new(ram);
        let shared = Arc::new(Shared {
            guest: Mutex::new(Running {
                hardware: Hardware {
                    ram: ram.clone(),
                    dirty: Bitmap::none(mutator.layout.pages),
                    disks: disks.clone(),
                },
                mutator,
                console,
                runs: false,
                ended: None,
                throttle: 0,
            }),
            changed: Condvar::new(),
            pausing: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new()
            .name("sim-guest".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.run()
            })?;
        Ok(Self {
            blocks: vec![RamBlock {
                name: "ram".to_owned(),
                bytes: ram_bytes,
            }],
            disks,
            ram,
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn set_running(&self, runs: bool) {
        if !runs {
            self.shared.pausing.store(true, Ordering::SeqCst);
        }
        let mut guest = self.shared.guest();
        guest.runs = runs && guest.ended.is_none();
        self.shared.pausing.store(false, Ordering::SeqCst);
        drop(guest);
        self.shared.changed.notify_all();
    }

    /// Takes up another guest's registers, its memory and disks being in place.
    pub(super) fn restore(&self, device_state: &[u8]) -> Result<(), VmmError> {
        let saved = Saved::read(device_state)?;
        self.shared.guest().mutator.registers = saved.registers;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn registers(&self) -> Registers {
        self.shared.guest().mutator.registers.clone()
    }
}

impl Vmm for SimVmm {
    fn ram(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.disks
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.set_running(false);
        match &self.shared.guest().ended {
            None => Ok(()),
            Some(why) => Err(VmmError::Ended(why.clone())),
        }
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.set_running(true);
        match &self.shared.guest().ended {
            None => Ok(()),
            Some(why) => Err(VmmError::Ended(why.clone())),
        }
    }

    fn running(&self) -> Option<bool> {
        if self
            .thread
            .as_ref()
            .is_none_or(|thread| thread.is_finished())
        {
            return None;
        }
        let guest = self.shared.guest();
        guest.ended.is_none().then_some(guest.runs)
    }

    fn ended_because(&self) -> String {
        let why = self.shared.guest().ended.clone();
        match (self.running(), why) {
            (Some(_), _) => String::new(),
            (None, Some(why)) => why,
            (None, None) => "its thread failed; see the log, and start it anew".to_owned(),
        }
    }

    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError> {
        if block != 0 {
            return Err(VmmError::State(format!(
                "there is no block {block} of memory"
            )));
        }
        Ok(self.shared.guest().hardware.dirty.take())
    }

    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        let end = offset.checked_add(into.len() as u64);
        let within = self
            .blocks
            .get(block)
            .zip(end)
            .is_some_and(|(b, end)| end <= b.bytes);
        let read = match within {
            true => self.ram.read_exact_at(into, offset),
            false => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        read.map_err(|source| VmmError::Io {
            what: format!("reading {} bytes of guest memory at {offset}", into.len()),
            source,
        })
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let saved = Saved {
            version: VERSION,
            registers: self.shared.guest().mutator.registers.clone(),
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&saved, &mut bytes)
            .map_err(|error| VmmError::State(format!("the registers: {error}")))?;
        Ok(bytes)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.shared.guest().throttle = percent.min(99);
        Ok(())
    }

    fn end(&mut self) {
        let mut guest = self.shared.guest();
        guest.runs = false;
        guest.ended.get_or_insert_with(|| "it was ended".to_owned());
        drop(guest);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended too.
            let _ = thread.join();
        }
    }
}

impl Drop for SimVmm {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, Running> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's thread.
    fn run(&self) {
        let mut due = 0.0;
        let mut last = Instant::now();
        loop {
            let mut guest = self.guest();
            if guest.ended.is_some() {
                return;
            }
            if !guest.runs {
                // Its clock stands still.
                drop(
                    self.changed
                        .wait(guest)
                        .unwrap_or_else(PoisonError::into_inner),
                );
                last = Instant::now();
                continue;
            }
            let passed = last.elapsed();
            last += passed;
            guest.mutator.registers.clock += passed.as_micros() as u64;
            let rate = guest.mutator.rate() * f64::from(100 - guest.throttle) / 100.0;
            due = (due + passed.as_secs_f64() * rate).min((rate * BACKLOG).max(1.0));
            guest.tick();
            drop(guest);
            while due >= 1.0 && self.step() {
                due -= 1.0;
            }
            let busy = self.check_all();
            let guest = self.guest();
            if guest.runs && !busy {
                drop(self.changed.wait_timeout(guest, TICK));
            }
        }
    }

    /// Goes on with the full check that was asked for; whether there is more of it.
    fn check_all(&self) -> bool {
        let begun = Instant::now();
        while !self.pausing.load(Ordering::SeqCst) && begun.elapsed() < STRETCH {
            let mut guest = self.guest();
            let Running {
                mutator,
                hardware,
                console,
                runs,
                ..
            } = &mut *guest;
            if !*runs || mutator.registers.checking.is_none() {
                return false;
            }
            if let Some(line) = mutator.check_all(FULL_LOOKS, hardware) {
                console.write(line.as_bytes());
            }
        }
        true
    }

    /// Makes a step, if the guest still runs and nobody waits to stop it.
    fn step(&self) -> bool {
        if self.pausing.load(Ordering::SeqCst) {
            return false;
        }
        let mut guest = self.guest();
        if guest.runs {
            let Running {
                mutator, hardware, ..
            } = &mut *guest;
            mutator.step(hardware);
        }
        guest.runs
    }
}

impl Running {
    /// What comes with time: looks around, heartbeats, and what was typed.
    fn tick(&mut self) {
        let Running {
            mutator,
            hardware,
            console,
            ..
        } = self;
        mutator.check_some(LOOKS, hardware);
        while let Some(typed) = console.typed() {
            if typed == b'c' && mutator.registers.checking.is_none() {
                mutator.registers.checking = Some(0);
            }
        }
        if mutator.registers.clock / BEAT > mutator.registers.beats {
            let line = mutator.beat();
            console.write(line.as_bytes());
            // Beats that were missed are not made up for.
            mutator.registers.beats = mutator.registers.beats.max(mutator.registers.clock / BEAT);
        }
    }
}
