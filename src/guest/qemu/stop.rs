//! The stop of a cut, at one instant with others of the guest's group.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::super::gate::{CutGate, Stood};
use super::super::{CutTimes, GuestError};
use super::QemuGuest;
use super::attach::{CUT_MARK, status};

/// How a guest was stopped for a cut.
pub(super) struct Stop {
    /// The point's time.
    pub(super) at: SystemTime,
    /// From here on it may stand.
    pub(super) begun: Instant,
    /// An error: nothing comes of the cut, and the guest is to go on.
    pub(super) stood: Result<(), GuestError>,
}

impl QemuGuest {
    /// Stops the guest when the others are stopped, and again when they came to
    /// stand too far apart. What that cost the guest is in the pause.
    ///
    /// # Errors
    /// When the others are not waited for any longer: the guest runs. And when it does
    /// not go on between two tries, which the error says.
    pub(super) fn stop_at(
        &mut self,
        point: u64,
        was_running: bool,
        gate: &dyn CutGate,
        times: &mut CutTimes,
    ) -> Result<Stop, GuestError> {
        loop {
            gate.ready().inspect_err(|_| {
                let _ = std::fs::remove_file(self.work_dir.join(CUT_MARK));
            })?;
            let (at, begun) = (SystemTime::now(), Instant::now());
            let stood = match self.stop_now() {
                Ok(since) => gate.stopped(since).map_err(GuestError::from),
                Err(error) => Err(error),
            };
            if !matches!(stood, Ok(Stood::Apart)) {
                let stood = stood.map(|_| ());
                return Ok(Stop { at, begun, stood });
            }
            if was_running {
                self.go_on()?;
                self.mark(CUT_MARK, point, false)?;
            }
            times.pause += begun.elapsed();
        }
    }

    /// Stops the guest. Since when it stands: QEMU answers only when its disks have
    /// written what was begun, and the guest stands still all that while.
    fn stop_now(&mut self) -> Result<Instant, GuestError> {
        self.newest_stop();
        let begun = Instant::now();
        self.qmp.execute("stop", json!({}))?;
        // A guest that was paused before has no such event, and stands all along.
        let event = self.newest_stop();
        while self.qmp.take_event("RESUME").is_some() {}
        Ok(event.map_or(begun, |event| since(&event, begun)))
    }

    /// Did nobody let it go on since [`Self::stop_now`]? Memory, device state and disks
    /// would be of different instants.
    pub(super) fn stood_still(&mut self) -> Result<(), GuestError> {
        let running = status(&mut self.qmp)? == "running";
        if running || self.qmp.take_event("RESUME").is_some() {
            return Err(GuestError::State(
                "somebody let the guest go on while a point of it was taken; is another tool driving this guest?".to_owned(),
            ));
        }
        Ok(())
    }

    /// Takes all kept `STOP` events, and returns the last.
    fn newest_stop(&mut self) -> Option<Value> {
        std::iter::from_fn(|| self.qmp.take_event("STOP")).last()
    }
}

/// When an event that came after `begun` was raised.
fn since(event: &Value, begun: Instant) -> Instant {
    let now = Instant::now();
    let stamp = &event["timestamp"];
    let part = |key: &str| stamp[key].as_u64();
    let raised = part("seconds")
        .zip(part("microseconds"))
        .and_then(|(s, us)| Duration::from_secs(s).checked_add(Duration::from_micros(us)))
        .and_then(|raised| UNIX_EPOCH.checked_add(raised));
    // Both clocks are this host's; one that was set meanwhile tells nothing.
    let ago = raised.and_then(|raised| SystemTime::now().duration_since(raised).ok());
    ago.and_then(|ago| now.checked_sub(ago))
        .filter(|since| *since >= begun)
        .unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_tells_when_and_a_clock_that_was_set_does_not() {
        let begun = Instant::now();
        std::thread::sleep(Duration::from_millis(30));
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let event = |at: Duration| {
            json!({"event": "STOP", "timestamp": {
                "seconds": at.as_secs(), "microseconds": at.subsec_micros()
            }})
        };
        let told = |event| since(&event, begun).duration_since(begun);
        let before = told(event(wall.saturating_sub(Duration::from_millis(20))));
        assert!(before >= Duration::from_millis(9), "{before:?}");
        assert!(before < begun.elapsed().saturating_sub(Duration::from_millis(19)));
        for wrong in [
            event(wall + Duration::from_secs(3600)),
            event(Duration::ZERO),
            json!({"timestamp": {"seconds": u64::MAX, "microseconds": 7}}),
            json!({"event": "STOP"}),
        ] {
            assert!(told(wrong) >= Duration::from_millis(30));
        }
    }
}
