//! One instant for several guests: nobody is stopped before everybody is ready
//! to be, and nobody goes on before everybody has stopped.
//!
//! All waits are bounded. Whoever does not come in time ends the cut for all:
//! they go on, nothing of it counts, and the reason is told.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::work::Bell;

/// What a cut passes on its way, if others are cut with it.
pub trait CutGate: Send + Sync {
    /// All that takes long is done, while the guest runs and its filesystems are
    /// not frozen. Returns when they may be: whoever is late with its own
    /// preparation keeps nobody frozen.
    ///
    /// # Errors
    /// When the cut is given up: nothing was done to the guest.
    fn gather(&self) -> Result<(), GateError>;

    /// All that can be done while the guest runs is done. Returns when it is to
    /// be stopped.
    ///
    /// # Errors
    /// When the cut is given up: the guest was not stopped.
    fn ready(&self) -> Result<(), GateError>;

    /// The guest stands still.
    fn stopped(&self);

    /// All of the instant is fixed. Returns when the guest may go on.
    ///
    /// # Errors
    /// When the cut is given up: the guest goes on, and nothing of it counts.
    fn may_go_on(&self) -> Result<(), GateError>;
}

/// A cut of several guests was given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the cut of the whole group was given up: {0}; its guests go on")]
pub struct GateError(String);

/// A guest that is cut by itself.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl CutGate for Alone {
    fn gather(&self) -> Result<(), GateError> {
        Ok(())
    }

    fn ready(&self) -> Result<(), GateError> {
        Ok(())
    }

    fn stopped(&self) {}

    fn may_go_on(&self) -> Result<(), GateError> {
        Ok(())
    }
}

/// How long others are waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// While all run: for those that are not ready.
    pub ready: Duration,
    /// While all run: for agents that freeze filesystems, beside the above.
    pub freeze: Duration,
    /// While some stand still: for those that are not stopped.
    pub stopped: Duration,
}

/// All have gathered: who was not frozen for it is ready at once.
const AT_ONCE: Duration = Duration::from_secs(5);

impl Default for Patience {
    fn default() -> Self {
        Self {
            ready: Duration::from_secs(5),
            freeze: Duration::ZERO,
            stopped: Duration::from_secs(1),
        }
    }
}

/// Where the guests of one cut meet.
#[derive(Debug)]
pub struct Rendezvous {
    members: usize,
    patience: Patience,
    state: Mutex<State>,
    turned: Bell,
}

#[derive(Debug, Default)]
struct State {
    gathered: usize,
    ready: usize,
    stops: Vec<Instant>,
    given_up: Option<GateError>,
}

