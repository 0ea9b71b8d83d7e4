//! Before the last cut of a planned move: rounds while the guest runs, each
//! leaving less, until what is left fits into the blackout that the policy
//! allows ([`super::rounds`] has what a round is). A guest whose changes the
//! link does not carry with ease is throttled, from the beginning.
//!
//! What is expected, and the figures that this rests on, are in the status all
//! the while ([`MoveOutlook`]). A blackout that the policy does not allow is
//! told before anything is done, and the move ends there unless whoever asked
//! for it accepted that.

use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::decide::{MoveFacts, MoveStep, expected_blackout, next_move_step};
use farhaven_policies::policy::Policy;
use tokio::sync::OwnedSemaphorePermit;

use super::commands::Convoy;
use super::cut::{Sealed, Seen};
use super::driver::{Attached, DriveError, Driver};
use super::remote::AskError;
use super::rounds::{Rounds, left_after, per_second};
use super::steps::blocking;
use super::view::{MoveOutlook, bytes};
use crate::guest::After;

/// What a last cut costs whatever is left, beside a round trip: device state, sealing,
/// restoring. Measured are 95 to 135 ms on a machine at rest.
pub(super) const HAND_OVER: Duration = Duration::from_millis(150);

/// How often a move looks whether its turn for the last cut has come.
const TURN: Duration = Duration::from_millis(200);

/// A round that took less is cheap enough to look again, so often in all.
const SHORT_LOOK: Duration = Duration::from_secs(2);
const LOOKS: usize = 4;

/// A link that carries less than this share of what it was known for is looked at
/// again before a last cut relies on it: until it has settled, even that is too much.
const FELL: f64 = 0.5;

/// Bytes of a cut or a round from which on the time they took tells the link's rate.
const TELLING_BYTES: u64 = 1 << 20;

