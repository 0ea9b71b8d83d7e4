//! The guest that proves itself: a program for [`KvmMachine`](super::KvmMachine)
//! that needs nothing but this binary, and finds out by itself when it was
//! activated from anything but one exact instant.
//!
//! It is machine code (`program.s`) loaded flat at guest-physical 0x100000, and
//! runs under the ports of our machine's board: a polled console, a disk of
//! 4 KiB blocks, a clock. It rests by HLT, so the machine must have no interrupt
//! chips in the kernel. It wants 16 MiB of memory or more.
//!
//! # What it does
//!
//! Each vCPU owns a slice of the working set's pages and blocks. At the wanted
//! pace it rewrites a page, scattered but each once a cycle, and after every
//! fourth a block. What a page or block holds follows exactly from its number
//! (its *item*) and the sequence of its last write: four words (a mark, item,
//! sequence, their checksum), then filler made from the checksum: one repeated
//! word, half zeros, a stretch of noise that other pages share, or noise of its
//! own. So all 4096 bytes can be checked, and content is of every kind.
//! The pages lie in clusters of 16 all over memory (below 3 GiB); 1 MiB is
//! filled at the start and never written again.
//!
//! Before a page or block is overwritten it is checked: a loss is found, not
//! covered up. A few more are checked each tenth of a second, all of them when
//! `c` is typed. A block is read to one of 16 pages that stay for a while, a
//! page cache: they prove what the device wrote to memory. `q` typed ends the
//! guest, `t` makes it triple-fault.
//!
//! The console says every 100 ms of the guest's clock
//!
//! ```text
//! HB <n> seq=<page writes> block=<block writes> mem=ok disk=ok
//! CHECK <n> mem=ok disk=ok pages=<n> blocks=<n>
//! ```
//!
//! the second after a full check. `ok` becomes `BAD:<what>-<number>-<why>` at
//! the first fault, and stays so: the fault itself is in memory and moves along.
//!
//! # Why nothing can be lost unnoticed
//!
//! A *ledger* in memory has for every item (page, block, cache page) the
//! sequence it must have. Each vCPU keeps its last sequence N and the digest D
//! of its part of the ledger, the sum of mix(item, sequence), in registers, and
//! copies of them in memory (its *control page*), in DR0, in XMM7 and (D) in an
//! MSR. A guest goes on at the very instruction where it was cut, so nothing is
//! "in flight" for its own checks: each vCPU checks only what it alone writes,
//! and at the moment of a check every entry must be right. What is found:
//!
//! | what went wrong | who notices |
//! |---|---|
//! | a page's write was lost, or it is of an older point | its sequence is not the ledger's: `page-7-lost`, `-older` |
//! | a page was taken after the cut | `page-7-newer` |
//! | half of a page is of another instant | filler is not the header's: `page-7-torn` |
//! | a page came to another place | `page-7-swapped`, `fill-7-differs` |
//! | a page of the ledger is old | the digest made anew is not D: `ledger-0-differs`; or its pages are newer |
//! | a control page is old | N or D are not the registers': `control-0-older`, `register-0-differs` |
//! | all memory is older than the vCPUs, or newer | the same, or D against the ledger |
//! | registers set, but not MSRs, debug registers, SSE | `msr-`, `debug-`, `sse-0-differs` |
//! | the disk is older than memory, or newer | a block's sequence is not the ledger's: `block-3-older`, `-newer` |
//! | a block's write was lost or torn | `block-3-lost`, `-torn` |
//! | what a device wrote to memory was not tracked | `cache-5-older`, `-lost` |
//! | the guest's clock went back | `clock-0-older` |
//! | a vCPU does not run | `vcpu-1-silent`, 30 s after `c` |
//! | the program itself changed | `code-0-differs`, when it comes so far |
//!
//! Where memory, disk and device state all are of the same older instant, that
//! is an older point, not a fault; the heartbeat's number tells it.
//!
//! From outside, a cut shows an instant between two instructions. Before each
//! write the control page says which item goes to which value (the *intent*),
//! cleared when ledger and D are written. [`verify`] allows just that: the
//! item under way may be anything if it is in memory, whole and old or new if
//! it is a block, and only D of before or after is right.

// Machine code is named by two labels; nothing of it is called from here.
#![allow(unsafe_code)]

mod verify;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use verify::{ProofError, Read, Verified, verify};

std::arch::global_asm!(include_str!("program.s"));

// SAFETY: both are defined by `program.s`, in this order, in one section.
unsafe extern "C" {
    static farhaven_proof_start: u8;
    static farhaven_proof_end: u8;
}

/// The program, for [`boot::PROGRAM_AT`](super::boot::PROGRAM_AT).
pub fn program() -> Vec<u8> {
    let (start, end) = (
        &raw const farhaven_proof_start,
        &raw const farhaven_proof_end,
    );
    let length = (end as usize).saturating_sub(start as usize);
    // SAFETY: what lies between the labels is one initialised stretch of this
    // program's text, readable for as long as it runs.
    unsafe { std::slice::from_raw_parts(start, length) }.to_vec()
}
