//! The log: batches in append-only segment files, exactly as they arrived.
//!
//! Batches come in verified, are written behind one another, synced, and only
//! then known to the index (number -> segment, offset, length). Opening scans
//! the segments (`scan.rs`); marks that no guest can make (`front.rs`) lead it past
//! damage. A place names a batch by number, so prune may copy
//! live batches to the end and remove old segments.

mod front;
mod read;
mod scan;
mod search;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::codec::BatchHeader;
use crate::disk::{Access, Disk, OpenFile};
use crate::files::{FileError, make_dir, open_private, sync_dir};
use crate::limits::{IMAGE_SEQ, SEQ};

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use front::segment_of;
use front::{FRONT, MARK, Secret};
use scan::Scanned;
pub use scan::{BadRange, ScanReport};

/// Where a batch lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: u32,
    pub(crate) offset: u32,
    pub(crate) bytes: u32,
    pub(crate) literals: u8,
    /// Are some of its slots differences?
    pub(crate) deltas: bool,
    /// Bytes of its mark, which is before it; 0 in segments of version 1.
    pub(crate) mark: u8,
}

impl Location {
    /// Bytes that it takes in its segment.
    pub(crate) fn stored(&self) -> u64 {
        u64::from(self.bytes) + u64::from(self.mark)
    }

    /// Bytes of its segment before the first batch.
    pub(crate) fn front(&self) -> u64 {
        if self.mark > 0 { FRONT } else { 0 }
    }
}

