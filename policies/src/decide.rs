//! (policy, measured facts) -> what to do next, and why.
//!
//! Continuous protection asks [`next_cut`] after every event; a planned move asks
//! [`next_move_step`] after every round; the status asks [`rpo_alert`]. Facts
//! are ages and measured values, so nothing here needs a clock. [`Measured`]
//! keeps the measured times that the answers rest on.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::policy::Policy;

/// Of a guest's time, pauses take at most one part in so many.
const PAUSE_SHARE: u32 = 20;
/// Two cuts lie at least so far apart.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(500);
/// The interval keeps a reserve: one part in so many of the RPO.
const RESERVE_SHARE: u32 = 10;
/// The first wait after a failed cut; it doubles with every failure...
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
/// ...up to this.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);
/// A cut may fill this share (in percent) of the capture buffer by estimate, as estimates err.
const BUFFER_SHARE: u64 = 60;
/// A round has shrunk what is left if that is now under this share (in percent) of before.
const SHRUNK: u64 = 80;
/// A guest that runs freely and writes more than this share (in percent) of what the
/// link carries is throttled: a round leaves about that share of the one before, so
/// at a third the rounds after the first take half as long as that one, all together.
const KEEPS_UP: u64 = 33;
/// A last cut by estimate within this share (in percent) of what the policy allows is
/// made at once; between that and all of it, once rounds leave less no more: estimates err.
const EASILY: u32 = 80;
/// Rounds go on while what is left is more than this share (in percent) of what they
/// come down to, however slowly.
const NEAR: u64 = 125;
/// A round that left more than this share (in percent) of the one before won nothing.
const WON: u128 = 98;
/// Where a round takes so long, no throttle is tried out: what a guest writes
/// again within the round counts once, so the rate is at least what was measured,
/// and each guess that is too low costs such a round.
const LONG_ROUND: Duration = Duration::from_secs(1);
/// Rounds after which a move ends whatever is left.
const MOST_ROUNDS: u32 = 30;
/// A throttle grows by at least so many percent of the guest's time...
const THROTTLE_STEP: u8 = 5;
/// ...and by so many where it is not known how fast the guest writes.
const BLIND_STEP: u8 = 20;

/// A time that is measured again and again: mean and deviation, as TCP keeps
/// its round-trip time (RFC 6298).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    mean: Option<f64>,
    deviation: f64,
}

impl Measured {
    /// Takes in one measurement.
    pub fn observe(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        match self.mean {
            None => (self.mean, self.deviation) = (Some(time), time / 2.0),
            Some(mean) => {
                self.deviation += ((time - mean).abs() - self.deviation) / 4.0;
                self.mean = Some(mean + (time - mean) / 8.0);
            }
        }
    }

    /// The mean, `None` before the first measurement.
    pub fn mean(&self) -> Option<Duration> {
        self.mean
            .and_then(|mean| Duration::try_from_secs_f64(mean).ok())
    }

    /// What the next will rarely exceed, `otherwise` before the first measurement.
    pub fn expect(&self, otherwise: Duration) -> Duration {
        let bound = self.mean.map(|mean| mean + 2.0 * self.deviation);
        bound
            .and_then(|bound| Duration::try_from_secs_f64(bound).ok())
            .unwrap_or(otherwise)
    }
}

/// What is known when the next cut is to be planned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CutFacts {
    /// Age of the newest sealed cut; `None` while nothing is sealed.
    pub sealed_age: Option<Duration>,
    /// Time since the newest cut was made, sealed or not; `None` before the first.
    pub since_cut: Option<Duration>,
    /// A cut was made and is not yet sealed, nor given up.
    pub in_flight: bool,
    /// Time from a cut until it is sealed: [`Measured::expect`].
    pub expected_seal: Duration,
    /// Pause of a cut: [`Measured::expect`].
    pub expected_pause: Duration,
    /// Cuts that failed since the last that was sealed.
    pub failures: u32,
    /// Time since the newest failure.
    pub since_failure: Duration,
    /// Bytes that a cut now would have to keep until the link has taken them.
    pub expected_bytes: u64,
    /// The same as the round before this one found it; `None` after a cut.
    pub bytes_before_round: Option<u64>,
    /// What the capture buffer already holds.
    pub buffered: u64,
}

