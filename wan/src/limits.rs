//! Every limit of the wire, named once. Whatever a peer sends is checked
//! against these before anything is allocated for it.

/// Largest batch, and so the most a data stream carries before it ends: QUIC
/// closes the whole connection when one stream has more than about a thousand gaps.
pub const MAX_BATCH_BYTES: usize = 1 << 20;

/// Largest control message of the application.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Most bytes of batches one data stream carries: small batches share a
/// stream, a stream ends before it grows past this.
pub const MAX_STREAM_BYTES: usize = MAX_BATCH_BYTES + 64;

/// Longest message that is sent a second time as a copy: with its number and QUIC's own
/// bytes it fits a packet of any path.
pub const MAX_COPIED_MESSAGE_BYTES: usize = 1024;

/// Copies that wait to leave. Messages in greater haste are sent once.
pub const MAX_COPIES_WAITING: usize = 8;

/// Copies a receiver keeps while an earlier message is missing.
pub const MAX_EARLY_MESSAGES: u64 = 32;

/// Bytes of copies QUIC keeps for either side; beyond them the oldest are dropped.
pub const COPY_BUFFER_BYTES: usize = 64 << 10;

/// Data streams a peer may have open at once.
pub const MAX_DATA_STREAMS: u32 = 64;

/// Bytes in flight one stream may hold unread. Far above a usual batch (64
/// units of 4 KiB), so that a batch needs no second round trip.
pub const STREAM_RECEIVE_WINDOW: u32 = 512 << 10;

/// Bytes in flight a connection may hold unread: every data stream full, and
/// the control and acknowledgement streams beside them. Anything less could
/// let unread streams starve the one that is being read.
pub const RECEIVE_WINDOW: u32 = (MAX_DATA_STREAMS + 4) * STREAM_RECEIVE_WINDOW;

/// Sequence number ranges in one frame.
pub const MAX_RANGES: usize = 1024;

/// Ranges of numbers a side remembers, the highest ones. Numbers are dense but
/// for attempts that were given up.
pub const MAX_REMEMBERED_RANGES: usize = 65_536;

/// Batches a sender keeps unacknowledged, whatever their size.
pub const MAX_UNACKNOWLEDGED_BATCHES: usize = 16_384;

/// Batches a receiver lets one peer have undecided: twice what an honest sender keeps.
pub const MAX_IN_HAND_BATCHES: usize = 2 * MAX_UNACKNOWLEDGED_BATCHES;

/// Longest site name, in bytes.
pub const MAX_SITE_NAME_BYTES: usize = 64;

/// Longest address, `host:port`, in bytes.
pub const MAX_ADDRESS_BYTES: usize = 255;

/// Addresses of one site.
pub const MAX_ADDRESSES: usize = 16;

/// Protocol versions named in one HELLO.
pub const MAX_VERSIONS: usize = 16;

/// Longest HELLO body.
pub const MAX_HELLO_BYTES: usize = 512;

/// Longest body of a pairing frame.
pub const MAX_PAIR_BYTES: usize = 8 << 10;

/// Longest invitation, as pasted.
pub const MAX_TOKEN_CHARACTERS: usize = 16 << 10;

/// Invitations open at once.
pub const MAX_OPEN_INVITATIONS: usize = 16;

/// Failed proofs after which every open invitation is cancelled.
pub const MAX_PAIRING_FAILURES: u32 = 5;

/// Incoming connections that may be in their handshake at once.
pub const MAX_HANDSHAKES: usize = 64;

/// Connections of one trusted site that may be in their greeting at once.
pub const MAX_GREETINGS: usize = 8;

/// Handshakes under way from which on a source address must prove itself first.
pub const HANDSHAKES_BEFORE_RETRY: usize = 16;

/// Bytes of control messages that wait for the application.
pub const MESSAGE_QUEUE_BYTES: usize = 8 << 20;

/// Connection notices that wait for the application.
pub const NOTICE_QUEUE: usize = 64;

/// Control messages that wait to be written.
pub const OUTGOING_MESSAGES: usize = 16;

const _: () = assert!(MAX_BATCH_BYTES < MAX_STREAM_BYTES);
const _: () = assert!(MAX_MESSAGE_BYTES <= MESSAGE_QUEUE_BYTES);
const _: () = assert!(
    MAX_EARLY_MESSAGES as usize * MAX_COPIED_MESSAGE_BYTES <= MESSAGE_QUEUE_BYTES
        && MAX_COPIED_MESSAGE_BYTES * 2 < COPY_BUFFER_BYTES
);
const _: () = assert!(MAX_HELLO_BYTES > MAX_SITE_NAME_BYTES + 2 * MAX_VERSIONS + 32);
const _: () =
    assert!(MAX_PAIR_BYTES > MAX_ADDRESSES * (MAX_ADDRESS_BYTES + 2) + MAX_SITE_NAME_BYTES + 64);

/// Packets that one acknowledgement of QUIC's is for, where they come fast: more of them
/// cost the way back 2 % of what goes there.
pub const PACKETS_AN_ACK: u32 = 8;
