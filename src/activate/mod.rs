//! Bringing a recovery point to life: its RAM ([`warm`]), its disks ([`nbd`]),
//! its machine ([`machine`]: a QEMU by [`launch`] and [`hydrate`], or what a
//! builder of embedded guests makes; put together in [`place`]), and who may
//! ([`fence`]).

pub mod failure;
pub mod fence;
pub mod hydrate;
pub mod launch;
pub mod machine;
pub mod nbd;
pub mod place;
pub(crate) mod point;
mod process;
mod qemu;
pub mod warm;
