//! What a guest is beside its memory and disks, as bytes: of each vCPU all that
//! KVM gives, of the VM its interrupt chips, timer and clock, and what the
//! monitor's own devices say.
//!
//! ```text
//! bytes 0..6   "fh-kvm"
//! bytes 6..8   version, little endian: 1
//! bytes 8..    CBOR: {vcpus, chips, pit, clock, devices}
//! ```
//!
//! KVM's structures are kept as their bytes, which are a stable interface of
//! the kernel, and must have their exact size. The bytes come from a peer:
//! sizes and counts are checked before anything is made of them.

use std::io::Cursor;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::guest::embedded::VmmError;

const MAGIC: &[u8; 6] = b"fh-kvm";
/// The version that is written, and the only one that is read.
pub const VERSION: u16 = 1;
/// Longest state that is taken.
pub const MOST_BYTES: usize = 64 << 20;
/// Most vCPUs of a state.
pub const MOST_VCPUS: usize = 1024;
/// Most MSRs of a vCPU.
pub const MOST_MSRS: usize = 4096;
/// Largest XSAVE area.
pub const MOST_XSAVE: usize = 64 << 10;

/// A structure of the kernel as its bytes, exactly as many as it has.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Exact<T>(pub(super) T);

impl<T: Serialize> Serialize for Exact<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(to)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Exact<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bytes = serde_bytes::ByteBuf::deserialize(from)?;
        if bytes.len() != size_of::<T>() {
            return Err(D::Error::invalid_length(
                bytes.len(),
                &format!("{} bytes", size_of::<T>()).as_str(),
            ));
        }
        T::deserialize(serde::de::value::BytesDeserializer::new(&bytes)).map(Self)
    }
}

/// All of one vCPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VcpuState {
    pub(super) cpuid: Vec<Exact<kvm_cpuid_entry2>>,
    /// Nothing where the host does not tell.
    pub(super) tsc_khz: Option<u32>,
    pub(super) regs: Exact<kvm_regs>,
    pub(super) sregs: Exact<kvm_sregs>,
    /// Only where there is no XSAVE, which holds it too.
    pub(super) fpu: Option<Fpu>,
    #[serde(with = "serde_bytes")]
    pub(super) xsave: Vec<u8>,
    pub(super) xcrs: Option<Exact<kvm_xcrs>>,
    /// Index and value, in the order of the host's list.
    pub(super) msrs: Vec<(u32, u64)>,
    /// Only with the interrupt chips in the kernel.
    pub(super) lapic: Option<Exact<kvm_lapic_state>>,
    pub(super) events: Exact<kvm_vcpu_events>,
    pub(super) debug: Exact<kvm_debugregs>,
    pub(super) mp_state: Exact<kvm_mp_state>,
}

/// The x87 and SSE registers, which the bindings cannot serialize.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fpu {
    registers: [[u8; 16]; 8],
    control: (u16, u16, u8, u16, u64, u64),
    vectors: [[u8; 16]; 16],
    mxcsr: u32,
}

impl From<kvm_fpu> for Fpu {
    fn from(fpu: kvm_fpu) -> Self {
        Self {
            registers: fpu.fpr,
            control: (
                fpu.fcw,
                fpu.fsw,
                fpu.ftwx,
                fpu.last_opcode,
                fpu.last_ip,
                fpu.last_dp,
            ),
            vectors: fpu.xmm,
            mxcsr: fpu.mxcsr,
        }
    }
}

impl From<&Fpu> for kvm_fpu {
    fn from(fpu: &Fpu) -> Self {
        let (fcw, fsw, ftwx, last_opcode, last_ip, last_dp) = fpu.control;
        Self {
            fpr: fpu.registers,
            fcw,
            fsw,
            ftwx,
            last_opcode,
            last_ip,
            last_dp,
            xmm: fpu.vectors,
            mxcsr: fpu.mxcsr,
            ..Self::default()
        }
    }
}

