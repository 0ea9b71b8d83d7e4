//! A sender and a receiver in virtual time, over a link that delays, reorders
//! and is cut, with applications that are slow to make things durable, lose
//! what they hold and restart.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::frame::{Ranges, Resume};

mod cuts;
mod fills;

const WINDOW: u64 = 4_000;

#[derive(Debug, Clone)]
enum Step {
    Submit(usize),
    Send,
    Deliver(prop::sample::Index),
    Durable(usize),
    Acknowledge,
    DeliverAcknowledgement(prop::sample::Index),
    Cut,
    Reconnect,
    ReceiverRestarts,
    ReceiverGivesBack,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..1500).prop_map(Step::Submit),
        6 => Just(Step::Send),
        6 => any::<prop::sample::Index>().prop_map(Step::Deliver),
        4 => (1usize..4).prop_map(Step::Durable),
        3 => Just(Step::Acknowledge),
        3 => any::<prop::sample::Index>().prop_map(Step::DeliverAcknowledgement),
        1 => Just(Step::Cut),
        3 => Just(Step::Reconnect),
        1 => Just(Step::ReceiverRestarts),
        1 => Just(Step::ReceiverGivesBack),
    ]
}

struct Pair {
    sender: Sender,
    receiver: Receiver,
    connected: bool,
    next_seq: u64,
    /// On their way, in any order.
    batches: Vec<Outgoing>,
    acknowledgements: Vec<Ranges>,
    /// The receiving application: handed over since it (re)started, and on disk for good.
    handed: BTreeSet<u64>,
    holding: Vec<u64>,
    disk: BTreeMap<u64, Bytes>,
    submitted: BTreeMap<u64, Bytes>,
    /// What the sender was told is durable.
    told: BTreeSet<u64>,
    given_back: bool,
}

impl Pair {
    fn new() -> Pair {
        let mut pair = Pair {
            sender: Sender::new(WINDOW),
            receiver: Receiver::default(),
            connected: false,
            next_seq: 0,
            batches: Vec::new(),
            acknowledgements: Vec::new(),
            handed: BTreeSet::new(),
            holding: Vec::new(),
            disk: BTreeMap::new(),
            submitted: BTreeMap::new(),
            told: BTreeSet::new(),
            given_back: false,
        };
        pair.connect();
        pair
    }

    fn connect(&mut self) {
        if self.connected {
            return;
        }
        self.receiver.begin(7);
        let resume = self.receiver.resume();
        self.sender.resume(&resume).expect("the receiver is honest");
        self.note_told(&resume.durable);
        self.connected = true;
    }

    fn cut(&mut self) {
        self.connected = false;
        self.batches.clear();
        self.acknowledgements.clear();
        self.sender.disconnected();
    }

    fn note_told(&mut self, ranges: &Ranges) {
        for &(first, last) in ranges {
            self.told.extend(first..=last);
        }
        for seq in &self.told {
            assert!(
                self.disk.contains_key(seq),
                "{seq} acknowledged, not durable"
            );
        }
    }

