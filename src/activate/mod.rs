//! A recovery point becomes a running guest: QEMU is launched on the guest's
//! definition, given the point's memory and device state, and its disks are
//! copied off the store while it runs.

pub mod failure;
pub mod hydrate;
pub mod launch;
mod process;
