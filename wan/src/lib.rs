//! farhaven

pub mod emulate;
