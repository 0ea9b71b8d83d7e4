//! Holding a QEMU guest back, so that a planned move converges: a thread stops
//! it and lets it go on, ten times a second.
//!
//! The thread alone stops the guest for this, and lets it go on. Whoever needs
//! the guest running, or stopped for another reason, has the thread rest
//! first ([`Throttle::rest`]), which returns once the guest runs. A mark is in
//! the work directory while the guest stands: the attach after a daemon's death
//! finds it and lets the guest go on. A guest that somebody else has stopped is
//! left alone.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::GuestError;
use super::attach::{started, status};
use super::cut::go_on;
use super::qmp::Qmp;

/// In the work directory while the throttle has the guest stopped.
pub(super) const THROTTLE_MARK: &str = "throttled";

/// The guest stands once in so long...
const PERIOD: Duration = Duration::from_millis(100);
/// ...and at most for so long, however late its last stop came.
const LONGEST_STAND: Duration = Duration::from_millis(200);
/// After something went wrong, the guest runs freely for so long.
const AFTER_TROUBLE: Duration = Duration::from_secs(1);
/// Most that can be taken, in percent of the guest's time.
const MOST: u8 = 99;

/// A guest held back. Dropping it lets the guest run freely.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    percent: u8,
    /// The guest is needed running, or is stopped for another reason.
    resting: bool,
    ended: bool,
    /// The thread has stopped the guest.
    stands: bool,
    /// Why it could not be let go on; tried again and again.
    stuck: Option<GuestError>,
}

impl Throttle {
    /// Begins to hold a guest back. `process` is QEMU's, and when it started.
    pub(super) fn begin(
        percent: u8,
        qmp: Qmp,
        work_dir: &Path,
        process: Option<(u32, String)>,
    ) -> Result<Self, GuestError> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                percent: percent.min(MOST),
                resting: false,
                ended: false,
                stands: false,
                stuck: None,
            }),
            changed: Condvar::new(),
        });
        let duty = Duty {
            shared: shared.clone(),
            qmp,
            mark: work_dir.join(THROTTLE_MARK),
            work_dir: work_dir.to_owned(),
            process,
        };
        let thread = std::thread::Builder::new()
            .name("throttle".to_owned())
            .spawn(move || duty.run())
            .map_err(|source| GuestError::Io {
                what: "starting the thread that throttles the guest".to_owned(),
                source,
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Takes so many percent of the guest's time from now on.
    pub(super) fn set(&self, percent: u8) {
        self.shared.state().percent = percent.min(MOST);
        self.shared.changed.notify_all();
    }

    /// Lets the guest run until [`Throttle::go_on`]; it runs when this returns.
    pub(super) fn rest(&self) -> Result<(), GuestError> {
        let mut state = self.shared.state();
        state.resting = true;
        self.shared.changed.notify_all();
        while state.stands {
            if let Some(stuck) = state.stuck.take() {
                return Err(stuck);
            }
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(GuestError::State(
                    "the thread that throttled the guest ended with the guest stopped; attach again: that resumes it".to_owned(),
                ));
            }
            state = self.shared.wait(state, PERIOD);
        }
        Ok(())
    }

    /// Holds the guest back again.
    pub(super) fn go_on(&self) {
        self.shared.state().resting = false;
        self.shared.changed.notify_all();
    }

    /// Calls `look` with whether the guest stands for the throttle just now;
    /// that does not change meanwhile.
    pub(super) fn look<T>(&self, look: impl FnOnce(bool) -> T) -> T {
        let state = self.shared.state();
        look(state.stands)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that throttled the guest panicked");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, longest: Duration) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, longest) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }

    /// Waits until then, or until the guest may not be stopped any more.
    fn pass<'a>(&self, mut state: MutexGuard<'a, State>, until: Instant) -> MutexGuard<'a, State> {
        while !state.resting && !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.wait(state, left);
        }
        state
    }
}

/// What the thread has.
struct Duty {
    shared: Arc<Shared>,
    qmp: Qmp,
    mark: PathBuf,
    work_dir: PathBuf,
    process: Option<(u32, String)>,
}

impl Duty {
    fn run(mut self) {
        let shared = self.shared.clone();
        let mut state = shared.state();
        // What the guest has to run more, since its last stand took too long.
        let mut more = Duration::ZERO;
        let mut since = Instant::now();
        loop {
            let free = runs_for(state.percent) + more;
            state = shared.pass(state, since + free);
            if state.ended {
                break;
            }
            if state.resting {
                state = shared.wait(state, PERIOD);
                (more, since) = (Duration::ZERO, Instant::now());
                continue;
            }
            let percent = state.percent;
            // Told before: whoever asks meanwhile waits for the lock.
            match self.stop() {
                Ok(true) => state.stands = true,
                // Somebody else's stop is theirs to end.
                Ok(false) => {
                    (more, since) = (PERIOD, Instant::now());
                    continue;
                }
                Err(error) => {
                    if !self.lives() {
                        break;
                    }
                    tracing::warn!(%error, "the guest could not be held back; tried again in a moment");
                    state.stands = true;
                }
            }
            let begun = Instant::now();
            let ran = begun.duration_since(since).saturating_sub(more);
            let stand = stands_for(percent, ran);
            state = shared.pass(state, begun + stand);
            let lived;
            (state, lived) = self.let_go(&shared, state);
            if !lived {
                break;
            }
            more = makes_up_for(percent, begun.elapsed().saturating_sub(stand));
            since = Instant::now();
        }
    }

