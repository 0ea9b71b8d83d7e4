//! The test guest's ledgers: memory and disk blocks whose every byte follows
//! from one sequence number kept in memory, so that a lost, torn, stale or too
//! new page or block is found, and so are memory and disk of different instants.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use crate::content::{PAGE, mix, noise_page, table_page};

/// In which order the items of a ledger are written: number `seq` (from 1) goes to `place(seq)`.
#[derive(Clone, Copy)]
pub struct Order {
    count: u64,
}

impl Order {
    const STRIDE: u64 = 0x9e37_79b1;

    /// Takes turns over `count` items, a power of two.
    pub fn new(count: u64) -> Self {
        Order {
            count: count.next_power_of_two(),
        }
    }

    /// Number of items.
    pub fn count(self) -> u64 {
        self.count
    }

    /// The item that number `seq` is written to.
    pub fn place(self, seq: u64) -> u64 {
        seq.wrapping_mul(Self::STRIDE) & (self.count - 1)
    }

    /// The last number up to `seq` that was written to `item`; 0 for none.
    pub fn last(self, item: u64, seq: u64) -> u64 {
        // Newton's iteration for the inverse modulo 2^64 of an odd number.
        let mut inverse = Self::STRIDE;
        for _ in 0..6 {
            inverse = inverse.wrapping_mul(2u64.wrapping_sub(Self::STRIDE.wrapping_mul(inverse)));
        }
        let back = seq.wrapping_sub(item.wrapping_mul(inverse)) & (self.count - 1);
        seq.saturating_sub(back)
    }
}

/// A zeroed buffer that starts at a page boundary, as O_DIRECT wants it.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// `length` bytes of zeros.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE).min(PAGE);
        Aligned {
            bytes,
            start,
            length,
        }
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The bytes, to be changed.
    pub fn change(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Says how `found` differs from `wanted`, or nothing when it does not.
fn difference(what: &str, item: u64, wanted: &[u8], found: &[u8]) -> Result<(), String> {
    let Some(at) = wanted.iter().zip(found).position(|(a, b)| a != b) else {
        return if wanted.len() == found.len() {
            Ok(())
        } else {
            Err(format!("{what}-{item}-short"))
        };
    };
    let header = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes.get(19..35).unwrap_or_default()).into_owned();
        u64::from_str_radix(&text, 16).map_or("none".to_owned(), |seq| seq.to_string())
    };
    let kind = if found.iter().all(|&byte| byte == 0) {
        "lost"
    } else {
        "differs"
    };
    Err(format!(
        "{what}-{item}-{kind}-at-{at}-wanted-{}-found-{}",
        header(wanted),
        header(found)
    ))
}

/// Pages of memory, rewritten in turn.
pub struct Memory {
    seed: u64,
    order: Order,
    seq: u64,
    stamps: Vec<u64>,
    pages: Aligned,
    noise: bool,
}

impl Memory {
    /// `count` pages of table rows, or of noise.
    pub fn new(seed: u64, count: u64, noise: bool) -> Self {
        let order = Order::new(count);
        let bytes = order.count() as usize * PAGE;
        let stamps = vec![0; order.count() as usize];
        let mut memory = Memory {
            seed,
            order,
            seq: 0,
            stamps,
            pages: Aligned::new(bytes),
            noise,
        };
        for item in 0..memory.order.count() {
            memory.compose_into_place(item);
        }
        memory
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        self.order.count()
    }

    /// Number of the last write.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    fn compose(&self, item: u64, out: &mut [u8]) {
        let last = self.order.last(item, self.seq);
        if self.noise {
            noise_page(mix(self.seed ^ mix(item) ^ last), out);
        } else {
            table_page(
                self.seed,
                item,
                last,
                self.stamps[item as usize],
                self.order.count(),
                out,
            );
        }
    }

    fn compose_into_place(&mut self, item: u64) {
        let mut page = [0; PAGE];
        self.compose(item, &mut page);
        self.page(item).copy_from_slice(&page);
    }

    /// One page's bytes.
    pub fn page(&mut self, item: u64) -> &mut [u8] {
        &mut self.pages.change()[item as usize * PAGE..][..PAGE]
    }

    /// Rewrites the next page, after checking what it held. `stamp` is kept in it.
    pub fn write(&mut self, stamp: u64) -> Result<(), String> {
        let item = self.order.place(self.seq + 1);
        let before = self.check(item);
        self.seq += 1;
        self.stamps[item as usize] = stamp;
        self.compose_into_place(item);
        before
    }

    /// Is this page what the last write to it left?
    pub fn check(&self, item: u64) -> Result<(), String> {
        let mut wanted = [0; PAGE];
        self.compose(item, &mut wanted);
        difference(
            "page",
            item,
            &wanted,
            &self.pages.get()[item as usize * PAGE..][..PAGE],
        )
    }
}

