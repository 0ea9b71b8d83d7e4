//! The congestion controller's promises, in virtual time: what it makes of long and lossy
//! links, how it follows a link that changes, and how it lives beside others.
//!
//! Every gate is a ratio over a run with a fixed seed, so a slow machine cannot fail it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "congestion/bbr.rs"]
mod bbr;
#[path = "congestion/flow.rs"]
mod flow;
#[path = "congestion/sim.rs"]
mod sim;
#[path = "congestion/tcp.rs"]
mod tcp;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bbr::Bbr;
use farhaven_wan::emulate::{HEADER_BYTES, LinkShape};
use farhaven_wan::rate::{RateController, RateOptions};
use flow::{Controller, Tally};
use sim::{MILLI, PACKET, SECOND, Simulation};
use tcp::{Kind, Tcp};

struct Ours(RateController);

impl Controller for Ours {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        self.0.on_ack(now, sent, bytes, app_limited);
    }
    fn on_end_acks(&mut self, now: Instant) {
        self.0.on_end_acks(now);
    }
    fn on_lost(&mut self, _now: Instant, _sent: Instant, bytes: u64, persistent: bool) {
        self.0.on_lost(bytes, persistent);
    }
    fn window(&self) -> u64 {
        self.0.window()
    }
}

fn ours(options: RateOptions) -> impl FnOnce(Instant) -> Box<dyn Controller> {
    move |now| Box::new(Ours(RateController::new(options, now, PACKET as u16)))
}

fn tcp(kind: Kind) -> impl FnOnce(Instant) -> Box<dyn Controller> {
    move |_| Box::new(Tcp::new(kind))
}

fn bbr(now: Instant) -> Box<dyn Controller> {
    Box::new(Bbr::new(now))
}

fn link(text: &str) -> LinkShape {
    text.parse().unwrap()
}

/// Part of what the link can carry of payload that was delivered in `seconds`.
fn share(tally: Tally, link: LinkShape, seconds: f64) -> f64 {
    let payload = link.rate as f64 / 8.0 * PACKET as f64 / (PACKET + HEADER_BYTES) as f64;
    tally.delivered_bytes as f64 / payload / seconds
}

/// One flow of ours alone for 30 s: share of the link, part dropped at the queue, mean
/// round trip over the idle one.
fn alone(shape: &str, seed: u64) -> (f64, f64, f64) {
    let shape = link(shape);
    let mut simulation = Simulation::new(shape, seed);
    let flow = simulation.add(0, ours(RateOptions::default()));
    simulation.run_until(30 * SECOND);
    let tally = simulation.tally(flow);
    let idle = shape.rtt.as_secs_f64() * 1e3 + (PACKET * 8_000) as f64 / shape.rate as f64;
    (
        share(tally, shape, 30.0),
        tally.dropped as f64 / tally.sent as f64,
        tally.rtt_ms() / idle,
    )
}

