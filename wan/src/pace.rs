//! How fast data may leave: a cap in bits a second, and shares of it between flows.
//!
//! Flows (a group, a guest, whatever has a name) ask to send so many bytes with
//! [`Pace::request`]; [`Pace::grant`] says which flow may go next, or how long to wait. The
//! cap is a token bucket that may be overdrawn by one request, so that requests of any
//! size pass and the mean is exact. Between flows, deficit round robin gives each backlogged
//! flow its weight's part of the bytes, whatever the sizes of its requests. Time is an
//! argument; nothing here sleeps or sends.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// The largest single request, which also bounds by how much the bucket is overdrawn.
pub const REQUEST_LIMIT: u64 = 16 << 20;
/// Flows that one [`Pace`] tells apart.
pub const FLOW_LIMIT: usize = 4_096;
/// Requests that one flow may have waiting.
pub const BACKLOG_LIMIT: usize = 1_024;
/// The largest weight of a flow.
pub const WEIGHT_LIMIT: u32 = 1_000;

/// What an idle bucket saves up: this much time of the cap.
const BURST: Duration = Duration::from_millis(20);
/// Bytes a flow of weight 1 may send in its turn.
const QUANTUM: u64 = 64 * 1024;
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
}

impl TokenBucket {
    /// A bucket of `cap` bits a second that has nothing saved up; 0 is no cap.
    pub fn new(cap: u64, now: Instant) -> Self {
        Self {
            cap,
            balance: 0,
            filled: now,
        }
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
        if self.cap > 0 {
            self.balance -= i128::from(bytes) * 8 * BIT;
        }
        Ok(())
    }

    fn most(&self) -> i128 {
        i128::from(self.cap) * BURST.as_nanos() as i128
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

/// Why a request or a weight is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PaceError {
    /// One request is larger than [`REQUEST_LIMIT`].
    #[error("a request of {0} bytes is more than {REQUEST_LIMIT}: send it in parts")]
    RequestTooLarge(u64),
    /// The flow has [`BACKLOG_LIMIT`] requests waiting.
    #[error("the flow has {BACKLOG_LIMIT} requests waiting: take grants before asking for more")]
    BacklogFull,
    /// There are [`FLOW_LIMIT`] flows.
    #[error("there are {FLOW_LIMIT} flows already: remove one that has ended")]
    TooManyFlows,
    /// A weight is 0 or more than [`WEIGHT_LIMIT`].
    #[error("a weight of {0} is not between 1 and {WEIGHT_LIMIT}")]
    Weight(u32),
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant<F> {
    /// This flow may send its oldest request, of so many bytes.
    Send(F, u64),
    /// The cap is used up; ask again after this time.
    Wait(Duration),
    /// No flow has anything to send.
    Idle,
}

#[derive(Debug, Clone)]
struct Flow {
    weight: u32,
    deficit: u64,
    waiting: VecDeque<u64>,
}

/// A capped link shared by named flows.
#[derive(Debug, Clone)]
pub struct Pace<F> {
    bucket: TokenBucket,
    flows: BTreeMap<F, Flow>,
    /// Flows with something to send, the one whose turn it is first.
    turns: VecDeque<F>,
    /// Whether the flow in front already got its quantum for this turn.
    credited: bool,
}

impl<F: Ord + Clone> Pace<F> {
    /// A link of `cap` bits a second (0 is no cap) without flows.
    pub fn new(cap: u64, now: Instant) -> Self {
        Self {
            bucket: TokenBucket::new(cap, now),
            flows: BTreeMap::new(),
            turns: VecDeque::new(),
            credited: false,
        }
    }

    /// Changes the cap at once; 0 is none.
    pub fn set_cap(&mut self, now: Instant, cap: u64) {
        self.bucket.set_cap(now, cap);
    }

    /// Gives a flow its weight, from its next turn on. A flow that asked without one has 1.
    pub fn set_weight(&mut self, flow: F, weight: u32) -> Result<(), PaceError> {
        if weight == 0 || weight > WEIGHT_LIMIT {
            return Err(PaceError::Weight(weight));
        }
        self.flow(&flow)?.weight = weight;
        Ok(())
    }

    /// Forgets a flow and what it has waiting.
    pub fn remove(&mut self, flow: &F) {
        self.flows.remove(flow);
        if self.turns.front() == Some(flow) {
            self.credited = false;
        }
        self.turns.retain(|other| other != flow);
    }

    /// The flow wants to send `bytes`; they are granted in the order they were asked for.
    pub fn request(&mut self, flow: F, bytes: u64) -> Result<(), PaceError> {
        if bytes > REQUEST_LIMIT {
            return Err(PaceError::RequestTooLarge(bytes));
        }
        let known = self.flow(&flow)?;
        if known.waiting.len() >= BACKLOG_LIMIT {
            return Err(PaceError::BacklogFull);
        }
        known.waiting.push_back(bytes);
        if known.waiting.len() == 1 {
            self.turns.push_back(flow);
        }
        Ok(())
    }

    /// Which flow may send now.
    pub fn grant(&mut self, now: Instant) -> Grant<F> {
        if self.turns.is_empty() {
            return Grant::Idle;
        }
        let wait = self.bucket.wait(now);
        if !wait.is_zero() {
            return Grant::Wait(wait);
        }
        // Every turn adds at least a quantum, so a flow's largest request comes up after at
        // most `REQUEST_LIMIT / QUANTUM` turns.
        while let Some(name) = self.turns.front().cloned() {
            let Some(flow) = self.flows.get_mut(&name) else {
                self.turns.pop_front();
                continue;
            };
            if !self.credited {
                flow.deficit += QUANTUM * u64::from(flow.weight);
                self.credited = true;
            }
            match flow.waiting.front().copied() {
                Some(bytes) if bytes <= flow.deficit => {
                    flow.deficit -= bytes;
                    flow.waiting.pop_front();
                    if flow.waiting.is_empty() {
                        // What an idle flow did not use is not saved up.
                        flow.deficit = 0;
                        self.next_turn(false);
                    }
                    // `wait` was zero, so this takes without refusing.
                    let _ = self.bucket.take(now, bytes);
                    return Grant::Send(name, bytes);
                }
                Some(_) => self.next_turn(true),
                None => self.next_turn(false),
            }
        }
        Grant::Idle
    }

    fn next_turn(&mut self, stays: bool) {
        self.credited = false;
        if let Some(name) = self.turns.pop_front()
            && stays
        {
            self.turns.push_back(name);
        }
    }

    fn flow(&mut self, flow: &F) -> Result<&mut Flow, PaceError> {
        if !self.flows.contains_key(flow) && self.flows.len() >= FLOW_LIMIT {
            return Err(PaceError::TooManyFlows);
        }
        Ok(self.flows.entry(flow.clone()).or_insert_with(|| Flow {
            weight: 1,
            deficit: 0,
            waiting: VecDeque::new(),
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
