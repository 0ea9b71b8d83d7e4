//! KVM guests whose monitor lives in this process.
//!
//! Two things are here. For any Rust VMM that owns a `VmFd`: [`KvmVmm`], which
//! makes of it a [`Vmm`](super::embedded::Vmm) that can be protected. Its vCPU
//! threads call [`VcpuGate::run`] where they called `VcpuFd::run`, its memory
//! is a [`TrackedRam`], its own devices a [`DeviceState`].
//!
//! Data goes: KVM's dirty log and the monitor's own writes ([`dirty`]) tell the
//! pages; `vcpu` and `chips` take what is not memory, [`state`] makes bytes of
//! it, and the same way back at the peer. [`facts`] and [`needs`] tell before a
//! guest is stopped whether another host can run it.
//!
//! And a small monitor of our own that uses it: [`KvmMachine`] runs a flat
//! program ([`boot`]) with a serial console, a disk and a clock at ports, and
//! [`KvmBuilder`] builds the same machine from a recovery point.

pub mod boot;
pub mod builder;
pub mod dirty;
pub mod facts;
pub mod gate;
pub mod machine;
pub mod needs;
pub mod proof;
pub mod protected;
pub mod state;

mod board;
mod chips;
mod features;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod place;
mod throttle;
mod vcpu;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

pub use builder::KvmBuilder;
pub use dirty::{TrackedMemory, TrackedRam};
pub use facts::{KvmFacts, KvmUnusable, facts};
pub use gate::{Gates, Turn, VcpuGate};
pub use machine::{KvmMachine, KvmOptions, Pace, Terminal};
pub use needs::{KvmNeeds, check};
pub use protected::{DeviceState, KvmParts, KvmVmm};

use crate::guest::embedded::VmmError;

/// A refusal of KVM, with what it was for and what to do.
fn kvm_error(call: impl Into<String>, error: kvm_ioctls::Error, advice: &str) -> VmmError {
    VmmError::Kvm {
        call: call.into(),
        why: format!("{error}; {advice}"),
    }
}
