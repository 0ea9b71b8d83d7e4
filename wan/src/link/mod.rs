//! The QUIC link between sites; nothing outside this folder names quinn.
//!
//! A [`Node`] is one site's end of all its links: one UDP socket, which both
//! accepts and dials. Each trusted site is a [`Peer`]. What comes from it goes
//! connection -> streams -> frames -> the session's receiver -> events; what
//! goes to it takes the same way back.

mod close;
mod connection;
#[allow(dead_code, reason = "some of its status is for examples and tests")]
mod control;
mod data;
mod dial;
mod gate;
mod handle;
mod messages;
mod node;
mod options;
mod pair;
mod port;
mod remote;
mod reset;
mod socket;
mod status;
mod streams;
mod tls;

pub use gate::Gate;
pub use handle::{AcknowledgeError, Closed, Peer, SendDataError, SendMessageError};
pub use node::{Node, NodeOptions, Pairing, StartError};
pub use options::LinkOptions;
pub use pair::PairError;
pub use port::Port;
pub use remote::PeerEvent;
pub use socket::SocketBuffers;
pub use status::LinkStatus;

#[cfg(test)]
mod tests;
