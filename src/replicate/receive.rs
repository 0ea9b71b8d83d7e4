//! From the peer to the store: batches become durable, points become sealed.
//!
//! One [`Incoming`] per peer. Batches are appended by one thread, as many as
//! have arrived for each sync, and acknowledged only then. While the store
//! cannot take them (its filesystem is full) they wait here, bounded by the
//! session's window, and the source's points get older instead of being lost.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::store::{Seal, SealError, Store, StoreError};
use farhaven_storage_sync::unit::{Digest, GuestId, UNIT, VolumeIndex};
use farhaven_storage_sync::{LogError, PointHeader, PointStats};
use farhaven_wan::Peer;
use tokio::sync::{mpsc, watch};

use super::asking::ASKED_BYTES;
use super::message::{BASELINE_PAGE_UNITS, DIGEST_PAGE_BATCHES, Message, Refusal, SealRequest};

/// Batches taken for one sync at most.
const BATCHES_A_SYNC: usize = 256;

/// Bytes of batches that may wait for the disk: twice the widest window of a session.
const WAITING_BYTES: usize = 64 << 20;

/// What a batch that waits for the disk counts for, however small it is.
fn room_of(batch: &Bytes) -> usize {
    batch.len().max(256)
}

/// Batches that are told to the session as stored when a daemon starts: twice
/// what a sender keeps unacknowledged.
const STORED_BATCHES: usize = 2 * farhaven_wan::limits::MAX_UNACKNOWLEDGED_BATCHES;

/// How long a store that cannot take data is left alone before the next try.
const RETRY: Duration = Duration::from_secs(2);

/// The receiving half of a pair of sites.
#[derive(Clone)]
pub struct Incoming {
    /// What the peer sent.
    pub store: Store,
    queue: mpsc::UnboundedSender<(u64, Bytes)>,
    waiting: Arc<AtomicUsize>,
    peer: Peer,
    appended: watch::Receiver<u64>,
    trouble: watch::Receiver<String>,
    /// Changes when hints may have to be made.
    hints: Arc<watch::Sender<u64>>,
}

impl Incoming {
    /// Starts the appending thread. It ends when every clone is dropped.
    ///
    /// Below `min_free` bytes of room in `directory` nothing more is taken.
    pub fn start(store: Store, peer: Peer, directory: PathBuf, min_free: u64) -> Self {
        // What an earlier process stored, its acknowledgement perhaps lost with
        // it, is not to be sent again.
        peer.stored(store.newest_seqs(STORED_BATCHES));
        let (queue, batches) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (appended_tx, appended) = watch::channel(0);
        let (trouble_tx, trouble) = watch::channel(String::new());
        let appending = Appending {
            store: store.clone(),
            peer: peer.clone(),
            waiting: waiting.clone(),
            appended: appended_tx,
            trouble: trouble_tx,
            directory,
            min_free,
        };
        crate::work::spawn_blocking(move || appending.run(batches));
        let (hints, asked) = watch::channel(1);
        tokio::spawn(make_hints(store.clone(), asked));
        Self {
            store,
            queue,
            waiting,
            peer,
            appended,
            trouble,
            hints: Arc::new(hints),
        }
    }

    /// Takes one batch. Messages must never wait behind data, so this does not
    /// wait; a peer whose window is wider than what may wait here is refused.
    pub fn batch(&self, seq: u64, bytes: Bytes) {
        let size = room_of(&bytes);
        if self.waiting.load(Ordering::Relaxed) + size > WAITING_BYTES {
            self.peer
                .refuse_data("more data was sent than may wait for the disk here");
            return;
        }
        self.waiting.fetch_add(size, Ordering::Relaxed);
        // The thread ends only with the last sender.
        let _ = self.queue.send((seq, bytes));
    }

