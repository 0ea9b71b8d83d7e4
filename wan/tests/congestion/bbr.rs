//! A neighbour that heeds no loss: BBR as Linux has it in its first version. It sends at
//! the largest rate of its last ten rounds, a quarter more in one round of eight, and holds
//! two bandwidth-delay products: a queue of one product, all the time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::flow::Controller;
use super::sim::PACKET;

const STARTUP_GAIN: f64 = 2.885;
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
const ROUNDS: u64 = 10;
const BASE_MEMORY: Duration = Duration::from_secs(10);
const PROBE_RTT: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Startup,
    Drain,
    Probe,
    /// Until then, with next to nothing under way.
    Empty(Instant),
}

pub(crate) struct Bbr {
    phase: Phase,
    /// Largest rates of rounds, bytes a second.
    rates: VecDeque<(u64, f64)>,
    round: u64,
    round_began: Instant,
    delivered: u64,
    /// What was delivered when.
    moments: VecDeque<(Instant, u64)>,
    base: f64,
    base_seen: Instant,
    full: f64,
    flat: u32,
    step: usize,
    stepped: Instant,
}

impl Bbr {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Startup,
            rates: VecDeque::new(),
            round: 0,
            round_began: now,
            delivered: 0,
            moments: VecDeque::from([(now, 0)]),
            base: f64::INFINITY,
            base_seen: now,
            full: 0.0,
            flat: 0,
            step: 2,
            stepped: now,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max)
    }

    fn gain(&self) -> f64 {
        match self.phase {
            Phase::Startup => STARTUP_GAIN,
            Phase::Drain => 1.0 / STARTUP_GAIN,
            Phase::Probe => CYCLE[self.step],
            Phase::Empty(_) => 1.0,
        }
    }

    fn product(&self) -> f64 {
        match self.base.is_finite() {
            true => self.rate() * self.base,
            false => 0.0,
        }
    }

    /// The rate at which what was acknowledged now went over the path.
    fn sample(&mut self, now: Instant, sent: Instant) {
        while self.moments.len() > 1 && self.moments[1].0 <= sent {
            self.moments.pop_front();
        }
        let (at, delivered) = self.moments[0];
        let seconds = (now - at.max(sent)).as_secs_f64();
        let rate = (self.delivered - delivered) as f64 / seconds.max(1e-3);
        let round = self.round;
        match self.rates.back_mut().filter(|(of, _)| *of == round) {
            Some((_, best)) => *best = best.max(rate),
            None => self.rates.push_back((round, rate)),
        }
        self.rates.retain(|(of, _)| of + ROUNDS > round);
    }

    fn round_is_over(&mut self) {
        let rate = self.rate();
        if self.phase != Phase::Startup {
            return;
        }
        if rate > 1.25 * self.full {
            (self.full, self.flat) = (rate, 0);
        } else {
            self.flat += 1;
        }
        if self.flat >= 3 {
            self.phase = Phase::Drain;
        }
    }

    fn steps(&mut self, now: Instant, rtt: f64) {
        match self.phase {
            Phase::Drain if rtt < 1.1 * self.base => (self.phase, self.step) = (Phase::Probe, 2),
            Phase::Probe if (now - self.stepped).as_secs_f64() > self.base => {
                self.step = (self.step + 1) % CYCLE.len();
                self.stepped = now;
            }
            Phase::Empty(until) if now > until => {
                (self.phase, self.base_seen) = (Phase::Probe, now);
            }
            Phase::Probe if now - self.base_seen > BASE_MEMORY => {
                self.base = f64::INFINITY;
                self.phase = Phase::Empty(now + PROBE_RTT + Duration::from_secs_f64(rtt));
            }
            _ => {}
        }
    }
}

impl Controller for Bbr {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool) {
        self.delivered += bytes;
        self.moments.push_back((now, self.delivered));
        let rtt = (now - sent).as_secs_f64();
        if rtt <= self.base {
            (self.base, self.base_seen) = (rtt, now);
        }
        self.sample(now, sent);
        if sent >= self.round_began {
            self.round += 1;
            self.round_began = now;
            self.round_is_over();
        }
        self.steps(now, rtt);
    }

    fn on_end_acks(&mut self, _now: Instant) {}

    fn on_lost(&mut self, _now: Instant, _sent: Instant, _bytes: u64, _persistent: bool) {}

    fn window(&self) -> u64 {
        let gain = match self.phase {
            Phase::Startup | Phase::Drain => STARTUP_GAIN,
            Phase::Probe => 2.0,
            Phase::Empty(_) => 0.0,
        };
        let least = if gain > 0.0 { 10 * PACKET } else { 4 * PACKET };
        ((gain * self.product()) as u64).max(least) + PACKET
    }

    fn pacing(&self) -> Option<f64> {
        let rate = self.gain() * self.rate();
        (rate > 0.0).then_some(rate)
    }
}
