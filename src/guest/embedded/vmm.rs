//! What a monitor gives, so that its guest can be protected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Bitmap;
use super::disk::TrackedDisk;

/// A block of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name; stays as long as the guest lives, at both sites.
    pub name: String,
    /// Its size, a whole number of 4 KiB pages.
    pub bytes: u64,
}

/// A virtual machine monitor with one guest, in this process.
///
/// All calls come from the engine's threads, one at a time. None may wait for
/// the network, and each returns within seconds or fails.
pub trait Vmm: Send {
    /// Blocks of memory, in an order that stays.
    fn ram(&self) -> &[RamBlock];

    /// Disks, in an order that stays. The guest's device model reads and
    /// writes through the same objects.
    fn disks(&self) -> &[Arc<TrackedDisk>];

    /// Stops every vCPU and every device: when this returns, nothing writes
    /// memory or disks. Stopping a stopped guest does nothing.
    ///
    /// # Errors
    /// When it could not be stopped; it runs then. With
    /// [`VmmError::DoesNotStop`] it is soon asked again.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// Lets a paused guest go on. Letting go of a running one does nothing.
    ///
    /// # Errors
    /// When it could not be; it is stopped then.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Running (`Some(true)`), stopped (`Some(false)`), or ended (`None`), by
    /// its own shutdown, a triple fault or [`Vmm::end`].
    fn running(&self) -> Option<bool>;

    /// Why it ended, for people; empty while it lives.
    fn ended_because(&self) -> String;

    /// Pages of a block that were written since the last call (since the start,
    /// for the first), and forgets them: each write is told once. Exact while
    /// the guest is paused; while it runs, a page being written now is told now
    /// or next time.
    ///
    /// # Errors
    /// When the log is lost; every page counts as written then.
    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError>;

    /// Reads RAM of a block at `offset`, of a running guest too (it may be torn then).
    ///
    /// # Errors
    /// When that is not inside of the block.
    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError>;

    /// vCPUs and devices of a paused guest as bytes for
    /// [`Machine::restore`](crate::activate::machine::Machine::restore) at the peer.
    ///
    /// # Errors
    /// When a part cannot be read; the message names it.
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// [`Definition::config`](super::Definition::config) as it is by now, where
    /// that changes while a guest runs: what its state asks of a host. A running
    /// guest may be stopped for a moment.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn config(&mut self) -> Result<Option<Vec<u8>>, VmmError> {
        Ok(None)
    }

    /// Holds the guest back: it runs `100 - percent` of the time. 0 lets it
    /// run freely, 99 is the most.
    ///
    /// # Errors
    /// When that cannot be done.
    fn throttle(&mut self, percent: u8) -> Result<(), VmmError>;

    /// Ends the guest for good.
    fn end(&mut self);
}

/// Stops a guest for good: tries for as long as `within` when it does not stop
/// at once, as while it waits for a slow disk. One that has ended does not run.
///
/// # Errors
/// When it could not be stopped; it runs on.
pub fn stop(vmm: &mut dyn Vmm, within: Duration) -> Result<(), VmmError> {
    let until = Instant::now() + within;
    while vmm.running().is_some() {
        match vmm.pause() {
            Ok(()) | Err(VmmError::Ended(_)) => break,
            Err(VmmError::DoesNotStop { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Why a monitor could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The guest has ended.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// A vCPU did not stop.
    #[error("{what} did not stop within {within:?}; the guest runs on. Is the host overloaded?")]
    DoesNotStop {
        /// Which, as "vCPU 3".
        what: String,
        /// How long it was waited for.
        within: Duration,
    },
    /// KVM refused a call.
    #[error("KVM: {call}: {why}")]
    Kvm {
        /// The call and what it was for.
        call: String,
        /// The kernel's reason, and what to do.
        why: String,
    },
    /// Reading or writing memory or a disk.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A saved state that this machine cannot take.
    #[error("the device state cannot be taken: {0}")]
    State(String),
}
