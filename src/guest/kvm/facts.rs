//! What this host's KVM can do, found out by asking it: whether it is to be
//! used at all, and what a guest's state may hold here.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::vcpu::{Abilities, read_msrs};
use crate::guest::embedded::VmmError;

/// KVM's device.
pub const DEVICE: &str = "/dev/kvm";
/// The only version of KVM's interface there ever was since Linux 2.6.22.
const API: i32 = 12;

/// MSRs that hold state but are not in KVM's list: memory types, and the banks
/// of machine checks. Those that a host lacks are left out like others.
const UNLISTED: [std::ops::Range<u32>; 6] = [
    0x200..0x210,
    0x250..0x251,
    0x258..0x25a,
    0x268..0x270,
    0x2ff..0x300,
    0x400..0x480,
];

/// Capabilities without which a guest cannot be stopped, saved or restored.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
];

/// This host's KVM.
#[derive(Debug, Clone)]
pub struct KvmFacts {
    /// Most vCPUs of a guest.
    pub most_vcpus: usize,
    /// Interrupt chips can be made in the kernel.
    pub irqchip: bool,
    /// MSRs that can be saved and restored.
    pub msrs: Vec<u32>,
    /// MSRs that KVM lists, or that hold state elsewhere, but that cannot be
    /// read here: left out of a guest's state.
    pub unreadable_msrs: Vec<u32>,
    /// Bytes of the XSAVE area; none where there is no XSAVE.
    pub xsave_bytes: usize,
    /// XCR0 can be saved and restored.
    pub xcrs: bool,
    /// How fast a guest's time stamp counter runs, where KVM tells.
    pub tsc_khz: Option<u32>,
    /// It can be made to run at another frequency.
    pub tsc_control: bool,
    /// CPUID leaves that a guest can be given.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// What a guest finds that was given them: more, on a host whose KVM cannot
    /// hide what its CPU has.
    pub(super) found: Vec<kvm_cpuid_entry2>,
}

/// Why KVM is not to be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum KvmUnusable {
    /// No device.
    #[error(
        "{} does not exist: load the module (modprobe kvm_intel or kvm_amd), turn on \
         virtualization in the firmware, or, in a virtual machine, have nested \
         virtualization turned on by its host", .0.display()
    )]
    Absent(PathBuf),
    /// No right to it.
    #[error(
        "{} may not be opened by this user: add the user to the group that owns it \
         (usermod -aG kvm USER) and log in again, or run as root", .0.display()
    )]
    NotPermitted(PathBuf),
    /// Another failure to open.
    #[error("cannot open {}: {source}; look at the kernel's log", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Not KVM.
    #[error("{} is not KVM's device; remove it and load the kvm module", .0.display())]
    NotKvm(PathBuf),
    /// Another interface.
    #[error("this host's KVM has interface version {0}, not {API}; run a kernel of 5.10 or later")]
    TooOld(i32),
    /// It lacks what is needed.
    #[error("this host's KVM lacks {}; run a kernel of 5.10 or later", .0.join(", "))]
    Lacks(Vec<String>),
    /// It has all, but fails.
    #[error("this host's KVM does not work: {what}: {why}; look at the kernel's log")]
    Broken {
        /// What was tried.
        what: String,
        /// The kernel's reason.
        why: String,
    },
}

impl From<KvmUnusable> for VmmError {
    fn from(unusable: KvmUnusable) -> Self {
        VmmError::Kvm {
            call: "it is not to be used here".to_owned(),
            why: unusable.to_string(),
        }
    }
}

/// Finds out what this host's KVM can do. Takes some milliseconds.
///
/// # Errors
/// When it cannot be used; the message says what to do.
pub fn facts() -> Result<KvmFacts, KvmUnusable> {
    facts_of(Path::new(DEVICE))
}

