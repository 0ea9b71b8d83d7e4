//! The catalogue's journal: every change, one checksummed record each.
//!
//! A record is: length of key (u16), length of value (u32, all ones: removed),
//! key, value, and the first 16 bytes of BLAKE3 over all of that. A torn end
//! was never flushed and is cut off. Once it is much longer than what it
//! tells, it is written anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Rows, Table};
use crate::disk::{Disk, OpenFile};
use crate::files::{FileError, open_private, open_settled, put_whole, sync_dir};
use crate::limits::{CATALOGUE_KEY, CATALOGUE_VALUE};

pub(super) const MAGIC: &[u8; 8] = b"FHcj\x01\0\0\0";
const REMOVED: u32 = u32::MAX;
const FIXED: usize = 6;
const SUM: usize = 16;

/// Written anew when longer than this and than four times its rows.
const LONG: u64 = 4 << 20;

pub(super) struct Journal {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: OpenFile,
    length: u64,
    /// Up to here it was synced.
    synced: u64,
    rows_length: u64,
    failed: bool,
}

/// What is torn at the end.
pub(super) struct Tail {
    pub(super) bytes: u64,
    /// It may have been flushed, and rotted since.
    pub(super) doubtful: bool,
}

pub(super) enum OpenError {
    File(FileError),
    /// It is no journal, or damaged before its end; these rows can be read.
    Damaged(Rows),
}

impl OpenError {
    pub(super) fn file(self) -> FileError {
        match self {
            OpenError::File(error) => error,
            OpenError::Damaged(_) => FileError {
                action: "make",
                path: PathBuf::from("catalogue.journal"),
                source: std::io::ErrorKind::InvalidData.into(),
            },
        }
    }
}

pub(super) fn record(row: &[u8], value: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FIXED + row.len() + value.map_or(0, <[u8]>::len) + SUM);
    bytes.extend_from_slice(&(row.len() as u16).to_le_bytes());
    bytes.extend_from_slice(
        &value
            .map_or(REMOVED, |value| value.len() as u32)
            .to_le_bytes(),
    );
    bytes.extend_from_slice(row);
    bytes.extend_from_slice(value.unwrap_or_default());
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(&sum.as_bytes()[..SUM]);
    bytes
}

/// Row, value (`None`: removed), and the record's length.
type Record<'a> = (&'a [u8], Option<&'a [u8]>, usize);

/// The record in front, if it is whole.
fn take(bytes: &[u8]) -> Option<Record<'_>> {
    let key = u16::from_le_bytes(*bytes.first_chunk()?) as usize;
    let value = u32::from_le_bytes(*bytes.get(2..)?.first_chunk()?);
    let removed = value == REMOVED;
    let value = if removed { 0 } else { value as usize };
    if key == 0 || key > CATALOGUE_KEY + 1 || value > CATALOGUE_VALUE {
        return None;
    }
    let end = FIXED + key + value;
    let sum = bytes.get(end..end + SUM)?;
    if blake3::hash(&bytes[..end]).as_bytes()[..SUM] != *sum {
        return None;
    }
    let row = &bytes[FIXED..FIXED + key];
    Some((
        row,
        (!removed).then_some(&bytes[FIXED + key..end]),
        end + SUM,
    ))
}

/// Applies the records from `at` on; `false`: there is none.
///
/// # Errors
/// At a row of a table that only a newer version has, under a right sum.
fn replay(bytes: &[u8], at: &mut usize, rows: &mut Rows) -> Result<bool, String> {
    let start = *at;
    while let Some((row, value, length)) = bytes.get(*at..).and_then(take) {
        let table = row.first().copied().unwrap_or_default();
        if Table::from_number(table).is_none() {
            return Err(format!("rows of table {table}"));
        }
        match value {
            Some(value) => rows.insert(row.to_vec(), value.to_vec()),
            None => rows.remove(row),
        };
        *at += length;
    }
    Ok(*at > start)
}

/// A version of the whole journal that is not this one, nor this one with a bit flipped.
fn newer_version(bytes: &[u8]) -> Option<String> {
    let ours = u16::from_le_bytes([MAGIC[4], MAGIC[5]]);
    let version = u16::from_le_bytes(*bytes.strip_prefix(&MAGIC[..4])?.first_chunk()?);
    let newer = version > ours && (version ^ ours).count_ones() > 1;
    newer.then(|| format!("journal {version}"))
}

