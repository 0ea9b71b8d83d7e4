//! One direction of a link, without sockets or a clock: what goes in, when it comes out.
//!
//! A packet waits in a drop-tail queue, is serialised at the link's rate, may be lost at
//! random (it has then used the link all the same), and travels for the propagation delay.
//! The emulator drives it with real packets, the congestion simulator with virtual ones.

use std::collections::VecDeque;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::shape::LinkShape;

/// Bytes on their way beyond the queue; more is dropped, so that a shape of very high rate
/// and delay cannot exhaust memory.
const FLIGHT_LIMIT: u64 = 256 << 20;

/// What happened to the packets of one direction so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PipeCounters {
    /// Packets that came out at the far end, or still will.
    pub packets: u64,
    /// Their bytes on the link, IP and UDP headers included.
    pub bytes: u64,
    /// Packets lost at random on the link.
    pub lost: u64,
    /// Packets dropped because the queue before the link was full.
    pub overflowed: u64,
    /// Packets dropped because the link was cut.
    pub cut: u64,
}

struct Waiting<T> {
    arrived: u64,
    bytes: u64,
    item: T,
}

struct Flying<T> {
    due: u64,
    bytes: u64,
    item: T,
}

/// One direction of a link. Times are nanoseconds on any clock that never goes back.
pub struct Pipe<T> {
    shape: LinkShape,
    random: StdRng,
    cut: bool,
    /// When the link has serialised the last packet it took from the queue.
    busy_until: u64,
    queue: VecDeque<Waiting<T>>,
    queue_bytes: u64,
    flight: VecDeque<Flying<T>>,
    flight_bytes: u64,
    last_due: u64,
    counters: PipeCounters,
}

impl<T> Pipe<T> {
    /// A pipe of the given shape; `seed` decides its losses and jitter.
    pub fn new(shape: LinkShape, seed: u64) -> Self {
        Self {
            shape,
            random: StdRng::seed_from_u64(seed),
            cut: false,
            busy_until: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            flight: VecDeque::new(),
            flight_bytes: 0,
            last_due: 0,
            counters: PipeCounters::default(),
        }
    }

    /// A packet of `bytes` (headers included) reaches the queue. False: it was dropped there.
    pub fn offer(&mut self, now: u64, bytes: u64, item: T) -> bool {
        self.advance(now);
        if self.cut {
            self.counters.cut += 1;
            return false;
        }
        if self.queue_bytes + bytes > self.shape.queue_bytes()
            || self.flight_bytes + bytes > FLIGHT_LIMIT
        {
            self.counters.overflowed += 1;
            return false;
        }
        self.queue_bytes += bytes;
        self.queue.push_back(Waiting {
            arrived: now,
            bytes,
            item,
        });
        self.advance(now);
        true
    }

    /// The next packet that has come out by `now`.
    pub fn take(&mut self, now: u64) -> Option<T> {
        self.advance(now);
        if self.flight.front()?.due > now {
            return None;
        }
        let packet = self.flight.pop_front()?;
        self.flight_bytes -= packet.bytes;
        Some(packet.item)
    }

    /// When to look again; `None` while nothing is under way. Never later than the time at
    /// which the next packet comes out.
    pub fn next(&self) -> Option<u64> {
        match self.flight.front() {
            Some(packet) => Some(packet.due),
            // The head of the queue is still being serialised, and may be lost after that.
            None if !self.queue.is_empty() => Some(self.busy_until),
            None => None,
        }
    }

    /// Changes the shape from now on; what is on its way keeps its old times.
    pub fn reshape(&mut self, now: u64, shape: LinkShape) {
        self.advance(now);
        self.shape = shape;
    }

    /// Cuts or mends the link. A cut loses what is under way.
    pub fn set_cut(&mut self, now: u64, cut: bool) {
        self.advance(now);
        self.cut = cut;
        if cut {
            let gone = (self.queue.len() + self.flight.len()) as u64;
            self.counters.cut += gone;
            for packet in &self.flight {
                self.counters.packets -= 1;
                self.counters.bytes -= packet.bytes;
            }
            self.queue.clear();
            self.queue_bytes = 0;
            self.flight.clear();
            self.flight_bytes = 0;
        }
    }

    /// The shape now in force.
    pub fn shape(&self) -> LinkShape {
        self.shape
    }

    /// What happened so far.
    pub fn counters(&self) -> PipeCounters {
        self.counters
    }

