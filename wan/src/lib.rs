//! farhaven

pub mod emulate;
mod link;
pub mod pace;
pub mod rate;
