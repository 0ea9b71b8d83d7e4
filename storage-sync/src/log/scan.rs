//! Reading the segments when the store opens: what is there, what is torn.
//!
//! Segments before the last were synced whole: header and entries of their
//! batches are verified. The last one may end in what a crash left: all its
//! batches are verified in full, and it is cut after the last whole one. Damage in the middle is told, and
//! the search goes on behind it (`search.rs`).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::front::{self, FRONT, Front, MARK, Secret};
use super::search::{self, Next};
use super::{Given, Location, segment_path};
use crate::codec::{BatchError, BatchHeader, BatchView, EntriesView, newer};
use crate::disk::{Disk, OpenFile};
use crate::files::{self, FileError, is_bad_sector, open_private, open_settled};
use crate::limits::{BATCH_ENTRIES_BYTES, BATCH_HEADER, SEGMENT_BYTES_MOST};

/// Bytes of a segment that are no batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRange {
    /// The file.
    pub path: PathBuf,
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// What was wrong first.
    pub why: String,
    /// The disk would not read some of it: another day it may.
    pub unreadable: bool,
}

/// What opening found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScanReport {
    /// Batches in the log.
    pub batches: u64,
    /// Bytes cut off the last segment: written, but never acknowledged.
    pub torn_bytes: u64,
    /// Damage elsewhere. What lies there is lost; the rest was kept.
    pub bad: Vec<BadRange>,
}

struct Scan<'a> {
    disk: &'a dyn Disk,
    index: &'a mut BTreeMap<u64, Location>,
    given: &'a Given,
    seen: &'a mut dyn FnMut(&BatchHeader),
    fronts: BTreeMap<u32, Front>,
    /// Those of all fronts, each once.
    secrets: Vec<Secret>,
    report: ScanReport,
}

/// What is there.
pub(super) struct Scanned {
    /// Bytes of every segment.
    pub(super) segments: BTreeMap<u32, u64>,
    /// Of every segment that has a front.
    pub(super) fronts: BTreeMap<u32, Front>,
    pub(super) report: ScanReport,
}

