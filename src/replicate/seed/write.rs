//! Records into a seed.

use std::io::{self, Write};

use super::cipher::Encrypting;
use super::{ABOUT, BATCH, SEAL, SeedAbout, SeedHeader, SeedKey};
use crate::replicate::message::SealRequest;

/// Writes a seed: what it is about, batches, the seal.
pub struct SeedWriter<W: Write> {
    stream: Encrypting<W>,
}

impl<W: Write> SeedWriter<W> {
    /// Begins one.
    ///
    /// # Errors
    /// When the medium cannot be written.
    pub fn begin(
        medium: W,
        header: &SeedHeader,
        key: &SeedKey,
        about: &SeedAbout,
    ) -> io::Result<Self> {
        let mut writer = Self {
            stream: Encrypting::begin(medium, header, key)?,
        };
        writer.item(ABOUT, about)?;
        Ok(writer)
    }

    /// Adds the next batch.
    ///
    /// # Errors
    /// When the medium cannot be written.
    pub fn batch(&mut self, batch: &[u8]) -> io::Result<()> {
        self.record(BATCH, batch)
    }

    /// Bytes of the file so far.
    pub fn written(&self) -> u64 {
        self.stream.written()
    }

    /// Ends it; the medium, not synced yet, and the bytes of the file.
    ///
    /// # Errors
    /// When the medium cannot be written.
    pub fn finish(mut self, seal: &SealRequest) -> io::Result<(W, u64)> {
        self.item(SEAL, seal)?;
        self.stream.finish()
    }

    fn item(&mut self, kind: u8, item: &impl serde::Serialize) -> io::Result<()> {
        let mut bytes = Vec::new();
        ciborium::into_writer(item, &mut bytes).map_err(io::Error::other)?;
        if bytes.len() > super::MOST_RECORD {
            return Err(io::Error::other("the guest's definition is over 1 MiB"));
        }
        self.record(kind, &bytes)
    }

    fn record(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.stream.write(&[kind])?;
        self.stream.write(&length.to_le_bytes())?;
        self.stream.write(bytes)
    }
}
