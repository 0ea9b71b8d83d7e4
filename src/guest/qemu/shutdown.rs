//! A guest that is to boot elsewhere is shut down here first: by its agent, or else
//! by its power button. QEMU stays, so that its disks can be read to the last write.

use std::time::{Duration, Instant};

use serde_json::json;

use super::super::GuestError;
use super::QemuGuest;
use super::attach::status;

/// An agent that answers is told within this time.
const AGENT: Duration = Duration::from_secs(2);

/// How often it is looked whether the guest is down.
const LOOK: Duration = Duration::from_millis(100);

/// QEMU resets a stopped guest within this time.
const RESET: Duration = Duration::from_secs(10);

impl QemuGuest {
    pub(super) fn shut_down_within(
        &mut self,
        within: Duration,
        hard: bool,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, GuestError> {
        // A guest that is held back stands still now and then, and has enough to do.
        self.throttle = None;
        let deadline = Instant::now() + within;
        match status(&mut self.qmp)?.as_str() {
            "shutdown" => return Ok(true),
            "running" => {}
            // Its disks are taken as they are.
            _ if hard => return Ok(false),
            other => {
                return Err(GuestError::State(format!(
                    "the guest is in state '{other}' and does not run, so it cannot shut down; let it go on, or accept that its disks are taken as they are (--accept-pause)"
                )));
            }
        }
        // Else QEMU ends with it, and what it wrote last could not be read any more.
        self.at("shutdown", "pause")?;
        if !self.quiesce.shut_down(AGENT) {
            self.qmp.execute("system_powerdown", json!({}))?;
        }
        while wanted() && Instant::now() < deadline {
            if status(&mut self.qmp)? == "shutdown" {
                return Ok(true);
            }
            std::thread::sleep(LOOK);
        }
        if hard && wanted() {
            self.qmp.execute("stop", json!({}))?;
        } else if !self.options.stays {
            // It may do so still, as on any other day.
            self.at("shutdown", "poweroff")?;
        }
        Ok(false)
    }

    /// A guest that is shut down is reset, so that it boots when it goes on.
    pub(super) fn boot_again(&mut self) -> Result<(), GuestError> {
        if status(&mut self.qmp)? == "shutdown" {
            // With -no-reboot it would be QEMU's end; also later, when firmware that was
            // run before resets the machine once more before it boots.
            self.at("reboot", "reset")?;
            self.qmp.execute("system_reset", json!({}))?;
            let deadline = Instant::now() + RESET;
            while status(&mut self.qmp)? == "shutdown" && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if self.options.disk_only && !self.options.stays {
            self.at("shutdown", "poweroff")?;
        }
        Ok(())
    }

    /// What QEMU does when the guest does this.
    fn at(&mut self, event: &str, action: &str) -> Result<(), GuestError> {
        self.qmp.execute("set-action", json!({event: action}))?;
        Ok(())
    }
}