impl Rendezvous {
    /// For so many guests.
    pub fn new(members: usize, patience: Patience) -> Self {
        Self {
            members,
            patience,
            state: Mutex::default(),
            turned: Bell::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest cannot be cut: the others need not wait for it.
    pub fn give_up(&self, why: &str) {
        let mut state = self.lock();
        state
            .given_up
            .get_or_insert_with(|| GateError(why.to_owned()));
        self.turned.ring();
    }

    /// From the first stop to the last, once all have stopped.
    pub fn skew(&self) -> Option<Duration> {
        let state = self.lock();
        if state.stops.len() < self.members {
            return None;
        }
        let (first, last) = (state.stops.iter().min()?, state.stops.iter().max()?);
        Some(last.duration_since(*first))
    }

    /// Comes to where all meet while they run, and waits for the others there.
    fn meet(
        &self,
        patience: Duration,
        come: impl Fn(&mut State) -> &mut usize,
    ) -> Result<(), GateError> {
        let mut state = self.lock();
        // Whoever comes late is not frozen, nor stopped, for nothing.
        if let Some(why) = &state.given_up {
            return Err(why.clone());
        }
        *come(&mut state) += 1;
        self.turned.ring();
        self.wait(state, patience, |s| *come(s), "ready")
    }

    /// Waits until so many have come; whoever waits in vain gives the cut up for all.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        patience: Duration,
        come: impl Fn(&mut State) -> usize,
        what: &str,
    ) -> Result<(), GateError> {
        let deadline = Instant::now() + patience;
        loop {
            // First: what all have passed cannot be given up any more.
            if come(&mut state) >= self.members {
                return Ok(());
            }
            if let Some(why) = &state.given_up {
                return Err(why.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = GateError(format!(
                    "{} of {} guests were {what} within {patience:?}",
                    come(&mut state),
                    self.members
                ));
                state.given_up = Some(why.clone());
                self.turned.ring();
                return Err(why);
            }
            state = self.turned.wait(&self.state, state, left);
        }
    }
}

impl CutGate for Rendezvous {
    fn gather(&self) -> Result<(), GateError> {
        self.meet(self.patience.ready, |s| &mut s.gathered)
    }

    fn ready(&self) -> Result<(), GateError> {
        let patience = self.patience.freeze + self.patience.ready.min(AT_ONCE);
        self.meet(patience, |s| &mut s.ready)
    }

    fn stopped(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        // Some may have gone on by now: it is no instant of all any more.
        if state.given_up.is_none() {
            state.stops.push(now);
        }
        self.turned.ring();
    }

    fn may_go_on(&self) -> Result<(), GateError> {
        let patience = self.patience.stopped;
        self.wait(self.lock(), patience, |s| s.stops.len(), "stopped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SHORT: Patience = Patience {
        ready: Duration::from_millis(200),
        freeze: Duration::ZERO,
        stopped: Duration::from_millis(200),
    };
    const LONG: Patience = Patience {
        ready: Duration::from_secs(60),
        freeze: Duration::from_secs(60),
        stopped: Duration::from_secs(60),
    };

    #[test]
    fn nobody_stops_before_all_are_ready_or_goes_on_before_all_have_stopped() {
        let gate = Arc::new(Rendezvous::new(3, LONG));
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let members: Vec<_> = (0..3)
            .map(|n| {
                let (gate, counts) = (gate.clone(), counts.clone());
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(20 * n));
                    counts[0].fetch_add(1, Ordering::SeqCst);
                    gate.gather()?;
                    assert_eq!(counts[0].load(Ordering::SeqCst), 3);
                    gate.ready()?;
                    std::thread::sleep(Duration::from_millis(10 * n));
                    counts[1].fetch_add(1, Ordering::SeqCst);
                    gate.stopped();
                    gate.may_go_on()?;
                    assert_eq!(counts[1].load(Ordering::SeqCst), 3);
                    Ok::<(), GateError>(())
                })
            })
            .collect();
        for member in members {
            assert_eq!(member.join().map_err(|_| ()), Ok(Ok(())));
        }
        assert!(
            gate.skew() >= Some(Duration::from_millis(10)),
            "{:?}",
            gate.skew()
        );
        // What all have passed is not given up any more.
        gate.give_up("too late");
        assert_eq!(gate.may_go_on(), Ok(()));
    }

    #[test]
    fn a_partner_that_never_comes_is_not_waited_for_long() {
        let gate = Rendezvous::new(2, SHORT);
        assert!(gate.gather().is_err());
        let gate = Rendezvous::new(2, SHORT);
        let why = gate.ready().map_err(|e| e.to_string());
        assert!(why.is_err_and(|why| why.contains("1 of 2")));
        assert!(gate.ready().is_err(), "it is given up for all");
        assert_eq!(gate.skew(), None);
    }

    #[test]
    fn a_partner_that_does_not_stop_lets_the_others_go() {
        let gate = Arc::new(Rendezvous::new(2, SHORT));
        let other = {
            let gate = gate.clone();
            std::thread::spawn(move || gate.ready())
        };
        assert_eq!(gate.ready(), Ok(()));
        assert_eq!(other.join().map_err(|_| ()), Ok(Ok(())));
        gate.stopped();
        assert!(gate.may_go_on().is_err());
        let gate = Rendezvous::new(2, LONG);
        gate.give_up("its hypervisor is gone");
        let why = gate.ready().map_err(|e| e.to_string());
        assert!(why.is_err_and(|why| why.contains("hypervisor is gone")));
    }
}
