//! Holding a guest back: its vCPUs run a part of each slice of time.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::gate::Gates;
use super::place::hold;

/// Shortest slice: a running part and a held part.
const SLICE: Duration = Duration::from_millis(10);
/// Shortest running part; the slice is longer where it would be less.
const SHORTEST: Duration = Duration::from_millis(1);
/// Longest held part.
const LONGEST: Duration = Duration::from_secs(1);
/// The most a guest is held back, in percent.
pub(super) const MOST: u8 = 99;

/// Holds a guest back until it is dropped.
pub(super) struct Throttle {
    gates: Gates,
    wanted: Arc<Wanted>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Wanted {
    /// Percent of the time to hold; nothing when it is over.
    percent: Mutex<Option<u8>>,
    changed: Condvar,
}

impl Wanted {
    fn lock(&self) -> MutexGuard<'_, Option<u8>> {
        self.percent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, percent: Option<u8>) {
        *self.lock() = percent;
        self.changed.notify_all();
    }

    /// Waits so long, or until another percentage is wanted.
    fn wait(&self, time: Duration, percent: u8) {
        let wanted = self.lock();
        // Whether it was time or a change that ended it, the caller looks again.
        let _ = self
            .changed
            .wait_timeout_while(wanted, time, |now| *now == Some(percent));
    }
}

impl Throttle {
    pub(super) fn new(gates: Gates) -> Self {
        Self {
            gates,
            wanted: Arc::default(),
            thread: None,
        }
    }

    /// Holds the guest back so much from now on; 0 lets it run freely.
    pub(super) fn set(&mut self, percent: u8) -> std::io::Result<()> {
        let percent = percent.min(MOST);
        if percent == 0 {
            self.stop();
            return Ok(());
        }
        self.wanted.set(Some(percent));
        if self.thread.is_none() {
            let (gates, wanted) = (self.gates.clone(), self.wanted.clone());
            self.thread = Some(
                std::thread::Builder::new()
                    .name("kvm throttle".to_owned())
                    .spawn(move || slices(&gates, &wanted))?,
            );
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.wanted.set(None);
        if let Some(thread) = self.thread.take() {
            // It does nothing that can panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The running part of a slice.
fn running(percent: u8) -> Duration {
    (SLICE * u32::from(100 - percent.min(MOST)) / 100).max(SHORTEST)
}

/// How long to hold a guest that ran so long.
fn held_after(ran: Duration, percent: u8) -> Duration {
    let percent = u32::from(percent.min(MOST));
    (ran * percent / (100 - percent)).min(LONGEST)
}

fn slices(gates: &Gates, wanted: &Wanted) {
    loop {
        let Some(percent) = *wanted.lock() else {
            return;
        };
        let from = Instant::now();
        wanted.wait(running(percent), percent);
        // A pause of a cut has a hold of its own, which this does not undo.
        gates.hold(hold::THROTTLE);
        // A busy host wakes us late: the guest is held for as much longer.
        let ran = from.elapsed();
        wanted.wait(held_after(ran, percent), percent);
        gates.let_go(hold::THROTTLE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_has_the_wanted_share() {
        for percent in 1..=MOST {
            let run = running(percent);
            let held = held_after(run, percent);
            assert!(run >= SHORTEST);
            assert!(run + held <= Duration::from_millis(100), "{percent}");
            let share = held.as_secs_f64() / (run + held).as_secs_f64() * 100.0;
            assert!(
                (share - f64::from(percent)).abs() < 0.1,
                "{percent}: {share}"
            );
        }
    }
}
