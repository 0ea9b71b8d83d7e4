//! KVM guests whose monitor lives in this process.

#[cfg(target_arch = "x86_64")]
pub mod proof;