    fn submit(&mut self, length: usize) -> bool {
        let bytes = Bytes::from(vec![self.next_seq as u8; length]);
        match self.sender.submit(self.next_seq, bytes.clone()) {
            Ok(()) => {
                self.submitted.insert(self.next_seq, bytes);
                self.next_seq += 1;
                true
            }
            Err(SubmitError::Full) => {
                let waiting = self.sender.acknowledgements();
                assert!(waiting.unacknowledged_bytes + length as u64 > WINDOW);
                false
            }
            // As much may wait as the window has; an empty batch has room in a full one.
            Err(SubmitError::Queued) => {
                let waiting = self.sender.acknowledgements();
                assert!(waiting.unacknowledged_bytes >= WINDOW && length == 0);
                false
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn send(&mut self) -> bool {
        if !self.connected {
            return false;
        }
        let Some(batch) = self.sender.next() else {
            return false;
        };
        assert!(
            !self.told.contains(&batch.seq),
            "{} sent although acknowledged",
            batch.seq
        );
        assert!(
            self.batches.iter().all(|other| other.seq != batch.seq),
            "{} twice on one connection",
            batch.seq
        );
        self.batches.push(batch);
        true
    }

    fn deliver(&mut self, at: usize) {
        let batch = self.batches.swap_remove(at);
        match self
            .receiver
            .arrived(batch.seq, batch.bytes.len())
            .expect("the sender is honest")
        {
            Arrival::New => {
                assert!(
                    self.handed.insert(batch.seq),
                    "{} handed over twice",
                    batch.seq
                );
                assert_eq!(batch.bytes, self.submitted[&batch.seq]);
                self.holding.push(batch.seq);
            }
            Arrival::Duplicate => assert!(self.handed.contains(&batch.seq)),
        }
    }

    fn durable(&mut self, count: usize) {
        let count = count.min(self.holding.len());
        let done: Vec<u64> = self.holding.drain(..count).collect();
        for seq in &done {
            self.disk.insert(*seq, self.submitted[seq].clone());
        }
        self.receiver.durable(&done);
    }

    fn acknowledge(&mut self) {
        if self.connected
            && let Some(ranges) = self.receiver.next_acknowledgement()
        {
            self.acknowledgements.push(ranges);
        }
    }

    fn deliver_acknowledgement(&mut self, at: usize) {
        let ranges = self.acknowledgements.swap_remove(at);
        self.sender
            .acknowledged(&ranges)
            .expect("the receiver is honest");
        self.note_told(&ranges);
    }

    fn perform(&mut self, step: &Step) {
        match step {
            Step::Submit(length) => {
                self.submit(*length);
            }
            Step::Send => {
                self.send();
            }
            Step::Deliver(at) if !self.batches.is_empty() => {
                self.deliver(at.index(self.batches.len()))
            }
            Step::Durable(count) => self.durable(*count),
            Step::Acknowledge => self.acknowledge(),
            Step::DeliverAcknowledgement(at) if !self.acknowledgements.is_empty() => {
                self.deliver_acknowledgement(at.index(self.acknowledgements.len()));
            }
            Step::Deliver(_) | Step::DeliverAcknowledgement(_) => {}
            Step::Cut => self.cut(),
            Step::Reconnect => self.connect(),
            Step::ReceiverRestarts => {
                self.cut();
                self.receiver = Receiver::default();
                self.holding.clear();
                self.handed.clear();
            }
            Step::ReceiverGivesBack => {
                self.cut();
                for seq in self.holding.drain(..) {
                    self.handed.remove(&seq);
                }
                self.receiver.give_back();
                self.given_back = true;
            }
        }
        let waiting = self.sender.acknowledgements();
        assert!(waiting.unacknowledged_bytes <= WINDOW);
        let real: u64 = self
            .submitted
            .iter()
            .filter(|(seq, _)| !self.told.contains(seq))
            .map(|(_, bytes)| bytes.len() as u64)
            .sum();
        assert_eq!(waiting.unacknowledged_bytes, real);
    }

    /// The link is mended and everybody works: all of it must arrive.
    fn settle(&mut self) {
        self.connect();
        for _ in 0..10 {
            while self.send() {}
            while !self.batches.is_empty() {
                self.deliver(0);
            }
            self.durable(usize::MAX);
            self.acknowledge();
            while !self.acknowledgements.is_empty() {
                self.deliver_acknowledgement(0);
            }
        }
        assert_eq!(self.disk, self.submitted);
        assert_eq!(self.sender.acknowledgements().unacknowledged_batches, 0);
        assert_eq!(self.sender.acknowledgements().unacknowledged_bytes, 0);
        assert!(self.sender.acknowledgements().reached(u64::MAX));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn any_schedule_ends_with_everything_there_once(steps in prop::collection::vec(step(), 0..120)) {
        let mut pair = Pair::new();
        for step in &steps {
            pair.perform(step);
        }
        pair.settle();
        let sent = pair.sender.sent_bytes() - pair.sender.requeued_bytes();
        prop_assert_eq!(sent, pair.submitted.values().map(|bytes| bytes.len() as u64).sum::<u64>());
    }
}

#[test]
fn a_reconnect_sends_only_what_did_not_arrive() {
    let mut pair = Pair::new();
    for _ in 0..4 {
        assert!(pair.submit(100));
        assert!(pair.send());
    }
    pair.deliver(0); // 0 arrives and becomes durable, its acknowledgement is lost
    pair.durable(1);
    pair.acknowledge();
    pair.deliver(1); // one more arrives, and stays with the application
    pair.cut();
    pair.connect();
    let mut again = Vec::new();
    while let Some(batch) = pair.sender.next() {
        again.push(batch.seq);
    }
    assert_eq!(again.len(), 2, "{again:?}");
    assert_eq!(pair.sender.requeued_bytes(), 200);
}

#[test]
fn the_window_takes_one_batch_of_any_size() {
    let mut sender = Sender::new(10);
    sender
        .submit(0, Bytes::from(vec![0; 100]))
        .expect("the window is empty");
    assert_eq!(sender.submit(1, Bytes::new()), Err(SubmitError::Full));
}

#[test]
fn a_forgotten_number_is_not_taken_again_nor_acknowledged() {
    let mut sender = Sender::new(1000);
    sender.submit(5, Bytes::from_static(b"old")).expect("room");
    sender.next();
    sender.reset();
    assert_eq!(
        sender.submit(5, Bytes::from_static(b"new")),
        Err(SubmitError::Reused(5))
    );
    assert_eq!(sender.acknowledged(&[(0, 9)]), Ok(0));
    assert_eq!(sender.acknowledgements().resets, 1);
}

#[test]
fn a_peer_cannot_acknowledge_what_never_left() {
    let mut sender = Sender::new(1000);
    sender.submit(3, Bytes::from_static(b"x")).expect("room");
    assert_eq!(
        sender.acknowledged(&[(0, u64::MAX)]),
        Err(SenderError::NeverSent(3))
    );
    let lie = Resume {
        durable: vec![],
        held: vec![(3, 3)],
    };
    assert_eq!(sender.resume(&lie), Err(SenderError::NeverSent(3)));
    assert_eq!(sender.acknowledgements().unacknowledged_batches, 1);
}

#[test]
fn a_receiver_bounds_what_it_remembers() {
    let mut receiver = Receiver::default();
    receiver.begin(1);
    let mut accepted = 0u64;
    let refused = loop {
        match receiver.arrived(accepted * 2, 9) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, ReceiverError::TooMany);
    let seqs: Vec<u64> = (0..accepted).map(|seq| seq * 2).collect();
    receiver.durable(&seqs);
    // The highest numbers are remembered, however many gaps there are.
    let many = crate::limits::MAX_REMEMBERED_RANGES as u64 + 10;
    for seq in (accepted..many).map(|number| number * 2) {
        assert_eq!(receiver.arrived(seq, 9), Ok(Arrival::New));
        receiver.durable(&[seq]);
    }
    assert_eq!(receiver.arrived(many * 2 - 2, 9), Ok(Arrival::Duplicate));
    assert_eq!(receiver.arrived(0, 9), Ok(Arrival::New));
    // A gap was never received, and is never called durable.
    assert_eq!(receiver.arrived(many * 2 - 3, 9), Ok(Arrival::New));
    assert!(receiver.resume().durable.len() <= crate::limits::MAX_RANGES);
}

#[test]
fn another_incarnation_starts_anew() {
    let mut receiver = Receiver::default();
    receiver.begin(1);
    assert_eq!(receiver.arrived(0, 9), Ok(Arrival::New));
    receiver.begin(2);
    assert!(
        !receiver.durable(&[0]),
        "handed over by another incarnation"
    );
    assert_eq!(receiver.arrived(0, 9), Ok(Arrival::New));
}

#[test]
fn only_what_had_wholly_arrived_counts_as_sent_again() {
    let batch = || Bytes::from_static(&[7; 100]);
    let mut sender = Sender::new(10_000);
    for seq in 0..10 {
        sender.submit(seq, batch()).expect("room");
    }
    sender.arrived(&[0, 1]);
    assert_eq!(sender.queued_bytes(), 1000, "what never left cannot arrive");
    while sender.next().is_some() {}
    sender.arrived(&[0, 1, 2, 3, 4]);
    assert_eq!(sender.acknowledged(&[(0, 2)]), Ok(3));
    assert_eq!(sender.queued_bytes(), 500);

    // Of the two that wait at the peer one is told as held, one is lost there.
    sender.disconnected();
    assert_eq!(sender.queued_bytes(), 700);
    let resume = Resume {
        durable: vec![(0, 2)],
        held: vec![(3, 3)],
    };
    sender.resume(&resume).expect("it was sent");
    assert_eq!(sender.queued_bytes(), 600);
    let mut again = 0;
    while sender.next().is_some() {
        again += 1;
    }
    assert_eq!(
        (again, sender.requeued_bytes(), sender.resent_bytes()),
        (6, 600, 100)
    );

    // The process that held it ends: that one was there, and comes again.
    sender.disconnected();
    sender.resume(&Resume::default()).expect("nothing new");
    while sender.next().is_some() {}
    assert_eq!(sender.resent_bytes(), 100 + 200);
}

#[test]
fn a_batch_is_taken_only_when_it_leaves_soon() {
    let batch = || Bytes::from_static(&[7; 100]);
    let mut sender = Sender::new(10_000);
    sender.queue_up_to(250);
    for seq in 0..3 {
        sender.submit(seq, batch()).expect("below the bound");
    }
    assert_eq!(sender.submit(3, batch()), Err(SubmitError::Queued));
    while sender.next().is_some() {}
    assert_eq!(sender.submit(3, batch()), Err(SubmitError::Queued));
    // It waits for the peer's disk now, not for the link.
    sender.arrived(&[0]);
    sender.submit(3, batch()).expect("one has arrived");
    assert_eq!(sender.acknowledgements().unacknowledged_bytes, 400);
    // However narrow the path, there is always one batch for it.
    sender.queue_up_to(0);
    assert_eq!(sender.submit(4, batch()), Err(SubmitError::Queued));
    sender.next();
    sender.arrived(&[1, 2, 3]);
    sender.submit(4, batch()).expect("nothing is on its way");
}
