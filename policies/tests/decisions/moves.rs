//! Planned moves in virtual time.

use super::*;

/// Before the first round.
fn begin(remaining: u64, link: u64, fixed: Duration, overhead: Duration) -> MoveFacts {
    MoveFacts {
        rounds: 0,
        remaining_bytes: remaining,
        remaining_before: None,
        dirty_bytes_per_second: 0,
        link_bytes_per_second: link,
        fixed,
        overhead,
        throttle: 0,
    }
}

/// A move in virtual time: a guest that dirties `rate` bytes a second of a
/// working set of `set` when it runs freely, and a link.
struct Moved {
    rate: u64,
    set: u64,
    link: u64,
    overhead: Duration,
    facts: MoveFacts,
}

impl Moved {
    /// Follows every step; the one that ends it.
    fn steps_to_the_end(&mut self, policy: &Policy, accept: bool) -> MoveStep {
        loop {
            // Did the throttle stay as it was for this round?
            let mut settled = true;
            assert!(self.facts.rounds < 60, "no end: {:?}", self.facts);
            match next_move_step(policy, &self.facts, accept) {
                MoveStep::Throttle { percent } => {
                    assert!(percent > self.facts.throttle && percent <= policy.max_throttle);
                    self.facts.throttle = percent;
                    settled = false;
                }
                MoveStep::Round => {}
                end => return end,
            }
            let took =
                self.facts.remaining_bytes as f64 / self.link as f64 + self.overhead.as_secs_f64();
            let runs = 1.0 - f64::from(self.facts.throttle) / 100.0;
            let dirtied = ((self.rate as f64 * runs * took) as u64).min(self.set);
            self.facts.remaining_before = settled.then_some(self.facts.remaining_bytes);
            self.facts.remaining_bytes = dirtied;
            self.facts.dirty_bytes_per_second = (dirtied as f64 / took.max(1e-6)) as u64;
            self.facts.rounds += 1;
        }
    }
}

#[test]
fn a_dead_link_ends_no_move() {
    let facts = begin(1, 0, MS(1), MS(1));
    for accept in [false, true] {
        assert_eq!(
            next_move_step(&Policy::default(), &facts, accept),
            MoveStep::LinkDown
        );
    }
}

/// 8 MB/s of noise over 20 Mbit/s, 80 ms: rounds alone never end, a throttled guest does.
#[test]
fn a_guest_that_outruns_the_link_is_throttled_until_the_move_fits() {
    let noise = |remaining| Moved {
        rate: 8_000_000,
        set: 64 << 20,
        link: 2_500_000,
        overhead: MS(200),
        facts: begin(remaining, 2_500_000, MS(310), MS(200)),
    };
    let fits = |end: &MoveStep| matches!(end, MoveStep::LastCut { within: true, .. });
    let policy = Policy {
        max_throttle: 95,
        ..Policy::default()
    };
    let mut moved = noise(64 << 20);
    let end = moved.steps_to_the_end(&policy, false);
    assert!(fits(&end), "{end:?}");
    assert!(moved.facts.rounds <= 16, "{:?}", moved.facts);
    // Rounds of half a minute are none to try throttles out in.
    assert_eq!(moved.facts.throttle, 95);
    // Where they are short, not more is taken than the figures ask for.
    let mut moved = noise(2 << 20);
    moved.facts.dirty_bytes_per_second = 8_000_000;
    let step = next_move_step(&policy, &moved.facts, false);
    assert!(
        matches!(step, MoveStep::Throttle { percent: 86..95 }),
        "{step:?}"
    );

    // With a second to stand still in, the default throttle is enough.
    let patient = Policy {
        max_blackout: Period::from_secs(1),
        ..Policy::default()
    };
    let mut moved = noise(64 << 20);
    let end = moved.steps_to_the_end(&patient, false);
    assert!(fits(&end), "{end:?} {:?}", moved.facts);

    // Where a round costs little, the default policy is enough: its rounds leave two
    // thirds of the one before, and come down to what fits.
    let mut moved = noise(32 << 20);
    (moved.overhead, moved.facts.overhead) = (MS(50), MS(50));
    let end = moved.steps_to_the_end(&Policy::default(), false);
    assert!(fits(&end), "{end:?} {:?}", moved.facts);
    assert_eq!(moved.facts.throttle, 80);

    // A policy that forbids it: nothing is done unless that is accepted.
    let never = Policy {
        max_throttle: 0,
        ..Policy::default()
    };
    let end = noise(64 << 20).steps_to_the_end(&never, false);
    assert!(
        matches!(end, MoveStep::TooLong { expected_blackout } if expected_blackout > S(20)),
        "{end:?}"
    );
    let end = noise(64 << 20).steps_to_the_end(&never, true);
    assert!(
        matches!(end, MoveStep::LastCut { within: false, .. }),
        "{end:?}"
    );
}

