//! The cap and the shares, as properties.

use super::*;
use proptest::prelude::*;

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
        let mut pace = Pace::new(0, now);
        let mut sent = vec![0u64; weights.len()];
        for (flow, weight) in weights.iter().enumerate() {
            pace.set_weight(flow, *weight).unwrap();
            pace.request(flow, sizes[flow]).unwrap();
            pace.request(flow, sizes[flow]).unwrap();
        }
        let total: u64 = 200_000_000;
        while sent.iter().sum::<u64>() < total {
            match pace.grant(now) {
                Grant::Send(flow, bytes) => {
                    sent[flow] += bytes;
                    pace.request(flow, bytes).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        let whole: u32 = weights.iter().sum();
        for (flow, weight) in weights.iter().enumerate() {
            let due = total as f64 * f64::from(*weight) / f64::from(whole);
            let error = (sent[flow] as f64 / due - 1.0).abs();
            prop_assert!(error < 0.05, "flow {flow}: {} of {due}", sent[flow]);
        }
    }

    #[test]
    fn nothing_is_lost_or_granted_twice(
        requests in proptest::collection::vec((0u8..5, 0u64..=REQUEST_LIMIT), 0..60),
        cap in 0u64..2_000_000_000,
    ) {
        let mut now = Instant::now();
        let mut pace = Pace::new(cap.max(1_000_000), now);
        let mut asked: BTreeMap<u8, Vec<u64>> = BTreeMap::new();
        for (flow, bytes) in &requests {
            pace.request(*flow, *bytes).unwrap();
            asked.entry(*flow).or_default().push(*bytes);
        }
        let mut granted: BTreeMap<u8, Vec<u64>> = BTreeMap::new();
        loop {
            match pace.grant(now) {
                Grant::Send(flow, bytes) => granted.entry(flow).or_default().push(bytes),
                Grant::Wait(wait) => {
                    prop_assert!(!wait.is_zero());
                    now += wait;
                }
                Grant::Idle => break,
            }
        }
        prop_assert_eq!(asked, granted);
    }
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

#[test]
fn a_flow_that_comes_back_from_idling_has_saved_nothing() {
    let now = Instant::now();
    let mut pace = Pace::new(0, now);
    for _ in 0..100 {
        pace.request("idler", 1).unwrap();
        assert_eq!(pace.grant(now), Grant::Send("idler", 1));
        assert_eq!(pace.grant(now), Grant::Idle);
    }
    for _ in 0..64 {
        pace.request("idler", QUANTUM).unwrap();
        pace.request("other", QUANTUM).unwrap();
    }
    let first: Vec<_> = (0..8).map(|_| pace.grant(now)).collect();
    let idler = first
        .iter()
        .filter(|grant| **grant == Grant::Send("idler", QUANTUM));
    assert_eq!(idler.count(), 4);
}

#[test]
fn limits_are_told() {
    let now = Instant::now();
    let mut pace = Pace::new(0, now);
    let too_large = REQUEST_LIMIT + 1;
    assert_eq!(
        pace.request(1, too_large),
        Err(PaceError::RequestTooLarge(too_large))
    );
    assert_eq!(pace.set_weight(1, 0), Err(PaceError::Weight(0)));
    assert_eq!(
        pace.set_weight(1, WEIGHT_LIMIT + 1),
        Err(PaceError::Weight(WEIGHT_LIMIT + 1))
    );
    for _ in 0..BACKLOG_LIMIT {
        pace.request(1, 1).unwrap();
    }
    assert_eq!(pace.request(1, 1), Err(PaceError::BacklogFull));
    pace.remove(&1);
    assert_eq!(pace.grant(now), Grant::Idle);
    for flow in 0..FLOW_LIMIT {
        pace.request(flow, 1).unwrap();
    }
    assert_eq!(pace.request(FLOW_LIMIT, 1), Err(PaceError::TooManyFlows));
}
