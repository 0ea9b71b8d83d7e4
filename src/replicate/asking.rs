//! Asking the peer which units it holds, and when that is worth it.
//!
//! What the dedup index does not know the peer may hold all the same: the
//! index is bounded, it is learned only in part after a restart, and images
//! may be stored at the peer that never crossed this link. So the first bytes
//! of digests are sent over in questions of hundreds, several on their way at
//! a time, and the units wait for the answers in a bounded queue
//! ([`super::ahead`]). What is answered goes into the index, which decides as
//! ever; whole digests are compared there, so a wrong answer finds nothing.
//!
//! [`Worth`] decides whether to ask at all. [`Answers`] keeps an answer that
//! crossed a [`Message::Retire`] from bringing back what the peer drops.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use farhaven_storage_sync::limits::{ANSWER_BATCHES, IMAGE_SEQ, SEQ};
use farhaven_storage_sync::unit::{Digest, GuestId, Place, VolumeIndex};

use super::message::Message;

/// Units of one question: 3 KiB on the wire.
pub const QUESTION: usize = 512;

/// Bytes of a digest that are asked for.
pub const ASKED_BYTES: usize = 6;

/// Bytes of units that wait for answers, over all guests of a pair of sites.
pub const HELD_BYTES: usize = 16 << 20;

/// An answer that takes longer is not waited for.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// About what a unit costs on the wire that the peer turns out not to hold.
const UNIT_SENT: f64 = 2048.0;

/// Units asked for before it is judged whether that pays, and in a probe.
const TRIAL: u64 = 8192;
const PROBE: u64 = 512;

/// Units sent unasked after a trial that did not pay, at first and at most:
/// the probes between them cost less than one byte in ten thousand.
const REST: u64 = 4096;
const REST_MOST: u64 = 16_384;

/// Units sent unasked after a peer did not hold what it had said: 4 GiB.
const DISTRUST: u64 = 1 << 20;

/// An answer on its way; `None` when none comes.
pub type Answer = Pin<Box<dyn Future<Output = Option<Message>> + Send>>;

/// Who carries questions to the peer.
pub trait Questions: Send + Sync {
    /// Asks for content whose digests begin with these, [`ASKED_BYTES`] each.
    fn find(&self, prefixes: Bytes) -> Answer;
}

/// Does asking pay for one volume of a guest? Counted in units, so that it
/// needs no clock.
#[derive(Debug, Default)]
pub(super) struct Worth {
    asked: u64,
    hits: u64,
    /// Bytes that the link could have carried while answers were awaited.
    idle: f64,
    /// Units still to be sent unasked.
    resting: u64,
    rest: u64,
    /// Hits of a hundred thousand asked, lately.
    share: Option<u64>,
}

impl Worth {
    /// Ask for this unit?
    pub(super) fn asks(&mut self) -> bool {
        if self.resting > 0 {
            self.resting -= 1;
            return false;
        }
        true
    }

    /// A question for `asked` units found `hits` of them.
    pub(super) fn answered(&mut self, asked: u64, hits: u64) {
        if asked == 0 {
            return;
        }
        let share = hits.min(asked) * 100_000 / asked;
        self.share = Some(match self.share {
            Some(before) => (before * 3 + share) / 4,
            None => share,
        });
        self.asked += asked;
        self.hits += hits;
        let enough = match self.rest {
            0 => TRIAL,
            _ => PROBE,
        };
        if self.asked < enough {
            return;
        }
        let saved = self.hits as f64 * UNIT_SENT;
        let spent = (self.asked * 2 * ASKED_BYTES as u64) as f64 + self.idle;
        self.rest = match saved > spent {
            true => 0,
            false => (self.rest * 2).clamp(REST, REST_MOST),
        };
        self.resting = self.rest;
        (self.asked, self.hits, self.idle) = (0, 0, 0.0);
    }

    /// The link stood idle for an answer: `bytes` could have gone meanwhile.
    pub(super) fn waited(&mut self, bytes: f64) {
        self.idle += bytes;
    }

    /// No answer came: the peer is busy, away, or does not know the question.
    pub(super) fn failed(&mut self) {
        self.rest = (self.rest * 2).clamp(REST, REST_MOST);
        self.resting = self.rest;
    }

    /// Is it worth `bytes` of the link's time to wait for answers about `units`?
    pub(super) fn is_worth(&self, units: u64, bytes: f64) -> bool {
        // Before the first answer a fair chance.
        let share = self.share.unwrap_or(50_000) as f64 / 100_000.0;
        share * units as f64 * UNIT_SENT > bytes
    }
}

/// Answers on their way, and what was retired meanwhile.
#[derive(Debug, Default)]
pub(super) struct Answers {
    clock: u64,
    open: BTreeSet<u64>,
    retired: BTreeMap<u64, BTreeSet<u64>>,
}

impl Answers {
    /// A question goes out. Its number.
    pub(super) fn begin(&mut self) -> u64 {
        self.clock += 1;
        self.open.insert(self.clock);
        self.clock
    }

    /// The peer is about to drop these.
    pub(super) fn retire(&mut self, seqs: &BTreeSet<u64>) {
        if !self.open.is_empty() {
            self.clock += 1;
            self.retired.insert(self.clock, seqs.clone());
        }
    }

