//! NBD messages: bytes to values, and back. No I/O, no allocation beyond the
//! limits below, and no bytes that panic.
//!
//! Numbers and layouts are those of the NBD protocol page
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).

/// Longest data of one option: export name, context queries.
pub const LARGEST_OPTION: u32 = 16 << 10;
/// Largest read or write, as the protocol's page recommends.
pub const LARGEST_REQUEST: u32 = 32 << 20;
/// Longest name of an export, as the protocol's page says.
pub const LONGEST_NAME: usize = 4096;
/// Most context queries in one option.
const MOST_QUERIES: u32 = 64;

pub(super) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the same bits from both sides.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const LIST: u32 = 3;
    pub(in super::super) const INFO: u32 = 6;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const LIST_META_CONTEXT: u32 = 9;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
}

pub(super) mod reply {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const SERVER: u32 = 2;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    pub(in super::super) const UNSUPPORTED: u32 = 1 << 31 | 1;
    pub(in super::super) const INVALID: u32 = 1 << 31 | 3;
    pub(in super::super) const UNKNOWN: u32 = 1 << 31 | 6;
}

pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

/// What every export is: has flags, read-only, flush accepted, and several
/// connections see the same.
pub(super) const EXPORT_FLAGS: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 8;

pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISCONNECT: u16 = 2;
    pub(in super::super) const FLUSH: u16 = 3;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const CACHE: u16 = 5;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    pub(in super::super) const BLOCK_STATUS: u16 = 7;
}

/// Request flag: one chunk only; never offered, so never allowed.
pub(super) const DO_NOT_FRAGMENT: u16 = 1 << 2;
/// Request flag: one extent only.
pub(super) const ONE_EXTENT: u16 = 1 << 3;

pub(super) mod chunk {
    pub(in super::super) const DONE: u16 = 1;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const DATA: u16 = 1;
    pub(in super::super) const HOLE: u16 = 2;
    pub(in super::super) const BLOCK_STATUS: u16 = 5;
    pub(in super::super) const ERROR: u16 = 1 << 15 | 1;
}

/// Extent flags of `base:allocation`: a hole that reads as zeros.
pub(super) const HOLE_AND_ZERO: u32 = 1 | 2;
/// The one context offered.
pub(super) const ALLOCATION: &str = "base:allocation";
/// The id it has in replies.
pub(super) const ALLOCATION_ID: u32 = 1;

/// Errors that a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Errno {
    Permission = 1,
    Io = 5,
    Invalid = 22,
}

/// Length of a request.
pub(super) const REQUEST_BYTES: usize = 28;

/// A request of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// `None` where the magic is wrong: the stream has lost step.
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let mut fields = Fields(bytes);
        (fields.u32()? == REQUEST_MAGIC).then_some(())?;
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// Which export a client wants to know of or to use.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    pub(super) export: &'a str,
    pub(super) block_size: bool,
}

impl<'a> Wanted<'a> {
    /// Data of the options `INFO` and `GO`.
    pub(super) fn parse(data: &'a [u8]) -> Option<Wanted<'a>> {
        let mut fields = Fields(data);
        let export = fields.name()?;
        let count = fields.u16()?;
        let mut block_size = false;
        for _ in 0..count {
            block_size |= fields.u16()? == info::BLOCK_SIZE;
        }
        fields.end(Wanted { export, block_size })
    }
}

/// Which contexts a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery<'a> {
    pub(super) export: &'a str,
    pub(super) queries: Vec<&'a [u8]>,
}

impl<'a> ContextQuery<'a> {
    /// Data of the options `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    pub(super) fn parse(data: &'a [u8]) -> Option<ContextQuery<'a>> {
        let mut fields = Fields(data);
        let export = fields.name()?;
        let count = fields.u32().filter(|count| *count <= MOST_QUERIES)?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let length = usize::try_from(fields.u32()?).ok()?;
            queries.push(fields.take(length)?);
        }
        fields.end(ContextQuery { export, queries })
    }

    /// To be listed: no query means all, and `base:` all of its namespace.
    pub(super) fn lists_allocation(&self) -> bool {
        self.queries.is_empty()
            || self.queries.contains(&b"base:".as_slice())
            || self.sets_allocation()
    }

    /// To be set: by its full name.
    pub(super) fn sets_allocation(&self) -> bool {
        self.queries.contains(&ALLOCATION.as_bytes())
    }
}

