//! Entries of a batch: what each run of units becomes, in a few bytes each.
//!
//! An entry says which units it is about relative to the one before it, so
//! that a sequential scan costs about three bytes a run. The mirror halves are
//! [`EntryWriter`] and [`EntryReader`]; `FORMAT.md` draws the bytes.

use crate::codec::varint;
use crate::limits::{SEQ, VOLUME_UNITS, VOLUMES};
use crate::unit::{GROUP, Place, VolumeIndex};

const KIND: u8 = 0b0000_0111;
const VOLUME: u8 = 0b0000_1000;
const GAP: u8 = 0b0001_0000;
const COUNT: u8 = 0b0010_0000;
const ZEROS: u8 = 1;
const LITERALS: u8 = 2;
const REFS: u8 = 3;
/// Kept for units told as a difference from an older one. Not written yet.
const DELTA: u8 = 4;

/// A run of units of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which volume of the guest.
    pub volume: VolumeIndex,
    /// First unit of the run.
    pub unit: u64,
    /// Units in the run, at least 1.
    pub count: u64,
    /// What they hold.
    pub content: Content,
}

/// What the units of an entry hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zeros,
    /// Consecutive literals of this batch's body, the first with this index.
    Literals(u8),
    /// Consecutive literals of one batch that was sent before, or of this one.
    Refs(Place),
}

impl Entry {
    /// The place of the first unit, given the number of the batch it is in.
    /// The units after it lie in the places after it, except zeros.
    pub fn place(&self, seq: u64) -> Place {
        match self.content {
            Content::Zeros => Place::ZERO,
            Content::Literals(index) => Place::new(seq, index),
            Content::Refs(place) => place,
        }
    }

    /// Does `next` continue this run? Then both can be told as one.
    fn continued_by(&self, next: &Entry) -> bool {
        if next.volume != self.volume || self.unit + self.count != next.unit {
            return false;
        }
        match (self.content, next.content) {
            (Content::Zeros, Content::Zeros) => true,
            (Content::Literals(a), Content::Literals(b)) => {
                u64::from(a) + self.count == u64::from(b)
            }
            (Content::Refs(a), Content::Refs(b)) => {
                a.seq() == b.seq() && u64::from(a.index()) + self.count == u64::from(b.index())
            }
            _ => false,
        }
    }
}

/// Where the next entry is counted from.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    volume: VolumeIndex,
    unit: u64,
    place: u64,
    literals: u64,
}

impl Cursor {
    fn new(seq: u64) -> Cursor {
        Cursor {
            volume: 0,
            unit: 0,
            place: seq << 6,
            literals: 0,
        }
    }
}

/// Writes entries, joining runs that continue one another.
#[derive(Debug)]
pub(crate) struct EntryWriter {
    bytes: Vec<u8>,
    written: usize,
    cursor: Cursor,
    open: Option<Entry>,
}

impl EntryWriter {
    pub(crate) fn new(seq: u64) -> EntryWriter {
        EntryWriter {
            bytes: Vec::new(),
            written: 0,
            cursor: Cursor::new(seq),
            open: None,
        }
    }

    pub(crate) fn push(&mut self, entry: Entry) {
        match &mut self.open {
            Some(open) if open.continued_by(&entry) => open.count += entry.count,
            _ => {
                self.close();
                self.open = Some(entry);
            }
        }
    }

    /// Entries, the open one included.
    pub(crate) fn entries(&self) -> usize {
        self.written + usize::from(self.open.is_some())
    }

    /// Bytes written for closed entries.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn finish(mut self) -> (usize, Vec<u8>) {
        self.close();
        (self.written, self.bytes)
    }

    fn close(&mut self) {
        let Some(entry) = self.open.take() else {
            return;
        };
        let mut kind = match entry.content {
            Content::Zeros => ZEROS,
            Content::Literals(_) => LITERALS,
            Content::Refs(_) => REFS,
        };
        let start = if entry.volume == self.cursor.volume {
            self.cursor.unit
        } else {
            0
        };
        kind |= if entry.volume == self.cursor.volume {
            0
        } else {
            VOLUME
        };
        kind |= if entry.unit == start { 0 } else { GAP };
        kind |= if entry.count == 1 { 0 } else { COUNT };
        self.bytes.push(kind);
        if kind & VOLUME != 0 {
            varint::put(&mut self.bytes, entry.volume.into());
        }
        if kind & GAP != 0 {
            varint::put_step(&mut self.bytes, start, entry.unit);
        }
        if kind & COUNT != 0 {
            varint::put(&mut self.bytes, entry.count);
        }
        if let Content::Refs(place) = entry.content {
            varint::put_step(&mut self.bytes, self.cursor.place, place.0);
            self.cursor.place = place.0 + entry.count;
        }
        self.cursor.volume = entry.volume;
        self.cursor.unit = entry.unit + entry.count;
        self.written += 1;
    }
}

