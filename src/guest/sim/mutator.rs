//! The sim guest's program, apart from threads and clocks: step by step it
//! changes memory and disks, and every byte of them follows from a few
//! registers. So any page or block that is lost, torn, stale or too new is
//! found by [`Mutator::check`], and so are memory, disks and registers of
//! different instants.
//!
//! A transaction is an intent in memory, then a page, a block of the log and
//! now and then one of the checkpoint, in an order that alternates, then the
//! intent's end: five steps, and the guest may be cut between any two.

use std::io;

use serde::{Deserialize, Serialize};

use super::content::{Content, blend, noise, still_block, still_page, table, text};
use super::layout::{FILE_BLOCKS, Layout, Workload};
use farhaven_storage_sync::unit::UNIT;

/// Steps of a transaction.
const PHASES: u8 = 5;
/// Every so many transactions a block of the checkpoint is written.
const CHECKPOINT: u64 = 8;
/// Blocks of a file written in a step.
const CHUNK: u64 = 16;
/// Steps of a change of a file: each chunk on disk and in memory.
const FILE_PHASES: u8 = (FILE_BLOCKS / CHUNK * 2) as u8;
/// Pages of noise in a step.
const NOISE: u64 = 16;
/// Larger numbers are no state of a guest, at any rate, in any life.
const MOST: u64 = 1 << 48;
/// Longest word for a fault.
const LONGEST_FAULT: usize = 200;

/// Memory and disks, as the program sees them.
pub(super) trait World {
    fn read_page(&mut self, page: u64, into: &mut Content) -> io::Result<()>;
    fn write_page(&mut self, page: u64, content: &Content) -> io::Result<()>;
    fn read_block(&mut self, disk: usize, block: u64, into: &mut Content) -> io::Result<()>;
    /// Whole blocks from `block` on.
    fn write_blocks(&mut self, disk: usize, block: u64, content: &[u8]) -> io::Result<()>;
}

/// All that the guest is beside memory and disks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    /// Steps made.
    pub(super) steps: u64,
    /// Transactions that have ended.
    transactions: u64,
    /// Steps made of the next.
    phase: u8,
    /// Changes of files that have ended.
    files: u64,
    /// Steps made of the next.
    file_phase: u8,
    /// Pages of noise written.
    noise: u64,
    /// Microseconds that the guest has been running.
    pub(super) clock: u64,
    pub(super) beats: u64,
    /// Where the check that never ends is.
    look: u64,
    /// Where the full check is that was asked for.
    pub(super) checking: Option<u64>,
    memory_fault: Option<String>,
    disk_fault: Option<String>,
}

impl Registers {
    /// Bytes of a peer: are they a guest's at all?
    pub(super) fn plausible(&self) -> bool {
        let numbers = [
            self.steps,
            self.transactions,
            self.files,
            self.noise,
            self.clock,
            self.beats,
            self.look,
            self.checking.unwrap_or(0),
        ];
        let faults = [&self.memory_fault, &self.disk_fault];
        numbers.iter().all(|number| *number < MOST)
            && self.phase < PHASES
            && self.file_phase < FILE_PHASES
            && faults
                .into_iter()
                .flatten()
                .all(|f| f.len() <= LONGEST_FAULT)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Intent,
    Log,
    Page,
    Block,
    End,
}

impl Operation {
    /// In which order transaction `number` makes its steps.
    fn order(number: u64) -> [Operation; PHASES as usize] {
        use Operation::{Block, End, Intent, Log, Page};
        match number % 3 {
            0 => [Intent, Log, Page, Block, End],
            1 => [Intent, Page, Log, Block, End],
            _ => [Intent, Block, Log, Page, End],
        }
    }
}

/// The program and its registers.
pub(super) struct Mutator {
    seed: u64,
    workload: Workload,
    pub(super) layout: Layout,
    pub(super) registers: Registers,
}

impl Mutator {
    pub(super) fn new(seed: u64, workload: Workload, layout: Layout) -> Self {
        Self {
            seed,
            workload,
            layout,
            registers: Registers::default(),
        }
    }

    /// Steps to make in a second.
    pub(super) fn rate(&self) -> f64 {
        let phases = f64::from(PHASES);
        let per_megabyte = 1e6 / (CHUNK as f64 * UNIT as f64);
        match self.workload {
            Workload::Idle => 10.0 * phases,
            Workload::Database(rate) => f64::from(rate) * phases,
            // Memory takes as many steps as the disk.
            Workload::Files(rate) => f64::from(rate) * per_megabyte * 2.0 * 8.0 / 7.0,
            Workload::Noise(rate) => f64::from(rate) * per_megabyte * 16.0 / 15.0,
        }
    }