/// What to do next for a protected group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum NextCut {
    /// Cut now.
    Cut,
    /// A round first, the guest running: a cut now would overflow the capture buffer.
    Round {
        /// The last round left less than it found. If false, the guest writes
        /// faster than the link carries: the RPO stretches until it calms down.
        shrinking: bool,
    },
    /// Nothing yet; ask again after this time at the latest.
    Wait {
        /// How long.
        for_time: Duration,
        /// Why.
        reason: WaitReason,
    },
}

/// Why nothing is done yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// The newest cut is still on its way.
    InFlight,
    /// Cuts failed: the next try is later each time.
    BackOff,
    /// The next cut is due later.
    NotDue,
}

/// Plans the next cut.
///
/// Just before a cut is sealed the newest sealed one is at its oldest: interval
/// plus time to seal. So cuts lie the RPO minus that time (and a reserve) apart,
/// but never so close that pauses would cost the guest more than a twentieth of
/// its time: then the RPO stretches, and [`rpo_alert`] says so.
pub fn next_cut(policy: &Policy, facts: &CutFacts) -> NextCut {
    let wait = |for_time, reason| NextCut::Wait { for_time, reason };
    if facts.in_flight {
        return wait(policy.rpo.duration(), WaitReason::InFlight);
    }
    let back_off = back_off(facts.failures).saturating_sub(facts.since_failure);
    if !back_off.is_zero() {
        return wait(back_off, WaitReason::BackOff);
    }
    let due = match facts.since_cut {
        // After a failure the RPO runs on: what counts is the back-off alone.
        _ if facts.failures > 0 => Duration::ZERO,
        Some(since_cut) if facts.sealed_age.is_some() => {
            interval(policy, facts.expected_seal, facts.expected_pause).saturating_sub(since_cut)
        }
        _ => Duration::ZERO,
    };
    if !due.is_zero() {
        return wait(due, WaitReason::NotDue);
    }
    let buffer = policy.capture_buffer.bytes();
    let needed = facts.expected_bytes.saturating_add(facts.buffered);
    let shrinking = facts
        .bytes_before_round
        .is_none_or(|before| shrunk(before, facts.expected_bytes));
    // Where rounds win nothing more, a cut that may just fit beats none at all.
    let room = if shrinking {
        buffer / 100 * BUFFER_SHARE
    } else {
        buffer
    };
    if needed > room {
        return NextCut::Round { shrinking };
    }
    NextCut::Cut
}

/// Time from one cut to the next.
pub fn interval(policy: &Policy, expected_seal: Duration, expected_pause: Duration) -> Duration {
    let rpo = policy.rpo.duration();
    let wanted = rpo
        .saturating_sub(rpo / RESERVE_SHARE)
        .saturating_sub(expected_seal);
    wanted
        .max(SHORTEST_INTERVAL)
        .max(expected_pause.saturating_mul(PAUSE_SHARE))
}

/// How long to wait after so many failures in a row.
pub fn back_off(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        failures => FIRST_BACK_OFF
            .saturating_mul(1 << (failures - 1).min(6))
            .min(LONGEST_BACK_OFF),
    }
}

fn shrunk(before: u64, now: u64) -> bool {
    u128::from(now) * 100 < u128::from(before) * u128::from(SHRUNK)
}

/// What is known after a round of a planned move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoveFacts {
    /// Rounds done so far.
    pub rounds: u32,
    /// Bytes on the link that a last cut now would need.
    pub remaining_bytes: u64,
    /// The same after the round before; `None` after the first, and after one
    /// in which the throttle changed: part of what that one found was written
    /// at another speed.
    pub remaining_before: Option<u64>,
    /// Bytes a second that the guest's changes need on the link, measured over
    /// the last round at the present throttle; 0 if that is not known.
    pub dirty_bytes_per_second: u64,
    /// Bytes a second that the link was measured to carry; 0 if it carries none.
    pub link_bytes_per_second: u64,
    /// What a last cut costs whatever is left: device state, start at the target.
    pub fixed: Duration,
    /// What a round takes whatever it carries: the guest writes on meanwhile.
    pub overhead: Duration,
    /// Percent of its time that the guest is throttled by now.
    pub throttle: u8,
}

