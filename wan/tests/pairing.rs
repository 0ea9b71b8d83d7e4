//! Who gets in: invitations, good and bad, and sites that are not paired.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::*;
use farhaven_wan::link::{PairError, SendDataError, SendMessageError};
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

/// The reason must not be overtaken by the end of the streams of before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_site_always_hears_why() {
    let (west, south) = (Site::start("west"), Site::start("south"));
    for _ in 0..200 {
        let east = Site::start("east");
        let invitation = east.invitation(60);
        east.node.invite(&invitation).expect("opened");
        west.accept(&invitation).await.expect("paired");
        let refused = south.accept(&invitation).await.expect_err("used");
        assert!(refused.to_string().contains("not open"), "{refused}");
    }
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
