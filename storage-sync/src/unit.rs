//! The nouns of stored data: guests, volumes, 4 KiB units, digests, places.

use std::fmt;
use std::str::FromStr;

/// Bytes of one unit, for RAM and disks alike: one size makes both one dedup domain.
pub const UNIT: usize = 4096;

/// Most literal units in one batch: they are compressed together.
pub const GROUP: usize = 64;

/// A guest, across sites and renames. Written in the form of a UUID.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct GuestId(pub [u8; 16]);

impl GuestId {
    /// A new identity from the system's random source, marked as a version 4 UUID.
    pub fn random() -> GuestId {
        let mut id: [u8; 16] = rand::random();
        id[6] = id[6] & 0x0f | 0x40;
        id[8] = id[8] & 0x3f | 0x80;
        GuestId(id)
    }

    /// A new identity for a stored image: it stands where a guest's would, and
    /// is none that a guest ever has.
    pub fn random_image() -> GuestId {
        let mut id: [u8; 16] = rand::random();
        id[..8].copy_from_slice(&IMAGE);
        GuestId(id)
    }

    /// Does it stand for a stored image?
    pub fn is_image(&self) -> bool {
        self.0.starts_with(&IMAGE)
    }
}

/// How the identities of images begin: byte 6 is not that of a version 4 UUID.
const IMAGE: [u8; 8] = *b"FH-image";

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no guest identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a guest is written as 32 hexadecimal digits in the form 8-4-4-4-12, this is not one")]
pub struct GuestIdError;

impl FromStr for GuestId {
    type Err = GuestIdError;

    fn from_str(text: &str) -> Result<GuestId, GuestIdError> {
        let text = text.as_bytes();
        if text.len() != 36 {
            return Err(GuestIdError);
        }
        let mut id = [0u8; 16];
        let mut digits = 0;
        for (at, &byte) in text.iter().enumerate() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if byte != b'-' {
                    return Err(GuestIdError);
                }
                continue;
            }
            let digit = char::from(byte).to_digit(16).ok_or(GuestIdError)? as u8;
            // 36 characters less 4 hyphens: `digits` stays under 32.
            id[digits / 2] = id[digits / 2] << 4 | digit;
            digits += 1;
        }
        Ok(GuestId(id))
    }
}

impl TryFrom<String> for GuestId {
    type Error = GuestIdError;

    fn try_from(text: String) -> Result<GuestId, GuestIdError> {
        text.parse()
    }
}

impl From<GuestId> for String {
    fn from(id: GuestId) -> String {
        id.to_string()
    }
}

/// Index of a volume in its guest's list.
pub type VolumeIndex = u16;

/// What a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeKind {
    /// A block of guest memory.
    Ram,
    /// A disk.
    Disk,
    /// vCPUs and devices, opaque. Its size may differ from point to point.
    DeviceState,
}

/// One volume of a guest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// The hypervisor's name for it, stable over restarts.
    pub name: String,
    /// What it holds.
    pub kind: VolumeKind,
    /// Its size. The last unit is padded with zeros when this is no multiple of 4 KiB.
    pub bytes: u64,
}

impl Volume {
    /// Units needed to hold it.
    pub fn units(&self) -> u64 {
        self.bytes.div_ceil(UNIT as u64)
    }
}

/// Where a unit's bytes lie: the batch that carried them and their index among
/// its literals. Logical, so that compaction may move batches between segments.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Place(pub u64);

impl Place {
    /// Not stored: reads as zeros.
    pub const ZERO: Place = Place(0);

    /// The literal `index` (under 64) of batch `seq` (1 to 2^58-1).
    pub fn new(seq: u64, index: u8) -> Place {
        debug_assert!(seq > 0 && seq < 1 << 58 && usize::from(index) < GROUP);
        Place(seq << 6 | u64::from(index))
    }

    /// The batch's sequence number; 0 for [`Place::ZERO`].
    pub fn seq(self) -> u64 {
        self.0 >> 6
    }

    /// Index among the batch's literals.
    pub fn index(self) -> u8 {
        (self.0 & 63) as u8
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Place::ZERO {
            write!(f, "zero")
        } else {
            write!(f, "{}.{}", self.seq(), self.index())
        }
    }
}

/// First 16 bytes of the keyed BLAKE3 of a unit. The key is secret to the pair
/// of sites, so that a guest cannot prepare two units that collide.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// Stands for "unknown": matches no unit. (The digest of a real unit is
    /// never all zero in practice; a match would cost bandwidth only.)
    pub const UNKNOWN: Digest = Digest([0; 16]);
    /// Stands for the unit of zeros under every key; never a computed value.
    pub const ZERO_UNIT: Digest = Digest([0xff; 16]);
}
