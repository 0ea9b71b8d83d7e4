//! Reading the segments when the store opens: what is there, what is torn.
//!
//! Segments before the last were synced whole: header and entries of their
//! batches are verified. The last one may end in what a crash left: all its
//! batches are verified in full, and it is cut after the last whole one. Damage in the middle is told, and
//! the search goes on behind it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{Given, Location, segment_path};
use crate::codec::{BatchError, BatchHeader, BatchView, EntriesView, MAGIC, newer};
use crate::disk::{Disk, OpenFile};
use crate::files::{self, FileError, is_bad_sector, open_private, open_settled};
use crate::limits::{BATCH_BYTES, BATCH_ENTRIES_BYTES, BATCH_HEADER, SEGMENT_BYTES_MOST};

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
    report: ScanReport,
}

type Segments = BTreeMap<u32, u64>;

pub(super) fn scan(
    disk: &dyn Disk,
    dir: &Path,
    index: &mut BTreeMap<u64, Location>,
    given: &Given,
    seen: &mut dyn FnMut(&BatchHeader),
) -> Result<(Segments, ScanReport), FileError> {
    let mut numbers = Vec::new();
    for name in disk.list(dir).map_err(FileError::at("list", dir))? {
        let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    let mut segments = Segments::new();
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
        report: ScanReport::default(),
    };
    for &number in &numbers {
        let bytes = scan.segment(dir, number, number >= tail)?;
        segments.insert(number, bytes);
    }
    scan.report.batches = scan.index.len() as u64;
    Ok((segments, scan.report))
}

impl Scan<'_> {
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
        let mut offset = 0;
        let mut buffer = Vec::new();
        while offset < length {
            let before = file.bad_sectors;
            let why = match record(&mut file, offset, length, last, &mut buffer)? {
                Ok(header) => {
                    self.keep(&header, number, offset);
                    offset += header.bytes() as u64;
                    continue;
                }
                Err(why) => why,
            };
            let next = resume(&mut file, offset + 1, length, &mut buffer)?;
            let unreadable = file.bad_sectors > before;
            self.lost(
                &mut file,
                offset..next.unwrap_or(length),
                length,
                &mut buffer,
            )?;
            match next {
                Some(next) => {
                    self.bad(path, offset, next - offset, why, unreadable);
                    offset = next;
                }
                // What cannot be read now may be read another day: nothing is cut off.
                None if last && !unreadable => {
                    self.report.torn_bytes += length - offset;
                    let file = file.file;
                    return Ok(match file.set_len(offset) {
                        Err(error) => Err(("cut", error)),
                        Ok(()) => (file.sync().map(|()| offset)).map_err(|error| ("sync", error)),
                    });
                }
                None => {
                    self.bad(path, offset, length - offset, why, unreadable);
                    return Ok(Ok(length));
                }
            }
        }
        Ok(Ok(length))
    }

    /// Notes the numbers of batches in bytes that are lost, as far as these follow one
    /// another with whole headers. None is looked for behind: a guest's own data may look
    /// like one, and would use up the numbers.
    fn lost(
        &self,
        file: &mut Patient,
        lost: Range<u64>,
        length: u64,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let mut offset = lost.start;
        while offset < lost.end {
            let most = (BATCH_HEADER + BATCH_ENTRIES_BYTES) as u64;
            buffer.clear();
            buffer.resize((length - offset).min(most) as usize, 0);
            file.read(buffer, offset)?;
            let Ok(EntriesView { header, .. }) = EntriesView::parse(buffer) else {
                break;
            };
            self.given.note(header.seq);
            offset += header.bytes() as u64;
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

    fn keep(&mut self, header: &BatchHeader, segment: u32, offset: u64) {
        // Two copies of a batch are what a crash in a prune leaves, or a batch
        // that was sent again because the first copy was damaged: the later one it is.
        let location = Location {
            segment,
            offset: offset as u32,
            bytes: header.bytes() as u32,
            literals: header.literals,
            deltas: header.deltas,
        };
        self.index.insert(header.seq, location);
        (self.seen)(header);
    }
}

/// Reads around bad sectors: a block that the disk cannot read is zeros, and counted.
struct Patient {
    file: OpenFile,
    bad_sectors: u64,
}

impl Patient {
    fn read(&mut self, out: &mut [u8], offset: u64) -> io::Result<()> {
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
const FRONT: u64 = 2048;

type Found = Result<BatchHeader, String>;

/// The batch at `offset`: header and entries verified; its body too when `whole`.
fn record(
    file: &mut Patient,
    offset: u64,
    length: u64,
    whole: bool,
    buffer: &mut Vec<u8>,
) -> io::Result<Found> {
    let left = length - offset;
    let mut want = left.min(FRONT) as usize;
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

/// The next offset from `from` on where a whole, verified batch starts.
fn resume(
    file: &mut Patient,
    from: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<u64>> {
    const WINDOW: u64 = 4 * BATCH_BYTES as u64;
    let mut window = Vec::new();
    let mut start = from;
    while start < length {
        window.resize((length - start).min(WINDOW) as usize, 0);
        file.read(&mut window, start)?;
        for at in 0..window.len().saturating_sub(MAGIC.len() - 1) {
            if window[at..at + MAGIC.len()] != MAGIC {
                continue;
            }
            let offset = start + at as u64;
            if record(file, offset, length, true, buffer)?.is_ok() {
                return Ok(Some(offset));
            }
        }
        // Windows overlap by three bytes, so that no start is missed.
        start += (window.len() as u64)
            .saturating_sub(MAGIC.len() as u64 - 1)
            .max(1);
    }
    Ok(None)
}
