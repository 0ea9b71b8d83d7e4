//! An NBD client that says anything, as a fuzz target.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::wire::{self, command, option};
use super::{BlockSource, Exports, converse};

const SIZE: u64 = 64 << 10;

/// A small disk, every other 4 KiB of which are zeros.
struct Striped;

impl BlockSource for Striped {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= SIZE);
        buf.fill(7);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        assert!(length <= SIZE - offset);
        let (mut at, end, mut extents) = (offset, offset + length, Vec::new());
        while at < end {
            let next = (at / 4096 + 1) * 4096;
            extents.push((next.min(end) - at, at / 4096 % 2 == 1));
            at = next;
        }
        extents
    }
}

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .expect("a runtime");
}

/// A whole conversation: it ends when the client has said all, whatever that was.
pub(crate) fn requests(bytes: &[u8]) {
    let talk = async {
        let (mut client, server) = UnixStream::pair().expect("a pair of sockets");
        let exports = Exports::default();
        exports
            .add("disk", Arc::new(Striped))
            .expect("the first of its name");
        let (mut heard, mut said) = client.split();
        let say = async {
            // The server may hang up first.
            let _ = said.write_all(bytes).await;
            let _ = said.shutdown().await;
        };
        let hear = async {
            let mut piece = vec![0; 64 << 10];
            while heard.read(&mut piece).await.is_ok_and(|read| read > 0) {}
        };
        let _ = tokio::join!(converse(server, &exports, None), say, hear);
    };
    RUNTIME.with(|runtime| runtime.block_on(talk));
}

fn asked(which: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(which.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Valid conversations.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let named = |more: &[u8]| [&4u32.to_be_bytes()[..], b"disk", more].concat();
    let context = named(
        &[
            &1u32.to_be_bytes()[..],
            &15u32.to_be_bytes(),
            b"base:allocation",
        ]
        .concat(),
    );
    let begun = 3u32.to_be_bytes().to_vec();
    let chosen = [
        &begun[..],
        &asked(option::STRUCTURED_REPLY, &[]),
        &asked(option::SET_META_CONTEXT, &context),
        &asked(option::GO, &named(&[0, 1, 0, 3])),
    ]
    .concat();
    let requests = [
        request(0, command::READ, 1, 0, 8192),
        request(wire::ONE_EXTENT, command::BLOCK_STATUS, 2, 4096, 4096),
        request(0, command::BLOCK_STATUS, 3, 0, SIZE as u32),
        [request(0, command::WRITE, 4, 0, 4), b"abcd".to_vec()].concat(),
        request(0, command::FLUSH, 5, 0, 0),
        request(0, command::DISCONNECT, 6, 0, 0),
    ]
    .concat();
    vec![
        [&chosen[..], &requests].concat(),
        [
            &begun[..],
            &asked(option::LIST, &[]),
            &asked(option::INFO, &named(&[0, 0])),
            &asked(option::LIST_META_CONTEXT, &context),
            &asked(option::EXPORT_NAME, b"disk"),
            &request(0, command::READ, 1, 100, 1000),
        ]
        .concat(),
        [&begun[..], &asked(option::ABORT, &[])].concat(),
    ]
}
