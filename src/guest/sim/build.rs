//! A sim guest made of a recovery point, where it goes on from its next step.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::vmm::SimVmm;
use super::{image, program};
use crate::activate::hydrate::Hydration;
use crate::activate::machine::{BuildPlan, Builder, Machine, MachineError};
use crate::activate::nbd::BlockSource;
use crate::guest::embedded::console::Console;
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Definition, STOP_WITHIN, SharedVmm, Vmm, stop};
use crate::guest::qemu::check::Finding;

/// Builds sim guests.
#[derive(Debug, Clone, Copy, Default)]
pub struct SimBuilder;

impl Builder for SimBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let mut made = Vec::new();
        let built = assemble(&plan, &mut made);
        if built.is_err() {
            for image in made {
                // Made here, and of no use to anybody.
                let _ = std::fs::remove_file(image);
            }
        }
        Ok(Box::new(built?))
    }

    /// Such a guest is always: it has no network.
    fn can_isolate(&self) -> bool {
        true
    }

    fn check(&self, definition: &Definition) -> Vec<Finding> {
        let wrong = program(definition).err();
        wrong
            .map(|why| {
                Finding::blocks(
                    "sim-definition",
                    format!("the sim guest cannot be built here: {why}"),
                    "start it anew, with farhaven of the same version at both sites",
                )
            })
            .into_iter()
            .collect()
    }
}

fn assemble(plan: &BuildPlan<'_>, made: &mut Vec<PathBuf>) -> Result<SimMachine, MachineError> {
    let (mutator, ram_bytes) = program(plan.definition).map_err(MachineError::Other)?;
    let [ram_file] = plan.ram.as_slice() else {
        return Err(MachineError::Other(format!(
            "there are {} RAM files for the one block of a sim guest",
            plan.ram.len()
        )));
    };
    let ram = open_ram(ram_file, ram_bytes)?;
    if plan.disks.len() != plan.definition.disks.len() {
        return Err(MachineError::Other(format!(
            "the point has {} disks, the guest {}; activate another point",
            plan.disks.len(),
            plan.definition.disks.len()
        )));
    }
    let mut disks = Vec::new();
    for (index, (source, (name, bytes))) in
        plan.disks.iter().zip(&plan.definition.disks).enumerate()
    {
        if source.size() != *bytes {
            return Err(MachineError::Other(format!(
                "disk '{name}' has {} bytes at the point, the guest's has {bytes}; activate another point",
                source.size()
            )));
        }
        let path = image(&plan.run, index);
        let disk = TrackedDisk::above(name, &path, source.clone())
            .map_err(|error| MachineError::Other(format!("making {}: {error}", path.display())))?;
        made.push(path);
        disks.push(disk);
    }
    let console = Console::open(&plan.run).map_err(|error| {
        MachineError::Other(format!(
            "opening a console in {}: {error}",
            plan.run.display()
        ))
    })?;
    let vmm = SimVmm::new(mutator, ram, ram_bytes, disks.clone(), console)
        .map_err(|error| MachineError::Other(format!("starting the guest's thread: {error}")))?;
    Ok(SimMachine {
        vmm: Arc::new(Mutex::new(vmm)),
        disks,
    })
}

fn open_ram(path: &Path, bytes: u64) -> Result<File, MachineError> {
    let failed =
        |why: String| MachineError::Other(format!("the RAM file {}: {why}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| failed(error.to_string()))?;
    let found = file
        .metadata()
        .map_err(|error| failed(error.to_string()))?
        .len();
    match found == bytes {
        true => Ok(file),
        false => Err(failed(format!(
            "it has {found} bytes, the guest's memory {bytes}"
        ))),
    }
}

/// A sim guest at the peer.
struct SimMachine {
    vmm: Arc<Mutex<SimVmm>>,
    disks: Vec<Arc<TrackedDisk>>,
}

impl SimMachine {
    fn with<T>(&self, use_it: impl FnOnce(&mut SimVmm) -> T) -> T {
        use_it(&mut self.vmm.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Machine for SimMachine {
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError> {
        if disks.len() != self.disks.len() {
            return Err(MachineError::Other(format!(
                "that point has {} disks, the guest {}; activate it anew",
                disks.len(),
                self.disks.len()
            )));
        }
        for (disk, source) in self.disks.iter().zip(disks) {
            disk.replace_below(source)
                .map_err(|error| MachineError::Other(error.to_string()))?;
        }
        Ok(())
    }

    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError> {
        Ok(self.with(|vmm| vmm.restore(device_state))?)
    }

    fn run(&mut self) -> Result<(), MachineError> {
        Ok(self.with(|vmm| vmm.resume())?)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        // It has no network.
        Ok(())
    }

    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError> {
        for disk in &self.disks {
            disk.hydrate(bytes_per_second).map_err(|error| {
                MachineError::Other(format!("copying disk '{}': {error}", disk.name()))
            })?;
        }
        Ok(())
    }

    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError> {
        Ok(self.disks.iter().map(|disk| disk.hydration()).collect())
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(self.with(|vmm| stop(vmm, STOP_WITHIN))?)
    }

    fn is_running(&mut self) -> Result<bool, MachineError> {
        Ok(self.with(|vmm| vmm.running()) == Some(true))
    }

    fn kill(self: Box<Self>) {
        self.with(|vmm| vmm.end());
        self.disks.iter().for_each(|disk| disk.end());
    }

    fn vmm(&self) -> Option<SharedVmm> {
        Some(self.vmm.clone())
    }
}
