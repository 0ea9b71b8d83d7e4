//! The decisions, each by itself and over simulated hours: does the RPO hold
//! where the link suffices, does the guest keep its time, does every move end.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use farhaven_policies::decide::{
    Alert, CutFacts, Measured, MoveFacts, MoveStep, NextCut, WaitReason, back_off,
    expected_blackout, interval, next_cut, next_move_step, rpo_alert,
};
use farhaven_policies::policy::Policy;
use farhaven_policies::units::{ByteSize, Period};
use proptest::prelude::*;

mod moves;

const MS: fn(u64) -> Duration = Duration::from_millis;
const S: fn(u64) -> Duration = Duration::from_secs;

fn calm() -> CutFacts {
    CutFacts {
        sealed_age: Some(S(3)),
        since_cut: Some(S(3)),
        in_flight: false,
        expected_seal: S(2),
        expected_pause: MS(40),
        failures: 0,
        since_failure: Duration::ZERO,
        expected_bytes: 1 << 20,
        bytes_before_round: None,
        buffered: 0,
    }
}

#[test]
fn a_cut_is_due_the_rpo_minus_the_time_to_seal_after_the_last() {
    let policy = Policy::default();
    assert_eq!(
        next_cut(&policy, &calm()),
        NextCut::Wait {
            for_time: S(4),
            reason: WaitReason::NotDue
        }
    );
    assert_eq!(
        next_cut(
            &policy,
            &CutFacts {
                since_cut: Some(S(7)),
                ..calm()
            }
        ),
        NextCut::Cut
    );
    assert_eq!(
        next_cut(
            &policy,
            &CutFacts {
                sealed_age: None,
                since_cut: None,
                ..calm()
            }
        ),
        NextCut::Cut
    );
    let in_flight = next_cut(
        &policy,
        &CutFacts {
            in_flight: true,
            ..calm()
        },
    );
    assert!(matches!(
        in_flight,
        NextCut::Wait {
            reason: WaitReason::InFlight,
            ..
        }
    ));
}

#[test]
fn pauses_never_take_more_than_a_twentieth_of_the_guests_time() {
    let policy = Policy {
        rpo: Period::from_secs(1),
        ..Policy::default()
    };
    assert_eq!(interval(&policy, S(5), MS(100)), S(2));
    assert_eq!(interval(&policy, S(5), MS(1)), MS(500));
}

