//! What a QEMU says, and what a peer says of one, as fuzz targets.

use std::io::{Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::definition::Definition;
use super::instantiate::{Backing, DiskPlacement, Placement};
use super::nbd_client::NbdClient;
use super::nbd_wire::*;
use super::options::{self, Keys, MAX_COMMAND_LINE};
use super::{qmp, stream, template};

/// Nobody waits: what there is was said before.
const SOON: Duration = Duration::from_secs(5);

/// A server whose every byte is known beforehand.
struct Script<'a>(Cursor<&'a [u8]>);

impl Read for Script<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// QEMU's NBD server: negotiation, then the map of a disk, then its bytes.
pub(crate) fn nbd_replies(bytes: &[u8]) {
    const MOST: u64 = 80 << 10;
    let script = Script(Cursor::new(bytes));
    let Ok(mut client) = NbdClient::negotiate(script, "disk", &[ALLOCATION]) else {
        return;
    };
    let size = client.size().min(1 << 40);
    if bytes.len().is_multiple_of(2) {
        let Ok(extents) = client.extents(0..size) else {
            return;
        };
        let mut told = 0;
        for extent in extents {
            assert_eq!(extent.offset, told, "extents adjoin");
            told += extent.length;
        }
        assert_eq!(told, size, "extents cover what was asked for");
    }
    let ranges = [0..size.min(MOST / 2), size.min(MOST / 2)..size.min(MOST)];
    let mut next = 0;
    let read = client.read_ranges(ranges, |offset, bytes| {
        assert_eq!(offset, next);
        next += bytes.len() as u64;
        Ok::<(), NbdError>(())
    });
    assert!(read.is_err() || next == size.min(MOST));
}

/// A socket on which these bytes have come, and nothing more will.
fn said(bytes: &[u8]) -> Option<(UnixStream, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair().ok()?;
    theirs.set_nonblocking(true).ok()?;
    theirs.write_all(bytes).ok()?;
    theirs.shutdown(std::net::Shutdown::Write).ok()?;
    Some((ours, theirs))
}

/// QEMU's control socket.
pub(crate) fn qmp_replies(bytes: &[u8]) {
    if let Some((ours, _theirs)) = said(bytes) {
        qmp::fuzzing(ours, SOON);
    }
}

/// The end of a device state's stream, and taking one off a socket.
pub(crate) fn streams(bytes: &[u8]) {
    stream::fuzzing(bytes, || said(bytes), SOON);
}

/// A command line as `/proc` shows it, and a definition that a peer tells.
pub(crate) fn command_lines(bytes: &[u8]) {
    let words = options::split_command_line(bytes);
    let parsed = options::parse(words.get(1..).unwrap_or_default());
    let again = options::parse(&options::unparse(&parsed));
    assert_eq!(options::unparse(&again), options::unparse(&parsed));
    for argument in &parsed {
        let implied = template::implied(&argument.option);
        let mut keys = argument.keys(implied);
        bounded(&keys);
        keys.set("driver", "a,b");
        assert_eq!(keys.value("driver"), Some("a,b"));
        keys.remove("driver");
        assert_eq!(keys.value("driver"), None);
        let _ = keys.text(implied);
    }
    let definition = serde_json::from_slice::<Definition>(bytes);
    if let Ok(definition) = definition {
        told(&definition);
    }
}

/// However it is written, what keys hold is not many times what was given.
fn bounded(keys: &Keys) {
    let held: usize = keys
        .pairs()
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    assert!(held <= options::MOST_FLAT + MAX_COMMAND_LINE);
}

