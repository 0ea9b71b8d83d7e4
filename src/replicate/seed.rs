//! A first copy on removable media: what the wire would have carried, in a file.
//!
//! Out: a guest's units -> [`SeedShipment`] (an [`super::outlet::Outlet`]) ->
//! batches -> [`SeedWriter`] -> [`cipher`] -> the medium. In: the medium ->
//! [`SeedReader`], which hands on nothing that is not verified -> the store.
//! The bytes are drawn in storage-sync/FORMAT.md, the reasons in
//! docs/decisions/0008-seeding.md.

mod cipher;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod read;
mod shipment;
mod write;

use std::io::{self, Read};

use farhaven_wan::SiteKey;
use serde::{Deserialize, Serialize};

use super::message::{MAX_MESSAGE, Opening};
pub use read::{SeedReader, SeedRecord};
pub use shipment::{SeedProgress, SeedShipError, SeedShipment};
pub use write::SeedWriter;

/// First bytes of every seed.
const MAGIC: [u8; 6] = *b"FHseed";
/// The format that is written, and the newest that is read.
const VERSION: u16 = 1;
/// Bytes before the stream.
const HEADER: usize = 64;
/// Bytes of plaintext in a chunk.
const CHUNK: usize = 1 << 20;
/// Most bytes of a record that is not a batch.
const MOST_RECORD: usize = MAX_MESSAGE;

const ABOUT: u8 = 1;
const BATCH: u8 = 2;
const SEAL: u8 = 3;

/// A seed's number, under which the peer keeps its key.
pub type SeedId = [u8; 16];

/// The secret of one seed. Known to the exporting process and the peer only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedKey([u8; 32]);

impl SeedKey {
    /// A fresh one.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl std::fmt::Debug for SeedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SeedKey(..)")
    }
}

/// What a seed is about: its first record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SeedAbout {
    /// The site that wrote it.
    pub source: SiteKey,
    /// The site that it is for.
    pub target: SiteKey,
    /// Of which guest, as it would be opened over the wire.
    pub opening: Opening,
    /// The point that it holds.
    pub point: u64,
    /// The first of the batch numbers reserved for it.
    pub first: u64,
    /// The last of them.
    pub last: u64,
}

/// Why a seed is not taken.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// Another kind of file.
    #[error("this is not a seed of Farhaven; name the file that `farhaven seed export` wrote")]
    NotASeed,
    /// Written by a newer version.
    #[error(
        "this seed has format {found}, and this version reads up to {VERSION}: upgrade this site, then import it again"
    )]
    Newer {
        /// Its format.
        found: u16,
    },
    /// It does not verify.
    #[error(
        "the seed is damaged or cut short at byte {at} of the file: copy the file anew, or export it again. Nothing of it was sealed"
    )]
    Damaged {
        /// Where the chunk begins that does not verify.
        at: u64,
    },
    /// It verifies, and makes no sense.
    #[error("the seed cannot be used ({0}): do both sites run the same version?")]
    Unsound(&'static str),
    /// It cannot be read or written.
    #[error("the medium failed: {0}")]
    Io(#[from] io::Error),
}

/// The fixed part of a seed: tells nothing of what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedHeader {
    /// Its number.
    pub seed: SeedId,
    nonce: [u8; 19],
    target: [u8; 16],
}

impl SeedHeader {
    /// A new one, for `target`.
    pub fn new(seed: SeedId, target: &SiteKey) -> Self {
        Self {
            seed,
            nonce: rand::random(),
            target: target_tag(&seed, target),
        }
    }

    /// Is it for this site?
    pub fn is_for(&self, site: &SiteKey) -> bool {
        self.target == target_tag(&self.seed, site)
    }

    /// Reads the fixed part.
    ///
    /// # Errors
    /// When this is no seed, or one of a newer version.
    pub fn read(file: &mut impl Read) -> Result<Self, SeedError> {
        let mut bytes = [0; HEADER];
        match file.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(SeedError::NotASeed);
            }
            read => read?,
        }
        let (magic, rest) = bytes.split_at(MAGIC.len());
        let found = u16::from_le_bytes([bytes[6], bytes[7]]);
        if magic != MAGIC || found == 0 || rest.is_empty() {
            return Err(SeedError::NotASeed);
        }
        if found > VERSION {
            return Err(SeedError::Newer { found });
        }
        if bytes[43..48] != [0; 5] {
            return Err(SeedError::Unsound(
                "its header has bits set that are not known",
            ));
        }
        let mut header = Self {
            seed: [0; 16],
            nonce: [0; 19],
            target: [0; 16],
        };
        header.seed.copy_from_slice(&bytes[8..24]);
        header.nonce.copy_from_slice(&bytes[24..43]);
        header.target.copy_from_slice(&bytes[48..]);
        Ok(header)
    }

    fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..6].copy_from_slice(&MAGIC);
        bytes[6..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.seed);
        bytes[24..43].copy_from_slice(&self.nonce);
        bytes[48..].copy_from_slice(&self.target);
        bytes
    }
}

/// Tells a seed for this site from one for another, and nothing to anybody else.
fn target_tag(seed: &SeedId, target: &SiteKey) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(seed).update(target.as_bytes());
    let mut tag = [0; 16];
    tag.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    tag
}

#[cfg(test)]
#[path = "seed/tests.rs"]
mod tests;
