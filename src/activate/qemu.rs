//! A QEMU as a [`Machine`]: its process, and the exports of the point's disks
//! that its overlays lie on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::failure::LaunchError;
use super::hydrate::{Hydration, HydrationState};
use super::launch::{LaunchPlan, Launched};
use super::machine::{Machine, MachineError};
use super::nbd::{BlockSource, NbdServer};
use super::place::Ground;
use super::warm::ram_file;
use crate::guest::embedded::SharedVmm;
use crate::guest::qemu::definition::Definition;
use crate::guest::qemu::instantiate::{Backing, DiskPlacement, Placement};

/// A QEMU with a point's parts: waiting for its device state, or running.
pub(super) struct QemuMachine {
    launched: Launched,
    exports: Exports,
    /// How many disks it was built with.
    disks: usize,
    pub(super) qmp: PathBuf,
}

/// Exported disks. A stopped QEMU that is kept reads them on, whoever forgets it.
struct Exports {
    server: Arc<NbdServer>,
    names: Vec<String>,
}

impl Exports {
    /// Nothing reads them any more.
    fn withdraw(&mut self) {
        for name in self.names.drain(..) {
            // It may have been withdrawn before.
            let _ = self.server.remove(&name);
        }
    }
}

impl QemuMachine {
    /// Exports a point's disks and launches QEMU on them.
    pub(super) fn launch(
        ground: &Ground<'_>,
        definition: &Definition,
        disks: &[Arc<dyn BlockSource>],
        boots: bool,
    ) -> Result<Self, MachineError> {
        let (mut placement, mut exports) = place(ground, definition, Some(disks))?;
        placement.boots = boots;
        let plan = LaunchPlan {
            definition,
            placement: &placement,
            program: Some(ground.qemu),
        };
        let launched = Launched::start(&plan).inspect_err(|_| exports.withdraw())?;
        Ok(Self {
            launched,
            exports,
            disks: definition.disks.len(),
            qmp: placement.qmp,
        })
    }

    /// Finds one that was launched before a restart of this daemon. Disks that
    /// it still reads are served again: `None` when it needs none.
    pub(super) fn adopt(
        ground: &Ground<'_>,
        definition: &Definition,
        disks: Option<&[Arc<dyn BlockSource>]>,
    ) -> Result<Option<Self>, MachineError> {
        let (placement, mut exports) = place(ground, definition, disks)?;
        // On an error its disks are served on: it may run.
        let Some(launched) = Launched::adopt(definition, &placement)? else {
            exports.withdraw();
            return Ok(None);
        };
        Ok(Some(Self {
            launched,
            exports,
            disks: definition.disks.len(),
            qmp: placement.qmp,
        }))
    }

    pub(super) fn pid(&self) -> u32 {
        self.launched.pid()
    }
}

impl Machine for QemuMachine {
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError> {
        for (name, disk) in self.exports.names.iter().zip(disks) {
            let replaced = self.exports.server.replace(name, disk);
            replaced.map_err(|e| MachineError::Other(e.to_string()))?;
        }
        Ok(())
    }

    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError> {
        Ok(self.launched.restore(device_state)?)
    }

    /// It was launched so.
    fn boot(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn run(&mut self) -> Result<(), MachineError> {
        Ok(self.launched.run()?)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        Ok(self.launched.announce()?)
    }

    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError> {
        Ok(self.launched.hydrate(bytes_per_second)?)
    }

    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError> {
        let disks = self.launched.hydration()?;
        let done = |disk: &Hydration| disk.state == HydrationState::Done;
        if disks.len() >= self.disks && disks.iter().all(done) {
            // They need the store no longer.
            self.exports.withdraw();
        }
        Ok(disks)
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(self.launched.stop()?)
    }

    fn is_running(&mut self) -> Result<bool, MachineError> {
        Ok(self.launched.is_running()?)
    }

    fn draw(&mut self, file: &Path) -> Result<(), MachineError> {
        Ok(self.launched.draw(file)?)
    }

    fn kill(self: Box<Self>) {
        let mut exports = self.exports;
        self.launched.kill();
        exports.withdraw();
    }

    fn release(self: Box<Self>) {
        let mut exports = self.exports;
        // Its disks are its own by now.
        exports.withdraw();
        self.launched.release();
    }

    fn vmm(&self) -> Option<SharedVmm> {
        None
    }
}

/// Exports the disks, if they are to be served, and says where everything is.
fn place(
    ground: &Ground<'_>,
    definition: &Definition,
    disks: Option<&[Arc<dyn BlockSource>]>,
) -> Result<(Placement, Exports), MachineError> {
    let mut placement = Placement {
        run: ground.run.clone(),
        qmp: ground.run.join("qmp.sock"),
        nets: ground.networks.clone(),
        macs: ground.macs.clone(),
        ..Placement::default()
    };
    for block in &definition.ram {
        let file = ram_file(&ground.ram, &block.id);
        placement.ram.insert(block.id.clone(), file);
    }
    let mut exports = Exports {
        server: ground.exports.clone(),
        names: Vec::new(),
    };
    // Of this activation: what an earlier one left reads on from its own.
    let term = ground.run.file_name().unwrap_or_default().to_string_lossy();
    for (index, disk) in definition.disks.iter().enumerate() {
        let export = format!("{}-{term}-{index}", ground.guest);
        let backing = match disks.and_then(|disks| disks.get(index)) {
            Some(source) => {
                let server = &exports.server;
                // Left by an attempt to find it again that got no answer.
                let exported = server
                    .replace(&export, source.clone())
                    .or_else(|_| server.export(&export, source.clone()));
                if let Err(error) = exported {
                    exports.withdraw();
                    return Err(MachineError::Other(error.to_string()));
                }
                exports.names.push(export.clone());
                Backing::Nbd {
                    socket: exports.server.path().to_owned(),
                    export,
                }
            }
            None => Backing::Nothing,
        };
        let overlay = ground.run.join(format!("disk{index}.qcow2"));
        let place = DiskPlacement { overlay, backing };
        placement.disks.insert(disk.name.clone(), place);
    }
    Ok((placement, exports))
}

impl From<LaunchError> for crate::site::ActivateError {
    fn from(error: LaunchError) -> Self {
        Self::Machine(error.into())
    }
}
