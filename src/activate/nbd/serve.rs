//! The second phase of an NBD connection: requests and replies.
//!
//! One task reads requests; each that needs the source gets a task of its own
//! (at most [`IN_FLIGHT`]), which reads a piece at a time on a blocking thread
//! and writes it. A reply is never held in memory whole, so a connection's
//! memory is bounded by pieces times requests in flight.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::handshake::{Agreed, broken};
use super::wire::{self, Errno, Request, chunk, command};
use super::{BlockSource, Export};

/// Requests of one connection that are worked on at the same time.
pub const IN_FLIGHT: usize = 8;
/// Bytes that are read and sent in one go.
pub const PIECE: usize = 256 << 10;
/// Most extents in one reply: the client asks again for the rest.
const MOST_EXTENTS: usize = 2048;
/// Extents are asked of the source for so many bytes at a time, which bounds their number.
const EXTENT_WINDOW: u64 = 64 << 20;

/// Serves requests until the client says goodbye or goes away.
pub(super) async fn serve(stream: UnixStream, agreed: Agreed) -> io::Result<()> {
    let (mut reader, writer) = stream.into_split();
    let connection = Arc::new(Connection {
        agreed,
        writer: Mutex::new(writer),
    });
    let mut tasks = JoinSet::new();
    loop {
        let mut bytes = [0; wire::REQUEST_BYTES];
        let mut reading = std::pin::pin!(reader.read_exact(&mut bytes));
        let read = loop {
            tokio::select! {
                read = &mut reading => break read,
                Some(done) = tasks.join_next() => ended(done)?,
            }
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let request =
            Request::parse(&bytes).ok_or_else(|| broken("something else than a request"))?;
        let within = request
            .offset
            .checked_add(u64::from(request.length))
            .is_some_and(|end| end <= connection.agreed.export.size);
        let small = request.length <= wire::LARGEST_REQUEST;
        match request.command {
            command::DISCONNECT => return Ok(()),
            command::READ if within && small && request.flags & wire::DO_NOT_FRAGMENT == 0 => {}
            command::BLOCK_STATUS
                if within && request.length > 0 && connection.agreed.allocation => {}
            command::FLUSH => {
                connection.done(&request).await?;
                continue;
            }
            command::CACHE if within => {
                connection.done(&request).await?;
                continue;
            }
            command::WRITE => {
                // Its data follows, whatever the answer.
                if !small {
                    return Err(broken("a write that is too long"));
                }
                discard(&mut reader, request.length).await?;
                connection
                    .fail(&request, Errno::Permission, "this export is read-only")
                    .await?;
                continue;
            }
            command::TRIM | command::WRITE_ZEROES => {
                connection
                    .fail(&request, Errno::Permission, "this export is read-only")
                    .await?;
                continue;
            }
            _ => {
                connection
                    .fail(&request, Errno::Invalid, "unknown command, flag or range")
                    .await?;
                continue;
            }
        }
        while tasks.len() >= IN_FLIGHT {
            if let Some(done) = tasks.join_next().await {
                ended(done)?;
            }
        }
        let connection = connection.clone();
        tasks.spawn(async move {
            match request.command {
                command::READ => connection.read(&request).await,
                _ => connection.block_status(&request).await,
            }
        });
    }
}

/// A request's task has ended; an error there means that the connection cannot go on.
fn ended(done: Result<io::Result<()>, tokio::task::JoinError>) -> io::Result<()> {
    done.map_err(io::Error::other)?
}

async fn discard(reader: &mut OwnedReadHalf, length: u32) -> io::Result<()> {
    let copied =
        tokio::io::copy(&mut reader.take(u64::from(length)), &mut tokio::io::sink()).await?;
    if copied < u64::from(length) {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(())
    }
}

struct Connection {
    agreed: Agreed,
    writer: Mutex<OwnedWriteHalf>,
}

impl Connection {
    async fn done(&self, request: &Request) -> io::Result<()> {
        let bytes = if self.agreed.structured {
            wire::chunk_header(chunk::DONE, chunk::NONE, request.cookie, 0).to_vec()
        } else {
            wire::simple_header(0, request.cookie).to_vec()
        };
        self.write(&bytes).await
    }

    async fn fail(&self, request: &Request, error: Errno, message: &str) -> io::Result<()> {
        let bytes = if self.agreed.structured {
            let length = u16::try_from(message.len()).unwrap_or(0);
            let message = &message.as_bytes()[..usize::from(length)];
            let mut bytes =
                wire::chunk_header(chunk::DONE, chunk::ERROR, request.cookie, 6 + message.len())
                    .to_vec();
            bytes.extend((error as u32).to_be_bytes());
            bytes.extend(length.to_be_bytes());
            bytes.extend(message);
            bytes
        } else {
            wire::simple_header(error as u32, request.cookie).to_vec()
        };
        self.write(&bytes).await
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.writer.lock().await.write_all(bytes).await
    }

    /// The source failed: the log says why, the client that it failed.
    async fn source_failed(&self, request: &Request, error: &io::Error) -> io::Result<()> {
        tracing::error!(
            export = self.agreed.name,
            offset = request.offset,
            length = request.length,
            %error,
            "a recovery point cannot be read; the guest's disk gets an I/O error"
        );
        self.fail(request, Errno::Io, "the recovery point cannot be read")
            .await
    }

    async fn read(&self, request: &Request) -> io::Result<()> {
        let all = request.offset..request.offset + u64::from(request.length);
        let mut reading = Reading::new(self.agreed.export.source(), all, self.agreed.structured);
        if request.length == 0 {
            return self.done(request).await;
        }
        if self.agreed.structured {
            self.read_in_chunks(request, reading).await
        } else {
            let first;
            (reading, first) = reading.next().await;
            match first {
                Ok(first) => self.read_simply(request, reading, first).await,
                Err(error) => self.source_failed(request, &error).await,
            }
        }
    }

    /// Chunks of several replies may be mixed, so the writer is free between them.
    async fn read_in_chunks(&self, request: &Request, mut reading: Reading) -> io::Result<()> {
        loop {
            let piece;
            (reading, piece) = reading.next().await;
            let flags = if reading.left.is_empty() {
                chunk::DONE
            } else {
                0
            };
            match piece {
                Ok(Piece::Zeros(range)) => {
                    let mut bytes =
                        wire::chunk_header(flags, chunk::HOLE, request.cookie, 12).to_vec();
                    bytes.extend(range.start.to_be_bytes());
                    // Within one request, so under 4 GiB.
                    bytes.extend(((range.end - range.start) as u32).to_be_bytes());
                    self.write(&bytes).await?;
                }
                Ok(Piece::Data { at, mut bytes }) => {
                    let payload = bytes.len() - wire::CHUNK_HEADER;
                    let header = wire::chunk_header(flags, chunk::DATA, request.cookie, payload);
                    bytes[..wire::CHUNK_HEADER].copy_from_slice(&header);
                    bytes[wire::CHUNK_HEADER..DATA_AT].copy_from_slice(&at.to_be_bytes());
                    self.write(&bytes).await?;
                }
                Err(error) => return self.source_failed(request, &error).await,
            }
            if flags == chunk::DONE {
                return Ok(());
            }
        }
    }

    /// A simple reply is one piece of the stream. After its head has gone out
    /// an error cannot be told any more, except by ending the connection.
    async fn read_simply(
        &self,
        request: &Request,
        mut reading: Reading,
        first: Piece,
    ) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer
            .write_all(&wire::simple_header(0, request.cookie))
            .await?;
        let mut piece = first;
        loop {
            match &piece {
                Piece::Data { bytes, .. } => writer.write_all(&bytes[DATA_AT..]).await?,
                Piece::Zeros(_) => return Err(io::Error::other("a simple reply has no holes")),
            }
            if reading.left.is_empty() {
                return Ok(());
            }
            let next;
            (reading, next) = reading.next().await;
            piece = next.map_err(|error| {
                tracing::error!(export = self.agreed.name, offset = request.offset, length = request.length, %error,
                    "a recovery point cannot be read; the connection is ended");
                error
            })?;
        }
    }

    async fn block_status(&self, request: &Request) -> io::Result<()> {
        let source = self.agreed.export.source();
        let range = request.offset..request.offset + u64::from(request.length);
        let most = if request.flags & wire::ONE_EXTENT != 0 {
            1
        } else {
            MOST_EXTENTS
        };
        let extents = tokio::task::spawn_blocking(move || extents(&*source, range, most)).await;
        let extents = match extents {
            Ok(extents) => extents,
            Err(error) => return self.source_failed(request, &io::Error::other(error)).await,
        };
        let mut bytes = Vec::with_capacity(wire::CHUNK_HEADER + 4 + 8 * extents.len());
        let payload = 4 + 8 * extents.len();
        bytes.extend(wire::chunk_header(
            chunk::DONE,
            chunk::BLOCK_STATUS,
            request.cookie,
            payload,
        ));
        bytes.extend(wire::ALLOCATION_ID.to_be_bytes());
        for (length, zero) in extents {
            // The request's length is 32 bits, so each part of it is.
            bytes.extend((length as u32).to_be_bytes());
            bytes.extend((if zero { wire::HOLE_AND_ZERO } else { 0 }).to_be_bytes());
        }
        self.write(&bytes).await
    }
}

