//! The batch: what is sent is what is kept. Its layout and its fixed part;
//! `view.rs` reads the rest.
//!
//! A batch is a header, entries, and one body of up to 64 units, literals and
//! differences, compressed together. The header's hash covers header and entries and,
//! through the body's own hash, the body: so a point can be sealed by reading
//! entries only, and nothing is decompressed before it is verified.

use bytes::Bytes;

use crate::codec::compress::Codec;
use crate::limits::{BATCH_ENTRIES, BATCH_ENTRIES_BYTES, BATCH_HEADER, POINT, SEQ};
use crate::unit::{GROUP, GuestId, UNIT};

/// First bytes of every batch.
pub const MAGIC: [u8; 4] = *b"FHbt";
/// Version of the layout that is written and read.
pub const VERSION: u16 = 1;
const HASH: usize = 88;
/// The flag of a batch that has differences: an older version refuses it by name.
const DELTAS: u8 = 1;
/// The flag of a batch that refers to a stored image: likewise.
const IMAGES: u8 = 2;

/// A finished batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its number in the log of this pair of sites.
    pub seq: u64,
    /// The whole batch, as sent and as kept.
    pub bytes: Bytes,
    /// BLAKE3 as in the header.
    pub hash: [u8; 32],
    /// The point it belongs to.
    pub point: u64,
    /// Units carried in its body, whole or as differences.
    pub literals: u8,
    /// How many of them are differences.
    pub deltas: u8,
    /// Guest units it describes, counted as often as they were handed over.
    pub units: u64,
}

/// Why bytes are no batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The bytes end before the batch does.
    #[error("the batch is cut short: {have} of {need} bytes; send it again")]
    Short {
        /// Bytes at hand.
        have: usize,
        /// Bytes the header asks for.
        need: usize,
    },
    /// Written by a newer version.
    #[error("the batch was written by a newer version ({what}): upgrade this site before its peer")]
    Newer {
        /// What is not known here.
        what: String,
    },
    /// A field breaks a rule of the format.
    #[error("not a batch: {0}; if it came from disk, check the disk, else the peer's version")]
    Invalid(&'static str),
    /// The hash does not match.
    #[error("batch {seq} is damaged: its {part} does not match the hash; fetch it again")]
    Damaged {
        /// The number the header claims.
        seq: u64,
        /// "entries" or "body".
        part: &'static str,
    },
    /// The body does not expand to its literals.
    #[error("the body of batch {seq} does not expand to its {literals} literals; fetch it again")]
    Body {
        /// The batch.
        seq: u64,
        /// Literals announced.
        literals: u8,
        /// The decompressor's reason, when it gave one.
        #[source]
        source: Option<std::io::Error>,
    },
}

/// A batch's fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Its number.
    pub seq: u64,
    /// Whose units.
    pub guest: GuestId,
    /// Which point.
    pub point: u64,
    /// Bytes of entries.
    pub entries_bytes: usize,
    /// Number of entries.
    pub entries: usize,
    /// Slots: units in the body, whole or as differences.
    pub literals: u8,
    /// Are some of them differences?
    pub deltas: bool,
    /// Does it refer to batches of stored images?
    pub images: bool,
    /// Bytes of the body, expanded.
    pub body_raw: usize,
    /// How the body is stored.
    pub codec: Codec,
    /// Bytes of the body as stored.
    pub body_stored: usize,
    /// BLAKE3 of the stored body.
    pub body_hash: [u8; 32],
    /// BLAKE3 of header and entries: the batch's identity.
    pub hash: [u8; 32],
}

impl BatchHeader {
    /// Bytes of the whole batch.
    pub fn bytes(&self) -> usize {
        BATCH_HEADER + self.entries_bytes + self.body_stored
    }

