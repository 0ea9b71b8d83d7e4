//! Activation: a recovery point becomes a running guest at the peer.

pub mod nbd;