/// As [`facts`], by another device node.
///
/// # Errors
/// As for [`facts`].
pub fn facts_of(device: &Path) -> Result<KvmFacts, KvmUnusable> {
    let kvm = open(device)?;
    let lacks: Vec<_> = NEEDED
        .into_iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| name.to_owned())
        .collect();
    if !lacks.is_empty() {
        return Err(KvmUnusable::Lacks(lacks));
    }
    let broken = |what: &'static str| {
        move |error: kvm_ioctls::Error| KvmUnusable::Broken {
            what: what.to_owned(),
            why: error.to_string(),
        }
    };
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(broken("KVM_GET_SUPPORTED_CPUID"))?;
    let listed = kvm
        .get_msr_index_list()
        .map_err(broken("KVM_GET_MSR_INDEX_LIST"))?;
    // A guest that never runs, to see what can be read.
    let vm = kvm.create_vm().map_err(broken("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(broken("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(broken("KVM_SET_CPUID2"))?;
    let found = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(broken("KVM_GET_CPUID2"))?;
    let mut wanted = listed.as_slice().to_vec();
    let unlisted = UNLISTED.into_iter().flatten();
    let unlisted: Vec<_> = unlisted.filter(|index| !wanted.contains(index)).collect();
    wanted.extend(unlisted);
    let (read, unreadable_msrs) =
        read_msrs(&vcpu, &wanted).map_err(|error| KvmUnusable::Broken {
            what: "KVM_GET_MSRS".to_owned(),
            why: error.to_string(),
        })?;
    Ok(KvmFacts {
        most_vcpus: kvm.get_max_vcpus(),
        irqchip: kvm.check_extension(Cap::Irqchip),
        msrs: read.into_iter().map(|(index, _)| index).collect(),
        unreadable_msrs,
        xsave_bytes: xsave_bytes(&vm),
        xcrs: kvm.check_extension(Cap::Xcrs),
        tsc_khz: vcpu
            .get_tsc_khz()
            .ok()
            .filter(|_| kvm.check_extension(Cap::GetTscKhz)),
        tsc_control: kvm.check_extension(Cap::TscControl),
        cpuid: cpuid.as_slice().to_vec(),
        found: found.as_slice().to_vec(),
    })
}

/// Opens KVM's device and makes sure that it is that.
pub(super) fn open(device: &Path) -> Result<Kvm, KvmUnusable> {
    let path = || device.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KvmUnusable::Absent(path()),
        io::ErrorKind::PermissionDenied => KvmUnusable::NotPermitted(path()),
        // A node is there, but no driver behind it.
        _ if matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            KvmUnusable::Absent(path())
        }
        _ => KvmUnusable::Open {
            path: path(),
            source,
        },
    };
    let name = CString::new(device.as_os_str().as_bytes()).map_err(|error| failed(error.into()))?;
    let kvm = Kvm::new_with_path(name).map_err(|error| failed(error.into()))?;
    match kvm.get_api_version() {
        API => Ok(kvm),
        version if version < 0 => Err(KvmUnusable::NotKvm(path())),
        version => Err(KvmUnusable::TooOld(version)),
    }
}

fn xsave_bytes(vm: &VmFd) -> usize {
    match usize::try_from(vm.check_extension_int(Cap::Xsave2)) {
        Ok(bytes) if bytes > 0 => bytes.max(size_of::<kvm_xsave>()),
        // Before Linux 5.17 it was always the plain area.
        _ if vm.check_extension(Cap::Xsave) => size_of::<kvm_xsave>(),
        _ => 0,
    }
}

impl KvmFacts {
    /// What of the vCPUs of this VM can be saved and restored.
    pub(super) fn abilities(&self, vm: &VmFd, lapic: bool) -> Abilities {
        Abilities {
            msrs: self.msrs.clone(),
            xsave_bytes: xsave_bytes(vm),
            xcrs: self.xcrs,
            tsc_khz: self.tsc_khz.is_some(),
            tsc_control: self.tsc_control,
            nested: vm.check_extension(Cap::NestedState),
            lapic,
        }
    }

    /// All that a guest can be told of its CPU here.
    ///
    /// # Errors
    /// When there are more leaves than KVM takes.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmmError> {
        CpuId::from_entries(&self.cpuid)
            .map_err(|error| VmmError::State(format!("CPUID: {error:?}")))
    }
}
