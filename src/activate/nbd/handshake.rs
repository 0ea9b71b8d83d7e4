//! The first phase of an NBD connection: greeting, then options until the client
//! has chosen an export (fixed newstyle).

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::wire::{self, ContextQuery, Wanted, info, option, option_reply, reply};
use super::{Export, Exports};

/// Most options a client may send before it chooses.
const MOST_OPTIONS: usize = 128;

/// What was agreed on.
pub(super) struct Agreed {
    pub(super) name: String,
    pub(super) export: Arc<Export>,
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

/// Speaks with a client until it has chosen an export; `None` if it went away in peace.
pub(super) async fn shake(
    stream: &mut UnixStream,
    exports: &Exports,
) -> io::Result<Option<Agreed>> {
    stream.write_u64(wire::GREETING).await?;
    stream.write_u64(wire::OPTION_MAGIC).await?;
    stream
        .write_u16(wire::FIXED_NEWSTYLE | wire::NO_ZEROES)
        .await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES) != 0 {
        return Err(broken("handshake flags that were not offered"));
    }
    let zeroes = flags & u32::from(wire::NO_ZEROES) == 0;

    let mut structured = false;
    // The export whose allocation context was set last.
    let mut allocation: Option<String> = None;
    for _ in 0..MOST_OPTIONS {
        if stream.read_u64().await? != wire::OPTION_MAGIC {
            return Err(broken("something else than an option"));
        }
        let chosen = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > wire::LARGEST_OPTION {
            return Err(broken("an option that is too long"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        let mut answer = Answer {
            stream,
            option: chosen,
        };
        match chosen {
            option::EXPORT_NAME => {
                // This option has no way to say no.
                let name =
                    String::from_utf8(data).map_err(|_| broken("a name that is not UTF-8"))?;
                let export = exports
                    .find(&name)
                    .ok_or_else(|| broken("the name of no export"))?;
                stream.write_u64(export.size).await?;
                stream.write_u16(wire::EXPORT_FLAGS).await?;
                if zeroes {
                    stream.write_all(&[0; 124]).await?;
                }
                let allocation = allocation.is_some_and(|set| set == name);
                return Ok(Some(Agreed {
                    name,
                    export,
                    structured,
                    allocation,
                }));
            }
            option::ABORT => {
                answer.send(reply::ACK, &[]).await?;
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                for name in exports.names() {
                    let length = wire::wire_length(name.len()).to_be_bytes();
                    answer
                        .send(reply::SERVER, &[&length, name.as_bytes()])
                        .await?;
                }
                answer.send(reply::ACK, &[]).await?;
            }
            option::INFO | option::GO => {
                let Some(wanted) = Wanted::parse(&data) else {
                    answer.send(reply::INVALID, &[b"malformed request"]).await?;
                    continue;
                };
                let Some(export) = exports.find(wanted.export) else {
                    answer.send(reply::UNKNOWN, &[b"no such export"]).await?;
                    continue;
                };
                answer.describe(&export, wanted.block_size).await?;
                if chosen == option::GO {
                    let name = wanted.export.to_owned();
                    let allocation = allocation.is_some_and(|set| set == name);
                    return Ok(Some(Agreed {
                        name,
                        export,
                        structured,
                        allocation,
                    }));
                }
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                structured = true;
                answer.send(reply::ACK, &[]).await?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let set = chosen == option::SET_META_CONTEXT;
                if set {
                    allocation = None;
                }
                let Some(query) = ContextQuery::parse(&data).filter(|_| structured) else {
                    answer
                        .send(
                            reply::INVALID,
                            &[b"malformed, or before structured replies"],
                        )
                        .await?;
                    continue;
                };
                if exports.find(query.export).is_none() {
                    answer.send(reply::UNKNOWN, &[b"no such export"]).await?;
                    continue;
                }
                let matches = if set {
                    query.sets_allocation()
                } else {
                    query.lists_allocation()
                };
                if matches {
                    let id = if set { wire::ALLOCATION_ID } else { 0 };
                    answer
                        .send(
                            reply::META_CONTEXT,
                            &[&id.to_be_bytes(), wire::ALLOCATION.as_bytes()],
                        )
                        .await?;
                    if set {
                        allocation = Some(query.export.to_owned());
                    }
                }
                answer.send(reply::ACK, &[]).await?;
            }
            option::LIST | option::STRUCTURED_REPLY => {
                answer
                    .send(reply::INVALID, &[b"this option has no data"])
                    .await?;
            }
            _ => answer.send(reply::UNSUPPORTED, &[b"not supported"]).await?,
        }
    }
    Err(broken("too many options"))
}

struct Answer<'a> {
    stream: &'a mut UnixStream,
    option: u32,
}

impl Answer<'_> {
    async fn send(&mut self, kind: u32, data: &[&[u8]]) -> io::Result<()> {
        self.stream
            .write_all(&option_reply(self.option, kind, data))
            .await
    }

    async fn describe(&mut self, export: &Export, block_size: bool) -> io::Result<()> {
        let kind = info::EXPORT.to_be_bytes();
        let flags = wire::EXPORT_FLAGS.to_be_bytes();
        self.send(reply::INFO, &[&kind, &export.size.to_be_bytes(), &flags])
            .await?;
        if block_size {
            // Any byte may be read; whole units are read best.
            let (least, best) = (1u32, farhaven_storage_sync::unit::UNIT as u32);
            let kind = info::BLOCK_SIZE.to_be_bytes();
            let sizes = [
                least.to_be_bytes(),
                best.to_be_bytes(),
                wire::LARGEST_REQUEST.to_be_bytes(),
            ]
            .concat();
            self.send(reply::INFO, &[&kind, &sizes]).await?;
        }
        self.send(reply::ACK, &[]).await
    }
}

pub(super) fn broken(sent: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the client sent {sent}"),
    )
}
