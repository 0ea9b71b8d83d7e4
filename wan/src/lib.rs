//! farhaven

pub mod emulate;
mod link;
pub mod rate;
