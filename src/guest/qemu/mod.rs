//! QEMU guests, attached through their QMP socket.

pub mod check;
pub mod definition;
pub mod facts;
pub mod instantiate;
pub mod options;
pub mod peer;
pub mod qmp;
mod template;
mod unfit;