impl Journal {
    /// Opens and replays it. Returns its rows, and what is torn at its end: that is cut
    /// off, or where it is doubtful stays until the journal is rewritten, which it must
    /// be before it is used.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        path: &Path,
    ) -> Result<(Journal, Rows, Tail), OpenError> {
        let newer = |what| OpenError::File(FileError::newer(path, what));
        let io = |action| move |error| OpenError::File(FileError::at(action, path)(error));
        let _ = disk.remove(&path.with_extension("tmp"));
        let file = open_settled(&*disk, path).map_err(OpenError::File)?;
        if let Some(dir) = path.parent() {
            sync_dir(&*disk, dir).map_err(OpenError::File)?;
        }
        let mut bytes = vec![0; file.bytes().map_err(io("read"))? as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io("read"))?;
        let mut rows = Rows::new();
        let mut at = MAGIC.len();
        if !bytes.starts_with(MAGIC) {
            return Err(match newer_version(&bytes) {
                Some(what) => newer(what),
                None => OpenError::Damaged(Rows::new()),
            });
        }
        replay(&bytes, &mut at, &mut rows).map_err(newer)?;
        let torn = bytes.len().saturating_sub(at) as u64;
        // A torn end is one unflushed tail. Whole records behind the break
        // mean that something in the middle rotted, or that a power cut took
        // one unflushed record and left another.
        let mut behind = at + 1;
        let mut whole = false;
        while behind < bytes.len() {
            whole |= replay(&bytes, &mut behind, &mut rows).map_err(newer)?;
            behind += 1;
        }
        if whole {
            return Err(OpenError::Damaged(rows));
        }
        let tail = Tail {
            bytes: torn,
            // Zeros are where bytes never came.
            doubtful: bytes.iter().skip(at).any(|&byte| byte != 0),
        };
        if torn > 0 && !tail.doubtful {
            file.set_len(at as u64).map_err(io("cut"))?;
            file.sync().map_err(io("sync"))?;
        }
        let rows_length = length_of(&rows);
        let path = path.to_path_buf();
        Ok((
            Journal {
                disk,
                path,
                file,
                length: at as u64,
                synced: at as u64,
                rows_length,
                failed: tail.doubtful,
            },
            rows,
            tail,
        ))
    }

    /// A journal of these rows in the place of what is there, whole or not at all.
    pub(super) fn of(disk: Arc<dyn Disk>, path: &Path, rows: &Rows) -> Result<Journal, FileError> {
        let bytes = whole(rows);
        put_whole(&*disk, path, &[&bytes])?;
        let file = open_private(&*disk, path)?;
        let length = bytes.len() as u64;
        Ok(Journal {
            disk,
            path: path.to_path_buf(),
            file,
            length,
            synced: length,
            rows_length: length,
            failed: false,
        })
    }

    pub(super) fn put(&mut self, row: &[u8], value: Option<&[u8]>) -> Result<(), FileError> {
        self.usable()?;
        let bytes = record(row, value);
        if let Err(source) = self.file.write_all_at(&bytes, self.length) {
            // Back to the last whole record.
            self.failed = self.file.set_len(self.length).is_err();
            return Err(FileError {
                action: "append to",
                path: self.path.clone(),
                source,
            });
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), FileError> {
        self.usable()?;
        if let Err(source) = self.file.sync() {
            // Final: what the disk holds is not known any more. Memory must not
            // go on showing it to a daemon that is started again.
            self.failed = true;
            let _ = self.file.set_len(self.synced);
            return Err(FileError::at("sync", &self.path)(source));
        }
        self.synced = self.length;
        Ok(())
    }

    fn usable(&self) -> Result<(), FileError> {
        if !self.failed {
            return Ok(());
        }
        let source = std::io::Error::other("it failed to sync before; restart the daemon");
        Err(FileError {
            action: "append to",
            path: self.path.clone(),
            source,
        })
    }

    pub(super) fn is_long(&self) -> bool {
        self.length > LONG && self.length > 4 * self.rows_length
    }

    /// Replaces the whole journal by these rows, durably.
    pub(super) fn rewrite(&mut self, rows: &Rows) -> Result<(), FileError> {
        let bytes = whole(rows);
        if let Err(unplaced) = put_whole(&*self.disk, &self.path, &[&bytes]) {
            // The file that is open may be the one without a name now.
            self.failed |= unplaced.named;
            return Err(unplaced.into());
        }
        self.failed = true;
        self.file = open_private(&*self.disk, &self.path)?;
        self.failed = false;
        self.length = bytes.len() as u64;
        self.synced = self.length;
        self.rows_length = self.length;
        Ok(())
    }
}

/// A journal of these rows and nothing else.
fn whole(rows: &Rows) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for (row, value) in rows {
        bytes.extend(record(row, Some(value)));
    }
    bytes
}

fn length_of(rows: &Rows) -> u64 {
    rows.iter()
        .map(|(row, value)| (FIXED + row.len() + value.len() + SUM) as u64)
        .sum()
}
