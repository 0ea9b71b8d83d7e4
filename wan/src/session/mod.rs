//! What a link remembers beyond one connection: which batches are on their
//! way, which are durable at the peer, which must be sent again.
//!
//! No sockets and no clock. A batch is submitted to a [`Sender`], leaves with
//! [`Sender::next`] when a stream is free for it, and stays until the peer
//! acknowledges it. The peer's [`Receiver`] says whether a batch that arrived
//! is new, is told what became durable, and hands out acknowledgements. When a
//! connection begins, the receiver tells what it has ([`Receiver::resume`]),
//! so that nothing which arrived is sent a second time; a restart of either
//! process begins with another incarnation, and with nothing remembered but
//! what the receiver's disk holds ([`Receiver::stored`]).

mod inbox;
mod queue;
mod ranges;
mod receiver;
mod sender;

#[cfg(test)]
mod tests;

pub use inbox::Inbox;
pub use queue::{AHEAD_BYTES, queue_bytes};
pub use ranges::RangeSet;
pub use receiver::{Arrival, Receiver, ReceiverError};
pub use sender::{Acknowledgements, Outgoing, Sender, SenderError, SubmitError};