/// What is done with a peer's definition before anybody runs it.
pub(crate) fn told(definition: &Definition) {
    let _ = definition.summary();
    for one in [Some(definition.clone()), definition.isolated("t1").ok()]
        .into_iter()
        .flatten()
    {
        let _ = one.instantiate(&Placement::default());
        let mut placement = Placement {
            run: Path::new("/run/x").to_owned(),
            ..Placement::default()
        };
        for block in &one.ram {
            placement.ram.insert(block.id.clone(), "/dev/shm/x".into());
        }
        for disk in &one.disks {
            let place = DiskPlacement {
                overlay: "/run/x/overlay".into(),
                backing: Backing::Nothing,
            };
            placement.disks.insert(disk.name.clone(), place);
        }
        let _ = one.instantiate(&placement);
    }
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

fn chunk(done: bool, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut out = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    out.extend(u16::from(done).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

pub(crate) fn nbd_seeds() -> Vec<Vec<u8>> {
    const SIZE: u64 = 8192;
    let mut begun = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    begun.extend(option_reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]));
    let context = b"\0\0\0\x05base:allocation";
    begun.extend(option_reply(
        OPTION_SET_META_CONTEXT,
        REPLY_META_CONTEXT,
        context,
    ));
    begun.extend(option_reply(OPTION_SET_META_CONTEXT, REPLY_ACK, &[]));
    let info = [&INFO_EXPORT.to_be_bytes()[..], &SIZE.to_be_bytes(), &[0, 1]].concat();
    begun.extend(option_reply(OPTION_GO, REPLY_INFO, &info));
    begun.extend(option_reply(OPTION_GO, REPLY_ACK, &[]));
    let status = [5u32, 4096, 0, 4096, 3].map(u32::to_be_bytes).concat();
    let told = chunk(true, CHUNK_STATUS, 1, &status);
    let hole = |cookie| {
        let data = [&0u64.to_be_bytes()[..], &(SIZE as u32).to_be_bytes()].concat();
        chunk(true, CHUNK_HOLE, cookie, &data)
    };
    let data = [&0u64.to_be_bytes()[..], &[7; 64]].concat();
    let refused = chunk(true, CHUNK_ERROR | 1, 1, &[0, 0, 0, 5, 0, 2, b'n', b'o']);
    let mut seeds = vec![
        [&begun[..], &told, &hole(2)].concat(),
        [&begun[..], &hole(1)].concat(),
        [&begun[..], &chunk(false, CHUNK_DATA, 1, &data)].concat(),
        [&begun[..], &refused].concat(),
    ];
    // Which way an input goes is told by whether its length is even.
    let longer = seeds
        .iter()
        .map(|seed| [&seed[..], &[0]].concat())
        .collect::<Vec<_>>();
    seeds.extend(longer);
    seeds
}

pub(crate) fn qmp_seeds() -> Vec<Vec<u8>> {
    let lines = [
        json!({"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": []}}),
        json!({"return": {}, "id": 1}),
        json!({"event": "STOP", "data": {}}),
        json!({"return": {"status": "paused"}, "id": 1}),
        json!({"return": {"status": "paused"}, "id": 2}),
        json!({"error": {"class": "GenericError", "desc": "not now"}, "id": 3}),
        json!({"event": "MIGRATION", "data": {"status": "failed"}}),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
    let short: String = lines[..2].iter().map(|line| format!("{line}\n")).collect();
    vec![text.into_bytes(), short.into_bytes()]
}

pub(crate) fn stream_seeds() -> Vec<Vec<u8>> {
    let of = |body: &[u8], json: &str| {
        let length = (json.len() as u32).to_be_bytes();
        [b"QEVM\0\0\0\x03", body, &[0, 6], &length, json.as_bytes()].concat()
    };
    vec![
        of(
            b"\x07\0\0\0\x0apc-q35-7.2\x01devices\x7e\0\0\0\x01",
            "{\"page_size\": 4096,\n\"devices\": []}",
        ),
        of(b"", "{}"),
    ]
}

pub(crate) fn command_line_seeds() -> Vec<Vec<u8>> {
    let line = [
        "qemu-system-x86_64",
        "-machine",
        "pc-q35-7.2,memory-backend=ram0",
        "-m",
        "512",
        "-object",
        "{\"qom-type\":\"memory-backend-file\",\"id\":\"ram0\",\"mem-path\":\"/dev/shm/a\"}",
        "-blockdev",
        "driver=qcow2,node-name=root,file.driver=file,file.filename=/a,,b",
        "-netdev",
        "tap,id=n,queues=2",
        "-nic",
        "user",
        "-chardev",
        "socket,id=c,path=/x,nowait",
        "-serial",
        "tcp::4444,server",
        "-qmp",
        "unix:/q,server=on",
        "-S",
        "disk.img",
    ]
    .join("\0");
    let definition = json!({
        "program": "qemu-system-x86_64", "qemu": [7, 2, 22], "machine": "pc-q35-7.2",
        "machine_alias": null, "kvm": false, "cpu": "max", "vcpus": 2, "ram_bytes": 1 << 29,
        "ram": [{"id": "ram0", "bytes": 1 << 29, "backend": "memory-backend-file", "path": "/dev/shm/a", "shared": true}],
        "disks": [{"name": "root", "node": "root", "bytes": 1 << 30, "format": "qcow2", "path": "/a", "option": "blockdev", "keep": [["cache.direct", "on"], ["node-name", "root"]]}],
        "nets": [{"id": "n", "kind": "tap", "value": "tap,ifname=t,queues=2"}],
        "files": [],
        "arguments": [
            {"option": "machine", "value": "pc-q35-7.2"},
            {"option": "object", "value": "{\"qom-type\":\"memory-backend-file\",\"id\":\"ram0\",\"mem-path\":\"{ram:ram0}\"}"},
            {"option": "blockdev", "value": "{disk:root}"},
            {"option": "netdev", "value": "{net:n}"}, {"option": "nic", "value": "tap,ifname=x"},
            {"option": "chardev", "value": "socket,id=c,path={run}/c,server=on"},
            {"option": "S"}, {"option": "serial", "value": "chardev:c"}, {"option": "qmp", "value": "unix:{qmp}"}
        ],
    });
    vec![line.into_bytes(), definition.to_string().into_bytes()]
}
