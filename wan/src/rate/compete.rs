//! The window beside a TCP neighbour: CUBIC (RFC 9438), but blind to random loss.
//!
//! A controller that retreats from every queue starves beside one that fills it. While a
//! queue is held up by others, the window therefore grows and backs off as theirs does. A
//! loss counts only when the queue was long when it happened: loss at random would
//! otherwise cost us what it costs TCP on such links, which is nearly everything.

use std::time::Instant;

/// RFC 9438's constants: packets per second cubed, and what a loss leaves of the window.
const SCALE: f64 = 0.4;
const LOSS_FACTOR: f64 = 0.7;
/// Part of the longest queue seen from which on a loss counts as an overflow.
const HIGH_QUEUE: f64 = 0.7;

#[derive(Debug, Clone, Default)]
pub(super) struct Competition {
    epoch: Option<Instant>,
    /// The window at the last loss, to which it returns first, bytes.
    summit: f64,
    /// The window that the last loss left, bytes.
    valley: f64,
    longest_queue: f64,
}

impl Competition {
    /// Begins at the window we had before the others came.
    pub(super) fn start(now: Instant, window: f64) -> Self {
        Self {
            epoch: Some(now),
            summit: window,
            valley: window,
            longest_queue: 0.0,
        }
    }

    /// A queue of so many seconds was measured.
    pub(super) fn observe_queue(&mut self, queue: f64) {
        // Forgets slowly, for a neighbour or a route that left.
        self.longest_queue = (self.longest_queue * 0.995).max(queue);
    }

    pub(super) fn is_high(&self, queue: f64) -> bool {
        queue >= HIGH_QUEUE * self.longest_queue
    }

    /// A packet that left at `sent` is lost, and the queue is now `queue` seconds.
    pub(super) fn on_lost(&mut self, now: Instant, sent: Instant, queue: f64, mtu: u64) {
        let answered = self.epoch.is_some_and(|epoch| sent < epoch);
        self.observe_queue(queue);
        if answered || !self.is_high(queue) {
            return;
        }
        let window = self.window(now, mtu, 0.0);
        // A flow that lost before it was back at its summit makes room faster.
        self.summit = match window < self.summit {
            true => window * (1.0 + LOSS_FACTOR) / 2.0,
            false => window,
        };
        self.valley = window * LOSS_FACTOR;
        self.epoch = Some(now);
    }

    /// The window in bytes at `now`.
    pub(super) fn window(&self, now: Instant, mtu: u64, rtt: f64) -> f64 {
        let Some(epoch) = self.epoch else {
            return self.valley;
        };
        let mtu = mtu as f64;
        let seconds = now.saturating_duration_since(epoch).as_secs_f64();
        let summit = self.summit / mtu;
        let valley = self.valley / mtu;
        let reach = ((summit - valley).max(0.0) / SCALE).cbrt();
        let cubic = SCALE * (seconds - reach).powi(3) + summit;
        // What a Reno flow with the same back-off would have by now.
        let reno = match rtt > 0.0 {
            true => valley + 3.0 * (1.0 - LOSS_FACTOR) / (1.0 + LOSS_FACTOR) * seconds / rtt,
            false => valley,
        };
        cubic.max(reno).max(valley) * mtu
    }
}
