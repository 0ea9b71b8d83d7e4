//! The cap and the shares, as properties.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Sends requests of the given sizes for `seconds`, waiting as told; bytes sent.
fn run(bucket: &mut TokenBucket, start: Instant, seconds: u64, sizes: &[u64]) -> u64 {
    let end = start + Duration::from_secs(seconds);
    let mut now = start;
    let mut sent = 0;
    let mut sizes = sizes.iter().cycle();
    let mut next = sizes.next().copied().unwrap_or(1);
    while now < end {
        match bucket.take(now, next) {
            Ok(()) => {
                sent += next;
                next = sizes.next().copied().unwrap_or(1);
            }
            Err(wait) => now += wait,
        }
    }
    sent
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_cap_is_exact_within_a_hundredth_over_ten_seconds(
        cap in 1_000_000u64..1_000_000_000,
        // Up to half a hundredth of what ten seconds carry.
        parts in proptest::collection::vec(1u64..1_000, 1..20),
    ) {
        let volume = cap / 8 * 10;
        let sizes: Vec<u64> = parts.iter().map(|part| (volume / 200_000 * part).max(1)).collect();
        let start = Instant::now();
        let mut bucket = TokenBucket::new(cap, start);
        let sent = run(&mut bucket, start, 10, &sizes);
        let error = (sent as f64 / volume as f64 - 1.0).abs();
        prop_assert!(error <= 0.01, "{sent} of {volume}");
    }

    #[test]
    fn requests_of_any_size_never_exceed_the_cap_by_more_than_one(
        cap in 8_000u64..10_000_000_000,
        size in 1u64..REQUEST_LIMIT,
    ) {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(cap, start);
        // Few large requests, or the test takes long.
        let size = size.max(cap / 8 / 1_000);
        let sent = run(&mut bucket, start, 10, &[size]);
        let volume = cap / 8 * 10;
        let burst = cap / 8 / 50;
        prop_assert!(sent <= volume + burst + size, "{sent} of {volume}");
        prop_assert!(sent + size >= volume, "{sent} of {volume}");
    }

    #[test]
    fn shares_follow_weights_whatever_the_sizes(
        weights in proptest::collection::vec(1u32..10, 2..6),
        sizes in proptest::collection::vec(1u64..300_000, 6),
    ) {
        let now = Instant::now();
        let mut pace = pace(0, now, &weights);
        let mut sent = vec![0u64; weights.len()];
        let mut tickets = BTreeMap::new();
        for (flow, bytes) in sizes.iter().enumerate().take(weights.len()) {
            tickets.insert(pace.request(&flow, *bytes, Rank::Usual).unwrap(), flow);
        }
        let total: u64 = 200_000_000;
        while sent.iter().sum::<u64>() < total {
            let Next::Turn(ticket) = pace.next(now) else { panic!("nobody's turn") };
            let flow = tickets.remove(&ticket).unwrap();
            pace.sent(now, ticket);
            sent[flow] += sizes[flow];
            tickets.insert(pace.request(&flow, sizes[flow], Rank::Usual).unwrap(), flow);
        }
        let whole: u32 = weights.iter().sum();
        for (flow, weight) in weights.iter().enumerate() {
            let due = total as f64 * f64::from(*weight) / f64::from(whole);
            let error = (sent[flow] as f64 / due - 1.0).abs();
            prop_assert!(error < 0.05, "flow {flow}: {} of {due}", sent[flow]);
        }
    }

    #[test]
    fn nothing_is_lost_or_sent_twice(
        requests in proptest::collection::vec((0usize..5, 0u64..=REQUEST_LIMIT, any::<bool>()), 0..60),
        cap in 0u64..2_000_000_000,
        full in proptest::collection::vec(any::<bool>(), 60),
    ) {
        let mut now = Instant::now();
        let mut pace = pace(cap.max(1_000_000), now, &[0, 1, 2, 3, 100]);
        let mut asked = BTreeMap::new();
        for (flow, bytes, held) in &requests {
            let rank = if *held { Rank::Held } else { Rank::Usual };
            asked.insert(pace.request(flow, *bytes, rank).unwrap(), *flow);
        }
        let mut full = full.into_iter();
        loop {
            match pace.next(now) {
                Next::Turn(ticket) if full.next() == Some(true) => pace.no_room(now, ticket),
                Next::Turn(ticket) => {
                    prop_assert!(asked.remove(&ticket).is_some());
                    pace.sent(now, ticket);
                }
                Next::Wait(wait, ticket) => {
                    prop_assert!(!wait.is_zero());
                    prop_assert!(asked.contains_key(&ticket));
                    now += wait;
                }
                Next::NoRoom => (0..5).for_each(|flow| pace.room(&flow)),
                Next::Idle => break,
            }
        }
        prop_assert!(asked.is_empty());
    }

    #[test]
    fn an_own_cap_is_exact_beside_others(
        cap in 8_000_000u64..200_000_000,
        sizes in proptest::collection::vec(1u64..200_000, 3),
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut pace = pace(1_000_000_000, now, &[1, 1, 1]);
        pace.set_flow(now, &1, 1, cap).unwrap();
        let mut tickets = BTreeMap::new();
        for (flow, bytes) in sizes.iter().enumerate() {
            tickets.insert(pace.request(&flow, *bytes, Rank::Usual).unwrap(), flow);
        }
        let mut sent = [0u64; 3];
        while now < start + Duration::from_secs(10) {
            match pace.next(now) {
                Next::Turn(ticket) => {
                    let flow = tickets.remove(&ticket).unwrap();
                    pace.sent(now, ticket);
                    // Small requests take the test long.
                    let bytes = sizes[flow].max(20_000);
                    sent[flow] += bytes;
                    tickets.insert(pace.request(&flow, bytes, Rank::Usual).unwrap(), flow);
                }
                Next::Wait(wait, _) => now += wait,
                other => panic!("{other:?}"),
            }
        }
        let error = (sent[1] as f64 / (cap as f64 / 8.0 * 10.0) - 1.0).abs();
        prop_assert!(error < 0.03, "{} at {cap}", sent[1]);
        let whole = sent.iter().sum::<u64>() as f64 / 1.25e9;
        prop_assert!((whole - 1.0).abs() < 0.01, "{whole}");
        let rest = sent[0] as f64 / sent[2] as f64;
        prop_assert!((rest - 1.0).abs() < 0.02, "{rest}");
    }
}

