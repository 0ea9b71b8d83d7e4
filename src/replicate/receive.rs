//! From the peer to the store: batches become durable, points become sealed.
//!
//! One [`Incoming`] per peer. Batches are appended by one thread, as many as
//! have arrived for each sync, and acknowledged only then. While the store
//! cannot take them (its filesystem is full) they wait here, bounded by the
//! session's window, and the source's points get older instead of being lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{PointHeader, Seal, SealError, Store, StoreError};
use farhaven_storage_sync::unit::{GuestId, UNIT, VolumeIndex};
use farhaven_wan::node::Peer;
use tokio::sync::{mpsc, watch};

use super::message::{BASELINE_PAGE_UNITS, DIGEST_PAGE_BATCHES, Message, Refusal, SealRequest};

/// Batches taken for one sync at most.
const BATCHES_A_SYNC: usize = 256;

/// How long a store that cannot take data is left alone before the next try.
const RETRY: Duration = Duration::from_secs(2);

/// The receiving half of a pair of sites.
#[derive(Clone)]
pub struct Incoming {
    /// What the peer sent.
    pub store: Store,
    queue: mpsc::Sender<(u64, Bytes)>,
    appended: watch::Receiver<u64>,
    trouble: watch::Receiver<String>,
}

impl Incoming {
    /// Starts the appending thread. It ends when every clone is dropped.
    pub fn start(store: Store, peer: Peer) -> Self {
        let (queue, batches) = mpsc::channel(BATCHES_A_SYNC);
        let (appended_tx, appended) = watch::channel(0);
        let (trouble_tx, trouble) = watch::channel(String::new());
        let target = store.clone();
        tokio::task::spawn_blocking(move || {
            append(&target, &peer, batches, &appended_tx, &trouble_tx);
        });
        Self { store, queue, appended, trouble }
    }

    /// Takes one batch; waits when the store is behind.
    pub async fn batch(&self, seq: u64, bytes: Bytes) {
        // The thread ends only with the last sender.
        let _ = self.queue.send((seq, bytes)).await;
    }

    /// What hinders the store, in a sentence; empty when nothing does.
    pub fn trouble(&self) -> watch::Receiver<String> {
        self.trouble.clone()
    }

    /// Seals a point once all of its batches are durable. The batches may
    /// still be on their way: the seal overtakes them.
    ///
    /// # Errors
    /// When the point does not fit what is here, or cannot be made durable.
    pub async fn seal(&self, request: &SealRequest) -> Result<PointHeader, SealError> {
        let mut context = Vec::new();
        ciborium::into_writer(&request.context, &mut context)
            .map_err(|e| SealError::Context(e.to_string()))?;
        let seal = Seal {
            guest: request.guest,
            point: request.point,
            parent: request.parent,
            cut_at_unix_ns: request.cut_at,
            volumes: request.volumes.clone(),
            batches: request.batches,
            chain: request.chain,
            context: context.into(),
        };
        let mut appended = self.appended.clone();
        loop {
            appended.mark_unchanged();
            let (store, attempt) = (self.store.clone(), seal.clone());
            let sealed = tokio::task::spawn_blocking(move || store.seal(attempt))
                .await
                .unwrap_or_else(|e| Err(SealError::Context(format!("sealing ended early: {e}"))));
            match sealed {
                Err(SealError::MissingBatches { .. }) if appended.changed().await.is_ok() => {}
                other => return other,
            }
        }
    }

    /// One page of the digests of everything in the log.
    pub fn digests(&self, from_seq: u64, key: [u8; 32]) -> Message {
        match self.store.live_digests(&DigestKey(key), from_seq, DIGEST_PAGE_BATCHES) {
            Ok(page) => Message::DigestPage {
                next: page.last().map(|(seq, _)| seq + 1).filter(|_| page.len() == DIGEST_PAGE_BATCHES),
                batches: page
                    .into_iter()
                    .map(|(seq, digests)| (seq, digests.iter().flat_map(|d| d.0).collect()))
                    .collect(),
            },
            Err(error) => Message::Refused { code: Refusal::Unable, why: error.to_string() },
        }
    }

    /// One page of the digests of a point's volume.
    pub fn baseline(
        &self,
        guest: GuestId,
        point: u64,
        volume: VolumeIndex,
        unit: u64,
        key: [u8; 32],
    ) -> Message {
        let page = || -> Result<Message, farhaven_storage_sync::replica::ReplicaError> {
            let replica = self.store.open_point(guest, point)?;
            let key = DigestKey(key);
            let (mut runs, mut left) = (Vec::new(), BASELINE_PAGE_UNITS);
            let mut digests = Vec::new();
            for (first, count) in replica.nonzero_runs(volume) {
                let end = first + count;
                let mut at = first.max(unit);
                while at < end {
                    if left == 0 || runs.len() >= 8192 {
                        return Ok(Message::BaselinePage { runs, next: Some(at) });
                    }
                    let piece = (end - at).min(left).min(256);
                    let mut bytes = vec![0; piece as usize * UNIT];
                    replica.read(volume, at, &mut bytes)?;
                    digests.clear();
                    key.digests(&bytes, &mut digests);
                    runs.push((at, digests.iter().flat_map(|d| d.0).collect()));
                    at += piece;
                    left -= piece;
                }
            }
            Ok(Message::BaselinePage { runs, next: None })
        };
        page().unwrap_or_else(|error| Message::Refused {
            code: Refusal::Unable,
            why: error.to_string(),
        })
    }
}

fn append(
    store: &Store,
    peer: &Peer,
    mut queue: mpsc::Receiver<(u64, Bytes)>,
    appended: &watch::Sender<u64>,
    trouble: &watch::Sender<String>,
) {
    let mut batches = Vec::new();
    while let Some((_, first)) = queue.blocking_recv() {
        batches.clear();
        batches.push(first);
        while batches.len() < BATCHES_A_SYNC
            && let Ok((_, next)) = queue.try_recv()
        {
            batches.push(next);
        }
        loop {
            match store.append(&batches) {
                Ok(seqs) => {
                    trouble.send_if_modified(|what| !std::mem::take(what).is_empty());
                    peer.durable(&seqs);
                    appended.send_modify(|n| *n += 1);
                    break;
                }
                Err(StoreError::Batch { source, .. }) => {
                    // Not our peer's encoder: whatever it is, it gets nothing acknowledged.
                    tracing::error!(%source, "the peer sent a batch that does not verify; it is dropped");
                    peer.disconnect("a batch does not verify");
                    break;
                }
                Err(error) => {
                    let what = error.to_string();
                    tracing::error!("replicated data cannot be stored: {what}");
                    trouble.send_if_modified(|known| {
                        let new = *known != what;
                        known.clone_from(&what);
                        new
                    });
                    if queue.is_closed() {
                        return;
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }
}
