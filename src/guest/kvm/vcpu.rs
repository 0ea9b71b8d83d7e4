//! One vCPU, whole, out of KVM and into it.
//!
//! The order matters. Out: the MP state first, for reading it makes KVM take
//! what is pending into account; a port or MMIO access that waits for its end
//! was ended by the gate before. In: CPUID before everything, for KVM checks
//! what follows against it; system registers before XCRs, XSAVE and the local
//! APIC, whose base and mode they hold; the APIC before its deadline timer's
//! MSR, and the time stamp counter before that too; events last, for system
//! registers and the APIC would change them. (As Linux' documentation of KVM,
//! QEMU's `target/i386/kvm/kvm.c` and Firecracker's `arch/x86_64/vcpu.rs` do.)

use std::collections::BTreeSet;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};

use super::kvm_error;
use super::state::{Exact, MOST_XSAVE, VcpuState};
use crate::guest::embedded::VmmError;

/// The time stamp counter.
pub(super) const TSC: u32 = 0x10;
/// When the local APIC's timer is due, by the time stamp counter.
const TSC_DEADLINE: u32 = 0x6e0;
/// What a KVM_GET_MSRS or KVM_SET_MSRS takes at a time.
const MSRS_AT_ONCE: usize = 200;
/// CR4's bit of control-flow enforcement: shadow stacks, indirect branch tracking.
const CR4_CET: u64 = 1 << 23;
/// Bytes of an XSAVE area without dynamic features.
const PLAIN_XSAVE: usize = size_of::<kvm_xsave>();
/// How far two time stamp counters may differ in frequency and count as the
/// same: what NTP corrects, 250 parts in a million.
const TSC_TOLERANCE: u64 = 4000;

/// What of a vCPU a host can give and take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Abilities {
    /// MSRs to save, in the order in which they are restored.
    pub(super) msrs: Vec<u32>,
    /// Bytes of the XSAVE area; none where there is no XSAVE.
    pub(super) xsave_bytes: usize,
    pub(super) xcrs: bool,
    pub(super) tsc_khz: bool,
    pub(super) tsc_control: bool,
    /// A guest may run guests of its own.
    pub(super) nested: bool,
    /// The guest's local APICs are in the kernel.
    pub(super) lapic: bool,
}

/// Values of MSRs by index, and MSRs that cannot be read.
pub(super) type ReadMsrs = (Vec<(u32, u64)>, Vec<u32>);

/// Reads these MSRs.
pub(super) fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<ReadMsrs, VmmError> {
    let (mut values, mut unreadable) = (Vec::with_capacity(wanted.len()), Vec::new());
    let mut rest = wanted;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..kvm_msr_entry::default()
        };
        let entries: Vec<_> = part.iter().map(entry).collect();
        let mut msrs = msr_list(&entries)?;
        // KVM stops at the first that it cannot read.
        let read = vcpu.get_msrs(&mut msrs).map_err(|error| {
            kvm_error("KVM_GET_MSRS", error, "the host's KVM does not give MSRs")
        })?;
        let got = msrs.as_slice().iter().take(read);
        values.extend(got.map(|msr| (msr.index, msr.data)));
        unreadable.extend(part.get(read));
        rest = &rest[(read + 1).min(part.len()).max(1)..];
    }
    Ok((values, unreadable))
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, VmmError> {
    Msrs::from_entries(entries)
        .map_err(|error| VmmError::State(format!("{} MSRs: {error:?}", entries.len())))
}

/// Takes all of a vCPU.
pub(super) fn save(vcpu: &VcpuFd, can: &Abilities) -> Result<VcpuState, VmmError> {
    let failed = |call: &'static str| {
        move |error| kvm_error(call, error, "the vCPU's state cannot be read on this host")
    };
    if can.nested
        && let Ok(Some(_)) = vcpu.nested_state(&mut KvmNestedStateBuffer::empty())
    {
        return Err(VmmError::State(
            "the guest runs virtual machines of its own, whose state is not carried; stop \
             those, or hide VMX and SVM from the guest at its start"
                .to_owned(),
        ));
    }
    let mp_state = vcpu
        .get_mp_state()
        .map_err(failed("KVM_GET_MP_STATE (whether it is halted)"))?;
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    without_cet(sregs.cr4)?;
    let fpu = match can.xsave_bytes {
        0 => Some(vcpu.get_fpu().map_err(failed("KVM_GET_FPU"))?.into()),
        _ => None,
    };
    let xsave = save_xsave(vcpu, can.xsave_bytes).map_err(failed("KVM_GET_XSAVE"))?;
    let xcrs = match can.xcrs {
        true => Some(Exact(vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?)),
        false => None,
    };
    let debug = vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let lapic = match can.lapic {
        true => Some(Exact(vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?)),
        false => None,
    };
    let tsc_khz = match can.tsc_khz {
        true => Some(vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?),
        false => None,
    };
    let (msrs, _) = read_msrs(vcpu, &can.msrs)?;
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_CPUID2"))?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().iter().copied().map(Exact).collect(),
        tsc_khz,
        regs: Exact(regs),
        sregs: Exact(sregs),
        fpu,
        xsave,
        xcrs,
        msrs,
        lapic,
        events: Exact(events),
        debug: Exact(debug),
        mp_state: Exact(mp_state),
    })
}

