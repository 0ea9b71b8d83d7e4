//! The receiving half: what has arrived, what is durable, what to acknowledge.

use std::collections::BTreeSet;

use super::RangeSet;
use crate::frame::{Ranges, Resume};
use crate::limits;

/// What a batch that arrived is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Not seen before from this incarnation of the sender: the application gets it.
    New,
    /// Here already: dropped, and acknowledged again if it is durable.
    Duplicate,
}

/// What a sender must not do. The connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiverError {
    /// It sends on although nothing was acknowledged.
    #[error(
        "the peer sent more than {} batches without acknowledgement",
        limits::MAX_IN_HAND_BATCHES
    )]
    TooMany,
}

/// The receiving half of a session.
#[derive(Debug, Default)]
pub struct Receiver {
    incarnation: Option<u64>,
    /// With the application, not durable yet.
    in_hand: BTreeSet<u64>,
    durable: RangeSet,
    /// Durable, and to be told.
    to_acknowledge: RangeSet,
    repeated_bytes: u64,
}

impl Receiver {
    /// A connection of a sender begins. Another incarnation than before is
    /// another process, which knows nothing of the earlier batches.
    pub fn begin(&mut self, incarnation: u64) {
        match self.incarnation {
            Some(known) if known == incarnation => {}
            // The first of this process: what is stored counts.
            None => self.incarnation = Some(incarnation),
            Some(_) => {
                *self = Receiver {
                    incarnation: Some(incarnation),
                    repeated_bytes: self.repeated_bytes,
                    ..Receiver::default()
                };
            }
        }
        // What was acknowledged on the last connection may not have got there;
        // `resume` tells it all.
        self.to_acknowledge.clear();
    }

    /// An earlier process of this side made these durable: they are not to be
    /// sent again. For a log whose numbers are never used twice, and before the
    /// sender may use numbers beyond it.
    pub fn stored(&mut self, seqs: impl IntoIterator<Item = u64>) {
        for seq in seqs {
            self.durable.insert(seq);
        }
        self.forget_lowest();
    }

    /// What this side has, for the sender.
    pub fn resume(&self) -> Resume {
        Resume {
            durable: self.durable.newest(limits::MAX_RANGES),
            held: self
                .in_hand
                .iter()
                .copied()
                .collect::<RangeSet>()
                .newest(limits::MAX_RANGES),
        }
    }

    /// A batch of so many bytes arrived.
    ///
    /// # Errors
    /// When the sender goes beyond what is remembered of one.
    pub fn arrived(&mut self, seq: u64, bytes: usize) -> Result<Arrival, ReceiverError> {
        let durable = self.durable.contains(seq);
        if durable {
            self.to_acknowledge.insert(seq);
        }
        if durable || self.in_hand.contains(&seq) {
            self.repeated_bytes += bytes as u64;
            return Ok(Arrival::Duplicate);
        }
        if self.in_hand.len() >= limits::MAX_IN_HAND_BATCHES {
            return Err(ReceiverError::TooMany);
        }
        self.in_hand.insert(seq);
        Ok(Arrival::New)
    }

    /// The application made these durable. Numbers that it was not handed by
    /// this incarnation of the sender are ignored. True when there is
    /// something to acknowledge.
    pub fn durable(&mut self, seqs: &[u64]) -> bool {
        for &seq in seqs {
            if self.in_hand.remove(&seq) {
                self.durable.insert(seq);
                self.to_acknowledge.insert(seq);
            }
        }
        self.forget_lowest();
        !self.to_acknowledge.is_empty()
    }

    /// The lowest are forgotten first. One of them sent again would be handed
    /// over again: never is a batch called durable that is not.
    fn forget_lowest(&mut self) {
        while self.durable.ranges() > limits::MAX_REMEMBERED_RANGES {
            self.durable.take(1);
        }
    }

    /// Payload bytes of batches that arrived although they were here.
    pub fn repeated_bytes(&self) -> u64 {
        self.repeated_bytes
    }

    /// The application could not keep what it was handed: the sender has to
    /// send it again, on a new connection.
    pub fn give_back(&mut self) {
        self.in_hand.clear();
    }

    /// The next acknowledgement to send, as many ranges as fit one frame.
    pub fn next_acknowledgement(&mut self) -> Option<Ranges> {
        let ranges = self.to_acknowledge.take(limits::MAX_RANGES);
        (!ranges.is_empty()).then_some(ranges)
    }

    /// Batches with the application that are not durable.
    pub fn in_hand(&self) -> usize {
        self.in_hand.len()
    }
}
