//! QEMU guests, attached through their QMP socket.

pub mod qmp;
