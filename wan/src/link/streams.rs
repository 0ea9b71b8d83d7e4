//! Frames on QUIC streams.

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};

use crate::frame::{Frame, FrameError, HEADER_BYTES, Header};
use crate::session::{ReceiverError, SenderError};

use super::close::CloseCode;

/// Why a connection's work ends from this side. The sentence goes to the peer
/// and to the log.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// Not a frame, or not here.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A claim about batches that cannot be.
    #[error(transparent)]
    Sender(#[from] SenderError),
    /// Batches beyond what is remembered.
    #[error(transparent)]
    Receiver(#[from] ReceiverError),
    /// A stream ended inside a frame, or one that must not end did.
    #[error("a stream ended where it must not")]
    Ended,
    /// The stream's connection is gone; its own error says why.
    #[error("the connection is gone")]
    Gone,
    /// A newer connection is the link now.
    #[error("a newer connection took over")]
    Replaced,
    /// The greeting took too long.
    #[error("the greeting did not come in time")]
    Slow,
    /// More connections begin than one peer needs.
    #[error("too many connections begin at once; wait for the others to end")]
    Busy,
    /// No version in common.
    #[error("{0}")]
    Version(String),
    /// The trust ended while the connection began.
    #[error("this site ended the trust")]
    Revoked,
}

impl Fault {
    pub(crate) fn code(&self) -> CloseCode {
        match self {
            Fault::Frame(_) | Fault::Sender(_) | Fault::Receiver(_) | Fault::Ended => {
                CloseCode::Protocol
            }
            Fault::Gone => CloseCode::Bye,
            Fault::Replaced => CloseCode::Replaced,
            Fault::Slow | Fault::Busy => CloseCode::Slow,
            Fault::Version(_) => CloseCode::Version,
            Fault::Revoked => CloseCode::Revoked,
        }
    }
}

impl From<WriteError> for Fault {
    fn from(error: WriteError) -> Self {
        match error {
            // Nobody stops a stream in this protocol.
            WriteError::Stopped(_) => Fault::Ended,
            WriteError::ConnectionLost(_)
            | WriteError::ClosedStream
            | WriteError::ZeroRttRejected => Fault::Gone,
        }
    }
}

/// What a stream gave.
pub(crate) enum Read {
    /// A frame.
    Frame(Frame),
    /// The stream ended after a whole frame.
    End,
    /// The sender gave the stream up.
    Reset,
}

enum Filled {
    Whole,
    Nothing,
    Reset,
}

async fn fill(stream: &mut RecvStream, buffer: &mut [u8]) -> Result<Filled, Fault> {
    match stream.read_exact(buffer).await {
        Ok(()) => Ok(Filled::Whole),
        Err(ReadExactError::FinishedEarly(0)) => Ok(Filled::Nothing),
        Err(ReadExactError::FinishedEarly(_)) => Err(Fault::Ended),
        Err(ReadExactError::ReadError(ReadError::Reset(_))) => Ok(Filled::Reset),
        Err(ReadExactError::ReadError(_)) => Err(Fault::Gone),
    }
}

/// Reads one frame. The header is checked before the body is allocated.
pub(crate) async fn read(stream: &mut RecvStream) -> Result<Read, Fault> {
    let mut head = [0; HEADER_BYTES];
    match fill(stream, &mut head).await? {
        Filled::Whole => {}
        Filled::Nothing => return Ok(Read::End),
        Filled::Reset => return Ok(Read::Reset),
    }
    let header = Header::decode(head)?;
    let mut body = BytesMut::zeroed(header.body_bytes());
    if !body.is_empty() {
        match fill(stream, &mut body).await? {
            Filled::Whole => {}
            Filled::Nothing => return Err(Fault::Ended),
            Filled::Reset => return Ok(Read::Reset),
        }
    }
    Ok(Read::Frame(Frame::decode(header, body.freeze())?))
}

/// Reads one frame of a stream that must not end.
pub(crate) async fn read_frame(stream: &mut RecvStream) -> Result<Frame, Fault> {
    match read(stream).await? {
        Read::Frame(frame) => Ok(frame),
        Read::End | Read::Reset => Err(Fault::Ended),
    }
}

/// Writes one frame.
pub(crate) async fn write(stream: &mut SendStream, frame: &Frame) -> Result<(), Fault> {
    write_bytes(stream, frame.encode()).await
}

/// Writes encoded bytes without copying them.
pub(crate) async fn write_bytes(stream: &mut SendStream, bytes: Bytes) -> Result<(), Fault> {
    Ok(stream.write_chunk(bytes).await?)
}