/// A reply to an option, whole.
pub(super) fn option_reply(option: u32, kind: u32, data: &[&[u8]]) -> Vec<u8> {
    let length: usize = data.iter().map(|part| part.len()).sum();
    let mut bytes = Vec::with_capacity(20 + length);
    bytes.extend(REPLY_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(wire_length(length).to_be_bytes());
    data.iter().for_each(|part| bytes.extend(*part));
    bytes
}

/// Bytes of a chunk before its payload.
pub(super) const CHUNK_HEADER: usize = 20;

/// The head of a structured reply's chunk.
pub(super) fn chunk_header(
    flags: u16,
    kind: u16,
    cookie: u64,
    payload: usize,
) -> [u8; CHUNK_HEADER] {
    let mut bytes = [0; CHUNK_HEADER];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&wire_length(payload).to_be_bytes());
    bytes
}

/// The head of a simple reply; data follows for a read without error.
pub(super) fn simple_header(error: u32, cookie: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Lengths written by this side are bounded far below 4 GiB by the limits above.
pub(super) fn wire_length(length: usize) -> u32 {
    debug_assert!(length <= LARGEST_REQUEST as usize + 64);
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Reads big-endian fields from the front; `None` when there are too few bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(front)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    fn name(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?)
            .ok()
            .filter(|length| *length <= LONGEST_NAME)?;
        std::str::from_utf8(self.take(length)?).ok()
    }

    /// `value`, if nothing is left over.
    fn end<T>(self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wanted(export: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = Vec::new();
        data.extend((export.len() as u32).to_be_bytes());
        data.extend(export.as_bytes());
        data.extend((infos.len() as u16).to_be_bytes());
        infos
            .iter()
            .for_each(|info| data.extend(info.to_be_bytes()));
        data
    }

    fn query(export: &str, queries: &[Vec<u8>]) -> Vec<u8> {
        let mut data = wanted(export, &[]);
        data.truncate(data.len() - 2);
        data.extend((queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend((query.len() as u32).to_be_bytes());
            data.extend(query);
        }
        data
    }

    proptest! {
        #[test]
        fn what_a_client_means_is_read(export in "\\PC{0,40}", infos: Vec<u16>, queries in proptest::collection::vec(any::<Vec<u8>>(), 0..64)) {
            let data = wanted(&export, &infos);
            let block_size = infos.contains(&info::BLOCK_SIZE);
            prop_assert_eq!(Wanted::parse(&data), Some(Wanted { export: &export, block_size }));
            let data = query(&export, &queries);
            let expected = ContextQuery { export: &export, queries: queries.iter().map(Vec::as_slice).collect() };
            prop_assert_eq!(ContextQuery::parse(&data), Some(expected));
            // Cut short, or with bytes too many, it is refused.
            for end in 0..data.len() {
                prop_assert_eq!(ContextQuery::parse(&data[..end]), None);
            }
            let longer = [wanted(&export, &infos), vec![0]].concat();
            prop_assert_eq!(Wanted::parse(&longer), None);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, request: [u8; REQUEST_BYTES], small in proptest::collection::vec(0u8..4, 0..64)) {
            for bytes in [&bytes, &small] {
                let _ = (Wanted::parse(bytes), ContextQuery::parse(bytes));
            }
            prop_assert_eq!(Request::parse(&request).is_some(), request[..4] == REQUEST_MAGIC.to_be_bytes());
        }
    }

    #[test]
    fn contexts_are_matched_as_the_protocol_says() {
        let parse = |queries: &[&str]| {
            let queries: Vec<_> = queries
                .iter()
                .map(|query| query.as_bytes().to_vec())
                .collect();
            let data = query("disk", &queries);
            let query = ContextQuery::parse(&data).unwrap();
            (query.lists_allocation(), query.sets_allocation())
        };
        assert_eq!(parse(&[]), (true, false));
        assert_eq!(parse(&["base:"]), (true, false));
        assert_eq!(
            parse(&["qemu:dirty-bitmap:b", "base:allocation"]),
            (true, true)
        );
        assert_eq!(parse(&["qemu:allocation-depth"]), (false, false));
    }

    #[test]
    fn too_many_queries_are_refused() {
        assert_eq!(ContextQuery::parse(&query("", &vec![Vec::new(); 65])), None);
        assert_eq!(
            Wanted::parse(&wanted(&"n".repeat(LONGEST_NAME + 1), &[])),
            None
        );
    }
}
