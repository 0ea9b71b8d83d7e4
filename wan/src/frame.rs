//! Bytes to frames and back. `PROTOCOL.md` draws them.
//!
//! A reader takes five bytes, makes a [`Header`] of them (which refuses
//! unknown kinds and lengths over the kind's limit, so nothing is allocated for
//! a lie), then reads exactly that many bytes and decodes them with
//! [`Frame::decode`]. Payloads are opaque and never copied here.

use bytes::{BufMut, Bytes, BytesMut};

use crate::fields::Fields;
use crate::limits;
use crate::peer::Introduction;

/// Length of a frame's header: kind, then length of the body, little-endian.
pub const HEADER_BYTES: usize = 5;

/// Length of what stands before the payload in a batch frame's body: its number.
pub const BATCH_NUMBER_BYTES: usize = 8;

/// Why bytes are not a frame. The connection they came on is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A kind this version does not have.
    #[error("frame of unknown kind {0}")]
    UnknownKind(u8),
    /// The header announces more than the kind may have.
    #[error("{kind:?} frame of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Kind of the frame.
        kind: Kind,
        /// Announced length of its body.
        length: u32,
        /// Limit of that kind.
        limit: usize,
    },
    /// The body does not have the parts of its kind.
    #[error("malformed {kind:?} frame: {what}")]
    Malformed {
        /// Kind of the frame.
        kind: Kind,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A valid frame where another belongs.
    #[error("{found:?} frame where {expected} belongs")]
    Unexpected {
        /// What came.
        found: Kind,
        /// What may come there.
        expected: &'static str,
    },
}

/// The kinds of frames, with their numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Who speaks, and what it can take. First on the control stream.
    Hello = 1,
    /// What the receiver has of the sender's batches. Second on the control stream.
    Resume = 2,
    /// A message of the application. Control stream.
    Message = 3,
    /// Batches that are durable. Acknowledgement stream.
    Acknowledge = 4,
    /// A batch. Data streams.
    Batch = 5,
    /// Proof and introduction of the side that was invited. Pairing only.
    PairRequest = 6,
    /// Proof and introduction of the side that invited. Pairing only.
    PairAccept = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Resume,
            3 => Kind::Message,
            4 => Kind::Acknowledge,
            5 => Kind::Batch,
            6 => Kind::PairRequest,
            7 => Kind::PairAccept,
            _ => return None,
        })
    }

    /// Longest body of this kind.
    pub fn limit(self) -> usize {
        match self {
            Kind::Hello => limits::MAX_HELLO_BYTES,
            Kind::Resume => 4 + 2 * 16 * limits::MAX_RANGES,
            Kind::Message => limits::MAX_MESSAGE_BYTES,
            Kind::Acknowledge => 2 + 16 * limits::MAX_RANGES,
            Kind::Batch => BATCH_NUMBER_BYTES + limits::MAX_BATCH_BYTES,
            Kind::PairRequest | Kind::PairAccept => limits::MAX_PAIR_BYTES,
        }
    }
}

/// A checked header: the kind is known, the length within its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    length: u32,
}

impl Header {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// For an unknown kind, or a length over the kind's limit.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let [kind, a, b, c, d] = bytes;
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        let length = u32::from_le_bytes([a, b, c, d]);
        if length as usize > kind.limit() {
            return Err(FrameError::TooLong {
                kind,
                length,
                limit: kind.limit(),
            });
        }
        Ok(Header { kind, length })
    }

    /// The frame's kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of the body that follow.
    pub fn body_bytes(&self) -> usize {
        self.length as usize
    }
}

/// Sequence numbers as inclusive ranges, ascending and apart.
pub type Ranges = Vec<(u64, u64)>;

/// First frame of each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Protocol versions the site speaks, its preferred one first.
    pub versions: Vec<u16>,
    /// A random number of this process: another one means it restarted.
    pub incarnation: u64,
    /// Largest batch it takes.
    pub max_batch_bytes: u32,
    /// Largest message it takes.
    pub max_message_bytes: u32,
    /// The site's name.
    pub site: String,
}

/// What a receiver has of a sender's batches when a connection begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resume {
    /// Durable: acknowledged by this.
    pub durable: Ranges,
    /// Arrived, with the application: need not be sent again, not acknowledged yet.
    pub held: Ranges,
}

