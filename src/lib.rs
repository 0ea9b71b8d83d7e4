//! Farhaven
pub mod activate;
pub mod guest;
