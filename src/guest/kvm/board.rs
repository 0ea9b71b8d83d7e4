//! The devices of our own machine, all at ports, all polled: a serial console,
//! a disk of 4 KiB blocks, a clock, what the workload is asked for, and a way
//! to end.
//!
//! ```text
//! 0x3f8..0x400  16550 serial console
//! OUT 0x600     disk: number of a 4 KiB block
//! OUT 0x604     disk: guest address of a 4 KiB buffer
//! OUT 0x608     disk: 1 read, 2 write, 3 flush, one at a time; done when it returns
//! IN  0x608     disk: 0 when the last command went well, else 1
//! IN  0x60c     disk: number of blocks; 0 where there is none
//! IN  0x610     clock: milliseconds the guest has been running
//! IN  0x614     wanted changes a second; 0x618 pages, 0x61c blocks to work on
//! OUT 0x620     the guest ends
//! ```
//!
//! All but the console has 32 bits. A port where nothing is reads as ones.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::dirty::TrackedMemory;
use super::protected::DeviceState;
use crate::guest::embedded::VmmError;
use crate::guest::embedded::console::Console;
use crate::guest::embedded::disk::TrackedDisk;

const SERIAL: u16 = 0x3f8;
const BLOCK: usize = 4096;
/// Where the serial line status stands.
const LINE_STATUS: u16 = 5;
/// Version of the devices' saved form.
const VERSION: u16 = 1;

/// Where the serial console goes.
pub trait Terminal: Send + Sync {
    /// The guest wrote this.
    fn write(&self, bytes: &[u8]);
    /// The next byte typed, if there is one.
    fn typed(&self) -> Option<u8>;
}

impl Terminal for Console {
    fn write(&self, bytes: &[u8]) {
        Console::write(self, bytes);
    }

    fn typed(&self) -> Option<u8> {
        Console::typed(self)
    }
}

/// What the guest's program is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pace {
    /// Changes a second.
    pub changes: u32,
    /// Pages it works on.
    pub pages: u32,
    /// Disk blocks it works on.
    pub blocks: u32,
}

/// What a write to a port asks of the machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    Shutdown,
}

/// All devices, shared by the vCPUs' threads.
#[derive(Clone)]
pub(super) struct Board(Arc<Mutex<Devices>>);

struct Devices {
    memory: TrackedMemory,
    disk: Option<Arc<TrackedDisk>>,
    terminal: Arc<dyn Terminal>,
    serial: Serial<NoInterrupt, NoEvents, Output>,
    registers: Registers,
    /// Since when the clock runs; nothing while the guest stands.
    since: Option<Instant>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    block: u32,
    buffer: u32,
    failed: bool,
    /// Nanoseconds the guest had been running when it was last stopped.
    ran: u64,
    pace: Pace,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u16,
    registers: Registers,
    /// The 16550's registers, from the divisor's low byte to scratch.
    serial: [u8; 9],
    #[serde(with = "serde_bytes")]
    received: Vec<u8>,
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

struct Output(Arc<dyn Terminal>);

impl std::io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Board {
    pub(super) fn new(
        memory: TrackedMemory,
        disk: Option<Arc<TrackedDisk>>,
        terminal: Arc<dyn Terminal>,
        pace: Pace,
    ) -> Self {
        Self(Arc::new(Mutex::new(Devices {
            memory,
            disk,
            serial: Serial::new(NoInterrupt, Output(terminal.clone())),
            terminal,
            registers: Registers {
                pace,
                ..Registers::default()
            },
            since: None,
        })))
    }

    /// The guest writes a port. Several accesses of a string instruction come at
    /// once; but a command is one access: a vCPU that does a thousand for one
    /// exit could not be stopped in between.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Asked {
        if port == 0x608 {
            self.command(data);
            return Asked::Nothing;
        }
        let mut devices = self.lock();
        if let Some(offset) = serial_register(port) {
            for byte in data {
                // The terminal takes all, and there is no interrupt: no error is possible.
                let _ = devices.serial.write(offset, *byte);
            }
            return Asked::Nothing;
        }
        for value in data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|four| u32::from_le_bytes(*four))
        {
            match port {
                0x600 => devices.registers.block = value,
                0x604 => devices.registers.buffer = value,
                0x620 => return Asked::Shutdown,
                _ => {}
            }
        }
        Asked::Nothing
    }

    /// The guest reads a port.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) {
        let mut devices = self.lock();
        if let Some(offset) = serial_register(port) {
            for byte in data {
                *byte = devices.read_serial(offset);
            }
            return;
        }
        let (chunks, rest) = data.as_chunks_mut::<4>();
        rest.fill(0xff);
        for four in chunks {
            let pace = devices.registers.pace;
            let value = match port {
                0x608 => u32::from(devices.registers.failed),
                0x60c => devices.blocks(),
                // It begins anew after 49 days.
                0x610 => devices.ran().as_millis() as u32,
                0x614 => pace.changes,
                0x618 => pace.pages,
                0x61c => pace.blocks,
                _ => u32::MAX,
            };
            *four = value.to_le_bytes();
        }
    }

    /// Does what the disk is told. Takes as long as the disk does, and nobody
    /// waits for that but the vCPU that asked.
    fn command(&self, data: &[u8]) {
        let done = match data.as_chunks::<4>() {
            ([], _) => return,
            ([command], _) => {
                let order = self.lock().order(u32::from_le_bytes(*command));
                order.and_then(Order::perform)
            }
            _ => None,
        };
        self.lock().registers.failed = done.is_none();
    }

    fn lock(&self) -> MutexGuard<'_, Devices> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL).filter(|offset| *offset < 8)?;
    u8::try_from(offset).ok()
}

