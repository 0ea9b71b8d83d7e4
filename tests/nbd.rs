//! The NBD server against real clients (libnbd, QEMU) and against hostile bytes.

#![allow(clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use farhaven::activate::nbd::pieces::PIECE;
use farhaven::activate::nbd::{BlockSource, MOST_CONNECTIONS, NbdError, NbdServer};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A disk in memory: 64 KiB parts, some of them zero.
struct Disk {
    bytes: Vec<u8>,
    part: usize,
    reads: AtomicU64,
    broken: AtomicBool,
}

impl Disk {
    fn new(seed: u64, size: usize) -> Arc<Disk> {
        let part = 64 << 10;
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; size];
        for part in bytes.chunks_mut(part) {
            if random.random_bool(0.5) {
                random.fill(part);
            }
        }
        Arc::new(Disk {
            bytes,
            part,
            reads: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        })
    }
}

impl BlockSource for Disk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("segment 7 fails its checksum"));
        }
        self.reads.fetch_add(buf.len() as u64, Ordering::SeqCst);
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let (mut at, end) = (offset as usize, (offset + length) as usize);
        let mut found = Vec::new();
        while at < end {
            let next = end.min((at / self.part + 1) * self.part);
            found.push((
                (next - at) as u64,
                self.bytes[at..next].iter().all(|byte| *byte == 0),
            ));
            at = next;
        }
        found
    }
}

struct Served {
    server: NbdServer,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

fn served() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    Served {
        server: NbdServer::bind(&socket).unwrap(),
        socket,
        dir,
    }
}

impl Served {
    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// Says that a test is skipped where a program is missing; with CI=true it fails.
fn lacks(program: &str) -> bool {
    let lacks = Command::new(program).arg("--version").output().is_err();
    assert!(
        !(lacks && std::env::var("CI").is_ok_and(|ci| ci == "true")),
        "{program} must be installed for CI"
    );
    if lacks {
        eprintln!("skipped: {program} is not installed (apt-get install libnbd-bin qemu-utils)");
    }
    lacks
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let command = tokio::process::Command::new(program)
        .args(arguments)
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(Duration::from_secs(60), command)
        .await
        .expect("the client hangs")
        .unwrap()
}

async fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    told
}

