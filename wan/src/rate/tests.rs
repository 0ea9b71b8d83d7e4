//! What must hold whatever the path and the peer do; how well it works is tested in
//! `tests/congestion.rs`.

use std::time::Duration;

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Event {
    Ack {
        after: u64,
        rtt: u64,
        bytes: u64,
        app_limited: bool,
    },
    End,
    Lost {
        bytes: u64,
        persistent: bool,
    },
    Mtu(u16),
    Cap(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let ack = (
        0..2_000_000u64,
        0..5_000_000u64,
        0..200_000u64,
        any::<bool>(),
    )
        .prop_map(|(after, rtt, bytes, app_limited)| Event::Ack {
            after,
            rtt,
            bytes,
            app_limited,
        });
    prop_oneof![
        6 => ack,
        3 => Just(Event::End),
        2 => (0..10_000_000u64, any::<bool>()).prop_map(|(bytes, odd)| Event::Lost {
            bytes,
            persistent: odd && bytes % 5 == 0,
        }),
        1 => any::<u16>().prop_map(Event::Mtu),
        1 => any::<u64>().prop_map(Event::Cap),
    ]
}

proptest! {
    #[test]
    fn no_history_stops_it_or_makes_it_run_away(
        events in proptest::collection::vec(event(), 1..400),
        initial in proptest::option::of(any::<u64>()),
    ) {
        let cap = Arc::new(AtomicU64::new(0));
        let options = RateOptions { cap: Some(cap.clone()), initial };
        let start = Instant::now() + Duration::from_secs(100);
        let mut controller = RateController::new(options, start, 1200);
        let mut now = start;
        let mut mtu = 1200u64;
        for event in events {
            match event {
                Event::Ack { after, rtt, bytes, app_limited } => {
                    now += Duration::from_micros(after);
                    // Also packets "sent" in the future: a clock may step.
                    let sent = now - Duration::from_micros(rtt) + Duration::from_millis(1);
                    controller.on_ack(now, sent, bytes, app_limited);
                }
                Event::End => controller.on_end_acks(now),
                Event::Lost { bytes, persistent } => controller.on_lost(bytes, persistent),
                Event::Mtu(new) => {
                    mtu = u64::from(new.max(1));
                    controller.on_mtu(new);
                }
                Event::Cap(new) => cap.store(new, Ordering::Relaxed),
            }
            prop_assert!(controller.window() >= MINIMUM_PACKETS * mtu);
            prop_assert!(controller.window.is_finite());
            prop_assert!(controller.status().loss <= 1.0);
        }
    }
}

/// A controller that had one acknowledgement of `bytes` after each round trip, 200 times,
/// under a cap of 8 Mbit/s; and its cap.
fn capped(mtu: u16, rtt: Duration, bytes: u64) -> (RateController, Arc<AtomicU64>) {
    let cap = Arc::new(AtomicU64::new(8_000_000));
    let options = RateOptions {
        cap: Some(cap.clone()),
        initial: None,
    };
    let mut now = Instant::now();
    let mut controller = RateController::new(options, now, mtu);
    for _ in 0..200 {
        let sent = now;
        now += rtt;
        controller.on_ack(now, sent, bytes, false);
        controller.on_end_acks(now);
    }
    (controller, cap)
}

#[test]
fn a_cap_does_not_store_up_a_burst() {
    // Ten seconds at the cap of 1 MB/s and a round trip of 50 ms.
    let (controller, cap) = capped(1200, Duration::from_millis(50), 50_000);
    assert!((45_000..=50_000).contains(&controller.window()));
    cap.store(0, Ordering::Relaxed);
    assert!(controller.window() < 200_000, "{}", controller.window());
}

/// A window of fewer packets than one acknowledgement is for waits for each of them, and
/// sends less than the cap allows.
#[test]
fn a_cap_is_reached_over_a_short_path_too() {
    let (controller, cap) = capped(1452, Duration::from_micros(600), 600);
    let at_once = u64::from(PACKETS_AN_ACK) * 1452;
    assert!(controller.window() > at_once, "{}", controller.window());
    // No more than the cap lets through while the receiver waits.
    cap.store(1_000_000, Ordering::Relaxed);
    assert_eq!(controller.window(), MINIMUM_PACKETS * 1452);
}

/// Beside another flow, what was measured counts until as much is sent again.
#[test]
fn a_flow_with_little_to_send_does_not_forget_its_share() {
    let mut now = Instant::now();
    let mut controller = RateController::new(RateOptions::default(), now, 1200);
    let rtt = Duration::from_millis(50);
    controller.base.observe(now, 0.02);
    controller.bandwidth.reset(1e6);
    let mut round = |controller: &mut RateController, bytes: u64, app_limited: bool| {
        controller.phase = Phase::Compete;
        for _ in 0..2 {
            let sent = now;
            now += rtt;
            controller.on_ack(now, sent, bytes, app_limited);
            controller.on_end_acks(now);
        }
    };
    round(&mut controller, 1000, true);
    assert_eq!(controller.status().bandwidth, 8_000_000);
    round(&mut controller, 10_000, false);
    assert!(controller.status().bandwidth < 4_000_000);
}

/// Points of a guest that writes little, over a path whose timers come late: a busy host.
#[test]
fn a_trickle_says_nothing_against_the_path() {
    let mut now = Instant::now();
    let mut controller = RateController::new(RateOptions::default(), now, 1200);
    let mut burst = |controller: &mut RateController, rtt: Duration| {
        now += Duration::from_secs(2);
        for packet in 0..25 {
            let sent = now + Duration::from_micros(10 * packet);
            controller.on_ack(sent + rtt, sent, 1200, true);
            controller.on_end_acks(sent + rtt);
        }
        now += rtt;
    };
    for _ in 0..20 {
        burst(&mut controller, Duration::from_micros(500));
    }
    let known = controller.status().bandwidth;
    assert!(known > 500_000_000, "{known}");
    for _ in 0..20 {
        burst(&mut controller, Duration::from_millis(12));
        burst(&mut controller, Duration::from_micros(700));
    }
    let after = controller.status().bandwidth;
    assert!(after > known / 10, "{after} of {known}");
    assert!(controller.window() >= controller.initial_window());
}

#[test]
fn what_a_trickle_loses_says_nothing_against_the_path() {
    let mut now = Instant::now();
    let mut controller = RateController::new(RateOptions::default(), now, 1200);
    let rtt = Duration::from_millis(40);
    controller.base.observe(now, 0.04);
    controller.phase = Phase::Cruise;
    controller.bandwidth.reset(12.5e6);
    for _ in 0..500 {
        now += Duration::from_secs(1);
        for _ in 0..20 {
            controller.on_ack(now + rtt, now, 1200, true);
        }
        controller.on_lost(5 * 1200, false);
        controller.on_end_acks(now + rtt);
        now += rtt;
    }
    assert_eq!(controller.status().bandwidth, 100_000_000);
}