/// Flows 0, 1 and so on with these weights, on one lane.
fn pace(cap: u64, now: Instant, weights: &[u32]) -> Pace<usize, ()> {
    let mut pace = Pace::new(cap, now);
    for (flow, weight) in weights.iter().enumerate() {
        pace.join(now, flow, ()).unwrap();
        pace.set_flow(now, &flow, *weight, 0).unwrap();
    }
    pace
}

#[test]
fn a_new_cap_holds_at_once() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(8_000, start);
    bucket.take(start, 10_000).unwrap();
    // Ten seconds at the old cap, a hundredth of one at the new.
    assert_eq!(bucket.take(start, 1), Err(Duration::from_secs(10)));
    bucket.set_cap(start, 8_000_000);
    assert_eq!(bucket.take(start, 1), Err(Duration::from_millis(10)));
    bucket.set_cap(start, 0);
    assert_eq!(bucket.take(start, u64::MAX), Ok(()));
    bucket.set_cap(start, 8_000_000);
    assert_eq!(bucket.take(start, 1_000), Ok(()));
}

#[test]
fn an_idle_bucket_saves_up_twenty_milliseconds_at_most() {
    let start = Instant::now();
    let mut bucket = TokenBucket::new(80_000_000, start);
    let later = start + Duration::from_secs(3_600);
    let sent = std::iter::from_fn(|| bucket.take(later, 1_000).ok()).count();
    assert_eq!(sent, 201);
}

#[test]
fn a_clock_that_jumps_does_no_harm() {
    let start = Instant::now() + Duration::from_secs(10);
    let mut bucket = TokenBucket::new(u64::MAX, start);
    assert_eq!(bucket.take(start, u64::MAX), Ok(()));
    bucket.wait(start - Duration::from_secs(5));
    bucket.wait(start + Duration::from_secs(1 << 33));
    assert_eq!(bucket.take(start, 1), Ok(()));
}

/// Whose turns come next, if each flow asks for 64 KiB again and again.
fn turns(pace: &mut Pace<usize, ()>, now: Instant, flows: usize, count: usize) -> Vec<usize> {
    let mut tickets = BTreeMap::new();
    for flow in 0..flows {
        for _ in 0..count {
            let ticket = pace.request(&flow, 64 << 10, Rank::Usual).unwrap();
            tickets.insert(ticket, flow);
        }
    }
    let mut turns = Vec::new();
    while turns.len() < count {
        let Next::Turn(ticket) = pace.next(now) else {
            panic!("nobody's turn");
        };
        pace.sent(now, ticket);
        turns.push(tickets.remove(&ticket).unwrap());
    }
    tickets.into_keys().for_each(|ticket| pace.cancel(ticket));
    turns
}

