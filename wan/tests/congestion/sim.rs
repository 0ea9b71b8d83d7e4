//! Senders, a shared link and receivers in virtual time, packet by packet.
//!
//! The link is the emulator's own [`Pipe`]. Senders behave as quinn does: packets are paced
//! at 1.25 windows a smoothed round trip with quinn's burst sizes, acknowledgements come
//! for every second packet or after 25 ms, loss is three packets of reordering or 9/8
//! round trips, and an acknowledgement that is lost is made good by the next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use farhaven_wan::emulate::{HEADER_BYTES, LinkShape, Pipe};

use super::flow::{Controller, Flow, Tally};

/// Payload bytes of a full packet, as quinn finds them on an Ethernet path.
pub(crate) const PACKET: u64 = 1452;
pub(crate) const MILLI: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;

#[derive(Clone, Copy)]
struct Packet {
    flow: usize,
    number: u64,
}

#[derive(Clone, Copy)]
struct Acknowledgement {
    flow: usize,
    upto: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Forward,
    Backward,
    Wake(usize),
    AckTimer(usize),
    LossTimer(usize),
    /// A busy host has got round to its receivers, to its senders.
    Receivers,
    Senders,
}

/// The simulation: one link, any number of flows.
pub(crate) struct Simulation {
    epoch: Instant,
    pub(crate) now: u64,
    forward: Pipe<Packet>,
    backward: Pipe<Acknowledgement>,
    flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    forward_next: u64,
    backward_next: u64,
    /// How late busy hosts look at what came: from, to.
    late: Option<(u64, u64)>,
    random: u64,
    receivers_due: bool,
    senders_due: bool,
}

impl Simulation {
    pub(crate) fn new(link: LinkShape, seed: u64) -> Self {
        Self {
            epoch: Instant::now(),
            now: 0,
            forward: Pipe::new(link, seed),
            backward: Pipe::new(link, seed + 1_000),
            flows: Vec::new(),
            events: BinaryHeap::new(),
            forward_next: u64::MAX,
            backward_next: u64::MAX,
            late: None,
            random: seed,
            receivers_due: false,
            senders_due: false,
        }
    }

    /// From now on both hosts have other work, too: what came is looked at, by each of
    /// them, only after a time between the two; all of it at once.
    pub(crate) fn be_busy(&mut self, from: u64, to: u64) {
        self.late = Some((from, to));
    }

