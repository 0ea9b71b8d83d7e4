//! Messages that may come twice: each on the control stream, where none is missing and all
//! are in order, and short ones as a copy besides, which may be lost, late or early.
//!
//! A lost packet of the stream is sent again after a round trip or more, and holds up every
//! message behind it. With the copy a message comes at once unless both were lost.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::limits;

/// Puts the messages of one connection in order, each of them once.
#[derive(Debug, Default)]
pub struct Inbox {
    /// Number of the next message to hand over.
    next: u64,
    /// Messages that the stream brought.
    streamed: u64,
    /// Copies of messages whose predecessors are missing.
    early: BTreeMap<u64, Bytes>,
    by_copy: u64,
}

impl Inbox {
    /// The stream brought its next message. Returns what may be handed over now.
    pub fn streamed(&mut self, bytes: Bytes) -> Vec<Bytes> {
        let number = self.streamed;
        self.streamed += 1;
        if number < self.next {
            return Vec::new();
        }
        // What the stream says counts, should a copy have said otherwise.
        self.early.remove(&number);
        self.next += 1;
        let mut ready = vec![bytes];
        self.hand_over_early(&mut ready);
        ready
    }

    /// A copy of message `number` came. Returns what may be handed over now. Copies too far
    /// ahead of what is missing are not kept: the stream brings them.
    pub fn copied(&mut self, number: u64, bytes: Bytes) -> Vec<Bytes> {
        let ahead = number.checked_sub(self.next);
        if ahead.is_none_or(|ahead| ahead >= limits::MAX_EARLY_MESSAGES) {
            return Vec::new();
        }
        self.early.entry(number).or_insert(bytes);
        let mut ready = Vec::new();
        self.hand_over_early(&mut ready);
        ready
    }

    /// Messages that a copy brought before the stream did.
    pub fn by_copy(&self) -> u64 {
        self.by_copy
    }

    fn hand_over_early(&mut self, ready: &mut Vec<Bytes>) {
        while let Some(bytes) = self.early.remove(&self.next) {
            self.next += 1;
            self.by_copy += 1;
            ready.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(number: u64) -> Bytes {
        Bytes::copy_from_slice(&number.to_le_bytes())
    }

    #[test]
    fn a_copy_fills_the_place_of_what_the_stream_owes() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.streamed(message(0)), [message(0)]);
        assert!(inbox.copied(0, message(0)).is_empty());
        // 1 was lost on the stream, 2 overtook it as a copy.
        assert!(inbox.copied(2, message(2)).is_empty());
        assert_eq!(inbox.copied(1, message(1)), [message(1), message(2)]);
        for number in 1..3 {
            assert!(inbox.streamed(message(number)).is_empty());
        }
        assert_eq!(inbox.streamed(message(3)), [message(3)]);
        assert_eq!(inbox.by_copy(), 2);
    }

    proptest! {
        #[test]
        fn whatever_is_lost_or_claimed_each_message_comes_once_and_in_order(
            copies in proptest::collection::vec(
                (0..60u64, prop_oneof![9 => 0..60u64, 1 => any::<u64>()]),
                0..200,
            ),
        ) {
            let mut inbox = Inbox::default();
            let mut got = Vec::new();
            for streamed in 0..60 {
                for (_, number) in copies.iter().filter(|(at, _)| *at == streamed) {
                    got.extend(inbox.copied(*number, message(*number)));
                    prop_assert!(inbox.early.len() as u64 <= limits::MAX_EARLY_MESSAGES);
                }
                got.extend(inbox.streamed(message(streamed)));
            }
            let all: Vec<Bytes> = (0..got.len() as u64).map(message).collect();
            prop_assert!(got.len() >= 60);
            prop_assert_eq!(got, all);
        }
    }
}
