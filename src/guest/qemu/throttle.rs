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

/// The guest stands once in so long.
const PERIOD: Duration = Duration::from_millis(100);
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
        let mut free = free_for(state.percent, part(state.percent));
        loop {
            state = shared.pass(state, Instant::now() + free);
            if state.ended {
                break;
            }
            if state.resting {
                state = shared.wait(state, PERIOD);
                continue;
            }
            let percent = state.percent;
            let begun = Instant::now();
            // Told before: whoever asks meanwhile waits for the lock.
            match self.stop() {
                Ok(true) => state.stands = true,
                // Somebody else's stop is theirs to end.
                Ok(false) => {
                    free = PERIOD;
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
            state = shared.pass(state, begun + part(percent));
            let lived;
            (state, lived) = self.let_go(&shared, state);
            if !lived {
                break;
            }
            free = free_for(percent, begun.elapsed());
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

/// How long the guest stands in a period.
fn part(percent: u8) -> Duration {
    PERIOD * u32::from(percent) / 100
}

/// How long it runs after it stood for `stood`, which may have been longer than meant.
fn free_for(percent: u8, stood: Duration) -> Duration {
    let percent = u32::from(percent.clamp(1, MOST));
    stood * (100 - percent) / percent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_gets_its_share_however_long_a_stop_takes() {
        for percent in 1..=MOST {
            for stood in [part(percent), Duration::from_millis(700)] {
                let free = free_for(percent, stood).as_secs_f64();
                let share = free / (free + stood.as_secs_f64());
                let wanted = 1.0 - f64::from(percent) / 100.0;
                assert!((share - wanted).abs() < 1e-6, "{percent}: {share}");
            }
        }
        assert_eq!(part(20), Duration::from_millis(20));
    }
}
