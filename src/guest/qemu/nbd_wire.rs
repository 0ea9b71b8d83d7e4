//! NBD's numbers and shapes, as far as QEMU's server is asked for them.
//! Source: the NBD project's `doc/proto.md`.

/// Longest option reply or block status reply taken.
pub(super) const MAX_REPLY: u32 = 4 << 20;
/// Most option replies to one option.
pub(super) const MAX_OPTION_REPLIES: usize = 64;
/// Largest block status request: the protocol counts in 32 bits.
pub(super) const MAX_STATUS: u64 = 2 << 30;

pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(super) const OPTION_GO: u32 = 7;
pub(super) const OPTION_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPTION_SET_META_CONTEXT: u32 = 10;
pub(super) const REPLY_ACK: u32 = 1;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const REPLY_META_CONTEXT: u32 = 4;
pub(super) const REPLY_ERROR: u32 = 1 << 31;
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const COMMAND_READ: u16 = 0;
pub(super) const COMMAND_DISCONNECT: u16 = 2;
pub(super) const COMMAND_BLOCK_STATUS: u16 = 7;
pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

/// The meta context that tells holes and zeros.
pub const ALLOCATION: &str = "base:allocation";
/// In [`ALLOCATION`]: the extent reads as zeros.
pub const READS_ZERO: u32 = 2;

/// What can go wrong while a disk is read over NBD.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket failed, or the server was silent for too long.
    #[error(
        "reading a disk from QEMU's NBD server, {during}: {source}; if the guest still runs, the next cut tries again"
    )]
    Io {
        /// What was being done.
        during: &'static str,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The server refused.
    #[error("QEMU's NBD server refused {what} (code {code}): {message}")]
    Refused {
        /// The request.
        what: String,
        /// NBD's error number.
        code: u32,
        /// The server's words.
        message: String,
    },
    /// The server does not keep to the protocol.
    #[error("the NBD server breaks the protocol: {0}; is this QEMU's socket?")]
    Protocol(&'static str),
}

/// A stretch of a disk with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The context's flags.
    pub flags: u32,
}

pub(super) struct Chunk {
    pub(super) done: bool,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) length: u32,
}

/// The first four bytes; callers have checked that there are four.
pub(super) fn be32(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .take(4)
        .fold(0, |sum, b| sum << 8 | u32::from(*b))
}

pub(super) fn text(s: &str) -> Vec<u8> {
    let mut out = (s.len() as u32).to_be_bytes().to_vec();
    out.extend(s.as_bytes());
    out
}

/// A read under way.
pub(super) struct Pending {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
    pub(super) filled: usize,
    pub(super) done: bool,
}

/// A request's bytes.
pub(super) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut message = [0; 28];
    message[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    message[6..8].copy_from_slice(&command.to_be_bytes());
    message[8..16].copy_from_slice(&cookie.to_be_bytes());
    message[16..24].copy_from_slice(&offset.to_be_bytes());
    message[24..].copy_from_slice(&length.to_be_bytes());
    message
}
