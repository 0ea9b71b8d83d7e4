//! A transfer cut at every byte of it: what the peer had is not sent again.
//!
//! The link carries one byte in each tick, batches interleaved over a few
//! streams as QUIC would; what has arrived becomes durable a while later, and
//! its acknowledgement takes a while more. One tick is one byte, so a cut at
//! every tick is a cut at every byte.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use proptest::prelude::*;

use super::super::*;
use crate::frame::Ranges;

const STREAMS: usize = 3;
const QUEUE: u64 = 600;

/// What happens at the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Link,
    /// The receiver's process ends: its disk is all that is left of it.
    Receiver,
}

struct Way {
    sender: Sender,
    receiver: Receiver,
    incarnation: u64,
    sizes: Vec<usize>,
    next: usize,
    /// On streams: the batch and how many of its bytes have arrived.
    streams: Vec<(Outgoing, usize)>,
    turn: usize,
    /// Arrived, and durable at the tick.
    holding: VecDeque<(u64, u64)>,
    disk: BTreeSet<u64>,
    acknowledgements: VecDeque<(u64, Ranges)>,
    /// Of batches that were on the disk: bytes that crossed the link again.
    repeated: u64,
    crossed: BTreeMap<u64, u64>,
    now: u64,
    sync: u64,
    delay: u64,
}

impl Way {
    fn new(sizes: &[usize], sync: u64, delay: u64) -> Way {
        let mut way = Way {
            sender: Sender::new(100_000),
            receiver: Receiver::default(),
            incarnation: 1,
            sizes: sizes.to_vec(),
            next: 0,
            streams: Vec::new(),
            turn: 0,
            holding: VecDeque::new(),
            disk: BTreeSet::new(),
            acknowledgements: VecDeque::new(),
            repeated: 0,
            crossed: BTreeMap::new(),
            now: 0,
            sync,
            delay,
        };
        way.sender.queue_up_to(QUEUE);
        way.connect();
        way
    }

    fn connect(&mut self) {
        self.receiver.begin(self.incarnation);
        let resume = self.receiver.resume();
        self.sender.resume(&resume).expect("honest");
    }

    fn cut(&mut self, what: Cut) {
        self.streams.clear();
        self.acknowledgements.clear();
        self.sender.disconnected();
        if what == Cut::Receiver {
            self.receiver = Receiver::default();
            self.holding.clear();
            self.receiver.stored(self.disk.iter().copied());
        }
        self.connect();
    }

    /// One byte over the link, and everything that time brings.
    fn tick(&mut self) {
        self.now += 1;
        while self.next < self.sizes.len() {
            let seq = self.next as u64;
            let bytes = Bytes::from(vec![seq as u8; self.sizes[self.next]]);
            match self.sender.submit(seq, bytes) {
                Ok(()) => self.next += 1,
                Err(SubmitError::Queued | SubmitError::Full) => break,
                Err(other) => panic!("{other}"),
            }
        }
        while self.streams.len() < STREAMS
            && let Some(batch) = self.sender.next()
        {
            self.streams.push((batch, 0));
        }
        if !self.streams.is_empty() {
            self.turn = (self.turn + 1) % self.streams.len();
            let (batch, arrived) = &mut self.streams[self.turn];
            *arrived += 1;
            *self.crossed.entry(batch.seq).or_default() += 1;
            if self.disk.contains(&batch.seq) {
                self.repeated += 1;
            }
            if *arrived >= batch.bytes.len() {
                let (batch, _) = self.streams.swap_remove(self.turn);
                let arrival = self.receiver.arrived(batch.seq, batch.bytes.len());
                if arrival.expect("honest") == Arrival::New {
                    self.holding.push_back((self.now + self.sync, batch.seq));
                }
                self.sender.arrived(&[batch.seq]);
            }
        }
        while self.holding.front().is_some_and(|(at, _)| *at <= self.now) {
            let (_, seq) = self.holding.pop_front().expect("looked at");
            self.disk.insert(seq);
            self.receiver.durable(&[seq]);
        }
        while let Some(ranges) = self.receiver.next_acknowledgement() {
            let at = self.now + self.delay;
            self.acknowledgements.push_back((at, ranges));
        }
        while self
            .acknowledgements
            .front()
            .is_some_and(|(at, _)| *at <= self.now)
        {
            let (_, ranges) = self.acknowledgements.pop_front().expect("looked at");
            self.sender.acknowledged(&ranges).expect("honest");
        }
    }

