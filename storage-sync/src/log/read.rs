//! Reading batches from the segments.

use super::{Log, LogError, held, segment_path};
use crate::codec::{BatchHeader, BatchView};
use crate::disk::{Access, OpenFile};
use crate::files::{FileError, is_bad_sector};
use crate::limits::{BATCH_BYTES, BATCH_HEADER, SEGMENTS_OPEN};

impl Log {
    /// The whole batch, as bytes. Not verified here.
    pub(crate) fn read(&self, seq: u64, out: &mut Vec<u8>) -> Result<(), LogError> {
        self.read_part(seq, BATCH_BYTES, out)
    }

    /// Header and entries of a batch, not verified; more may follow.
    pub(crate) fn read_entries(&self, seq: u64, out: &mut Vec<u8>) -> Result<(), LogError> {
        self.read_part(seq, 2048, out)?;
        let whole = match BatchHeader::parse(out) {
            Ok(header) => BATCH_HEADER + header.entries_bytes,
            Err(_) => return Ok(()), // The caller parses it again and says why.
        };
        if whole > out.len() {
            self.read_part(seq, whole, out)
        } else {
            Ok(())
        }
    }

    fn read_part(&self, seq: u64, most: usize, out: &mut Vec<u8>) -> Result<(), LogError> {
        // Twice at most: prune may move the batch between look-up and read.
        for last in [false, true] {
            let location = self.locate(seq).ok_or(LogError::Missing { seq })?;
            out.clear();
            out.resize(most.min(location.bytes as usize), 0);
            let read = self.reader(location.segment).and_then(|file| {
                file.read_exact_at(out, location.offset.into())
                    .map_err(FileError::at(
                        "read",
                        &segment_path(&self.dir, location.segment),
                    ))
            });
            match read {
                Ok(()) => return Ok(()),
                Err(error) if last || self.locate(seq) == Some(location) => {
                    return Err(error.into());
                }
                Err(_) => {}
            }
        }
        Err(LogError::Missing { seq })
    }

    pub(super) fn reader(&self, segment: u32) -> Result<OpenFile, FileError> {
        let mut readers = held(&self.readers);
        if let Some(file) = readers.get(&segment) {
            return Ok(file.clone());
        }
        let path = segment_path(&self.dir, segment);
        let file = self.disk.open(&path, Access::Read);
        let file = file.map_err(FileError::at("open", &path))?;
        if readers.len() >= SEGMENTS_OPEN {
            readers.clear();
        }
        readers.insert(segment, file.clone());
        Ok(file)
    }

    /// Is exactly this batch in the log already? Its bytes are compared, so that
    /// a copy that rotted is replaced by the one that arrived.
    pub(super) fn known(&self, header: &BatchHeader, bytes: &[u8]) -> Result<bool, LogError> {
        if self.locate(header.seq).is_none() {
            return Ok(false);
        }
        let mut kept = Vec::new();
        match self.read(header.seq, &mut kept) {
            Ok(()) if kept == bytes => return Ok(true),
            Ok(()) => {}
            Err(LogError::File(error)) if is_bad_sector(&error.source) => return Ok(false),
            Err(error) => return Err(error),
        }
        match BatchView::parse(&kept) {
            Ok(other) if other.header().seq == header.seq => {
                Err(LogError::Conflict { seq: header.seq })
            }
            _ => {
                tracing::warn!(seq = header.seq, "a damaged batch is kept anew");
                Ok(false)
            }
        }
    }
}