/// Why the bytes of an entry are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// A kind this version does not know.
    #[error("an entry of kind {0:#04x} was written by a newer version: upgrade this site")]
    Newer(u8),
    /// Anything else, with the rule that it breaks.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Reads entries off verified or unverified bytes; never trusts them.
#[derive(Debug, Clone)]
pub struct EntryReader<'a> {
    rest: &'a [u8],
    seq: u64,
    cursor: Cursor,
}

impl<'a> EntryReader<'a> {
    /// Reads the entries in `bytes` of batch `seq`.
    pub fn new(bytes: &'a [u8], seq: u64) -> EntryReader<'a> {
        EntryReader {
            rest: bytes,
            seq,
            cursor: Cursor::new(seq),
        }
    }

    /// The entry in front, `None` at the end.
    ///
    /// # Errors
    /// When the bytes are no entry; nothing after it can be read then.
    pub fn take(&mut self) -> Result<Option<Entry>, EntryError> {
        use EntryError::Invalid;
        let Some((&kind, rest)) = self.rest.split_first() else {
            return Ok(None);
        };
        self.rest = rest;
        let known = matches!(kind & KIND, ZEROS | LITERALS | REFS);
        if kind & KIND == DELTA || kind & !(KIND | VOLUME | GAP | COUNT) != 0 || !known {
            return Err(EntryError::Newer(kind));
        }
        let mut volume = self.cursor.volume;
        let mut unit = self.cursor.unit;
        if kind & VOLUME != 0 {
            let value = varint::take(&mut self.rest).ok_or(Invalid("no volume number"))?;
            volume = VolumeIndex::try_from(value).map_err(|_| Invalid("volume out of range"))?;
            unit = 0;
        }
        if kind & GAP != 0 {
            unit = varint::take_step(&mut self.rest, unit).ok_or(Invalid("unit out of range"))?;
        }
        let count = match kind & COUNT {
            0 => 1,
            _ => varint::take(&mut self.rest).ok_or(Invalid("no count"))?,
        };
        if usize::from(volume) >= VOLUMES {
            return Err(Invalid("volume out of range"));
        }
        let end = unit.checked_add(count).filter(|&end| end <= VOLUME_UNITS);
        let end = end.ok_or(Invalid("unit out of range"))?;
        if count == 0 {
            return Err(Invalid("an entry of no units"));
        }
        let content = match kind & KIND {
            ZEROS => Content::Zeros,
            LITERALS => self.literals(count)?,
            _ => self.refs(count)?,
        };
        self.cursor.volume = volume;
        self.cursor.unit = end;
        Ok(Some(Entry {
            volume,
            unit,
            count,
            content,
        }))
    }

    /// Literals that the entries so far have used.
    pub(crate) fn literals_used(&self) -> u64 {
        self.cursor.literals
    }

    fn literals(&mut self, count: u64) -> Result<Content, EntryError> {
        let first = self.cursor.literals;
        if count > GROUP as u64 - first {
            return Err(EntryError::Invalid("more literals than a batch may hold"));
        }
        self.cursor.literals += count;
        Ok(Content::Literals(first as u8))
    }

    fn refs(&mut self, count: u64) -> Result<Content, EntryError> {
        use EntryError::Invalid;
        let place = varint::take_step(&mut self.rest, self.cursor.place);
        let place = Place(place.ok_or(Invalid("place out of range"))?);
        if place.seq() == 0 || place.seq() > SEQ || place.seq() > self.seq {
            return Err(Invalid("a reference to no earlier batch"));
        }
        if count > GROUP as u64 - u64::from(place.index()) {
            return Err(Invalid("a reference beyond its batch"));
        }
        self.cursor.place = place.0 + count;
        Ok(Content::Refs(place))
    }
}