/// Refuses a guest that uses shadow stacks: their pointer is in no MSR of KVM's
/// list, and a guest that went on with another would die of it.
pub(super) fn without_cet(cr4: u64) -> Result<(), VmmError> {
    match cr4 & CR4_CET {
        0 => Ok(()),
        _ => Err(VmmError::State(
            "the guest uses control-flow enforcement (CET), whose shadow stack pointer is not \
             carried; hide SHSTK and IBT from the guest at its start"
                .to_owned(),
        )),
    }
}

/// Gives a vCPU that has never run all that another was.
pub(super) fn restore(vcpu: &VcpuFd, state: &VcpuState, can: &Abilities) -> Result<(), VmmError> {
    let refused = |what: &'static str| {
        move |error| {
            kvm_error(
                what,
                error,
                "this host's KVM refuses that part of the guest's state; compare the hosts \
                 with `farhaven guest check`",
            )
        }
    };
    let entries: Vec<_> = state.cpuid.iter().map(|entry| entry.0).collect();
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|error| VmmError::State(format!("CPUID: {error:?}")))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(refused("KVM_SET_CPUID2 (the CPU's features)"))?;
    set_frequency(vcpu, state, can)?;
    vcpu.set_regs(&state.regs.0)
        .map_err(refused("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.sregs.0)
        .map_err(refused("KVM_SET_SREGS (segments and control registers)"))?;
    if let Some(xcrs) = &state.xcrs {
        vcpu.set_xcrs(&xcrs.0)
            .map_err(refused("KVM_SET_XCRS (which vector registers are on)"))?;
    }
    if let Some(fpu) = &state.fpu {
        vcpu.set_fpu(&fpu.into()).map_err(refused("KVM_SET_FPU"))?;
    }
    if !state.xsave.is_empty() {
        let area = xsave_area(&state.xsave, can.xsave_bytes)?;
        set_xsave(vcpu, &area).map_err(refused("KVM_SET_XSAVE (FPU and vector registers)"))?;
    }
    vcpu.set_debug_regs(&state.debug.0)
        .map_err(refused("KVM_SET_DEBUGREGS"))?;
    if let Some(lapic) = &state.lapic {
        vcpu.set_lapic(&lapic.0)
            .map_err(refused("KVM_SET_LAPIC (local interrupt controller)"))?;
    }
    let in_order = |late: bool| {
        let wanted = move |msr: &&(u32, u64)| (msr.0 == TSC_DEADLINE) == late;
        state.msrs.iter().filter(wanted).copied()
    };
    let msrs: Vec<_> = in_order(false).chain(in_order(true)).collect();
    write_msrs(vcpu, &msrs)?;
    vcpu.set_mp_state(state.mp_state.0)
        .map_err(refused("KVM_SET_MP_STATE (whether it is halted)"))?;
    vcpu.set_vcpu_events(&state.events.0)
        .map_err(refused("KVM_SET_VCPU_EVENTS (pending exceptions)"))
}

/// Writes MSRs. One that this host refuses is no harm where it has that value
/// already, or where the value is nought and the guest therefore never used it.
fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), VmmError> {
    let mut seen = BTreeSet::new();
    if let Some((index, _)) = msrs.iter().find(|(index, _)| !seen.insert(index)) {
        return Err(VmmError::State(format!("it has MSR {index:#x} twice")));
    }
    let mut rest = msrs;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entry = |(index, data): &(u32, u64)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..kvm_msr_entry::default()
        };
        let entries: Vec<_> = part.iter().map(entry).collect();
        // KVM stops at the first that it refuses.
        let written = vcpu.set_msrs(&msr_list(&entries)?).map_err(|error| {
            kvm_error("KVM_SET_MSRS", error, "the host's KVM does not take MSRs")
        })?;
        if let Some((index, value)) = part.get(written) {
            let (here, _) = read_msrs(vcpu, &[*index])?;
            let same = here.first().is_some_and(|(_, here)| here == value);
            if !same && *value != 0 {
                let has = match here.first() {
                    Some((_, here)) => format!("keeps {here:#x} in it"),
                    None => "has no such MSR".to_owned(),
                };
                return Err(VmmError::State(format!(
                    "the guest has {value:#x} in MSR {index:#x}, and this host's KVM {has}; \
                     let it run on a host with the same CPU and kernel, or hide that feature \
                     from it at its start"
                )));
            }
        }
        rest = &rest[(written + 1).min(part.len()).max(1)..];
    }
    Ok(())
}

