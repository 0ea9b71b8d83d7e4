//! Two sites over loopback: data, cuts, restarts, a slow application.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use common::*;
use farhaven_wan::emulate::{Emulator, EmulatorOptions};
use farhaven_wan::link::{AcknowledgeError, SendDataError};
use farhaven_wan::{Peer, PeerEvent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_flows_both_ways_at_once() {
    let (east, west, at_east, at_west) = linked().await;
    let count = 200;
    let batch = |seq: u64| payload(seq, 20_000 + (seq as usize * 7919) % 200_000);
    let (received_east, received_west, sent_east, sent_west) = tokio::join!(
        take_all(&at_east, count),
        take_all(&at_west, count),
        send_all(&at_east, count, batch),
        send_all(&at_west, count, batch),
    );
    for received in [received_east, received_west] {
        assert_eq!(received.len(), count as usize);
        assert!(received.iter().all(|(seq, bytes)| *bytes == batch(*seq)));
    }
    let _ = (sent_east, sent_west);
    let status = at_east.status();
    assert_eq!(status.unacknowledged_bytes, 0);
    assert_eq!(status.data_resent_bytes, 0);
    assert_eq!(
        status.data_sent_bytes,
        (0..count).map(|seq| batch(seq).len() as u64).sum::<u64>()
    );
    assert!(status.udp_tx_bytes > status.data_sent_bytes);
    drop((east, west));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_link_mends_and_sends_only_what_is_missing() {
    let (east, west) = (Site::start("east"), Site::start("west"));
    let proxy = Proxy::start(east.node.local_addr()).await;
    let at_east = east.node.trust(west.record(false));
    let mut record = east.record(true);
    record.addresses = vec![proxy.address()];
    let at_west = west.node.trust(record);
    connected(&at_west).await;

    let batch = |seq| payload(seq, 50_000);
    let (total, part) = (120u64, 40u64);
    let receiving = tokio::spawn({
        let at_east = at_east.clone();
        async move {
            let mut seen = BTreeSet::new();
            let mut cuts = 0;
            while seen.len() < total as usize {
                match within(at_east.event()).await.expect("open") {
                    PeerEvent::Data { seq, bytes } => {
                        assert_eq!(bytes, payload(seq, 50_000));
                        assert!(seen.insert(seq), "{seq} twice");
                        // Slow to make durable, so that cuts find batches in hand.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        at_east.durable(&[seq]);
                    }
                    PeerEvent::Disconnected { .. } => cuts += 1,
                    _ => {}
                }
            }
            cuts
        }
    });
    for first in [0, part, 2 * part] {
        let arrived = at_east.status().udp_rx_bytes + part * 50_000;
        for seq in first..first + part {
            at_west.send_data(seq, batch(seq)).await.expect("taken");
        }
        if first < 2 * part {
            // All of it is there, but only a part is durable, let alone acknowledged.
            while at_east.status().udp_rx_bytes < arrived {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            proxy.cut();
            assert!(at_west.status().unacknowledged_batches > 0);
            let why = disconnected(&at_west).await;
            assert!(why.contains("no answer"), "{why}");
            assert!(at_west.silence().expect("heard before") > Duration::from_millis(500));
            proxy.mend();
            connected(&at_west).await;
        }
    }
    within(at_west.all_acknowledged(total))
        .await
        .expect("all durable");
    assert_eq!(receiving.await.expect("no panic"), 2);
    let status = at_west.status();
    assert_eq!(status.connections, 3);
    let fresh: u64 = (0..total).map(|seq| batch(seq).len() as u64).sum();
    assert_eq!(status.data_sent_bytes - status.data_requeued_bytes, fresh);
    // What arrived is not sent again, acknowledged or not.
    assert_eq!(status.data_resent_bytes, 0);
    assert_eq!(at_east.status().data_repeated_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_receiver_gets_what_it_lost() {
    let (east, west, at_east, at_west) = linked().await;
    for seq in 0..20 {
        at_west
            .send_data(seq, payload(seq, 10_000))
            .await
            .expect("taken");
    }
    // East makes the first half durable, holds the rest, and is gone.
    let mut held = 0;
    while held < 20 {
        if let Some(PeerEvent::Data { seq, .. }) = within(at_east.event()).await {
            held += 1;
            if seq < 10 {
                at_east.durable(&[seq]);
            }
        }
    }
    within(at_west.all_acknowledged(9)).await.expect("durable");
    let east = east.restart().await;
    assert_eq!(east.key(), at_west.key(), "the key outlives the process");
    let at_east = east.node.trust(west.record(false));
    let again = take_all(&at_east, 10).await;
    assert_eq!(
        again.keys().copied().collect::<Vec<_>>(),
        (10..20).collect::<Vec<_>>()
    );
    within(at_west.all_acknowledged(19))
        .await
        .expect("all durable");
    let status = at_west.status();
    assert_eq!(status.data_requeued_bytes, 100_000);
    assert_eq!(at_east.status().data_repeated_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_receiver_had_stored_is_not_sent_again() {
    let (east, west, at_east, at_west) = linked().await;
    for seq in 0..20 {
        at_west
            .send_data(seq, payload(seq, 10_000))
            .await
            .expect("taken");
    }
    // East stores the first half, and is gone before it says so.
    let mut taken = 0;
    while taken < 20 {
        if let Some(PeerEvent::Data { .. }) = within(at_east.event()).await {
            taken += 1;
        }
    }
    let east = east.restart().await;
    let at_east = east.node.trust(west.record(false));
    at_east.stored(0..10);
    let again = take_all(&at_east, 10).await;
    assert_eq!(
        again.keys().copied().collect::<Vec<_>>(),
        (10..20).collect::<Vec<_>>()
    );
    within(at_west.all_acknowledged(19))
        .await
        .expect("all durable");
    assert_eq!(at_west.status().data_requeued_bytes, 100_000);
    assert_eq!(at_east.status().data_repeated_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_site_that_is_back_is_noticed_at_once() {
    let east = Site::start_with("east", |link| link.idle_timeout = Duration::from_secs(60));
    let west = Site::start_with("west", |link| link.idle_timeout = Duration::from_secs(60));
    let proxy = Proxy::start(east.node.local_addr()).await;
    east.node.trust(west.record(false));
    let mut record = east.record(true);
    record.addresses = vec![proxy.address()];
    let at_west = west.node.trust(record);
    connected(&at_west).await;
    proxy.cut(); // Its farewell is not heard: it was killed.
    let east = east.restart().await;
    let at_east = east.node.trust(west.record(false));
    proxy.mend();
    let why = disconnected(&at_west).await;
    assert!(why.contains("restarted"), "{why}");
    connected(&at_east).await;
    connected(&at_west).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_cannot_keep_data_gets_it_again() {
    let (_east, _west, at_east, at_west) = linked().await;
    at_west.send_data(0, payload(0, 1000)).await.expect("taken");
    assert!(matches!(next_data(&at_east).await, (0, _)));
    at_east.refuse_data("the store of east is full; free some room");
    let why = disconnected(&at_west).await;
    assert!(why.contains("the store of east is full"), "{why}");
    assert!(matches!(next_data(&at_east).await, (0, _)));
    at_east.durable(&[0, 77]);
    within(at_west.all_acknowledged(0)).await.expect("durable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_up_data_is_not_waited_for() {
    let (_east, _west, at_east, at_west) = linked().await;
    at_west.send_data(3, payload(3, 1000)).await.expect("taken");
    next_data(&at_east).await;
    let waiting = tokio::spawn({
        let at_west = at_west.clone();
        async move { at_west.all_acknowledged(3).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    at_west.reset_data();
    assert_eq!(
        within(waiting).await.expect("no panic"),
        Err(AcknowledgeError::Reset)
    );
    assert!(matches!(
        at_west.send_data(3, Bytes::new()).await,
        Err(SendDataError::Batch(_))
    ));
    let large = Bytes::from(vec![0; (1 << 20) + 1]);
    assert!(matches!(
        at_west.send_data(4, large).await,
        Err(SendDataError::Batch(_))
    ));
    // The late acknowledgement of a forgotten batch harms nobody.
    at_east.durable(&[3]);
    at_west.send_data(4, payload(4, 1000)).await.expect("taken");
    assert!(matches!(next_data(&at_east).await, (4, _)));
    at_east.durable(&[4]);
    within(at_west.all_acknowledged(4)).await.expect("durable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_takes_nothing_holds_its_peer_back() {
    // A busy machine is late for longer than a test's link usually waits, and makes the
    // path so slow that less may wait to leave.
    let patient = Duration::from_secs(60);
    let (east, west) = (
        Site::start_with("east", |link| {
            (link.receive_queue_bytes, link.idle_timeout) = (2 << 20, patient);
        }),
        Site::start_with("west", |link| {
            (link.window_bytes, link.ahead_bytes) = (256 << 20, 256 << 20);
            link.idle_timeout = patient;
        }),
    );
    let at_east = east.node.trust(west.record(false));
    let at_west = west.node.trust(east.record(true));
    connected(&at_west).await;
    let count = 200u64;
    for seq in 0..count {
        within(at_west.send_data(seq, payload(seq, 1 << 20)))
            .await
            .expect("the window is wide");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    // What east read: its queue, 64 streams in hand, and what QUIC's windows hold.
    let bound = (2 + 65 + 34 + 8) << 20;
    let came = at_east.status().udp_rx_bytes;
    assert!(
        came < bound,
        "{came} bytes came in although nothing was taken"
    );
    // Messages and acknowledgements are not behind it.
    at_east
        .send_message(Bytes::from_static(b"still here"))
        .await
        .expect("sent");
    assert_eq!(
        within(at_west.event()).await,
        Some(PeerEvent::Message(Bytes::from_static(b"still here")))
    );
    let received = take_all(&at_east, count).await;
    assert_eq!(received.len(), count as usize);
    within(at_west.all_acknowledged(count))
        .await
        .expect("all durable");
    assert_eq!(at_west.status().data_resent_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_that_both_dial_end_with_one_link() {
    let (east, west) = (Site::start("east"), Site::start("west"));
    let at_east = east.node.trust(west.record(true));
    let at_west = west.node.trust(east.record(true));
    let settled = async {
        loop {
            let before = (at_east.status().connections, at_west.status().connections);
            tokio::time::sleep(Duration::from_millis(700)).await;
            let (a, b) = (at_east.status(), at_west.status());
            if a.connected && b.connected && (a.connections, b.connections) == before {
                break;
            }
        }
    };
    within(settled).await;
    at_east.send_data(1, payload(1, 100)).await.expect("taken");
    assert!(matches!(next_data(&at_west).await, (1, _)));
}

/// Messages each way over a link that loses every tenth packet; what copies brought.
async fn messages_over_loss(copies_at_west: bool) -> u64 {
    let east = Site::start("east");
    let west = Site::start_with("west", |link| link.message_copies = copies_at_west);
    let shape = "50mbit,20ms,10%".parse().expect("a link");
    let emulator = Emulator::start(EmulatorOptions::new(east.node.local_addr(), shape));
    let emulator = emulator.expect("started");
    let at_east = east.node.trust(west.record(false));
    let mut record = east.record(true);
    record.addresses = vec![emulator.addr().to_string()];
    let at_west = west.node.trust(record);
    connected(&at_east).await;
    connected(&at_west).await;
    let count = 300u64;
    // Short ones, and some that are too long for a copy.
    let message = |number: u64| payload(number, if number.is_multiple_of(7) { 3_000 } else { 100 });
    let speak = async |peer: &Peer| {
        for number in 0..count {
            peer.send_message(message(number)).await.expect("connected");
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    let listen = async |peer: &Peer| {
        let mut heard = 0;
        while heard < count {
            match within(peer.event()).await.expect("open") {
                PeerEvent::Message(bytes) => {
                    assert_eq!(bytes, message(heard), "message {heard}");
                    heard += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::join!(
        speak(&at_east),
        speak(&at_west),
        listen(&at_east),
        listen(&at_west)
    );
    at_east.status().messages_by_copy + at_west.status().messages_by_copy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_messages_stand_in_for_lost_packets() {
    assert!(messages_over_loss(true).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_no_copies_is_sent_none() {
    assert_eq!(messages_over_loss(false).await, 0);
}
