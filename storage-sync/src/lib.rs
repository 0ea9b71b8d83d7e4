//! Data at rest, and its encoding.
pub mod unit;
