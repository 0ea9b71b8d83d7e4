//! How fast data may leave: a cap in bits a second, and shares of it between flows.
//!
//! A flow is a guest, or whatever else competes for the link. It has a weight, a cap of its
//! own perhaps, and a lane: the way to one peer, which may have no room for a while. Flows
//! ask to send so many bytes; [`Pace`] says whose turn it is, or how long to wait. Time is
//! an argument there; [`Shares`] is the same for tasks that wait, and what
//! [`crate::Peer::send_in_turn`] goes through.
//!
//! - A **cap** is a token bucket ([`TokenBucket`]) that may be overdrawn by one request, so
//!   that requests of any size pass and the mean is exact.
//! - **Shares** are by virtual time: each request advances its flow's time by its bytes over
//!   the flow's weight, and the flow that is furthest behind goes next. So flows that wait
//!   get bytes in proportion to their weights whatever the sizes of their requests, a flow
//!   never waits for more than one request of each other one, and one that was idle, or
//!   held back by its own cap, has saved nothing up.
//! - A flow of weight 0 goes when no other can.
//! - It is decided as late as can be: when the link has room, not when somebody asks.

mod bucket;
mod shares;
mod turns;

pub use bucket::TokenBucket;
pub use shares::{Door, Flow, Passed, Shares};
pub use turns::{Next, Pace, PaceError, Rank, Ticket};

/// The largest single request, which also bounds by how much the bucket is overdrawn.
pub const REQUEST_LIMIT: u64 = 16 << 20;
/// Flows that one [`Pace`] tells apart.
pub const FLOW_LIMIT: usize = 4_096;
/// Requests that one flow may have waiting.
pub const BACKLOG_LIMIT: usize = 1_024;
/// The largest weight of a flow.
pub const WEIGHT_LIMIT: u32 = 1_000;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
