//! What tries to break a store: shared by `tests/torture`, `examples/torture.rs` and
//! `examples/soak.rs`.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

pub mod check;
pub mod cuts;
pub mod faults;
pub mod flips;
pub mod races;
pub mod rows;
pub mod sites;
pub mod soak;
pub mod trial;
