//! Farhaven
pub mod guest;
