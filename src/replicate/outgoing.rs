//! What all guests of a pair of sites share at the source: the sequence of
//! batch numbers, the dedup index, the versions that differences are told
//! against, and how strongly to compress.
//!
//! Both tables follow what the peer says: a batch counts in full once it is
//! acknowledged, and not at all once it was given up or is about to be pruned.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farhaven_storage_sync::codec::{Bases, Crew, DedupIndex, LevelControl, Measured, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::limits::BASES_BYTES;
use farhaven_storage_sync::unit::{Digest, GROUP, GuestId, Place, VolumeIndex};
use farhaven_wan::Peer;
use tokio::sync::Notify;

use super::asking::{Asking, places};
use super::message::Message;

/// A round trip that delays no point by anything that counts.
const SHORT: Duration = Duration::from_millis(10);

/// How the link stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkNow {
    /// What it carries in a round trip.
    pub(super) round_trip_bytes: u64,
    /// What waits for it, beyond what is on its way.
    pub(super) backlog: u64,
    pub(super) bytes_a_second: f64,
    /// A round trip is next to nothing.
    pub(super) is_short: bool,
}

/// One source's half of a pair of sites, shared by all its guests.
pub struct Outgoing {
    /// The way to the peer.
    pub peer: Peer,
    /// Batch numbers of this pair's log.
    pub sequence: Arc<Sequence>,
    /// What the peer holds already.
    pub index: Arc<Mutex<DedupIndex>>,
    /// Versions of units that the peer holds: changed units are told against them.
    pub bases: Arc<Mutex<Bases>>,
    /// Compresses for all guests; without it each compresses for itself.
    pub crew: Option<Arc<Crew>>,
    /// How strongly to compress, and when a batch was last handed over.
    level: Mutex<(LevelControl, Instant)>,
    /// Key of every digest in the index and in the guests' tables.
    pub key: DigestKey,
    /// What the peer may hold that the index does not know.
    pub asking: Asking,
    /// Batches on their way: other guests refer to them only once they are acknowledged.
    on_the_way: Mutex<BTreeSet<u64>>,
    open: Mutex<BTreeSet<u64>>,
    next_shipment: AtomicU64,
    ended: Notify,
}

impl Outgoing {
    /// `first` is the first batch number to use; `index_bytes` bounds the dedup index.
    pub fn new(peer: Peer, first: u64, index_bytes: usize, key: DigestKey) -> Self {
        let crew = (!crate::work::in_place()).then(Crew::new).and_then(|crew| {
            crew.inspect_err(|error| {
                tracing::warn!(%error, "every guest's data is compressed on one thread");
            })
            .ok()
            .map(Arc::new)
        });
        let threads = crew.as_ref().map_or(1, |crew| crew.size());
        let level = LevelControl::new().with_threads(threads);
        Self {
            peer,
            sequence: Arc::new(Sequence::starting_at(first)),
            index: Arc::new(Mutex::new(DedupIndex::new(index_bytes))),
            bases: Arc::new(Mutex::new(Bases::new(BASES_BYTES))),
            crew,
            level: Mutex::new((level, Instant::now())),
            key,
            asking: Asking::default(),
            on_the_way: Mutex::default(),
            open: Mutex::default(),
            next_shipment: AtomicU64::new(0),
            ended: Notify::new(),
        }
    }

    fn bases(&self) -> MutexGuard<'_, Bases> {
        self.bases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn index(&self) -> MutexGuard<'_, DedupIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link as it is now.
    pub(super) fn link(&self) -> LinkNow {
        let link = self.peer.status();
        let window = link.congestion_window_bytes.unwrap_or(0);
        let round_trip = link.rtt.unwrap_or_default().as_secs_f64();
        LinkNow {
            round_trip_bytes: window,
            is_short: link.rtt.is_some_and(|rtt| rtt < SHORT),
            backlog: link.unacknowledged_bytes.saturating_sub(window),
            bytes_a_second: match round_trip > 0.0 {
                true => window as f64 / round_trip,
                false => 0.0,
            },
        }
    }

    /// An answer to what `asked` says, of a guest's volume: what the peer holds
    /// goes into the index, unless it retired it since. `None`: no answer came.
    /// Returns all of it.
    pub(super) fn take_answer(
        &self,
        question: u64,
        (guest, volume): (GuestId, VolumeIndex),
        asked: &[Digest],
        answer: Option<Message>,
    ) -> HashMap<Digest, Place> {
        // Held throughout: what is retired now is retired before or after all of it.
        let answers = self.asking.answers();
        let (mut found, mut hits) = (HashMap::new(), 0);
        let came = if let Some(Message::Found { batches, sampling }) = &answer {
            let mut wanted: HashSet<Digest> = asked.iter().copied().collect();
            let mut index = self.index();
            for (digest, place) in places(batches, self.sequence.next()) {
                if answers.may_name(question, place.seq()) {
                    index.insert(digest, place);
                    // Neighbours too: what was not asked for, since hints are thin, is among them.
                    found.insert(digest, place);
                    hits += u64::from(wanted.remove(&digest));
                }
            }
            self.asking.sample(*sampling);
            true
        } else {
            false
        };
        drop(answers);
        let asked = asked.len() as u64;
        self.asking.worth(guest, volume, |worth| match came {
            true => worth.answered(asked, hits),
            false => worth.failed(),
        });
        self.asking.count(asked, hits);
        found
    }

