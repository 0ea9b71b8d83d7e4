//! The window beside a neighbour that keeps a queue: half of the link.
//!
//! A controller that retreats from every queue starves beside one that fills it. One that
//! backs off at every loss, as TCP does, starves on links with random loss. So we measure
//! the whole link and hold a part of it. The measurement is a dip: when our window shrinks
//! for a round, the queue shrinks by as many bytes, while the neighbour's window stays as
//! it is. Bytes over the seconds by which the round trip fell is the rate of the link.
//! If that is our own rate, then the queue was ours, and there is no neighbour.
//!
//! Half of the link is half of the bytes on the way, `rate x round trip / 2`, at any length
//! of the queue. So the window rises while the neighbour fills the queue and falls when
//! the neighbour backs off, and the neighbour finds the other half.

use std::time::{Duration, Instant};

/// What we hold beside others.
const PART: f64 = 0.5;
/// What a dip takes of the queue: less than all of it, or it would measure too much.
const DIP_OF_QUEUE: f64 = 0.5;
/// What a dip takes of our window at most.
const DIP_OF_WINDOW: f64 = 0.5;
/// By how much one dip may correct what we know of the link.
const CORRECTION: f64 = 3.0;
/// Weight of a new measurement.
const WEIGHT: f64 = 0.4;
/// When the round trip falls by less than this, there was no queue to shrink: the path has
/// become longer. Twice, since others may have filled the gap.
const UNANSWERED: f64 = 0.015;
const UNANSWERED_SECONDS: f64 = 0.0005;
const UNANSWERED_DIPS: u32 = 2;
/// Who has this part of the link has no neighbour.
const ALONE: f64 = 0.75;
/// Mean loss beyond the path's own from which the neighbour is one that heeds no loss.
const HEEDLESS: f64 = 0.02;
/// Weight of a round's loss in that mean.
const LOSS_WEIGHT: f64 = 0.1;
/// By how much a dip may correct the link while the queue overflows.
const NUDGE: f64 = 1.3;
/// Most of our bytes on the way that we make up for as lost ones.
const MADE_UP: f64 = 0.25;
/// How long a measured link is remembered.
const MEMORY: Duration = Duration::from_secs(30);

/// What a dip showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// The link carries us alone.
    Alone,
    /// Others are there, too.
    Shared,
    /// Nothing that we do changes the round trip: there is no queue.
    NoQueue,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Competition {
    /// The whole link, bytes a second, and when it was measured.
    link: f64,
    measured: Option<Instant>,
    /// The window we had before the others came; we keep it until the first measurement.
    start: f64,
    dip: Option<Dip>,
    /// Mean loss beyond the path's own.
    overflow: f64,
    /// Dips in a row that the round trip did not answer.
    unanswered: u32,
}

#[derive(Debug, Clone, Copy)]
struct Dip {
    bytes: f64,
    queue: f64,
    rate: f64,
}

impl Competition {
    /// Begins at the `window` and the rate of the path that we had before the others came,
    /// or with what is remembered of them.
    pub(super) fn begin(&mut self, now: Instant, window: f64, link: f64) {
        if !self.known(now) {
            *self = Self {
                link,
                start: window,
                ..Self::default()
            };
        }
    }

    /// Whether there was a neighbour lately.
    pub(super) fn known(&self, now: Instant) -> bool {
        self.measured
            .is_some_and(|at| now.saturating_duration_since(at) < MEMORY)
    }

    pub(super) fn measured(&self) -> bool {
        self.measured.is_some()
    }

    /// A dip begins, at a `queue` in seconds and our own `rate`; the window for it.
    pub(super) fn begin_dip(&mut self, window: f64, queue: f64, rate: f64) -> f64 {
        let bytes = DIP_OF_QUEUE * queue * rate.max(self.link);
        let bytes = bytes.min(DIP_OF_WINDOW * window);
        self.dip = Some(Dip { bytes, queue, rate });
        window - bytes
    }

    /// The dip left a `queue`, in seconds. `overflows`: packets are lost as before a full
    /// queue, so it is there although it does not shrink: a neighbour that heeds no loss
    /// fills every gap. What is known of the link then stays.
    pub(super) fn end_dip(&mut self, now: Instant, queue: f64, overflows: bool) -> Finding {
        let Some(dip) = self.dip.take() else {
            return Finding::Shared;
        };
        let fallen = dip.queue - queue;
        if fallen < UNANSWERED_SECONDS.max(UNANSWERED * dip.queue) {
            self.unanswered += 1;
            if overflows {
                self.unanswered = 0;
                self.measured = Some(now);
            }
            if self.unanswered < UNANSWERED_DIPS {
                return Finding::Shared;
            }
            *self = Self::default();
            return Finding::NoQueue;
        }
        self.unanswered = 0;
        let seen = dip.bytes / fallen;
        if dip.rate > ALONE * seen {
            *self = Self::default();
            return Finding::Alone;
        }
        let seen = seen.clamp(self.link / CORRECTION, self.link * CORRECTION);
        // A neighbour that filled the gap makes the link look larger than it is, its bursts
        // make it look smaller: such dips only nudge. Heavy loss takes back what was too much.
        let seen = match overflows {
            true => seen.clamp(self.link / NUDGE, self.link * NUDGE),
            false => seen,
        };
        let seen = seen.max(dip.rate);
        self.link = match self.measured() {
            true => self.link + WEIGHT * (seen - self.link),
            false => seen,
        };
        self.measured = Some(now);
        Finding::Shared
    }

    /// A round of our `rate` lost this part of its bytes beyond what the path itself loses.
    /// `heavy`: more than any queue explains.
    pub(super) fn on_loss(&mut self, rate: f64, overflow: f64, heavy: bool) {
        // Who has most of the link overflows the queue alone.
        let theirs = match rate < ALONE * self.link {
            true => overflow.max(0.0),
            false => 0.0,
        };
        self.overflow += LOSS_WEIGHT * (theirs - self.overflow);
        if heavy {
            let kept = if self.heedless() { 0.95 } else { 0.8 };
            self.link *= kept;
            self.start *= kept;
        }
    }

    /// Whether the neighbour overflows the queue all the time, as BBR does: it sends at the
    /// largest rate that it had lately. So a dip of ours raises that, and should be rare.
    pub(super) fn heedless(&self) -> bool {
        self.overflow > HEEDLESS
    }

    /// The window in bytes at this round trip.
    pub(super) fn window(&self, rtt: f64) -> f64 {
        // Bytes that a full queue will drop are in flight, but are no part of the link.
        let arriving = match self.heedless() {
            true => 1.0 - self.overflow.min(MADE_UP),
            false => 1.0,
        };
        let part = PART * self.link * rtt / arriving;
        match self.measured() {
            true => part,
            false => part.max(self.start),
        }
    }
}