    fn ended(&self) -> bool {
        self.next == self.sizes.len() && self.sender.acknowledgements().unacknowledged_batches == 0
    }

    fn end(&mut self) {
        let most = self.now + 100_000;
        while !self.ended() {
            self.tick();
            assert!(self.now < most, "it must come to its end");
        }
        assert_eq!(self.disk.len(), self.sizes.len());
    }

    fn total(&self) -> u64 {
        self.sizes.iter().map(|size| *size as u64).sum()
    }
}

fn check(way: &Way, what: &str) {
    // At most 1 % is asked for; of what the peer has nothing is sent again.
    assert_eq!(way.repeated, 0, "{what}");
    assert_eq!(way.receiver.repeated_bytes(), 0, "{what}");
}

#[test]
fn a_link_cut_at_any_byte_repeats_nothing_that_arrived() {
    let sizes: Vec<usize> = (0..60).map(|i| 1 + (i * 97) % 300).collect();
    let mut whole = Way::new(&sizes, 40, 70);
    whole.end();
    for at in 0..whole.now {
        let mut way = Way::new(&sizes, 40, 70);
        while way.now < at {
            way.tick();
        }
        let half: u64 = way.streams.iter().map(|(_, arrived)| *arrived as u64).sum();
        way.cut(Cut::Link);
        way.end();
        check(&way, &format!("cut at {at}"));
        assert_eq!(way.sender.resent_bytes(), 0, "cut at {at}");
        // What is lost is what had arrived of batches that were not whole.
        let crossed: u64 = way.crossed.values().sum();
        assert_eq!(crossed, way.total() + half, "cut at {at}");
        assert!(half <= QUEUE + 300, "cut at {at}");
    }
}

#[test]
fn a_receiver_killed_at_any_byte_gets_nothing_again_that_it_stored() {
    let sizes: Vec<usize> = (0..40).map(|i| 1 + (i * 131) % 250).collect();
    let mut whole = Way::new(&sizes, 60, 90);
    whole.end();
    for at in 0..whole.now {
        let mut way = Way::new(&sizes, 60, 90);
        while way.now < at {
            way.tick();
        }
        let held: u64 = way
            .holding
            .iter()
            .map(|(_, seq)| sizes[*seq as usize] as u64)
            .sum();
        way.cut(Cut::Receiver);
        way.end();
        check(&way, &format!("killed at {at}"));
        // It counts exactly what its memory held.
        assert_eq!(way.sender.resent_bytes(), held, "killed at {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn any_number_of_cuts_repeats_nothing_that_is_stored(
        sizes in prop::collection::vec(0usize..300, 1..50),
        cuts in prop::collection::vec((1u64..800, prop_oneof![4 => Just(Cut::Link), 1 => Just(Cut::Receiver)]), 0..12),
        sync in 0u64..200,
        delay in 0u64..200,
    ) {
        let mut way = Way::new(&sizes, sync, delay);
        for (ticks, what) in cuts {
            for _ in 0..ticks {
                way.tick();
            }
            way.cut(what);
        }
        way.end();
        check(&way, "cuts");
    }
}

#[test]
fn what_another_sender_sent_is_not_taken_for_this_ones() {
    let mut receiver = Receiver::default();
    receiver.stored([1, 2, 3]);
    receiver.begin(7);
    assert_eq!(receiver.resume().durable, [(1, 3)]);
    assert_eq!(receiver.arrived(2, 10), Ok(Arrival::Duplicate));
    assert_eq!(receiver.next_acknowledgement(), Some(vec![(2, 2)]));
    receiver.begin(8);
    assert_eq!(receiver.resume().durable, []);
    assert_eq!(receiver.arrived(2, 10), Ok(Arrival::New));
    assert_eq!(receiver.repeated_bytes(), 10);
}
