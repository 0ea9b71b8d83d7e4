//! The neighbours: Reno and CUBIC as TCP has them, unpaced, and a flow at a fixed rate.

use std::time::Instant;

use super::flow::Controller;
use super::sim::PACKET;

/// Which TCP.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Reno,
    Cubic,
}

/// A TCP-like controller with slow start, one back-off a round trip, and growth by `Kind`.
pub(crate) struct Tcp {
    kind: Kind,
    window: f64,
    threshold: f64,
    recovery: Option<Instant>,
    summit: f64,
    epoch: Option<Instant>,
    rtt: f64,
    base: f64,
}

impl Tcp {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            window: 10.0,
            threshold: f64::INFINITY,
            recovery: None,
            summit: 0.0,
            epoch: None,
            rtt: 0.0,
            base: f64::INFINITY,
        }
    }
}

impl Controller for Tcp {
    fn on_ack(&mut self, now: Instant, sent: Instant, _bytes: u64, _app_limited: bool) {
        self.rtt = (now - sent).as_secs_f64();
        self.base = self.base.min(self.rtt);
        if self.window < self.threshold {
            self.window += 1.0;
            // HyStart, which Linux has: slow start ends when the round trip grows.
            let slack = (self.base / 8.0).clamp(0.004, 0.016);
            if self.kind == Kind::Cubic && self.window > 16.0 && self.rtt > self.base + slack {
                self.threshold = self.window;
            }
            return;
        }
        match self.kind {
            Kind::Reno => self.window += 1.0 / self.window,
            Kind::Cubic => {
                let window = self.window;
                let summit = self.summit.max(1.0);
                let epoch = *self.epoch.get_or_insert(now);
                let t = (now - epoch).as_secs_f64() + self.rtt;
                let reach = match window < summit || self.summit > 0.0 {
                    true => (summit * 0.3 / 0.4).cbrt(),
                    false => 0.0,
                };
                let target = (0.4 * (t - reach).powi(3) + summit).clamp(window, 1.5 * window);
                let reno = 0.53 / window;
                self.window += ((target - window) / window).max(reno);
            }
        }
    }

    fn on_end_acks(&mut self, _now: Instant) {}

    fn on_lost(&mut self, now: Instant, sent: Instant, _bytes: u64, persistent: bool) {
        if self.recovery.is_some_and(|recovery| sent <= recovery) {
            return;
        }
        self.recovery = Some(now);
        let factor = match self.kind {
            Kind::Reno => 0.5,
            Kind::Cubic => 0.7,
        };
        self.summit = match self.window < self.summit {
            true => self.window * 0.85,
            false => self.window,
        };
        self.window = (self.window * factor).max(2.0);
        self.threshold = self.window;
        self.epoch = Some(now);
        if persistent {
            self.window = 2.0;
        }
    }

    fn window(&self) -> u64 {
        (self.window * PACKET as f64) as u64 + PACKET
    }

    fn paced(&self) -> bool {
        false
    }
}