    /// May an answer to this question still name this batch?
    pub(super) fn may_name(&self, question: u64, seq: u64) -> bool {
        let mut since = self.retired.range(question..);
        !since.any(|(_, seqs)| seqs.contains(&seq))
    }

    /// The answer was taken, or none comes.
    pub(super) fn end(&mut self, question: u64) {
        self.open.remove(&question);
        match self.open.first() {
            Some(&oldest) => self.retired = self.retired.split_off(&oldest),
            None => self.retired.clear(),
        }
    }
}

/// What the guests of a pair of sites share for asking.
#[derive(Default)]
pub struct Asking {
    questions: Mutex<Option<Arc<dyn Questions>>>,
    worth: Mutex<BTreeMap<(GuestId, VolumeIndex), Worth>>,
    /// Units still to be sent unasked: the peer did not hold what it had said.
    distrusted: AtomicU64,
    answers: Mutex<Answers>,
    /// Batches of an earlier process were not all learned.
    partial: AtomicBool,
    /// The index had to forget.
    forgotten: AtomicBool,
    /// Bytes of the images that the peer says it has stored.
    images: AtomicU64,
    sampling: AtomicU8,
    held: AtomicUsize,
    asked: AtomicU64,
    found: AtomicU64,
}

impl std::fmt::Debug for Asking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Asking({} asked)", self.asked.load(Ordering::Relaxed))
    }
}

fn held<T: ?Sized>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Asking {
    /// From now on this carries the questions.
    pub fn by(&self, questions: Arc<dyn Questions>) {
        *held(&self.questions) = Some(questions);
    }

    pub(super) fn questions(&self) -> Option<Arc<dyn Questions>> {
        held(&self.questions).clone()
    }

    /// The peer's log is known in part only.
    pub fn knows_a_part(&self) {
        self.partial.store(true, Ordering::Relaxed);
    }

    /// The peer has images stored, of so many bytes together.
    pub fn peer_holds(&self, bytes: u64) {
        self.images.store(bytes, Ordering::Relaxed);
    }

    /// The index had to forget some of what it knew.
    pub(super) fn index_forgot(&self) {
        self.forgotten.store(true, Ordering::Relaxed);
    }

    /// May the peer hold anything that is not known here?
    pub(super) fn may_find(&self) -> bool {
        self.partial.load(Ordering::Relaxed)
            || self.forgotten.load(Ordering::Relaxed)
            || self.images.load(Ordering::Relaxed) > 0
    }

    /// Whether to ask for units of this volume, and what came of it.
    pub(super) fn worth<T>(
        &self,
        guest: GuestId,
        volume: VolumeIndex,
        with: impl FnOnce(&mut Worth) -> T,
    ) -> T {
        with(held(&self.worth).entry((guest, volume)).or_default())
    }

    /// What was answered was not so: a seal was refused.
    pub fn distrust(&self) {
        self.distrusted.store(DISTRUST, Ordering::Relaxed);
    }

    /// Are these units to be sent unasked, for that reason?
    pub(super) fn distrusts(&self, units: u64) -> bool {
        let left = self.distrusted.load(Ordering::Relaxed);
        let less = left.saturating_sub(units);
        // Two guests at once may count one's units only.
        self.distrusted.store(less, Ordering::Relaxed);
        left > 0
    }

    pub(super) fn answers(&self) -> MutexGuard<'_, Answers> {
        held(&self.answers)
    }

    /// Is this one of the digests that the peer keeps hints of?
    pub(super) fn is_sampled(&self, digest: &Digest) -> bool {
        let sampling = u32::from(self.sampling.load(Ordering::Relaxed).min(8));
        u32::from(digest.0[ASKED_BYTES - 1]) & ((1 << sampling) - 1) == 0
    }

    /// Is the room for units that wait used up?
    pub(super) fn is_full(&self) -> bool {
        self.held.load(Ordering::Relaxed) >= HELD_BYTES
    }

    /// Bytes of units that wait.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn hold(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn count(&self, asked: u64, found: u64) {
        self.asked.fetch_add(asked, Ordering::Relaxed);
        self.found.fetch_add(found, Ordering::Relaxed);
    }

    pub(super) fn sample(&self, sampling: u8) {
        self.sampling.store(sampling, Ordering::Relaxed);
    }

    /// Units asked for, and found, since the daemon started.
    pub fn counts(&self) -> (u64, u64) {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (of(&self.asked), of(&self.found))
    }
}

/// The digests of an answer and their places, as far as they can be. `next` is
/// the number of the next batch: the peer can hold none from there on.
pub(super) fn places(
    batches: &[(u64, u64, Bytes)],
    next: u64,
) -> impl Iterator<Item = (Digest, Place)> + '_ {
    let sound = move |(seq, slots, digests): &&(u64, u64, Bytes)| {
        let known = (1..next).contains(seq) || (IMAGE_SEQ..SEQ).contains(seq);
        known && digests.len() == 16 * slots.count_ones() as usize
    };
    let sound = batches.iter().take(ANSWER_BATCHES).filter(sound);
    sound.flat_map(|(seq, slots, digests)| {
        let slots = (0..64).filter(move |slot| slots >> slot & 1 == 1);
        let digests = digests.as_chunks::<16>().0.iter();
        slots
            .zip(digests)
            .map(|(slot, digest)| (Digest(*digest), Place::new(*seq, slot)))
    })
}

#[cfg(test)]
mod tests;
