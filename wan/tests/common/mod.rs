//! Sites, a UDP proxy that can be cut, and waits that end.
// Each test file includes this and uses its part.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use farhaven_wan::link::PairError;
use farhaven_wan::{
    Identity, Introduction, Invitation, LinkOptions, Node, NodeOptions, Peer, PeerEvent,
    PeerRecord, SiteKey,
};
use tokio::net::UdpSocket;

/// A wait that ends: a test hangs for nobody.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("this must not take 30 seconds")
}

pub fn in_seconds(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.expect("after 1970").as_secs() + seconds
}

/// Links that notice a cut fast.
pub fn link_options() -> LinkOptions {
    LinkOptions {
        keep_alive: Duration::from_millis(200),
        idle_timeout: Duration::from_secs(1),
        redial: (Duration::from_millis(50), Duration::from_millis(300)),
        ..LinkOptions::default()
    }
}

pub struct Site {
    pub name: &'static str,
    pub directory: tempfile::TempDir,
    pub identity: Identity,
    pub node: Node,
}

impl Site {
    pub fn start(name: &'static str) -> Site {
        Site::start_with(name, |_| {})
    }

    pub fn start_with(name: &'static str, change: impl FnOnce(&mut LinkOptions)) -> Site {
        let directory = tempfile::tempdir().expect("a directory");
        Site::start_in(name, directory, "127.0.0.1:0", change)
    }

    fn start_in(
        name: &'static str,
        directory: tempfile::TempDir,
        listen: &str,
        change: impl FnOnce(&mut LinkOptions),
    ) -> Site {
        let identity = Identity::load_or_create(directory.path(), name).expect("an identity");
        let mut link = link_options();
        change(&mut link);
        let options = NodeOptions {
            listen: listen.parse().expect("an address"),
            link,
        };
        let node = Node::start(&identity, options).expect("started");
        Site {
            name,
            directory,
            identity,
            node,
        }
    }

    /// The same site as another process, at the same port.
    pub async fn restart(self) -> Site {
        let address = self.address();
        let Site {
            name,
            directory,
            node,
            ..
        } = self;
        node.shutdown().await;
        drop(node);
        // The socket is freed when its last task ends.
        let free = async {
            while std::net::UdpSocket::bind(&address).is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(free).await;
        Site::start_in(name, directory, &address, |_| {})
    }

    pub fn key(&self) -> SiteKey {
        self.identity.key()
    }

    pub fn address(&self) -> String {
        self.node.local_addr().to_string()
    }

    pub fn invitation(&self, seconds: u64) -> Invitation {
        Invitation::new(
            self.name,
            self.key(),
            vec![self.address()],
            in_seconds(seconds),
        )
        .expect("valid")
    }

    pub async fn accept(&self, invitation: &Invitation) -> Result<PeerRecord, PairError> {
        let own = Introduction::new(self.name, vec![self.address()]).expect("valid");
        within(self.node.accept_invitation(invitation, &own)).await
    }

    pub fn record(&self, dial: bool) -> PeerRecord {
        PeerRecord {
            site: self.name.to_owned(),
            key: self.key(),
            addresses: vec![self.address()],
            dial,
        }
    }
}

/// East and west, trusting each other; west dials, and both are connected.
pub async fn linked() -> (Site, Site, Peer, Peer) {
    let (east, west) = (Site::start("east"), Site::start("west"));
    let at_east = east.node.trust(west.record(false));
    let at_west = west.node.trust(east.record(true));
    connected(&at_east).await;
    connected(&at_west).await;
    (east, west, at_east, at_west)
}

/// Waits for the next Connected, past anything else; the other site's name.
pub async fn connected(peer: &Peer) -> String {
    loop {
        if let PeerEvent::Connected { remote_site, .. } =
            within(peer.event()).await.expect("the link is open")
        {
            return remote_site;
        }
    }
}

/// Waits for the next Disconnected, past anything else.
pub async fn disconnected(peer: &Peer) -> String {
    loop {
        if let PeerEvent::Disconnected { why } =
            within(peer.event()).await.expect("the link is open")
        {
            return why;
        }
    }
}

/// Takes events until the link is closed.
pub async fn drained(peer: &Peer) {
    while peer.event().await.is_some() {}
}

pub async fn next_data(peer: &Peer) -> (u64, Bytes) {
    loop {
        if let PeerEvent::Data { seq, bytes } =
            within(peer.event()).await.expect("the link is open")
        {
            return (seq, bytes);
        }
    }
}

/// Waits until the last failure contains a text.
pub async fn until_why(peer: &Peer, text: &str) -> String {
    let mut last = None;
    let found = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            last = peer.status().why_last_disconnect;
            match &last {
                Some(why) if why.contains(text) => return why.clone(),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    match found.await {
        Ok(why) => why,
        Err(_) => panic!("no failure that says {text:?}, but {last:?}"),
    }
}

/// Bytes that are told apart by their batch.
pub fn payload(seq: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seq.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    Bytes::from(bytes)
}

pub async fn send_all(peer: &Peer, count: u64, batch: impl Fn(u64) -> Bytes) {
    for seq in 0..count {
        within(peer.send_data(seq, batch(seq)))
            .await
            .expect("taken");
    }
    within(peer.all_acknowledged(count))
        .await
        .expect("all durable");
}

/// Takes so many batches, each once, and makes them durable at once.
pub async fn take_all(peer: &Peer, count: u64) -> BTreeMap<u64, Bytes> {
    let mut received = BTreeMap::new();
    while received.len() < count as usize {
        let (seq, bytes) = next_data(peer).await;
        assert!(received.insert(seq, bytes).is_none(), "{seq} twice");
        peer.durable(&[seq]);
    }
    received
}

/// Passes datagrams of one dialling site to another, until it is cut.
pub struct Proxy {
    address: SocketAddr,
    open: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> Proxy {
        let front = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let back = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = front.local_addr().expect("an address");
        let open = Arc::new(AtomicBool::new(true));
        let passing = open.clone();
        let task = tokio::spawn(async move {
            let mut dialler = None;
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            loop {
                tokio::select! {
                    Ok((length, from)) = front.recv_from(&mut there) => {
                        dialler = Some(from);
                        if passing.load(Ordering::Relaxed) {
                            let _ = back.send_to(&there[..length], target).await;
                        }
                    }
                    Ok((length, _)) = back.recv_from(&mut here) => {
                        if let Some(dialler) = dialler
                            && passing.load(Ordering::Relaxed)
                        {
                            let _ = front.send_to(&here[..length], dialler).await;
                        }
                    }
                }
            }
        });
        Proxy {
            address,
            open,
            task,
        }
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    pub fn cut(&self) {
        self.open.store(false, Ordering::Relaxed);
    }

    pub fn mend(&self) {
        self.open.store(true, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}
