//! Guests whose disks alone are copied: at the peer they boot, so before a planned
//! move they are shut down here, and nothing that they wrote is lost.

use std::time::Duration;

use farhaven_policies::files::Mode;

use super::own_again;
use crate::activate::fence::Term;
use crate::guest::Guest;
use crate::site::driver::{Attached, DriveError, Driver};
use crate::site::steps::{blocking, take};
use crate::site::view::Phase;

/// A guest has so long to shut down before a move.
pub(in crate::site) const SHUT_DOWN: Duration = Duration::from_secs(120);

impl Driver {
    /// Does it boot at the peer?
    pub(in crate::site) fn boots_there(&self) -> bool {
        self.protection.policy.mode == Mode::DiskOnly
    }

    /// Before the last cut: a guest that boots at the peer is shut down.
    pub(in crate::site) async fn shut_down_first(
        &mut self,
        attached: &mut Attached,
    ) -> Result<(), DriveError> {
        if !self.boots_there() {
            return Ok(());
        }
        let name = self.record.name.clone();
        // It is not held for anybody's word yet.
        self.phase(Phase::Moving);
        self.view.send_modify(|v| {
            v.trouble = format!("'{name}' shuts down here, to boot at the peer");
        });
        let hard = self.accept_hard_stop;
        let down = self.have_shut_down(attached, SHUT_DOWN, hard).await;
        self.phase(Phase::Held);
        match down? {
            true => {
                tracing::info!(guest = %name, "it has shut down, and boots at the peer");
                Ok(())
            }
            false if hard => {
                tracing::warn!(guest = %name, "it did not shut down, and is stopped hard, as was accepted");
                Ok(())
            }
            false => Err(DriveError::TooLong(format!(
                "it was asked to shut down, to boot at the peer, and had not within {SHUT_DOWN:?}: neither by its agent nor by its power button (it may do so still, and its QEMU ends here then). With --accept-pause it is stopped hard after that time, and boots there as after a power failure"
            ))),
        }
    }

    /// Has the guest shut itself down, as [`Guest::shut_down`] does; what must not wait,
    /// like a newer term, ends the wait.
    pub(in crate::site) async fn have_shut_down(
        &mut self,
        attached: &mut Attached,
        within: Duration,
        hard: bool,
    ) -> Result<bool, DriveError> {
        let mut guest = take(&mut attached.guest)?;
        let stop = self.stop.subscribe();
        let work = blocking(move || {
            let down = guest.shut_down(within, hard, &|| !*stop.borrow());
            (guest, down)
        });
        let (guest, down) = self.finishing(work).await?;
        attached.guest = Some(guest);
        if matches!(down, Ok(false)) && *self.stop.borrow() {
            return Err(DriveError::Interrupted);
        }
        Ok(down?)
    }

    /// For a move's report.
    pub(in crate::site) fn told_of_boot(&self, note: String) -> String {
        if !self.boots_there() {
            return note;
        }
        let boots = "it was shut down here, and boots there";
        match note.is_empty() {
            true => boots.to_owned(),
            false => format!("{note}; {boots}"),
        }
    }
}

/// A hand-over came to nothing, of a guest that a run had shut down before: it is
/// this site's again and stays down, until that run or an operator starts it. Guests
/// of a run come back in start order that way.
pub(super) async fn stays_down(
    driver: &mut Driver,
    guest: Option<Box<dyn Guest>>,
    own: Term,
) -> Result<(), DriveError> {
    own_again(driver, own)?;
    blocking(move || drop(guest)).await?;
    driver.protection.moving = None;
    driver.protection.held = None;
    driver.protection.stopped = false;
    driver.keep_protection().await.map_err(DriveError::Other)?;
    tracing::warn!(guest = %driver.record.name, term = own.number, "taken back: it stays shut down here");
    Ok(())
}
