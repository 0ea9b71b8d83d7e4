//! A reader of QEMU's own NBD server: disks as they were at a cut, and the map
//! of what changed in them.
//!
//! Fixed newstyle negotiation with structured replies and block status over a
//! unix socket. Reads are pipelined: [`NbdClient::read_ranges`] keeps
//! [`DEPTH`] requests of [`REQUEST`] bytes under way and hands the data over in
//! order, so that memory stays at [`DEPTH`] × [`REQUEST`] whatever the disk.
//! Source of the protocol: the NBD project's `doc/proto.md`.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::nbd_wire::*;
pub use super::nbd_wire::{ALLOCATION, Extent, NbdError, READS_ZERO};

/// Bytes of one read request.
pub const REQUEST: u64 = 256 << 10;
/// Read requests under way at once.
pub const DEPTH: usize = 16;
/// A connection to one export.
pub struct NbdClient<S = UnixStream> {
    stream: S,
    size: u64,
    contexts: Vec<u32>,
    cookie: u64,
}

impl NbdClient<UnixStream> {
    /// Connects to `export` at `socket` and negotiates the meta `contexts`.
    /// `timeout` bounds every wait for the server.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn connect(
        socket: &Path,
        export: &str,
        contexts: &[&str],
        timeout: Duration,
    ) -> Result<Self, NbdError> {
        let failed = |source| NbdError::Io {
            during: "connecting",
            source,
        };
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        Self::negotiate(stream, export, contexts)
    }
}