/// What to do next in a planned move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum MoveStep {
    /// Stop the guest, send the rest, run it at the target.
    LastCut {
        /// How long it will run nowhere, by estimate.
        expected_blackout: Duration,
        /// That is within the policy. If not, more rounds would not help, and
        /// whoever asked for the move accepted it.
        within: bool,
    },
    /// Another round while the guest runs.
    Round,
    /// Take so many percent of the guest's time, then another round.
    Throttle {
        /// Percent of its time that the guest loses.
        percent: u8,
    },
    /// More rounds would not help, and a last cut would take longer than the
    /// policy allows: leave the guest running where it is, and say so.
    TooLong {
        /// How long it would run nowhere, by estimate.
        expected_blackout: Duration,
    },
    /// The link carries nothing: give the move up, or wait for the link.
    LinkDown,
}

/// Plans the next step of a planned move, so that it ends soon: a guest whose
/// rounds would shrink slowly is throttled, within the policy, by as much as the
/// measured rates ask for; rounds go on as long as they leave less each time, or
/// come down to what fits the blackout with ease; then the last cut. One that takes longer than
/// the policy wants is planned only when that is accepted (`accept_pause`).
pub fn next_move_step(policy: &Policy, facts: &MoveFacts, accept_pause: bool) -> MoveStep {
    if facts.link_bytes_per_second == 0 {
        return MoveStep::LinkDown;
    }
    let expected_blackout = expected_blackout(facts);
    let within = expected_blackout <= policy.max_blackout.duration();
    let end = match within || accept_pause {
        true => MoveStep::LastCut {
            expected_blackout,
            within,
        },
        false => MoveStep::TooLong { expected_blackout },
    };
    // Where the fixed part alone is too long, rounds cannot mend it; who accepts
    // that still wants the rest to be small beside it.
    let rest = expected_blackout.saturating_sub(facts.fixed);
    let fixed_too_long = facts.fixed >= policy.max_blackout.duration();
    let too_long_anyway = fixed_too_long && (!accept_pause || rest < facts.fixed / 10);
    let shrinks = facts
        .remaining_before
        .is_none_or(|before| shrunk(before, facts.remaining_bytes));
    let easily = expected_blackout <= policy.max_blackout.duration() / 100 * EASILY;
    let fits = within && (easily || !shrinks);
    if fits || too_long_anyway || facts.rounds >= MOST_ROUNDS {
        return end;
    }
    if within {
        return MoveStep::Round;
    }
    let may_throttle = facts.throttle < policy.max_throttle;
    if may_throttle && outruns(facts) {
        return throttle(policy, facts);
    }
    if shrinks || more_rounds_serve(policy, facts) {
        return MoveStep::Round;
    }
    match may_throttle {
        true => throttle(policy, facts),
        false => end,
    }
}

/// Bytes that rounds come down to at the measured rates, in the end: in such a
/// round the link carries what the guest writes in it. `None`: to nothing, as
/// the guest writes faster, or it is not known how fast.
fn rounds_come_down_to(facts: &MoveFacts) -> Option<u64> {
    let (dirty, link) = (facts.dirty_bytes_per_second, facts.link_bytes_per_second);
    let spare = link.checked_sub(dirty).filter(|spare| *spare > 0)?;
    let written = dirty as f64 * facts.overhead.as_secs_f64();
    // A float that is too large for the type becomes its largest value.
    (dirty > 0).then_some((written * link as f64 / spare as f64) as u64)
}

