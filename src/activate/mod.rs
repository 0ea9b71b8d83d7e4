//! Bringing a recovery point to life: its RAM ([`warm`]), its disks ([`nbd`]),
//! its QEMU ([`launch`], put together in [`place`]), and who may ([`fence`]).

pub mod fence;
pub mod launch;
pub mod nbd;
pub mod place;
pub mod warm;
