//! Lines that a stranger, or a peer, can cause are logged at most once a second: a log is
//! disk space too.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(1);

/// Lets one line through each second, and counts the others.
#[derive(Debug, Default)]
pub struct Gate(Mutex<(Option<Instant>, u64)>);

impl Gate {
    /// `Some` with the number of lines kept back since the last one, when a
    /// line may be logged now.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, kept_back) = *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < PERIOD) {
            state.1 += 1;
            return None;
        }
        *state = (Some(now), 0);
        Some(kept_back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second() {
        let gate = Gate::default();
        let start = Instant::now();
        assert_eq!(gate.pass(start), Some(0));
        for tenth in 1..10 {
            assert_eq!(gate.pass(start + PERIOD * tenth / 10), None);
        }
        assert_eq!(gate.pass(start + PERIOD), Some(9));
        assert_eq!(gate.pass(start + 2 * PERIOD), Some(0));
    }
}