#[test]
fn a_flow_that_comes_back_from_idling_has_saved_little() {
    let now = Instant::now();
    let mut pace = pace(0, now, &[1, 1]);
    for _ in 0..100 {
        let ticket = pace.request(&0, 64 << 10, Rank::Usual).unwrap();
        assert_eq!(pace.next(now), Next::Turn(ticket));
        pace.sent(now, ticket);
        assert_eq!(pace.next(now), Next::Idle);
    }
    // The other one has half a MiB at most before the two share.
    let turns = turns(&mut pace, now, 2, 40);
    assert_eq!(turns[8..].iter().filter(|flow| **flow == 1).count(), 16);
}

#[test]
fn a_flow_is_never_far_behind_its_share() {
    let now = Instant::now();
    // Whatever the weights' size, turns are mixed finely.
    let mut pace = pace(0, now, &[200, 100]);
    let turns = turns(&mut pace, now, 2, 30);
    for three in turns.chunks(3) {
        assert_eq!(
            three.iter().filter(|flow| **flow == 0).count(),
            2,
            "{turns:?}"
        );
    }
}

#[test]
fn weight_zero_has_what_others_leave() {
    let now = Instant::now();
    let mut pace = pace(0, now, &[0, 5]);
    assert_eq!(turns(&mut pace, now, 2, 8), [1; 8]);
    assert_eq!(turns(&mut pace, now, 1, 8), [0; 8]);
    // And it has no debt of that when it is given a weight.
    pace.set_flow(now, &0, 5, 0).unwrap();
    let later = turns(&mut pace, now, 2, 8);
    let its = later.iter().filter(|flow| **flow == 0).count();
    assert!((3..=5).contains(&its), "{later:?}");
}

#[test]
fn a_held_guest_goes_first_and_heeds_the_cap_of_all_only() {
    let now = Instant::now();
    let mut pace = pace(80_000_000, now, &[1, 1]);
    pace.set_flow(now, &1, 1, 8_000).unwrap();
    let first = pace.request(&1, 100_000, Rank::Usual).unwrap();
    pace.sent(now, first);
    // Its own cap wants 100 s, the common one 10 ms; it also overtakes what waits.
    pace.request(&1, 1_000, Rank::Usual).unwrap();
    pace.request(&0, 1_000, Rank::Usual).unwrap();
    let held = pace.request(&1, 1_000, Rank::Held).unwrap();
    assert_eq!(pace.next(now), Next::Wait(Duration::from_millis(10), held));
    let later = now + Duration::from_millis(10);
    assert_eq!(pace.next(later), Next::Turn(held));
}

#[test]
fn a_full_lane_holds_up_its_own_flows_only() {
    let now = Instant::now();
    let mut pace = Pace::new(0, now);
    for (flow, lane) in [(0, 'a'), (1, 'a'), (2, 'b')] {
        pace.join(now, flow, lane).unwrap();
    }
    let tickets: Vec<_> = (0..3)
        .map(|flow| pace.request(&flow, 1, Rank::Usual).unwrap())
        .collect();
    assert_eq!(pace.next(now), Next::Turn(tickets[0]));
    pace.no_room(now, tickets[0]);
    assert_eq!(pace.next(now), Next::Turn(tickets[2]));
    pace.sent(now, tickets[2]);
    assert_eq!(pace.next(now), Next::NoRoom);
    pace.room(&1);
    assert_eq!(pace.next(now), Next::Turn(tickets[0]));
    // A try in vain does not begin the time anew.
    let later = now + Duration::from_secs(5);
    pace.no_room(later, tickets[0]);
    assert_eq!(pace.stuck_since(&1), Some(now));
    pace.room(&1);
    pace.sent(later, tickets[1]);
    assert_eq!(pace.stuck_since(&0), None);
}

#[test]
fn limits_are_told() {
    let now = Instant::now();
    let mut pace = pace(0, now, &[1, 1]);
    let too_large = REQUEST_LIMIT + 1;
    assert_eq!(
        pace.request(&1, too_large, Rank::Usual),
        Err(PaceError::RequestTooLarge(too_large))
    );
    assert_eq!(
        pace.set_flow(now, &1, WEIGHT_LIMIT + 1, 0),
        Err(PaceError::Weight(WEIGHT_LIMIT + 1))
    );
    for _ in 0..BACKLOG_LIMIT {
        pace.request(&1, 1, Rank::Usual).unwrap();
    }
    let more = pace.request(&1, 1, Rank::Held);
    assert_eq!(more, Err(PaceError::BacklogFull));
    pace.remove(&1);
    assert_eq!(pace.next(now), Next::Idle);
    assert_eq!(pace.request(&1, 1, Rank::Usual), Err(PaceError::NoFlow));
    for flow in 0..FLOW_LIMIT {
        pace.join(now, flow, ()).unwrap();
    }
    assert_eq!(pace.join(now, FLOW_LIMIT, ()), Err(PaceError::TooManyFlows));
}
