//! Runbooks at work: a plan of [`farhaven_policies::runbook`] is conducted.
//!
//! The run itself is a pure state machine there. Here, [`conduct`] asks it what
//! is next, keeps each transition in an append-only [`record`] that is synced
//! before anything is done, and has [`perform::Perform`] do it. A conductor
//! that ends, however it ends, leaves a record from which the next one goes on.

pub mod conduct;
pub mod perform;
pub mod record;
pub mod report;
#[cfg(test)]
mod tests;
