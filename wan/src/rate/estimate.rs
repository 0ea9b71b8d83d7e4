//! What the controller measures: the round trip without a queue, the rate of a round, the
//! rates of the last rounds, and the last moments in detail.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Half of the time for which the smallest round trip counts.
const BASE_EPOCH: Duration = Duration::from_secs(15);
/// How long the smallest round trip is kept while others keep a queue.
const BASE_KEPT: Duration = Duration::from_secs(120);
/// Half of the time for which the largest rate counts as one of late.
const LATELY_EPOCH: Duration = Duration::from_secs(60);
/// A round lasts at least this long, or its rate is noise.
const ROUND_MIN: Duration = Duration::from_millis(10);
/// Acknowledgements kept in detail.
const RECENT_LIMIT: usize = 4096;
/// Acknowledgements whose smallest round trip counts as the present one.
const RECENT_RTTS: usize = 8;

/// The smallest round trip of the last 15 to 30 seconds.
#[derive(Debug, Clone)]
pub(super) struct BaseRtt {
    epoch: Instant,
    confirmed: Instant,
    older: f64,
    newer: f64,
}

impl BaseRtt {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            confirmed: now,
            older: f64::INFINITY,
            newer: f64::INFINITY,
        }
    }

    pub(super) fn observe(&mut self, now: Instant, rtt: f64) {
        if now.saturating_duration_since(self.epoch) > BASE_EPOCH {
            self.epoch = now;
            self.older = self.newer;
            self.newer = f64::INFINITY;
        }
        if rtt <= self.seconds() {
            self.confirmed = now;
        }
        self.newer = self.newer.min(rtt);
    }

    /// The path cannot be seen empty now: what is known of it does not age, within reason.
    pub(super) fn keep(&mut self, now: Instant) {
        if now.saturating_duration_since(self.confirmed) < BASE_KEPT {
            self.epoch = now;
        }
    }

    /// The path has another length now.
    pub(super) fn reset(&mut self, now: Instant, rtt: f64) {
        *self = Self::new(now);
        self.newer = rtt;
    }

    /// In seconds; 0 before the first measurement.
    pub(super) fn seconds(&self) -> f64 {
        let least = self.older.min(self.newer);
        if least.is_finite() { least } else { 0.0 }
    }

    pub(super) fn known(&self) -> Option<Duration> {
        let seconds = self.seconds();
        (seconds > 0.0).then(|| Duration::from_secs_f64(seconds))
    }
}

/// The rate of the path in bytes a second: the largest that was measured since the last
/// queue. While there is no queue nothing says that the path became slower, so nothing is
/// forgotten; when there is one, the rate is measured exactly.
#[derive(Debug, Clone, Default)]
pub(super) struct RateFilter {
    rate: f64,
}

impl RateFilter {
    pub(super) fn value(&self) -> f64 {
        self.rate
    }

    /// A rate without a queue: the path carries at least this.
    pub(super) fn add(&mut self, rate: f64) {
        self.rate = self.rate.max(rate);
    }

    /// Only this rate counts from now on.
    pub(super) fn reset(&mut self, rate: f64) {
        self.rate = rate;
    }
}

/// The largest rate of the last one to two minutes, with a queue or without.
#[derive(Debug, Clone)]
pub(super) struct Lately {
    epoch: Instant,
    older: f64,
    newer: f64,
}

impl Lately {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            older: 0.0,
            newer: 0.0,
        }
    }

    pub(super) fn observe(&mut self, now: Instant, rate: f64) {
        let since = now.saturating_duration_since(self.epoch);
        if since > LATELY_EPOCH {
            self.epoch = now;
            self.older = self.newer;
            self.newer = 0.0;
        }
        self.newer = self.newer.max(rate);
    }

    /// The path as it was is gone, or has no room for so much.
    pub(super) fn forget(&mut self) {
        self.older = 0.0;
        self.newer = 0.0;
    }

    /// Bytes a second; 0 before the first round.
    pub(super) fn rate(&self) -> f64 {
        self.older.max(self.newer)
    }
}

/// What one round trip's worth of acknowledgements said.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RoundSummary {
    /// Bytes acknowledged a second.
    pub(super) rate: f64,
    /// Part of the bytes that was lost.
    pub(super) loss: f64,
    pub(super) delivered_bytes: u64,
    pub(super) lost_bytes: u64,
    /// Smallest round trip, seconds.
    pub(super) least_rtt: f64,
    /// Mean round trip, seconds.
    pub(super) mean_rtt: f64,
    pub(super) app_limited: bool,
}

