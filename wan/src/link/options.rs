//! What an operator may set of a link, and the QUIC transport made of it.

use std::time::Duration;

use quinn::{AckFrequencyConfig, IdleTimeout, TransportConfig, VarInt};

use super::control;
use crate::limits;
use crate::rate::RateOptions;
use crate::session::AHEAD_BYTES;

/// What may be set of a link. Start from the default and change fields.
#[derive(Clone)]
pub struct LinkOptions {
    /// Batches kept unacknowledged, in bytes: at least what the peer makes
    /// durable in the time a batch and its acknowledgement need.
    pub window_bytes: u64,
    /// Bytes of batches that may wait to leave on a slow path; on a fast one as
    /// many more as keep it full.
    pub ahead_bytes: u64,
    /// Bytes QUIC keeps unacknowledged: at least twice the link's
    /// bandwidth-delay product.
    pub send_window_bytes: u64,
    /// Bytes of received batches that wait for the application. With them full,
    /// the peer is held back.
    pub receive_queue_bytes: usize,
    /// Pause after which a sign of life is sent.
    pub keep_alive: Duration,
    /// Silence after which a connection counts as cut.
    pub idle_timeout: Duration,
    /// Longest a handshake may take, from the first packet to the greeting.
    pub handshake_timeout: Duration,
    /// Generic segmentation offload: sending costs a third with it. Off for
    /// network drivers that lose its packets.
    pub segmentation_offload: bool,
    /// Short messages leave twice, in different packets, so that a lost one costs no round
    /// trip. Off: once, as with a peer that does not know of copies.
    pub message_copies: bool,
    /// Socket buffers to ask for, in bytes; the system may give less.
    pub socket_buffer_bytes: usize,
    /// Shortest and longest wait before dialling again.
    pub redial: (Duration, Duration),
    /// Cap and first guess of the rate, for our congestion controller.
    pub rate: RateOptions,
}

impl Default for LinkOptions {
    fn default() -> Self {
        LinkOptions {
            window_bytes: 16 << 20,
            ahead_bytes: AHEAD_BYTES,
            send_window_bytes: 32 << 20,
            receive_queue_bytes: 32 << 20,
            keep_alive: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(8),
            handshake_timeout: Duration::from_secs(8),
            segmentation_offload: true,
            message_copies: true,
            socket_buffer_bytes: 4 << 20,
            redial: (Duration::from_millis(200), Duration::from_secs(5)),
            rate: RateOptions::default(),
        }
    }
}

impl std::fmt::Debug for LinkOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkOptions")
            .field("window_bytes", &self.window_bytes)
            .field("ahead_bytes", &self.ahead_bytes)
            .field("send_window_bytes", &self.send_window_bytes)
            .field("receive_queue_bytes", &self.receive_queue_bytes)
            .field("keep_alive", &self.keep_alive)
            .field("idle_timeout", &self.idle_timeout)
            .field("segmentation_offload", &self.segmentation_offload)
            .field("message_copies", &self.message_copies)
            .field("socket_buffer_bytes", &self.socket_buffer_bytes)
            .finish_non_exhaustive()
    }
}

impl LinkOptions {
    /// Bytes of received batches that may wait: at least two batches, and what
    /// a semaphore can count.
    pub(crate) fn receive_permits(&self) -> usize {
        self.receive_queue_bytes
            .clamp(2 * limits::MAX_BATCH_BYTES, u32::MAX as usize)
    }

    /// The QUIC transport of these options. One configuration for both roles.
    pub(crate) fn transport(&self) -> TransportConfig {
        let mut transport = TransportConfig::default();
        transport
            // One control stream each way; the dialling side opens it.
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            // Data streams, and the acknowledgement stream.
            .max_concurrent_uni_streams(VarInt::from_u32(limits::MAX_DATA_STREAMS + 1))
            .stream_receive_window(VarInt::from_u32(limits::STREAM_RECEIVE_WINDOW))
            .receive_window(VarInt::from_u32(limits::RECEIVE_WINDOW))
            .send_window(self.send_window_bytes.max(limits::MAX_BATCH_BYTES as u64))
            // Every packet goes to the stream of highest priority: control, and then the
            // oldest batch (see `data`).
            .send_fairness(true)
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(IdleTimeout::try_from(self.idle_timeout).ok())
            .datagram_receive_buffer_size(self.message_copies.then_some(limits::COPY_BUFFER_BYTES))
            .datagram_send_buffer_size(limits::COPY_BUFFER_BYTES)
            .enable_segmentation_offload(self.segmentation_offload);
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(limits::PACKETS_AN_ACK - 1));
        transport.ack_frequency_config(Some(acks));
        transport.congestion_controller_factory(control::factory(&self.rate));
        transport
    }
}