/// Why the log refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No room. What was appended before is safe, and appending works again
    /// once there is room.
    #[error(
        "the file system of {} is full: free space there or prune recovery points; \
         what is sealed is safe, replication goes on when there is room", dir.display()
    )]
    Full {
        /// The directory that has no room.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The configured limit is reached.
    #[error(
        "the store in {} holds {have} bytes and may hold {limit}: \
         raise the limit or keep fewer recovery points", dir.display()
    )]
    Quota {
        /// The store.
        dir: PathBuf,
        /// Bytes it holds.
        have: u64,
        /// Bytes it may hold.
        limit: u64,
    },
    /// A sync failed before. What the disk holds is not known any more.
    #[error(
        "the log in {} stopped taking data because its disk failed to sync ({why}): \
         check the disk, then restart the daemon", dir.display()
    )]
    Failed {
        /// The directory.
        dir: PathBuf,
        /// The first failure.
        why: String,
    },
    /// The same number with other content.
    #[error(
        "batch {seq} is in the log with other content: the peer numbers its batches from \
         a lost state; restart replication from the newest sealed point"
    )]
    Conflict {
        /// The number.
        seq: u64,
    },
    /// Not in the log.
    #[error("batch {seq} is not in the log; it was never received, or was pruned or lost")]
    Missing {
        /// The number.
        seq: u64,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

struct Writer {
    segment: u32,
    file: Option<OpenFile>,
    offset: u64,
    /// Up to here the file was synced.
    synced: u64,
    failed: Option<String>,
    secret: Secret,
}

/// The largest numbers that batches are known to have had, here or lost: one of a
/// source's, one of an image's. A lost batch that gave its number to another would have
/// what names a place in it read the other's units.
#[derive(Default)]
struct Given([AtomicU64; 2]);

impl Given {
    fn of(&self, image: bool) -> &AtomicU64 {
        &self.0[usize::from(image)]
    }

    fn note(&self, seq: u64) {
        let largest = self.of(seq >= IMAGE_SEQ);
        if largest.load(Ordering::Relaxed) < seq {
            largest.fetch_max(seq, Ordering::Relaxed);
        }
    }
}

/// The segments of one store.
pub(crate) struct Log {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    bytes_most: Option<u64>,
    index: RwLock<BTreeMap<u64, Location>>,
    segments: Mutex<BTreeMap<u32, u64>>,
    writer: Mutex<Writer>,
    readers: Mutex<HashMap<u32, OpenFile>>,
    given: Given,
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn segment_path(dir: &Path, segment: u32) -> PathBuf {
    dir.join(format!("{segment:08}.seg"))
}

impl Log {
    /// Opens the segments in `dir`, calling `seen` for every batch that is kept.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        segment_bytes: u64,
        bytes_most: Option<u64>,
        seen: &mut dyn FnMut(&BatchHeader),
    ) -> Result<(Log, ScanReport), FileError> {
        make_dir(&*disk, dir)?;
        // Names that a killed process made last forever from here on.
        sync_dir(&*disk, dir)?;
        let mut index = BTreeMap::new();
        let given = Given::default();
        let Scanned {
            segments,
            fronts,
            report,
        } = scan::scan(&*disk, dir, &mut index, &given, seen)?;
        let last = segments
            .last_key_value()
            .map(|(&number, &bytes)| (number, bytes));
        let known = fronts.last_key_value().map(|(_, front)| front.secret);
        let mut writer = Writer {
            segment: 0,
            file: None,
            offset: 0,
            synced: 0,
            failed: None,
            secret: known.unwrap_or_else(Secret::new),
        };
        if let Some((segment, offset)) = last {
            let file = open_private(&*disk, &segment_path(dir, segment))?;
            // Nothing is added to one without a front: the next batch begins a new one.
            let goes_on = offset == 0 || fronts.contains_key(&segment);
            writer = Writer {
                segment,
                file: goes_on.then_some(file),
                offset,
                synced: offset,
                ..writer
            };
        }
        let log = Log {
            disk,
            dir: dir.to_path_buf(),
            segment_bytes,
            bytes_most,
            index: RwLock::new(index),
            segments: Mutex::new(segments),
            writer: Mutex::new(writer),
            readers: Mutex::new(HashMap::new()),
            given,
        };
        Ok((log, report))
    }

    /// Appends verified batches and syncs once. When this returns, every one of
    /// them is durable. On an error some may be: sending them again is harmless.
    pub(crate) fn append(&self, batches: &[(BatchHeader, &[u8])]) -> Result<(), LogError> {
        self.append_with(batches, false)
    }

    /// Copies batches to the end, so that the segments they are in can go.
    pub(crate) fn move_to_end(&self, batches: &[(BatchHeader, &[u8])]) -> Result<(), LogError> {
        self.append_with(batches, true)
    }

    fn append_with(&self, batches: &[(BatchHeader, &[u8])], again: bool) -> Result<(), LogError> {
        let mut writer = held(&self.writer);
        let mut done: BTreeMap<u64, ([u8; 32], Location)> = BTreeMap::new();
        let mut outcome = Ok(());
        for (header, bytes) in batches {
            if let Some((hash, _)) = done.get(&header.seq) {
                if *hash == header.hash {
                    continue;
                }
                outcome = Err(LogError::Conflict { seq: header.seq });
                break;
            }
            if !again {
                match self.known(header, bytes) {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
            }
            match self.write(&mut writer, header, bytes, again) {
                Ok(location) => done.insert(header.seq, (header.hash, location)),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            };
        }
        if !done.is_empty() {
            self.sync(&mut writer)?;
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            index.extend(done.into_iter().map(|(seq, (_, location))| (seq, location)));
        }
        outcome
    }

    fn write(
        &self,
        writer: &mut Writer,
        header: &BatchHeader,
        bytes: &[u8],
        again: bool,
    ) -> Result<Location, LogError> {
        if let Some(why) = &writer.failed {
            return Err(LogError::Failed {
                dir: self.dir.clone(),
                why: why.clone(),
            });
        }
        let have = self.bytes();
        if let Some(limit) = self.bytes_most
            && !again
            && have + bytes.len() as u64 > limit
        {
            return Err(LogError::Quota {
                dir: self.dir.clone(),
                have,
                limit,
            });
        }
        let stored = |offset| offset + front::before(offset) + bytes.len() as u64;
        if writer.file.is_none() || stored(writer.offset) > self.segment_bytes {
            self.roll(writer)?;
        }
        let (segment, start) = (writer.segment, writer.offset);
        let framed = (writer.secret).framed(segment, start, &header.hash, bytes);
        let path = segment_path(&self.dir, writer.segment);
        let Some(file) = &writer.file else {
            return Err(self.lost(writer));
        };
        if let Err(source) = file.write_all_at(&framed, start) {
            // Back to the last whole record: whatever came of it must not stay.
            if let Err(error) = file.set_len(writer.offset) {
                let why = format!("cannot cut {} back: {error}", path.display());
                writer.failed = Some(why);
            }
            let error = FileError {
                action: "append to",
                path,
                source,
            };
            return Err(match error.is_full() {
                true => LogError::Full {
                    dir: self.dir.clone(),
                    source: error.source,
                },
                false => error.into(),
            });
        }
        let location = Location {
            segment,
            offset: (start + front::before(start)) as u32,
            bytes: bytes.len() as u32,
            literals: header.literals,
            deltas: header.deltas,
            mark: MARK as u8,
        };
        writer.offset = stored(start);
        held(&self.segments).insert(writer.segment, writer.offset);
        Ok(location)
    }

    /// Closes the segment, synced, and starts the next.
    fn roll(&self, writer: &mut Writer) -> Result<(), LogError> {
        self.sync(writer)?;
        let segment = writer.segment + 1;
        let path = segment_path(&self.dir, segment);
        let made = (self.disk.open(&path, Access::Replace))
            .map_err(FileError::at("make", &path))
            .and_then(|file| {
                sync_dir(&*self.disk, &self.dir)?;
                Ok(file)
            });
        let file = made.map_err(|error| match error.is_full() {
            true => LogError::Full {
                dir: self.dir.clone(),
                source: error.source,
            },
            false => error.into(),
        })?;
        *writer = Writer {
            segment,
            file: Some(file),
            offset: 0,
            synced: 0,
            failed: None,
            secret: writer.secret,
        };
        held(&self.segments).insert(segment, 0);
        Ok(())
    }

    /// Makes everything written durable. A failure is final: after it the
    /// kernel may have dropped the pages, and a second sync would lie.
    fn sync(&self, writer: &mut Writer) -> Result<(), LogError> {
        if writer.failed.is_some() {
            return Err(self.lost(writer));
        }
        let Some(file) = &writer.file else {
            return Ok(());
        };
        if let Err(error) = file.sync() {
            writer.failed = Some(error.to_string());
            // Memory may go on showing what the disk never got: a daemon that is
            // started again must not find it. It also reads from the disk then.
            let _ = file.set_len(writer.synced);
            return Err(self.lost(writer));
        }
        writer.synced = writer.offset;
        Ok(())
    }

    fn lost(&self, writer: &Writer) -> LogError {
        let why = writer.failed.clone().unwrap_or_default();
        LogError::Failed {
            dir: self.dir.clone(),
            why,
        }
    }

    pub(crate) fn path_of(&self, segment: u32) -> PathBuf {
        segment_path(&self.dir, segment)
    }

    pub(crate) fn locate(&self, seq: u64) -> Option<Location> {
        self.index
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&seq)
            .copied()
    }

    /// Numbers of batches in `range`, at most `most`.
    pub(crate) fn seqs_in(&self, range: Range<u64>, most: usize) -> Vec<u64> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.range(range).take(most).map(|(&seq, _)| seq).collect()
    }

    /// Calls `visit` for every batch, in the order of their numbers.
    pub(crate) fn each(&self, visit: &mut dyn FnMut(u64, Location)) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index
            .iter()
            .for_each(|(&seq, &location)| visit(seq, location));
    }

    /// The `count` largest numbers of a source's batches, descending.
    pub(crate) fn newest(&self, count: usize) -> Vec<u64> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let of_source = index.range(..IMAGE_SEQ).rev();
        of_source.take(count).map(|(seq, _)| *seq).collect()
    }

    /// The largest number of a source's batch that is or was in the log, 0 when there is
    /// none.
    pub(crate) fn last_seq(&self) -> u64 {
        let lost = self.given.of(false).load(Ordering::Relaxed);
        self.last_in(0..IMAGE_SEQ).max(lost)
    }

    /// The largest number of an image's batch that is or was in the log, 0 when there is
    /// none.
    pub(crate) fn last_image_seq(&self) -> u64 {
        let lost = self.given.of(true).load(Ordering::Relaxed);
        self.last_in(IMAGE_SEQ..SEQ).max(lost)
    }

    /// The batches of the largest numbers, a source's and an image's: as long as they stay
    /// the next start of the daemon knows those numbers.
    pub(crate) fn last_kept(&self) -> [u64; 2] {
        [self.last_in(0..IMAGE_SEQ), self.last_in(IMAGE_SEQ..SEQ)]
    }

    /// Something names a place in this batch, which need not be here: its number was given.
    pub(crate) fn was_given(&self, seq: u64) {
        self.given.note(seq);
    }

    fn last_in(&self, range: Range<u64>) -> u64 {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.range(range).next_back().map_or(0, |(&seq, _)| seq)
    }

    /// Bytes in all segments.
    pub(crate) fn bytes(&self) -> u64 {
        held(&self.segments).values().sum()
    }

    /// Segments and their bytes, without the one that is being written.
    pub(crate) fn closed_segments(&self) -> BTreeMap<u32, u64> {
        let current = held(&self.writer).segment;
        let mut segments = held(&self.segments).clone();
        segments.remove(&current);
        segments
    }

    /// Forgets batches; their bytes go with their segments.
    pub(crate) fn forget(&self, seqs: &[u64]) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for seq in seqs {
            index.remove(seq);
        }
    }

    /// Removes a segment that nothing in the index lies in.
    pub(crate) fn remove_segment(&self, segment: u32) -> Result<u64, FileError> {
        let path = segment_path(&self.dir, segment);
        held(&self.readers).remove(&segment);
        match self.disk.remove(&path) {
            // A prune before this one removed it, and then failed to sync.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(FileError::at("remove", &path))?,
        }
        sync_dir(&*self.disk, &self.dir)?;
        Ok(held(&self.segments).remove(&segment).unwrap_or(0))
    }
}