    /// Makes the next step. Which it is, and what it writes, follows from the
    /// seed and the registers alone.
    pub(super) fn step(&mut self, world: &mut dyn World) {
        let turn = self.registers.steps;
        let made = match self.workload {
            Workload::Files(_) if !turn.is_multiple_of(8) => self.change_file(world),
            Workload::Noise(_) if !turn.is_multiple_of(16) => self.make_noise(world),
            _ => self.transact(world),
        };
        self.registers.steps += 1;
        if let Err(error) = made {
            self.fault(false, Err(format!("write-failed-{error}")));
        }
    }

    fn transact(&mut self, world: &mut dyn World) -> io::Result<()> {
        let number = self.registers.transactions + 1;
        let phase = usize::from(self.registers.phase);
        let operation = Operation::order(number)[phase.min(usize::from(PHASES) - 1)];
        let disks = self.layout.disks.len() as u64;
        let target = match operation {
            Operation::Intent | Operation::End => Some((None, 0)),
            Operation::Page => {
                let region = self.layout.table;
                Some((None, region.first + region.place(number)))
            }
            Operation::Log if disks > 0 => {
                let disk = (number % disks) as usize;
                let region = self.layout.disks[disk].log;
                let turn = turns(number, disk as u64, disks);
                let item = turn.wrapping_sub(1) & region.count.saturating_sub(1);
                Some((Some(disk), region.first + item))
            }
            Operation::Block if disks > 0 && number.is_multiple_of(CHECKPOINT) => {
                let number = number / CHECKPOINT;
                let disk = (number % disks) as usize;
                let region = self.layout.disks[disk].table;
                let turn = turns(number, disk as u64, disks);
                Some((Some(disk), region.first + region.place(turn)))
            }
            Operation::Log | Operation::Block => None,
        };
        // What is overwritten is looked at first: on a disk that is newer than
        // memory it is there already.
        if let Some((disk, at)) = target {
            let before = match disk {
                None => self.check_page(at, world),
                Some(disk) => self.check_block(disk, at, world),
            };
            self.fault(disk.is_none(), before);
        }
        self.registers.phase += 1;
        let mut content = [0; UNIT];
        let written = match target {
            None => Ok(()),
            Some((None, page)) => {
                self.page(page, &mut content);
                world.write_page(page, &content)
            }
            Some((Some(disk), block)) => {
                self.block(disk, block, &mut content);
                world.write_blocks(disk, block, &content)
            }
        };
        if self.registers.phase == PHASES {
            self.registers.phase = 0;
            self.registers.transactions += 1;
        }
        written
    }

    fn change_file(&mut self, world: &mut dyn World) -> io::Result<()> {
        let disks = self.layout.disks.len() as u64;
        let number = self.registers.files + 1;
        let disk = number.checked_rem(disks).unwrap_or(0) as usize;
        let written = match self.layout.disks.get(disk).map(|d| (d.files, d.files_at)) {
            Some((files, files_at)) if files.count > 0 => {
                let file = files.place(turns(number, disk as u64, disks));
                let chunk = u64::from(self.registers.file_phase / 2);
                let first = file * FILE_BLOCKS + chunk * CHUNK;
                let on_disk = on_disk(number, self.registers.file_phase);
                self.registers.file_phase += 1;
                if on_disk {
                    self.write_chunk(disk, files_at + first, world)
                } else if disk == 0 && file < self.layout.cached_files {
                    let pages = self.layout.cache_at + first..;
                    let mut content = [0; UNIT];
                    pages.take(CHUNK as usize).try_for_each(|page| {
                        self.page(page, &mut content);
                        world.write_page(page, &content)
                    })
                } else {
                    Ok(())
                }
            }
            _ => {
                self.registers.file_phase += 1;
                Ok(())
            }
        };
        if self.registers.file_phase == FILE_PHASES {
            self.registers.file_phase = 0;
            self.registers.files += 1;
        }
        written
    }

    fn write_chunk(&self, disk: usize, first: u64, world: &mut dyn World) -> io::Result<()> {
        let mut bytes = vec![0; CHUNK as usize * UNIT];
        for (block, content) in (first..).zip(bytes.as_chunks_mut::<UNIT>().0) {
            self.block(disk, block, content);
        }
        world.write_blocks(disk, first, &bytes)
    }

