//! The sending half: keeps every batch until it is durable at the peer.
//!
//! What is taken here is fixed: whatever the guest writes later, these bytes
//! leave. So a batch is taken as late as the link allows: two bounds say when.
//! The *window* is what may be unacknowledged at all, with all that waits for
//! the peer's disk. The *queue* ([`super::queue_bytes`]) is what may be under
//! way and not yet at the peer: a little more than fills the path, so that what
//! waits here leaves within a few hundred milliseconds. Everything else waits
//! with its producer, which may still replace it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::RangeSet;
use crate::frame::Resume;
use crate::limits;

/// A batch that leaves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Its number.
    pub seq: u64,
    /// Its payload.
    pub bytes: Bytes,
}

/// Why a batch was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The window is full; try again when something was acknowledged.
    #[error("the window of unacknowledged batches is full")]
    Full,
    /// What was taken before has to leave first; try again when some of it
    /// arrived, or the path carries more.
    #[error("enough waits to leave")]
    Queued,
    /// The number was used before, also by a batch that is forgotten by now.
    /// The peer could not tell the two apart.
    #[error("batch number {0} was used before; take the next unused one")]
    Reused(u64),
    /// The batch is larger than the protocol allows.
    #[error("a batch of {0} bytes; at most 1 MiB are allowed, make smaller ones")]
    TooLarge(usize),
}

/// What a peer must not say. The connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SenderError {
    /// It claims to have a batch that never left.
    #[error("the peer claims to have batch {0}, which was never sent to it")]
    NeverSent(u64),
}

/// How far acknowledgement has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Acknowledgements {
    /// Lowest number that waits for its acknowledgement.
    pub lowest_unacknowledged: Option<u64>,
    /// Batches that wait.
    pub unacknowledged_batches: usize,
    /// Their payload bytes.
    pub unacknowledged_bytes: u64,
    /// Batches acknowledged so far.
    pub acknowledged_batches: u64,
    /// How often everything unacknowledged was forgotten.
    pub resets: u64,
}

impl Acknowledgements {
    /// Whether every batch submitted up to `seq` is durable at the peer, as
    /// long as none was forgotten (`resets` is unchanged).
    pub fn reached(&self, seq: u64) -> bool {
        self.lowest_unacknowledged.is_none_or(|lowest| lowest > seq)
    }
}

#[derive(Debug)]
struct Kept {
    bytes: Bytes,
    /// It was put on a stream, of this connection or an earlier one.
    sent: bool,
    /// All of it is at the peer, over this connection or told by its RESUME.
    arrived: bool,
    /// All of it was at the peer once.
    had_arrived: bool,
}

/// The sending half of a session.
#[derive(Debug)]
pub struct Sender {
    window_bytes: u64,
    queue_bytes: u64,
    kept: BTreeMap<u64, Kept>,
    /// Numbers of kept batches that must leave (again), lowest first.
    pending: BTreeSet<u64>,
    /// Every number ever submitted.
    used: RangeSet,
    unacknowledged_bytes: u64,
    /// Of these, bytes of batches that are not all at the peer.
    queued_bytes: u64,
    acknowledged_batches: u64,
    resets: u64,
    sent_bytes: u64,
    requeued_bytes: u64,
    resent_bytes: u64,
}

impl Sender {
    /// A sender that keeps at most about `window_bytes` unacknowledged.
    pub fn new(window_bytes: u64) -> Sender {
        Sender {
            window_bytes,
            queue_bytes: window_bytes,
            kept: BTreeMap::new(),
            pending: BTreeSet::new(),
            used: RangeSet::default(),
            unacknowledged_bytes: 0,
            queued_bytes: 0,
            acknowledged_batches: 0,
            resets: 0,
            sent_bytes: 0,
            requeued_bytes: 0,
            resent_bytes: 0,
        }
    }

    /// From now on a batch is taken while less than `bytes` are on their way.
    pub fn queue_up_to(&mut self, bytes: u64) {
        self.queue_bytes = bytes;
    }

    /// Takes a batch, to be sent and kept until acknowledged. An empty window
    /// takes any batch, so one larger than the window does not wait for ever.
    ///
    /// # Errors
    /// When the window is full or enough waits to leave, the number was used
    /// before, or it is too large.
    pub fn submit(&mut self, seq: u64, bytes: Bytes) -> Result<(), SubmitError> {
        if bytes.len() > limits::MAX_BATCH_BYTES {
            return Err(SubmitError::TooLarge(bytes.len()));
        }
        if self.used.contains(seq) {
            return Err(SubmitError::Reused(seq));
        }
        let length = bytes.len() as u64;
        if !self.kept.is_empty()
            && (self.unacknowledged_bytes + length > self.window_bytes
                || self.kept.len() >= limits::MAX_UNACKNOWLEDGED_BATCHES)
        {
            return Err(SubmitError::Full);
        }
        if self.queued_bytes > 0 && self.queued_bytes >= self.queue_bytes {
            return Err(SubmitError::Queued);
        }
        self.used.insert(seq);
        while self.used.ranges() > limits::MAX_REMEMBERED_RANGES {
            self.used.take(1);
        }
        self.unacknowledged_bytes += length;
        self.queued_bytes += length;
        let kept = Kept {
            bytes,
            sent: false,
            arrived: false,
            had_arrived: false,
        };
        self.kept.insert(seq, kept);
        self.pending.insert(seq);
        Ok(())
    }