type Test = Result<(), Box<dyn std::error::Error>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_reads_every_byte_over_several_connections() -> Test {
    if lacks("nbdcopy") || lacks("nbdinfo") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(1, (24 << 20) + 513);
    served.server.export("vm/disk 0", disk.clone())?;
    served.server.export("other", Disk::new(2, 4096))?;
    let uri = served.uri("vm/disk%200");
    let info = succeeds("nbdinfo", &[&uri]).await;
    for expected in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "base:allocation",
        "export-size: 25166337",
        "is_read_only: true",
        "can_multi_conn: true",
        "block_size_minimum: 1",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(expected), "no {expected:?} in {info}");
    }
    let list = succeeds("nbdinfo", &["--list", &served.uri("")]).await;
    assert!(
        list.contains("export=\"other\"") && list.contains("export=\"vm/disk 0\""),
        "{list}"
    );

    let copy = served.file("copy");
    succeeds("nbdcopy", &["--connections=4", &uri, &copy]).await;
    assert!(std::fs::read(&copy)? == disk.bytes, "the copy differs");
    let read = disk.reads.load(Ordering::SeqCst);
    let filled: usize = disk
        .bytes
        .chunks(disk.part)
        .filter(|part| part.iter().any(|byte| *byte != 0))
        .map(<[u8]>::len)
        .sum();
    assert!(filled < disk.bytes.len() * 2 / 3);
    assert_eq!(read, filled as u64, "zeros were read");

    let map = succeeds("nbdinfo", &["--map", &uri]).await;
    let mut at = 0;
    for line in map.lines() {
        let fields: Vec<u64> = line
            .split_whitespace()
            .take(3)
            .map(|field| field.parse().unwrap())
            .collect();
        let (offset, length, kind) = (fields[0], fields[1], fields[2]);
        assert_eq!(offset, at);
        let zero = disk.bytes[offset as usize..][..length as usize]
            .iter()
            .all(|byte| *byte == 0);
        assert_eq!(zero, kind == 3, "{line}");
        at += length;
    }
    assert_eq!(at, disk.size());
    served.server.shutdown().await;
    assert!(!served.socket.exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_works_on_an_overlay_and_hydrates_it() -> Test {
    if lacks("qemu-img") || lacks("qemu-io") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(3, 16 << 20);
    served.server.export("root", disk.clone())?;
    let backing = format!("nbd:unix:{}:exportname=root", served.socket.display());
    let (overlay, raw) = (served.file("overlay.qcow2"), served.file("raw"));
    succeeds(
        "qemu-img",
        &[
            "create", "-f", "qcow2", "-b", &backing, "-F", "raw", &overlay,
        ],
    )
    .await;
    // A write lands in the overlay, and the rest still shines through.
    succeeds(
        "qemu-io",
        &[
            "-c",
            "write -P 7 1M 64k",
            "-c",
            "read -P 7 1M 64k",
            &overlay,
        ],
    )
    .await;
    succeeds("qemu-img", &["convert", "-O", "raw", &overlay, &raw]).await;
    let mut expected = disk.bytes.clone();
    expected[1 << 20..][..64 << 10].fill(7);
    assert!(
        std::fs::read(&raw)? == expected,
        "the overlay reads otherwise than its backing"
    );
    // Without its backing it is the same: what block-stream does, in one go.
    succeeds("qemu-img", &["rebase", "-b", "", &overlay]).await;
    served.server.remove("root")?;
    succeeds("qemu-img", &["convert", "-O", "raw", &overlay, &raw]).await;
    assert!(
        std::fs::read(&raw)? == expected,
        "the hydrated overlay differs"
    );
    let zero_bytes = disk.bytes.iter().filter(|byte| **byte == 0).count() as u64;
    let size = std::fs::metadata(&overlay)?.len();
    assert!(
        size < disk.size() - zero_bytes / 2,
        "{size} bytes: zeros were hydrated"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_fails_is_an_io_error_and_the_server_goes_on() -> Test {
    if lacks("qemu-io") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(4, 1 << 20);
    let filled = disk
        .bytes
        .chunks(disk.part)
        .position(|part| part[0] != 0)
        .unwrap()
        * disk.part;
    served.server.export("root", disk.clone())?;
    disk.broken.store(true, Ordering::SeqCst);
    let read = format!("read {filled} 4k");
    let uri = served.uri("root");
    let failed = run("qemu-io", &["-r", "-f", "raw", "-c", &read, &uri]).await;
    let told = format!(
        "{}{}",
        String::from_utf8_lossy(&failed.stdout),
        String::from_utf8_lossy(&failed.stderr)
    );
    assert!(told.contains("Input/output error"), "{told}");
    disk.broken.store(false, Ordering::SeqCst);
    succeeds("qemu-io", &["-r", "-f", "raw", "-c", &read, &uri]).await;
    Ok(())
}

/// A client that speaks byte by byte.
struct Client(UnixStream);

impl Client {
    async fn connect(socket: &Path) -> Client {
        let mut client = Client(UnixStream::connect(socket).await.unwrap());
        let mut greeting = [0; 18];
        client.0.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        client.0.write_u32(3).await.unwrap();
        client
    }

    async fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.0.write_all(b"IHAVEOPT").await.unwrap();
        self.0.write_u32(option).await.unwrap();
        self.0.write_u32(data.len() as u32).await.unwrap();
        self.0.write_all(data).await.unwrap();
        loop {
            assert_eq!(self.0.read_u64().await.unwrap(), 0x3e889045565a9);
            assert_eq!(self.0.read_u32().await.unwrap(), option);
            let kind = self.0.read_u32().await.unwrap();
            let length = self.0.read_u32().await.unwrap();
            let mut data = vec![0; length as usize];
            self.0.read_exact(&mut data).await.unwrap();
            if kind == 1 || kind >= 1 << 31 {
                return kind;
            }
        }
    }

    /// Opens an export; with structured replies and allocation if wanted.
    async fn go(socket: &Path, export: &str, structured: bool) -> Client {
        let mut client = Client::connect(socket).await;
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        if structured {
            assert_eq!(client.option(8, &[]).await, 1);
            let query = [&name[..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
            assert_eq!(client.option(10, &query).await, 1);
        }
        assert_eq!(client.option(7, &[&name[..], &[0, 0]].concat()).await, 1);
        client
    }

    async fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32, data: &[u8]) {
        self.0.write_u32(0x25609513).await.unwrap();
        self.0.write_u16(flags).await.unwrap();
        self.0.write_u16(command).await.unwrap();
        self.0.write_u64(42).await.unwrap();
        self.0.write_u64(offset).await.unwrap();
        self.0.write_u32(length).await.unwrap();
        self.0.write_all(data).await.unwrap();
    }

    /// A simple reply's error, and its data if it has none.
    async fn simple(&mut self, length: usize) -> (u32, Vec<u8>) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x67446698);
        let error = self.0.read_u32().await.unwrap();
        assert_eq!(self.0.read_u64().await.unwrap(), 42);
        let mut data = vec![0; if error == 0 { length } else { 0 }];
        self.0.read_exact(&mut data).await.unwrap();
        (error, data)
    }

    /// One chunk: flags, kind, payload.
    async fn chunk(&mut self) -> (u16, u16, Vec<u8>) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x668e33ef);
        let (flags, kind) = (
            self.0.read_u16().await.unwrap(),
            self.0.read_u16().await.unwrap(),
        );
        assert_eq!(self.0.read_u64().await.unwrap(), 42);
        let length = self.0.read_u32().await.unwrap();
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.unwrap();
        (flags, kind, payload)
    }

    /// Reads until the server has closed; fails if it keeps the connection open.
    async fn ends(&mut self) {
        let mut rest = Vec::new();
        // An error is an end too: closed with bytes unread.
        let _ = tokio::time::timeout(Duration::from_secs(5), self.0.read_to_end(&mut rest))
            .await
            .expect("still open");
    }
}

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
async fn connections_are_bounded_and_a_place_is_given_back() -> Test {
    let served = served();
    served.server.export("d", Disk::new(8, 4096))?;
    let mut open = Vec::new();
    for _ in 0..MOST_CONNECTIONS {
        open.push(Client::go(&served.socket, "d", false).await);
    }
    let mut refused = UnixStream::connect(&served.socket).await?;
    assert_eq!(refused.read(&mut [0; 1]).await?, 0);
    open.pop();
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
