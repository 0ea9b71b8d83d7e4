//! A guest's units into a seed, as a [`super::super::send::Shipment`] puts them
//! on the wire: the same encoder, with an index of its own.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use farhaven_storage_sync::codec::{Batch, Chain, DedupIndex, EncodeError, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex};

use super::{SeedAbout, SeedWriter};
use crate::guest::{Sink, SinkError};
use crate::replicate::message::SealRequest;
use crate::replicate::outlet::Outlet;
use crate::replicate::send::Shipped;

/// The medium is not the bottleneck, and the file travels once.
const LEVEL: i32 = 3;

/// How far an export or import is, readable while it works; and the way to stop it.
#[derive(Debug, Default)]
pub struct SeedProgress {
    /// Bytes of the pass under way, done.
    pub done: AtomicU64,
    /// Bytes of the pass under way, in all.
    pub total: AtomicU64,
    /// Bytes of the file, written or read.
    pub file_bytes: AtomicU64,
    stopped: AtomicBool,
}

impl SeedProgress {
    /// It is to end soon, and leave nothing.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Is it to end?
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// Why a seed was not written.
#[derive(Debug, thiserror::Error)]
pub enum SeedShipError {
    /// The medium.
    #[error(transparent)]
    Medium(#[from] io::Error),
    /// The encoder.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// It was asked to.
    #[error("it was stopped")]
    Stopped,
}

/// Takes one point of a guest into a seed.
pub struct SeedShipment<W: Write> {
    writer: SeedWriter<W>,
    encoder: Encoder,
    index: Arc<Mutex<DedupIndex>>,
    chain: Chain,
    shipped: Shipped,
    key: DigestKey,
    progress: Arc<SeedProgress>,
    failed: Option<SeedShipError>,
}

impl<W: Write> SeedShipment<W> {
    /// Begins with a seed whose first record is written. `index_bytes` bounds
    /// what is remembered to find duplicates within it.
    pub fn begin(
        writer: SeedWriter<W>,
        about: &SeedAbout,
        key: DigestKey,
        index_bytes: usize,
        progress: Arc<SeedProgress>,
    ) -> Self {
        let index = Arc::new(Mutex::new(DedupIndex::new(index_bytes)));
        let numbers = Arc::new(Sequence::within(about.first, about.last));
        let guest = about.opening.guest;
        Self {
            writer,
            encoder: Encoder::new(guest, about.point, numbers, index.clone(), LEVEL),
            index,
            chain: Chain::new(),
            shipped: Shipped::default(),
            key,
            progress,
            failed: None,
        }
    }

    /// Why the sink closed, where it did.
    pub fn failure(&mut self) -> Option<SeedShipError> {
        self.failed.take()
    }

    /// Ends the seed; the medium, and the bytes of the file.
    ///
    /// # Errors
    /// When the medium cannot be written.
    pub fn finish(self, seal: &SealRequest) -> io::Result<(W, u64)> {
        self.writer.finish(seal)
    }

    fn write(&mut self, batch: Batch) -> Result<(), SinkError> {
        if self.progress.is_stopped() {
            return self.fail(SeedShipError::Stopped);
        }
        if let Err(error) = self.writer.batch(&batch.bytes) {
            return self.fail(error.into());
        }
        self.chain.push(batch.seq, &batch.hash);
        self.shipped.batches += 1;
        self.shipped.sent_bytes += batch.bytes.len() as u64;
        // It may be referred to within the seed, by this guest: nobody else has the index.
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        index.acknowledge(batch.seq);
        self.progress
            .file_bytes
            .store(self.writer.written(), Ordering::Relaxed);
        Ok(())
    }

    fn fail(&mut self, error: SeedShipError) -> Result<(), SinkError> {
        self.failed.get_or_insert(error);
        Err(SinkError::Closed)
    }

    fn encoded(&mut self, batch: Result<Option<Batch>, EncodeError>) -> Result<(), SinkError> {
        match batch {
            Ok(Some(batch)) => self.write(batch),
            Ok(None) => Ok(()),
            Err(error) => self.fail(error.into()),
        }
    }
}

impl<W: Write> Sink for SeedShipment<W> {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        for (i, (bytes, digest)) in bytes.chunks_exact(UNIT).zip(digests).enumerate() {
            let batch = self.encoder.unit(volume, unit + i as u64, bytes, *digest);
            self.encoded(batch)?;
        }
        self.shipped.changed_bytes += digests.len() as u64 * UNIT as u64;
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        let batch = self.encoder.zeros(volume, unit, count);
        self.encoded(batch)?;
        self.shipped.changed_bytes += count * UNIT as u64;
        Ok(())
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.progress.done.store(done, Ordering::Relaxed);
        self.progress.total.store(total, Ordering::Relaxed);
    }
}

impl<W: Write> Outlet for SeedShipment<W> {
    fn key(&self) -> &DigestKey {
        &self.key
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        match self.encoder.flush() {
            Some(batch) => self.write(batch),
            None => Ok(()),
        }
    }

    fn sum(&self) -> (Shipped, [u8; 32]) {
        (self.shipped, self.chain.finish())
    }
}
