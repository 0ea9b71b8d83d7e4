//! What a link measured: QUIC's own counters, added up over reconnects.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::control;
use super::remote::State;
use crate::rate::RateStatus;

/// Counters of the connections of a link that ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    udp_tx_bytes: u64,
    udp_rx_bytes: u64,
    sent_packets: u64,
    lost_packets: u64,
    connections: u64,
}

impl Totals {
    /// Adds what a connection counted.
    pub(crate) fn add(&mut self, stats: &quinn::ConnectionStats) {
        self.udp_tx_bytes += stats.udp_tx.bytes;
        self.udp_rx_bytes += stats.udp_rx.bytes;
        self.sent_packets += stats.path.sent_packets;
        self.lost_packets += stats.path.lost_packets;
        self.connections += 1;
    }
}

/// What a link measured, now. Counters run over the life of the
/// [`super::Peer`], reconnects included.
#[derive(Debug, Clone, Default)]
pub struct LinkStatus {
    /// Whether a connection is up.
    pub connected: bool,
    /// Since when it is.
    pub since: Option<Instant>,
    /// Address of the peer on this connection.
    pub remote_address: Option<SocketAddr>,
    /// Round-trip time, smoothed.
    pub rtt: Option<Duration>,
    /// Congestion window, bytes.
    pub congestion_window_bytes: Option<u64>,
    /// What the congestion controller knows of the path.
    pub path: Option<RateStatus>,
    /// UDP payload that fits the path, bytes.
    pub mtu: Option<u16>,
    /// UDP payload bytes sent.
    pub udp_tx_bytes: u64,
    /// UDP payload bytes received.
    pub udp_rx_bytes: u64,
    /// QUIC packets sent.
    pub sent_packets: u64,
    /// Of them, lost.
    pub lost_packets: u64,
    /// Connections made.
    pub connections: u64,
    /// Batch bytes that wait for acknowledgement.
    pub unacknowledged_bytes: u64,
    /// Batches that wait for acknowledgement.
    pub unacknowledged_batches: usize,
    /// Batch bytes put on streams, repeats included.
    pub data_sent_bytes: u64,
    /// Batch bytes put on streams once more, after a lost connection.
    pub data_requeued_bytes: u64,
    /// Of these, bytes of batches that had wholly arrived before.
    pub data_resent_bytes: u64,
    /// Batch bytes that came from the peer although they were here.
    pub data_repeated_bytes: u64,
    /// Batch bytes that wait to leave, or are on the wire.
    pub queued_bytes: u64,
    /// As many may be, as the path is now.
    pub queue_bytes: u64,
    /// Messages of the peer that a copy brought before the stream did.
    pub messages_by_copy: u64,
    /// When the peer was last heard of.
    pub last_heard: Option<Instant>,
    /// Why the last connection, or attempt at one, ended.
    pub why_last_disconnect: Option<String>,
}

impl LinkStatus {
    pub(crate) fn of(state: &State) -> LinkStatus {
        let waiting = state.sender.acknowledgements();
        let mut totals = state.totals;
        let live = state.live.as_ref();
        let stats = live.map(|live| live.connection.stats());
        if let Some(stats) = &stats {
            totals.add(stats);
        }
        LinkStatus {
            connected: live.is_some(),
            since: live.map(|live| live.since),
            remote_address: live.map(|live| live.connection.remote_address()),
            rtt: stats.map(|stats| stats.path.rtt),
            congestion_window_bytes: stats.map(|stats| stats.path.cwnd),
            path: live.and_then(|live| control::status(live.connection.congestion_state())),
            mtu: stats.map(|stats| stats.path.current_mtu),
            udp_tx_bytes: totals.udp_tx_bytes,
            udp_rx_bytes: totals.udp_rx_bytes,
            sent_packets: totals.sent_packets,
            lost_packets: totals.lost_packets,
            connections: totals.connections,
            unacknowledged_bytes: waiting.unacknowledged_bytes,
            unacknowledged_batches: waiting.unacknowledged_batches,
            data_sent_bytes: state.sender.sent_bytes(),
            data_requeued_bytes: state.sender.requeued_bytes(),
            data_resent_bytes: state.sender.resent_bytes(),
            data_repeated_bytes: state.receiver.repeated_bytes(),
            queued_bytes: state.sender.queued_bytes(),
            queue_bytes: state.sender.queue_bytes(),
            messages_by_copy: state.messages_by_copy,
            last_heard: state.last_heard,
            why_last_disconnect: state.why_last_disconnect.clone(),
        }
    }
}
