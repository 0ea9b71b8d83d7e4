//! The NBD server against real clients (libnbd, QEMU) and against hostile bytes.

#![allow(clippy::unwrap_used)]

mod client;
mod disk;
mod programs;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use client::Client;
use disk::{Disk, served};
use farhaven::activate::nbd::pieces::PIECE;
use farhaven::activate::nbd::serve::IN_FLIGHT;
use farhaven::activate::nbd::{
    BlockSource, MORE_PIECES, MOST_CHOOSING, NbdError, NbdServer, OF_EXPORT,
};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

type Test = Result<(), Box<dyn std::error::Error>>;

/// The kind of an error chunk.
const ERROR: u16 = 1 << 15 | 1;

#[tokio::test]
async fn what_may_not_be_is_refused_and_the_connection_goes_on() -> Test {
    let served = served();
    let disk = Disk::new(5, 1 << 20);
    served.server.export("d", disk.clone())?;
    let mut client = Client::go(&served.socket, "d", false).await;
    let refused: [(u16, u64, u32, &[u8], u32); 8] = [
        (1, 0, 4, b"data", 1),
        (4, 0, 4096, b"", 1),
        (6, 0, 4096, b"", 1),
        (0, 1 << 20, 1, b"", 22),
        (0, u64::MAX, 2, b"", 22),
        (0, 0, (32 << 20) + 1, b"", 22),
        (7, 0, 4096, b"", 22),
        (99, 0, 0, b"", 22),
    ];
    for (command, offset, length, data, error) in refused {
        client.request(0, command, offset, length, data).await;
        assert_eq!(
            client.simple(0).await.0,
            error,
            "command {command} at {offset}"
        );
    }
    client.request(0, 3, 0, 0, &[]).await;
    assert_eq!(client.simple(0).await.0, 0);
    client.request(0, 0, 100, 900_000, &[]).await;
    let (error, data) = client.simple(900_000).await;
    assert!(error == 0 && data == disk.bytes[100..900_100]);
    client.request(0, 2, 0, 0, &[]).await;
    client.ends().await;

    let mut client = Client::go(&served.socket, "d", true).await;
    client.request(4, 0, 0, 4096, &[]).await;
    assert_eq!(client.chunk().await.1, ERROR);
    client.request(0, 7, 0, 0, &[]).await;
    assert_eq!(client.chunk().await.1, ERROR);
    client.request(8, 7, 0, 1 << 20, &[]).await;
    assert_eq!(client.chunk().await.2.len(), 4 + 8);
    // A write as large as allowed is read to its end; a larger one ends the talk.
    client.request(0, 1, 0, 1 << 20, &vec![1; 1 << 20]).await;
    assert_eq!(client.chunk().await.1, ERROR);
    client.request(0, 1, 0, (32 << 20) + 1, &[]).await;
    client.ends().await;
    Ok(())
}

#[tokio::test]
async fn options_that_may_not_be_are_refused() -> Test {
    let served = served();
    served.server.export("d", Disk::new(5, 4096))?;
    let mut client = Client::connect(&served.socket).await;
    let go = |name: &str| {
        [
            &(name.len() as u32).to_be_bytes()[..],
            name.as_bytes(),
            &[0, 0],
        ]
        .concat()
    };
    assert_eq!(client.option(5, &[]).await, 1 << 31 | 1, "TLS");
    assert_eq!(client.option(77, b"what").await, 1 << 31 | 1);
    assert_eq!(client.option(7, &go("nowhere")).await, 1 << 31 | 6);
    assert_eq!(client.option(7, b"\xff\xff\xff\xff").await, 1 << 31 | 3);
    assert_eq!(client.option(3, b"data").await, 1 << 31 | 3);
    assert_eq!(
        client.option(10, &[0; 8]).await,
        1 << 31 | 3,
        "contexts before structured replies"
    );
    assert_eq!(client.option(6, &go("d")).await, 1);
    assert_eq!(client.option(2, &[]).await, 1);
    client.ends().await;

    // The oldest way in: size, flags, and zeros unless waived.
    let mut client = Client::connect(&served.socket).await;
    client.0.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x01d").await?;
    assert_eq!(
        (client.0.read_u64().await?, client.0.read_u16().await?),
        (4096, 0x107)
    );
    client.request(0, 0, 0, 4096, &[]).await;
    assert_eq!(client.simple(4096).await.0, 0);

    let mut client = Client::connect(&served.socket).await;
    client
        .0
        .write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")
        .await?;
    client.ends().await;
    let mut client = Client::connect(&served.socket).await;
    for _ in 0..128 {
        client.option(77, &[]).await;
    }
    client.ends().await;
    Ok(())
}

