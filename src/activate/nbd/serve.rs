//! The second phase of an NBD connection: requests and replies.
//!
//! One task reads requests; each that needs the source gets a task of its own
//! (at most [`IN_FLIGHT`]), which reads a piece at a time on a blocking thread
//! and writes it. A reply is never held in memory whole: memory is bounded by
//! pieces times requests in flight, of which each connection has one for
//! itself, and shares all others with the rest.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::handshake::{Agreed, broken};
use super::pieces::{DATA_AT, Piece, Reading, extents};
use super::wire::{self, Errno, Request, chunk, command};
use super::{BlockSource, Export};

/// Requests of one connection that are worked on at the same time.
pub const IN_FLIGHT: usize = 8;
/// Most extents in one reply: the client asks again for the rest.
const MOST_EXTENTS: usize = 2048;

/// Serves requests until the client says goodbye or goes away. `more` has room for
/// requests of all connections beside one of each.
pub(super) async fn serve(
    stream: UnixStream,
    agreed: Agreed,
    more: &Arc<Semaphore>,
) -> io::Result<()> {
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
        let room = room(&mut tasks, more).await?;
        let connection = connection.clone();
        tasks.spawn(async move {
            let _room = room;
            match request.command {
                command::READ => connection.read(&request).await,
                _ => connection.block_status(&request).await,
            }
        });
    }
}

/// Room for one more request of a connection; `None` is the one that each has anyway.
async fn room(
    tasks: &mut JoinSet<io::Result<()>>,
    more: &Arc<Semaphore>,
) -> io::Result<Option<OwnedSemaphorePermit>> {
    loop {
        match tasks.len() {
            0 => return Ok(None),
            1..IN_FLIGHT => {
                if let Ok(room) = more.clone().try_acquire_owned() {
                    return Ok(Some(room));
                }
            }
            _ => {}
        }
        if let Some(done) = tasks.join_next().await {
            ended(done)?;
        }
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
        let extents = crate::work::spawn_blocking(move || extents(&*source, range, most)).await;
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

impl Export {
    fn source(&self) -> Arc<dyn BlockSource> {
        self.source
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }
}
