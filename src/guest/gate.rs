//! One instant for several guests: nobody is stopped before everybody is ready
//! to be, and nobody goes on before everybody has stopped. Nothing else is begun
//! before that either: what one does with its stopped guest would keep the stop
//! of the next from the CPU.
//!
//! A stop takes what the host's scheduler makes of it. Stops that come too far
//! apart are undone and made again, while that costs the guests next to nothing.
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

    /// The guest stands still since `at`. Returns when all do.
    ///
    /// # Errors
    /// When the cut is given up: the guest goes on, and nothing of it counts.
    fn stopped(&self, at: Instant) -> Result<Stood, GateError>;
}

/// How those of a cut came to stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stood {
    /// At one instant: it is to be fixed now, and then they may go on.
    Together,
    /// Too far apart: the guest goes on, and comes to [`CutGate::ready`] again.
    Apart,
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

    fn stopped(&self, _: Instant) -> Result<Stood, GateError> {
        Ok(Stood::Together)
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
    /// From the first stop to the last: further apart, they are stopped again.
    pub skew: Duration,
}

/// What the stops of one cut are apart at most, where the host's scheduler lets them.
pub const SKEW: Duration = Duration::from_millis(5);

/// How long guests may stand for stops that are made again, together.
const TRIED: Duration = Duration::from_millis(50);

/// All have gathered: who was not frozen for it is ready at once.
const AT_ONCE: Duration = Duration::from_secs(5);

impl Default for Patience {
    fn default() -> Self {
        Self {
            ready: Duration::from_secs(5),
            freeze: Duration::ZERO,
            stopped: Duration::from_secs(1),
            skew: SKEW,
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
    /// Of all tries.
    ready: usize,
    /// Of this try.
    stops: Vec<Instant>,
    /// Stops that were undone, and what they cost.
    tries: usize,
    tried: Duration,
    /// How far apart those were that count.
    skew: Option<Duration>,
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
        self.lock().skew
    }

    /// How often all were stopped and went on again, having stood too far apart.
    pub fn tries(&self) -> usize {
        self.lock().tries
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
        // Those of one try are all there before one of the next comes.
        let before = state.tries * self.members;
        *come(&mut state) += 1;
        self.turned.ring();
        let all = self.members;
        self.wait(state, patience, "ready", |s| match *come(s) - before {
            some if some < all => Err(some),
            _ => Ok(()),
        })
    }

    /// Waits until `come` has what is waited for, else how many have come; whoever
    /// waits in vain gives the cut up for all.
    fn wait<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        patience: Duration,
        what: &str,
        come: impl Fn(&mut State) -> Result<T, usize>,
    ) -> Result<T, GateError> {
        let deadline = Instant::now() + patience;
        loop {
            // First: what all have passed cannot be given up any more.
            let some = match come(&mut state) {
                Ok(all) => return Ok(all),
                Err(some) => some,
            };
            if let Some(why) = &state.given_up {
                return Err(why.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = GateError(format!(
                    "{some} of {} guests were {what} within {patience:?}",
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

impl State {
    /// All have stopped: does that count, or is it tried again?
    fn judge(&mut self, most: Duration) {
        let (first, last) = (self.stops.iter().min(), self.stops.iter().max());
        let skew = first
            .zip(last)
            .map_or(Duration::ZERO, |(first, last)| last.duration_since(*first));
        // As long as the first one stands by now: a stop may have been slow as a whole.
        self.tried += first.map_or(skew, |first| first.elapsed().max(skew));
        if skew > most && self.tried <= TRIED {
            self.tries += 1;
            self.stops.clear();
        } else {
            self.skew = Some(skew);
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

    fn stopped(&self, at: Instant) -> Result<Stood, GateError> {
        let mut state = self.lock();
        let tries = state.tries;
        // Some may have gone on by now: it is no instant of all any more.
        if state.given_up.is_none() {
            state.stops.push(at);
            if state.stops.len() == self.members {
                state.judge(self.patience.skew);
            }
        }
        self.turned.ring();
        self.wait(state, self.patience.stopped, "stopped", |s| {
            match (s.tries > tries, s.skew) {
                (true, _) => Ok(Stood::Apart),
                (false, Some(_)) => Ok(Stood::Together),
                (false, None) => Err(s.stops.len()),
            }
        })
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
        skew: Duration::from_secs(60),
    };
    const LONG: Patience = Patience {
        ready: Duration::from_secs(60),
        freeze: Duration::from_secs(60),
        stopped: Duration::from_secs(60),
        skew: Duration::from_secs(60),
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
                    assert_eq!(gate.stopped(Instant::now())?, Stood::Together);
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
        assert!(gate.skew().is_some());
    }

    /// Stops of two guests, one then and the other this much later each time, until
    /// they count.
    fn stops(begun: Instant, apart: &[Duration]) -> (Rendezvous, Vec<Stood>) {
        let patience = Patience { skew: SKEW, ..LONG };
        let gate = Rendezvous::new(2, patience);
        let stood = Mutex::new(Vec::new());
        let run = |late: bool| -> Result<(), GateError> {
            for apart in apart {
                gate.ready()?;
                let at = begun + if late { *apart } else { Duration::ZERO };
                let how = gate.stopped(at)?;
                if late {
                    stood.lock().map_err(|_| ()).map(|mut s| s.push(how)).ok();
                }
                if how == Stood::Together {
                    break;
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let members = [false, true].map(|late| scope.spawn(move || run(late)));
            for member in members {
                assert_eq!(member.join().map_err(|_| ()), Ok(Ok(())));
            }
        });
        let stood = stood.into_inner().unwrap_or_default();
        (gate, stood)
    }

    /// However slow this machine is, nobody has stood for long by then.
    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn stops_that_are_far_apart_are_made_again() {
        let ms = Duration::from_millis;
        let (gate, stood) = stops(soon(), &[ms(9), ms(7), ms(3), ms(1)]);
        assert_eq!(stood, [Stood::Apart, Stood::Apart, Stood::Together]);
        assert_eq!((gate.skew(), gate.tries()), (Some(ms(3)), 2));
    }

    #[test]
    fn tries_do_not_keep_the_guests_from_their_work() {
        let ms = Duration::from_millis;
        // A host that is as busy as that is so the next time.
        let (gate, stood) = stops(soon(), &[ms(60), ms(1)]);
        assert_eq!(stood, [Stood::Together]);
        assert_eq!(gate.skew(), Some(ms(60)));
        let (gate, stood) = stops(soon(), &[ms(20); 9]);
        assert_eq!(stood, [Stood::Apart, Stood::Apart, Stood::Together]);
        assert_eq!((gate.skew(), gate.tries()), (Some(ms(20)), 2));
        // Not far apart, and each took long: the next would, too.
        let long_ago = Instant::now() - ms(300);
        let (gate, stood) = stops(long_ago, &[ms(9), ms(1)]);
        assert_eq!(stood, [Stood::Together]);
        assert_eq!(gate.skew(), Some(ms(9)));
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
        assert!(gate.stopped(Instant::now()).is_err());
        let gate = Rendezvous::new(2, LONG);
        gate.give_up("its hypervisor is gone");
        let why = gate.ready().map_err(|e| e.to_string());
        assert!(why.is_err_and(|why| why.contains("hypervisor is gone")));
    }
}