/// How a move came to its last cut.
pub(super) struct Converged {
    /// For the report: what was taken of the guest, what will take longer.
    pub(super) note: String,
    /// How long it should run nowhere.
    pub(super) expected: Duration,
    /// Its turn among the last cuts of a convoy.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

/// Rounds while the guest runs, until the last cut keeps within the policy or
/// more of them would not help. What the policy allows of the guest's time is
/// taken before it is told that the last cut will be longer than it wants:
/// that is an error, or comes back for the report when it was accepted.
pub(super) async fn converge(
    driver: &mut Driver,
    attached: &mut Attached,
    accept_pause: bool,
    convoy: Option<&Convoy>,
) -> Result<Converged, DriveError> {
    let policy = driver.protection.policy.clone();
    let sealed = match attached.sealed {
        // Else one more tells what it writes to its disks, which its rounds do not.
        Some(sealed) if sealed.seen != Seen::MemoryRoughly => sealed,
        _ => driver.point(attached, After::Continue).await?,
    };
    let mut rounds = Rounds::after(driver, sealed);
    // What the rounds before left, the newest last.
    let mut before: [Option<u64>; LOOKS] = [None; LOOKS];
    let (mut throttled, mut done) = (0, 0);
    // The newest point tells already whether the guest writes too fast for this link.
    let known = rounds.before_the_next(driver);
    if let MoveStep::Throttle { percent } = next_move_step(&policy, &known, accept_pause)
        && sealed.seen == Seen::Since
    {
        hold_back(driver, attached, percent).await?;
        throttled = percent;
    }
    let mut link = known.link_bytes_per_second;
    let mut unsettled = 0;
    loop {
        if let Some(why) = convoy.and_then(Convoy::why_given_up) {
            return Err(DriveError::GivenUp(why));
        }
        let began = Instant::now();
        let found = rounds.next(driver, attached).await?;
        done += 1;
        // A throttled guest runs in turns, so one short look may find three times what
        // the one before found: some of them that win nothing are needed to end.
        let looks = if began.elapsed() < SHORT_LOOK {
            LOOKS
        } else {
            1
        };
        let facts = MoveFacts {
            rounds: done,
            remaining_before: before.into_iter().rev().take(looks).flatten().max(),
            throttle: throttled,
            ..convoy.map_or(found, |convoy| convoy.with_others(found))
        };
        let outlook = outlook(&policy, &facts);
        tracing::info!(guest = %driver.record.name, ?outlook, "a round of the move");
        driver.view.send_modify(|v| v.outlook = Some(outlook));
        let now = facts.link_bytes_per_second;
        let fallen = fell(std::mem::replace(&mut link, now), now);
        before.rotate_left(1);
        before[LOOKS - 1] = Some(facts.remaining_bytes);
        match next_move_step(&policy, &facts, accept_pause) {
            MoveStep::Round => {}
            MoveStep::LastCut {
                within,
                expected_blackout,
            } => {
                if within && fallen && unsettled < LOOKS {
                    unsettled += 1;
                    continue;
                }
                let turn = convoy.map(Convoy::turn);
                if matches!(turn, Some(None)) {
                    // Another guest stands still. Rounds go on, so that the last
                    // cut is small when its turn has come.
                    driver.interruptible(tokio::time::sleep(TURN)).await?;
                    done -= 1;
                    continue;
                }
                let note = match within {
                    true => slowed(throttled),
                    false => too_long(&policy, &facts, convoy.is_some()),
                };
                if !within {
                    tracing::warn!(guest = %driver.record.name, "{note}");
                    driver.view.send_modify(|v| v.trouble.clone_from(&note));
                }
                return Ok(Converged {
                    note,
                    expected: expected_blackout,
                    turn: turn.flatten(),
                });
            }
            MoveStep::TooLong { .. } => {
                return Err(DriveError::TooLong(too_long(
                    &policy,
                    &facts,
                    convoy.is_some(),
                )));
            }
            MoveStep::Throttle { percent } => {
                hold_back(driver, attached, percent).await?;
                throttled = percent;
                // Part of what the next round finds was written before now.
                before = [None; LOOKS];
            }
            MoveStep::LinkDown => {
                return Err(AskError::Unreachable(driver.protection.to.clone()).into());
            }
        }
    }
}

/// Is what a link carries now so much less than what it was known for that it may
/// still be falling?
fn fell(before: u64, now: u64) -> bool {
    (now as f64) < before as f64 * FELL
}

async fn hold_back(
    driver: &Driver,
    attached: &mut Attached,
    percent: u8,
) -> Result<(), DriveError> {
    throttle(attached, percent).await?;
    driver.view.send_modify(|v| v.trouble = slowed(percent));
    Ok(())
}

/// What the point that was just sealed tells of the guest and the link, as of
/// a first round of a guest that runs freely.
pub(super) fn measured(driver: &Driver, sealed: &Sealed) -> MoveFacts {
    let rtt = driver.remote.peer.status().rtt.unwrap_or_default();
    let shown = outright(driver, sealed.final_bytes, sealed.took);
    let rate = link_rate(told_rate(driver), shown);
    let changed = changed_by(sealed);
    let carried = Duration::try_from_secs_f64(sealed.final_bytes as f64 / rate.max(1) as f64);
    MoveFacts {
        rounds: 0,
        remaining_bytes: left_after(changed, sealed.since_before, sealed.took),
        remaining_before: None,
        dirty_bytes_per_second: per_second(changed, sealed.since_before),
        link_bytes_per_second: rate,
        fixed: HAND_OVER + rtt,
        overhead: sealed.took.saturating_sub(carried.unwrap_or_default()),
        throttle: 0,
    }
}

/// Bytes on the link of what the guest wrote since the look before that cut. All of a
/// first copy is not what it wrote, and of disks that rounds do not read it is no look.
fn changed_by(sealed: &Sealed) -> u64 {
    match sealed.seen {
        Seen::Since => sealed.sent_bytes,
        Seen::Roughly => sealed.final_bytes,
        Seen::MemoryRoughly => sealed.final_bytes.saturating_sub(sealed.disk_bytes),
    }
}

/// What the transport tells of the link, bytes a second, and no more than the site's
/// limit lets through; 0 while it knows nothing.
pub(super) fn told_rate(driver: &Driver) -> u64 {
    let link = driver.remote.peer.status();
    let rtt = link.rtt.unwrap_or_default().as_secs_f64().max(1e-4);
    let by_window = link.congestion_window_bytes.unwrap_or(0) as f64 / rtt;
    // The window has room for more than the path carries.
    let told = match link.path.map(|path| path.bandwidth as f64 / 8.0) {
        Some(told) if told > 0.0 => told.min(by_window) as u64,
        _ => by_window as u64,
    };
    within_limit(driver, told)
}

/// The last cut of a move heeds the site's limit, which may be another by now than
/// when a rate was measured.
fn within_limit(driver: &Driver, rate: u64) -> u64 {
    rate.min(driver.site.limits.together().unwrap_or(u64::MAX))
}

/// Bytes a second that a round or a cut showed outright, if it was large enough
/// to show anything. A policy's cap holds both back, but not the last cut.
pub(super) fn outright(driver: &Driver, bytes: u64, took: Duration) -> Option<u64> {
    let told = bytes >= TELLING_BYTES && !driver.site.limits.holds_back(driver.record.id);
    let rate = bytes as f64 / took.as_secs_f64().max(1e-3);
    told.then(|| within_limit(driver, rate as u64))
}

/// What the transport tells, held against what a cut showed: at least that, and
/// twice as much at most.
fn link_rate(told: u64, shown: Option<u64>) -> u64 {
    match shown.filter(|_| told > 0) {
        Some(shown) => told.clamp(shown, shown.saturating_mul(2)),
        None => told,
    }
}

/// For people and programs.
pub(super) fn outlook(policy: &Policy, facts: &MoveFacts) -> MoveOutlook {
    let expected = expected_blackout(facts);
    MoveOutlook {
        rounds: facts.rounds,
        remaining_bytes: facts.remaining_bytes,
        dirty_bytes_per_s: facts.dirty_bytes_per_second,
        rough: false,
        link_bytes_per_s: facts.link_bytes_per_second,
        throttle_percent: facts.throttle,
        max_throttle_percent: policy.max_throttle,
        expected_blackout_ms: expected.as_secs_f64() * 1e3,
        max_blackout_ms: policy.max_blackout.duration().as_secs_f64() * 1e3,
        within: expected <= policy.max_blackout.duration(),
        at: super::unix_ns(SystemTime::now()),
    }
}

fn slowed(percent: u8) -> String {
    match percent {
        0 => String::new(),
        _ => format!("the guest was throttled by {percent} % so that the move comes to its end"),
    }
}

/// What to tell before a last cut that takes longer than the policy wants.
fn too_long(policy: &Policy, facts: &MoveFacts, in_group: bool) -> String {
    let throttled = match facts.throttle {
        0 => String::new(),
        percent => format!(" (throttled by {percent} %)"),
    };
    let why = match facts.fixed >= policy.max_blackout.duration() {
        true => format!(
            "the hand-over alone takes {:.2} s{}",
            facts.fixed.as_secs_f64(),
            match in_group {
                true => ", with the guests of its group that start before",
                false => "",
            }
        ),
        false => format!(
            "the guest{throttled} changes {}/s, and the link carries {}/s",
            bytes(facts.dirty_bytes_per_second),
            bytes(facts.link_bytes_per_second)
        ),
    };
    format!(
        "{why}: with {} left it would stand still for about {:.1} s, where protect.max_blackout is {}",
        bytes(facts.remaining_bytes),
        expected_blackout(facts).as_secs_f64(),
        policy.max_blackout
    )
}

/// Takes so many percent of the guest's time, if it is still here.
pub(super) async fn throttle(attached: &mut Attached, percent: u8) -> Result<(), DriveError> {
    let Some(mut guest) = attached.guest.take() else {
        return Ok(());
    };
    let (guest, throttled) = blocking(move || {
        let throttled = guest.throttle(percent);
        (guest, throttled)
    })
    .await?;
    attached.guest = Some(guest);
    Ok(throttled?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_links_rate_is_held_against_what_a_cut_showed() {
        let shown = Some(2_500_000);
        for (told, rate) in [
            (3_000_000, 3_000_000),
            (1_000_000, 2_500_000),
            (90_000_000, 5_000_000),
            (0, 0),
        ] {
            assert_eq!(link_rate(told, shown), rate, "{told}");
        }
        assert_eq!(link_rate(90_000_000, None), 90_000_000);
    }

    #[test]
    fn a_link_that_fell_is_looked_at_again() {
        assert!(fell(25_000_000, 4_400_000));
        for (before, now) in [(4_400_000, 3_000_000), (3_000_000, 25_000_000), (0, 0)] {
            assert!(!fell(before, now), "{before} {now}");
        }
    }

    #[test]
    fn the_outlook_tells_what_it_rests_on() {
        let policy = Policy::default();
        let facts = MoveFacts {
            rounds: 3,
            remaining_bytes: 1_000_000,
            remaining_before: None,
            dirty_bytes_per_second: 300_000,
            link_bytes_per_second: 2_500_000,
            fixed: Duration::from_millis(310),
            overhead: Duration::from_millis(200),
            throttle: 40,
        };
        let outlook = outlook(&policy, &facts);
        assert_eq!(outlook.expected_blackout_ms, 710.0);
        assert!(!outlook.within && outlook.max_blackout_ms == 500.0);
        let limited = outlook.clone().under(Some(1_000_000));
        assert_eq!(
            (limited.link_bytes_per_s, limited.expected_blackout_ms),
            (1_000_000, 1310.0)
        );
        for wider in [None, Some(2_500_000)] {
            assert_eq!(outlook.clone().under(wider), outlook);
        }
        let told = outlook.to_string();
        for words in [
            "1.0 MB",
            "300.0 kB/s",
            "2.5 MB/s",
            "40 %",
            "710 ms",
            "500 ms",
        ] {
            assert!(told.contains(words), "no '{words}' in: {told}");
        }
    }

    #[test]
    fn a_blackout_that_cannot_be_kept_is_told_with_its_reason() {
        let policy = Policy::default();
        let mut facts = MoveFacts {
            rounds: 9,
            remaining_bytes: 4_000_000,
            remaining_before: Some(4_000_000),
            dirty_bytes_per_second: 3_000_000,
            link_bytes_per_second: 1_000_000,
            fixed: HAND_OVER,
            overhead: HAND_OVER,
            throttle: 80,
        };
        let told = too_long(&policy, &facts, false);
        for words in [
            "throttled by 80 %",
            "3.0 MB/s",
            "1.0 MB/s",
            "4.0 MB left",
            "4.2 s",
            "500ms",
        ] {
            assert!(told.contains(words), "no '{words}' in: {told}");
        }
        (facts.fixed, facts.throttle) = (Duration::from_secs(2), 0);
        let told = too_long(&policy, &facts, false);
        assert!(
            told.contains("alone takes 2.00 s: ") && told.contains("6.0 s"),
            "{told}"
        );
        let told = too_long(&policy, &facts, true);
        assert!(
            told.contains("alone takes 2.00 s, with the guests of its group"),
            "{told}"
        );
        assert_eq!(slowed(0), "");
        assert!(slowed(40).contains("40 %"));
    }
}
