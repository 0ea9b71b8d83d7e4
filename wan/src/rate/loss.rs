//! Whose loss is it? On a long link some packets are lost whatever we do; before a short
//! queue, others are lost because we send too much. The round trip does not tell them
//! apart when the queue is short, so we ask the path: when there is more loss than lately,
//! the window falls just below what the link delivers, for a few hundred packets. If that
//! ends most of the loss it was ours, and from then on we keep less in flight than usual.
//! If it does not, the loss is the path's: we make up for it and ask again only later.

use std::time::{Duration, Instant};

use super::estimate::RoundSummary;

/// Packets after which a part of lost ones means something.
const SAMPLE_PACKETS: u64 = 400;
/// So many lost packets in a sample mean something at once.
const CLEAR_PACKETS: u64 = 32;
/// Loss up to this is not asked about.
const TOLERATED: f64 = 0.015;
/// Beyond this no path is worth its name: we retreat, whoever is to blame.
pub(super) const INTOLERABLE: f64 = 0.25;
/// How long an answer holds.
const MEMORY: Duration = Duration::from_secs(20);
/// How long a lowered surplus is kept until a little more is tried.
const CALM: Duration = Duration::from_secs(4);

/// What a round's loss asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suspicion {
    /// Nothing new.
    None,
    /// Ask the path: keep a little less than its rate in flight.
    Ask,
    /// More than [`INTOLERABLE`].
    Retreat,
}

/// What the path answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Not enough packets yet.
    Pending,
    /// The loss went when we sent less.
    Ours,
    /// The loss stayed: we had this bandwidth before, and may have it again.
    Theirs,
}

#[derive(Debug, Clone)]
pub(super) struct LossJudge {
    delivered: u64,
    lost: u64,
    /// Loss that is the path's own.
    random: f64,
    tolerated: f64,
    answered: Instant,
    /// Part of the usual surplus over the bandwidth-delay product that we keep in flight.
    surplus: f64,
    lowered: Instant,
    /// Loss before the question, and rounds since it.
    before: f64,
    rounds: u32,
}

impl LossJudge {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            delivered: 0,
            lost: 0,
            random: 0.0,
            tolerated: TOLERATED,
            answered: now,
            surplus: 1.0,
            lowered: now,
            before: 0.0,
            rounds: 0,
        }
    }

    /// Part of the packets that the path loses whatever we do.
    pub(super) fn random(&self) -> f64 {
        self.random
    }

    /// Part of the usual surplus that the queue has room for, 0 to 1.
    pub(super) fn surplus(&self) -> f64 {
        self.surplus
    }

    /// A round at full window.
    pub(super) fn judge(&mut self, now: Instant, round: RoundSummary, mtu: u64) -> Suspicion {
        let Some(loss) = self.sample(round, mtu) else {
            return Suspicion::None;
        };
        if now.saturating_duration_since(self.answered) > MEMORY {
            self.tolerated = TOLERATED;
        }
        if loss > INTOLERABLE && self.tolerated > TOLERATED {
            return Suspicion::Retreat;
        }
        if loss > self.tolerated {
            self.before = loss;
            self.rounds = 0;
            return Suspicion::Ask;
        }
        self.random += (loss - self.random) / 8.0;
        if self.surplus < 1.0 && now.saturating_duration_since(self.lowered) > CALM {
            self.lowered = now;
            self.surplus = (self.surplus * 1.25 + 0.05).min(1.0);
        }
        Suspicion::None
    }

    /// A round after [`Suspicion::Ask`].
    pub(super) fn answer(&mut self, now: Instant, round: RoundSummary, mtu: u64) -> Answer {
        self.rounds += 1;
        if self.rounds == 1 {
            // These packets left before the window fell.
            return Answer::Pending;
        }
        let Some(loss) = self.sample(round, mtu) else {
            return Answer::Pending;
        };
        self.answered = now;
        if loss < 0.5 * self.before {
            self.surplus *= 0.5;
            self.lowered = now;
            return Answer::Ours;
        }
        self.random = loss.min(INTOLERABLE);
        self.tolerated = 1.5 * loss.max(self.before) + 0.01;
        Answer::Theirs
    }

    /// Loss over the rounds since the last sample, once they are enough.
    fn sample(&mut self, round: RoundSummary, mtu: u64) -> Option<f64> {
        self.delivered += round.delivered_bytes;
        self.lost += round.lost_bytes;
        let whole = self.delivered + self.lost;
        let clear = self.lost > CLEAR_PACKETS * mtu && self.lost > whole / 10;
        if whole < SAMPLE_PACKETS * mtu && !clear {
            return None;
        }
        let loss = self.lost as f64 / whole.max(1) as f64;
        self.delivered = 0;
        self.lost = 0;
        Some(loss)
    }
}
