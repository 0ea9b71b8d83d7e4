//! How much may be on its way at once.
//!
//! A batch that was taken is fixed, and what it tells of a guest gets old while
//! it waits. Too little in the queue and the link runs dry whenever the
//! producer is late; so it holds what fills the path, and what leaves while the
//! producer makes the next batch.

use std::time::Duration;

/// Two large batches (64 units that do not compress): while one leaves, the
/// next is there, however slow the link.
pub const AHEAD_BYTES: u64 = 512 << 10;

/// The producer may be late by so much before the link runs dry.
const AHEAD: Duration = Duration::from_millis(100);

/// Bytes that may be on their way over a path with this congestion window and
/// round trip: what is in flight, and as much again, or what leaves in a tenth
/// of a second, or `ahead` (usually [`AHEAD_BYTES`]), whichever is most.
pub fn queue_bytes(congestion_window: u64, rtt: Duration, ahead: u64) -> u64 {
    let rate = congestion_window as f64 / rtt.as_secs_f64().max(1e-4);
    let late = (rate * AHEAD.as_secs_f64()) as u64;
    congestion_window.saturating_add(congestion_window.max(late).max(ahead))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most that waits beyond what is in flight, in time of the link.
    fn waits(megabits: u64, rtt_ms: u64) -> Duration {
        let rate = megabits * 125_000;
        let rtt = Duration::from_millis(rtt_ms);
        let flight = rate * rtt_ms / 1000;
        let queued = queue_bytes(flight, rtt, AHEAD_BYTES) - flight;
        Duration::from_secs_f64(queued as f64 / rate as f64)
    }

    #[test]
    fn what_waits_leaves_within_a_few_hundred_milliseconds() {
        for (megabits, rtt_ms) in [(20, 80), (100, 80), (500, 40), (1000, 100), (5000, 1)] {
            let waits = waits(megabits, rtt_ms);
            assert!(
                waits >= AHEAD.mul_f64(0.99),
                "{megabits} {rtt_ms}: {waits:?}"
            );
            assert!(
                waits <= Duration::from_millis(250),
                "{megabits} {rtt_ms}: {waits:?}"
            );
        }
        assert_eq!(queue_bytes(0, Duration::ZERO, 77), 77);
        assert_eq!(queue_bytes(u64::MAX, Duration::ZERO, 0), u64::MAX);
    }
}
