//! Records out of a seed, each verified before it is handed on.

use std::io::Read;

use bytes::Bytes;
use farhaven_storage_sync::codec::BatchHeader;
use farhaven_storage_sync::limits::BATCH_BYTES;
use serde::de::DeserializeOwned;

use super::cipher::Decrypting;
use super::{ABOUT, BATCH, MOST_RECORD, SEAL, SeedAbout, SeedError, SeedHeader, SeedKey};
use crate::replicate::message::{LEVELS, SealRequest};

/// What comes next in a seed.
#[derive(Debug)]
pub enum SeedRecord {
    /// A batch of its guest and point, with a number of its range, above the last.
    Batch(Bytes),
    /// The end: the stream was verified to its last byte.
    Seal(Box<SealRequest>),
}

/// Reads a seed.
pub struct SeedReader<R: Read> {
    stream: Decrypting<R>,
    about: SeedAbout,
    last: u64,
}

impl<R: Read> SeedReader<R> {
    /// Begins, behind the header.
    ///
    /// # Errors
    /// When the stream is damaged, or the key is not this seed's.
    pub fn begin(medium: R, header: &SeedHeader, key: &SeedKey) -> Result<Self, SeedError> {
        let mut stream = Decrypting::begin(medium, header, key);
        let about: SeedAbout = match record(&mut stream)? {
            (ABOUT, bytes) => item(&bytes)?,
            _ => {
                return Err(SeedError::Unsound(
                    "it does not begin with what it is about",
                ));
            }
        };
        if about.point == 0 || about.first == 0 || about.first > about.last {
            return Err(SeedError::Unsound("its numbers are out of range"));
        }
        let last = about.first - 1;
        Ok(Self {
            stream,
            about,
            last,
        })
    }

    /// What it is about.
    pub fn about(&self) -> &SeedAbout {
        &self.about
    }

    /// Bytes of the file read so far.
    pub fn read(&self) -> u64 {
        self.stream.read()
    }

    /// The next record; nothing follows a seal.
    ///
    /// # Errors
    /// When it does not verify, or does not belong here.
    pub fn next_record(&mut self) -> Result<SeedRecord, SeedError> {
        match record(&mut self.stream)? {
            (BATCH, bytes) => {
                let header = BatchHeader::parse(&bytes)
                    .map_err(|_| SeedError::Unsound("something in it is no batch"))?;
                let about = &self.about;
                if header.guest != about.opening.guest || header.point != about.point {
                    return Err(SeedError::Unsound(
                        "it has a batch of another guest or point",
                    ));
                }
                if header.seq <= self.last || header.seq > about.last {
                    return Err(SeedError::Unsound(
                        "it has a batch whose number is not its own",
                    ));
                }
                self.last = header.seq;
                Ok(SeedRecord::Batch(bytes.into()))
            }
            (SEAL, bytes) => {
                let seal: SealRequest = item(&bytes)?;
                let about = &self.about;
                if seal.guest != about.opening.guest
                    || seal.point != about.point
                    || seal.parent != 0
                    || seal.activate.is_some()
                {
                    return Err(SeedError::Unsound("its seal is not of its point"));
                }
                self.stream.end()?;
                Ok(SeedRecord::Seal(Box::new(seal)))
            }
            _ => Err(SeedError::Unsound("it has a record that is not known here")),
        }
    }
}

fn record<R: Read>(stream: &mut Decrypting<R>) -> Result<(u8, Vec<u8>), SeedError> {
    let mut head = [0; 5];
    if !stream.fill(&mut head)? {
        return Err(SeedError::Unsound("it ends before its seal"));
    }
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length) as usize;
    let most = match kind {
        BATCH => BATCH_BYTES,
        _ => MOST_RECORD,
    };
    if length > most {
        return Err(SeedError::Unsound("it has a record that is too long"));
    }
    let mut bytes = vec![0; length];
    if length > 0 && !stream.fill(&mut bytes)? {
        return Err(SeedError::Unsound("it ends within a record"));
    }
    Ok((kind, bytes))
}

fn item<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, SeedError> {
    ciborium::de::from_reader_with_recursion_limit(bytes, LEVELS)
        .map_err(|_| SeedError::Unsound("a record of it cannot be read"))
}