/// All of a guest beside memory and disks.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub(super) vcpus: Vec<VcpuState>,
    /// First PIC, second PIC, IOAPIC; none without chips in the kernel.
    pub(super) chips: Vec<Exact<kvm_irqchip>>,
    pub(super) pit: Option<Exact<kvm_pit_state2>>,
    /// The time that paravirtual clocks tell.
    pub(super) clock: Option<Exact<kvm_clock_data>>,
    /// The monitor's own devices, in its own form.
    #[serde(with = "serde_bytes")]
    pub(super) devices: Vec<u8>,
}

impl State {
    /// As bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>, VmmError> {
        let mut bytes = Vec::with_capacity(16 << 10);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        ciborium::into_writer(self, &mut bytes)
            .map_err(|error| VmmError::State(format!("it cannot be written: {error}")))?;
        Ok(bytes)
    }

    /// From bytes of a peer.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, VmmError> {
        let refused = |why: String| Err(VmmError::State(why));
        if bytes.len() > MOST_BYTES {
            return refused(format!(
                "it has {} bytes, more than the {MOST_BYTES} that any guest's has",
                bytes.len()
            ));
        }
        let (Some(magic), Some(version)) = (bytes.get(..6), bytes.get(6..8)) else {
            return refused(format!("it is cut off after {} bytes", bytes.len()));
        };
        if magic != MAGIC {
            return refused(
                "it is not that of a KVM guest of Farhaven; another monitor made it".to_owned(),
            );
        }
        let version = u16::from_le_bytes([version[0], version[1]]);
        if version != VERSION {
            return refused(format!(
                "it is of version {version}, and this Farhaven reads version {VERSION}; \
                 run the same release at both sites"
            ));
        }
        let mut body = Cursor::new(bytes.get(8..).unwrap_or_default());
        let state: Self = match ciborium::from_reader(&mut body) {
            Ok(state) => state,
            Err(error) => return refused(format!("it is damaged or cut off: {error}")),
        };
        if body.position() != (bytes.len() - 8) as u64 {
            return refused("bytes follow after its end".to_owned());
        }
        state.check()?;
        Ok(state)
    }

    /// Counts that KVM's calls take.
    fn check(&self) -> Result<(), VmmError> {
        let wrong = |what: String| Err(VmmError::State(what));
        if self.vcpus.is_empty() || self.vcpus.len() > MOST_VCPUS {
            return wrong(format!("it has {} vCPUs", self.vcpus.len()));
        }
        if !matches!(self.chips.len(), 0 | 3) {
            return wrong(format!(
                "it has {} interrupt chips, not three",
                self.chips.len()
            ));
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            if vcpu.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
                return wrong(format!(
                    "vCPU {index} has {} CPUID entries, more than {KVM_MAX_CPUID_ENTRIES}",
                    vcpu.cpuid.len()
                ));
            }
            if vcpu.msrs.len() > MOST_MSRS {
                return wrong(format!(
                    "vCPU {index} has {} MSRs, more than {MOST_MSRS}",
                    vcpu.msrs.len()
                ));
            }
            let xsave = vcpu.xsave.len();
            if xsave != 0 && (!(4096..=MOST_XSAVE).contains(&xsave) || !xsave.is_multiple_of(4)) {
                return wrong(format!("vCPU {index} has an XSAVE area of {xsave} bytes"));
            }
            if vcpu.lapic.is_some() == self.chips.is_empty() {
                return wrong(format!(
                    "vCPU {index} has a local APIC without interrupt chips, or they without it"
                ));
            }
        }
        Ok(())
    }
}

/// A state of one vCPU, with the kernel's interrupt chips or without.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn a_state(chips: bool) -> Vec<u8> {
    let vcpu = VcpuState {
        cpuid: vec![Exact::default()],
        tsc_khz: Some(2_000_000),
        regs: Exact::default(),
        sregs: Exact::default(),
        fpu: Some(Fpu::from(kvm_fpu::default())),
        xsave: Vec::new(),
        xcrs: None,
        msrs: vec![(0x10, 7)],
        lapic: chips.then(Exact::default),
        events: Exact::default(),
        debug: Exact::default(),
        mp_state: Exact::default(),
    };
    let state = State {
        vcpus: vec![vcpu],
        chips: vec![Exact::default(); if chips { 3 } else { 0 }],
        pit: None,
        clock: None,
        devices: vec![0xa0],
    };
    state.encode().expect("plain data has a CBOR form")
}
