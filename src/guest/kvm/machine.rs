//! Our own small monitor: vCPUs that run a flat program in memory that is a
//! shared mapping of files, with the devices of [`board`](super::board).

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::kvm_pit_config;
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, GuestAddress};

use super::board::{Asked, Board};
use super::boot;
use super::dirty::{TrackedMemory, TrackedRam};
use super::facts::{self, KvmFacts};
use super::gate::{Gates, Turn, VcpuGate};
use super::kvm_error;
use super::needs::KvmNeeds;
use super::protected::{KvmParts, KvmVmm};
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Definition, MOST_CONFIG, SharedVmm, Vmm, VmmError, reserve};

pub use super::board::{Pace, Terminal};

/// [`Definition::kind`] of such guests.
pub const KIND: &str = "kvm";

/// How long a vCPU that says HLT rests, where nothing can interrupt it.
const REST: Duration = Duration::from_millis(1);
/// Version of the definition's config.
const CONFIG_VERSION: u16 = 1;

/// What to start.
pub struct KvmOptions {
    /// Virtual CPUs, at most [`boot::MOST_VCPUS`].
    pub vcpus: u32,
    /// Bytes of memory, a whole number of 4 KiB pages, at most [`boot::MOST_RAM`].
    pub ram: u64,
    /// The memory's file; its size is set. What was in it is gone.
    pub ram_file: File,
    /// The program, for [`boot::PROGRAM_AT`].
    pub program: Vec<u8>,
    /// Its disk.
    pub disk: Option<Arc<TrackedDisk>>,
    /// Its serial console.
    pub terminal: Arc<dyn Terminal>,
    /// What the program is asked to do.
    pub pace: Pace,
    /// Interrupt chips and a timer in the kernel. A vCPU that says HLT then
    /// stays there until an interrupt; without, it goes on after a millisecond.
    pub irqchip: bool,
}

/// A guest of our own monitor.
pub struct KvmMachine;

/// The builder's part of a definition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    version: u16,
    pub(super) needs: KvmNeeds,
}

impl KvmMachine {
    /// Starts a guest: it runs when this returns. The definition is what a
    /// [`KvmBuilder`](super::builder::KvmBuilder) builds the same machine by.
    ///
    /// # Errors
    /// When KVM cannot be used here, or the options are out of range: the
    /// message says what to do.
    pub fn start(options: KvmOptions) -> Result<(SharedVmm, Definition), VmmError> {
        let facts = facts::facts()?;
        options
            .ram_file
            .set_len(0)
            .and_then(|()| options.ram_file.set_len(options.ram))
            .and_then(|()| reserve(&options.ram_file, options.ram))
            .map_err(|source| VmmError::Io {
                what: format!("making a memory file of {} bytes", options.ram),
                source,
            })?;
        let machine = Parts {
            vcpus: options.vcpus,
            ram: options.ram,
            ram_file: options.ram_file,
            disk: options.disk,
            terminal: options.terminal,
            pace: options.pace,
            irqchip: options.irqchip,
        };
        let mut vmm = assemble(machine, &facts, Some(&options.program))?;
        let definition = definition(&mut vmm, options.vcpus)?;
        vmm.resume()?;
        Ok((Arc::new(Mutex::new(vmm)), definition))
    }
}

/// The builder's part of the definition, as of now.
pub(super) fn config(vmm: &mut KvmVmm) -> Result<Vec<u8>, VmmError> {
    let config = Config {
        version: CONFIG_VERSION,
        needs: vmm.needs()?,
    };
    let mut bytes = Vec::new();
    ciborium::into_writer(&config, &mut bytes)
        .map_err(|error| VmmError::State(format!("the definition: {error}")))?;
    Ok(bytes)
}

/// How to build such a guest elsewhere.
fn definition(vmm: &mut KvmVmm, vcpus: u32) -> Result<Definition, VmmError> {
    let bytes = config(vmm)?;
    let ram = vmm.ram().iter().map(|ram| (ram.name.clone(), ram.bytes));
    let disks = vmm.disks().iter();
    Ok(Definition {
        kind: KIND.to_owned(),
        vcpus,
        ram: ram.collect(),
        disks: disks
            .map(|disk| (disk.name().to_owned(), disk.bytes()))
            .collect(),
        config: bytes,
    })
}

impl Config {
    /// From bytes of a peer.
    pub(super) fn of(definition: &Definition) -> Result<Self, VmmError> {
        let refused = |why: String| VmmError::State(format!("the guest's definition: {why}"));
        if definition.config.len() > MOST_CONFIG {
            return Err(refused(format!(
                "its config has {} bytes, more than {MOST_CONFIG}",
                definition.config.len()
            )));
        }
        let config: Self = ciborium::from_reader(definition.config.as_slice())
            .map_err(|error| refused(format!("its config is damaged: {error}")))?;
        if config.version != CONFIG_VERSION {
            return Err(refused(format!(
                "its config is of version {}, and this Farhaven reads version {CONFIG_VERSION}; \
                 run the same release at both sites",
                config.version
            )));
        }
        config.needs.within_limits()?;
        if config.needs.vcpus != definition.vcpus {
            return Err(refused(format!(
                "it has {} vCPUs, its config {}",
                definition.vcpus, config.needs.vcpus
            )));
        }
        Ok(config)
    }
}

/// What a machine is put together of.
pub(super) struct Parts {
    pub(super) vcpus: u32,
    pub(super) ram: u64,
    /// At its full size.
    pub(super) ram_file: File,
    pub(super) disk: Option<Arc<TrackedDisk>>,
    pub(super) terminal: Arc<dyn Terminal>,
    pub(super) pace: Pace,
    pub(super) irqchip: bool,
}

