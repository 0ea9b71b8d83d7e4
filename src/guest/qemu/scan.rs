//! Changed RAM by content: each page's digest against the digest the peer is
//! known to hold.
//!
//! A block of guest memory is a file. Worker threads copy chunks of [`CHUNK`]
//! bytes of the file's data ranges ([`Mapping`] says how), hash the copies and
//! send only changed units to the calling thread, which hands them to the sink
//! and only then notes their digests. What was hashed is the very copy that is
//! handed over, though the guest may write meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};

use super::super::hot::Hot;
use super::super::{GuestError, Sink, SinkError};
use super::mapping::Mapping;
pub(super) use super::sieve::Look;
use super::sieve::Sieve;
use super::tracking::Bits;
use super::units::{Hasher, hand_over};

/// Ranges of bytes, ascending.
type Ranges = Vec<Range<u64>>;

/// Bytes read and hashed at a time: fits a core's second-level cache.
const CHUNK: u64 = 256 << 10;
const CHUNK_UNITS: u64 = CHUNK / UNIT as u64;
/// Chunks of one pass of the workers; bounds what waits to be noted (1 GiB of RAM).
const PASS: usize = 4096;
/// Chunks with changes that may wait for the sink: what waits gets old.
const WAITING: usize = 2;

/// A block of guest memory and what the peer is known to hold of it.
pub(super) struct RamBlock {
    ram: Mapping,
    path: PathBuf,
    volume: VolumeIndex,
    table: Vec<Digest>,
    /// Units handed over in the scan under way, or the last one.
    pub(super) handed: Bits,
    /// Units that the last round left to the cut, as they were: no more than
    /// half a capture buffer holds.
    waiting: HashMap<u64, Digest>,
}

/// A piece of a block for one worker at a time.
struct Chunk {
    /// Its first unit.
    first: u64,
    /// Bytes of the file at or after it that are data.
    data: Range<u64>,
}

/// What a worker found in one chunk: runs of changed units, one after another.
struct Found {
    units: Vec<u64>,
    bytes: Vec<u8>,
    digests: Vec<Digest>,
}

impl RamBlock {
    /// Opens a block's file. A new replica is all zeros, so is the table.
    pub(super) fn open(path: &Path, volume: VolumeIndex) -> Result<Self, GuestError> {
        let what = |what: &str| format!("{what} the guest's RAM file {}", path.display());
        let file = File::open(path).map_err(|source| GuestError::Io {
            what: what("opening"),
            source,
        })?;
        let bytes = file
            .metadata()
            .map_err(|source| GuestError::Io {
                what: what("looking at"),
                source,
            })?
            .len();
        if bytes == 0 || bytes % UNIT as u64 != 0 {
            return Err(GuestError::State(format!(
                "{} has {bytes} bytes, which is no guest RAM; name the mem-path of the memory-backend-file",
                path.display()
            )));
        }
        let units = usize::try_from(bytes / UNIT as u64)
            .map_err(|_| GuestError::State(format!("{} is too large", path.display())))?;
        Ok(Self {
            ram: Mapping::new(file, bytes),
            path: path.to_owned(),
            volume,
            table: vec![Digest::ZERO_UNIT; units],
            handed: Bits::new(units),
            waiting: HashMap::new(),
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.table.len() as u64 * UNIT as u64
    }

    /// Device and inode of the file.
    pub(super) fn inode(&self) -> std::io::Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::ino(
            &self.ram.file().metadata()?,
        ))
    }

    /// Replaces the table: what the peer holds.
    pub(super) fn know(&mut self, digests: Vec<Digest>) -> Result<(), GuestError> {
        if digests.len() != self.table.len() {
            return Err(GuestError::State(format!(
                "the peer knows {} units of {}, but it has {}; protect the guest anew",
                digests.len(),
                self.path.display(),
                self.table.len()
            )));
        }
        self.table = digests;
        Ok(())
    }

    /// These units count as changed again.
    pub(super) fn forget(&mut self, units: &Bits) {
        for unit in units.iter() {
            if let Some(slot) = self.table.get_mut(unit) {
                *slot = Digest::UNKNOWN;
            }
        }
    }

    /// So do these, whatever the peer had of them.
    pub(super) fn lost(&mut self, units: Range<u64>) {
        let end = units.end.min(self.table.len() as u64) as usize;
        if let Some(slots) = self
            .table
            .get_mut(units.start.min(end as u64) as usize..end)
        {
            slots.fill(Digest::UNKNOWN);
        }
    }