    /// Reads the fixed part and checks every length in it. Hashes are not
    /// checked: that takes the rest of the batch.
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn parse(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
        use BatchError::Invalid;
        let short = BatchError::Short {
            have: bytes.len(),
            need: BATCH_HEADER,
        };
        let Some(fixed) = bytes.first_chunk::<BATCH_HEADER>() else {
            return Err(short);
        };
        let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(array(&fixed[at..])) as usize;
        let u64_at = |at: usize| u64::from_le_bytes(array(&fixed[at..]));
        if fixed[..4] != MAGIC {
            return Err(Invalid("the first four bytes are wrong"));
        }
        if u16_at(4) == 0 {
            return Err(Invalid("version 0"));
        }
        if u16_at(4) > VERSION {
            return Err(BatchError::Newer {
                what: format!("layout {}", u16_at(4)),
            });
        }
        if fixed[6] & !(DELTAS | IMAGES) != 0 || fixed[47] != 0 {
            return Err(BatchError::Newer {
                what: format!("flags {:#04x}", fixed[6]),
            });
        }
        let codec = match fixed[7] {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => {
                return Err(BatchError::Newer {
                    what: format!("compression {other}"),
                });
            }
        };
        let header = BatchHeader {
            seq: u64_at(8),
            guest: GuestId(array(&fixed[16..])),
            point: u64_at(32),
            entries_bytes: u32_at(40),
            entries: u16_at(44).into(),
            literals: fixed[46],
            deltas: fixed[6] & DELTAS != 0,
            images: fixed[6] & IMAGES != 0,
            body_raw: u32_at(48),
            codec,
            body_stored: u32_at(52),
            body_hash: array(&fixed[56..]),
            hash: array(&fixed[HASH..]),
        };
        let raw = header.body_raw;
        let whole = usize::from(header.literals) * UNIT;
        if header.seq == 0 || header.seq > SEQ {
            return Err(Invalid("its number is out of range"));
        }
        if header.point == 0 || header.point > POINT {
            return Err(Invalid("its point is out of range"));
        }
        if header.entries == 0 || header.entries > BATCH_ENTRIES {
            return Err(Invalid("no entries, or too many"));
        }
        if header.entries_bytes > BATCH_ENTRIES_BYTES {
            return Err(Invalid("entries too long"));
        }
        // Any difference is shorter than a unit: the exact sum is checked with the entries.
        let sums_up = match header.deltas {
            false => raw == whole,
            true => raw > 0 && raw < whole,
        };
        if usize::from(header.literals) > GROUP || !sums_up {
            return Err(Invalid("the body's length is not that of its slots"));
        }
        // A body that does not shrink is stored raw, so stored is never longer.
        let fits = match codec {
            Codec::Raw => header.body_stored == raw,
            Codec::Zstd => header.body_stored < raw && header.body_stored > 0,
        };
        if !fits {
            return Err(Invalid("the stored body's length is out of range"));
        }
        Ok(header)
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        let deltas = if self.deltas { DELTAS } else { 0 };
        out.push(deltas | if self.images { IMAGES } else { 0 });
        out.push(match self.codec {
            Codec::Raw => 0,
            Codec::Zstd => 1,
        });
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.guest.0);
        out.extend_from_slice(&self.point.to_le_bytes());
        out.extend_from_slice(&(self.entries_bytes as u32).to_le_bytes());
        out.extend_from_slice(&(self.entries as u16).to_le_bytes());
        out.push(self.literals);
        out.push(0);
        out.extend_from_slice(&(self.body_raw as u32).to_le_bytes());
        out.extend_from_slice(&(self.body_stored as u32).to_le_bytes());
        out.extend_from_slice(&self.body_hash);
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[..N]);
    array
}

/// Lays out a batch. `entries` and `body` come from the encoder and are within limits.
pub(crate) fn lay_out(mut header: BatchHeader, entries: &[u8], body: &[u8]) -> (Bytes, [u8; 32]) {
    header.body_hash = *blake3::hash(body).as_bytes();
    let mut bytes = Vec::with_capacity(header.bytes());
    header.put(&mut bytes);
    let hash = hash_of(&bytes, entries);
    bytes.extend_from_slice(&hash);
    bytes.extend_from_slice(entries);
    bytes.extend_from_slice(body);
    (bytes.into(), hash)
}

pub(crate) fn hash_of(fixed: &[u8], entries: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&fixed[..HASH]).update(entries);
    *hasher.finalize().as_bytes()
}
