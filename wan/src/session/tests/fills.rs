//! A queue that is short keeps the link full: a path of some rate and round
//! trip in virtual time, batches of any size, a producer that is late.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::super::*;

/// Microseconds.
const TICK: u64 = 500;

struct Measured {
    /// Of the time, the link carried data.
    busy: f64,
    /// Longest that a batch waited between being taken and its first byte on the wire.
    waited: Duration,
    /// Mean bytes taken that were neither on the wire nor at the peer.
    waiting: u64,
}

/// Sends as fast as the path takes it for some seconds. `cwnd` is in round
/// trips of the path's product; the producer needs `late` for each batch, the
/// peer `sync` to make one durable.
fn run(megabits: u64, rtt_ms: u64, batch: usize, late_us: u64, bounded: bool) -> Measured {
    let rate = megabits as f64 / 8.0; // Bytes in a microsecond.
    let rtt = rtt_ms * 1000;
    let product = (rate * rtt as f64) as u64;
    let mut sender = Sender::new(16 << 20);
    if bounded {
        sender.queue_up_to(queue_bytes(
            product,
            Duration::from_micros(rtt),
            AHEAD_BYTES,
        ));
    }
    sender
        .resume(&crate::frame::Resume::default())
        .expect("nothing");
    let (mut seq, mut now, mut ready) = (0u64, 0u64, 0u64);
    let mut taken: Vec<u64> = Vec::new();
    let mut leaving: Option<(Outgoing, f64)> = None;
    let mut heard: VecDeque<(u64, u64)> = VecDeque::new();
    let mut durable: VecDeque<(u64, u64)> = VecDeque::new();
    let (mut busy, mut ticks, mut waited, mut waiting) = (0.0, 0u64, 0, 0u64);
    let payload = Bytes::from(vec![1; batch]);
    let end = 20_000_000;
    while now < end {
        now += TICK;
        while heard.front().is_some_and(|(at, _)| *at <= now) {
            let (_, seq) = heard.pop_front().expect("looked at");
            sender.arrived(&[seq]);
        }
        while durable.front().is_some_and(|(at, _)| *at <= now) {
            let (_, seq) = durable.pop_front().expect("looked at");
            sender.acknowledged(&[(seq, seq)]).expect("honest");
        }
        while ready <= now && sender.submit(seq, payload.clone()).is_ok() {
            taken.push(now);
            seq += 1;
            ready = ready.max(now - TICK) + late_us;
        }
        let mut room = rate * TICK as f64;
        while room > 0.0 {
            if leaving.is_none() {
                leaving = sender.next().map(|batch| {
                    waited = waited.max(now - taken[batch.seq as usize]);
                    (batch, batch_bytes(&payload))
                });
            }
            let Some((batch, left)) = &mut leaving else {
                break;
            };
            let sent = left.min(room);
            room -= sent;
            *left -= sent;
            if now > 1_000_000 {
                busy += sent;
            }
            if *left <= 0.0 {
                heard.push_back((now + rtt, batch.seq));
                // Half a trip there, a slow disk, half a trip back.
                durable.push_back((now + rtt + 60_000, batch.seq));
                leaving = None;
            }
        }
        let flight = (heard.len() * batch) as u64;
        waiting += sender.queued_bytes().saturating_sub(flight);
        ticks += 1;
    }
    Measured {
        busy: busy / (rate * (end - 1_000_000) as f64),
        waited: Duration::from_micros(waited),
        waiting: waiting / ticks,
    }
}

fn batch_bytes(payload: &Bytes) -> f64 {
    payload.len() as f64
}

#[test]
fn a_short_queue_keeps_the_link_full() {
    for (megabits, rtt_ms) in [(2, 80), (20, 80), (100, 80), (500, 40), (1000, 20)] {
        for batch in [3_000, 100_000, 264_000] {
            // The producer makes 2.5 times what the link carries, never more
            // than 60 ms late.
            let late = (batch as f64 / (megabits as f64 / 8.0 * 2.5)).min(60_000.0) as u64;
            let short = run(megabits, rtt_ms, batch, late, true);
            let long = run(megabits, rtt_ms, batch, late, false);
            eprintln!(
                "{megabits} Mbit/s {rtt_ms} ms, batches of {batch}: busy {:.4} ({:.4}), waits {:?} ({:?}), {} ({}) bytes",
                short.busy, long.busy, short.waited, long.waited, short.waiting, long.waiting
            );
            assert!(
                short.busy >= long.busy - 0.002,
                "{megabits} Mbit/s {rtt_ms} ms, batches of {batch}: {} of {}",
                short.busy,
                long.busy
            );
            assert!(short.busy > 0.99, "{megabits} {rtt_ms} {batch}");
            if megabits >= 20 {
                assert!(
                    short.waited < Duration::from_millis(400),
                    "{megabits} {rtt_ms} {batch}: {:?}",
                    short.waited
                );
            }
        }
    }
}
