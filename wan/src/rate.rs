//! Our congestion controller: how many bytes may be in flight on a long, lossy link.
//!
//! It is sans-I/O and knows no QUIC: it hears what was sent, acknowledged and lost, and
//! says a window. quinn (and the simulator in `tests/congestion.rs`) sends while fewer
//! bytes than the window are in flight, paced at 1.25 windows a round trip. So the window
//! is what governs, and it is built from two measurements:
//!
//! - the **delivery rate**, averaged over a round trip. While the path has no queue this is
//!   a lower bound, so the largest of the last rounds counts. While it has one, the rate is
//!   exactly our share of the link, so the newest counts and older ones are forgotten;
//! - the **base round trip**, the smallest of the last half minute. Every few seconds the
//!   window dips for one round, so that our own queue cannot pass for distance.
//!
//! Their product is what fills the link without a queue; the window is a few percent more,
//! which is also what finds new bandwidth. What timers and jitter add to the round trip of
//! an empty path is measured during the dips and made up for.
//!
//! - **Loss** by itself does not lower the window. More loss than lately makes the
//!   controller ask the path whose it is ([`loss`]): sending a little less for a few
//!   hundred packets ends it, or does not.
//! - **A queue** lowers the window at once. One that stays although we retreat is
//!   somebody else's: then the window holds half of the link ([`compete`]), until a dip
//!   shows that the queue was ours alone, or that there is no queue and the path has
//!   become longer.
//! - **A busy host** looks at what came milliseconds late. On a short path that looks like
//!   a queue that stays, and to retreat from it ends in six packets a round trip. So the
//!   window holds a few milliseconds of what the path carried lately, whatever the round
//!   trip says ([`HOSTS_LATE`]); unless it was found that the queue has no room for it.

mod compete;
mod estimate;
mod loss;
mod phases;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use compete::Competition;
use estimate::{BaseRtt, Lately, RateFilter, Recent, Round, RoundSummary};
use loss::LossJudge;

use crate::limits::PACKETS_AN_ACK;

/// What a controller is told when it is made.
#[derive(Debug, Clone, Default)]
pub struct RateOptions {
    /// The policy's cap in bits a second, read whenever it matters; 0 is no cap. It counts
    /// QUIC packets without IP and UDP headers.
    pub cap: Option<Arc<AtomicU64>>,
    /// Bits a second to begin with, for example what the same link carried yesterday. The
    /// controller starts there as soon as it knows the round trip.
    pub initial: Option<u64>,
}

/// Growth of the window per round trip while the link is not yet full. The signal that it
/// is full comes a round trip late; with this factor the queue then holds at most 0.8
/// bandwidth-delay products. Doubling would overflow a queue of one.
const STARTUP_GROWTH: f64 = 1.7;
/// A window that the queue of any link of today holds may double.
const SMALL_WINDOW: f64 = 256.0 * 1024.0;
const SMALL_WINDOW_GROWTH: f64 = 2.0;
const INITIAL_PACKETS: u64 = 32;
const MINIMUM_PACKETS: u64 = 6;
/// Loss beyond that of the path that only a full queue explains.
const OVERFLOW: f64 = 0.01;
/// Seconds by which busy hosts may be late, and which no retreat ends. What the path
/// carried in that time lately is in flight at least, unless a queue overflows by it. It
/// is less than a path of some length holds anyhow.
const HOSTS_LATE: f64 = 0.005;
/// Seconds for which a receiver of fewer packets than it acknowledges at once may wait
/// for more: QUIC's usual `max_ack_delay`.
const ACK_PUT_OFF: f64 = 0.025;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The window grows until the path answers with a queue.
    Startup,
    /// The window follows the measurements.
    Cruise,
    /// One round with little in flight, to see the empty path.
    Dip,
    /// Less than the link's rate for some packets, to see whose the loss is.
    Ask,
    /// Somebody else keeps a queue: take a fair share.
    Compete,
    /// As [`Phase::Dip`], to see whether the somebody is still there.
    CompeteDip,
}

/// What we had when we retreated from a queue.
#[derive(Debug, Clone, Copy)]
struct Retreat {
    at: Instant,
    window: f64,
    bandwidth: f64,
}