    /// Waits until nothing that was taken waits for the disk; false after `patience`.
    pub async fn settled(&self, patience: Duration) -> bool {
        let mut appended = self.appended.clone();
        let waiting = || self.waiting.load(Ordering::Acquire) > 0;
        let settled = async { while waiting() && appended.changed().await.is_ok() {} };
        tokio::time::timeout(patience, settled).await.is_ok() && !waiting()
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
    pub async fn seal(&self, request: &SealRequest) -> Result<PointHeader, SealStep> {
        let seal = seal_of(request)?;
        let mut appended = self.appended.clone();
        loop {
            appended.mark_unchanged();
            let (store, attempt) = (self.store.clone(), seal.clone());
            let sealed = crate::work::spawn_blocking(move || store.seal(attempt))
                .await
                .map_err(|e| SealStep::Failed(e.to_string()))?;
            match sealed {
                Err(SealError::MissingBatches { .. }) if appended.changed().await.is_ok() => {}
                other => return Ok(other?),
            }
        }
    }

    /// One page of the digests of everything in the log.
    pub fn digests(&self, from_seq: u64, key: [u8; 32]) -> Message {
        let page = self
            .store
            .live_digests(&DigestKey::new(key), from_seq, DIGEST_PAGE_BATCHES);
        Message::DigestPage {
            next: page.next,
            batches: page
                .batches
                .into_iter()
                .map(|(seq, digests)| (seq, digests.iter().flat_map(|d| d.0).collect()))
                .collect(),
        }
    }

    /// Says what of this is here, and keeps hints under this key from now on.
    pub fn find(&self, key: [u8; 32], prefixes: &[u8]) -> Message {
        let key = DigestKey::new(key);
        self.store.hint_with(&key);
        self.hints.send_modify(|n| *n += 1);
        let found = self.store.find(&key, prefixes.as_chunks::<ASKED_BYTES>().0);
        let batches = found.batches.into_iter().map(|batch| {
            let digests = batch.digests.iter().flat_map(|digest| digest.0).collect();
            (batch.seq, batch.slots, digests)
        });
        Message::Found {
            batches: batches.collect(),
            sampling: found.sampling,
        }
    }

    /// Bytes of the stored images.
    pub fn image_bytes(&self) -> u64 {
        self.store.images().iter().map(|image| image.bytes).sum()
    }

    /// One page of the digests of a point's volume; unknown is what cannot be read,
    /// so that the source sends it anew.
    pub fn baseline(
        &self,
        guest: GuestId,
        point: u64,
        volume: VolumeIndex,
        unit: u64,
        key: [u8; 32],
    ) -> Message {
        let page = || -> Result<Message, farhaven_storage_sync::replica::ReplicaError> {
            let replica = self.store.open_in_part(guest, point)?;
            let key = DigestKey::new(key);
            let (mut runs, mut left) = (Vec::new(), BASELINE_PAGE_UNITS);
            let mut digests = Vec::new();
            for (first, count) in replica.nonzero_runs(volume) {
                let end = first + count;
                let mut at = first.max(unit);
                while at < end {
                    if left == 0 || runs.len() >= 8192 {
                        return Ok(Message::BaselinePage {
                            runs,
                            next: Some(at),
                        });
                    }
                    let piece = (end - at).min(left).min(256);
                    let mut bytes = vec![0; piece as usize * UNIT];
                    digests.clear();
                    match replica.read(volume, at, piece, &mut bytes) {
                        Ok(()) => key.digests(&bytes, &mut digests),
                        Err(_) => {
                            digests_one_by_one(&replica, volume, at..at + piece, &key, &mut digests)
                        }
                    }
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

/// Digests of units of which some cannot be read.
fn digests_one_by_one(
    replica: &Replica,
    volume: VolumeIndex,
    units: Range<u64>,
    key: &DigestKey,
    digests: &mut Vec<Digest>,
) {
    let mut bytes = [0; UNIT];
    digests.extend(
        units.map(|unit| match replica.read(volume, unit, 1, &mut bytes) {
            Ok(()) => key.of(&bytes),
            Err(_) => Digest::UNKNOWN,
        }),
    );
}

/// What the store is asked, of what the source asked.
///
/// # Errors
/// When the context cannot be written.
pub fn seal_of(request: &SealRequest) -> Result<Seal, SealStep> {
    let mut context = Vec::new();
    ciborium::into_writer(&request.context, &mut context)
        .map_err(|e| SealStep::Failed(e.to_string()))?;
    Ok(Seal {
        guest: request.guest,
        point: request.point,
        parent: request.parent,
        cut_at_unix_ns: request.cut_at,
        volumes: request.volumes.clone(),
        batches: request.batches,
        chain: request.chain,
        context,
        stats: PointStats {
            pause_ns: nanos(request.context.pause),
            guest_bytes: request.context.changed_bytes,
            wan_bytes: request.context.sent_bytes,
        },
    })
}

/// Makes the hints that the store lacks, beside everything else: it rests as
/// long as it works.
async fn make_hints(store: Store, mut asked: watch::Receiver<u64>) {
    asked.mark_changed();
    while asked.changed().await.is_ok() {
        loop {
            let (store, begun) = (store.clone(), Instant::now());
            let more = crate::work::spawn_blocking(move || store.fill_hints()).await;
            if !more.unwrap_or(false) || asked.has_changed().is_err() {
                break;
            }
            tokio::time::sleep(begun.elapsed()).await;
        }
    }
}

/// Why a point was not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealStep {
    /// The store refused.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A step did not come to its end.
    #[error("sealing ended early: {0}")]
    Failed(String),
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the appending thread works with.
struct Appending {
    store: Store,
    peer: Peer,
    waiting: Arc<AtomicUsize>,
    appended: watch::Sender<u64>,
    trouble: watch::Sender<String>,
    directory: PathBuf,
    min_free: u64,
}

/// Why nothing is appended.
#[derive(Debug, thiserror::Error)]
enum Full {
    #[error(transparent)]
    Store(StoreError),
    #[error("{directory} has {free} bytes free, and store.min_free is {min_free}; make room there")]
    Room {
        directory: PathBuf,
        free: u64,
        min_free: u64,
    },
}

impl Appending {
    fn room(&self) -> Result<(), Full> {
        let free = crate::guest::qemu::peer::bytes_free(&self.directory);
        if free >= self.min_free {
            return Ok(());
        }
        Err(Full::Room {
            directory: self.directory.clone(),
            free,
            min_free: self.min_free,
        })
    }

    /// Says once what hinders the store.
    fn tell(&self, what: String) {
        self.trouble.send_if_modified(|known| {
            let new = *known != what;
            if new {
                tracing::error!("replicated data cannot be stored: {what}");
                *known = what;
            }
            new
        });
    }

    fn run(self, mut queue: mpsc::UnboundedReceiver<(u64, Bytes)>) {
        let mut batches = Vec::new();
        while let Some((_, first)) = crate::work::receive(&mut queue) {
            batches.clear();
            batches.push(first);
            while batches.len() < BATCHES_A_SYNC
                && let Ok((_, next)) = queue.try_recv()
            {
                batches.push(next);
            }
            let bytes: usize = batches.iter().map(room_of).sum();
            if !self.append(&batches, &queue) {
                return;
            }
            self.waiting.fetch_sub(bytes, Ordering::Release);
            self.appended.send_modify(|n| *n += 1);
        }
    }

    /// Appends until it works. False: nobody wants it any more.
    fn append(&self, batches: &[Bytes], queue: &mpsc::UnboundedReceiver<(u64, Bytes)>) -> bool {
        loop {
            match self
                .room()
                .and_then(|()| self.store.append(batches).map_err(Full::Store))
            {
                Ok(seqs) => {
                    self.trouble
                        .send_if_modified(|what| !std::mem::take(what).is_empty());
                    self.peer.durable(&seqs);
                    self.appended.send_modify(|n| *n += 1);
                    return true;
                }
                Err(Full::Store(StoreError::Batch(error))) => {
                    // Not our peer's encoder: whatever it is, nothing of it is acknowledged.
                    tracing::error!(%error, "the peer sent a batch that does not verify; the connection is closed");
                    self.peer.refuse_data("a batch does not verify");
                    return true;
                }
                Err(Full::Store(StoreError::Log(error @ LogError::Conflict { .. }))) => {
                    // It is one however often it is tried, and others wait behind it: the
                    // peer's next daemon numbers its batches from what is here.
                    self.tell(error.to_string());
                    self.peer.refuse_data("a batch has the number of another");
                    return true;
                }
                Err(error) => {
                    self.tell(error.to_string());
                    if queue.is_closed() {
                        return false;
                    }
                    crate::work::sleep(RETRY);
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use std::path::Path;

    use farhaven_storage_sync::store::StoreOptions;
    use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, PeerRecord};

    use super::*;

    /// A store, and a link to a site that is never there.
    fn stage(directory: &Path) -> (Store, Node, Peer) {
        let identity = |name: &str| Identity::load_or_create(&directory.join(name), name).unwrap();
        let options = NodeOptions {
            listen: "127.0.0.1:0".parse().unwrap(),
            link: LinkOptions::default(),
        };
        let node = Node::start(&identity("here"), options).unwrap();
        let peer = node.trust(PeerRecord {
            site: "there".to_owned(),
            key: identity("there").key(),
            addresses: Vec::new(),
            dial: false,
        });
        let (store, _) = Store::open(&directory.join("store"), StoreOptions::default()).unwrap();
        (store, node, peer)
    }

    #[tokio::test]
    async fn a_flood_of_batches_of_nothing_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _node, peer) = stage(dir.path());
        // Nobody takes anything from here: the disk hangs.
        let (queue, waits) = mpsc::unbounded_channel();
        let incoming = Incoming {
            store,
            queue,
            waiting: Arc::default(),
            peer,
            appended: watch::channel(0).1,
            trouble: watch::channel(String::new()).1,
            hints: Arc::new(watch::channel(1).0),
        };
        let most = WAITING_BYTES / 256;
        for seq in 0..most as u64 + 1000 {
            incoming.batch(seq, Bytes::new());
        }
        assert_eq!(waits.len(), most);
        assert_eq!(incoming.waiting.load(Ordering::Relaxed), WAITING_BYTES);
    }

    /// What a batch was counted for when it came is what it is counted for when it goes.
    #[tokio::test]
    async fn a_batch_of_nothing_leaves_the_room_that_it_took() {
        const PATIENCE: Duration = Duration::from_secs(30);
        let dir = tempfile::tempdir().unwrap();
        let (store, _node, peer) = stage(dir.path());
        let incoming = Incoming::start(store, peer, dir.path().to_owned(), 0);
        for seq in 0..10 {
            incoming.batch(seq, Bytes::new());
        }
        assert!(incoming.settled(PATIENCE).await);
        assert_eq!(incoming.waiting.load(Ordering::Relaxed), 0);
    }
}
