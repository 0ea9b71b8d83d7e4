//! A cap in bits a second.

use std::time::{Duration, Instant};

/// What an idle bucket saves up: this much time of the cap.
const BURST: Duration = Duration::from_millis(20);
/// The bucket counts in bits times nanoseconds per second, so that no rate rounds.
const BIT: i128 = 1_000_000_000;

/// A cap in bits a second, exact in the mean for requests of any size.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Bits a second; 0 is no cap.
    cap: u64,
    /// What may be sent now, in bits times 10^9; negative after a large request.
    balance: i128,
    filled: Instant,
    /// What is saved up at most, as time of the cap.
    burst: Duration,
}

impl TokenBucket {
    /// A bucket of `cap` bits a second that has nothing saved up; 0 is no cap.
    pub fn new(cap: u64, now: Instant) -> Self {
        Self {
            cap,
            balance: 0,
            filled: now,
            burst: BURST,
        }
    }

    /// As much time of the cap is saved up as this, instead of 20 ms.
    pub fn saving(mut self, burst: Duration) -> Self {
        self.burst = burst;
        self
    }

    /// The cap in bits a second; 0 is none.
    pub fn cap(&self) -> u64 {
        self.cap
    }

    /// Changes the cap at once. A debt stays, but is paid off at the new rate.
    pub fn set_cap(&mut self, now: Instant, cap: u64) {
        self.fill(now);
        self.cap = cap;
        if cap == 0 {
            self.balance = 0;
        }
        self.balance = self.balance.min(self.most());
    }

    /// How long until something may be sent; zero if now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.fill(now);
        if self.cap == 0 || self.balance >= 0 {
            return Duration::ZERO;
        }
        let nanos = self.balance.unsigned_abs().div_ceil(u128::from(self.cap));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `bytes` if something may be sent now; otherwise how long to wait.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let wait = self.wait(now);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.charge(bytes);
        Ok(())
    }

    /// Takes `bytes` whether they may be sent now or not: what follows waits for them.
    pub fn charge(&mut self, bytes: u64) {
        if self.cap > 0 {
            self.balance = self.balance.saturating_sub(i128::from(bytes) * 8 * BIT);
        }
    }

    fn most(&self) -> i128 {
        i128::from(self.cap).saturating_mul(self.burst.as_nanos() as i128)
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        // A clock that jumped by years must not overflow the product.
        let nanos = elapsed.as_nanos().min(u128::from(u64::MAX)) as i128;
        let gained = i128::from(self.cap).saturating_mul(nanos);
        self.balance = self.balance.saturating_add(gained).min(self.most());
    }
}