    /// Ends the guest's stand, however long it takes; gives up with the
    /// throttle's end, and with the guest's (`false`).
    fn let_go<'a>(
        &mut self,
        shared: &'a Shared,
        mut state: MutexGuard<'a, State>,
    ) -> (MutexGuard<'a, State>, bool) {
        loop {
            let process = self.process.clone();
            let went_on = go_on(&mut self.qmp, &self.work_dir, || lives(process.as_ref()));
            // Twenty a second would drive other events out of those kept.
            while self.qmp.take_event("STOP").is_some() {}
            while self.qmp.take_event("RESUME").is_some() {}
            match went_on {
                Ok(()) => {
                    let _ = std::fs::remove_file(&self.mark);
                    state.stands = false;
                    state.stuck = None;
                    shared.changed.notify_all();
                    return (state, true);
                }
                Err(error) if !self.lives() => {
                    tracing::debug!(%error, "the guest ended while it was throttled");
                    let _ = std::fs::remove_file(&self.mark);
                    state.stands = false;
                    shared.changed.notify_all();
                    return (state, false);
                }
                Err(error) if state.ended => {
                    // The mark stays: the next attach lets the guest go on.
                    tracing::error!(%error, "a throttled guest is left stopped");
                    return (state, false);
                }
                Err(error) => {
                    tracing::error!(%error, "a throttled guest cannot be let go on yet");
                    state.stuck = Some(error);
                    shared.changed.notify_all();
                    state = shared.wait(state, AFTER_TROUBLE);
                }
            }
        }
    }

    /// Stops the guest, if it runs.
    fn stop(&mut self) -> Result<bool, GuestError> {
        if status(&mut self.qmp)? != "running" {
            return Ok(false);
        }
        std::fs::File::create(&self.mark).map_err(|source| GuestError::Io {
            what: format!("writing {}", self.mark.display()),
            source,
        })?;
        self.qmp.execute("stop", json!({}))?;
        Ok(true)
    }

    fn lives(&self) -> bool {
        lives(self.process.as_ref())
    }
}

/// Is it still the same process?
pub(super) fn lives(process: Option<&(u32, String)>) -> bool {
    process.is_none_or(|(pid, start)| started(*pid).as_ref() == Some(start))
}

/// How long the guest stands after it ran for `ran`: a stop takes its time on a
/// busy machine, and the guest runs until it is done.
fn stands_for(percent: u8, ran: Duration) -> Duration {
    let percent = u32::from(percent.clamp(1, MOST));
    (ran * percent / (100 - percent)).min(LONGEST_STAND)
}

/// How long it is to run between two stands.
fn runs_for(percent: u8) -> Duration {
    PERIOD * (100 - u32::from(percent.clamp(1, MOST))) / 100
}

/// How long it is to run more, after it stood for `late` longer than it should have.
fn makes_up_for(percent: u8, late: Duration) -> Duration {
    let percent = u32::from(percent.clamp(1, MOST));
    late * (100 - percent) / percent
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's share of the time when every stop takes `stop` and every
    /// resume comes `late`.
    fn share(percent: u8, stop: Duration, late: Duration) -> f64 {
        let mut more = Duration::ZERO;
        let (mut ran, mut stood) = (0.0, 0.0);
        for _ in 0..100 {
            let runs = runs_for(percent) + more + stop;
            let stands = stands_for(percent, runs - more);
            ran += runs.as_secs_f64();
            stood += (stands + late).as_secs_f64();
            more = makes_up_for(percent, late);
        }
        ran / (ran + stood)
    }

    #[test]
    fn the_guest_gets_its_share_however_long_a_stop_takes() {
        let ms = Duration::from_millis;
        for percent in 1..=MOST {
            let wanted = 1.0 - f64::from(percent) / 100.0;
            for late in [ms(0), ms(3), ms(700)] {
                let got = share(percent, ms(0), late);
                assert!((got - wanted).abs() < 0.01, "{percent} {late:?}: {got}");
            }
            // What a slow stop gives it beyond its share, the next stand takes back.
            let got = share(percent, ms(10), ms(0));
            let bound = match percent {
                ..=86 => 0.01,
                _ => 0.1,
            };
            assert!((got - wanted).abs() < bound, "{percent}: {got}");
        }
        assert_eq!(stands_for(80, ms(20)), ms(80));
        assert_eq!(stands_for(80, ms(30)), ms(120));
        // It may have run freely for long: that is not taken back.
        assert_eq!(stands_for(80, ms(9000)), LONGEST_STAND);
        assert_eq!(runs_for(80), ms(20));
        assert_eq!(makes_up_for(80, ms(40)), ms(10));
    }
}