#[test]
fn failures_are_tried_again_later_each_time_and_success_forgets_them() {
    let steps: Vec<_> = (0..9)
        .map(|failures| back_off(failures).as_secs())
        .collect();
    assert_eq!(steps, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(back_off(u32::MAX), S(60));
    let failed = CutFacts {
        failures: 3,
        since_failure: S(1),
        sealed_age: Some(S(100)),
        ..calm()
    };
    let policy = Policy::default();
    assert_eq!(
        next_cut(&policy, &failed),
        NextCut::Wait {
            for_time: S(3),
            reason: WaitReason::BackOff
        }
    );
    assert_eq!(
        next_cut(
            &policy,
            &CutFacts {
                since_failure: S(4),
                since_cut: Some(S(4)),
                ..failed
            }
        ),
        NextCut::Cut
    );
}

#[test]
fn what_would_overflow_the_buffer_goes_in_rounds_first() {
    let policy = Policy::default();
    let large = CutFacts {
        since_cut: Some(S(9)),
        expected_bytes: 50 << 20,
        ..calm()
    };
    assert_eq!(
        next_cut(&policy, &large),
        NextCut::Round { shrinking: true }
    );
    // Rounds that win nothing end in a cut if it can fit at all.
    let same = CutFacts {
        bytes_before_round: Some(51 << 20),
        ..large
    };
    assert_eq!(next_cut(&policy, &same), NextCut::Cut);
    let never = CutFacts {
        expected_bytes: 65 << 20,
        bytes_before_round: Some(66 << 20),
        ..large
    };
    assert_eq!(
        next_cut(&policy, &never),
        NextCut::Round { shrinking: false }
    );
    let drained = CutFacts {
        expected_bytes: 10 << 20,
        bytes_before_round: Some(50 << 20),
        ..large
    };
    assert_eq!(next_cut(&policy, &drained), NextCut::Cut);
    assert_eq!(
        next_cut(
            &policy,
            &CutFacts {
                buffered: 30 << 20,
                ..drained
            }
        ),
        NextCut::Round { shrinking: true }
    );
}

#[test]
fn alerts_are_raised_at_twice_and_three_times_the_rpo() {
    let policy = Policy::default();
    let at = |secs| rpo_alert(&policy, Some(S(secs)));
    assert_eq!(
        (at(0), at(20), at(21), at(30), at(31)),
        (
            Alert::Fine,
            Alert::Fine,
            Alert::Warning,
            Alert::Warning,
            Alert::Critical
        )
    );
    assert_eq!(rpo_alert(&policy, None), Alert::Unprotected);
    assert!(
        Alert::Unprotected > Alert::Critical
            && Alert::Critical > Alert::Warning
            && Alert::Warning > Alert::Fine
    );
}

#[test]
fn measured_times_follow_a_change_and_expect_the_worse() {
    let mut seal = Measured::default();
    assert_eq!((seal.mean(), seal.expect(S(7))), (None, S(7)));
    (0..100).for_each(|_| seal.observe(S(1)));
    assert!(seal.expect(S(7)) < MS(1010));
    seal.observe(S(3));
    assert!(seal.expect(S(7)) > S(2), "{seal:?}");
}

/// Protection over simulated time. Returns the worst age of the newest sealed
/// cut after the start, the cuts made, and the share of time paused.
fn protect(
    policy: &Policy,
    seals: &[u64],
    pause: Duration,
    seconds: u64,
) -> (Duration, usize, f64) {
    let (mut now, mut worst, mut paused) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let (mut seal_time, mut sealed_cut, mut last_cut) =
        (Measured::default(), None::<Duration>, None::<Duration>);
    let mut cuts = 0;
    while now < S(seconds) {
        let facts = CutFacts {
            sealed_age: sealed_cut.map(|cut| now - cut),
            since_cut: last_cut.map(|cut| now - cut),
            expected_seal: seal_time.expect(S(1)),
            expected_pause: pause,
            ..calm()
        };
        match next_cut(policy, &facts) {
            NextCut::Cut => {
                let cut = now;
                let seal = MS(seals[cuts % seals.len()]);
                (cuts, paused, last_cut) = (cuts + 1, paused + pause, Some(cut));
                now += pause + seal;
                // The age is at its worst just before the seal; let the measurement settle first.
                if let Some(before) = sealed_cut.filter(|_| cuts > 12) {
                    worst = worst.max(now - before);
                }
                (sealed_cut, _) = (Some(cut), seal_time.observe(now - cut));
            }
            NextCut::Wait { for_time, .. } => now += for_time,
            NextCut::Round { .. } => panic!("a small change needs no round"),
        }
    }
    (worst, cuts, paused.as_secs_f64() / now.as_secs_f64())
}

proptest! {
    /// Where sealing takes up to 40 % of the RPO (that is: the link suffices),
    /// the RPO holds, with not many more cuts than it needs.
    #[test]
    fn the_rpo_holds_where_the_link_suffices(
        rpo in 4u64..120, pause in 1u64..60, seals in proptest::collection::vec(300u64..400, 1..20),
    ) {
        let policy = Policy { rpo: Period::from_secs(rpo), ..Policy::default() };
        let seals: Vec<_> = seals.into_iter().map(|per_mille| per_mille * rpo).collect();
        let (worst, cuts, _) = protect(&policy, &seals, MS(pause), 100 * rpo);
        prop_assert!(worst <= S(rpo), "worst {worst:?} of {rpo} s");
        prop_assert!((100..=260).contains(&cuts), "{cuts} cuts in 100 times the RPO");
    }

    /// Whatever the link does, the guest keeps nineteen twentieths of its time.
    #[test]
    fn the_guest_keeps_its_time(
        rpo in 1u64..20, pause in 1u64..400, seals in proptest::collection::vec(0u64..30_000, 1..20),
    ) {
        let policy = Policy { rpo: Period::from_secs(rpo), ..Policy::default() };
        let (_, cuts, share) = protect(&policy, &seals, MS(pause), 600);
        prop_assert!(cuts > 0 && share < 0.052, "{share} of its time paused");
    }

    /// Whatever is measured, round by round: it ends, in a bounded number of
    /// rounds, throttles within the policy only, and never acts beyond the
    /// blackout unless that was accepted.
    #[test]
    fn no_measurements_keep_a_move_from_its_end(
        measured in proptest::collection::vec(any::<(u64, u64, u32, u16, u16)>(), 1..8),
        max_throttle in 0u8..=95, blackout in 1u64..10_000, accept: bool,
    ) {
        let policy = Policy { max_throttle, max_blackout: Period::from_millis(blackout), ..Policy::default() };
        let (mut throttle, mut before) = (0, None);
        for rounds in 1.. {
            prop_assert!(rounds <= 40, "no end");
            let (bytes, dirty, link, fixed, overhead) = measured[rounds as usize % measured.len()];
            let facts = MoveFacts {
                rounds, remaining_bytes: bytes, remaining_before: before, dirty_bytes_per_second: dirty,
                link_bytes_per_second: link.into(), fixed: MS(fixed.into()), overhead: MS(overhead.into()), throttle,
            };
            before = Some(bytes);
            match next_move_step(&policy, &facts, accept) {
                MoveStep::Throttle { percent } => {
                    prop_assert!(percent > throttle && percent <= max_throttle);
                    (throttle, before) = (percent, None);
                }
                MoveStep::Round => {}
                MoveStep::LastCut { expected_blackout, within } => {
                    prop_assert_eq!(within, expected_blackout <= MS(blackout));
                    prop_assert!(within || accept);
                    break;
                }
                MoveStep::TooLong { expected_blackout } => {
                    prop_assert!(!accept && expected_blackout > MS(blackout));
                    break;
                }
                MoveStep::LinkDown => { prop_assert_eq!(link, 0); break; }
            }
        }
    }

    #[test]
    fn no_facts_panic(
        ages in any::<[u64; 5]>(), bytes in any::<[u64; 4]>(), failures: u32, throttle: u8, rpo: u64, buffer: u64,
    ) {
        let policy = Policy {
            rpo: Period::from_millis(rpo), capture_buffer: ByteSize::from_bytes(buffer), ..Policy::default()
        };
        let [sealed, since, seal, pause, failed] = ages.map(Duration::from_secs);
        let facts = CutFacts {
            sealed_age: Some(sealed), since_cut: Some(since), in_flight: false, expected_seal: seal,
            expected_pause: pause, failures, since_failure: failed, expected_bytes: bytes[0],
            bytes_before_round: Some(bytes[1]), buffered: bytes[2],
        };
        let _ = next_cut(&policy, &facts);
        let facts = MoveFacts {
            rounds: failures, remaining_bytes: bytes[0], remaining_before: Some(bytes[1]),
            dirty_bytes_per_second: bytes[3], link_bytes_per_second: bytes[2], fixed: seal, overhead: pause, throttle,
        };
        let _ = next_move_step(&policy, &facts, failures % 2 == 0);
        let _ = rpo_alert(&policy, Some(sealed));
    }
}