/// Where data begins in a piece: a chunk's head and the offset go before it.
const DATA_AT: usize = wire::CHUNK_HEADER + 8;

/// Part of a read's answer.
enum Piece {
    Zeros(Range<u64>),
    /// Data from [`DATA_AT`] on.
    Data {
        at: u64,
        bytes: Vec<u8>,
    },
}

/// A read that goes piece by piece, each on a blocking thread.
struct Reading {
    source: Arc<dyn BlockSource>,
    left: Range<u64>,
    /// Extents from `left.start` on, last first; not yet asked for while `None`.
    extents: Option<Vec<(u64, bool)>>,
}

impl Reading {
    fn new(source: Arc<dyn BlockSource>, all: Range<u64>, holes: bool) -> Reading {
        let extents = if holes {
            None
        } else {
            Some(vec![(all.end - all.start, false)])
        };
        Reading {
            source,
            left: all,
            extents,
        }
    }

    /// The next piece; `left` is then what comes after it.
    async fn next(self) -> (Reading, io::Result<Piece>) {
        let gone = || Reading {
            source: Arc::new(Gone),
            left: 0..0,
            extents: None,
        };
        match tokio::task::spawn_blocking(move || self.next_blocking()).await {
            Ok(next) => next,
            // The source panicked: this read fails, the daemon goes on.
            Err(error) => (gone(), Err(io::Error::other(error))),
        }
    }

