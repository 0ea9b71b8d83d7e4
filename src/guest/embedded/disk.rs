//! A disk whose writes are known: an image file with the set of what changed,
//! readable as it was at a cut while the guest writes on, and at the peer
//! filled from a recovery point while the guest already runs on it.
//!
//! A write goes device model -> [`TrackedDisk::write`] -> image, under one
//! short lock that no reader holds: first what a cut still has to read is kept
//! in memory ([`instant`]), then the units are noted as changed, then the image
//! is written. So whoever takes the set of changes and reads afterwards misses
//! nothing. What lies below ([`TrackedDisk::above`]) never changes: a unit
//! reads from there until it was written or copied ([`hydrate`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farhaven_storage_sync::digest::is_zero;
use farhaven_storage_sync::unit::UNIT;
use rustix::fs::FallocateFlags;

use super::Bitmap;
use crate::activate::nbd::BlockSource;

pub mod hydrate;
pub mod instant;
#[cfg(test)]
mod tests;

use hydrate::Copying;
use instant::Frozen;

/// Writes of zeros of this many bytes or more give their room back.
const PUNCH: u64 = 64 << 10;

/// A guest's disk, for its device model and for the engine. Any thread may
/// call anything at any time.
pub struct TrackedDisk {
    name: String,
    bytes: u64,
    image: File,
    /// Something may lie below: reads must ask.
    layered: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// Written since the engine asked last.
    changed: Bitmap,
    below: Option<Below>,
    /// Something was written, so what is below may not be exchanged.
    written: bool,
    /// A write into space that was not filled failed half-way: the image may
    /// hold what nobody wrote there, so zeros must be written when it is filled.
    soiled: bool,
    frozen: Option<Frozen>,
    /// Number of the newest instant.
    instants: u64,
    copying: Copying,
    /// See [`TrackedDisk::end`].
    ended: bool,
}

/// What is read where the image has nothing.
#[derive(Clone)]
struct Below {
    source: Arc<dyn BlockSource>,
    /// Units that the image holds.
    filled: Bitmap,
}

/// In the place of what lay below a disk that has ended.
struct Gone(u64);

impl BlockSource for Gone {
    fn size(&self) -> u64 {
        self.0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("its machine has ended"))
    }

    fn extents(&self, _: u64, length: u64) -> Vec<(u64, bool)> {
        vec![(length, false)]
    }
}