pub(super) fn scan(
    disk: &dyn Disk,
    dir: &Path,
    index: &mut BTreeMap<u64, Location>,
    given: &Given,
    seen: &mut dyn FnMut(&BatchHeader),
) -> Result<Scanned, FileError> {
    let mut numbers = Vec::new();
    for name in disk.list(dir).map_err(FileError::at("list", dir))? {
        let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    // The last one that holds anything is where a crash left its traces: an
    // empty one behind it may have been made while this one was written on.
    let mut tail = 0;
    for &number in numbers.iter().rev() {
        let path = segment_path(dir, number);
        let file = open_settled(disk, &path)?;
        tail = number;
        if file.bytes().map_err(FileError::at("read", &path))? > 0 {
            break;
        }
    }
    let mut scan = Scan {
        disk,
        index,
        given,
        seen,
        fronts: BTreeMap::new(),
        secrets: Vec::new(),
        report: ScanReport::default(),
    };
    // All of them first: where one is lost, those of the others tell its batches.
    for &number in &numbers {
        scan.front(dir, number)?;
    }
    let mut segments = BTreeMap::new();
    for &number in &numbers {
        let bytes = scan.segment(dir, number, number >= tail)?;
        segments.insert(number, bytes);
    }
    scan.report.batches = scan.index.len() as u64;
    Ok(Scanned {
        segments,
        fronts: scan.fronts,
        report: scan.report,
    })
}

impl Scan<'_> {
    fn front(&mut self, dir: &Path, number: u32) -> Result<(), FileError> {
        let path = segment_path(dir, number);
        let mut file = Patient {
            file: open_private(self.disk, &path)?,
            bad_sectors: 0,
        };
        let mut bytes = Vec::new();
        let mut read = || {
            bytes.resize(file.file.bytes()?.min(FRONT) as usize, 0);
            file.read(&mut bytes, 0)
        };
        read().map_err(FileError::at("read", &path))?;
        if let Some(front) = front::parse(&bytes) {
            self.fronts.insert(number, front);
            if !self.secrets.contains(&front.secret) {
                self.secrets.push(front.secret);
            }
        }
        Ok(())
    }

    /// Returns the bytes of the segment that are kept.
    fn segment(&mut self, dir: &Path, number: u32, last: bool) -> Result<u64, FileError> {
        let path = segment_path(dir, number);
        let file = Patient {
            file: open_private(self.disk, &path)?,
            bad_sectors: 0,
        };
        self.records(&path, file, number, last)
            .map_err(FileError::at("read", &path))?
            .map_err(|(action, error)| FileError::at(action, &path)(error))
    }

    fn records(
        &mut self,
        path: &Path,
        mut file: Patient,
        number: u32,
        last: bool,
    ) -> io::Result<Result<u64, (&'static str, io::Error)>> {
        // A longer file is none of ours; offsets beyond this cannot be named.
        let length = file.file.bytes()?.min(SEGMENT_BYTES_MOST);
        // Batches of a segment with a front have marks before them.
        let (mut offset, mut mark) = (0, 0);
        if let Some(front) = self.fronts.get(&number).copied() {
            if length < FRONT {
                let why = "its front is cut short".to_string();
                return self.end(path, file, 0..length, last, why, false);
            }
            if !front.whole {
                let why = "one copy of its front is damaged, the other is whole";
                self.bad(path, 0, FRONT, why.to_string(), false);
            }
            (offset, mark) = (FRONT, MARK);
        }
        let mut buffer = Vec::new();
        while offset < length {
            let before = file.bad_sectors;
            let why = match record(&mut file, offset + mark, length, last, &mut buffer)? {
                Ok(header) => {
                    self.keep(&header, number, offset, mark);
                    offset += mark + header.bytes() as u64;
                    continue;
                }
                Err(why) => why,
            };
            let mut next = Next::Nothing;
            // The first one: the front may be what is lost.
            if mark > 0 || offset == 0 {
                let marks = (number, &self.secrets[..]);
                next = search::marked(&mut file, marks, offset, length, &mut buffer)?;
            }
            if mark == 0 && next == Next::Nothing {
                next = search::unmarked(&mut file, offset, length, &mut buffer)?;
            }
            let unreadable = file.bad_sectors > before;
            let end = match next {
                Next::At(next, _) => next,
                Next::Nothing | Next::Untold => length,
            };
            self.lost(&mut file, offset..end, mark, length, &mut buffer)?;
            match next {
                Next::At(next, its_mark) => {
                    self.bad(path, offset, next - offset, why, unreadable);
                    (offset, mark) = (next, its_mark);
                }
                Next::Nothing => {
                    return self.end(path, file, offset..length, last, why, unreadable);
                }
                Next::Untold => {
                    return self.end(path, file, offset..length, false, why, unreadable);
                }
            }
        }
        Ok(Ok(length))
    }

    /// No batch of a segment is behind these bytes: what a crash left is cut off.
    fn end(
        &mut self,
        path: &Path,
        file: Patient,
        rest: Range<u64>,
        torn: bool,
        why: String,
        unreadable: bool,
    ) -> io::Result<Result<u64, (&'static str, io::Error)>> {
        let (offset, bytes) = (rest.start, rest.end - rest.start);
        // What cannot be read now may be read another day: nothing is cut off.
        if !torn || unreadable {
            self.bad(path, offset, bytes, why, unreadable);
            return Ok(Ok(rest.end));
        }
        self.report.torn_bytes += bytes;
        let file = file.file;
        Ok(match file.set_len(offset) {
            Err(error) => Err(("cut", error)),
            Ok(()) => (file.sync().map(|()| offset)).map_err(|error| ("sync", error)),
        })
    }

    /// Notes the numbers of batches in bytes that are lost, as far as these follow one
    /// another with whole headers. None is looked for behind: a guest's own data may look
    /// like one, and would use up the numbers.
    fn lost(
        &self,
        file: &mut Patient,
        lost: Range<u64>,
        mark: u64,
        length: u64,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let mut offset = lost.start;
        while offset < lost.end {
            let header = search::header_at(file, offset + mark, length, buffer)?;
            let Some(header) = header else { break };
            self.given.note(header.seq);
            offset += mark + header.bytes() as u64;
        }
        Ok(())
    }

    fn bad(&mut self, path: &Path, offset: u64, bytes: u64, why: String, unreadable: bool) {
        let path = path.to_path_buf();
        self.report.bad.push(BadRange {
            path,
            offset,
            bytes,
            why,
            unreadable,
        });
    }

    fn keep(&mut self, header: &BatchHeader, segment: u32, offset: u64, mark: u64) {
        // Two copies of a batch are what a crash in a prune leaves, or a batch
        // that was sent again because the first copy was damaged: the later one it is.
        let location = Location {
            segment,
            offset: (offset + mark) as u32,
            bytes: header.bytes() as u32,
            mark: mark as u8,
            literals: header.literals,
            deltas: header.deltas,
        };
        self.index.insert(header.seq, location);
        (self.seen)(header);
    }
}