    fn make_noise(&mut self, world: &mut dyn World) -> io::Result<()> {
        let region = self.layout.noise;
        let mut content = [0; UNIT];
        for _ in 0..NOISE {
            self.registers.noise += 1;
            let page = region.first + region.place(self.registers.noise);
            self.page(page, &mut content);
            world.write_page(page, &content)?;
        }
        Ok(())
    }

    /// Transactions whose operation of this kind was made.
    fn made(&self, operation: Operation) -> u64 {
        let done = self.registers.transactions;
        let order = Operation::order(done + 1);
        let this = order
            .iter()
            .take(usize::from(self.registers.phase))
            .any(|made| *made == operation);
        done + u64::from(this)
    }

    /// What a page of memory holds now.
    pub(super) fn page(&self, page: u64, out: &mut Content) {
        let layout = &self.layout;
        if page == 0 {
            let (begun, ended) = (self.made(Operation::Intent), self.made(Operation::End));
            table(blend(&[self.seed, 10]), 0, begun + ended, out);
        } else if let Some(item) = layout.table.item(page) {
            let last = layout.table.last(item, self.made(Operation::Page));
            table(blend(&[self.seed, 11]), item, last, out);
        } else if let Some(item) = layout.noise.item(page) {
            match layout.noise.last(item, self.registers.noise) {
                0 => out.fill(0),
                last => noise(blend(&[self.seed, 12, last]), out),
            }
        } else if page < layout.still_page() {
            self.file_block(0, page - layout.cache_at, false, out);
        } else {
            let on_disk = layout.disks.first().map(|disk| disk.still_block());
            still_page(self.seed, page, on_disk, out);
        }
    }

    /// What a block of a disk holds now.
    pub(super) fn block(&self, disk: usize, block: u64, out: &mut Content) {
        let number = disk as u64;
        let disks = self.layout.disks.len() as u64;
        let Some(layout) = self.layout.disks.get(disk) else {
            out.fill(0);
            return;
        };
        if let Some(item) = layout.log.item(block) {
            let done = turns(self.made(Operation::Log), number, disks);
            let last = layout.log.last_around(item, done);
            table(blend(&[self.seed, 13, number]), item, last, out);
        } else if let Some(item) = layout.table.item(block) {
            let done = turns(self.made(Operation::Block) / CHECKPOINT, number, disks);
            let last = layout.table.last(item, done);
            table(blend(&[self.seed, 14, number]), item, last, out);
        } else if block < layout.still_block() {
            self.file_block(disk, block - layout.files_at, true, out);
        } else {
            still_block(self.seed, number, block, out);
        }
    }

    /// What a block of the files holds now, on disk or in memory.
    fn file_block(&self, disk: usize, block: u64, disk_side: bool, out: &mut Content) {
        let Some(layout) = self.layout.disks.get(disk) else {
            out.fill(0);
            return;
        };
        let (number, disks) = (disk as u64, self.layout.disks.len() as u64);
        let (file, chunk) = (block / FILE_BLOCKS, block % FILE_BLOCKS / CHUNK);
        let current = self.registers.files + 1;
        let of_current = turns(current, number, disks);
        let concerns =
            current.checked_rem(disks) == Some(number) && layout.files.place(of_current) == file;
        let written = (0..self.registers.file_phase)
            .any(|phase| u64::from(phase / 2) == chunk && on_disk(current, phase) == disk_side);
        let change = if concerns && written {
            of_current
        } else {
            layout
                .files
                .last(file, turns(self.registers.files, number, disks))
        };
        let deleted = blend(&[self.seed, 15, number, change]).is_multiple_of(4);
        if change == 0 || deleted {
            out.fill(0);
        } else if blend(&[self.seed, 16, change]).is_multiple_of(4) {
            noise(blend(&[self.seed, 17, number, change, block]), out);
        } else {
            text(blend(&[self.seed, 18, number, change, block]), out);
        }
    }

    /// Is a page what the program left there?
    fn check_page(&self, page: u64, world: &mut dyn World) -> Result<(), String> {
        let (mut wanted, mut found) = ([0; UNIT], [0; UNIT]);
        self.page(page, &mut wanted);
        let read = world.read_page(page, &mut found);
        read.map_err(|error| format!("page-{page}-read-failed-{error}"))?;
        difference("page", page, &wanted, &found)
    }