/// Makes the time stamp counter count as fast as it did.
fn set_frequency(vcpu: &VcpuFd, state: &VcpuState, can: &Abilities) -> Result<(), VmmError> {
    let (Some(wanted), true) = (state.tsc_khz, can.tsc_khz) else {
        return Ok(());
    };
    let here = vcpu.get_tsc_khz().map_err(|error| {
        kvm_error(
            "KVM_GET_TSC_KHZ",
            error,
            "the host's time stamp counter is not stable",
        )
    })?;
    if same_frequency(wanted, here) {
        return Ok(());
    }
    if !can.tsc_control {
        return Err(VmmError::State(format!(
            "the guest's time stamp counter runs at {wanted} kHz, this host's at {here} kHz, and \
             its CPU cannot scale it; let the guest run on a host with that frequency, or with \
             TSC scaling"
        )));
    }
    vcpu.set_tsc_khz(wanted).map_err(|error| {
        kvm_error(
            format!("KVM_SET_TSC_KHZ to {wanted}"),
            error,
            "this host cannot count at the frequency of the guest's",
        )
    })
}

/// Whether two frequencies in kHz count as the same.
pub(super) fn same_frequency(wanted: u32, here: u32) -> bool {
    u64::from(here.abs_diff(wanted)) * TSC_TOLERANCE <= u64::from(wanted)
}

fn save_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let mut area = Vec::with_capacity(bytes);
    let mut put = |words: &[u32]| {
        words
            .iter()
            .for_each(|word| area.extend(word.to_ne_bytes()))
    };
    if bytes > PLAIN_XSAVE {
        let mut xsave = Xsave::new((bytes - PLAIN_XSAVE).div_ceil(4))
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        get_large_xsave(vcpu, &mut xsave)?;
        put(&xsave.as_fam_struct_ref().xsave.region);
        put(xsave.as_slice());
    } else if bytes != 0 {
        put(&vcpu.get_xsave()?.region);
    }
    Ok(area)
}

#[allow(unsafe_code)]
fn get_large_xsave(vcpu: &VcpuFd, into: &mut Xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: its room is what KVM_CAP_XSAVE2 of this VM says, and nobody here
    // asks for more dynamic features after that.
    unsafe { vcpu.get_xsave2(into) }
}

/// An XSAVE area as large as this host's KVM reads.
fn xsave_area(saved: &[u8], here: usize) -> Result<Xsave, VmmError> {
    // What a larger area has more are features that are not on, or not here:
    // the header's bits say which, and KVM checks those.
    let room = here.clamp(PLAIN_XSAVE, MOST_XSAVE);
    let (kept, dropped) = saved.split_at(room.min(saved.len()));
    if dropped.iter().any(|byte| *byte != 0) {
        return Err(VmmError::State(format!(
            "its XSAVE area uses {} bytes, and this host's has {room}: the guest uses vector or \
             matrix registers that this host lacks",
            saved.len()
        )));
    }
    let word = |index: usize| {
        let at = kept.get(index * 4..index * 4 + 4);
        at.and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    let mut plain = kvm_xsave::default();
    for (index, to) in plain.region.iter_mut().enumerate() {
        *to = word(index);
    }
    let header = kvm_xsave2 {
        len: (room - PLAIN_XSAVE).div_ceil(4),
        xsave: plain,
    };
    let plain_words = header.xsave.region.len();
    let mut area =
        Xsave::from_header(header).map_err(|error| VmmError::State(format!("{error:?}")))?;
    for (index, to) in area.as_mut_slice().iter_mut().enumerate() {
        *to = word(plain_words + index);
    }
    Ok(area)
}

#[allow(unsafe_code)]
fn set_xsave(vcpu: &VcpuFd, area: &Xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: it has the room that KVM_CAP_XSAVE2 of this VM says KVM reads, or
    // the plain 4 KiB where there is no such capability.
    unsafe { vcpu.set_xsave2(area) }
}