    /// Hands over every unit whose content the peer is not known to hold, but
    /// for what a round leaves to the cut, and returns the bytes looked at. `handed` has the units that the sink took,
    /// also on error.
    pub(super) fn scan(
        &mut self,
        hasher: &Hasher,
        threads: usize,
        (look, hot): (Look, &mut Hot),
        sink: &mut dyn Sink,
    ) -> Result<u64, GuestError> {
        self.handed.clear();
        let before = std::mem::take(&mut self.waiting);
        let mut sieve = Sieve {
            look,
            hot,
            volume: self.volume,
            before: &before,
            waiting: HashMap::new(),
        };
        let scanned = self.sift(hasher, threads, &mut sieve, sink);
        let waiting = sieve.waiting;
        // A scan that failed is looked at again in the same look.
        self.waiting = if scanned.is_ok() { waiting } else { before };
        scanned
    }

    fn sift(
        &mut self,
        hasher: &Hasher,
        threads: usize,
        sieve: &mut Sieve<'_>,
        sink: &mut dyn Sink,
    ) -> Result<u64, GuestError> {
        let total = self.bytes();
        let (data, exact) = self.data_ranges()?;
        self.holes(&data, sink)?;
        let mut exact = exact.into_iter().peekable();
        let chunks: Vec<Chunk> = data
            .iter()
            .flat_map(|r| r.clone().step_by(CHUNK_UNITS as usize))
            .map(|first| {
                let at = first * UNIT as u64;
                while exact.next_if(|data| data.end <= at).is_some() {}
                Chunk {
                    first,
                    data: exact.peek().cloned().unwrap_or_default(),
                }
            })
            .collect();
        for pass in chunks.chunks(PASS) {
            self.pass(pass, hasher, threads, sieve, sink)?;
            let done = pass
                .last()
                .map_or(0, |last| (last.first + CHUNK_UNITS) * UNIT as u64);
            sink.progress(done.min(total), total);
        }
        Ok(data.iter().map(|r| (r.end - r.start) * UNIT as u64).sum())
    }

    /// The file's data, as ranges of units in whole chunks, and the ranges of
    /// bytes that are data themselves. Each step moves on by a chunk at least,
    /// so that a file of many small holes stays cheap: the second list is then
    /// not whole.
    fn data_ranges(&self) -> Result<(Ranges, Ranges), GuestError> {
        use rustix::fs::{SeekFrom, seek};
        let failed = |e: rustix::io::Errno| GuestError::Io {
            what: format!("looking for data in the RAM file {}", self.path.display()),
            source: e.into(),
        };
        let end = self.bytes();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut exact = Vec::new();
        let file = self.ram.file();
        let mut at = 0;
        while at < end {
            let found = match seek(file, SeekFrom::Data(at)) {
                Ok(found) => found,
                Err(rustix::io::Errno::NXIO) => break,
                // A filesystem without SEEK_DATA: everything is data.
                Err(rustix::io::Errno::INVAL) => {
                    let everything = 0..end / UNIT as u64;
                    return Ok((std::iter::once(everything).collect(), Vec::new()));
                }
                Err(e) => return Err(failed(e)),
            };
            let start = found / CHUNK * CHUNK;
            let hole = seek(file, SeekFrom::Hole(found)).map_err(failed)?;
            exact.push(found..hole);
            // A page may be given back between the two calls: never stand still.
            let stop = hole.max(found + 1).next_multiple_of(CHUNK).min(end);
            let units = start / UNIT as u64..stop / UNIT as u64;
            match ranges.last_mut() {
                Some(last) if last.end >= units.start => last.end = units.end.max(last.end),
                _ => ranges.push(units),
            }
            at = stop.max(at + 1);
        }
        Ok((ranges, exact))
    }

    /// Units between the data ranges read as zeros.
    fn holes(&mut self, data: &[Range<u64>], sink: &mut dyn Sink) -> Result<(), GuestError> {
        let end = self.table.len();
        let mut from = 0;
        let stops = data.iter().map(|r| (r.start as usize, r.end as usize));
        for (start, next) in stops.chain([(end, end)]) {
            let mut at = from;
            while let Some(skipped) = self.table[at..start]
                .iter()
                .position(|d| *d != Digest::ZERO_UNIT)
            {
                let first = at + skipped;
                let count = self.table[first..start]
                    .iter()
                    .take_while(|d| **d != Digest::ZERO_UNIT)
                    .count();
                sink.zeros(self.volume, first as u64, count as u64)?;
                for unit in first..first + count {
                    self.table[unit] = Digest::ZERO_UNIT;
                    self.handed.set(unit);
                }
                at = first + count;
            }
            from = next;
        }
        Ok(())
    }