    fn check_block(&self, disk: usize, block: u64, world: &mut dyn World) -> Result<(), String> {
        let (mut wanted, mut found) = ([0; UNIT], [0; UNIT]);
        self.block(disk, block, &mut wanted);
        let read = world.read_block(disk, block, &mut found);
        read.map_err(|error| format!("block-{block}-of-disk-{disk}-read-failed-{error}"))?;
        difference(&format!("disk-{disk}-block"), block, &wanted, &found)
    }

    /// Looks at item `at` of memory and disks, one after another; `false` past the last.
    fn check(&mut self, at: u64, world: &mut dyn World) -> bool {
        let Some(mut block) = at.checked_sub(self.layout.pages) else {
            let looked = self.check_page(at, world);
            self.fault(true, looked);
            return true;
        };
        for disk in 0..self.layout.disks.len() {
            let blocks = self.layout.disks[disk].blocks;
            if block < blocks {
                let looked = self.check_block(disk, block, world);
                self.fault(false, looked);
                return true;
            }
            block -= blocks;
        }
        false
    }

    /// Looks at the next `count` items, around and around.
    pub(super) fn check_some(&mut self, count: u64, world: &mut dyn World) {
        for _ in 0..count {
            let at = self.registers.look;
            self.registers.look = if self.check(at, world) { at + 1 } else { 0 };
        }
    }

    /// Goes on with the full check that was asked for; what it found, at its end.
    pub(super) fn check_all(&mut self, count: u64, world: &mut dyn World) -> Option<String> {
        let at = self.registers.checking?;
        for next in at..at + count {
            if !self.check(next, world) {
                self.registers.checking = None;
                return Some(format!(
                    "CHECK {} {} pages={} blocks={}\n",
                    self.registers.beats,
                    self.verdict(),
                    self.layout.pages,
                    self.layout.blocks()
                ));
            }
        }
        self.registers.checking = Some(at + count);
        None
    }

    /// A line that says how it fares.
    pub(super) fn beat(&mut self) -> String {
        self.registers.beats += 1;
        let pages = self.made(Operation::Page) + self.registers.noise;
        let blocks = self.made(Operation::Log) + self.registers.files * FILE_BLOCKS;
        format!(
            "HB {} seq={pages} block={blocks} {}\n",
            self.registers.beats,
            self.verdict()
        )
    }

    fn verdict(&self) -> String {
        let word = |fault: &Option<String>| match fault {
            None => "ok".to_owned(),
            Some(why) => format!("BAD:{why}"),
        };
        format!(
            "mem={} disk={}",
            word(&self.registers.memory_fault),
            word(&self.registers.disk_fault)
        )
    }

    /// The first fault stays.
    fn fault(&mut self, memory: bool, looked: Result<(), String>) {
        let fault = match memory {
            true => &mut self.registers.memory_fault,
            false => &mut self.registers.disk_fault,
        };
        if let (None, Err(why)) = (&fault, looked) {
            let word = why.replace(char::is_whitespace, "-");
            *fault = Some(
                word.chars()
                    .filter(char::is_ascii)
                    .take(LONGEST_FAULT)
                    .collect(),
            );
        }
    }
}

/// How many of the numbers 1 to `done` are a disk's, if they take turns.
fn turns(done: u64, disk: u64, disks: u64) -> u64 {
    let first = if disk == 0 { disks } else { disk };
    match done.checked_sub(first) {
        Some(past) if disks > 0 => past / disks + 1,
        _ => 0,
    }
}

/// Does this step of a file's change write to the disk? Else to memory.
fn on_disk(number: u64, phase: u8) -> bool {
    (u64::from(phase) + number).is_multiple_of(2)
}

fn difference(what: &str, item: u64, wanted: &Content, found: &Content) -> Result<(), String> {
    let Some(at) = wanted.iter().zip(found).position(|(a, b)| a != b) else {
        return Ok(());
    };
    let number = |content: &Content| {
        let word = content.as_chunks::<8>().0.get(1);
        word.map_or(0, |word| u64::from_le_bytes(*word))
    };
    let kind = match found.iter().all(|byte| *byte == 0) {
        true => "lost",
        false => "differs",
    };
    Err(format!(
        "{what}-{item}-{kind}-at-{at}-wanted-{}-found-{}",
        number(wanted),
        number(found)
    ))
}