#[test]
fn fills_long_lossy_links_without_filling_their_queues() {
    let mut failures = Vec::new();
    for (shape, least) in [
        ("100mbit,80ms,0%", 0.93),
        ("100mbit,80ms,0.1%", 0.93),
        ("100mbit,80ms,1%", 0.92),
        ("100mbit,80ms,3%", 0.9),
        ("100mbit,80ms,5%", 0.85),
        ("500mbit,40ms,0.1%", 0.93),
        ("500mbit,40ms,1%", 0.92),
        ("100mbit,300ms,0.1%", 0.85),
        ("100mbit,300ms,1%", 0.85),
        ("20mbit,20ms,1%", 0.92),
        ("20mbit,300ms,0.1%", 0.85),
        ("20mbit,80ms,1%", 0.92),
        ("100mbit,20ms,1%", 0.92),
        ("100mbit,80ms,1%,jitter=3ms", 0.9),
    ] {
        for seed in [1, 2, 3] {
            let (share, dropped, rtt) = alone(shape, seed);
            println!("{shape:28} seed {seed}: share {share:.3} dropped {dropped:.4} rtt x{rtt:.2}");
            if share < least || dropped > 0.005 || rtt > 1.3 {
                failures.push((shape, seed, share, dropped, rtt));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

fn follows(shapes: [&str; 2]) -> Vec<f64> {
    let mut simulation = Simulation::new(link(shapes[0]), 5);
    let flow = simulation.add(0, ours(RateOptions::default()));
    let mut shares = Vec::new();
    for (index, shape) in shapes.iter().cycle().take(4).enumerate() {
        let shape = link(shape);
        simulation.reshape(shape);
        let start = index as u64 * 10 * SECOND;
        // Three seconds to follow, then it counts.
        simulation.run_until(start + 3 * SECOND);
        let before = simulation.tally(flow);
        simulation.run_until(start + 10 * SECOND);
        let tally = simulation.tally(flow).since(&before);
        let dropped = tally.dropped as f64 / tally.sent as f64;
        let idle = shape.rtt.as_secs_f64() * 1e3;
        println!(
            "{shape}: share {:.3} dropped {dropped:.4} rtt x{:.2}",
            share(tally, shape, 7.0),
            tally.rtt_ms() / idle,
        );
        assert!(dropped <= 0.005, "{shape}: {dropped}");
        assert!(tally.rtt_ms() <= 1.3 * idle, "{shape}: {}", tally.rtt_ms());
        shares.push(share(tally, shape, 7.0));
    }
    shares
}

#[test]
fn follows_a_rate_that_changes_by_four_within_three_seconds() {
    for shapes in [
        ["100mbit,80ms,0.1%", "25mbit,80ms,0.1%"],
        ["100mbit,40ms,1%", "25mbit,40ms,1%"],
        ["20mbit,80ms,0.1%", "80mbit,80ms,0.1%"],
        [
            "100mbit,80ms,0.1%,queue=1mib",
            "25mbit,80ms,0.1%,queue=1mib",
        ],
    ] {
        let shares = follows(shapes);
        assert!(shares.iter().all(|share| *share > 0.9), "{shares:?}");
    }
}

/// Our part of what both deliver, from 20 s on, beside a neighbour.
fn beside<N>(neighbour: (&str, N), shape: &str, tcp_start: u64, our_start: u64) -> f64
where
    N: FnOnce(Instant) -> Box<dyn Controller>,
{
    let shape = link(shape);
    let mut simulation = Simulation::new(shape, 3);
    let flow = simulation.add(our_start, ours(RateOptions::default()));
    let other = simulation.add(tcp_start, neighbour.1);
    simulation.run_until(20 * SECOND);
    let before = [simulation.tally(flow), simulation.tally(other)];
    simulation.run_until(120 * SECOND);
    let ours = simulation.tally(flow).since(&before[0]);
    let theirs = simulation.tally(other).since(&before[1]);
    let total = ours.delivered_bytes + theirs.delivered_bytes;
    let part = ours.delivered_bytes as f64 / total as f64;
    println!(
        "{shape} beside {} from {tcp_start}/{our_start}: {part:.2} of {:.2}, dropped {:.4}",
        neighbour.0,
        share(ours, shape, 100.0) + share(theirs, shape, 100.0),
        ours.dropped as f64 / ours.sent as f64
    );
    part
}

#[test]
fn shares_the_link_with_a_tcp_neighbour() {
    let mut parts = Vec::new();
    for shape in ["100mbit,80ms", "100mbit,40ms", "50mbit,20ms", "20mbit,80ms"] {
        for (name, kind) in [("CUBIC", Kind::Cubic), ("Reno", Kind::Reno)] {
            for (tcp_start, our_start) in [(0, 5 * SECOND), (5 * SECOND, 0)] {
                parts.push(beside((name, tcp(kind)), shape, tcp_start, our_start));
            }
        }
    }
    assert!(
        parts.iter().all(|part| (0.35..=0.65).contains(part)),
        "{parts:.2?}"
    );
}

#[test]
fn is_not_starved_by_a_neighbour_that_heeds_no_loss() {
    let mut parts = Vec::new();
    for shape in ["100mbit,80ms", "50mbit,20ms", "20mbit,80ms"] {
        for (tcp_start, our_start) in [(0, 0), (0, 2 * SECOND), (5 * SECOND, 0)] {
            parts.push(beside(("BBR", bbr), shape, tcp_start, our_start));
        }
    }
    assert!(
        parts.iter().all(|part| (0.30..=0.65).contains(part)),
        "{parts:.2?}"
    );
}

#[test]
fn keeps_to_a_cap_and_leaves_it_at_once() {
    let cap = Arc::new(AtomicU64::new(30_000_000));
    let options = RateOptions {
        cap: Some(cap.clone()),
        ..RateOptions::default()
    };
    let shape = link("100mbit,80ms,0.1%");
    let mut simulation = Simulation::new(shape, 1);
    let flow = simulation.add(0, ours(options));
    simulation.run_until(5 * SECOND);
    let mut rate_over = |seconds: u64| {
        let before = simulation.tally(flow);
        let end = simulation.now + seconds * SECOND;
        simulation.run_until(end);
        let tally = simulation.tally(flow).since(&before);
        tally.delivered_bytes as f64 * 8.0 / seconds as f64
    };
    let capped = rate_over(10);
    assert!((28.5e6..=30.3e6).contains(&capped), "{capped}");
    cap.store(60_000_000, Ordering::Relaxed);
    rate_over(1);
    let capped = rate_over(10);
    assert!((57.0e6..=60.6e6).contains(&capped), "{capped}");
    cap.store(0, Ordering::Relaxed);
    rate_over(2);
    let free = rate_over(5);
    assert!(free > 90e6, "{free}");
    assert_eq!(simulation.tally(flow).dropped, 0);
}

/// What each flow did in the next `seconds`: its share, its part dropped at the queue.
fn over(simulation: &mut Simulation, flows: &[usize], shape: &str, seconds: u64) -> Vec<[f64; 2]> {
    let before: Vec<Tally> = flows.iter().map(|flow| simulation.tally(*flow)).collect();
    simulation.run_until(simulation.now + seconds * SECOND);
    let after = flows.iter().zip(&before);
    let tallies = after.map(|(flow, before)| simulation.tally(*flow).since(before));
    tallies
        .map(|tally| {
            let dropped = tally.dropped as f64 / tally.sent.max(1) as f64;
            [share(tally, link(shape), seconds as f64), dropped]
        })
        .collect()
}

/// A flow of ours alone that has found its pace.
fn settled(shape: &str) -> Simulation {
    let mut simulation = Simulation::new(link(shape), 3);
    simulation.add(0, ours(RateOptions::default()));
    simulation.run_until(10 * SECOND);
    simulation
}

#[test]
fn keeps_to_a_queue_that_is_shorter_than_its_surplus() {
    for (shape, least) in [
        ("100mbit,80ms,0.1%,queue=64kib", 0.95),
        ("100mbit,80ms,0.1%,queue=30kib", 0.92),
        ("100mbit,80ms,1%,queue=64kib", 0.92),
    ] {
        let [[part, dropped]] = over(&mut settled(shape), &[0], shape, 30)[..] else {
            panic!("one flow");
        };
        println!("{shape}: share {part:.3} dropped {dropped:.4}");
        assert!(part > least && dropped < 0.005, "{shape} {part} {dropped}");
    }
}

#[test]
fn goes_on_where_a_tenth_of_the_packets_is_lost() {
    let shape = "100mbit,80ms,10%";
    let [[part, _]] = over(&mut settled(shape), &[0], shape, 20)[..] else {
        panic!("one flow");
    };
    // What is lost cannot be delivered: 0.9 is all there is.
    assert!(part > 0.85, "{part}");
}

#[test]
fn is_not_fooled_by_jitter() {
    for shape in [
        "100mbit,80ms,0.1%,jitter=10ms",
        "100mbit,20ms,0.1%,jitter=5ms",
    ] {
        let [[part, dropped]] = over(&mut settled(shape), &[0], shape, 30)[..] else {
            panic!("one flow");
        };
        println!("{shape}: share {part:.3} dropped {dropped:.4}");
        assert!(part > 0.75 && dropped < 0.005, "{shape} {part} {dropped}");
    }
}

#[test]
fn follows_a_path_that_becomes_longer_or_shorter() {
    let (short, long) = ("100mbit,80ms,0.1%", "100mbit,160ms,0.1%");
    let mut simulation = settled(short);
    for shape in [long, short] {
        simulation.reshape(link(shape));
        simulation.run_until(simulation.now + 5 * SECOND);
        let [[part, dropped]] = over(&mut simulation, &[0], shape, 10)[..] else {
            panic!("one flow");
        };
        println!("{shape}: share {part:.3} dropped {dropped:.4}");
        assert!(part > 0.9 && dropped < 0.005, "{shape} {part} {dropped}");
    }
}

#[test]
fn is_back_soon_after_an_outage() {
    let shape = "100mbit,80ms,0.1%";
    let mut simulation = settled(shape);
    simulation.cut(true);
    simulation.run_until(simulation.now + 3 * SECOND);
    simulation.cut(false);
    simulation.run_until(simulation.now + 4 * SECOND);
    let [[part, _]] = over(&mut simulation, &[0], shape, 5)[..] else {
        panic!("one flow");
    };
    assert!(part > 0.9, "{part}");
}

#[test]
fn takes_the_link_back_when_a_neighbour_leaves() {
    let shape = "100mbit,80ms,0%";
    let mut simulation = settled(shape);
    let neighbour = simulation.add(10 * SECOND, tcp(Kind::Cubic));
    simulation.run_until(40 * SECOND);
    simulation.stop(neighbour);
    simulation.run_until(43 * SECOND);
    let [[part, dropped]] = over(&mut simulation, &[0], shape, 5)[..] else {
        panic!("one flow");
    };
    assert!(part > 0.9 && dropped < 0.005, "{part} {dropped}");
}

#[test]
fn a_pause_of_the_application_costs_nothing() {
    let shape = "100mbit,80ms,0.1%";
    let mut simulation = settled(shape);
    simulation.offer(0, Some(5e6));
    simulation.run_until(30 * SECOND);
    simulation.offer(0, None);
    simulation.run_until(31 * SECOND);
    let [[part, dropped]] = over(&mut simulation, &[0], shape, 5)[..] else {
        panic!("one flow");
    };
    assert!(part > 0.93 && dropped < 0.005, "{part} {dropped}");
}

#[test]
fn two_of_ours_share_a_link() {
    let shape = "100mbit,80ms,0.1%";
    let mut simulation = settled(shape);
    simulation.add(10 * SECOND, ours(RateOptions::default()));
    simulation.run_until(30 * SECOND);
    let [[first, one], [second, other]] = over(&mut simulation, &[0, 1], shape, 30)[..] else {
        panic!("two flows");
    };
    println!("{first:.3} and {second:.3}, dropped {one:.4} and {other:.4}");
    assert!(first + second > 0.93, "{first} {second}");
    assert!(first.min(second) > 0.25, "{first} {second}");
    assert!(one < 0.005 && other < 0.005, "{one} {other}");
}

#[test]
fn a_known_rate_is_reached_at_once() {
    let shape = "100mbit,300ms,0.1%";
    let options = RateOptions {
        initial: Some(90_000_000),
        ..RateOptions::default()
    };
    let mut simulation = Simulation::new(link(shape), 1);
    let flow = simulation.add(0, ours(options));
    simulation.run_until(2 * SECOND);
    let [[part, dropped]] = over(&mut simulation, &[flow], shape, 10)[..] else {
        panic!("one flow");
    };
    assert!(part > 0.93 && dropped < 0.005, "{part} {dropped}");
}

/// Two hosts that have other work look at what came milliseconds late. That is no queue,
/// and to send less does not end it.
#[test]
fn busy_hosts_on_a_short_path_do_not_pass_for_a_queue() {
    let mut failures = Vec::new();
    for shape in ["200mbit,0.2ms", "200mbit,1ms", "200mbit,4ms"] {
        for late in [(1, 4), (2, 6), (3, 12), (8, 20)] {
            let mut simulation = settled(shape);
            simulation.be_busy(late.0 * MILLI, late.1 * MILLI);
            let parts: Vec<f64> = (0..9)
                .map(|_| over(&mut simulation, &[0], shape, 10)[0][0])
                .collect();
            println!("{shape}, {late:?} ms late: {parts:.2?}");
            if parts.iter().any(|part| *part < 0.18) {
                failures.push((shape, late, parts));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:.2?}");
}

/// What busy hosts are granted would be queue where the path has become slow, and would be
/// lost where the queue has no room for it.
#[test]
fn a_short_path_that_becomes_slow_keeps_its_queue_short() {
    for slow in [
        "50mbit,2ms",
        "50mbit,2ms,queue=64kib",
        "50mbit,2ms,1%,queue=64kib",
        "200mbit,2ms,queue=64kib",
    ] {
        let mut simulation = settled("200mbit,2ms");
        simulation.reshape(link(slow));
        simulation.run_until(simulation.now + 5 * SECOND);
        let before = simulation.tally(0);
        let [[part, dropped]] = over(&mut simulation, &[0], slow, 20)[..] else {
            panic!("one flow");
        };
        let rtt = simulation.tally(0).since(&before).rtt_ms();
        println!("{slow}: share {part:.3} dropped {dropped:.4} rtt {rtt:.1} ms");
        assert!(part > 0.9 && dropped < 0.005, "{slow} {part} {dropped}");
        assert!(rtt < 12.0, "{slow} {rtt} ms");
    }
}
