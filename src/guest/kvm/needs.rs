//! What a guest's state asks of a host's KVM, to be compared with what the host
//! has before the guest is stopped anywhere.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use super::facts::KvmFacts;
use super::features::{FEATURES, FeatureRegister, Register};
use super::state::{Exact, MOST_MSRS, MOST_VCPUS, MOST_XSAVE, VcpuState};
use crate::guest::embedded::VmmError;
use crate::guest::qemu::check::Finding;

/// What a guest needs of KVM. Travels in a
/// [`Definition`](crate::guest::embedded::Definition)'s config, so the bytes it
/// is read from may be a peer's: [`KvmNeeds::within_limits`] before use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmNeeds {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Interrupt chips in the kernel.
    pub irqchip: bool,
    /// Bytes of its XSAVE area.
    pub xsave_bytes: u32,
    /// How fast its time stamp counter runs.
    pub tsc_khz: Option<u32>,
    /// Its MSRs, and whether there is something in them.
    pub msrs: Vec<(u32, bool)>,
    pub(super) cpuid: Vec<Exact<kvm_cpuid_entry2>>,
}

impl KvmNeeds {
    pub(super) fn of(vcpus: usize, state: &VcpuState) -> Self {
        let msr = |(index, value): &(u32, u64)| (*index, *value != 0);
        Self {
            vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
            irqchip: state.lapic.is_some(),
            xsave_bytes: u32::try_from(state.xsave.len()).unwrap_or(u32::MAX),
            tsc_khz: state.tsc_khz,
            msrs: state.msrs.iter().map(msr).collect(),
            cpuid: state.cpuid.clone(),
        }
    }

    /// Of a guest with these vCPUs: an MSR that one of them uses is used.
    pub(super) fn of_all(vcpus: &[VcpuState]) -> Option<Self> {
        let mut all = Self::of(vcpus.len(), vcpus.first()?);
        for vcpu in vcpus {
            let values = all.msrs.iter_mut().zip(&vcpu.msrs);
            for (msr, (_, value)) in values.filter(|(msr, (index, _))| msr.0 == *index) {
                msr.1 |= *value != 0;
            }
        }
        Some(all)
    }

    /// Refuses what no guest needs.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn within_limits(&self) -> Result<(), VmmError> {
        let (vcpus, xsave) = (self.vcpus as usize, self.xsave_bytes as usize);
        let limits = [
            ("vCPUs", vcpus, MOST_VCPUS),
            ("bytes of XSAVE", xsave, MOST_XSAVE),
            ("MSRs", self.msrs.len(), MOST_MSRS),
            ("CPUID entries", self.cpuid.len(), KVM_MAX_CPUID_ENTRIES),
        ];
        for (what, has, most) in limits {
            if has > most {
                return Err(VmmError::State(format!("{has} {what}, more than {most}")));
            }
        }
        Ok(())
    }
}

/// What would stop a guest with these needs from running here: every CPU
/// feature and MSR that it has and this host lacks, by name.
pub fn check(needs: &KvmNeeds, here: &KvmFacts) -> Vec<Finding> {
    let mut found = features(needs, here);
    let block = |found: &mut Vec<_>, code, what: String, mend: &str| {
        found.push(Finding::blocks(code, what, mend));
    };
    if needs.vcpus as usize > here.most_vcpus {
        let what = format!(
            "the guest has {} vCPUs, this host's KVM runs {}",
            needs.vcpus, here.most_vcpus
        );
        block(&mut found, "kvm-vcpus", what, "give it fewer vCPUs");
    }
    if needs.irqchip && !here.irqchip {
        block(
            &mut found,
            "kvm-irqchip",
            "the guest's interrupt chips are in the kernel, and this host's KVM has none".into(),
            "load the kvm module with its interrupt chips",
        );
    }
    let (wanted, xsave) = (needs.xsave_bytes as usize, here.xsave_bytes);
    if wanted > 0 && xsave == 0 {
        let what = "the guest's CPU has XSAVE, and this host's KVM does not".to_owned();
        block(
            &mut found,
            "kvm-xsave",
            what,
            "use a host with the same CPU",
        );
    } else if wanted > xsave {
        found.push(Finding::warns(
            "kvm-xsave-size",
            format!("the guest's XSAVE area has {wanted} bytes, this host's {xsave}"),
            "use a host with the same CPU, or hide AMX from the guest",
        ));
    }
    if register_has(needs, 1, |entry| entry.ecx >> 5 & 1 == 1)
        || register_has(needs, 0x8000_0001, |entry| entry.ecx >> 2 & 1 == 1)
    {
        found.push(Finding::warns(
            "kvm-nested",
            "the guest can run virtual machines of its own, and cannot be protected while it does",
            "hide VMX and SVM from the guest at its start",
        ));
    }
    tsc(needs, here, &mut found);
    msrs(needs, here, &mut found);
    found
}