impl TrackedDisk {
    /// Opens an image (raw, made sparse when missing) of `bytes`.
    ///
    /// # Errors
    /// When it cannot be opened, or has another size.
    pub fn open(name: &str, image: &Path, bytes: u64) -> io::Result<Arc<Self>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(image)?;
        let found = file.metadata()?.len();
        if found == 0 {
            file.set_len(bytes)?;
        } else if found != bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} has {found} bytes, but disk '{name}' {bytes}; name its image, or its right size",
                    image.display()
                ),
            ));
        }
        Ok(Self::with(name, file, bytes, None))
    }

    /// A new image above `below`: what was never written nor copied reads from there.
    ///
    /// # Errors
    /// When the image cannot be made.
    pub fn above(name: &str, image: &Path, below: Arc<dyn BlockSource>) -> io::Result<Arc<Self>> {
        let bytes = below.size();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(image)?;
        file.set_len(bytes)?;
        let below = Below {
            source: below,
            filled: Bitmap::none(units(bytes)),
        };
        Ok(Self::with(name, file, bytes, Some(below)))
    }

    fn with(name: &str, image: File, bytes: u64, below: Option<Below>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            bytes,
            image,
            layered: AtomicBool::new(below.is_some()),
            state: Mutex::new(State {
                changed: Bitmap::none(units(bytes)),
                below,
                written: false,
                soiled: false,
                frozen: None,
                instants: 0,
                copying: Copying::default(),
                ended: false,
            }),
        })
    }

    /// Its name; stays, at both sites.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its size in 4 KiB units; the last may be partial.
    pub fn units(&self) -> u64 {
        units(self.bytes)
    }

    /// Reads at any offset, for the device model.
    ///
    /// # Errors
    /// Past the end; when the image or what is below cannot be read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.within(offset, into.len())?;
        if range.is_empty() {
            return Ok(());
        }
        if !self.layered.load(Ordering::Acquire) {
            return self.image.read_exact_at(into, offset);
        }
        let (source, parts) = match &self.state().below {
            None => return self.image.read_exact_at(into, offset),
            Some(below) => (
                below.source.clone(),
                parts(&range, |unit| below.filled.contains(unit)),
            ),
        };
        // A write that comes between is neither before nor after this read.
        for (part, filled) in parts {
            let into = slice(into, &range, &part)?;
            if filled {
                self.image.read_exact_at(into, part.start)?;
            } else {
                source.read(part.start, into)?;
            }
        }
        Ok(())
    }

    /// Writes at any offset, for the device model.
    ///
    /// # Errors
    /// Past the end; when the image cannot be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let range = self.within(offset, bytes.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let edges = self.edges(&range)?;
        let mut state = self.state();
        let touched = range.start / UNIT as u64..range.end.div_ceil(UNIT as u64);
        state.keep(&self.image, self.bytes, touched.clone());
        state.written = true;
        let count = touched.end - touched.start;
        state.changed.set_run(touched.start, count);
        let written = (|| {
            for (unit, content) in &edges {
                // It may have been filled meanwhile.
                if let Some(below) = &mut state.below
                    && !below.filled.contains(*unit)
                {
                    self.image.write_all_at(content, unit * UNIT as u64)?;
                    below.filled.set(*unit);
                }
            }
            self.put(offset, bytes)
        })();
        match (&written, &mut state.below) {
            (Ok(()), Some(below)) => below.filled.set_run(touched.start, count),
            (Err(_), Some(_)) => state.soiled = true,
            (_, None) => {}
        }
        written
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn flush(&self) -> io::Result<()> {
        self.image.sync_data()
    }

    /// Exchanges what lies below, for another point of the same disk.
    ///
    /// # Errors
    /// When it has another size, the disk was written, or the copy has begun.
    pub fn replace_below(&self, source: Arc<dyn BlockSource>) -> io::Result<()> {
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if source.size() != self.bytes {
            return refused(format!(
                "disk '{}' has {} bytes, but {} at that point; activate that point anew",
                self.name,
                self.bytes,
                source.size()
            ));
        }
        let mut state = self.state();
        if state.written || state.copying.begun() {
            return refused(format!(
                "disk '{}' is in use already; activate that point anew",
                self.name
            ));
        }
        match &mut state.below {
            Some(below) => below.source = source,
            None => return refused(format!("disk '{}' lies above nothing", self.name)),
        }
        Ok(())
    }

    /// Its machine has ended for good: what lies below is let go of, whoever holds this
    /// disk still, and is not copied on. What the image does not hold cannot be read.
    pub fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        if let Some(below) = &mut state.below {
            below.source = Arc::new(Gone(self.bytes));
        }
    }

    /// Which units were written since the last call (since it was opened, for
    /// the first), and forgets them.
    pub fn take_changed(&self) -> Bitmap {
        self.state().changed.take()
    }

    /// How many bytes from `offset` on read as zeros for sure: holes.
    pub(super) fn hole(&self, offset: u64) -> u64 {
        let rest = self.bytes.saturating_sub(offset);
        if self.layered.load(Ordering::Acquire) {
            return 0;
        }
        // No filesystem gives fewer zeros than it tells.
        match rustix::fs::seek(&self.image, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data.saturating_sub(offset).min(rest),
            Err(rustix::io::Errno::NXIO) => rest,
            Err(_) => 0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn within(&self, offset: u64, length: usize) -> io::Result<Range<u64>> {
        offset
            .checked_add(length as u64)
            .filter(|end| *end <= self.bytes)
            .map(|end| offset..end)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "{length} bytes at {offset} lie past the end of disk '{}'",
                        self.name
                    ),
                )
            })
    }

    /// The whole content of units that a write covers in part only and that
    /// the image does not hold yet. Read with no lock held: it may take long.
    fn edges(&self, range: &Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        if !self.layered.load(Ordering::Acquire) {
            return Ok(Vec::new());
        }
        let unit = UNIT as u64;
        let mut partial = Vec::new();
        if !range.start.is_multiple_of(unit) {
            partial.push(range.start / unit);
        }
        if !range.end.is_multiple_of(unit)
            && range.end != self.bytes
            && partial.first() != Some(&(range.end / unit))
        {
            partial.push(range.end / unit);
        }
        let source = match &self.state().below {
            Some(below) => {
                partial.retain(|unit| !below.filled.contains(*unit));
                below.source.clone()
            }
            None => return Ok(Vec::new()),
        };
        let whole = |at: u64| {
            let mut content = vec![0; unit.min(self.bytes - at * unit) as usize];
            source.read(at * unit, &mut content)?;
            Ok((at, content))
        };
        partial.into_iter().map(whole).collect()
    }

    /// Writes to the image; long runs of zeros give their room back.
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        if length >= PUNCH && is_zero(bytes) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.image, flags, offset, length).is_ok() {
                return Ok(());
            }
        }
        self.image.write_all_at(bytes, offset)
    }
}

fn units(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT as u64)
}

/// `range` in parts, each wholly of units of which `is` says the same.
fn parts(range: &Range<u64>, is: impl Fn(u64) -> bool) -> Vec<(Range<u64>, bool)> {
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let unit = at / UNIT as u64;
        let end = ((unit + 1) * UNIT as u64).min(range.end);
        let this = is(unit);
        match parts.last_mut() {
            Some((last, same)) if *same == this => last.end = end,
            _ => parts.push((at..end, this)),
        }
        at = end;
    }
    parts
}

/// The part of a buffer for `range` that stands for `part`.
fn slice<'a>(
    buffer: &'a mut [u8],
    range: &Range<u64>,
    part: &Range<u64>,
) -> io::Result<&'a mut [u8]> {
    let at = |offset: u64| (offset - range.start) as usize;
    buffer
        .get_mut(at(part.start)..at(part.end))
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}
