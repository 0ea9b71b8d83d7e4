//! Entries of a batch: what each run of units becomes, in a few bytes each.
//!
//! An entry says which units it is about relative to the one before it, so
//! that a sequential scan costs about three bytes a run. The mirror halves are
//! [`EntryWriter`] and [`EntryReader`]; `FORMAT.md` draws the bytes.

use crate::codec::varint;
use crate::limits::{DELTA_BYTES, DELTA_BYTES_LEAST, IMAGE_SEQ, SEQ, VOLUME_UNITS, VOLUMES};
use crate::unit::{GROUP, Place, UNIT, VolumeIndex};

const KIND: u8 = 0b0000_0111;
const VOLUME: u8 = 0b0000_1000;
const GAP: u8 = 0b0001_0000;
const COUNT: u8 = 0b0010_0000;
const ZEROS: u8 = 1;
const LITERALS: u8 = 2;
const REFS: u8 = 3;
/// One unit, told as a difference from an older one.
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
    /// Consecutive slots of this batch, told whole, the first with this index.
    Literals(u8),
    /// Consecutive slots of one batch that was sent before, of a stored image, or of this one.
    Refs(Place),
    /// One slot of this batch, told as a difference.
    Delta(Delta),
}

/// A unit told as a difference from a literal of an earlier batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// Its slot in this batch.
    pub index: u8,
    /// The literal that it changes.
    pub base: Place,
    /// Bytes of the difference in the body.
    pub length: u16,
    /// First eight bytes of BLAKE3 of the unit as it must come out.
    pub check: [u8; 8],
}

impl Entry {
    /// Does it refer to a stored image, from batch `seq`, which is of none?
    pub(crate) fn of_image(&self, seq: u64) -> bool {
        let Content::Refs(place) = self.content else {
            return false;
        };
        place.seq() >= IMAGE_SEQ && seq < IMAGE_SEQ
    }

    /// The place of the first unit, given the number of the batch it is in.
    /// The units after it lie in the places after it, except zeros.
    pub fn place(&self, seq: u64) -> Place {
        match self.content {
            Content::Zeros => Place::ZERO,
            Content::Literals(index) => Place::new(seq, index),
            Content::Refs(place) => place,
            Content::Delta(delta) => Place::new(seq, delta.index),
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
    base: u64,
    slots: u64,
    literals: u64,
    delta_bytes: usize,
}

impl Cursor {
    fn new(seq: u64) -> Cursor {
        Cursor {
            volume: 0,
            unit: 0,
            place: seq << 6,
            base: seq << 6,
            slots: 0,
            literals: 0,
            delta_bytes: 0,
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
            Content::Delta(_) => DELTA,
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
        if let Content::Delta(delta) = entry.content {
            varint::put_step(&mut self.bytes, self.cursor.base, delta.base.0);
            varint::put(&mut self.bytes, delta.length.into());
            self.bytes.extend_from_slice(&delta.check);
            self.cursor.base = delta.base.0;
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
        let known = matches!(kind & KIND, ZEROS | LITERALS | REFS | DELTA);
        if kind & !(KIND | VOLUME | GAP | COUNT) != 0 || !known {
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
            DELTA if kind & COUNT != 0 => return Err(Invalid("a difference of several units")),
            DELTA => self.delta()?,
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

    /// Bytes that are not read yet.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    /// Slots that the entries so far have taken.
    pub(crate) fn slots(&self) -> usize {
        self.cursor.slots as usize
    }

    /// Bytes that those slots take in the body: literals first, then differences.
    pub(crate) fn body_bytes(&self) -> (usize, usize) {
        (
            self.cursor.literals as usize * UNIT,
            self.cursor.delta_bytes,
        )
    }

    fn literals(&mut self, count: u64) -> Result<Content, EntryError> {
        let first = self.slot(count)?;
        self.cursor.literals += count;
        Ok(Content::Literals(first))
    }

    /// Takes the next `count` slots; the first of them.
    fn slot(&mut self, count: u64) -> Result<u8, EntryError> {
        let first = self.cursor.slots;
        if count > GROUP as u64 - first {
            return Err(EntryError::Invalid("more slots than a batch may hold"));
        }
        self.cursor.slots += count;
        Ok(first as u8)
    }

    fn delta(&mut self) -> Result<Content, EntryError> {
        use EntryError::Invalid;
        let base = varint::take_step(&mut self.rest, self.cursor.base);
        let base = Place(base.ok_or(Invalid("base out of range"))?);
        // Strictly earlier: differences can form no circle.
        if base.seq() == 0 || base.seq() >= self.seq {
            return Err(Invalid("a difference from no earlier batch"));
        }
        let length = varint::take(&mut self.rest).and_then(|length| usize::try_from(length).ok());
        let length = length.filter(|length| (DELTA_BYTES_LEAST..=DELTA_BYTES).contains(length));
        let length = length.ok_or(Invalid("a difference of a length out of range"))?;
        let Some((&check, rest)) = self.rest.split_first_chunk::<8>() else {
            return Err(Invalid("a difference without its hash"));
        };
        self.rest = rest;
        self.cursor.base = base.0;
        self.cursor.delta_bytes += length;
        Ok(Content::Delta(Delta {
            index: self.slot(1)?,
            base,
            length: length as u16,
            check,
        }))
    }

    fn refs(&mut self, count: u64) -> Result<Content, EntryError> {
        use EntryError::Invalid;
        let place = varint::take_step(&mut self.rest, self.cursor.place);
        let place = Place(place.ok_or(Invalid("place out of range"))?);
        // What images hold was there before any batch of a source.
        let earlier = place.seq() <= self.seq || place.seq() >= IMAGE_SEQ && self.seq < IMAGE_SEQ;
        if place.seq() == 0 || place.seq() > SEQ || !earlier {
            return Err(Invalid("a reference to no earlier batch"));
        }
        if count > GROUP as u64 - u64::from(place.index()) {
            return Err(Invalid("a reference beyond its batch"));
        }
        self.cursor.place = place.0 + count;
        Ok(Content::Refs(place))
    }
}
