//! A neighbour as Linux's BBR (version 1) is: it paces by the largest rate of the last ten
//! round trips, keeps two bandwidth-delay products in flight, and heeds no loss. So it holds
//! a queue of one bandwidth-delay product beside anyone, and overflows a shorter one.
//! After draft-cardwell-iccrg-bbr-congestion-control-00.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::flow::Controller;
use super::sim::PACKET;

const HIGH_GAIN: f64 = 2.885;
const WINDOW_GAIN: f64 = 2.0;
/// Linux paces a hundredth below what it measured.
const PACING_MARGIN: f64 = 0.99;
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
const RATE_ROUNDS: u64 = 10;
const PROBE_RTT_INTERVAL: Duration = Duration::from_secs(10);
const PROBE_RTT_TIME: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq)]
enum State {
    Startup,
    Drain,
    ProbeBandwidth,
    ProbeRtt,
}

pub(crate) struct Bbr {
    state: State,
    /// When how many bytes were delivered.
    history: VecDeque<(Instant, f64)>,
    delivered: f64,
    /// Rates of rounds, bytes a second.
    rates: VecDeque<(u64, f64)>,
    round: u64,
    round_ends: f64,
    newest_sent: Option<Instant>,
    base_rtt: f64,
    base_seen: Instant,
    probe_ends: Instant,
    best: f64,
    flat_rounds: u32,
    phase: usize,
    phase_began: Instant,
}

impl Bbr {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            state: State::Startup,
            history: VecDeque::new(),
            delivered: 0.0,
            rates: VecDeque::new(),
            round: 0,
            round_ends: 0.0,
            newest_sent: None,
            base_rtt: f64::INFINITY,
            base_seen: now,
            probe_ends: now,
            best: 0.0,
            flat_rounds: 0,
            phase: 2,
            phase_began: now,
        }
    }

    fn bandwidth(&self) -> f64 {
        self.rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max)
    }

    fn product(&self) -> f64 {
        match self.base_rtt.is_finite() {
            true => self.bandwidth() * self.base_rtt,
            false => 10.0 * PACKET as f64,
        }
    }

    fn delivered_at(&self, when: Instant) -> (Instant, f64) {
        let later = self.history.partition_point(|(at, _)| *at <= when);
        let before = later
            .checked_sub(1)
            .and_then(|index| self.history.get(index));
        before.copied().unwrap_or((when, 0.0))
    }
}

impl Controller for Bbr {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool) {
        let rtt = (now - sent).as_secs_f64();
        if rtt <= self.base_rtt {
            (self.base_rtt, self.base_seen) = (rtt, now);
        }
        self.delivered += bytes as f64;
        self.newest_sent = self.newest_sent.max(Some(sent));
    }

    fn on_end_acks(&mut self, now: Instant) {
        let Some(sent) = self.newest_sent.take() else {
            return;
        };
        let (from, before) = self.delivered_at(sent);
        let rate = (self.delivered - before) / (now - from.max(sent)).as_secs_f64().max(1e-4);
        self.history.push_back((now, self.delivered));
        if self.history.len() > 1 << 15 {
            self.history.pop_front();
        }
        let round_over = before >= self.round_ends;
        if round_over {
            self.round += 1;
            self.round_ends = self.delivered;
        }
        let (round, oldest) = (self.round, self.round.saturating_sub(RATE_ROUNDS));
        self.rates.retain(|(at, _)| *at > oldest || oldest == 0);
        match self.rates.back_mut() {
            Some((at, best)) if *at == round => *best = best.max(rate),
            _ => self.rates.push_back((round, rate)),
        }
        let since = now - self.phase_began;
        match self.state {
            State::Startup if round_over => {
                if self.bandwidth() > 1.25 * self.best {
                    (self.best, self.flat_rounds) = (self.bandwidth(), 0);
                } else {
                    self.flat_rounds += 1;
                }
                if self.flat_rounds >= 3 {
                    (self.state, self.phase_began) = (State::Drain, now);
                }
            }
            // What Startup queued is gone after about as long as it took to build.
            State::Drain if since.as_secs_f64() > 2.0 * self.base_rtt => {
                (self.state, self.phase_began) = (State::ProbeBandwidth, now);
            }
            State::ProbeBandwidth if since.as_secs_f64() > self.base_rtt => {
                self.phase = (self.phase + 1) % CYCLE.len();
                self.phase_began = now;
            }
            State::ProbeRtt if now >= self.probe_ends => {
                self.base_seen = now;
                (self.state, self.phase, self.phase_began) = (State::ProbeBandwidth, 2, now);
            }
            _ => {}
        }
        if self.state == State::ProbeBandwidth && now - self.base_seen > PROBE_RTT_INTERVAL {
            self.state = State::ProbeRtt;
            self.base_rtt = f64::INFINITY;
            self.probe_ends = now + PROBE_RTT_TIME;
            self.base_seen = now;
        }
    }

    fn on_lost(&mut self, _now: Instant, _sent: Instant, _bytes: u64, _persistent: bool) {}

    fn window(&self) -> u64 {
        let window = match self.state {
            State::ProbeRtt => 4.0 * PACKET as f64,
            State::Startup | State::Drain => HIGH_GAIN * self.product(),
            State::ProbeBandwidth => WINDOW_GAIN * self.product(),
        };
        (window as u64).max(4 * PACKET)
    }

    fn pacing_rate(&self) -> Option<f64> {
        let gain = match self.state {
            State::Startup => HIGH_GAIN,
            State::Drain => 1.0 / HIGH_GAIN,
            State::ProbeBandwidth => CYCLE[self.phase],
            State::ProbeRtt => 1.0,
        };
        let bandwidth = self.bandwidth();
        (bandwidth > 0.0).then_some(PACING_MARGIN * gain * bandwidth)
    }
}
