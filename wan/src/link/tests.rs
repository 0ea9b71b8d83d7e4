//! Peers that do not follow the protocol, speaking raw QUIC.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use tokio::time::timeout;

use super::close::CloseCode;
use super::tls::{Purpose, Tls};
use super::*;
use crate::frame::{Frame, Hello, Resume};
use crate::limits;
use crate::peer::{Identity, Invitation, PeerRecord};
use crate::session::Acknowledgements;

/// An honest site, and the identity of one it trusts that is not.
struct Pair {
    node: Node,
    peer: Peer,
    key: crate::SiteKey,
    rogue: Identity,
    endpoint: Endpoint,
    _directory: tempfile::TempDir,
}

impl Pair {
    fn new() -> Pair {
        let directory = tempfile::tempdir().expect("a directory");
        let identity = |name: &str| {
            Identity::load_or_create(&directory.path().join(name), name).expect("an identity")
        };
        let (honest, rogue) = (identity("honest"), identity("rogue"));
        let link = LinkOptions {
            handshake_timeout: Duration::from_millis(700),
            ..LinkOptions::default()
        };
        let listen = "127.0.0.1:0".parse().expect("an address");
        let node = Node::start(&honest, NodeOptions { listen, link }).expect("started");
        let peer = node.trust(PeerRecord {
            site: "rogue".to_owned(),
            key: rogue.key(),
            addresses: vec![],
            dial: false,
        });
        let endpoint = Endpoint::client(listen).expect("a socket");
        Pair {
            node,
            peer,
            key: honest.key(),
            rogue,
            endpoint,
            _directory: directory,
        }
    }

    async fn dial(&self, protocol: &[u8]) -> Result<Connection, ConnectionError> {
        let tls = Tls::new(&self.rogue);
        let crypto = tls
            .client_speaking(self.key, vec![protocol.to_vec()])
            .expect("a configuration");
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(LinkOptions::default().transport()));
        self.endpoint
            .connect_with(config, self.node.local_addr(), crate::SERVER_NAME)
            .expect("dialled")
            .await
    }

    async fn session(&self) -> (Connection, SendStream, RecvStream) {
        let connection = self.dial(b"farhaven/1").await.expect("connected");
        let (send, receive) = connection.open_bi().await.expect("a stream");
        (connection, send, receive)
    }

    /// A connection past HELLO and RESUME.
    async fn greeted(&self) -> (Connection, SendStream, RecvStream) {
        let (connection, mut send, mut receive) = self.session().await;
        write(&mut send, &Frame::Hello(hello())).await;
        write(&mut send, &Frame::Resume(Resume::default())).await;
        for _ in 0..2 {
            assert!(streams::read_frame(&mut receive).await.is_ok());
        }
        (connection, send, receive)
    }

    /// The honest site still serves a peer that behaves.
    async fn still_works(&self) {
        let (connection, mut send, _receive) = self.greeted().await;
        write(&mut send, &Frame::Message(Bytes::from_static(b"alive"))).await;
        let alive = async {
            loop {
                if let Some(PeerEvent::Message(bytes)) = self.peer.event().await {
                    break bytes;
                }
            }
        };
        assert_eq!(within(alive).await, "alive");
        connection.close(0u32.into(), b"");
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .expect("this must not take 20 seconds")
}

async fn write(stream: &mut SendStream, frame: &Frame) {
    assert!(streams::write(stream, frame).await.is_ok());
}

fn hello() -> Hello {
    Hello {
        versions: vec![1],
        incarnation: 42,
        max_batch_bytes: limits::MAX_BATCH_BYTES as u32,
        max_message_bytes: limits::MAX_MESSAGE_BYTES as u32,
        site: "rogue".to_owned(),
    }
}

/// What the honest site closed the connection with.
async fn closed(connection: &Connection) -> (u64, String) {
    match within(connection.closed()).await {
        ConnectionError::ApplicationClosed(close) => (
            close.error_code.into_inner(),
            String::from_utf8_lossy(&close.reason).into_owned(),
        ),
        other => panic!("closed otherwise: {other}"),
    }
}

#[tokio::test]
async fn another_version_is_told_what_to_upgrade() {
    let pair = Pair::new();
    let error = pair
        .dial(b"farhaven/2")
        .await
        .expect_err("no common protocol");
    let why = close::describe(&error);
    assert!(why.contains("does not speak farhaven/1; upgrade"), "{why}");

    let (connection, mut send, _receive) = pair.session().await;
    let other = Hello {
        versions: vec![7, 6],
        ..hello()
    };
    write(&mut send, &Frame::Hello(other)).await;
    let (code, why) = closed(&connection).await;
    assert_eq!(code, CloseCode::Version as u64);
    assert_eq!(
        why,
        "rogue speaks farhaven/7, this site farhaven/1; upgrade the older one"
    );
    let kept = pair.peer.status().why_last_disconnect;
    assert_eq!(kept, Some(why));
    pair.still_works().await;
}