#[tokio::test]
async fn a_replaced_source_is_seen_by_open_connections_and_removal_ends_them() -> Test {
    let served = served();
    let (before, after) = (Disk::new(6, 1 << 20), Disk::new(7, 1 << 20));
    served.server.export("d", before.clone())?;
    let mut client = Client::go(&served.socket, "d", false).await;
    for disk in [&before, &after, &before] {
        served.server.replace("d", disk.clone())?;
        client.request(0, 0, 0, 1 << 20, &[]).await;
        assert!(client.simple(1 << 20).await.1 == disk.bytes);
    }
    let other_size = served.server.replace("d", Disk::new(1, 4096)).unwrap_err();
    assert!(matches!(
        other_size,
        NbdError::Size {
            size: 1_048_576,
            other: 4096,
            ..
        }
    ));
    assert!(matches!(
        served.server.export("d", after.clone()),
        Err(NbdError::Exists(_))
    ));
    assert!(matches!(
        served.server.export("", after.clone()),
        Err(NbdError::Name(0))
    ));
    assert!(matches!(
        served.server.replace("x", after),
        Err(NbdError::Unknown(_))
    ));
    served.server.remove("d")?;
    client.ends().await;
    assert!(matches!(
        served.server.remove("d"),
        Err(NbdError::Unknown(_))
    ));
    Ok(())
}

/// Fails, or panics, after some bytes.
struct Failing(u64, bool);

impl BlockSource for Failing {
    fn size(&self) -> u64 {
        8 << 20
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 <= self.0 {
            buf.fill(1);
            return Ok(());
        }
        assert!(!self.1, "a source that panics");
        Err(io::Error::other("not there"))
    }

    /// Says less than it was asked, and too much.
    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        if offset == 0 {
            vec![(0, true), (length / 2, false)]
        } else {
            vec![(u64::MAX, false), (u64::MAX, true)]
        }
    }
}

#[tokio::test]
async fn a_failure_midway_is_told_where_that_is_possible() -> Test {
    let served = served();
    for panics in [false, true] {
        let name = format!("panics-{panics}");
        served
            .server
            .export(&name, Arc::new(Failing(3 * PIECE as u64, panics)))?;
        let mut client = Client::go(&served.socket, &name, true).await;
        client.request(0, 0, 0, 4 << 20, &[]).await;
        for _ in 0..3 {
            let (flags, kind, payload) = client.chunk().await;
            assert_eq!((flags, kind, payload.len()), (0, 1, 8 + PIECE));
        }
        let (flags, kind, payload) = client.chunk().await;
        assert_eq!((flags, kind, &payload[..4]), (1, ERROR, &[0, 0, 0, 5][..]));
        // The connection goes on.
        client.request(0, 0, 0, 4096, &[]).await;
        assert_eq!(client.chunk().await.0, 1);

        let mut client = Client::go(&served.socket, &name, false).await;
        client.request(0, 0, 7 << 20, 4096, &[]).await;
        assert_eq!(client.simple(4096).await.0, 5);
        client.request(0, 0, 0, 4 << 20, &[]).await;
        let mut data = Vec::new();
        let ended =
            tokio::time::timeout(Duration::from_secs(5), client.0.read_to_end(&mut data)).await?;
        assert!(
            ended.is_err() || data.len() == 16 + 3 * PIECE,
            "{} bytes",
            data.len()
        );
    }
    Ok(())
}