fn register_has(needs: &KvmNeeds, leaf: u32, is: impl Fn(&kvm_cpuid_entry2) -> bool) -> bool {
    let same = |entry: &&Exact<kvm_cpuid_entry2>| entry.0.function == leaf;
    needs
        .cpuid
        .iter()
        .find(same)
        .is_some_and(|entry| is(&entry.0))
}

fn register(entries: &[kvm_cpuid_entry2], of: &FeatureRegister) -> u32 {
    let same = |e: &&kvm_cpuid_entry2| e.function == of.leaf && e.index == of.index;
    entries
        .iter()
        .find(same)
        .map_or(0, |entry| match of.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
}

/// The CPU's vendor, as `GenuineIntel`.
fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = entries.iter().find(|entry| entry.function == 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    let text = String::from_utf8_lossy(bytes.as_flattened()).into_owned();
    Some(text.escape_default().to_string())
}

fn features(needs: &KvmNeeds, here: &KvmFacts) -> Vec<Finding> {
    let wanted: Vec<_> = needs.cpuid.iter().map(|entry| entry.0).collect();
    let mut found = Vec::new();
    if let (Some(guest), Some(host)) = (vendor(&wanted), vendor(&here.cpuid))
        && guest != host
    {
        found.push(Finding::blocks(
            "kvm-cpu-vendor",
            format!("the guest runs on a CPU that says {guest:?}, this host's says {host:?}"),
            "use a host with a CPU of the same vendor",
        ));
    }
    for of in &FEATURES {
        let gives = register(&here.cpuid, of) | register(&here.found, of);
        let lacking = register(&wanted, of) & !gives & !of.ignored;
        for bit in (0..32).filter(|bit| lacking >> bit & 1 == 1) {
            found.push(Finding::blocks(
                "kvm-cpu-feature",
                format!(
                    "the guest's CPU has {}, which this host's KVM cannot give it",
                    of.name(bit)
                ),
                "use a host with that feature, or hide it from the guest at its next start",
            ));
        }
    }
    found
}

fn tsc(needs: &KvmNeeds, here: &KvmFacts, found: &mut Vec<Finding>) {
    let (Some(wanted), Some(khz)) = (needs.tsc_khz, here.tsc_khz) else {
        return;
    };
    if !here.tsc_control && !super::vcpu::same_frequency(wanted, khz) {
        found.push(Finding::blocks(
            "kvm-tsc",
            format!(
                "the guest's time stamp counter runs at {wanted} kHz, this host's at {khz} kHz, \
                 and its CPU cannot scale it"
            ),
            "use a host with that frequency, or with TSC scaling",
        ));
    }
}

fn msrs(needs: &KvmNeeds, here: &KvmFacts, found: &mut Vec<Finding>) {
    let lacking = |used: bool| {
        let wanted = needs.msrs.iter().filter(move |msr| msr.1 == used);
        wanted.filter(|(index, _)| !here.msrs.contains(index))
    };
    for (index, _) in lacking(true) {
        found.push(Finding::blocks(
            "kvm-msr",
            format!("the guest uses MSR {index:#x}, which this host's KVM lacks"),
            "use a host with the same CPU and kernel",
        ));
    }
    let unused: Vec<_> = lacking(false).map(|(msr, _)| format!("{msr:#x}")).collect();
    if !unused.is_empty() {
        found.push(Finding::warns(
            "kvm-msr-unused",
            format!(
                "this host's KVM lacks MSRs that the guest has but does not use: {}",
                unused.join(", ")
            ),
            "nothing, unless the guest begins to use them; a host with the same kernel has them",
        ));
    }
}
