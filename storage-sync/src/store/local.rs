//! Content that is stored here without having crossed the link: base images,
//! and the copy of a guest that ran here before it was moved away.
//!
//! Its batches have numbers that no source gives ([`IMAGE_SEQ`]), so that those
//! of a source go on beside them, and may refer to them. Verification, crash
//! rules, look-ups and prune are those of every batch. Until its seal it is no point.
//!
//! [`IMAGE_SEQ`]: crate::limits::IMAGE_SEQ

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::{Origin, Seal, SealError, Store, StoreError, held};
use crate::codec::{Batch, Chain, DedupIndex, EncodeError, Encoder};
use crate::manifest::{PointHeader, PointStats};
use crate::unit::{Digest, GuestId, Volume, VolumeIndex};

/// zstd's level for local content: the one that batches have on most links.
const LEVEL: i32 = 3;
/// Memory to find what repeats within it.
const INDEX_BYTES: usize = 64 << 20;
/// Batches appended with one sync.
const BATCHES: usize = 32;

/// Why local content was not stored.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// It cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The store takes no more.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its seal.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// What is told with the seal of a local point.
#[derive(Debug, Clone)]
pub struct LocalSeal {
    /// The newest point of this guest, on which it builds; 0: on nothing.
    pub parent: u64,
    /// The instant that it is of, nanoseconds since 1970.
    pub cut_at_unix_ns: u64,
    /// The guest's volumes.
    pub volumes: Vec<Volume>,
    /// As [`Seal::context`].
    pub context: Vec<u8>,
}

/// A point that is being made of content that is here. Dropped before its
/// seal it leaves none; what was stored of it goes with a later prune.
pub struct LocalPoint {
    store: Store,
    guest: GuestId,
    point: u64,
    origin: Origin,
    encoder: Encoder,
    index: Arc<Mutex<DedupIndex>>,
    chain: Chain,
    waiting: Vec<Bytes>,
    changed_bytes: u64,
    stored_bytes: u64,
    sealed: bool,
}

impl Store {
    /// Begins point `point` of a guest, of content that is here. Digests of its
    /// units are to be of one key.
    pub fn local_point(&self, guest: GuestId, point: u64) -> LocalPoint {
        let index = Arc::new(Mutex::new(DedupIndex::new(INDEX_BYTES)));
        let numbers = self.0.image_numbers.clone();
        let origin = match guest.is_image() {
            true => Origin::Image,
            false => Origin::Local,
        };
        LocalPoint {
            store: self.clone(),
            guest,
            point,
            origin,
            encoder: Encoder::new(guest, point, numbers, index.clone(), LEVEL),
            index,
            chain: Chain::new(),
            waiting: Vec::new(),
            changed_bytes: 0,
            stored_bytes: 0,
            sealed: false,
        }
    }
}

impl LocalPoint {
    /// Takes one unit.
    ///
    /// # Errors
    /// See [`LocalError`]; the point is to be given up then.
    pub fn unit(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digest: Digest,
    ) -> Result<(), LocalError> {
        self.changed_bytes += bytes.len() as u64;
        let batch = self.encoder.unit(volume, unit, bytes, digest)?;
        self.append(batch, false)
    }

    /// Takes `count` units of zeros.
    ///
    /// # Errors
    /// As for [`LocalPoint::unit`].
    pub fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), LocalError> {
        self.changed_bytes += count * crate::unit::UNIT as u64;
        let batch = self.encoder.zeros(volume, unit, count)?;
        self.append(batch, false)
    }

    /// Bytes of the batches so far: what it takes here.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Seals it: durable when this returns.
    ///
    /// # Errors
    /// See [`LocalError`]; there is no such point then.
    pub fn seal(mut self, seal: LocalSeal) -> Result<PointHeader, LocalError> {
        let last = self.encoder.flush();
        self.append(last, true)?;
        let header = self.store.seal(Seal {
            guest: self.guest,
            point: self.point,
            parent: seal.parent,
            cut_at_unix_ns: seal.cut_at_unix_ns,
            volumes: seal.volumes,
            batches: self.chain.count(),
            chain: self.chain.finish(),
            context: seal.context,
            stats: PointStats {
                guest_bytes: self.changed_bytes,
                ..PointStats::default()
            },
        })?;
        self.sealed = true;
        Ok(header)
    }

    fn append(&mut self, batch: Option<Batch>, all: bool) -> Result<(), LocalError> {
        if let Some(batch) = batch {
            self.chain.push(batch.seq, &batch.hash);
            self.stored_bytes += batch.bytes.len() as u64;
            self.waiting.push(batch.bytes);
        }
        if self.waiting.len() >= BATCHES || all && !self.waiting.is_empty() {
            let seqs = self.store.append_of(&self.waiting, self.origin)?;
            let mut index = held(&self.index);
            seqs.into_iter().for_each(|seq| index.acknowledge(seq));
            self.waiting.clear();
        }
        Ok(())
    }
}

impl Drop for LocalPoint {
    fn drop(&mut self) {
        if !self.sealed {
            self.store.abandon_point(self.guest, self.point);
        }
    }
}
