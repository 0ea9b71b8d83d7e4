//! What the controller does at the end of a round, phase by phase.

use std::time::{Duration, Instant};

use super::compete::Finding;
use super::estimate::RoundSummary;
use super::loss::{Answer, INTOLERABLE, Suspicion};
use super::{OVERFLOW, Phase, RateController, Retreat};

/// Window over bandwidth-delay product while all is well. The surplus is the queue we
/// allow ourselves, the slack for late timers, and the speed at which growth is found.
const CRUISE_GAIN: f64 = 1.06;
/// The dip that lets the queue run empty.
const DIP_GAIN: f64 = 0.85;
/// While the path is asked whose the loss is.
const ASK_GAIN: f64 = 0.97;
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
/// What we leave of a path that loses more than any should.
const RETREAT_GAIN: f64 = 0.8;

impl RateController {
    // Startup

    pub(super) fn enter_startup(&mut self) {
        self.phase = Phase::Startup;
        self.best_startup_rate = 0.0;
        self.flat_rounds = 0;
        self.queued_rounds = 0;
    }

    pub(super) fn startup_fills_a_queue(&self) -> bool {
        let base = self.base.seconds();
        self.recent
            .least_rtt()
            .is_some_and(|rtt| rtt - base > (base / 8.0).max(0.003))
    }

    pub(super) fn startup_round(&mut self, now: Instant, round: RoundSummary) {
        self.quiet_rtt = match self.quiet_rtt {
            0.0 => round.mean_rtt,
            quiet => quiet.min(round.mean_rtt),
        };
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

    pub(super) fn leave_startup(&mut self, now: Instant) {
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

    pub(super) fn cruise_round(&mut self, now: Instant, round: RoundSummary) {
        if std::mem::take(&mut self.after_dip) {
            self.quiet_rtt = round.mean_rtt;
        }
        let queue = round.least_rtt - self.base.seconds();
        if queue > self.queue_limit() {
            self.queue_round(now, round);
            return;
        }
        self.queued_rounds = 0;
        // What was lost at random used the link all the same.
        let rate = round.rate / (1.0 - self.losses.random());
        match self.losses.judge(now, round, self.mtu) {
            Suspicion::None => self.bandwidth.add(rate),
            // It was not the window that lost so much, and a smaller one would tell nothing.
            _ if round.app_limited && !self.capped() => self.bandwidth.add(round.rate),
            Suspicion::Ask => {
                self.phase = Phase::Ask;
                self.forget_growth();
                self.bandwidth_before_ask = self.bandwidth.value();
                self.bandwidth.reset(round.rate);
                self.window = ASK_GAIN * round.rate * self.base.seconds();
                return;
            }
            Suspicion::Retreat => {
                self.forget_growth();
                self.bandwidth.reset(RETREAT_GAIN * round.rate);
            }
        }
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

    pub(super) fn ask_round(&mut self, now: Instant, round: RoundSummary) {
        match self.losses.answer(now, round, self.mtu) {
            Answer::Pending => return,
            Answer::Ours => {}
            Answer::Theirs => self.bandwidth.add(self.bandwidth_before_ask),
        }
        self.cruise_again();
    }

    // Compete

    pub(super) fn compete_round(&mut self, now: Instant, round: RoundSummary) {
        match round.app_limited {
            // Who sends little learns little of its share.
            true => self.bandwidth.add(round.rate),
            false => self.bandwidth.reset(round.rate),
        }
        let queue = round.least_rtt - self.base.seconds();
        self.competition.on_loss(round.loss > INTOLERABLE);
        let lost = (round.loss - self.losses.random()).max(0.0);
        self.competition.observe(now, round.least_rtt, lost);
        let since = now.saturating_duration_since(self.dipped);
        let waited = match self.competition.measured() {
            true => since > COMPETE_DIP_INTERVAL && self.rounds_since_dip > COMPETE_DIP_ROUNDS,
            false => self.rounds_since_dip > FIRST_DIP_ROUNDS,
        };
        if self
            .competition
            .has_ended(now, queue < self.queue_limit() / 2.0)
        {
            self.cruise_again();
        } else if waited && queue > self.queue_limit() && !round.app_limited {
            self.phase = Phase::CompeteDip;
            self.window = self.competition.begin_dip(self.window, queue, round.rate);
        }
    }

    pub(super) fn compete_dip_round(&mut self, now: Instant, round: RoundSummary) {
        self.seen_empty(now);
        if round.app_limited {
            // It was not the window that the queue had to do without.
            self.competition.drop_dip();
        }
        let queue = round.least_rtt - self.base.seconds();
        let overflows = round.loss > self.losses.random() + OVERFLOW;
        match self.competition.end_dip(now, queue, overflows) {
            Finding::Alone => self.cruise_again(),
            Finding::Shared => {
                self.phase = Phase::Compete;
                self.window = self.competition.window(self.smoothed_rtt);
            }
            Finding::NoQueue => {
                // The path has become longer, or is unsteady by this much.
                self.base.reset(now, round.least_rtt);
                self.cruise_again();
            }
        }
    }

    pub(super) fn cruise_again(&mut self) {
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

    pub(super) fn seen_empty(&mut self, now: Instant) {
        self.dipped = now;
        self.rounds_since_dip = 0;
    }

    /// What may pass for a path without a queue: others' queues must not.
    fn quiet_limit(&self) -> f64 {
        self.base.seconds() * 1.2 + 0.002
    }

    /// Seconds of queue that are more than our own allowance and the noise of timers.
    fn queue_limit(&self) -> f64 {
        self.base.seconds() * 0.15 + 0.004
    }

    pub(super) fn follow(&mut self, gain: f64) {
        let rate = self.bandwidth.value();
        // Acknowledgements come for two packets at a time, timers up to a millisecond late.
        let slack = 2.0 * self.mtu as f64 + rate * 0.001;
        let surplus = self.losses.surplus();
        let product = rate
            * self
                .quiet_rtt
                .clamp(self.base.seconds(), self.quiet_limit());
        self.window = product + surplus * ((gain - 1.0) * product + slack);
    }
}