impl Devices {
    fn read_serial(&mut self, offset: u8) -> u8 {
        // A typed byte is fetched when the guest looks for it, no sooner.
        if matches!(u16::from(offset), 0 | LINE_STATUS)
            && self.serial.fifo_capacity() > 0
            && self.serial.state().in_buffer.is_empty()
            && let Some(byte) = self.terminal.typed()
        {
            // There is room.
            let _ = self.serial.enqueue_raw_bytes(&[byte]);
        }
        self.serial.read(offset)
    }

    fn blocks(&self) -> u32 {
        let blocks = |disk: &Arc<TrackedDisk>| disk.bytes() / BLOCK as u64;
        let blocks = self.disk.as_ref().map_or(0, blocks);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// A command with all it needs; nothing when it cannot be done.
    fn order(&self, command: u32) -> Option<Order> {
        let disk = self.disk.clone()?;
        (self.registers.block < self.blocks()).then(|| Order {
            command,
            disk,
            memory: self.memory.clone(),
            offset: u64::from(self.registers.block) * BLOCK as u64,
            buffer: GuestAddress(u64::from(self.registers.buffer)),
        })
    }

    fn ran(&self) -> Duration {
        let now = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        Duration::from_nanos(self.registers.ran) + now
    }
}

/// A command for the disk.
struct Order {
    command: u32,
    disk: Arc<TrackedDisk>,
    memory: TrackedMemory,
    offset: u64,
    buffer: GuestAddress,
}

impl Order {
    /// Nothing when it fails.
    fn perform(self) -> Option<()> {
        let mut block = [0; BLOCK];
        match self.command {
            1 => {
                self.disk.read(self.offset, &mut block).ok()?;
                self.memory.write_slice(&block, self.buffer).ok()
            }
            2 => {
                self.memory.read_slice(&mut block, self.buffer).ok()?;
                self.disk.write(self.offset, &block).ok()
            }
            3 => self.disk.flush().ok(),
            _ => None,
        }
    }
}

impl Saved {
    /// From bytes of a peer.
    fn read(bytes: &[u8]) -> Result<Self, VmmError> {
        let refused = |why: String| VmmError::State(format!("the devices' part: {why}"));
        let saved: Self =
            ciborium::from_reader(bytes).map_err(|error| refused(error.to_string()))?;
        if saved.version != VERSION {
            return Err(refused(format!(
                "it is of version {}, and this Farhaven reads version {VERSION}",
                saved.version
            )));
        }
        Ok(saved)
    }
}

/// The devices' part alone.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(bytes: &[u8]) {
    let _ = Saved::read(bytes);
}

impl DeviceState for Board {
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let devices = self.lock();
        let serial = devices.serial.state();
        let saved = Saved {
            version: VERSION,
            registers: devices.registers,
            serial: [
                serial.baud_divisor_low,
                serial.baud_divisor_high,
                serial.interrupt_enable,
                serial.interrupt_identification,
                serial.line_control,
                serial.line_status,
                serial.modem_control,
                serial.modem_status,
                serial.scratch,
            ],
            received: serial.in_buffer,
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&saved, &mut bytes)
            .map_err(|error| VmmError::State(format!("the devices' part: {error}")))?;
        Ok(bytes)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VmmError> {
        let refused = |why: String| VmmError::State(format!("the devices' part: {why}"));
        let saved = Saved::read(bytes)?;
        let [
            low,
            high,
            enable,
            identification,
            line,
            status,
            modem,
            lines,
            scratch,
        ] = saved.serial;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status: lines,
            scratch,
            in_buffer: saved.received,
        };
        let mut devices = self.lock();
        let output = Output(devices.terminal.clone());
        devices.serial = Serial::from_state(&state, NoInterrupt, NoEvents, output)
            .map_err(|error| refused(format!("serial console: {error:?}")))?;
        devices.registers = saved.registers;
        devices.since = None;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        let mut devices = self.lock();
        devices.registers.ran = u64::try_from(devices.ran().as_nanos()).unwrap_or(u64::MAX);
        devices.since = None;
        Ok(())
    }

    fn resume(&mut self) {
        self.lock().since = Some(Instant::now());
    }
}