#[tokio::test]
async fn garbage_instead_of_a_greeting_ends_the_connection() {
    let pair = Pair::new();
    let wrong_site = Hello {
        site: "../etc".to_owned(),
        ..hello()
    };
    for bytes in [
        Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n"),
        Bytes::from_static(&[1, 255, 255, 255, 255, 0]),
        Bytes::from_static(&[1, 1, 0, 0, 0, 200]),
        Frame::Message(Bytes::from_static(b"too early")).encode(),
        Frame::Hello(wrong_site).encode(),
    ] {
        let (connection, mut send, _receive) = pair.session().await;
        send.write_chunk(bytes).await.expect("written");
        let (code, _) = closed(&connection).await;
        assert_eq!(code, CloseCode::Protocol as u64);
    }
    // Silence is no greeting either.
    let (connection, _send, _receive) = pair.session().await;
    assert_eq!(closed(&connection).await.0, CloseCode::Slow as u64);
    pair.still_works().await;
}

#[tokio::test]
async fn garbage_on_any_stream_ends_the_connection() {
    let pair = Pair::new();
    let too_long = {
        let [a, b, c, d] = (limits::MAX_BATCH_BYTES as u32 + 9).to_le_bytes();
        Bytes::copy_from_slice(&[5, a, b, c, d, 0, 0])
    };
    let short = Frame::Batch {
        seq: 1,
        bytes: Bytes::from_static(b"this one ends early"),
    };
    let short = short.encode().slice(..9);
    for (control, bytes) in [
        (true, Bytes::from_static(&[99, 0, 0, 0, 0])),
        (true, Frame::Hello(hello()).encode()),
        (true, Frame::Acknowledge(vec![]).encode()),
        (false, Bytes::from_static(&[0; 64])),
        (false, too_long),
        (false, short),
        (false, Frame::Message(Bytes::new()).encode()),
        (false, Frame::Resume(Resume::default()).encode()),
    ] {
        let (connection, mut send, _receive) = pair.greeted().await;
        if control {
            send.write_chunk(bytes).await.expect("written");
        } else {
            let mut stream = connection.open_uni().await.expect("a stream");
            stream.write_chunk(bytes).await.expect("written");
            stream.finish().expect("finished");
        }
        assert_eq!(closed(&connection).await.0, CloseCode::Protocol as u64);
    }
    pair.still_works().await;
}