/// Puts a machine together. Its vCPUs are held: at the begin of a program, or
/// waiting for a state.
pub(super) fn assemble(
    parts: Parts,
    facts: &KvmFacts,
    program: Option<&[u8]>,
) -> Result<KvmVmm, VmmError> {
    check_sizes(&parts)?;
    let kvm = facts::open(Path::new(facts::DEVICE))?;
    let failed = |call: &'static str| {
        move |error| {
            kvm_error(
                call,
                error,
                "is the host short of memory, or of KVM's limits?",
            )
        }
    };
    let vm = Arc::new(kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?);
    if parts.irqchip {
        // Intel needs three pages below 4 GiB that are nothing else's.
        vm.set_tss_address(0xfffb_d000)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config::default())
            .map_err(failed("KVM_CREATE_PIT2"))?;
    }
    let memory = map(parts.ram_file, parts.ram)?;
    if let Some(program) = program {
        boot::load(&memory, parts.ram, program)?;
    }
    let ram = TrackedRam::register(vm.clone(), memory.clone())?;
    let board = Board::new(memory, parts.disk.clone(), parts.terminal, parts.pace);
    let (gates, each) = Gates::new(parts.vcpus as usize);
    for (index, gate) in (0..parts.vcpus).zip(each) {
        let vcpu = vm
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        if program.is_some() {
            boot::start(&vcpu, facts, index, parts.vcpus, parts.ram)?;
        }
        let board = board.clone();
        std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .spawn(move || run(vcpu, gate, &board))
            .map_err(|source| VmmError::Io {
                what: format!("starting the thread of vCPU {index}"),
                source,
            })?;
    }
    KvmVmm::new(KvmParts {
        vm,
        ram,
        gates,
        disks: parts.disk.into_iter().collect(),
        devices: Box::new(board),
    })
    .map(KvmVmm::of_our_own)
}

fn check_sizes(parts: &Parts) -> Result<(), VmmError> {
    let (vcpus, ram) = (parts.vcpus, parts.ram);
    if vcpus == 0 || vcpus > boot::MOST_VCPUS {
        return Err(VmmError::State(format!(
            "{vcpus} vCPUs; such a machine has 1 to {}",
            boot::MOST_VCPUS
        )));
    }
    if !(boot::PROGRAM_AT..=boot::MOST_RAM).contains(&ram) || !ram.is_multiple_of(4096) {
        return Err(VmmError::State(format!(
            "{ram} bytes of memory; such a machine has a whole number of 4 KiB pages between \
             1 MiB and {} GiB",
            boot::MOST_RAM >> 30
        )));
    }
    let disk = parts.disk.as_ref().map_or(0, |disk| disk.bytes());
    if disk > boot::MOST_DISK {
        return Err(VmmError::State(format!(
            "a disk of {disk} bytes; such a machine has one of at most {} GiB",
            boot::MOST_DISK >> 30
        )));
    }
    Ok(())
}

fn map(file: File, bytes: u64) -> Result<TrackedMemory, VmmError> {
    let has = file.metadata().map_or(0, |meta| meta.len());
    if has < bytes {
        return Err(VmmError::State(format!(
            "the memory file has {has} bytes, the guest {bytes}"
        )));
    }
    let (file, mut from) = (Arc::new(file), 0);
    let parts = boot::layout(bytes).into_iter().map(|(at, bytes)| {
        let offset = FileOffset::from_arc(file.clone(), from);
        from += bytes;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        (GuestAddress(at), size, Some(offset))
    });
    TrackedMemory::from_ranges_with_files(parts.collect::<Vec<_>>()).map_err(|error| VmmError::Io {
        what: format!("mapping {bytes} bytes of guest memory"),
        source: std::io::Error::other(error.to_string()),
    })
}

/// A vCPU's life.
fn run(mut vcpu: VcpuFd, mut gate: VcpuGate, board: &Board) {
    let index = gate.index();
    let why = loop {
        match gate.run(&mut vcpu) {
            Ok(Turn::Exit(exit)) => {
                if let Some(why) = serve(exit, board) {
                    break why;
                }
            }
            Ok(Turn::Again) => {}
            Ok(Turn::End) => return,
            Err(error) => break error.to_string(),
        }
    };
    gate.end(&format!("vCPU {index}: {why}"));
}

/// Does what a vCPU exited for; a reason when the guest cannot go on.
fn serve(exit: VcpuExit<'_>, board: &Board) -> Option<String> {
    match exit {
        VcpuExit::IoOut(port, data) => match board.write(port, data) {
            Asked::Nothing => None,
            Asked::Shutdown => Some("the guest shut itself down".to_owned()),
        },
        VcpuExit::IoIn(port, data) => {
            board.read(port, data);
            None
        }
        // As on a bus where nobody answers.
        VcpuExit::MmioRead(_, data) => {
            data.fill(0xff);
            None
        }
        VcpuExit::MmioWrite(..) | VcpuExit::IrqWindowOpen | VcpuExit::Intr => None,
        VcpuExit::Hlt => {
            std::thread::sleep(REST);
            None
        }
        VcpuExit::Shutdown => {
            Some("a triple fault: the guest met an exception that it had no handler for".to_owned())
        }
        VcpuExit::InternalError => Some(
            "KVM met an instruction or a state that it cannot handle (internal error)".to_owned(),
        ),
        VcpuExit::FailEntry(reason, cpu) => Some(format!(
            "the processor refused to enter the guest (reason {reason:#x} on host CPU {cpu})"
        )),
        other => Some(format!(
            "an exit that this machine does not know: {other:?}"
        )),
    }
}
