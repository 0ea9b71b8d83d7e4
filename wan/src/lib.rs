//! Bytes between sites: who may talk ([`peer`]), what is said ([`frame`]),
//! what is remembered beyond one connection ([`session`]), and the QUIC link
//! that carries it ([`link`]). Payloads are opaque. `PROTOCOL.md` is the page.
//!
//! Data passes so: [`link::Peer::send_data`] hands a batch to the session's
//! sender, which keeps it; a short QUIC stream carries it; the other side's
//! receiver drops repeats and hands it to the application as a
//! [`link::PeerEvent`]; once durable there, [`link::Peer::durable`] sends the
//! acknowledgement back, and the batch is let go.

pub mod emulate;
mod fields;
pub mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod limits;
pub mod link;
pub mod pace;
pub mod peer;
pub mod rate;
pub mod session;

pub use link::{LinkOptions, LinkStatus, Node, NodeOptions, Pairing, Peer, PeerEvent};
pub use peer::{Identity, Introduction, Invitation, PeerRecord, SiteKey};

/// The name certificates carry. Peers are told apart by key; a name proves nothing.
pub(crate) const SERVER_NAME: &str = "farhaven";
