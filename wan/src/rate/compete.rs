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
//!
//! A neighbour that heeds no loss (BBR) overflows the queue in bursts, fills the gaps of
//! our dips and looks at the empty path now and then. Beside one, all dips of late count
//! together, one lossy round and a short while without a queue mean nothing, and a dip
//! that is not answered lets us grow, as long as we lose nothing.

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
/// So many rounds in a row mean something of the link, not of a neighbour's doings.
const HEAVY_ROUNDS: u32 = 2;
const EMPTY_ROUNDS: u32 = 3;
/// What a dip counts for when the next one is made.
const REMEMBERED: f64 = 0.7;
/// A round trip that changes by this much between two dips meets a queue, or jitter.
const VARIES: f64 = 0.15;
/// Jitter loses nothing; a queue that lost this much of a round was full.
const BURST: f64 = 0.03;
const BURST_MEMORY: Duration = Duration::from_secs(30);
/// Lost packets are counted as under way for a while, though they are not: we hold as
/// much more, up to this part.
const MADE_GOOD: f64 = 0.25;
/// A link is not believed to be so many times as fast as the most that it was seen to carry.
const BELIEVED: f64 = 16.0;
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
    /// The most that was known of it, or carried for us, since the others came.
    most: f64,
    /// The window we had before the others came; we keep it until the first measurement.
    start: f64,
    dip: Option<Dip>,
    /// Dips in a row that the round trip did not answer.
    unanswered: u32,
    /// Of the dips of late, older ones for less: bytes that they took out of the queue,
    /// and seconds by which it became shorter.
    dipped_bytes: f64,
    fallen: f64,
    /// The shortest and the longest round trip between two dips, in seconds.
    round_trips: Option<(f64, f64)>,
    /// When a round lost so much that the queue was full, and whether one since the last
    /// dip did.
    burst: Option<Instant>,
    lossy: bool,
    /// Part of what is sent that was lost of late, up to a bound.
    lost: f64,
    /// Rounds in a row with heavy loss, and without a queue.
    heavy_rounds: u32,
    empty_rounds: u32,
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
                most: link,
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

    /// The dip under way tells nothing.
    pub(super) fn drop_dip(&mut self) {
        self.dip = None;
    }

    /// The dip left a `queue`, in seconds. `overflows`: packets are lost as before a full
    /// queue, so it is there although it does not shrink: a neighbour that heeds no loss
    /// fills every gap.
    pub(super) fn end_dip(&mut self, now: Instant, queue: f64, overflows: bool) -> Finding {
        let Some(dip) = self.dip.take() else {
            return Finding::Shared;
        };
        let (lossy, varies) = (std::mem::take(&mut self.lossy), self.queue_varies());
        self.round_trips = None;
        let fallen = dip.queue - queue;
        self.dipped_bytes = REMEMBERED * self.dipped_bytes + dip.bytes;
        self.fallen = REMEMBERED * self.fallen + fallen;
        let bursts = self.bursts_lately(now);
        if fallen < UNANSWERED_SECONDS.max(UNANSWERED * dip.queue) {
            let filled = overflows || bursts && varies;
            if overflows || filled && !lossy {
                self.correct(now, self.seen(), dip.rate);
            }
            self.unanswered = if filled { 0 } else { self.unanswered + 1 };
            if self.unanswered < UNANSWERED_DIPS {
                return Finding::Shared;
            }
            *self = Self::default();
            return Finding::NoQueue;
        }
        self.unanswered = 0;
        let one = dip.bytes / fallen;
        let seen = if bursts { self.seen() } else { one };
        if dip.rate > ALONE * seen.max(one) {
            *self = Self::default();
            return Finding::Alone;
        }
        self.correct(now, seen, dip.rate);
        Finding::Shared
    }

    /// The rate of the link by all dips of late. A neighbour's doings move the round trip
    /// by as much as one dip does, up as often as down: over several they cancel out.
    fn seen(&self) -> f64 {
        match self.fallen > 0.0 {
            true => self.dipped_bytes / self.fallen,
            false => f64::INFINITY,
        }
    }

    /// What is known of the link moves to what was `seen` of it; it carries our `own` rate.
    fn correct(&mut self, now: Instant, seen: f64, own: f64) {
        self.most = self.most.max(own);
        let seen = seen.clamp(self.link / CORRECTION, self.link * CORRECTION);
        let seen = seen.min(BELIEVED * self.most).max(own);
        self.link = match self.measured() {
            true => self.link + WEIGHT * (seen - self.link),
            false => seen,
        };
        self.measured = Some(now);
    }

    /// A round between two dips had this shortest round trip, in seconds, and this loss.
    pub(super) fn observe(&mut self, now: Instant, rtt: f64, loss: f64) {
        self.lost += (loss.min(MADE_GOOD) - self.lost) / 4.0;
        if loss > BURST {
            self.burst = Some(now);
            self.lossy = true;
        }
        let (least, most) = self.round_trips.unwrap_or((rtt, rtt));
        self.round_trips = Some((least.min(rtt), most.max(rtt)));
    }

    /// What changes by itself is a queue, and no longer path.
    fn queue_varies(&self) -> bool {
        self.round_trips
            .is_some_and(|(least, most)| most - least > VARIES * most)
    }

    /// Does somebody overflow the queue, whatever is lost?
    fn bursts_lately(&self, now: Instant) -> bool {
        self.burst
            .is_some_and(|at| now.saturating_duration_since(at) < BURST_MEMORY)
    }

    /// A round ended, with loss that is `heavy` even for a full queue or without it. One
    /// such round is a neighbour that probes; a link that became narrow goes on losing.
    pub(super) fn on_loss(&mut self, heavy: bool) {
        self.heavy_rounds = if heavy { self.heavy_rounds + 1 } else { 0 };
        if self.heavy_rounds >= HEAVY_ROUNDS {
            self.link *= 0.8;
            self.start *= 0.8;
        }
    }

    /// A round ended, without a queue or with one. A neighbour whose bursts overflow it
    /// looks at the empty path now and then, and is back after a round.
    pub(super) fn has_ended(&mut self, now: Instant, empty: bool) -> bool {
        self.empty_rounds = if empty { self.empty_rounds + 1 } else { 0 };
        let bursts = self.bursts_lately(now);
        self.empty_rounds >= if bursts { EMPTY_ROUNDS } else { 1 }
    }

    /// The window in bytes at this round trip.
    pub(super) fn window(&self, rtt: f64) -> f64 {
        let part = PART * self.link * rtt / (1.0 - self.lost);
        match self.measured() {
            true => part,
            false => part.max(self.start),
        }
    }
}