    /// What the peer holds is about to be learned: see [`Outgoing::learn`].
    pub fn begin_learning(&self) -> u64 {
        self.asking.answers().begin()
    }

    /// Nothing more is learned under this number.
    pub fn end_learning(&self, learning: u64) {
        self.asking.answers().end(learning);
    }

    /// Batches that the peer holds of an earlier process, by the digests of
    /// their literals. What it retired since `learning` began is left out.
    pub fn learn(&self, learning: u64, batches: &[(u64, Bytes)]) {
        let answers = self.asking.answers();
        let mut index = self.index();
        for (seq, digests) in batches {
            let known = (1..self.sequence.next()).contains(seq);
            if !known || !answers.may_name(learning, *seq) {
                continue;
            }
            let digests = digests.as_chunks::<16>().0.iter().take(GROUP);
            for (slot, digest) in (0..).zip(digests) {
                index.insert(Digest(*digest), Place::new(*seq, slot));
            }
        }
        if index.forgotten() > 0 {
            self.asking.index_forgot();
        }
    }

    /// No batch may refer to these any more, nor tell a difference from them.
    fn forget_these(&self, seqs: &BTreeSet<u64>) {
        self.index
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove_seqs(seqs);
        self.bases().remove_seqs(seqs);
    }

    /// These are damaged at the peer: no batch may refer to them any more, whatever
    /// answers are on their way. What did before, the peer refuses to seal.
    pub fn damaged(&self, seqs: &BTreeSet<u64>) {
        self.asking.answers().retire(seqs);
        self.forget_these(seqs);
    }

    /// No batch may refer to this one any more.
    pub fn forget(&self, seq: u64) {
        self.forget_these(&BTreeSet::from([seq]));
    }

    /// No batch sent before may be referred to any more.
    pub fn forget_all(&self) {
        self.index
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.bases().clear();
    }

    /// zstd level for the next batch.
    pub(super) fn level(&self) -> i32 {
        let level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        level.0.level()
    }

    /// A shipment begins. Returns its number.
    pub(super) fn opened(&self) -> u64 {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let id = self.next_shipment.fetch_add(1, Ordering::AcqRel);
        open.insert(id);
        id
    }

    /// A shipment has ended: it refers to nothing any more.
    pub(super) fn closed(&self, id: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(&id);
        drop(open);
        self.ended.notify_waiters();
    }

    /// A batch is on its way: others refer to it once it is acknowledged.
    pub(super) fn submitted(&self, seq: u64) {
        self.on_the_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(seq);
    }

    /// zstd level for the next batch, after one that took this.
    pub(super) fn level_after(&self, bytes: u64, compressing: Duration, waiting: Duration) -> i32 {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let (control, last) = &mut *level;
        let now = Instant::now();
        let elapsed = now.duration_since(*last);
        *last = now;
        control.batch(Measured {
            elapsed,
            compressing,
            waiting,
            bytes,
        })
    }

    /// Takes notice of what the peer acknowledged.
    pub(super) fn settle(&self) {
        let mut on_the_way = self
            .on_the_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // After the lock: what another thread submits from here on is not among those on
        // their way, so nothing is taken for acknowledged that this does not know of.
        let acknowledged = *self.peer.acknowledged().borrow();
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        if index.forgotten() > 0 {
            self.asking.index_forgot();
        }
        let mut bases = self.bases();
        on_the_way.retain(|seq| {
            let reached = acknowledged.reached(*seq);
            if reached {
                index.acknowledge(*seq);
                bases.acknowledge(*seq);
            }
            !reached
        });
    }

    /// The peer is about to drop these batches: refer to none of them any
    /// more. Returns once no shipment is open that may have referred to them
    /// before, so that the peer sees every reference there is when it checks.
    pub async fn retire(&self, seqs: &BTreeSet<u64>) {
        // Before the index: an answer that is being taken in is in it by then.
        self.asking.answers().retire(seqs);
        self.forget_these(seqs);
        let before = self.next_shipment.load(Ordering::Acquire);
        loop {
            let ended = self.ended.notified();
            let open = {
                let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.iter().next().is_some_and(|oldest| *oldest < before)
            };
            if !open {
                return;
            }
            ended.await;
        }
    }
}