impl<S: Read + Write> NbdClient<S> {
    /// Negotiates over a connected stream.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn negotiate(stream: S, export: &str, contexts: &[&str]) -> Result<Self, NbdError> {
        let mut client = Self {
            stream,
            size: 0,
            contexts: Vec::new(),
            cookie: 0,
        };
        let greeting: [u8; 18] = client.take("the greeting")?;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") {
            return Err(NbdError::Protocol("no newstyle greeting"));
        }
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if flags & 1 == 0 {
            return Err(NbdError::Protocol("not fixed newstyle"));
        }
        client.put("the greeting", &u32::from(flags & 3).to_be_bytes())?;
        client.option(
            OPTION_STRUCTURED_REPLY,
            &[],
            "structured replies",
            |_, _| Ok(()),
        )?;
        for context in contexts {
            let mut data = text(export);
            data.extend(1_u32.to_be_bytes());
            data.extend(text(context));
            let mut id = None;
            client.option(OPTION_SET_META_CONTEXT, &data, context, |kind, reply| {
                if kind == REPLY_META_CONTEXT {
                    let (number, name) = reply
                        .split_at_checked(4)
                        .ok_or(NbdError::Protocol("short context"))?;
                    if name == context.as_bytes() {
                        id = Some(be32(number));
                    }
                }
                Ok(())
            })?;
            let id = id.ok_or_else(|| NbdError::Refused {
                what: format!("meta context {context} of export {export}"),
                code: 0,
                message: "it has no such context".to_owned(),
            })?;
            client.contexts = vec![id];
        }
        let mut data = text(export);
        data.extend(0_u16.to_be_bytes());
        let mut size = None;
        client.option(OPTION_GO, &data, export, |kind, reply| {
            if kind == REPLY_INFO
                && let Some((what, rest)) = reply.split_first_chunk::<2>()
                && u16::from_be_bytes(*what) == INFO_EXPORT
            {
                let (bytes, _) = rest
                    .split_first_chunk::<8>()
                    .ok_or(NbdError::Protocol("short export info"))?;
                size = Some(u64::from_be_bytes(*bytes));
            }
            Ok(())
        })?;
        client.size = size.ok_or(NbdError::Protocol("no size told"))?;
        if client.size > i64::MAX as u64 {
            return Err(NbdError::Protocol("an impossible size"));
        }
        Ok(client)
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The status of `range` in the one meta context that was negotiated:
    /// adjoining extents that cover it exactly.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub fn extents(&mut self, range: Range<u64>) -> Result<Vec<Extent>, NbdError> {
        let context = *self
            .contexts
            .first()
            .ok_or(NbdError::Protocol("no context negotiated"))?;
        let end = range.end.min(self.size);
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start;
        while at < end {
            let length = (end - at).min(MAX_STATUS);
            let cookie = self.request(COMMAND_BLOCK_STATUS, at, length)?;
            let mut told = at;
            loop {
                let chunk = self.chunk()?;
                if chunk.cookie != cookie {
                    return Err(NbdError::Protocol("a reply to no request"));
                }
                match chunk.kind {
                    CHUNK_STATUS => {
                        let data = self.bytes(chunk.length, "block status")?;
                        let (number, rest) = data
                            .split_at_checked(4)
                            .ok_or(NbdError::Protocol("short status"))?;
                        if be32(number) != context || rest.len() % 8 != 0 {
                            return Err(NbdError::Protocol("status of another context"));
                        }
                        for pair in rest.chunks_exact(8) {
                            // The last extent may reach beyond what was asked.
                            let length = u64::from(be32(&pair[..4])).min(end - told);
                            let flags = be32(&pair[4..]);
                            match extents.last_mut() {
                                Some(last) if last.flags == flags => last.length += length,
                                _ if length == 0 => {}
                                _ => extents.push(Extent {
                                    offset: told,
                                    length,
                                    flags,
                                }),
                            }
                            told += length;
                        }
                    }
                    CHUNK_NONE if chunk.length == 0 => {}
                    kind if kind & CHUNK_ERROR != 0 => {
                        return Err(self.error_chunk("block status", chunk.length));
                    }
                    _ => return Err(NbdError::Protocol("an unfitting reply to block status")),
                }
                if chunk.done {
                    break;
                }
            }
            if told == at {
                return Err(NbdError::Protocol("a block status that tells nothing"));
            }
            at = told;
        }
        Ok(extents)
    }

    /// Reads `ranges` (within the export, ascending) and hands the bytes over
    /// in order, at most [`REQUEST`] at a time. An error of `take` ends it and
    /// the connection must not be used again.
    ///
    /// # Errors
    /// [`NbdError`] as `E`, or what `take` returned.
    pub fn read_ranges<E: From<NbdError>>(
        &mut self,
        ranges: impl IntoIterator<Item = Range<u64>>,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let size = self.size;
        let mut requests = ranges.into_iter().flat_map(|range| {
            let end = range.end.min(size);
            let pieces = end.saturating_sub(range.start).div_ceil(REQUEST);
            (0..pieces).map(move |piece| {
                let start = range.start + piece * REQUEST;
                start..(start + REQUEST).min(end)
            })
        });
        let mut pending: VecDeque<Pending> = VecDeque::with_capacity(DEPTH);
        let mut spare: Vec<Vec<u8>> = Vec::new();
        loop {
            while pending.len() < DEPTH
                && let Some(range) = requests.next()
            {
                let length = range.end - range.start;
                let cookie = self.request(COMMAND_READ, range.start, length)?;
                let mut data = spare.pop().unwrap_or_default();
                data.resize(length as usize, 0);
                pending.push_back(Pending {
                    cookie,
                    offset: range.start,
                    data,
                    filled: 0,
                    done: false,
                });
            }
            if pending.is_empty() {
                return Ok(());
            }
            self.receive(&mut pending)?;
            while pending.front().is_some_and(|p| p.done)
                && let Some(first) = pending.pop_front()
            {
                take(first.offset, &first.data)?;
                spare.push(first.data);
            }
        }
    }

    /// Takes one chunk of a read reply into the request it answers.
    fn receive(&mut self, pending: &mut VecDeque<Pending>) -> Result<(), NbdError> {
        let chunk = self.chunk()?;
        let request = pending
            .iter_mut()
            .find(|p| p.cookie == chunk.cookie && !p.done)
            .ok_or(NbdError::Protocol("a reply to no request"))?;
        match chunk.kind {
            CHUNK_DATA | CHUNK_HOLE => {
                let rest = chunk
                    .length
                    .checked_sub(8)
                    .ok_or(NbdError::Protocol("a short data chunk"))?;
                let offset = u64::from_be_bytes(self.take("a reply's offset")?);
                let length = match chunk.kind {
                    CHUNK_DATA => rest,
                    _ if rest == 4 => u32::from_be_bytes(self.take("a hole's length")?),
                    _ => return Err(NbdError::Protocol("a hole of odd length")),
                } as usize;
                // QEMU tells the parts of a read in ascending order; holding it
                // to that proves that each byte came once.
                if offset != request.offset + request.filled as u64 {
                    return Err(NbdError::Protocol("data out of order"));
                }
                let part = request
                    .data
                    .get_mut(request.filled..request.filled.saturating_add(length))
                    .ok_or(NbdError::Protocol("more data than asked for"))?;
                if chunk.kind == CHUNK_DATA {
                    self.stream
                        .read_exact(part)
                        .map_err(|source| NbdError::Io {
                            during: "reading",
                            source,
                        })?;
                } else {
                    part.fill(0);
                }
                request.filled += length;
            }
            CHUNK_NONE if chunk.length == 0 => {}
            kind if kind & CHUNK_ERROR != 0 => return Err(self.error_chunk("a read", chunk.length)),
            _ => return Err(NbdError::Protocol("an unfitting reply to a read")),
        }
        if chunk.done {
            if request.filled != request.data.len() {
                return Err(NbdError::Protocol("a read was answered in part"));
            }
            request.done = true;
        }
        Ok(())
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        what: &str,
        mut reply: impl FnMut(u32, &[u8]) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.put("negotiating", &message)?;
        for _ in 0..MAX_OPTION_REPLIES {
            let header: [u8; 20] = self.take("negotiating")?;
            let (magic, rest) = header.split_at(8);
            if magic != OPTION_REPLY_MAGIC.to_be_bytes() || be32(rest) != option {
                return Err(NbdError::Protocol("an unfitting option reply"));
            }
            let kind = be32(&rest[4..]);
            let data = self.bytes(be32(&rest[8..]), "negotiating")?;
            if kind & REPLY_ERROR != 0 {
                return Err(NbdError::Refused {
                    what: what.to_owned(),
                    code: kind & !REPLY_ERROR,
                    message: String::from_utf8_lossy(&data).into_owned(),
                });
            }
            if kind == REPLY_ACK {
                return Ok(());
            }
            reply(kind, &data)?;
        }
        Err(NbdError::Protocol("endless option replies"))
    }

    fn request(&mut self, command: u16, offset: u64, length: u64) -> Result<u64, NbdError> {
        self.cookie += 1;
        let length =
            u32::try_from(length).map_err(|_| NbdError::Protocol("a request of 4 GiB or more"))?;
        let message = request(command, self.cookie, offset, length);
        self.put("asking", &message)?;
        Ok(self.cookie)
    }

    fn chunk(&mut self) -> Result<Chunk, NbdError> {
        let header: [u8; 20] = self.take("waiting for a reply")?;
        if be32(&header) != STRUCTURED_REPLY_MAGIC {
            return Err(NbdError::Protocol("no structured reply"));
        }
        let (cookie, rest) = header[8..].split_at(8);
        Ok(Chunk {
            done: u16::from_be_bytes([header[4], header[5]]) & CHUNK_DONE != 0,
            kind: u16::from_be_bytes([header[6], header[7]]),
            cookie: cookie.iter().fold(0, |sum, b| sum << 8 | u64::from(*b)),
            length: be32(rest),
        })
    }

    fn error_chunk(&mut self, what: &str, length: u32) -> NbdError {
        let data = match self.bytes(length, "an error") {
            Ok(data) => data,
            Err(error) => return error,
        };
        match data.split_at_checked(6) {
            Some((code, message)) => NbdError::Refused {
                what: what.to_owned(),
                code: be32(code),
                message: String::from_utf8_lossy(message).into_owned(),
            },
            None => NbdError::Protocol("a short error"),
        }
    }

    fn bytes(&mut self, length: u32, during: &'static str) -> Result<Vec<u8>, NbdError> {
        if length > MAX_REPLY {
            return Err(NbdError::Protocol("a reply longer than 4 MiB"));
        }
        let mut data = vec![0; length as usize];
        self.stream
            .read_exact(&mut data)
            .map_err(|source| NbdError::Io { during, source })?;
        Ok(data)
    }

    fn take<const N: usize>(&mut self, during: &'static str) -> Result<[u8; N], NbdError> {
        let mut data = [0; N];
        self.stream
            .read_exact(&mut data)
            .map_err(|source| NbdError::Io { during, source })?;
        Ok(data)
    }

    fn put(&mut self, during: &'static str, data: &[u8]) -> Result<(), NbdError> {
        self.stream
            .write_all(data)
            .map_err(|source| NbdError::Io { during, source })
    }

    /// Says goodbye; the server frees the export at once.
    pub fn disconnect(mut self) {
        let _ = self.request(COMMAND_DISCONNECT, 0, 0);
    }
}

#[cfg(test)]
#[path = "nbd_client_tests.rs"]
mod tests;
