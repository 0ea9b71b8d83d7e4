//! Behind a broken batch: where the next one is.
//!
//! The bytes of a guest may look like a whole batch, with any number. So nothing is taken
//! for one only because it looks so: either its mark is right, or it stands where the
//! header of the one before it says.

use std::io;

use super::front::{MARK, Secret};
use super::scan::{Patient, record};
use crate::codec::{BatchHeader, BatchView, EntriesView, MAGIC};
use crate::limits::{BATCH_BYTES, BATCH_ENTRIES_BYTES, BATCH_HEADER};

/// What follows a broken batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A whole one, with so many bytes of its mark before it, from this offset on.
    At(u64, u64),
    /// None: it ends there.
    Nothing,
    /// There is what may be one, and nothing says whether it is.
    Untold,
}

/// The batch behind a broken one at `offset` of a segment whose batches have marks.
pub(super) fn marked(
    file: &mut Patient,
    (segment, secrets): (u32, &[Secret]),
    offset: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Next> {
    let found = search(file, offset + 1 + MARK, length, &mut |file, at| {
        let mut told = [0; MARK as usize + BATCH_HEADER];
        if at + BATCH_HEADER as u64 > length {
            return Ok(false);
        }
        file.read(&mut told, at - MARK)?;
        let (mark, hash) = (&told[..MARK as usize], &told[MARK as usize + 88..]);
        let genuine = |secret: &Secret| secret.mark(segment, at, hash)[..] == *mark;
        Ok(secrets.iter().any(genuine) && record(file, at, length, true, buffer)?.is_ok())
    })?;
    Ok(found.map_or(Next::Nothing, |at| Next::At(at - MARK, MARK)))
}

/// The batch behind a broken one at `offset` of a segment without marks: as far as whole
/// headers say where the next one begins.
pub(super) fn unmarked(
    file: &mut Patient,
    mut offset: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Next> {
    while let Some(header) = header_at(file, offset, length, buffer)? {
        offset += header.bytes() as u64;
        if offset >= length {
            return Ok(Next::Nothing);
        }
        if record(file, offset, length, true, buffer)?.is_ok() {
            return Ok(Next::At(offset, 0));
        }
    }
    let found = search(file, offset + 1, length, &mut |file, at| {
        looks_whole(file, at, length, buffer)
    })?;
    Ok(found.map_or(Next::Nothing, |_| Next::Untold))
}

/// The header at `offset`, when it and its entries are whole.
pub(super) fn header_at(
    file: &mut Patient,
    offset: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<BatchHeader>> {
    if offset >= length {
        return Ok(None);
    }
    let most = (BATCH_HEADER + BATCH_ENTRIES_BYTES) as u64;
    buffer.clear();
    buffer.resize((length - offset).min(most) as usize, 0);
    file.read(buffer, offset)?;
    Ok(EntriesView::parse(buffer).ok().map(|view| view.header))
}

/// May this be a whole batch? What a newer version is said to have written is none: it
/// writes to no segment without marks.
fn looks_whole(
    file: &mut Patient,
    offset: u64,
    length: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<bool> {
    buffer.clear();
    buffer.resize((length - offset).min(BATCH_BYTES as u64) as usize, 0);
    file.read(buffer, offset)?;
    let Ok(header) = BatchHeader::parse(buffer) else {
        return Ok(false);
    };
    let whole = buffer.get(..header.bytes());
    Ok(whole.is_some_and(|bytes| BatchView::parse(bytes).is_ok()))
}

/// The first offset from `from` on where the first bytes of a batch stand, and that `is_one`.
fn search(
    file: &mut Patient,
    from: u64,
    length: u64,
    is_one: &mut dyn FnMut(&mut Patient, u64) -> io::Result<bool>,
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
            if is_one(file, offset)? {
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
