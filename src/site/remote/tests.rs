//! What is asked of a paired site, and what becomes of that when nobody answers.

use std::net::UdpSocket;
use std::path::Path;

use farhaven_policies::site::SiteConfig;
use farhaven_policies::units::ByteSize;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_wan::limits::MAX_MESSAGE_BYTES;
use farhaven_wan::{Identity, Introduction, LinkOptions, Node, NodeOptions, SiteKey};

use super::*;
use crate::activate::machine::Builders;

const PATIENCE: Duration = Duration::from_secs(30);

fn node(directory: &Path, name: &str) -> (Node, SiteKey) {
    let identity = Identity::load_or_create(&directory.join(name), name).unwrap();
    let options = NodeOptions {
        listen: "127.0.0.1:0".parse().unwrap(),
        link: LinkOptions::default(),
    };
    (Node::start(&identity, options).unwrap(), identity.key())
}

async fn until<T>(what: &str, mut wanted: impl FnMut() -> Option<T>) -> T {
    let looks = async {
        loop {
            if let Some(found) = wanted() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, looks).await;
    found.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// A connection to a site that reads nothing of what it is told.
struct Unread {
    remote: Remote,
    _nodes: [Node; 2],
    _dir: tempfile::TempDir,
}

impl Unread {
    async fn connected() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (here, own) = node(dir.path(), "here");
        let (there, theirs) = node(dir.path(), "there");
        there.trust(PeerRecord {
            site: "here".to_owned(),
            key: own,
            addresses: Vec::new(),
            dial: false,
        });
        let record = PeerRecord {
            site: "there".to_owned(),
            key: theirs,
            addresses: vec![there.local_addr().to_string()],
            dial: true,
        };
        let peer = here.trust(record.clone());
        let (store, _) = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let incoming = Incoming::start(store, peer.clone(), dir.path().to_owned(), 0);
        let remote = Remote::new(record, peer, incoming);
        let first = tokio::time::timeout(PATIENCE, remote.peer.event()).await;
        let first = first.expect("something happens");
        assert!(matches!(first, Some(PeerEvent::Connected { .. })));
        // As is noted where it is served.
        remote.connections.send_replace(1);
        Self {
            remote,
            _nodes: [here, there],
            _dir: dir,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_reads_nothing_is_not_waited_for_longer_than_was_said() {
    /// Longer than anything is on its way here.
    const STUCK: Duration = Duration::from_secs(2);
    let unread = Unread::connected().await;
    let remote = &unread.remote;
    let large = Bytes::from(vec![0; MAX_MESSAGE_BYTES]);
    let mut left = 0;
    let send = || tokio::time::timeout(STUCK, remote.peer.send_message(large.clone()));
    while let Ok(sent) = send().await {
        sent.expect("the link is up");
        left += 1;
        assert!(left < 1000, "there is no end to what is taken");
    }
    let asked = remote.ask_within(Message::Clock, STUCK);
    let told = tokio::time::timeout(PATIENCE, asked).await;
    let told = told.expect("it is waited for on and on");
    assert!(matches!(told, Err(AskError::TimedOut(..))), "{told:?}");
    assert!(remote.lock_pending().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_nobody_waits_for_any_more_is_forgotten() {
    let unread = Unread::connected().await;
    let remote = &unread.remote;
    let mut asked = Box::pin(remote.ask_within(Message::Clock, PATIENCE));
    let told = tokio::time::timeout(Duration::from_millis(100), &mut asked).await;
    assert!(told.is_err(), "nobody answers: {told:?}");
    assert_eq!(remote.lock_pending().len(), 1);
    drop(asked);
    assert!(remote.lock_pending().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_was_removed_is_not_connected() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = SiteConfig::default();
    config.site.name = "here".to_owned();
    config.site.state_dir = dir.path().join("here");
    config.activate.ram_dir = dir.path().join("ram");
    config.store.min_free = ByteSize::from_mib(1);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    config.listen.address = socket.local_addr().unwrap();
    config.listen.advertise = vec![config.listen.address.to_string()];
    drop(socket);
    let site = Site::start_with(config, Builders::new()).await.unwrap();
    let (other, _) = node(dir.path(), "other");
    let invitation = site.invite(Duration::from_secs(60)).unwrap();
    let own = Introduction::new("other", Vec::new()).unwrap();
    let record = other.accept_invitation(&invitation, &own).await.unwrap();
    other.trust(record);
    let remote = until("connected", || {
        site.remote("other").filter(|remote| remote.connected())
    })
    .await;
    site.remove_peer("other").unwrap();
    until("not connected", || (!remote.connected()).then_some(())).await;
    let told = remote.ask(Message::Clock).await;
    assert!(matches!(told, Err(AskError::Unreachable(_))), "{told:?}");
    site.shutdown().await;
    other.shutdown().await;
}