    /// Bytes that wait in the queue, as of the last call that told the time.
    pub fn queued_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Serialises what the link had time for. A packet leaves the queue when its first bit
    /// is sent; its successors wait for its last.
    fn advance(&mut self, now: u64) {
        while self.busy_until <= now {
            let Some(packet) = self.queue.pop_front() else {
                return;
            };
            self.queue_bytes -= packet.bytes;
            let start = self.busy_until.max(packet.arrived);
            let serialised = packet.bytes.saturating_mul(8_000_000_000) / self.shape.rate.max(1);
            self.busy_until = start.saturating_add(serialised);
            if self.random.random_range(0..1_000_000) < self.shape.loss_ppm {
                self.counters.lost += 1;
                continue;
            }
            let mut due = self.busy_until + self.shape.rtt.as_nanos() as u64 / 2;
            let jitter = self.shape.jitter.as_nanos() as u64;
            if jitter > 0 {
                due += self.random.random_range(0..=jitter);
            }
            // Late packets hold up those behind them, so nothing overtakes.
            due = due.max(self.last_due);
            self.last_due = due;
            self.counters.packets += 1;
            self.counters.bytes += packet.bytes;
            self.flight_bytes += packet.bytes;
            self.flight.push_back(Flying {
                due,
                bytes: packet.bytes,
                item: packet.item,
            });
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const MILLI: u64 = 1_000_000;

    fn shape(text: &str) -> LinkShape {
        text.parse().unwrap()
    }

    /// Drains the pipe in its own time; when and what came out.
    fn drain(pipe: &mut Pipe<u32>) -> Vec<(u64, u32)> {
        let mut out = Vec::new();
        while let Some(at) = pipe.next() {
            while let Some(item) = pipe.take(at) {
                out.push((at, item));
            }
        }
        out
    }

    #[test]
    fn a_packet_takes_its_serialisation_and_half_the_round_trip() {
        let mut pipe = Pipe::new(shape("10mbit,80ms"), 1);
        assert!(pipe.offer(0, 1250, 0));
        assert!(pipe.offer(0, 1250, 1));
        assert_eq!(drain(&mut pipe), [(41 * MILLI, 0), (42 * MILLI, 1)]);
    }

    #[test]
    fn the_queue_drops_its_tail_and_counts() {
        let mut pipe = Pipe::new(shape("10mbit,80ms,queue=5000b"), 1);
        let taken = (0..10).filter(|i| pipe.offer(0, 1250, *i)).count();
        // One on the link, four in the queue.
        assert_eq!(taken, 5);
        assert_eq!(pipe.counters().overflowed, 5);
        assert_eq!(drain(&mut pipe).len(), 5);
        assert_eq!(pipe.counters().packets, 5);
    }

    #[test]
    fn random_loss_is_as_asked_and_seeded() {
        let run = |seed| {
            let mut pipe = Pipe::new(shape("1gbit,10ms,2%,queue=1000mib"), seed);
            for i in 0..50_000 {
                pipe.offer(0, 1250, i);
            }
            (drain(&mut pipe), pipe.counters().lost)
        };
        let (out, lost) = run(7);
        assert!((900..1100).contains(&lost), "{lost}");
        assert_eq!(out.len() as u64 + lost, 50_000);
        assert_eq!(run(7).0, out);
        assert_ne!(run(8).0, out);
    }

    #[test]
    fn jitter_keeps_the_order() {
        let mut pipe = Pipe::new(shape("1gbit,10ms,0%,jitter=3ms,queue=100mib"), 3);
        for i in 0..5_000 {
            pipe.offer(0, 1250, i);
        }
        let out = drain(&mut pipe);
        assert!(out.windows(2).all(|w| w[0].1 < w[1].1 && w[0].0 <= w[1].0));
    }

    #[test]
    fn a_new_rate_holds_for_what_waits() {
        let mut pipe = Pipe::new(shape("10mbit,0ms"), 1);
        for i in 0..3 {
            pipe.offer(0, 1250, i);
        }
        pipe.reshape(MILLI / 2, shape("1mbit,0ms"));
        assert_eq!(
            drain(&mut pipe),
            [(MILLI, 0), (11 * MILLI, 1), (21 * MILLI, 2)]
        );
    }

    #[test]
    fn a_cut_loses_what_is_under_way_and_all_until_it_is_mended() {
        let mut pipe = Pipe::new(shape("10mbit,80ms"), 1);
        for i in 0..4 {
            pipe.offer(0, 1250, i);
        }
        pipe.set_cut(MILLI, true);
        assert!(!pipe.offer(2 * MILLI, 1250, 9));
        assert_eq!(drain(&mut pipe), []);
        assert_eq!(pipe.counters().cut, 5);
        assert_eq!(pipe.counters().bytes, 0);
        pipe.set_cut(3 * MILLI, false);
        assert!(pipe.offer(10 * MILLI, 1250, 10));
        assert_eq!(drain(&mut pipe), [(51 * MILLI, 10)]);
    }
}
