//! Our own machine at the peer: built by a definition over the RAM files and
//! disks of a recovery point, waiting for its state.

use std::fs::OpenOptions;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::boot::{MOST_DISK, MOST_RAM, MOST_VCPUS};
use super::facts::facts;
use super::machine::{Config, KIND, Pace, Parts, assemble};
use super::needs;
use super::protected::KvmVmm;
use crate::activate::hydrate::Hydration;
use crate::activate::machine::{BuildPlan, Builder, Machine, MachineError};
use crate::activate::nbd::BlockSource;
use crate::guest::embedded::console::Console;
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Definition, STOP_WITHIN, SharedVmm, Vmm, VmmError, stop};
use crate::guest::qemu::check::Finding;

/// The one block of memory.
const BLOCK: &str = "ram";

/// Builds guests of the kind `kvm`. The serial console is `console.sock` and
/// `console.log` in the activation's directory, the disk's image `disk.img`.
#[derive(Debug, Clone, Copy, Default)]
pub struct KvmBuilder;

struct Built {
    vmm: Arc<Mutex<KvmVmm>>,
    disks: Vec<Arc<TrackedDisk>>,
}

impl Builder for KvmBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let definition = plan.definition;
        let config = checked(definition)?;
        let facts = facts().map_err(VmmError::from)?;
        let ([(_, ram)], [ram_file]) = (definition.ram.as_slice(), plan.ram.as_slice()) else {
            return Err(MachineError::Other(format!(
                "{} RAM files for a guest with one block",
                plan.ram.len()
            )));
        };
        if plan.disks.len() != definition.disks.len() {
            return Err(MachineError::Other(format!(
                "{} disks at the point for a guest that has {}",
                plan.disks.len(),
                definition.disks.len()
            )));
        }
        let io = |what: String| move |source| MachineError::Vmm(VmmError::Io { what, source });
        let ram_file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(ram_file)
            .map_err(io(format!("opening {}", ram_file.display())))?;
        let image = plan.run.join("disk.img");
        let disk = match plan.disks.into_iter().zip(&definition.disks).next() {
            Some((below, (name, bytes))) => {
                same_size(name, *bytes, &*below)?;
                let disk = TrackedDisk::above(name, &image, below)
                    .map_err(io(format!("making {}", image.display())))?;
                Some(disk)
            }
            None => None,
        };
        let console = Console::open(&plan.run)
            .map_err(io(format!("making a console in {}", plan.run.display())))?;
        let disks: Vec<_> = disk.iter().cloned().collect();
        let parts = Parts {
            vcpus: definition.vcpus,
            ram: *ram,
            ram_file,
            disk,
            terminal: Arc::new(console),
            // It comes with the state.
            pace: Pace::default(),
            irqchip: config.needs.irqchip,
        };
        let vmm = assemble(parts, &facts, None).inspect_err(|_| {
            if !disks.is_empty() {
                // Nothing was ever written to it.
                let _ = std::fs::remove_file(&image);
            }
        })?;
        Ok(Box::new(Built {
            vmm: Arc::new(Mutex::new(vmm)),
            disks,
        }))
    }

    /// Such a guest is always: it has no network.
    fn can_isolate(&self) -> bool {
        true
    }

    fn check(&self, definition: &Definition) -> Vec<Finding> {
        let config = match checked(definition) {
            Ok(config) => config,
            Err(error) => {
                return vec![Finding::blocks(
                    "kvm-definition",
                    error.to_string(),
                    "run the same release of Farhaven at both sites",
                )];
            }
        };
        match facts() {
            Ok(here) => needs::check(&config.needs, &here),
            Err(unusable) => vec![Finding::blocks(
                "kvm-unusable",
                "this host's KVM cannot be used",
                unusable.to_string(),
            )],
        }
    }
}

/// A peer's definition, as far as it is of a machine that can be built.
fn checked(definition: &Definition) -> Result<Config, VmmError> {
    let refused = |why: String| Err(VmmError::State(format!("the guest's definition: {why}")));
    if definition.kind != KIND {
        return refused(format!("it is of kind {:?}, not {KIND:?}", definition.kind));
    }
    if definition.vcpus == 0 || definition.vcpus > MOST_VCPUS {
        return refused(format!(
            "{} vCPUs; such a machine has 1 to {MOST_VCPUS}",
            definition.vcpus
        ));
    }
    match definition.ram.as_slice() {
        [(name, bytes)] if name == BLOCK && *bytes <= MOST_RAM => {}
        other => {
            return refused(format!(
                "its memory is not one block {BLOCK:?} of at most {} GiB, but {} blocks",
                MOST_RAM >> 30,
                other.len()
            ));
        }
    }
    if definition.disks.len() > 1 {
        return refused(format!(
            "it has {} disks; such a machine has one at most",
            definition.disks.len()
        ));
    }
    if let Some((_, bytes)) = definition.disks.iter().find(|disk| disk.1 > MOST_DISK) {
        return refused(format!(
            "its disk has {bytes} bytes, more than {} GiB",
            MOST_DISK >> 30
        ));
    }
    Config::of(definition)
}

fn same_size(name: &str, bytes: u64, below: &dyn BlockSource) -> Result<(), MachineError> {
    if below.size() == bytes {
        return Ok(());
    }
    Err(MachineError::Other(format!(
        "disk {name:?} has {bytes} bytes in the guest's definition and {} at the point",
        below.size()
    )))
}

impl KvmVmm {
    /// Makes of a monitor's guest, whose vCPUs wait in their gates, the machine
    /// that the monitor's own [`Builder`] answers: it takes a point's device
    /// state, runs, and copies what its disks still read from the store.
    pub fn into_machine(self) -> Box<dyn Machine> {
        let disks = self.disks().to_vec();
        Box::new(Built {
            vmm: Arc::new(Mutex::new(self)),
            disks,
        })
    }
}

impl Built {
    fn vmm(&self) -> MutexGuard<'_, KvmVmm> {
        self.vmm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine for Built {
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError> {
        if disks.len() != self.disks.len() {
            return Err(MachineError::Other(format!(
                "{} disks for a machine that has {}",
                disks.len(),
                self.disks.len()
            )));
        }
        for (disk, below) in self.disks.iter().zip(disks) {
            same_size(disk.name(), disk.bytes(), &*below)?;
            disk.replace_below(below)
                .map_err(|error| MachineError::Other(error.to_string()))?;
        }
        Ok(())
    }

    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError> {
        Ok(self.vmm().restore(device_state)?)
    }

    fn run(&mut self) -> Result<(), MachineError> {
        Ok(self.vmm().resume()?)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        // It is on no network.
        Ok(())
    }

    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError> {
        for disk in &self.disks {
            disk.hydrate(bytes_per_second).map_err(|source| {
                MachineError::Vmm(VmmError::Io {
                    what: format!("starting to copy disk {:?}", disk.name()),
                    source,
                })
            })?;
        }
        Ok(())
    }

    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError> {
        Ok(self.disks.iter().map(|disk| disk.hydration()).collect())
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(stop(&mut *self.vmm(), STOP_WITHIN)?)
    }

    fn is_running(&mut self) -> Result<bool, MachineError> {
        Ok(self.vmm().running() == Some(true))
    }

    fn kill(self: Box<Self>) {
        self.vmm().end();
        self.disks.iter().for_each(|disk| disk.end());
    }

    fn vmm(&self) -> Option<SharedVmm> {
        Some(self.vmm.clone())
    }
}