/// What a controller knows, for status pages and tests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateStatus {
    /// Estimated rate of the path for us, bits a second.
    pub bandwidth: u64,
    /// The round trip without a queue.
    pub base_rtt: Option<Duration>,
    /// Part of the bytes lost in the last round.
    pub loss: f64,
    /// True while another flow holds a queue that we share.
    pub competing: bool,
}

/// The controller; see the module.
#[derive(Debug, Clone)]
pub struct RateController {
    options: RateOptions,
    mtu: u64,
    window: f64,
    phase: Phase,
    base: BaseRtt,
    smoothed_rtt: f64,
    /// Mean round trip when there was no queue: the base and what timers, jitter and
    /// delayed acknowledgements add.
    quiet_rtt: f64,
    /// The packets now acknowledged left during a dip, so they met no queue.
    after_dip: bool,
    bandwidth: RateFilter,
    lately: Lately,
    /// There was nothing to send when the newest packet was acknowledged.
    app_limited: bool,
    round: Round,
    recent: Recent,
    competition: Competition,
    last: RoundSummary,
    /// When the path was last seen empty, and rounds since.
    dipped: Instant,
    rounds_since_dip: u32,
    /// Rounds in a row with a queue, and what was before the first of them.
    queued_rounds: u32,
    retreat: Retreat,
    /// The bandwidth some rounds ago, and how many.
    former_bandwidth: f64,
    former_rounds: u32,
    losses: LossJudge,
    bandwidth_before_ask: f64,
    /// Startup: the best rate of a round so far, and rounds that did not better it.
    best_startup_rate: f64,
    flat_rounds: u32,
    started: bool,
}

impl RateController {
    /// A controller for a path nothing is known of yet; `mtu` in bytes.
    pub fn new(options: RateOptions, now: Instant, mtu: u16) -> Self {
        let mtu = u64::from(mtu.max(1));
        Self {
            options,
            mtu,
            window: (INITIAL_PACKETS * mtu) as f64,
            phase: Phase::Startup,
            base: BaseRtt::new(now),
            smoothed_rtt: 0.0,
            quiet_rtt: 0.0,
            after_dip: false,
            bandwidth: RateFilter::default(),
            lately: Lately::new(now),
            app_limited: false,
            round: Round::new(now),
            recent: Recent::default(),
            competition: Competition::default(),
            last: RoundSummary::default(),
            dipped: now,
            rounds_since_dip: 0,
            queued_rounds: 0,
            retreat: Retreat {
                at: now,
                window: 0.0,
                bandwidth: 0.0,
            },
            former_bandwidth: 0.0,
            former_rounds: 0,
            losses: LossJudge::new(now),
            bandwidth_before_ask: 0.0,
            best_startup_rate: 0.0,
            flat_rounds: 0,
            started: false,
        }
    }

