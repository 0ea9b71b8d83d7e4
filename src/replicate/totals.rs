//! How much of a guest's data went out, told to whoever looks while it does.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Progress of a guest's data, readable while a shipment works.
#[derive(Debug, Default)]
pub struct Totals {
    /// Bytes looked at in the round under way.
    pub done: AtomicU64,
    /// Bytes to look at in the round under way.
    pub total: AtomicU64,
    /// Guest bytes handed over since protection began.
    pub changed_bytes: AtomicU64,
    /// Bytes of batches since protection began.
    pub sent_bytes: AtomicU64,
    /// What `sent_bytes` was when it was looked at, the oldest first.
    seen: Mutex<VecDeque<(Instant, u64)>>,
}

impl Totals {
    /// Batch bytes a second over the last seconds in which somebody asked:
    /// cuts come every second or so, and a shorter look would see bursts and
    /// silence by turns.
    pub fn throughput(&self) -> u64 {
        self.throughput_at(Instant::now())
    }

    fn throughput_at(&self, now: Instant) -> u64 {
        const SPAN: Duration = Duration::from_secs(5);
        const APART: Duration = Duration::from_millis(500);
        let sent = self.sent_bytes.load(Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = seen.back().map(|(at, _)| now.duration_since(*at));
        if newest.is_none_or(|since| since >= APART) {
            seen.push_back((now, sent));
        }
        // The oldest that is kept is the newest of those older than the span.
        while seen
            .get(1)
            .is_some_and(|(at, _)| now.duration_since(*at) >= SPAN)
        {
            seen.pop_front();
        }
        let Some((at, before)) = seen.front() else {
            return 0;
        };
        match now.duration_since(*at) {
            Duration::ZERO => 0,
            span => (sent.saturating_sub(*before) as f64 / span.as_secs_f64()) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_of_cuts_are_one_steady_rate() {
        let totals = Totals::default();
        let began = Instant::now();
        let mut rates = Vec::new();
        for tick in 0..200_u64 {
            // Every two seconds, 2 MB at once; asked every tenth of a second.
            if tick % 20 == 0 {
                totals.sent_bytes.fetch_add(2_000_000, Ordering::Relaxed);
            }
            rates.push(totals.throughput_at(began + Duration::from_millis(tick * 100)));
        }
        assert!(rates[60..].iter().all(|r| (600_000..1_500_000).contains(r)));
    }

    #[test]
    fn one_who_asks_seldom_gets_the_mean() {
        let totals = Totals::default();
        let began = Instant::now();
        assert_eq!(totals.throughput_at(began), 0);
        totals.sent_bytes.store(60_000, Ordering::Relaxed);
        assert_eq!(totals.throughput_at(began + Duration::from_secs(60)), 1000);
        assert_eq!(totals.throughput_at(began + Duration::from_secs(120)), 0);
    }
}