    /// When a busy host gets round to what came now.
    fn lateness(&mut self) -> Option<u64> {
        let (from, to) = self.late?;
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695);
        Some(self.now + from + (self.random >> 33) % (to - from))
    }

    /// Virtual time as controllers want it.
    pub(crate) fn instant(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.now)
    }

    /// Adds a flow that sends from `start` on.
    pub(crate) fn add(
        &mut self,
        start: u64,
        make: impl FnOnce(Instant) -> Box<dyn Controller>,
    ) -> usize {
        let index = self.flows.len();
        let controller = make(self.epoch + Duration::from_nanos(start));
        self.flows.push(Flow::new(controller, start));
        self.at(start, Event::Wake(index));
        index
    }

    /// The flow's application offers only so many bits a second from now on.
    pub(crate) fn offer(&mut self, flow: usize, bits: Option<f64>) {
        self.flows[flow].offered = bits.map(|bits| (bits / 8.0, 0.0, self.now));
        self.at(self.now, Event::Wake(flow));
    }

    pub(crate) fn stop(&mut self, flow: usize) {
        self.flows[flow].active = false;
    }

    pub(crate) fn reshape(&mut self, link: LinkShape) {
        self.forward.reshape(self.now, link);
        self.backward.reshape(self.now, link);
        self.watch();
    }

    /// Cuts the link both ways or mends it.
    pub(crate) fn cut(&mut self, cut: bool) {
        self.forward.set_cut(self.now, cut);
        self.backward.set_cut(self.now, cut);
        self.forward_next = u64::MAX;
        self.backward_next = u64::MAX;
        self.watch();
    }

    pub(crate) fn tally(&self, flow: usize) -> Tally {
        self.flows[flow].tally
    }

    /// Runs until `end`, in nanoseconds from the beginning.
    pub(crate) fn run_until(&mut self, end: u64) {
        while let Some(Reverse((at, event))) = self.events.peek().copied() {
            if at > end {
                break;
            }
            self.events.pop();
            self.now = self.now.max(at);
            match event {
                Event::Forward if self.receivers_due => {}
                Event::Backward if self.senders_due => {}
                Event::Forward => match self.lateness() {
                    None => self.deliver(),
                    Some(due) => {
                        self.receivers_due = true;
                        self.at(due, Event::Receivers);
                    }
                },
                Event::Backward => match self.lateness() {
                    None => self.deliver_acks(),
                    Some(due) => {
                        self.senders_due = true;
                        self.at(due, Event::Senders);
                    }
                },
                Event::Receivers => {
                    self.receivers_due = false;
                    self.deliver();
                }
                Event::Senders => {
                    self.senders_due = false;
                    self.deliver_acks();
                }
                Event::Wake(flow) => self.send(flow),
                Event::AckTimer(flow) => {
                    if self.flows[flow].ack_due.is_some_and(|due| due <= self.now) {
                        self.acknowledge(flow);
                    }
                }
                Event::LossTimer(flow) => self.timeout(flow),
            }
            self.watch();
        }
        self.now = end;
    }

    fn at(&mut self, time: u64, event: Event) {
        self.events.push(Reverse((time, event)));
    }

    /// Sees to it that the pipes are looked at in time.
    fn watch(&mut self) {
        if let Some(next) = self.forward.next()
            && next != self.forward_next
        {
            self.forward_next = next;
            self.at(next, Event::Forward);
        }
        if let Some(next) = self.backward.next()
            && next != self.backward_next
        {
            self.backward_next = next;
            self.at(next, Event::Backward);
        }
    }

    /// Packets reach their receivers.
    fn deliver(&mut self) {
        self.forward_next = u64::MAX;
        while let Some(packet) = self.forward.take(self.now) {
            let flow = &mut self.flows[packet.flow];
            let gap = flow
                .received
                .last()
                .is_some_and(|last| packet.number != last + 1);
            flow.received.push(packet.number);
            let waiting = flow.received.len() - flow.acknowledged;
            if waiting >= 2 || gap {
                self.acknowledge(packet.flow);
            } else if flow.ack_due.is_none() {
                let due = self.now + 25 * MILLI;
                flow.ack_due = Some(due);
                self.at(due, Event::AckTimer(packet.flow));
            }
        }
    }

    fn acknowledge(&mut self, index: usize) {
        let flow = &mut self.flows[index];
        flow.acknowledged = flow.received.len();
        flow.ack_due = None;
        let upto = flow.acknowledged;
        let ack = Acknowledgement { flow: index, upto };
        self.backward.offer(self.now, 40 + HEADER_BYTES, ack);
    }

    fn deliver_acks(&mut self) {
        self.backward_next = u64::MAX;
        while let Some(ack) = self.backward.take(self.now) {
            self.on_ack(ack);
            self.send(ack.flow);
        }
    }

    fn on_ack(&mut self, ack: Acknowledgement) {
        let (now, epoch, instant) = (self.now, self.epoch, self.instant());
        let flow = &mut self.flows[ack.flow];
        if ack.upto <= flow.processed {
            return;
        }
        let numbers = flow.received[flow.processed..ack.upto].to_vec();
        flow.processed = ack.upto;
        let app_limited = flow.app_limited;
        let mut newest = None;
        for number in numbers {
            // One that was held to be lost may still arrive: it counts no more.
            let Some(sent) = flow.unacked.remove(&number) else {
                continue;
            };
            flow.in_flight -= PACKET;
            flow.tally.delivered_bytes += PACKET;
            flow.largest_acked = flow.largest_acked.max(Some(number));
            newest = newest.max(Some(sent));
            let sent = epoch + Duration::from_nanos(sent);
            flow.controller.on_ack(instant, sent, PACKET, app_limited);
        }
        if let Some(sent) = newest {
            let rtt = (now - sent) as f64 / 1e9;
            flow.tally.rtt_sum += rtt * 1e3;
            flow.tally.rtt_count += 1;
            flow.smoothed_rtt = match flow.smoothed_rtt {
                0.0 => rtt,
                smoothed => smoothed * 0.875 + rtt * 0.125,
            };
            flow.last_progress = now;
            flow.timeouts = 0;
            flow.controller.on_end_acks(instant);
        }
        self.detect_losses(ack.flow);
    }

    fn detect_losses(&mut self, index: usize) {
        let (epoch, instant) = (self.epoch, self.instant());
        let flow = &mut self.flows[index];
        let Some(largest) = flow.largest_acked else {
            return;
        };
        let patience = (flow.smoothed_rtt * 1.125 * 1e9) as u64;
        let lost: Vec<(u64, u64)> = flow
            .unacked
            .range(..largest)
            .filter(|(number, sent)| **number + 3 <= largest || self.now - **sent > patience)
            .map(|(number, sent)| (*number, *sent))
            .collect();
        let Some((_, last_sent)) = lost.last() else {
            return;
        };
        let last_sent = epoch + Duration::from_nanos(*last_sent);
        for (number, _) in &lost {
            flow.unacked.remove(number);
            flow.in_flight -= PACKET;
        }
        let bytes = PACKET * lost.len() as u64;
        flow.controller.on_lost(instant, last_sent, bytes, false);
    }

    /// Nothing came for long: everything in flight is taken for lost.
    fn timeout(&mut self, index: usize) {
        let (epoch, instant) = (self.epoch, self.instant());
        let flow = &mut self.flows[index];
        if flow.unacked.is_empty() {
            return;
        }
        let patience = ((flow.smoothed_rtt * 3.0 + 1.0) * 1e9) as u64 * (1 << flow.timeouts.min(6));
        let due = flow.last_progress + patience;
        if due > self.now {
            self.at(due, Event::LossTimer(index));
            return;
        }
        flow.timeouts += 1;
        flow.last_progress = self.now;
        let bytes = flow.in_flight;
        let last = flow.unacked.values().last().copied().unwrap_or(0);
        flow.unacked.clear();
        flow.in_flight = 0;
        let last = epoch + Duration::from_nanos(last);
        let persistent = flow.timeouts >= 2;
        flow.controller.on_lost(instant, last, bytes, persistent);
        self.at(self.now, Event::Wake(index));
    }

    fn send(&mut self, index: usize) {
        let now = self.now;
        loop {
            let flow = &mut self.flows[index];
            if !flow.active || flow.start > now {
                return;
            }
            if flow.in_flight + PACKET >= flow.controller.window() {
                flow.app_limited = false;
                return;
            }
            if let Some((rate, credit, at)) = &mut flow.offered {
                *credit = (*credit + *rate * (now - *at) as f64 / 1e9).min(64.0 * PACKET as f64);
                *at = now;
                if *credit < PACKET as f64 {
                    flow.app_limited = true;
                    let wait = (PACKET as f64 - *credit) / *rate * 1e9;
                    let wake = (now + wait as u64 + MILLI).div_ceil(MILLI) * MILLI;
                    if flow.wake != wake {
                        flow.wake = wake;
                        self.at(wake, Event::Wake(index));
                    }
                    return;
                }
            }
            if flow.controller.paced() && flow.smoothed_rtt > 0.0 {
                let quinn = || 1.25 * flow.controller.window() as f64 / flow.smoothed_rtt;
                let rate = flow.controller.pacing().unwrap_or_else(quinn);
                let burst =
                    (rate * 0.002 / 1.25).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
                let gained = rate * (now - flow.refilled) as f64 / 1e9;
                flow.tokens = (flow.tokens + gained).min(burst);
                flow.refilled = now;
                if flow.tokens < PACKET as f64 {
                    // quinn waits for a whole burst, on a timer of a millisecond.
                    let wait = ((burst - flow.tokens) / rate * 1e9) as u64;
                    flow.app_limited = false;
                    let wake = (now + wait).div_ceil(MILLI) * MILLI;
                    if flow.wake != wake {
                        flow.wake = wake;
                        self.at(wake, Event::Wake(index));
                    }
                    return;
                }
                flow.tokens -= PACKET as f64;
            }
            if let Some((_, credit, _)) = &mut flow.offered {
                *credit -= PACKET as f64;
            }
            let number = flow.next_number;
            flow.next_number += 1;
            if flow.unacked.is_empty() {
                flow.last_progress = now;
                self.at(now + 100 * MILLI, Event::LossTimer(index));
            }
            let flow = &mut self.flows[index];
            flow.unacked.insert(number, now);
            flow.in_flight += PACKET;
            flow.tally.sent += 1;
            let packet = Packet {
                flow: index,
                number,
            };
            if !self.forward.offer(now, PACKET + HEADER_BYTES, packet) {
                self.flows[index].tally.dropped += 1;
            }
        }
    }
}