/// Where the hand-over alone takes longer than the policy wants, nobody is
/// throttled in vain.
#[test]
fn a_hand_over_that_is_too_long_by_itself_is_told_at_once() {
    let facts = begin(64 << 20, 1_000_000, S(2), MS(200));
    let step = next_move_step(&Policy::default(), &facts, false);
    assert!(matches!(step, MoveStep::TooLong { .. }), "{step:?}");
    // Accepted, what is left is made small beside it first.
    let step = next_move_step(&Policy::default(), &facts, true);
    assert_eq!(step, MoveStep::Round);
}

/// Estimates err: where another round still wins something, a last cut that would
/// only just fit waits for it.
#[test]
fn a_last_cut_that_only_just_fits_waits_while_rounds_still_win() {
    let policy = Policy::default();
    let after = |before, remaining| MoveFacts {
        rounds: 5,
        remaining_before: Some(before),
        ..begin(remaining, 1_000_000, MS(250), MS(50))
    };
    // 450 ms of 500.
    let step = next_move_step(&policy, &after(400_000, 200_000), false);
    assert_eq!(step, MoveStep::Round);
    for (before, remaining) in [(210_000, 200_000), (400_000, 140_000)] {
        let step = next_move_step(&policy, &after(before, remaining), false);
        let fits = matches!(step, MoveStep::LastCut { within: true, .. });
        assert!(fits, "{before} {remaining}: {step:?}");
    }
}

/// A link that was measured to carry twice what it does: by the figures rounds come down
/// to nothing, and each leaves as much as the one before.
#[test]
fn rounds_that_win_nothing_end_whatever_the_figures_say() {
    let after = |before, remaining| MoveFacts {
        rounds: 3,
        remaining_before: Some(before),
        dirty_bytes_per_second: 750_000,
        throttle: 80,
        ..begin(remaining, 1_500_000, MS(150), MS(150))
    };
    let policy = Policy::default();
    let step = next_move_step(&policy, &after(33_620_000, 33_590_000), false);
    assert!(matches!(step, MoveStep::TooLong { .. }), "{step:?}");
    let step = next_move_step(&policy, &after(33_590_000, 30_000_000), false);
    assert_eq!(step, MoveStep::Round);
}

proptest! {
    /// A guest that dirties `rate` bytes a second in a working set: every move
    /// ends, throttled no more than the policy allows, and within the blackout
    /// where the link or the throttle can do it.
    #[test]
    fn every_move_ends(
        rate in 0u64..50_000_000, set in 0u64..500_000_000, link in 100_000u64..20_000_000,
        fixed in 0u64..600, overhead in 0u64..400, max_throttle in 0u8..=95, blackout in 100u64..2000, accept: bool,
    ) {
        let policy = Policy { max_throttle, max_blackout: Period::from_millis(blackout), ..Policy::default() };
        let mut moved = Moved { rate, set, link, overhead: MS(overhead), facts: begin(set, link, MS(fixed), MS(overhead)) };
        let end = moved.steps_to_the_end(&policy, accept);
        let facts = moved.facts;
        match end {
            MoveStep::LastCut { expected_blackout, within } => {
                prop_assert_eq!(within, expected_blackout <= MS(blackout));
                prop_assert!(within || accept, "nobody accepted {expected_blackout:?}");
            }
            MoveStep::TooLong { expected_blackout } => {
                prop_assert!(!accept && expected_blackout > MS(blackout));
            }
            other => prop_assert!(false, "{other:?} is no end"),
        }
        // Rounds alone converge where the guest writes at a third of the link's rate,
        // and what it writes in a round's overhead fits.
        let room = blackout.saturating_sub(fixed);
        if rate < link * 33 / 100 && room > 20 && rate * (overhead + room) < link * room / 2 {
            prop_assert!(facts.throttle == 0, "{facts:?}");
            prop_assert!(expected_blackout(&facts) <= MS(blackout), "{facts:?}");
        }
    }
}
