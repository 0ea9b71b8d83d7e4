//! From a guest to the peer: changed units become batches, batches become a point.
//!
//! A [`Shipment`] collects what belongs to one recovery point of one guest,
//! over as many rounds and attempted cuts as it takes, and ends with the
//! point's seal. What the guests of a pair of sites share is in [`Outgoing`].
//!
//! Units are pulled: a shipment waits where the session takes no batch, and with
//! it the guest's pass, so what is to come is still in the guest and not yet
//! read. Between the two lie the batch being built, and in a QEMU guest's scan
//! at most a few chunks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farhaven_storage_sync::codec::{Batch, Chain, EncodeError, Encoder};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, GuestId, UNIT, VolumeIndex};
use farhaven_wan::link::SendDataError;
use farhaven_wan::pace::{Flow, Rank};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::ahead::{Ahead, Found, Next, What};
use super::asking::PATIENCE;
pub use super::outgoing::Outgoing;
pub use super::totals::Totals;
use crate::guest::{Sink, SinkError};

/// Why a shipment ended early.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// Encoding failed.
    #[error("cannot encode the guest's data: {0}")]
    Encode(#[from] EncodeError),
}

/// What was counted of a shipment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shipped {
    /// Batches sent.
    pub batches: u64,
    /// Bytes of guest data they describe, zeros and duplicates included.
    pub changed_bytes: u64,
    /// Bytes of the batches.
    pub sent_bytes: u64,
}

/// What belongs to one recovery point, on its way. A [`Sink`] for the guest;
/// used from the guest's capture thread, and waits there when the session's
/// window is full (never while the guest is stopped: see [`crate::capture`]).
pub struct Shipment {
    outgoing: Arc<Outgoing>,
    id: u64,
    encoder: Encoder,
    ahead: Ahead,
    /// Of its time, what the level was told of.
    compressed: Duration,
    chain: Chain,
    shipped: Shipped,
    totals: Arc<Totals>,
    stop: watch::Receiver<bool>,
    runtime: Handle,
    patience: Option<Duration>,
    flow: Option<Arc<Flow>>,
    rank: Rank,
}

impl Shipment {
    /// Begins a shipment for `point`. It ends early, with
    /// [`SinkError::Closed`], when `stop` becomes true.
    pub fn begin(
        outgoing: &Arc<Outgoing>,
        guest: GuestId,
        point: u64,
        totals: Arc<Totals>,
        stop: watch::Receiver<bool>,
        runtime: Handle,
    ) -> Self {
        let id = outgoing.opened();
        let mut encoder = Encoder::new(
            guest,
            point,
            outgoing.sequence.clone(),
            outgoing.index.clone(),
            outgoing.level(),
        )
        .with_bases(outgoing.bases.clone());
        if let Some(crew) = &outgoing.crew {
            encoder = encoder.with_crew(crew.clone());
        }
        Self {
            outgoing: outgoing.clone(),
            id,
            encoder,
            ahead: Ahead::new(outgoing, guest, runtime.clone()),
            compressed: Duration::ZERO,
            chain: Chain::new(),
            shipped: Shipped::default(),
            totals,
            stop,
            runtime,
            patience: None,
            flow: None,
            rank: Rank::Usual,
        }
    }

    /// Sends in this flow's turns: within its cap and that of the site, and by
    /// shares with other guests.
    pub fn in_turns_of(mut self, flow: Option<Arc<Flow>>) -> Self {
        self.flow = flow;
        self
    }

    /// The guest stands still for it: it goes before others, and no cap but the
    /// site's holds it back.
    pub fn held(mut self) -> Self {
        self.rank = Rank::Held;
        self.encoder.alone();
        self
    }

    /// How long the link may take no data before the shipment gives up with
    /// [`SinkError::Stalled`]; `None` waits as long as it takes.
    pub fn patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// Key of the digests that it gets.
    pub fn key(&self) -> &DigestKey {
        &self.outgoing.key
    }

    /// Sends what is still being collected.
    ///
    /// # Errors
    /// When the shipment was stopped.
    pub fn flush(&mut self) -> Result<(), SinkError> {
        self.encode_waiting(true)?;
        while let Some(batch) = self.encoder.flush() {
            self.send(batch)?;
        }
        Ok(())
    }

    /// What was sent so far, and the chain over it, for the seal.
    pub fn sum(&self) -> (Shipped, [u8; 32]) {
        (self.shipped, self.chain.finish())
    }

