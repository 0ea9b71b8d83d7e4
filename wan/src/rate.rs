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
//! which is also what finds new bandwidth. Random loss does not lower it. A queue lowers
//! it at once. A queue that stays although we retreat is somebody else's: then the window
//! holds half of the link ([`compete`]), until a dip shows that the queue was ours alone.

mod compete;
mod estimate;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use compete::Competition;
use estimate::{BaseRtt, RateFilter, Recent, Round, RoundSummary};

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

/// Window over bandwidth-delay product while all is well. The surplus is the queue we
/// allow ourselves, the slack for late timers, and the speed at which growth is found.
const CRUISE_GAIN: f64 = 1.06;
/// The dip that lets the queue run empty.
const DIP_GAIN: f64 = 0.85;
/// Growth of the window per round trip while the link is not yet full. The signal that it
/// is full comes a round trip late; with this factor the queue then holds at most 0.8
/// bandwidth-delay products. Doubling would overflow a queue of one.
const STARTUP_GROWTH: f64 = 1.7;
/// A window that the queue of any link of today holds may double.
const SMALL_WINDOW: f64 = 256.0 * 1024.0;
const SMALL_WINDOW_GROWTH: f64 = 2.0;
const INITIAL_PACKETS: u64 = 32;
const MINIMUM_PACKETS: u64 = 6;
/// The longest time without a look at the empty path.
const DIP_INTERVAL: Duration = Duration::from_secs(5);
const DIP_ROUNDS: u32 = 20;
/// The same while competing, when a dip measures the link.
const COMPETE_DIP_INTERVAL: Duration = Duration::from_millis(1_500);
const COMPETE_DIP_ROUNDS: u32 = 6;
const FIRST_DIP_ROUNDS: u32 = 2;
/// Rounds with a queue in spite of our retreat, until it must be somebody else's.
const FOREIGN_ROUNDS: u32 = 3;
/// So soon after a retreat, another that cost us bandwidth again is a neighbour's doing.
const SQUEEZE_INTERVAL: Duration = Duration::from_secs(10);
const SQUEEZE: f64 = 0.93;
/// Growth within so many rounds that is worth a startup of its own.
const GROWTH_ROUNDS: u32 = 4;
const GROWTH: f64 = 1.12;
/// Loss beyond this is congestion, whatever the round trip says.
const HEAVY_LOSS: f64 = 0.08;
/// Rounds of retreat before heavy loss. If it has not helped by then, the loss is not ours.
const LOSS_RETREAT_ROUNDS: u32 = 4;
const LOSS_RETREAT_GAIN: f64 = 0.85;
/// Rounds after which a link with heavy loss is tried again.
const LOSS_RETRY_ROUNDS: u32 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The window grows until the path answers with a queue.
    Startup,
    /// The window follows the measurements.
    Cruise,
    /// One round with little in flight, to see the empty path.
    Dip,
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
    bandwidth: RateFilter,
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
    lossy_rounds: u32,
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
            bandwidth: RateFilter::default(),
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
            lossy_rounds: 0,
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
        self.round.on_ack(sent, bytes, rtt, app_limited);
        if self.phase == Phase::Startup && !app_limited {
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
        if self.phase == Phase::Startup && self.startup_fills_a_queue() {
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
            self.enter_startup();
        }
    }

    /// The size of packets changed.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu.max(1));
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        let window = match self.cap_window() {
            Some(cap) => self.window.min(cap),
            None => self.window,
        };
        (window as u64).max(MINIMUM_PACKETS * self.mtu)
    }

    /// The window a controller begins with.
    pub fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    /// What is known of the path.
    pub fn status(&self) -> RateStatus {
        RateStatus {
            bandwidth: (self.bandwidth.value() * 8.0) as u64,
            base_rtt: self.base.known(),
            loss: self.last.loss,
            competing: matches!(self.phase, Phase::Compete | Phase::CompeteDip),
        }
    }

    /// The window that sends at exactly the cap, whatever the round trip now is.
    fn cap_window(&self) -> Option<f64> {
        let cap = self.options.cap.as_ref()?.load(Ordering::Relaxed);
        let known = cap > 0 && self.smoothed_rtt > 0.0;
        known.then(|| cap as f64 / 8.0 * self.smoothed_rtt)
    }

    fn on_round(&mut self, now: Instant, mut round: RoundSummary) {
        if self.cap_window().is_some_and(|cap| cap < self.window) {
            // The cap held us back: this round says as little as one without data.
            round.app_limited = true;
        }
        self.last = round;
        self.rounds_since_dip = self.rounds_since_dip.saturating_add(1);
        match self.phase {
            Phase::Startup => self.startup_round(now, round),
            Phase::Cruise => self.cruise_round(now, round),
            Phase::Dip => {
                self.seen_empty(now);
                self.phase = Phase::Cruise;
                self.follow(CRUISE_GAIN);
            }
            Phase::Compete => self.compete_round(now, round),
            Phase::CompeteDip => self.compete_dip_round(now, round),
        }
    }

    // Startup

    fn enter_startup(&mut self) {
        self.phase = Phase::Startup;
        self.best_startup_rate = 0.0;
        self.flat_rounds = 0;
        self.queued_rounds = 0;
    }

    fn startup_fills_a_queue(&self) -> bool {
        let base = self.base.seconds();
        self.recent
            .least_rtt()
            .is_some_and(|rtt| rtt - base > (base / 8.0).max(0.003))
    }

    fn startup_round(&mut self, now: Instant, round: RoundSummary) {
        if round.app_limited {
            return;
        }
        if round.rate > 1.15 * self.best_startup_rate {
            self.best_startup_rate = round.rate;
            self.flat_rounds = 0;
        } else {
            self.flat_rounds += 1;
        }
        // A policer drops without ever queueing: then the rate stays, or loss is heavy.
        let many = round.lost_bytes > 8 * self.mtu && round.loss > 0.1;
        if self.flat_rounds >= 3 || many {
            self.leave_startup(now);
        }
    }

    fn leave_startup(&mut self, now: Instant) {
        // The link has been full for the last moments only, so the last half round trip
        // says what it carries.
        let rate = self.recent.rate(self.base.seconds() / 2.0);
        self.bandwidth.reset(rate.unwrap_or(self.best_startup_rate));
        self.phase = Phase::Cruise;
        self.queued_rounds = 0;
        self.forget_growth();
        self.dipped = now;
        self.rounds_since_dip = 0;
        self.follow(CRUISE_GAIN);
    }

    // Cruise

    fn cruise_round(&mut self, now: Instant, round: RoundSummary) {
        let queue = round.least_rtt - self.base.seconds();
        if queue > self.queue_limit() {
            self.queue_round(now, round);
            return;
        }
        self.queued_rounds = 0;
        // What was lost at random used the link all the same.
        let rate = round.rate / (1.0 - round.loss.min(HEAVY_LOSS));
        self.bandwidth.add(rate);
        if round.loss > HEAVY_LOSS && !round.app_limited {
            self.lossy_round(round);
            return;
        }
        self.lossy_rounds = 0;
        if queue < self.base.seconds() / 50.0 {
            self.seen_empty(now);
        }
        if self.grows() {
            self.enter_startup();
        } else if now.saturating_duration_since(self.dipped) > DIP_INTERVAL
            && self.rounds_since_dip > DIP_ROUNDS
        {
            self.phase = Phase::Dip;
            self.window = DIP_GAIN * self.bandwidth.value() * self.base.seconds();
        } else {
            self.follow(CRUISE_GAIN);
        }
    }

    /// A queue beyond our allowance: the newest rate is our share, and the retreat to it
    /// empties the queue within a round, if it is ours.
    fn queue_round(&mut self, now: Instant, round: RoundSummary) {
        self.queued_rounds += 1;
        self.forget_growth();
        if self.queued_rounds == 1 {
            let since = now.saturating_duration_since(self.retreat.at);
            if since > SQUEEZE_INTERVAL || self.retreat.bandwidth < self.bandwidth.value() {
                self.retreat = Retreat {
                    at: now,
                    window: self.window,
                    bandwidth: self.bandwidth.value(),
                };
            }
        }
        if !round.app_limited {
            self.bandwidth.reset(round.rate);
        }
        self.follow(CRUISE_GAIN);
        let squeezed = self.bandwidth.value() < SQUEEZE * self.retreat.bandwidth;
        let again = self.retreat.at != now && self.queued_rounds == 1;
        if self.queued_rounds >= FOREIGN_ROUNDS
            || squeezed && (again || self.competition.known(now))
        {
            self.compete(now);
        }
    }

    fn compete(&mut self, now: Instant) {
        self.phase = Phase::Compete;
        self.seen_empty(now);
        let window = self.retreat.window.max(self.window);
        self.competition.begin(
            now,
            window,
            self.retreat.bandwidth.max(self.bandwidth.value()),
        );
        self.window = self.competition.window(self.smoothed_rtt);
    }

    /// Loss as heavy as this is taken for congestion, until retreating has not helped.
    fn lossy_round(&mut self, round: RoundSummary) {
        self.forget_growth();
        self.lossy_rounds += 1;
        if self.lossy_rounds <= LOSS_RETREAT_ROUNDS {
            self.bandwidth.reset(round.rate);
            self.follow(LOSS_RETREAT_GAIN);
        } else {
            self.follow(CRUISE_GAIN);
            if self.lossy_rounds > LOSS_RETRY_ROUNDS {
                self.lossy_rounds = 0;
            }
        }
    }

    // Compete

    fn compete_round(&mut self, now: Instant, round: RoundSummary) {
        self.bandwidth.reset(round.rate);
        let queue = round.least_rtt - self.base.seconds();
        if round.loss > HEAVY_LOSS {
            self.competition.on_heavy_loss();
        }
        let since = now.saturating_duration_since(self.dipped);
        let waited = match self.competition.measured() {
            true => since > COMPETE_DIP_INTERVAL && self.rounds_since_dip > COMPETE_DIP_ROUNDS,
            false => self.rounds_since_dip > FIRST_DIP_ROUNDS,
        };
        if queue < self.queue_limit() / 2.0 {
            self.cruise_again();
        } else if waited && queue > self.queue_limit() {
            self.phase = Phase::CompeteDip;
            self.window = self.competition.begin_dip(self.window, queue, round.rate);
        }
    }

    fn compete_dip_round(&mut self, now: Instant, round: RoundSummary) {
        self.seen_empty(now);
        let queue = round.least_rtt - self.base.seconds();
        if self.competition.end_dip(now, queue) {
            self.cruise_again();
        } else {
            self.phase = Phase::Compete;
            self.window = self.competition.window(self.smoothed_rtt);
        }
    }

    fn cruise_again(&mut self) {
        self.phase = Phase::Cruise;
        self.queued_rounds = 0;
        self.forget_growth();
        self.follow(CRUISE_GAIN);
    }

    // Common to all phases

    /// Whether the bandwidth grew so much lately that a startup is the faster way up.
    fn grows(&mut self) -> bool {
        let bandwidth = self.bandwidth.value();
        let grown = self.former_bandwidth > 0.0 && bandwidth > GROWTH * self.former_bandwidth;
        self.former_rounds += 1;
        if self.former_rounds >= GROWTH_ROUNDS || self.former_bandwidth == 0.0 {
            self.former_rounds = 0;
            self.former_bandwidth = bandwidth;
        }
        grown
    }

    fn forget_growth(&mut self) {
        self.former_bandwidth = 0.0;
    }

    fn seen_empty(&mut self, now: Instant) {
        self.dipped = now;
        self.rounds_since_dip = 0;
    }

    /// Seconds of queue that are more than our own allowance and the noise of timers.
    fn queue_limit(&self) -> f64 {
        self.base.seconds() * 0.15 + 0.004
    }

    fn follow(&mut self, gain: f64) {
        let rate = self.bandwidth.value();
        // Acknowledgements come for two packets at a time, timers up to a millisecond late.
        let slack = 2.0 * self.mtu as f64 + rate * 0.001;
        self.window = gain * rate * self.base.seconds() + slack;
    }
}
