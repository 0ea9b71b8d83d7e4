//! Reading the segments when the store opens: what is there, what is torn.
//!
//! Segments before the last were synced whole, so their headers are enough.
//! The last one may end in what a crash left: all its batches are verified,
//! and it is cut after the last whole one. Damage in the middle is told, and
//! the search goes on behind it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Location, segment_path};
use crate::codec::{BatchHeader, BatchView, MAGIC};
use crate::files::{FileError, open_private};
use crate::limits::{BATCH_BYTES, BATCH_HEADER, SEGMENT_BYTES_MOST};

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
    index: &'a mut BTreeMap<u64, Location>,
    seen: &'a mut dyn FnMut(&BatchHeader),
    report: ScanReport,
}

type Segments = BTreeMap<u32, u64>;

pub(super) fn scan(
    dir: &Path,
    index: &mut BTreeMap<u64, Location>,
    seen: &mut dyn FnMut(&BatchHeader),
) -> Result<(Segments, ScanReport), FileError> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(FileError::at("list", dir))? {
        let name = entry.map_err(FileError::at("list", dir))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    let mut segments = Segments::new();
    let mut scan = Scan {
        index,
        seen,
        report: ScanReport::default(),
    };
    for (at, &number) in numbers.iter().enumerate() {
        let bytes = scan.segment(dir, number, at + 1 == numbers.len())?;
        segments.insert(number, bytes);
    }
    scan.report.batches = scan.index.len() as u64;
    Ok((segments, scan.report))
}

impl Scan<'_> {
    /// Returns the bytes of the segment that are kept.
    fn segment(&mut self, dir: &Path, number: u32, last: bool) -> Result<u64, FileError> {
        let path = segment_path(dir, number);
        let file = open_private(&path)?;
        let length = file.metadata().map_err(FileError::at("read", &path))?.len();
        // A longer file is none of ours; offsets beyond this cannot be named.
        let length = length.min(SEGMENT_BYTES_MOST);
        let mut offset = 0;
        let mut buffer = Vec::new();
        while offset < length {
            let found = record(&file, offset, length, last, &mut buffer);
            let found = found.map_err(FileError::at("read", &path))?;
            let why = match found {
                Ok(header) => {
                    self.keep(&header, number, offset);
                    offset += header.bytes() as u64;
                    continue;
                }
                Err(why) => why,
            };
            let next = resume(&file, offset + 1, length, &mut buffer);
            match next.map_err(FileError::at("read", &path))? {
                Some(next) => {
                    self.bad(&path, offset, next - offset, why);
                    offset = next;
                }
                None if last => {
                    self.report.torn_bytes += length - offset;
                    file.set_len(offset).map_err(FileError::at("cut", &path))?;
                    file.sync_all().map_err(FileError::at("sync", &path))?;
                    return Ok(offset);
                }
                None => {
                    self.bad(&path, offset, length - offset, why);
                    return Ok(length);
                }
            }
        }
        if last {
            // Written whole, but the process may have ended before it synced.
            file.sync_all().map_err(FileError::at("sync", &path))?;
        }
        Ok(length)
    }

    fn bad(&mut self, path: &Path, offset: u64, bytes: u64, why: String) {
        let path = path.to_path_buf();
        self.report.bad.push(BadRange {
            path,
            offset,
            bytes,
            why,
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

type Found = Result<BatchHeader, String>;

/// The batch at `offset`; verified in full when `verify`.
fn record(
    file: &File,
    offset: u64,
    length: u64,
    verify: bool,
    buffer: &mut Vec<u8>,
) -> std::io::Result<Found> {
    let left = length - offset;
    buffer.clear();
    buffer.resize(left.min(BATCH_HEADER as u64) as usize, 0);
    file.read_exact_at(buffer, offset)?;
    let header = match BatchHeader::parse(buffer) {
        Ok(header) => header,
        Err(error) => return Ok(Err(error.to_string())),
    };
    if header.bytes() as u64 > left {
        return Ok(Err(format!("batch {} is longer than its file", header.seq)));
    }
    if verify {
        buffer.resize(header.bytes(), 0);
        file.read_exact_at(buffer, offset)?;
        if let Err(error) = BatchView::parse(buffer) {
            return Ok(Err(error.to_string()));
        }
    }
    Ok(Ok(header))
}

/// The next offset from `from` on where a whole, verified batch starts.
fn resume(
    file: &File,
    from: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> std::io::Result<Option<u64>> {
    const WINDOW: u64 = 4 * BATCH_BYTES as u64;
    let mut window = Vec::new();
    let mut start = from;
    while start < length {
        window.resize((length - start).min(WINDOW) as usize, 0);
        file.read_exact_at(&mut window, start)?;
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
