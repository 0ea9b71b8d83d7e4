//! Whole sites against faults of the source, of the link and of operators.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod input;
mod kill_run;
mod kills;
mod link;
mod store;
mod watch;
