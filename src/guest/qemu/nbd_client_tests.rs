use super::*;
use proptest::prelude::*;

/// A server whose every byte is written beforehand.
struct Script {
    sent: std::io::Cursor<Vec<u8>>,
    got: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.sent.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.got.extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
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

fn handshake(size: u64) -> Vec<u8> {
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    out.extend(option_reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]));
    out.extend(option_reply(
        OPTION_SET_META_CONTEXT,
        REPLY_META_CONTEXT,
        b"\0\0\0\x05base:allocation",
    ));
    out.extend(option_reply(OPTION_SET_META_CONTEXT, REPLY_ACK, &[]));
    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
    info.extend(size.to_be_bytes());
    info.extend([0, 1]);
    out.extend(option_reply(OPTION_GO, REPLY_INFO, &info));
    out.extend(option_reply(OPTION_GO, REPLY_ACK, &[]));
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

fn data_chunk(done: bool, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_be_bytes().to_vec();
    body.extend(data);
    chunk(done, CHUNK_DATA, cookie, &body)
}

fn client(size: u64, replies: &[Vec<u8>]) -> Result<NbdClient<Script>, NbdError> {
    let mut sent = handshake(size);
    for reply in replies {
        sent.extend(reply);
    }
    let script = Script {
        sent: std::io::Cursor::new(sent),
        got: Vec::new(),
    };
    NbdClient::negotiate(script, "disk", &[ALLOCATION])
}

fn read(client: &mut NbdClient<Script>, range: Range<u64>) -> Result<Vec<u8>, NbdError> {
    let mut out = Vec::new();
    client.read_ranges([range], |_, bytes| {
        out.extend(bytes);
        Ok::<(), NbdError>(())
    })?;
    Ok(out)
}

#[test]
fn reads_are_put_together_from_data_and_holes_in_any_order_of_requests() {
    let size = REQUEST + 10;
    let first = vec![5; REQUEST as usize - 100];
    let mut hole = (REQUEST - 100).to_be_bytes().to_vec();
    hole.extend(100_u32.to_be_bytes());
    let mut c = client(
        size,
        &[
            data_chunk(false, 1, 0, &first),
            data_chunk(true, 2, REQUEST, &[9; 10]),
            chunk(false, CHUNK_HOLE, 1, &hole),
            chunk(true, CHUNK_NONE, 1, &[]),
        ],
    )
    .expect("negotiates");
    assert_eq!(c.size(), size);
    let mut wanted = first;
    wanted.extend([0; 100]);
    wanted.extend([9; 10]);
    assert_eq!(read(&mut c, 0..size).expect("reads"), wanted);
}

#[test]
fn extents_are_merged_and_end_with_the_request() {
    let mut status = 5_u32.to_be_bytes().to_vec();
    for (length, flags) in [(100_u32, 0_u32), (50, 0), (4_000_000, 3)] {
        status.extend(length.to_be_bytes());
        status.extend(flags.to_be_bytes());
    }
    let mut c = client(1000, &[chunk(true, CHUNK_STATUS, 1, &status)]).expect("negotiates");
    let extents = c.extents(0..1000).expect("told");
    assert_eq!(
        extents,
        [
            Extent {
                offset: 0,
                length: 150,
                flags: 0
            },
            Extent {
                offset: 150,
                length: 850,
                flags: 3
            }
        ]
    );
}

#[test]
fn what_breaks_the_protocol_is_refused() {
    let wrong: [(&str, Vec<u8>); 7] = [
        ("another request's reply", data_chunk(true, 9, 0, &[1; 100])),
        ("an offset outside", data_chunk(true, 1, 50, &[1; 100])),
        ("too much", data_chunk(true, 1, 0, &[1; 101])),
        ("too little", data_chunk(true, 1, 0, &[1; 99])),
        ("nothing", chunk(true, CHUNK_NONE, 1, &[])),
        ("short", chunk(true, CHUNK_DATA, 1, &[0; 7])),
        ("no magic", vec![0; 20]),
    ];
    for (what, reply) in wrong {
        let mut c = client(100, &[reply]).expect("negotiates");
        assert!(
            matches!(read(&mut c, 0..100), Err(NbdError::Protocol(_))),
            "{what}"
        );
    }
    let mut error = 5_u32.to_be_bytes().to_vec();
    error.extend(2_u16.to_be_bytes());
    error.extend(b"no");
    let mut c = client(100, &[chunk(true, CHUNK_ERROR | 1, 1, &error)]).expect("negotiates");
    assert!(matches!(
        read(&mut c, 0..100),
        Err(NbdError::Refused { code: 5, .. })
    ));
    let mut huge = chunk(true, CHUNK_STATUS, 1, &[]);
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut c = client(100, &[huge]).expect("negotiates");
    assert!(matches!(c.extents(0..100), Err(NbdError::Protocol(_))));
}

#[test]
fn a_refused_export_tells_the_servers_words() {
    let mut sent = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    sent.extend(option_reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]));
    sent.extend(option_reply(OPTION_GO, REPLY_ERROR | 6, b"no such export"));
    let script = Script {
        sent: std::io::Cursor::new(sent),
        got: Vec::new(),
    };
    let Err(error) = NbdClient::negotiate(script, "disk", &[]) else {
        panic!("refused")
    };
    assert!(error.to_string().contains("no such export"));
}

proptest! {
    #[test]
    fn no_bytes_of_a_server_make_it_panic_or_grow(
        size in 0_u64..2_000_000,
        noise in proptest::collection::vec(any::<u8>(), 0..400),
        flips in proptest::collection::vec((0_usize..600, any::<u8>()), 0..6),
    ) {
        let mut sent = handshake(size);
        sent.extend(data_chunk(false, 1, 0, &[3; 50]));
        sent.extend(&noise);
        for (at, value) in flips {
            if let Some(byte) = sent.get_mut(at) {
                *byte = value;
            }
        }
        let script = Script { sent: std::io::Cursor::new(sent), got: Vec::new() };
        if let Ok(mut c) = NbdClient::negotiate(script, "disk", &[ALLOCATION]) {
            let _ = read(&mut c, 0..size.min(1 << 20));
            let _ = c.extents(0..size);
        }
    }
}
