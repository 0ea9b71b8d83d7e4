//! The window beside a TCP neighbour: half of the link, as long as the neighbour keeps a
//! queue.
//!
//! A controller that retreats from every queue starves beside one that fills it. One that
//! backs off at every loss, as TCP does, starves on links with random loss. So we measure
//! the whole link and hold a part of it. The measurement is a dip: when our window shrinks
//! for a round, the queue shrinks by as many bytes, while the neighbour's window stays as
//! it is. Bytes over the seconds by which the round trip fell is the rate of the link.
//!
//! Half of the link is half of the bytes on the way, `rate x round trip / 2`, at any length
//! of the queue. So the window rises while the neighbour fills the queue and falls when
//! the neighbour backs off, and the neighbour finds the other half.

/// What we hold beside others.
const PART: f64 = 0.5;
/// What the window falls by in a dip.
pub(super) const DIP_PART: f64 = 0.4;
/// By how much one dip may correct what we know of the link.
const CORRECTION: f64 = 2.5;
/// Weight of a new measurement.
const WEIGHT: f64 = 0.5;
/// A queue this near to the longest seen is long.
const HIGH_QUEUE: f64 = 0.6;

#[derive(Debug, Clone, Default)]
pub(super) struct Competition {
    /// The whole link, bytes a second.
    link: f64,
    measured: bool,
    /// The window we had before the others came; we keep it until the first measurement.
    start: f64,
    longest_queue: f64,
    before_dip: Dip,
}

#[derive(Debug, Clone, Copy, Default)]
struct Dip {
    window: f64,
    queue: f64,
}

impl Competition {
    /// Begins at the `window` and the rate of the path that we had before the others came.
    pub(super) fn start(window: f64, link: f64) -> Self {
        Self {
            link,
            start: window,
            ..Self::default()
        }
    }

    /// A queue of so many seconds was measured.
    pub(super) fn observe_queue(&mut self, queue: f64) {
        // Forgets slowly, for a neighbour or a route that left.
        self.longest_queue = (self.longest_queue * 0.99).max(queue);
    }

    /// Whether a dip is worth it now: while the queue is short it may run empty, and then
    /// shows nothing. Without a first measurement, any time is good.
    pub(super) fn may_dip(&self, queue: f64) -> bool {
        !self.measured || queue >= HIGH_QUEUE * self.longest_queue
    }

    /// A dip from `window` begins.
    pub(super) fn begin_dip(&mut self, window: f64, queue: f64) {
        self.before_dip = Dip { window, queue };
    }

    /// The dip to `window` left a `queue`; `rate` is our own part.
    pub(super) fn end_dip(&mut self, window: f64, queue: f64, rate: f64) {
        let fallen = self.before_dip.queue - queue;
        let bytes = self.before_dip.window - window;
        if bytes <= 0.0 {
            return;
        }
        let seen = match fallen > 0.0005 {
            true => bytes / fallen,
            false => f64::INFINITY,
        };
        let seen = seen
            .clamp(self.link / CORRECTION, self.link * CORRECTION)
            .max(rate);
        self.link = match self.measured {
            true => self.link + WEIGHT * (seen - self.link),
            false => seen,
        };
        self.measured = true;
    }

    /// Loss that is heavy even for a full queue.
    pub(super) fn on_heavy_loss(&mut self) {
        self.link *= 0.8;
        self.start *= 0.8;
    }

    /// The window in bytes at this round trip.
    pub(super) fn window(&self, rtt: f64) -> f64 {
        let part = PART * self.link * rtt;
        match self.measured {
            true => part,
            false => part.max(self.start),
        }
    }
}
