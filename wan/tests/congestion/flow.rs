//! One flow of the simulation: its controller, what it has under way, and what became of it.

use std::collections::BTreeMap;
use std::time::Instant;

use super::sim::PACKET;

/// What a sender asks of its congestion controller.
pub(crate) trait Controller {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool);
    fn on_end_acks(&mut self, now: Instant);
    fn on_lost(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool);
    fn window(&self) -> u64;
    /// TCP of the plain kind sends what an acknowledgement allows at once.
    fn paced(&self) -> bool {
        true
    }
    /// Bytes a second; `None`: quinn's pace, 1.25 windows a round trip.
    fn pacing(&self) -> Option<f64> {
        None
    }
}

/// What a flow did in a span of time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) dropped: u64,
    pub(crate) delivered_bytes: u64,
    pub(crate) rtt_sum: f64,
    pub(crate) rtt_count: u64,
}

impl Tally {
    /// Mean round trip in milliseconds.
    pub(crate) fn rtt_ms(&self) -> f64 {
        self.rtt_sum / self.rtt_count.max(1) as f64
    }

    pub(crate) fn since(&self, earlier: &Tally) -> Tally {
        Tally {
            sent: self.sent - earlier.sent,
            dropped: self.dropped - earlier.dropped,
            delivered_bytes: self.delivered_bytes - earlier.delivered_bytes,
            rtt_sum: self.rtt_sum - earlier.rtt_sum,
            rtt_count: self.rtt_count - earlier.rtt_count,
        }
    }
}

pub(crate) struct Flow {
    pub(crate) controller: Box<dyn Controller>,
    pub(crate) active: bool,
    /// Bytes a second the application offers; `None`: always more.
    pub(crate) offered: Option<(f64, f64, u64)>,
    pub(crate) next_number: u64,
    pub(crate) unacked: BTreeMap<u64, u64>,
    pub(crate) in_flight: u64,
    pub(crate) app_limited: bool,
    pub(crate) smoothed_rtt: f64,
    pub(crate) tokens: f64,
    pub(crate) refilled: u64,
    pub(crate) start: u64,
    pub(crate) wake: u64,
    pub(crate) largest_acked: Option<u64>,
    pub(crate) last_progress: u64,
    pub(crate) timeouts: u32,
    /// Receiver: packets in the order they came, and how many of them are acknowledged.
    pub(crate) received: Vec<u64>,
    pub(crate) acknowledged: usize,
    pub(crate) ack_due: Option<u64>,
    pub(crate) processed: usize,
    pub(crate) tally: Tally,
}

impl Flow {
    pub(crate) fn new(controller: Box<dyn Controller>, start: u64) -> Self {
        Self {
            controller,
            active: true,
            offered: None,
            next_number: 0,
            unacked: BTreeMap::new(),
            in_flight: 0,
            app_limited: false,
            smoothed_rtt: 0.0,
            tokens: 10.0 * PACKET as f64,
            refilled: start,
            start,
            wake: start,
            largest_acked: None,
            last_progress: start,
            timeouts: 0,
            received: Vec::new(),
            acknowledged: 0,
            ack_due: None,
            processed: 0,
            tally: Tally::default(),
        }
    }
}