/// Reads around bad sectors: a block that the disk cannot read is zeros, and counted.
pub(super) struct Patient {
    file: OpenFile,
    bad_sectors: u64,
}

impl Patient {
    pub(super) fn read(&mut self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match self.file.read_exact_at(out, offset) {
            Err(error) if is_bad_sector(&error) => {}
            other => return other,
        }
        for (block, at) in out.chunks_mut(BLOCK).zip((offset..).step_by(BLOCK)) {
            match self.file.read_exact_at(block, at) {
                Err(error) if is_bad_sector(&error) => {
                    block.fill(0);
                    self.bad_sectors += 1;
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// What is read at a time around a bad sector.
const BLOCK: usize = 4096;

/// What is read of a batch at first: usually all but its body.
const FIRST: u64 = 2048;

pub(super) type Found = Result<BatchHeader, String>;

/// The batch at `offset`: header and entries verified; its body too when `whole`.
pub(super) fn record(
    file: &mut Patient,
    offset: u64,
    length: u64,
    whole: bool,
    buffer: &mut Vec<u8>,
) -> io::Result<Found> {
    if offset >= length {
        return Ok(Err("it ends within a mark".to_string()));
    }
    let left = length - offset;
    let mut want = left.min(FIRST) as usize;
    loop {
        buffer.clear();
        buffer.resize(want, 0);
        file.read(buffer, offset)?;
        let header = match BatchHeader::parse(buffer) {
            Ok(header) => header,
            Err(error @ BatchError::Newer { .. }) => {
                refuse_newer(file, offset, left, buffer)?;
                return Ok(Err(error.to_string()));
            }
            Err(error) => return Ok(Err(error.to_string())),
        };
        if header.bytes() as u64 > left {
            return Ok(Err(format!("batch {} is longer than its file", header.seq)));
        }
        let need = match whole {
            true => header.bytes(),
            false => BATCH_HEADER + header.entries_bytes,
        };
        if need > buffer.len() {
            want = need;
            continue;
        }
        let checked = match whole {
            true => BatchView::parse(&buffer[..need]).map(drop),
            false => EntriesView::parse(buffer).map(drop),
        };
        if let Err(BatchError::Newer { .. }) = checked {
            refuse_newer(file, offset, left, buffer)?;
        }
        return Ok(checked.map(|()| header).map_err(|error| error.to_string()));
    }
}

/// What a newer version wrote is refused altogether: to take it for damage would cut it
/// off, or let a prune take what it needs.
fn refuse_newer(
    file: &mut Patient,
    offset: u64,
    left: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    buffer.clear();
    buffer.resize(
        left.min((BATCH_HEADER + BATCH_ENTRIES_BYTES) as u64) as usize,
        0,
    );
    file.read(buffer, offset)?;
    match newer(buffer) {
        Some(what) => Err(files::newer(format!("a batch of {what}"))),
        None => Ok(()),
    }
}
