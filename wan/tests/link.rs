//! Two sites over loopback: pairing, data, cuts, restarts, refusals.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use common::*;
use farhaven_wan::link::{AcknowledgeError, PairError, SendDataError, SendMessageError};
use farhaven_wan::peer::pairing::InviteError;
use farhaven_wan::{Introduction, Invitation, PeerEvent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_pairs_two_sites_which_then_talk() {
    let (east, west) = (Site::start("east"), Site::start("west"));
    let invitation = east.invitation(60);
    east.node.invite(&invitation).expect("opened");
    let token = invitation
        .to_string()
        .parse::<Invitation>()
        .expect("a token");
    let own = Introduction::new("west", vec![west.address()]).expect("valid");
    let of_east = west
        .node
        .accept_invitation(&token, &own)
        .await
        .expect("paired");
    assert_eq!(
        (of_east.site.as_str(), of_east.key, of_east.dial),
        ("east", east.key(), true)
    );
    let of_west = within(east.node.pairing()).await.expect("an event").record;
    assert_eq!(
        (of_west.site.as_str(), of_west.key, of_west.dial),
        ("west", west.key(), false)
    );
    assert_eq!(of_west.addresses, vec![west.address()]);

    let at_east = east.node.trust(of_west);
    let at_west = west.node.trust(of_east);
    assert_eq!(connected(&at_east).await, "west");
    assert_eq!(connected(&at_west).await, "east");
    at_west
        .send_message(Bytes::from_static(b"hello"))
        .await
        .expect("sent");
    assert_eq!(
        within(at_east.event()).await,
        Some(PeerEvent::Message(Bytes::from_static(b"hello")))
    );
    let status = at_west.status();
    assert!(status.connected && status.udp_tx_bytes > 0 && status.udp_rx_bytes > 0);
    assert!(status.mtu.is_some_and(|mtu| mtu >= 1200) && status.rtt.is_some());
    assert!(
        at_west
            .silence()
            .is_some_and(|silence| silence < Duration::from_secs(5))
    );
    assert!(east.node.socket_buffers().receive > 0);
    east.node.shutdown().await;
    assert!(disconnected(&at_west).await.contains("stopped"));
    west.node.shutdown().await;
    assert_eq!(within(drained(&at_west)).await, ());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_is_for_one_site_once() {
    let (east, west, south) = (
        Site::start("east"),
        Site::start("west"),
        Site::start("south"),
    );
    let invitation = east.invitation(60);
    east.node.invite(&invitation).expect("opened");
    west.accept(&invitation).await.expect("paired");
    // Its answer might have been lost: the same site may ask again, and it is one pairing.
    west.accept(&invitation).await.expect("paired");
    let refused = south.accept(&invitation).await.expect_err("used");
    assert!(refused.to_string().contains("not open"), "{refused}");
    within(east.node.pairing()).await.expect("an event");
    let more = tokio::time::timeout(Duration::from_millis(200), east.node.pairing()).await;
    assert!(more.is_err(), "{more:?}");
    // The trust ended: the old invitation does not bring the site back.
    east.node.revoke(west.key());
    let refused = west.accept(&invitation).await.expect_err("revoked");
    assert!(refused.to_string().contains("not open"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_invitations_are_refused_with_a_sentence() {
    let (east, west) = (Site::start("east"), Site::start("west"));
    // None is open: a stranger does not even get past the handshake.
    let never = east.invitation(60);
    let refused = west.accept(&never).await.expect_err("never opened");
    assert!(refused.to_string().contains("not open"), "{refused}");

    let expired = east.invitation(0);
    assert_eq!(east.node.invite(&expired), Err(InviteError::Expired));
    assert!(matches!(
        west.accept(&expired).await,
        Err(PairError::Expired { .. })
    ));
    assert_eq!(west.node.invite(&never), Err(InviteError::NotOurs));
    assert!(matches!(east.accept(&never).await, Err(PairError::Own)));

    // Another secret than the one that is open: five tries cancel what is open.
    let open = east.invitation(60);
    east.node.invite(&open).expect("opened");
    for _ in 0..5 {
        let refused = west.accept(&never).await.expect_err("wrong secret");
        assert!(refused.to_string().contains("not open"), "{refused}");
    }
    let refused = west.accept(&open).await.expect_err("cancelled");
    assert!(refused.to_string().contains("not open"), "{refused}");

    // The right address, but another site's key there.
    let south = Site::start("south");
    let misled = Invitation::new("east", south.key(), vec![east.address()], in_seconds(60));
    east.node.invite(&east.invitation(60)).expect("opened");
    let refused = west
        .accept(&misled.expect("valid"))
        .await
        .expect_err("another key");
    assert!(refused.to_string().contains("another key"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_is_not_paired_stays_out() {
    let (east, west) = (Site::start("east"), Site::start("west"));
    // West trusts east; east knows nothing of west.
    let at_west = west.node.trust(east.record(true));
    let why = until_why(&at_west, "pair the two sites again").await;
    assert!(!at_west.status().connected, "{why}");
    assert!(matches!(
        at_west.send_message(Bytes::new()).await,
        Err(SendMessageError::NotConnected)
    ));
    // Also while an invitation is open: that admits to pairing only.
    east.node.invite(&east.invitation(60)).expect("opened");
    let why = until_why(&at_west, "does not trust your key").await;
    assert!(!at_west.status().connected, "{why}");
    // As soon as it is trusted, the link comes up by itself.
    let at_east = east.node.trust(west.record(false));
    connected(&at_east).await;
    // And goes down when the trust ends.
    assert!(east.node.revoke(west.key()));
    assert!(!east.node.revoke(west.key()));
    connected(&at_west).await;
    assert!(disconnected(&at_west).await.contains("ended the trust"));
    assert!(matches!(
        at_east.send_data(0, Bytes::new()).await,
        Err(SendDataError::Closed(_))
    ));
    within(drained(&at_east)).await;
    until_why(&at_west, "trust").await;
    assert!(!at_west.status().connected);
}

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
                        tokio::time::sleep(Duration::from_millis(10)).await;
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
    assert_eq!(status.data_sent_bytes - status.data_resent_bytes, fresh);
    // What arrived is not sent again, acknowledged or not. (A few may have been
    // under way on a busy machine.)
    assert!(
        status.data_resent_bytes <= 4 * 50_000,
        "{}",
        status.data_resent_bytes
    );
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
    let east = east.restart();
    let mut record = east.record(true);
    assert_eq!(record.key, at_west.key(), "the key outlives the process");
    record.addresses = vec![east.address()];
    west.node.trust(record);
    let at_east = east.node.trust(west.record(false));
    let again = take_all(&at_east, 10).await;
    assert_eq!(
        again.keys().copied().collect::<Vec<_>>(),
        (10..20).collect::<Vec<_>>()
    );
    within(at_west.all_acknowledged(19))
        .await
        .expect("all durable");
    assert_eq!(at_west.status().data_resent_bytes, 100_000);
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
    let (east, west) = (
        Site::start_with("east", |link| link.receive_queue_bytes = 2 << 20),
        Site::start_with("west", |link| link.window_bytes = 256 << 20),
    );
    let at_east = east.node.trust(west.record(false));
    let at_west = west.node.trust(east.record(true));
    connected(&at_west).await;
    let count = 200u64;
    for seq in 0..count {
        at_west
            .send_data(seq, payload(seq, 1 << 20))
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
