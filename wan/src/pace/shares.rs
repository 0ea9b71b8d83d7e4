//! Turns for tasks that wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::turns::{Next, Pace, PaceError, Rank, Ticket};
use crate::SiteKey;
use crate::limits::MAX_BATCH_BYTES;

/// What a flow sends through: a window that may be full.
pub trait Door {
    /// Why it can never be sent.
    type Error;

    /// Sends it if there is room; false if there is none now. Must not block.
    ///
    /// # Errors
    /// When it can never be sent.
    fn attempt(&mut self) -> Result<bool, Self::Error>;

    /// Waits until a full window may have room again.
    fn room(&mut self) -> impl Future<Output = ()> + Send;
}

/// How waiting for a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// It was sent.
    Sent,
    /// The link took nothing, of anybody, for as long as there was patience.
    Stalled,
}

/// The caps and shares of a site's links: see [`super`].
pub struct Shares {
    state: Mutex<State>,
}

struct State {
    pace: Pace<u64, SiteKey>,
    /// Who waits, to be woken one by one.
    waiting: BTreeMap<Ticket, Arc<Notify>>,
    next_flow: u64,
}

impl State {
    /// Wakes whose turn it is, or who is to wait for the cap.
    fn wake_next(&mut self) {
        if let Next::Turn(ticket) | Next::Wait(_, ticket) = self.pace.next(now())
            && let Some(waiting) = self.waiting.get(&ticket)
        {
            waiting.notify_one();
        }
    }
}

/// Tokio's clock, so that tests may stop it.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl Shares {
    /// All links of a site together carry `cap` bits a second; 0 is no cap. To be called
    /// within a Tokio runtime.
    pub fn new(cap: u64) -> Arc<Shares> {
        Arc::new(Shares {
            state: Mutex::new(State {
                pace: Pace::new(cap, now()),
                waiting: BTreeMap::new(),
                next_flow: 0,
            }),
        })
    }

    /// Changes the cap at once, for those who wait, too.
    pub fn set_cap(&self, cap: u64) {
        let mut state = self.state();
        if state.pace.cap() != cap {
            state.pace.set_cap(now(), cap);
            state.wake_next();
        }
    }

    /// The cap in bits a second; 0 is none.
    pub fn cap(&self) -> u64 {
        self.state().pace.cap()
    }

    /// A flow begins, to this peer, with a weight of 1 and no cap of its own. It ends when
    /// it is dropped.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join(self: &Arc<Self>, peer: SiteKey) -> Result<Flow, PaceError> {
        let mut state = self.state();
        let id = state.next_flow;
        state.pace.join(now(), id, peer)?;
        state.next_flow += 1;
        Ok(Flow {
            shares: self.clone(),
            id,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shares")
            .field("cap", &self.cap())
            .finish_non_exhaustive()
    }
}

/// One flow of [`Shares`].
#[derive(Debug)]
pub struct Flow {
    shares: Arc<Shares>,
    id: u64,
}

impl Flow {
    /// Gives it a weight, and a cap of its own in bits a second (0 is none), at once. A flow
    /// of weight 0 goes when no other can.
    ///
    /// # Errors
    /// When the weight is too large.
    pub fn set(&self, weight: u32, cap: u64) -> Result<(), PaceError> {
        let mut state = self.shares.state();
        state.pace.set_flow(now(), &self.id, weight, cap)?;
        state.wake_next();
        Ok(())
    }

    /// Waits for its turn, and sends `bytes` through the door in it. What waits for a cap
    /// waits as long as it takes; a link that takes nothing is left after `patience`.
    /// Dropped while it waits, it has sent nothing.
    ///
    /// # Errors
    /// The door's, or [`PaceError`] for a request that cannot be.
    pub async fn pass<D: Door>(
        &self,
        bytes: u64,
        rank: Rank,
        patience: Option<Duration>,
        door: &mut D,
    ) -> Result<Passed, D::Error>
    where
        D::Error: From<PaceError>,
    {
        let waiting = Waiting::begin(self, bytes, rank)?;
        let begun = Instant::now();
        loop {
            let step = waiting.step(door)?;
            let (until_turn, stuck) = match step {
                Step::Sent => return Ok(Passed::Sent),
                Step::Wait(until_turn) => (until_turn, None),
                Step::Stuck(since, slack) => (None, Some((since, slack))),
            };
            let given_up = match (stuck, patience) {
                (Some((since, slack)), Some(patience)) => Some(begun.max(since) + patience + slack),
                _ => None,
            };
            if given_up.is_some_and(|at| at <= Instant::now()) {
                return Ok(Passed::Stalled);
            }
            tokio::select! {
                () = waiting.woken.notified() => {}
                () = sleep(until_turn.map(|wait| Instant::now() + wait)) => {}
                () = sleep(given_up) => {}
                () = door.room() => self.shares.state().pace.room(&self.id),
            }
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let mut state = self.shares.state();
        state.pace.remove(&self.id);
        state.wake_next();
    }
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

enum Step {
    Sent,
    /// Another's turn, or after this time one's own.
    Wait(Option<Duration>),
    /// The link takes nothing, since then; and how long the cap may keep it from that.
    Stuck(Instant, Duration),
}

/// A request that waits; dropping it takes it back.
struct Waiting<'a> {
    flow: &'a Flow,
    ticket: Ticket,
    woken: Arc<Notify>,
}

impl<'a> Waiting<'a> {
    fn begin(flow: &'a Flow, bytes: u64, rank: Rank) -> Result<Self, PaceError> {
        let mut state = flow.shares.state();
        let ticket = state.pace.request(&flow.id, bytes, rank)?;
        let woken = Arc::new(Notify::new());
        state.waiting.insert(ticket, woken.clone());
        Ok(Self {
            flow,
            ticket,
            woken,
        })
    }

    /// Sends if it is our turn; wakes whose turn it is if not.
    fn step<D: Door>(&self, door: &mut D) -> Result<Step, D::Error> {
        let mut state = self.flow.shares.state();
        let now = now();
        let wait = match state.pace.next(now) {
            Next::Turn(ticket) if ticket == self.ticket => {
                // Under the lock: it must not block, and nobody else's turn comes between.
                if door.attempt()? {
                    state.pace.sent(now, ticket);
                    state.waiting.remove(&ticket);
                    state.wake_next();
                    return Ok(Step::Sent);
                }
                state.pace.no_room(now, ticket);
                state.wake_next();
                None
            }
            Next::Wait(wait, ticket) if ticket == self.ticket => Some(wait),
            Next::Turn(_) | Next::Wait(..) => {
                state.wake_next();
                None
            }
            Next::NoRoom | Next::Idle => None,
        };
        let Some(since) = state.pace.stuck_since(&self.flow.id) else {
            return Ok(Step::Wait(wait));
        };
        if wait.is_some() {
            return Ok(Step::Wait(wait));
        }
        // At a small cap it takes a while until a full window has room for a batch.
        let cap = state.pace.cap();
        let slack = match cap {
            0 => Duration::ZERO,
            cap => Duration::from_secs_f64(2.0 * MAX_BATCH_BYTES as f64 * 8.0 / cap as f64),
        };
        Ok(Step::Stuck(Instant::from_std(since), slack))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.flow.shares.state();
        if state.waiting.remove(&self.ticket).is_some() {
            state.pace.cancel(self.ticket);
            // If it waited for room, others of its lane are to try.
            state.pace.room(&self.flow.id);
            state.wake_next();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