    fn next_blocking(mut self) -> (Reading, io::Result<Piece>) {
        let (source, left) = (&self.source, self.left.clone());
        let extents = self.extents.get_or_insert_with(|| {
            let mut extents = extents(&**source, left.clone(), usize::MAX);
            extents.reverse();
            extents
        });
        let (length, zero) = extents.pop().unwrap_or((left.end - left.start, false));
        let at = left.start;
        if zero {
            self.left.start = at + length;
            return (self, Ok(Piece::Zeros(at..at + length)));
        }
        let now = length.min(PIECE as u64);
        if length > now {
            extents.push((length - now, false));
        }
        let mut bytes = vec![0; DATA_AT + now as usize];
        let read = self.source.read(at, &mut bytes[DATA_AT..]);
        self.left.start = at + now;
        (self, read.map(|()| Piece::Data { at, bytes }))
    }
}

/// Stands for a source whose read never came back.
struct Gone;

impl BlockSource for Gone {
    fn size(&self) -> u64 {
        0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("the source is gone"))
    }

    fn extents(&self, _: u64, _: u64) -> Vec<(u64, bool)> {
        Vec::new()
    }
}

/// Up to `most` extents of a range, neighbours of one kind joined. What a source
/// says nothing about counts as data.
fn extents(source: &dyn BlockSource, range: Range<u64>, most: usize) -> Vec<(u64, bool)> {
    let mut found: Vec<(u64, bool)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let window = (range.end - at).min(EXTENT_WINDOW);
        let mut told: u64 = 0;
        let in_window = source
            .extents(at, window)
            .into_iter()
            .chain([(u64::MAX, false)]);
        for (length, zero) in in_window {
            let length = length.min(window - told);
            told += length;
            if length == 0 {
                continue;
            }
            match found.last_mut() {
                Some((last, kind)) if *kind == zero => *last += length,
                _ => {
                    if found.len() == most {
                        return found;
                    }
                    found.push((length, zero));
                }
            }
        }
        at += window;
    }
    found
}

impl Export {
    fn source(&self) -> Arc<dyn BlockSource> {
        self.source
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}