#[tokio::test]
async fn copies_that_are_none_end_the_connection_and_idle_claims_do_not() {
    let pair = Pair::new();
    let too_long = crate::frame::encode_copy(0, &[0; limits::MAX_COPIED_MESSAGE_BYTES + 1]);
    for copy in [Bytes::from_static(b"short"), Bytes::new(), too_long] {
        let (connection, _send, _receive) = pair.greeted().await;
        connection.send_datagram(copy).expect("sent");
        assert_eq!(closed(&connection).await.0, CloseCode::Protocol as u64);
    }
    // Numbers of the future and the past, far more of them than are kept.
    let (connection, mut send, _receive) = pair.greeted().await;
    for number in (1..2_000).chain(u64::MAX - 10..=u64::MAX) {
        let claim = crate::frame::encode_copy(number, &[7; 1000]);
        within(connection.send_datagram_wait(claim))
            .await
            .expect("sent");
    }
    write(&mut send, &Frame::Message(Bytes::from_static(b"first"))).await;
    let first = async {
        loop {
            match pair.peer.event().await {
                Some(PeerEvent::Message(bytes)) => break bytes,
                Some(_) => {}
                None => panic!("closed"),
            }
        }
    };
    assert_eq!(within(first).await, "first");
    assert!(pair.peer.status().messages_by_copy <= limits::MAX_EARLY_MESSAGES);
    connection.close(0u32.into(), b"");
    // What it had claimed is left behind with its connection.
    while pair.peer.status().connected {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    while timeout(Duration::from_millis(100), pair.peer.event())
        .await
        .is_ok()
    {}
    pair.still_works().await;
}

#[tokio::test]
async fn a_peer_cannot_acknowledge_what_it_was_not_sent() {
    let pair = Pair::new();
    // Not connected, so nothing has left.
    pair.peer
        .send_data(4, Bytes::from_static(b"precious"))
        .await
        .expect("taken");
    let (connection, mut send, _receive) = pair.session().await;
    write(&mut send, &Frame::Hello(hello())).await;
    let lie = Resume {
        durable: vec![(0, u64::MAX)],
        held: vec![],
    };
    write(&mut send, &Frame::Resume(lie)).await;
    let (code, why) = closed(&connection).await;
    assert_eq!(code, CloseCode::Protocol as u64, "{why}");
    let waiting: Acknowledgements = *pair.peer.acknowledged().borrow();
    assert_eq!(waiting.lowest_unacknowledged, Some(4));
}

#[tokio::test]
async fn batches_given_up_midway_leave_nothing_behind() {
    let pair = Pair::new();
    let (connection, mut send, _receive) = pair.greeted().await;
    // More streams than may be open at once, each given up inside its batch.
    let frame = Frame::Batch {
        seq: 9,
        bytes: Bytes::from(vec![7; 100_000]),
    };
    for _ in 0..300 {
        let mut stream = within(connection.open_uni()).await.expect("a stream");
        stream
            .write_chunk(frame.encode().slice(..5_000))
            .await
            .expect("written");
        stream.reset(0u32.into()).expect("reset");
    }
    // The same batch, whole, and twice: it is handed over once.
    for _ in 0..2 {
        let mut stream = within(connection.open_uni()).await.expect("a stream");
        write(&mut stream, &frame).await;
        stream.finish().expect("finished");
        let _ = within(stream.stopped()).await;
    }
    let mut data = 0;
    write(&mut send, &Frame::Message(Bytes::from_static(b"end"))).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    while let Ok(Some(event)) = timeout(Duration::from_millis(300), pair.peer.event()).await {
        data += usize::from(matches!(event, PeerEvent::Data { seq: 9, .. }));
        assert!(
            !matches!(event, PeerEvent::Disconnected { .. }),
            "{event:?}"
        );
    }
    assert_eq!(data, 1);
}

#[tokio::test]
async fn streams_that_trickle_are_bounded_and_hold_nothing_up() {
    let pair = Pair::new();
    let (connection, mut send, _receive) = pair.greeted().await;
    // As many as it may open, each at the beginning of the largest batch there is.
    let most = limits::MAX_DATA_STREAMS as usize + 1;
    let frame = Frame::Batch {
        seq: 9,
        bytes: Bytes::from(vec![7; limits::MAX_BATCH_BYTES]),
    };
    let frame = frame.encode();
    let mut streams = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(500), connection.open_uni()).await {
        let mut stream = stream.expect("a stream");
        let begun = stream.write_chunk(frame.slice(..100)).await;
        begun.expect("written");
        streams.push(stream);
        assert!(streams.len() <= most, "no end of streams");
    }
    assert!(streams.len() + 1 >= most, "{} streams", streams.len());
    // A byte now and then on each of them: the session goes on beside them.
    for at in 100..110 {
        for stream in &mut streams {
            let more = stream.write_chunk(frame.slice(at..at + 1)).await;
            more.expect("written");
        }
        let said = Bytes::from(vec![at as u8]);
        write(&mut send, &Frame::Message(said.clone())).await;
        let heard = async {
            loop {
                match pair.peer.event().await {
                    Some(PeerEvent::Message(bytes)) => break bytes,
                    Some(PeerEvent::Data { .. }) => panic!("no batch is whole"),
                    Some(_) => {}
                    None => panic!("closed"),
                }
            }
        };
        assert_eq!(within(heard).await, said);
    }
    assert!(connection.close_reason().is_none() && pair.peer.status().connected);
    connection.close(0u32.into(), b"");
    pair.still_works().await;
}

#[tokio::test]
async fn a_newer_connection_takes_over_and_a_crowd_is_sent_away() {
    let pair = Pair::new();
    let (first, _send, _receive) = pair.greeted().await;
    let (second, _send, _receive) = pair.greeted().await;
    assert_eq!(closed(&first).await.0, CloseCode::Replaced as u64);
    assert!(second.close_reason().is_none());
    // Many connections that never greet: bounded, and the link lives on.
    let mut crowd = Vec::new();
    for _ in 0..2 * limits::MAX_GREETINGS {
        crowd.push(pair.session().await);
    }
    for (connection, _, _) in &crowd {
        assert_eq!(closed(connection).await.0, CloseCode::Slow as u64);
    }
    assert!(second.close_reason().is_none());
    assert!(pair.peer.status().connected);
}

#[tokio::test]
async fn a_pairing_connection_says_only_what_pairing_says() {
    let pair = Pair::new();
    let address = pair.node.local_addr().to_string();
    let soon = super::pair::now_unix() + 60;
    let invitation = Invitation::new("honest", pair.key, vec![address], soon).expect("valid");
    pair.node.invite(&invitation).expect("opened");
    for bytes in [
        Frame::Hello(hello()).encode(),
        Bytes::from_static(&[6, 5, 0, 0, 0, 1, 2, 3, 4, 5]),
    ] {
        let connection = pair.dial(b"farhaven-pair/1").await.expect("connected");
        let (mut send, _receive) = connection.open_bi().await.expect("a stream");
        send.write_chunk(bytes).await.expect("written");
        assert_eq!(closed(&connection).await.0, CloseCode::Protocol as u64);
    }
    assert_eq!(Purpose::from_protocol(b"farhaven/2"), None);
}

#[tokio::test]
async fn noise_on_the_port_is_ignored() {
    let pair = Pair::new();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for length in [0usize, 1, 20, 1200, 9000] {
        for fill in [0u8, 0x40, 0xc3, 0xff] {
            let noise = vec![fill; length];
            socket
                .send_to(&noise, pair.node.local_addr())
                .expect("sent");
        }
    }
    pair.still_works().await;
}
