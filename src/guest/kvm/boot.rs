//! The machine in which a flat program begins: memory mapped one to one, each
//! vCPU in 64-bit mode at the program's first byte with a stack of its own.
//!
//! ```text
//! 0x001000            top page table
//! 0x002000            its first entry: one GiB each
//! 0x003000..0x080000  one page of 2 MiB entries for each GiB
//! 0x080000..0x100000  stacks, 16 KiB for each vCPU
//! 0x100000            the program
//! ```

use kvm_bindings::{CpuId, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::dirty::TrackedMemory;
use super::facts::KvmFacts;
use super::kvm_error;
use crate::guest::embedded::VmmError;

/// Where the program is.
pub const PROGRAM_AT: u64 = 0x10_0000;
/// Most vCPUs: as many stacks as there is room for.
pub const MOST_VCPUS: u32 = ((PROGRAM_AT - STACKS_AT) / STACK) as u32;
/// Most memory: as many page tables as there is room for, the hole below 4 GiB counted.
pub const MOST_RAM: u64 = (STACKS_AT - TABLES_AT) / 0x1000 * GIB - GIB;
/// Most bytes of its disk. A block's number has 32 bits; what is known of each
/// block takes memory of the host, and the size comes from a peer.
pub const MOST_DISK: u64 = 1 << 42;
/// Where memory leaves a hole for devices, up to 4 GiB.
pub const HOLE_AT: u64 = 3 * GIB;
/// Where memory goes on behind the hole.
pub const HIGH_AT: u64 = 4 * GIB;

const GIB: u64 = 1 << 30;
const TOP_TABLE_AT: u64 = 0x1000;
const GIB_TABLE_AT: u64 = 0x2000;
const TABLES_AT: u64 = 0x3000;
const STACKS_AT: u64 = 0x8_0000;
const STACK: u64 = 16 << 10;

/// Parts of guest memory of so many bytes: where the guest sees each, and its size.
pub(super) fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_AT);
    let mut parts = vec![(0, low)];
    if bytes > low {
        parts.push((HIGH_AT, bytes - low));
    }
    parts
}

/// Writes the page tables and the program.
pub(super) fn load(memory: &TrackedMemory, bytes: u64, program: &[u8]) -> Result<(), VmmError> {
    let write = |at: u64, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .map_err(|error| {
                VmmError::State(format!(
                    "{} bytes at {at:#x} do not fit into the guest's memory: {error}; give it more",
                    bytes.len()
                ))
            })
    };
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let end = layout(bytes).last().map_or(0, |(at, length)| at + length);
    let entry = |at: u64| (at | PRESENT_WRITABLE).to_le_bytes();
    write(TOP_TABLE_AT, &entry(GIB_TABLE_AT))?;
    for gib in 0..end.div_ceil(GIB) {
        let table = TABLES_AT + gib * 0x1000;
        write(GIB_TABLE_AT + gib * 8, &entry(table))?;
        let pages = (0..512).flat_map(|page| entry((gib * GIB + (page << 21)) | LARGE));
        write(table, &pages.collect::<Vec<u8>>())?;
    }
    write(PROGRAM_AT, program)
}

/// Puts a vCPU at the program's begin.
pub(super) fn start(
    vcpu: &VcpuFd,
    facts: &KvmFacts,
    index: u32,
    vcpus: u32,
    ram: u64,
) -> Result<(), VmmError> {
    let failed = |call: &'static str| {
        move |error| kvm_error(call, error, "this host's KVM cannot start a 64-bit guest")
    };
    vcpu.set_cpuid2(&cpuid(facts, index)?)
        .map_err(failed("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: PROGRAM_AT,
        rsp: STACKS_AT + u64::from(index + 1) * STACK,
        rdi: u64::from(index),
        rsi: u64::from(vcpus),
        rdx: ram,
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    // With interrupt chips in the kernel the others would wait to be started.
    vcpu.set_mp_state(kvm_bindings::kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
    })
    .map_err(failed("KVM_SET_MP_STATE"))
}

fn long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    // Without an IDT any exception ends the guest, which is what it should.
    sregs.idt.limit = 0;
    sregs.gdt.limit = 0;
    sregs.cr3 = TOP_TABLE_AT;
    // PAE, and SSE with its exceptions.
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    // Protected mode, FPU of this century, paging.
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    // Long mode, on and in use.
    sregs.efer = 1 << 8 | 1 << 10;
}

/// All that the host can give, but for what [`vcpu::save`](super::vcpu::save)
/// refuses: guests of the guest's own, and control-flow enforcement.
pub(super) fn cpuid(facts: &KvmFacts, index: u32) -> Result<CpuId, VmmError> {
    let mut cpuid = facts.supported_cpuid()?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx &= !(1 << 5);
                entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
            }
            // Shadow stacks and indirect branch tracking: KVM does not give their
            // pointers by the calls that save a vCPU.
            7 if entry.index == 0 => {
                entry.ecx &= !(1 << 7);
                entry.edx &= !(1 << 20);
            }
            0xb | 0x1f => entry.edx = index,
            0x8000_0001 => entry.ecx &= !(1 << 2),
            _ => {}
        }
    }
    Ok(cpuid)
}