    /// One pass of the workers over these chunks.
    fn pass(
        &mut self,
        chunks: &[Chunk],
        hasher: &Hasher,
        threads: usize,
        sieve: &mut Sieve<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), GuestError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let mut taken: Vec<(u64, Digest)> = Vec::new();
        let table = &self.table;
        let work = Work {
            ram: &self.ram,
            path: &self.path,
            table,
            hasher,
            chunks,
            next,
            stop,
        };
        let outcome = std::thread::scope(|scope| {
            let (send, receive) = sync_channel::<Found>(WAITING);
            let workers: Vec<_> = (0..threads.clamp(1, 64))
                .map(|_| {
                    let send = send.clone();
                    let work = &work;
                    scope.spawn(move || work.run(&send))
                })
                .collect();
            drop(send);
            let mut outcome = Ok(());
            for found in &receive {
                if let Err(error) = deliver(&found, sieve, sink, &mut taken) {
                    work.stop.store(true, Ordering::Relaxed);
                    outcome = Err(GuestError::from(error));
                    break;
                }
            }
            drop(receive);
            for worker in workers {
                let ended = worker.join().unwrap_or_else(|_| {
                    Err(GuestError::State(
                        "a thread that scans RAM panicked".to_owned(),
                    ))
                });
                if outcome.is_ok() {
                    outcome = ended;
                }
            }
            outcome
        });
        for (unit, digest) in taken {
            self.table[unit as usize] = digest;
            self.handed.set(unit as usize);
        }
        outcome
    }
}

/// Hands one chunk's changes over, but for what waits; `taken` gets what the sink took.
fn deliver(
    found: &Found,
    sieve: &mut Sieve<'_>,
    sink: &mut dyn Sink,
    taken: &mut Vec<(u64, Digest)>,
) -> Result<(), SinkError> {
    let waits: Vec<bool> = (found.units.iter().zip(&found.digests))
        .map(|(unit, digest)| sieve.waits(*unit, *digest))
        .collect();
    let volume = sieve.volume;
    let mut at = 0;
    while at < found.units.len() {
        let first = found.units[at];
        let count = (at..found.units.len())
            .take_while(|i| found.units[*i] == first + (i - at) as u64 && !waits[*i])
            .count();
        if count == 0 {
            at += 1;
            continue;
        }
        let end = at + count;
        let digests = &found.digests[at..end];
        hand_over(
            sink,
            volume,
            first,
            &found.bytes[at * UNIT..end * UNIT],
            digests,
            |_, _| true,
        )?;
        taken.extend(
            found.units[at..end]
                .iter()
                .copied()
                .zip(digests.iter().copied()),
        );
        at = end;
    }
    Ok(())
}

/// What the workers of a pass share.
struct Work<'a> {
    ram: &'a Mapping,
    path: &'a Path,
    table: &'a [Digest],
    hasher: &'a Hasher,
    chunks: &'a [Chunk],
    next: AtomicUsize,
    stop: AtomicBool,
}

impl Work<'_> {
    fn run(&self, send: &SyncSender<Found>) -> Result<(), GuestError> {
        let mut buffer = vec![0; CHUNK as usize];
        let mut digests = Vec::with_capacity(CHUNK_UNITS as usize);
        while !self.stop.load(Ordering::Relaxed) {
            let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return Ok(());
            };
            let first = chunk.first;
            let known = &self.table[first as usize..];
            let known = &known[..known.len().min(CHUNK_UNITS as usize)];
            let bytes = &mut buffer[..known.len() * UNIT];
            self.ram
                .copy(first * UNIT as u64, bytes, &chunk.data)
                .map_err(|source| {
                    self.stop.store(true, Ordering::Relaxed);
                    let what = format!("reading the guest's RAM file {}", self.path.display());
                    GuestError::Io { what, source }
                })?;
            digests.clear();
            self.hasher.digests(bytes, &mut digests);
            if digests == known {
                continue;
            }
            let mut found = Found {
                units: Vec::new(),
                bytes: Vec::new(),
                digests: Vec::new(),
            };
            for (i, (digest, known)) in digests.iter().zip(known).enumerate() {
                if digest != known {
                    found.units.push(first + i as u64);
                    found
                        .bytes
                        .extend_from_slice(&bytes[i * UNIT..(i + 1) * UNIT]);
                    found.digests.push(*digest);
                }
            }
            // A closed channel: the sink refused, and said why itself.
            if send.send(found).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