    /// Payload length of the batch that would leave next.
    pub fn next_bytes(&self) -> Option<usize> {
        let seq = self.pending.first()?;
        self.kept.get(seq).map(|kept| kept.bytes.len())
    }

    /// The next batch to put on a stream, lowest number first. It counts as
    /// sent from now on; a stream that fails fails its connection.
    #[allow(clippy::should_implement_trait)] // Not an iterator: more may follow after None.
    pub fn next(&mut self) -> Option<Outgoing> {
        let seq = self.pending.pop_first()?;
        let kept = self.kept.get_mut(&seq)?;
        let length = kept.bytes.len() as u64;
        self.sent_bytes += length;
        if kept.sent {
            self.requeued_bytes += length;
        }
        if kept.had_arrived {
            self.resent_bytes += length;
        }
        kept.sent = true;
        Some(Outgoing {
            seq,
            bytes: kept.bytes.clone(),
        })
    }

    /// All of these batches is at the peer, which has yet to make them durable.
    pub fn arrived(&mut self, seqs: &[u64]) {
        for seq in seqs {
            if let Some(kept) = self.kept.get_mut(seq)
                && kept.sent
                && !kept.arrived
            {
                kept.arrived = true;
                self.queued_bytes -= kept.bytes.len() as u64;
            }
        }
    }

    /// The peer says these are durable. Numbers that are not kept (any more)
    /// are nothing new. Returns how many were.
    ///
    /// # Errors
    /// When the peer claims a batch that never left; nothing is changed then.
    pub fn acknowledged(&mut self, ranges: &[(u64, u64)]) -> Result<usize, SenderError> {
        let durable = self.sent_within(ranges)?;
        for seq in &durable {
            if let Some(kept) = self.kept.remove(seq) {
                self.unacknowledged_bytes -= kept.bytes.len() as u64;
                if !kept.arrived {
                    self.queued_bytes -= kept.bytes.len() as u64;
                }
                self.acknowledged_batches += 1;
            }
            self.pending.remove(seq);
        }
        Ok(durable.len())
    }

    /// A connection begins, and the peer says what it has: the durable is
    /// acknowledged, the held need not leave again.
    ///
    /// # Errors
    /// When the peer claims a batch that never left.
    pub fn resume(&mut self, resume: &Resume) -> Result<(), SenderError> {
        let held = self.sent_within(&resume.held)?;
        self.acknowledged(&resume.durable)?;
        for seq in &held {
            self.pending.remove(seq);
        }
        self.arrived(&held);
        Ok(())
    }

    /// The connection is gone: what was not acknowledged must leave again, in
    /// order, unless the peer says that it is there.
    pub fn disconnected(&mut self) {
        self.pending = self.kept.keys().copied().collect();
        for kept in self.kept.values_mut() {
            kept.had_arrived |= kept.arrived;
            kept.arrived = false;
        }
        self.queued_bytes = self.unacknowledged_bytes;
    }

    /// Forgets everything unacknowledged. The numbers stay used.
    pub fn reset(&mut self) {
        self.kept.clear();
        self.pending.clear();
        self.unacknowledged_bytes = 0;
        self.queued_bytes = 0;
        self.resets += 1;
    }

    /// How far acknowledgement has come.
    pub fn acknowledgements(&self) -> Acknowledgements {
        Acknowledgements {
            lowest_unacknowledged: self.kept.keys().next().copied(),
            unacknowledged_batches: self.kept.len(),
            unacknowledged_bytes: self.unacknowledged_bytes,
            acknowledged_batches: self.acknowledged_batches,
            resets: self.resets,
        }
    }

    /// Payload bytes put on streams so far, repeats included.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Payload bytes put on streams once more, as their connection was lost.
    pub fn requeued_bytes(&self) -> u64 {
        self.requeued_bytes
    }

    /// Of these, payload bytes of batches that had wholly arrived before: what
    /// the peer lost again as its process ended.
    pub fn resent_bytes(&self) -> u64 {
        self.resent_bytes
    }

    /// Payload bytes taken that are not at the peer: they wait here and in
    /// QUIC, or are on the wire.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// From how many such bytes on no batch is taken.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Kept numbers within ranges, all of which must have left. Walks what is
    /// kept, not the numbers: a range may be all of `u64`.
    fn sent_within(&self, ranges: &[(u64, u64)]) -> Result<Vec<u64>, SenderError> {
        let mut found = Vec::new();
        for &(first, last) in ranges {
            if first > last {
                continue;
            }
            for (&seq, kept) in self.kept.range(first..=last) {
                if !kept.sent {
                    return Err(SenderError::NeverSent(seq));
                }
                found.push(seq);
            }
        }
        Ok(found)
    }
}
