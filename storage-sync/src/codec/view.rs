//! Reading a batch without trust: hashes first, then entries, then the body.

use crate::codec::batch::{BatchError, BatchHeader, hash_of};
use crate::codec::body::Body;
use crate::codec::compress::{self, Expander};
use crate::codec::entry::{Content, Entry, EntryError, EntryReader};
use crate::limits::{BATCH_BODY_RAW, BATCH_HEADER};

/// Header and entries of a batch, verified; its body may be absent.
#[derive(Debug, Clone, Copy)]
pub struct EntriesView<'a> {
    /// The fixed part.
    pub header: BatchHeader,
    entries: &'a [u8],
}

impl<'a> EntriesView<'a> {
    /// Verifies header and entries at the front of `bytes`.
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn parse(bytes: &'a [u8]) -> Result<EntriesView<'a>, BatchError> {
        let header = BatchHeader::parse(bytes)?;
        let need = BATCH_HEADER + header.entries_bytes;
        let short = BatchError::Short {
            have: bytes.len(),
            need,
        };
        let Some(entries) = bytes.get(BATCH_HEADER..need) else {
            return Err(short);
        };
        if hash_of(bytes, entries) != header.hash {
            return Err(BatchError::Damaged {
                seq: header.seq,
                part: "entries",
            });
        }
        let view = EntriesView { header, entries };
        view.check()?;
        Ok(view)
    }

    fn check(&self) -> Result<(), BatchError> {
        let mut reader = EntryReader::new(self.entries, self.header.seq);
        let (mut count, mut deltas, mut images) = (0, false, false);
        while let Some(entry) = reader.take().map_err(from_entry)? {
            count += 1;
            if count > self.header.entries {
                return Err(BatchError::Invalid("more entries than its header says"));
            }
            if let Content::Refs(place) = entry.content
                && place.seq() == self.header.seq
                && u64::from(place.index()) + entry.count > u64::from(self.header.literals)
            {
                return Err(BatchError::Invalid(
                    "a reference to a slot it does not have",
                ));
            }
            deltas |= matches!(entry.content, Content::Delta(_));
            images |= entry.of_image(self.header.seq);
        }
        if count != self.header.entries {
            return Err(BatchError::Invalid("fewer entries than its header says"));
        }
        let (literals, differences) = reader.body_bytes();
        if reader.slots() != usize::from(self.header.literals)
            || literals + differences != self.header.body_raw
        {
            return Err(BatchError::Invalid("its entries use another body"));
        }
        if deltas != self.header.deltas {
            return Err(BatchError::Invalid(
                "it has differences and no flag, or a flag and none",
            ));
        }
        if images != self.header.images {
            return Err(BatchError::Invalid(
                "it refers to images and has no flag, or a flag and does not",
            ));
        }
        Ok(())
    }

    /// The entries, in the order they apply: a later one wins.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + 'a {
        let mut reader = EntryReader::new(self.entries, self.header.seq);
        // `parse` has read them all once, so none fails here.
        std::iter::from_fn(move || reader.take().ok().flatten())
    }
}

/// What of a batch a newer version made, when one did: told from rot by the batch's hash,
/// whose place, as those of all lengths, no later layout moves.
pub(crate) fn newer(bytes: &[u8]) -> Option<String> {
    let Err(BatchError::Newer { what }) = EntriesView::parse(bytes) else {
        return None;
    };
    let length = u32::from_le_bytes(*bytes.get(40..)?.first_chunk()?) as usize;
    let entries = bytes.get(BATCH_HEADER..BATCH_HEADER.checked_add(length)?)?;
    (hash_of(bytes, entries) == *bytes.get(88..120)?).then_some(what)
}

fn from_entry(error: EntryError) -> BatchError {
    match error {
        EntryError::Newer(kind) => BatchError::Newer {
            what: format!("entry kind {kind:#04x}"),
        },
        EntryError::Invalid(why) => BatchError::Invalid(why),
    }
}

/// A whole batch, verified.
#[derive(Debug, Clone, Copy)]
pub struct BatchView<'a> {
    view: EntriesView<'a>,
    body: &'a [u8],
}

impl<'a> BatchView<'a> {
    /// Verifies lengths, hashes and entries of exactly one batch. The body is
    /// not expanded yet: see [`BatchView::literals`].
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn parse(bytes: &'a [u8]) -> Result<BatchView<'a>, BatchError> {
        let view = EntriesView::parse(bytes)?;
        let need = view.header.bytes();
        if bytes.len() > need {
            return Err(BatchError::Invalid("bytes follow its end"));
        }
        let short = BatchError::Short {
            have: bytes.len(),
            need,
        };
        let start = BATCH_HEADER + view.header.entries_bytes;
        let Some(body) = bytes.get(start..need) else {
            return Err(short);
        };
        if *blake3::hash(body).as_bytes() != view.header.body_hash {
            return Err(BatchError::Damaged {
                seq: view.header.seq,
                part: "body",
            });
        }
        Ok(BatchView { view, body })
    }

    /// The fixed part.
    pub fn header(&self) -> &BatchHeader {
        &self.view.header
    }

    /// The entries, in the order they apply: a later one wins.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + 'a {
        self.view.entries()
    }

    /// Expands the body into `out`: literals, then differences, as
    /// [`BatchHeader::body_raw`] says, at most 256 KiB.
    ///
    /// # Errors
    /// When the body does not expand to exactly that.
    pub fn literals(&self, expander: &mut Expander, out: &mut Vec<u8>) -> Result<(), BatchError> {
        let BatchHeader {
            seq,
            literals,
            codec,
            body_raw,
            ..
        } = self.view.header;
        debug_assert!(body_raw <= BATCH_BODY_RAW);
        compress::expand(expander, codec, self.body, body_raw, out).map_err(|source| {
            BatchError::Body {
                seq,
                literals,
                source,
            }
        })
    }

    /// Expands the body into `body`, slot by slot.
    ///
    /// # Errors
    /// As for [`BatchView::literals`].
    pub fn expand(&self, expander: &mut Expander, body: &mut Body) -> Result<(), BatchError> {
        self.literals(expander, &mut body.bytes)?;
        body.lay(self.entries());
        Ok(())
    }
}
