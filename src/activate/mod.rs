//! Bringing a recovery point to life: its RAM ([`warm`]), its disks ([`nbd`]),
//! its QEMU ([`launch`], [`hydrate`], put together in [`place`]), and who may
//! ([`fence`]).

pub mod failure;
pub mod fence;
pub mod hydrate;
pub mod launch;
pub mod machine;
pub mod nbd;
pub mod place;
mod process;
pub mod warm;