    /// One packet of `bytes` that left at `sent` was acknowledged. `app_limited`: there was
    /// nothing to send, so the rate says little about the path.
    pub fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        let rtt = now.saturating_duration_since(sent).as_secs_f64();
        self.smoothed_rtt = match self.smoothed_rtt {
            0.0 => rtt,
            smoothed => smoothed + (rtt - smoothed) / 16.0,
        };
        if matches!(self.phase, Phase::Compete | Phase::CompeteDip) {
            self.base.keep(now);
        }
        self.base.observe(now, rtt);
        self.app_limited = app_limited;
        self.round.on_ack(sent, bytes, rtt, app_limited);
        if self.phase == Phase::Startup && !app_limited && !self.capped() {
            let growth = match self.window < SMALL_WINDOW {
                true => SMALL_WINDOW_GROWTH,
                false => STARTUP_GROWTH,
            };
            self.window += bytes as f64 * (growth - 1.0);
        }
    }

    /// All packets of one acknowledgement were told by [`Self::on_ack`].
    pub fn on_end_acks(&mut self, now: Instant) {
        let Some(rtt) = self.round.take_event_rtt() else {
            return;
        };
        self.recent.push(now, self.round.delivered_total(), rtt);
        if let (false, Some(initial)) = (self.started, self.options.initial) {
            self.window = self.window.max(initial as f64 / 8.0 * rtt);
        }
        self.started = true;
        // Who sends less than the window fills no queue: it is others', or late timers.
        if self.phase == Phase::Startup && !self.app_limited && self.startup_fills_a_queue() {
            self.leave_startup(now);
        }
        if let Phase::Compete = self.phase {
            self.window = self.competition.window(self.smoothed_rtt);
        }
        if self.round.is_over(now) {
            let summary = self.round.finish(now);
            self.on_round(now, summary);
        }
    }

    /// Packets of `bytes` in all are lost. `persistent`: nothing came through for several
    /// round trips.
    pub fn on_lost(&mut self, bytes: u64, persistent: bool) {
        self.round.on_lost(bytes);
        if persistent {
            // The path as it was is gone. Begin anew, gently.
            self.window = (INITIAL_PACKETS * self.mtu) as f64;
            self.bandwidth.reset(0.0);
            self.lately.forget();
            self.enter_startup();
        }
    }

    /// The size of packets changed.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu.max(1));
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        let window = self.window.max(self.least_window());
        let window = match self.cap_window() {
            Some(cap) => window.min(cap),
            None => window,
        };
        (window as u64).max(MINIMUM_PACKETS * self.mtu)
    }

    /// The window a controller begins with.
    pub fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    /// What is known of the path.
    pub fn status(&self) -> RateStatus {
        // What was known at the last startup's end is no bound any more.
        let bandwidth = match self.phase {
            Phase::Startup if self.smoothed_rtt > 0.0 => {
                self.bandwidth.value().max(self.window / self.smoothed_rtt)
            }
            _ => self.bandwidth.value(),
        };
        RateStatus {
            bandwidth: (bandwidth * 8.0) as u64,
            base_rtt: self.base.known(),
            loss: self.last.loss,
            competing: matches!(self.phase, Phase::Compete | Phase::CompeteDip),
        }
    }

    /// What busy hosts need in flight; nothing while the path is asked whose a loss is, or
    /// where the queue is known to be short.
    fn least_window(&self) -> f64 {
        match self.phase != Phase::Ask && self.losses.surplus() == 1.0 {
            true => HOSTS_LATE * self.lately.rate(),
            false => 0.0,
        }
    }

    /// Whether so much was lost that only a full queue explains it.
    fn overflows(&self, round: RoundSummary) -> bool {
        let many = round.lost_bytes > 8 * self.mtu;
        many && round.loss > self.losses.random() + OVERFLOW
    }

    /// The window that sends at exactly the cap, whatever the round trip now is. Where
    /// so few packets are on the way that their acknowledgement is put off, it has room
    /// for what leaves meanwhile.
    fn cap_window(&self) -> Option<f64> {
        let cap = self.options.cap.as_ref()?.load(Ordering::Relaxed);
        let known = cap > 0 && self.smoothed_rtt > 0.0;
        let rate = cap as f64 / 8.0;
        let enough = (2 * u64::from(PACKETS_AN_ACK) * self.mtu) as f64;
        known.then(|| {
            let window = rate * self.smoothed_rtt;
            window.max(enough.min(rate * (self.smoothed_rtt + ACK_PUT_OFF)))
        })
    }

    fn capped(&self) -> bool {
        self.cap_window().is_some_and(|cap| cap < self.window)
    }

    fn on_round(&mut self, now: Instant, mut round: RoundSummary) {
        if self.capped() {
            // The cap held us back: this round says as little as one without data.
            round.app_limited = true;
        }
        if self.overflows(round) {
            self.lately.forget();
        }
        self.lately.observe(now, round.rate);
        self.last = round;
        self.rounds_since_dip = self.rounds_since_dip.saturating_add(1);
        match self.phase {
            Phase::Startup => self.startup_round(now, round),
            Phase::Cruise => self.cruise_round(now, round),
            Phase::Dip => {
                self.seen_empty(now);
                self.after_dip = true;
                self.cruise_again();
            }
            Phase::Ask => self.ask_round(now, round),
            Phase::Compete => self.compete_round(now, round),
            Phase::CompeteDip => self.compete_dip_round(now, round),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