/// Rounds that hardly shrink any more still do where their end fits the
/// blackout, and while there is something to win on the way there.
fn more_rounds_serve(policy: &Policy, facts: &MoveFacts) -> bool {
    let (Some(end), Some(before)) = (rounds_come_down_to(facts), facts.remaining_before) else {
        return false;
    };
    let at_the_end = MoveFacts {
        remaining_bytes: end,
        ..*facts
    };
    let (left, before) = (u128::from(facts.remaining_bytes), u128::from(before));
    let far = left * 100 > u128::from(end) * u128::from(NEAR);
    // Far from where the figures say that rounds end, one that won nothing shows the
    // figures wrong.
    match far {
        true => left * 100 <= before * WON,
        false => expected_blackout(&at_the_end) <= policy.max_blackout.duration(),
    }
}

/// Does the guest write so fast that rounds shrink slowly, or not at all? Not
/// believed of a round in which the throttle changed.
fn outruns(facts: &MoveFacts) -> bool {
    let settled = facts.throttle == 0 || facts.remaining_before.is_some();
    // Once throttled, it need not be measured to be just what was aimed at.
    let share = if facts.throttle == 0 {
        KEEPS_UP
    } else {
        KEEPS_UP * 3 / 2
    };
    let link = u128::from(facts.link_bytes_per_second);
    settled && u128::from(facts.dirty_bytes_per_second) * 100 > link * u128::from(share)
}

/// The throttle under which rounds shrink fast and what one leaves fits the
/// blackout, if the guest writes as much less as it runs less; at least a step
/// more than now. All that the policy allows while rounds are long.
fn throttle(policy: &Policy, facts: &MoveFacts) -> MoveStep {
    let seconds = |time: Duration| time.as_secs_f64().max(1e-3);
    let room = policy
        .max_blackout
        .duration()
        .saturating_sub(facts.fixed)
        .max(facts.fixed / 10);
    // A round over such a rest takes so long, and the guest writes on in it.
    let round = seconds(facts.overhead) + seconds(room);
    let fits = SHRUNK as f64 / 100.0 * seconds(room) / round;
    let wanted = facts.link_bytes_per_second as f64 * fits.min(KEEPS_UP as f64 / 100.0);
    let runs = f64::from(100 - facts.throttle.min(99)) / 100.0;
    let freely = facts.dirty_bytes_per_second as f64 / runs;
    let (needed, step) = match freely > 0.0 {
        true => (100.0 * (1.0 - wanted / freely), THROTTLE_STEP),
        false => (0.0, BLIND_STEP),
    };
    let least = facts.throttle.saturating_add(step);
    let rest = expected_blackout(facts).saturating_sub(facts.fixed);
    let percent = match rest >= LONG_ROUND {
        true => policy.max_throttle,
        // A float that is too large for the type becomes its largest value.
        false => least.max(needed.ceil() as u8).min(policy.max_throttle),
    };
    MoveStep::Throttle { percent }
}

/// How long the guest would run nowhere if the last cut were now.
pub fn expected_blackout(facts: &MoveFacts) -> Duration {
    let nanos = u128::from(facts.remaining_bytes) * 1_000_000_000
        / u128::from(facts.link_bytes_per_second.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).saturating_add(facts.fixed)
}

/// How a group stands against its RPO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Alert {
    /// As promised, or a little late.
    Fine,
    /// The newest sealed point is older than twice the RPO.
    Warning,
    /// Older than three times the RPO.
    Critical,
    /// Nothing is sealed: there is nothing to fail over to.
    Unprotected,
}

impl fmt::Display for Alert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Alert::Fine => "fine",
            Alert::Warning => "warning: the newest point is older than twice the RPO",
            Alert::Critical => "critical: the newest point is older than three times the RPO",
            Alert::Unprotected => "unprotected: no point is sealed yet",
        })
    }
}

/// Compares the age of the newest sealed cut with the policy.
pub fn rpo_alert(policy: &Policy, sealed_age: Option<Duration>) -> Alert {
    let rpo = policy.rpo.duration();
    match sealed_age {
        None => Alert::Unprotected,
        Some(age) if age > rpo.saturating_mul(3) => Alert::Critical,
        Some(age) if age > rpo.saturating_mul(2) => Alert::Warning,
        Some(_) => Alert::Fine,
    }
}