    fn send(&mut self, batch: Batch) -> Result<(), SinkError> {
        self.chain.push(batch.seq, &batch.hash);
        self.shipped.batches += 1;
        self.shipped.sent_bytes += batch.bytes.len() as u64;
        self.totals
            .sent_bytes
            .fetch_add(batch.bytes.len() as u64, Ordering::Relaxed);
        let (seq, bytes) = (batch.seq, batch.bytes.len() as u64);
        let begun = Instant::now();
        let sent = self.hand_over(batch);
        let (compressing, waiting) = (self.encoder.compressing(), begun.elapsed());
        let took = crate::work::cpu_time(compressing.saturating_sub(self.compressed));
        self.compressed = compressing;
        self.encoder
            .level(self.outgoing.level_after(bytes, took, waiting));
        // Where the link holds things up, what waits should wait in the guest.
        self.encoder.beside(waiting < took);
        if sent.is_err() {
            // A batch that never left must not be referred to.
            self.outgoing.forget(seq);
        } else {
            self.outgoing.submitted(seq);
            self.outgoing.settle();
        }
        sent
    }

    fn hand_over(&mut self, batch: Batch) -> Result<(), SinkError> {
        let (peer, stop) = (&self.outgoing.peer, &mut self.stop);
        let (patience, flow, rank) = (self.patience, self.flow.clone(), self.rank);
        crate::work::block_on(&self.runtime, async {
            let sent = async {
                let Some(flow) = flow else {
                    return peer.send_data(batch.seq, batch.bytes).await;
                };
                // A cap, or another guest's turn, is no stall of the link.
                peer.send_in_turn(&flow, rank, patience, batch.seq, batch.bytes)
                    .await
            };
            tokio::select! {
                sent = sent => sent.map_err(|error| match error {
                    SendDataError::Stalled(_) => SinkError::Stalled,
                    _ => SinkError::Closed,
                }),
                _ = stop.wait_for(|stopped| *stopped) => Err(SinkError::Closed),
            }
        })
    }

    /// Encodes what need not wait any longer for the peer's word on what it holds.
    fn encode_waiting(&mut self, all: bool) -> Result<(), SinkError> {
        loop {
            match self.ahead.next(all) {
                Next::Nothing => return Ok(()),
                Next::Wait(answered) => self.await_answer(answered)?,
                Next::Piece(piece) => {
                    let (volume, unit) = (piece.volume, piece.unit);
                    let encoded = match &piece.what {
                        What::Units(bytes, digests) => self.encode(volume, unit, bytes, digests),
                        What::Zeros(count) => {
                            let batch = self.encoder.zeros(volume, unit, *count);
                            self.encoded(batch)
                        }
                    };
                    if encoded.is_err() {
                        self.ahead.put_back(piece);
                    }
                    encoded?;
                }
            }
        }
    }

    fn await_answer(
        &mut self,
        mut answered: watch::Receiver<Option<Found>>,
    ) -> Result<(), SinkError> {
        let (link, begun) = (self.outgoing.link(), Instant::now());
        let stop = &mut self.stop;
        let came = crate::work::block_on(&self.runtime, async {
            tokio::select! {
                // One that went away without an answer counts as answered.
                _ = answered.wait_for(Option::is_some) => Ok(true),
                _ = stop.wait_for(|stopped| *stopped) => Err(SinkError::Closed),
                () = tokio::time::sleep(PATIENCE) => Ok(false),
            }
        })?;
        self.ahead.waited(&link, begun.elapsed());
        if !came {
            self.ahead.give_up();
        }
        Ok(())
    }

    fn encode(
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
        Ok(())
    }

    fn count(&mut self, units: u64) {
        let bytes = units * UNIT as u64;
        self.shipped.changed_bytes += bytes;
        self.totals
            .changed_bytes
            .fetch_add(bytes, Ordering::Relaxed);
    }

    fn encoded(&mut self, batch: Result<Option<Batch>, EncodeError>) -> Result<(), SinkError> {
        match batch {
            Ok(Some(batch)) => {
                self.send(batch)?;
                while let Some(batch) = self.encoder.overdue() {
                    self.send(batch)?;
                }
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "encoding failed; the session is ended");
                Err(SinkError::Closed)
            }
        }
    }
}

impl Sink for Shipment {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        let (mut at, all) = (unit, digests.len() as u64);
        let (mut bytes, mut digests) = (bytes, digests);
        while !digests.is_empty() {
            let count = self.ahead.piece(digests.len());
            let (piece, rest) = bytes.split_at(bytes.len().min(count * UNIT));
            let (told, untold) = digests.split_at(count);
            if !self.ahead.takes(volume, at, piece, told) {
                self.encode(volume, at, piece, told)?;
            }
            self.encode_waiting(false)?;
            (at, bytes, digests) = (at + count as u64, rest, untold);
        }
        self.count(all);
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        if !self.ahead.takes_zeros(volume, unit, count) {
            let batch = self.encoder.zeros(volume, unit, count);
            self.encoded(batch)?;
        }
        self.encode_waiting(false)?;
        self.count(count);
        Ok(())
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.totals.done.store(done, Ordering::Relaxed);
        self.totals.total.store(total, Ordering::Relaxed);
    }
}

impl Drop for Shipment {
    fn drop(&mut self) {
        while let Some(batch) = self.encoder.flush() {
            self.outgoing.forget(batch.seq);
        }
        self.outgoing.closed(self.id);
    }
}