#[tokio::test]
async fn connections_of_an_export_are_bounded_and_a_place_is_given_back() -> Test {
    let served = served();
    served.server.export("d", Disk::new(8, 4096))?;
    let mut open = Vec::new();
    for _ in 0..OF_EXPORT {
        open.push(Client::go(&served.socket, "d", false).await);
    }
    Client::go(&served.socket, "d", false).await.ends().await;
    // Another one's are its own, however many exports there are.
    for n in 0..20 {
        let name = format!("other {n}");
        served.server.export(&name, Disk::new(n, 4096))?;
        for _ in 0..OF_EXPORT {
            let mut client = Client::go(&served.socket, &name, false).await;
            client.request(0, 0, 0, 4096, &[]).await;
            assert_eq!(client.simple(4096).await.0, 0);
            open.push(client);
        }
    }
    open.remove(0);
    for attempt in 0.. {
        let mut next = Client::go(&served.socket, "d", false).await;
        // One that is refused is closed at once.
        let soon = Duration::from_millis(300);
        if tokio::time::timeout(soon, next.0.read(&mut [0; 1]))
            .await
            .is_err()
        {
            break;
        }
        assert!(attempt < 100, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test]
async fn clients_that_choose_nothing_are_bounded_and_keep_nobody_from_a_disk() -> Test {
    let served = served();
    served.server.export("d", Disk::new(8, 4096))?;
    let mut open = Client::go(&served.socket, "d", false).await;
    let mut choosing = Vec::new();
    for _ in 0..MOST_CHOOSING {
        choosing.push(Client::connect(&served.socket).await);
    }
    let mut refused = UnixStream::connect(&served.socket).await?;
    assert_eq!(refused.read(&mut [0; 1]).await?, 0);
    open.request(0, 0, 0, 4096, &[]).await;
    assert_eq!(open.simple(4096).await.0, 0);
    choosing.pop();
    for attempt in 0.. {
        let mut next = UnixStream::connect(&served.socket).await?;
        if next.read(&mut [0; 1]).await? == 1 {
            break;
        }
        assert!(attempt < 100, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// They hold all pieces that are shared, and each other connection has one of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_clients_that_read_nothing_hinder_nobody() -> Test {
    let served = served();
    let disk = Disk::new(9, 8 << 20);
    let mut deaf = Vec::new();
    for n in 0..=MORE_PIECES / (IN_FLIGHT - 1) {
        let name = format!("d{}", n / OF_EXPORT);
        if n % OF_EXPORT == 0 {
            served.server.export(&name, disk.clone())?;
        }
        let mut client = Client::go(&served.socket, &name, true).await;
        for _ in 0..IN_FLIGHT {
            client.request(0, 0, 0, 8 << 20, &[]).await;
        }
        deaf.push(client);
    }
    served.server.export("d", disk.clone())?;
    let mut client = Client::go(&served.socket, "d", false).await;
    for _ in 0..4 {
        client.request(0, 0, 0, 8 << 20, &[]).await;
    }
    for _ in 0..4 {
        assert!(client.simple(8 << 20).await.1 == disk.bytes);
    }
    tokio::time::timeout(Duration::from_secs(5), served.server.shutdown()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_hinders_nobody() -> Test {
    let served = served();
    let disk = Disk::new(9, 8 << 20);
    served.server.export("d", disk.clone())?;
    let mut deaf = Client::go(&served.socket, "d", true).await;
    for _ in 0..8 {
        deaf.request(0, 0, 0, 8 << 20, &[]).await;
    }
    let mut client = Client::go(&served.socket, "d", false).await;
    for _ in 0..4 {
        client.request(0, 0, 0, 8 << 20, &[]).await;
        assert!(client.simple(8 << 20).await.1 == disk.bytes);
    }
    tokio::time::timeout(Duration::from_secs(5), served.server.shutdown()).await?;
    Ok(())
}

#[tokio::test]
async fn sockets_left_behind_are_replaced_and_others_are_left_alone() -> Test {
    let dir = tempfile::tempdir()?;
    let stale = dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale)?);
    let server = NbdServer::bind(&stale)?;
    assert!(matches!(NbdServer::bind(&stale), Err(NbdError::InUse(_))));
    drop(server);
    let file = dir.path().join("file");
    std::fs::write(&file, "precious")?;
    assert!(matches!(NbdServer::bind(&file), Err(NbdError::Bind { .. })));
    assert_eq!(std::fs::read_to_string(&file)?, "precious");
    let absent = NbdServer::bind(dir.path().join("absent/nbd.sock"))
        .err()
        .unwrap()
        .to_string();
    assert!(
        absent.contains("absent/nbd.sock") && absent.contains("directory"),
        "{absent}"
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Garbage at any moment of the talk ends that connection, at once or when
    /// its bytes run out, and nothing else.
    #[test]
    fn garbage_ends_only_its_own_connection(
        phase in 0..4, garbage in proptest::collection::vec(any::<u8>(), 0..2000), command: u16, length: u32, offset: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let served = served();
            let disk = Disk::new(10, 1 << 20);
            served.server.export("d", disk.clone()).unwrap();
            let mut client = match phase {
                0 => Client(UnixStream::connect(&served.socket).await.unwrap()),
                1 => Client::connect(&served.socket).await,
                _ => Client::go(&served.socket, "d", phase == 3).await,
            };
            if phase >= 2 {
                client.request(0, command % 9, offset % (2 << 20), length % (2 << 20), &[]).await;
            }
            // It may have hung up on us by now.
            let _ = client.0.write_all(&garbage).await;
            let _ = client.0.shutdown().await;
            client.ends().await;
            let mut next = Client::go(&served.socket, "d", false).await;
            next.request(0, 0, 0, 4096, &[]).await;
            assert!(next.simple(4096).await.1 == disk.bytes[..4096]);
        });
    }
}