/// The round under way: it is over when a packet that left after its start is acknowledged.
#[derive(Debug, Clone)]
pub(super) struct Round {
    start: Instant,
    delivered_total: u64,
    delivered_before: u64,
    lost: u64,
    least_rtt: f64,
    rtt_sum: f64,
    events: u32,
    event_rtt: Option<f64>,
    app_limited: bool,
    complete: bool,
}

impl Round {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            start: now,
            delivered_total: 0,
            delivered_before: 0,
            lost: 0,
            least_rtt: f64::INFINITY,
            rtt_sum: 0.0,
            events: 0,
            event_rtt: None,
            app_limited: false,
            complete: false,
        }
    }

    pub(super) fn on_ack(&mut self, sent: Instant, bytes: u64, rtt: f64, app_limited: bool) {
        self.delivered_total += bytes;
        self.least_rtt = self.least_rtt.min(rtt);
        self.event_rtt = Some(self.event_rtt.map_or(rtt, |least| least.min(rtt)));
        self.app_limited |= app_limited;
        self.complete |= sent >= self.start;
    }

    pub(super) fn on_lost(&mut self, bytes: u64) {
        self.lost += bytes;
    }

    /// The smallest round trip of the acknowledgement just told.
    pub(super) fn take_event_rtt(&mut self) -> Option<f64> {
        let rtt = self.event_rtt.take()?;
        self.rtt_sum += rtt;
        self.events += 1;
        Some(rtt)
    }

    pub(super) fn delivered_total(&self) -> u64 {
        self.delivered_total
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.complete && now.saturating_duration_since(self.start) >= ROUND_MIN
    }

    /// Closes this round and begins the next.
    pub(super) fn finish(&mut self, now: Instant) -> RoundSummary {
        let seconds = now.saturating_duration_since(self.start).as_secs_f64();
        let delivered = self.delivered_total - self.delivered_before;
        let summary = RoundSummary {
            rate: delivered as f64 / seconds.max(1e-6),
            loss: self.lost as f64 / (self.lost + delivered).max(1) as f64,
            delivered_bytes: delivered,
            lost_bytes: self.lost,
            least_rtt: self.least_rtt,
            mean_rtt: self.rtt_sum / f64::from(self.events.max(1)),
            app_limited: self.app_limited,
        };
        *self = Self {
            delivered_total: self.delivered_total,
            delivered_before: self.delivered_total,
            ..Self::new(now)
        };
        summary
    }
}

#[derive(Debug, Clone, Copy)]
struct Moment {
    at: Instant,
    delivered_total: u64,
    rtt: f64,
}

/// The last acknowledgements one by one, for what must be noticed within a round.
#[derive(Debug, Clone, Default)]
pub(super) struct Recent {
    moments: VecDeque<Moment>,
}

impl Recent {
    pub(super) fn push(&mut self, at: Instant, delivered_total: u64, rtt: f64) {
        if self.moments.len() >= RECENT_LIMIT {
            self.moments.pop_front();
        }
        self.moments.push_back(Moment {
            at,
            delivered_total,
            rtt,
        });
    }

    /// The smallest of the last few round trips; `None` before there are enough.
    pub(super) fn least_rtt(&self) -> Option<f64> {
        let last = self.moments.iter().rev().take(RECENT_RTTS);
        (self.moments.len() >= RECENT_RTTS)
            .then(|| last.map(|moment| moment.rtt).fold(f64::INFINITY, f64::min))
    }

    /// Bytes acknowledged a second over the last `seconds`, or over what is known of them.
    pub(super) fn rate(&self, seconds: f64) -> Option<f64> {
        let last = self.moments.back()?;
        let span = |moment: &Moment| last.at.saturating_duration_since(moment.at).as_secs_f64();
        let first = self
            .moments
            .iter()
            .rev()
            .find(|moment| span(moment) >= seconds)
            .or_else(|| self.moments.front())?;
        let delivered = last.delivered_total - first.delivered_total;
        let seconds = span(first);
        (seconds > 0.0).then(|| delivered as f64 / seconds)
    }
}