/// Blocks of a disk or of a file, rewritten in turn, zeros until then.
pub struct Blocks {
    seed: u64,
    order: Order,
    seq: u64,
    stamps: Vec<u64>,
    reader: File,
    writer: File,
    found: Aligned,
    wanted: Aligned,
}

impl Blocks {
    /// `reader` must not be served from the guest's page cache; `writer` may be.
    /// The first `count` blocks must read as zeros.
    pub fn new(seed: u64, count: u64, reader: File, writer: File) -> Self {
        let order = Order::new(count);
        let stamps = vec![0; order.count() as usize];
        let buffer = || Aligned::new(PAGE);
        Blocks {
            seed,
            order,
            seq: 0,
            stamps,
            reader,
            writer,
            found: buffer(),
            wanted: buffer(),
        }
    }

    /// Number of blocks.
    pub fn count(&self) -> u64 {
        self.order.count()
    }

    /// Number of the last write that was acknowledged.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    fn compose(&mut self, item: u64) {
        let last = self.order.last(item, self.seq);
        let stamp = self.stamps[item as usize];
        match last {
            0 => self.wanted.change().fill(0),
            _ => table_page(
                self.seed,
                item,
                last,
                stamp,
                self.order.count(),
                self.wanted.change(),
            ),
        }
    }

    /// Rewrites the next block and syncs it, after checking what it held: on a
    /// disk that is newer than memory it holds this very write already.
    pub fn write(&mut self, stamp: u64) -> Result<(), String> {
        let item = self.order.place(self.seq + 1);
        let before = self.check(item);
        self.seq += 1;
        self.stamps[item as usize] = stamp;
        self.compose(item);
        let written = self
            .writer
            .write_all_at(self.wanted.get(), item * PAGE as u64);
        written
            .and_then(|()| self.writer.sync_data())
            .map_err(|e| failure("write", &e))?;
        before
    }

    /// Does the disk hold what the last write to this block left?
    pub fn check(&mut self, item: u64) -> Result<(), String> {
        self.compose(item);
        let read = self
            .reader
            .read_exact_at(self.found.change(), item * PAGE as u64);
        read.map_err(|e| failure("read", &e))?;
        difference("block", item, self.wanted.get(), self.found.get())
    }
}

/// A file that grows by records and starts anew when it is full, as a database's journal.
pub struct Journal {
    seed: u64,
    epoch: u64,
    records: u64,
    reader: File,
    writer: File,
    found: Aligned,
}

/// Bytes of a journal record.
const RECORD: usize = 512;

impl Journal {
    /// Records in the largest journal.
    pub const RECORDS: u64 = 1024;

    /// `writer` appends; `reader` must not be served from the guest's page cache.
    pub fn new(seed: u64, reader: File, writer: File) -> Self {
        let found = Aligned::new(Self::RECORDS as usize * RECORD + PAGE);
        Journal {
            seed,
            epoch: 0,
            records: 0,
            reader,
            writer,
            found,
        }
    }

    fn record(&self, number: u64) -> [u8; RECORD] {
        let mut page = [0; PAGE];
        table_page(
            self.seed ^ self.epoch,
            number,
            number,
            self.epoch,
            1,
            &mut page,
        );
        let mut record = [0; RECORD];
        record.copy_from_slice(&page[..RECORD]);
        record
    }

    /// Appends a record and syncs.
    pub fn append(&mut self) -> Result<(), String> {
        if self.records == Self::RECORDS {
            self.writer
                .set_len(0)
                .map_err(|e| failure("truncate", &e))?;
            (self.epoch, self.records) = (self.epoch + 1, 0);
        }
        let record = self.record(self.records);
        self.records += 1;
        let written = self
            .writer
            .write_all(&record)
            .and_then(|()| self.writer.sync_all());
        written.map_err(|e| failure("append", &e))
    }

    /// Does the disk hold exactly the records that were appended?
    pub fn check(&mut self) -> Result<(), String> {
        let bytes =
            read_all(&self.reader, self.found.change()).map_err(|e| failure("journal", &e))?;
        if bytes as u64 != self.records * RECORD as u64 {
            return Err(format!(
                "journal-wanted-{}-records-found-{bytes}-bytes",
                self.records
            ));
        }
        for number in 0..self.records {
            let found = &self.found.get()[number as usize * RECORD..][..RECORD];
            difference("journal", number, &self.record(number), found)?;
        }
        Ok(())
    }
}

/// Reads a file from its start until its end, which must come before the buffer's.
pub fn read_all(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let read = file.read_at(&mut buffer[done..], done as u64)?;
        done += read;
        // A read that ends inside a block has met the end of the file.
        if read == 0 || done % PAGE != 0 {
            break;
        }
    }
    Ok(done)
}

/// An I/O error as one word of a heartbeat.
pub fn failure(what: &str, error: &io::Error) -> String {
    format!("{what}-failed-{error}").replace(' ', "-")
}
