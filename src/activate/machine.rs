//! A recovery point brought to life, whatever the hypervisor: what a site needs
//! of the machine it built, and how machines of each kind are built.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::hydrate::Hydration;
use super::nbd::BlockSource;
use crate::guest::embedded::{Definition, SharedVmm};
use crate::guest::qemu::check::Finding;

/// A machine with a point's parts: waiting for its device state, or running.
///
/// In order: built, [`Machine::serve`] (again, for another point),
/// [`Machine::restore`], [`Machine::run`], [`Machine::announce`],
/// [`Machine::hydrate`]; [`Machine::stop`] or [`Machine::kill`] at any time.
pub trait Machine: Send {
    /// Swaps the disks below to those of another point, before the guest runs.
    /// As many as it was built with, in that order.
    ///
    /// # Errors
    /// When a disk has another size there.
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError>;

    /// Takes the device state; memory is read from the RAM files from now on.
    /// The guest is as it was at the cut then, stopped.
    ///
    /// # Errors
    /// When the state is refused; the machine is of no use any more.
    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError>;

    /// The guest has no device state to take: it will boot from its disks, with empty
    /// memory. In the place of [`Machine::restore`].
    ///
    /// # Errors
    /// When such a machine does not boot.
    fn boot(&mut self) -> Result<(), MachineError> {
        Err(MachineError::Other(
            "a guest inside of the daemon cannot boot from its disks; use a point that holds its memory".to_owned(),
        ))
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When it cannot be; it is stopped then.
    fn run(&mut self) -> Result<(), MachineError>;

    /// Tells the networks where the guest is now, if it has any.
    ///
    /// # Errors
    /// When the machine does not answer.
    fn announce(&mut self) -> Result<(), MachineError>;

    /// Starts to copy in the background what its disks still read from the
    /// store, at most `bytes_per_second` each (0: as fast as it goes).
    ///
    /// # Errors
    /// When that cannot be begun.
    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError>;

    /// How far each disk's copy is; after [`Machine::hydrate`].
    ///
    /// # Errors
    /// When the machine does not answer.
    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError>;

    /// Stops the guest and keeps it, as evidence.
    ///
    /// # Errors
    /// When it may run on.
    fn stop(&mut self) -> Result<(), MachineError>;

    /// Does the guest run?
    ///
    /// # Errors
    /// When the machine does not answer.
    fn is_running(&mut self) -> Result<bool, MachineError>;

    /// Draws what the guest's screen shows into a new PNG file.
    ///
    /// # Errors
    /// When it has no screen.
    fn draw(&mut self, file: &Path) -> Result<(), MachineError> {
        let _ = file;
        Err(MachineError::Other("it has no screen".to_owned()))
    }

    /// Ends the machine and frees what it holds: the point that its disks were from is
    /// read no more, also where somebody still has its monitor.
    fn kill(self: Box<Self>);

    /// Lets go of the machine, which goes on: from here on it is controlled as
    /// a guest of this site. A monitor in this process is held by its
    /// [`Machine::vmm`], and needs nothing.
    fn release(self: Box<Self>) {}

    /// The guest, where its monitor lives in this process: to protect it from here.
    fn vmm(&self) -> Option<SharedVmm>;
}

/// What a machine is built of.
pub struct BuildPlan<'a> {
    /// The guest, as its source told: bytes of a peer.
    pub definition: &'a Definition,
    /// Directory of this activation, made before: consoles, overlays, logs.
    pub run: PathBuf,
    /// The RAM file of each block, at its full size, in the definition's
    /// order. What is in them counts only from [`Machine::restore`] on; until
    /// then they are written by others.
    pub ram: Vec<PathBuf>,
    /// Each disk at the point, in the definition's order.
    pub disks: Vec<Arc<dyn BlockSource>>,
    /// A copy that is to reach nobody and to be thrown away, for a test, while
    /// the guest itself runs on: no network, no device or directory shared with
    /// anybody. Set only for a builder that [can do so](Builder::can_isolate).
    pub isolated: bool,
}

/// Builds machines of one kind.
pub trait Builder: Send + Sync {
    /// Builds a machine that waits for its device state. Nothing of it runs.
    ///
    /// # Errors
    /// When it cannot be built here; nothing is left behind.
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError>;

    /// What would stop such a guest from running here, asked by its source
    /// before it is protected or moved.
    fn check(&self, definition: &Definition) -> Vec<Finding>;

    /// Does it honour [`BuildPlan::isolated`]? Guests of one that does not
    /// cannot be run as a test.
    fn can_isolate(&self) -> bool {
        false
    }
}

/// Builders by [`Definition::kind`].
pub type Builders = BTreeMap<String, Arc<dyn Builder>>;

/// Why a machine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// QEMU.
    #[error(transparent)]
    Launch(#[from] super::failure::LaunchError),
    /// A monitor in this process.
    #[error(transparent)]
    Vmm(#[from] crate::guest::embedded::VmmError),
    /// Anything else, with what to do.
    #[error("{0}")]
    Other(String),
}