/// Proof of the invitation's secret, and who speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairProof {
    /// Keyed hash over both keys, the TLS session, the role and the introduction.
    pub proof: [u8; 32],
    /// Name and addresses of the speaker.
    pub introduction: Introduction,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Resume`].
    Resume(Resume),
    /// An application's message.
    Message(Bytes),
    /// Durable batches.
    Acknowledge(Ranges),
    /// A batch.
    Batch {
        /// Its number.
        seq: u64,
        /// Its payload.
        bytes: Bytes,
    },
    /// See [`PairProof`].
    PairRequest(PairProof),
    /// See [`PairProof`].
    PairAccept(PairProof),
}

impl Frame {
    /// The frame's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Frame::Hello(_) => Kind::Hello,
            Frame::Resume(_) => Kind::Resume,
            Frame::Message(_) => Kind::Message,
            Frame::Acknowledge(_) => Kind::Acknowledge,
            Frame::Batch { .. } => Kind::Batch,
            Frame::PairRequest(_) => Kind::PairRequest,
            Frame::PairAccept(_) => Kind::PairAccept,
        }
    }

    /// The error that says this frame does not belong here.
    pub fn unexpected(&self, expected: &'static str) -> FrameError {
        FrameError::Unexpected {
            found: self.kind(),
            expected,
        }
    }

    /// Header and body. Lists longer than the limits are cut by the callers
    /// that make them, never here.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        out.put_bytes(0, HEADER_BYTES);
        match self {
            Frame::Hello(hello) => {
                out.put_u8(hello.versions.len() as u8);
                for version in &hello.versions {
                    out.put_u16_le(*version);
                }
                out.put_u64_le(hello.incarnation);
                out.put_u32_le(hello.max_batch_bytes);
                out.put_u32_le(hello.max_message_bytes);
                put_text(&mut out, &hello.site);
            }
            Frame::Resume(resume) => {
                put_ranges(&mut out, &resume.durable);
                put_ranges(&mut out, &resume.held);
            }
            Frame::Message(bytes) => out.put_slice(bytes),
            Frame::Acknowledge(ranges) => put_ranges(&mut out, ranges),
            Frame::Batch { seq, bytes } => {
                out.put_u64_le(*seq);
                out.put_slice(bytes);
            }
            Frame::PairRequest(pair) | Frame::PairAccept(pair) => {
                out.put_slice(&pair.proof);
                put_introduction(&mut out, &pair.introduction);
            }
        }
        let header = header(self.kind(), out.len() - HEADER_BYTES);
        if let Some(place) = out.first_chunk_mut::<HEADER_BYTES>() {
            *place = header;
        }
        out.freeze()
    }

    /// Makes a frame of a checked header and its body.
    ///
    /// # Errors
    /// When the body is not what its kind consists of.
    pub fn decode(header: Header, body: Bytes) -> Result<Frame, FrameError> {
        let kind = header.kind();
        if body.len() != header.body_bytes() {
            return Err(FrameError::Malformed {
                kind,
                what: "its body is not as long as its header says",
            });
        }
        let mut fields = Fields::new(kind, body);
        let frame = match kind {
            Kind::Hello => {
                let count = usize::from(fields.byte()?);
                if count == 0 || count > limits::MAX_VERSIONS {
                    return Err(fields.malformed("no version, or too many"));
                }
                let versions = (0..count)
                    .map(|_| fields.array().map(u16::from_le_bytes))
                    .collect::<Result<_, _>>()?;
                Frame::Hello(Hello {
                    versions,
                    incarnation: u64::from_le_bytes(fields.array()?),
                    max_batch_bytes: u32::from_le_bytes(fields.array()?),
                    max_message_bytes: u32::from_le_bytes(fields.array()?),
                    site: fields.site_name()?,
                })
            }
            Kind::Resume => Frame::Resume(Resume {
                durable: fields.ranges()?,
                held: fields.ranges()?,
            }),
            Kind::Message => Frame::Message(fields.take_rest()),
            Kind::Acknowledge => Frame::Acknowledge(fields.ranges()?),
            Kind::Batch => Frame::Batch {
                seq: u64::from_le_bytes(fields.array()?),
                bytes: fields.take_rest(),
            },
            Kind::PairRequest | Kind::PairAccept => {
                let proof = fields.array()?;
                let introduction = fields.introduction()?;
                let pair = PairProof {
                    proof,
                    introduction,
                };
                if kind == Kind::PairRequest {
                    Frame::PairRequest(pair)
                } else {
                    Frame::PairAccept(pair)
                }
            }
        };
        fields.end()?;
        Ok(frame)
    }
}

/// Header and number of a batch; the payload follows uncopied.
pub fn batch_head(seq: u64, payload_bytes: usize) -> [u8; HEADER_BYTES + BATCH_NUMBER_BYTES] {
    let mut head = [0; HEADER_BYTES + BATCH_NUMBER_BYTES];
    let (front, back) = head.split_at_mut(HEADER_BYTES);
    front.copy_from_slice(&header(Kind::Batch, BATCH_NUMBER_BYTES + payload_bytes));
    back.copy_from_slice(&seq.to_le_bytes());
    head
}

/// A message's copy, as a DATAGRAM of QUIC carries it: its number on this connection, from
/// 0, then the message.
pub fn encode_copy(number: u64, message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(size_of::<u64>() + message.len());
    out.put_u64_le(number);
    out.put_slice(message);
    out.freeze()
}

/// Number and message of a copy.
///
/// # Errors
/// When it has no number, or is longer than a message that is copied.
pub fn decode_copy(mut copy: Bytes) -> Result<(u64, Bytes), FrameError> {
    let malformed = |what| FrameError::Malformed {
        kind: Kind::Message,
        what,
    };
    let number = copy
        .first_chunk()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .ok_or_else(|| malformed("its copy has no number"))?;
    let message = copy.split_off(size_of::<u64>());
    if message.len() > limits::MAX_COPIED_MESSAGE_BYTES {
        return Err(malformed("its copy is longer than copies are"));
    }
    Ok((number, message))
}

fn header(kind: Kind, body_bytes: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(body_bytes <= kind.limit(), "{kind:?} of {body_bytes} bytes");
    let [a, b, c, d] = (body_bytes as u32).to_le_bytes();
    [kind as u8, a, b, c, d]
}

fn put_text(out: &mut BytesMut, text: &str) {
    debug_assert!(text.len() <= usize::from(u8::MAX));
    out.put_u8(text.len() as u8);
    out.put_slice(text.as_bytes());
}

fn put_ranges(out: &mut BytesMut, ranges: &[(u64, u64)]) {
    out.put_u16_le(ranges.len() as u16);
    for (first, last) in ranges {
        out.put_u64_le(*first);
        out.put_u64_le(*last);
    }
}

/// Also what the proofs of a pairing are computed over.
pub(crate) fn put_introduction(out: &mut BytesMut, introduction: &Introduction) {
    put_text(out, introduction.site());
    out.put_u8(introduction.addresses().len() as u8);
    for address in introduction.addresses() {
        put_text(out, address);
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
