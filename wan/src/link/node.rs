//! One site's end of all its links.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::{
    AsyncUdpSocket, Endpoint, Incoming, Runtime, ServerConfig, TokioRuntime, TransportConfig,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use super::close::{CloseCode, describe};
use super::gate::Gate;
use super::handle::Peer;
use super::options::LinkOptions;
use super::pair::{PairError, accept_invitation, answer, now_unix};
use super::port::{Port, PortSocket};
use super::remote::Remote;
use super::reset::endpoint_config;
use super::socket::{SocketBuffers, bind};
use super::tls::{Admission, Purpose, Tls, key_of_connection};
use super::{connection, dial};
use crate::limits;
use crate::peer::pairing::{InviteError, OpenInvitations};
use crate::peer::{Identity, Introduction, Invitation, PeerRecord, SiteKey};

/// Longest that [`Node::shutdown`] waits for its farewells to be sent.
const SHUTDOWN: Duration = Duration::from_secs(3);

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Address and UDP port to listen on; dialling uses the same socket.
    pub listen: SocketAddr,
    /// The links' settings.
    pub link: LinkOptions,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket.
    #[error(
        "cannot listen on UDP {address}: another process may use the port, or the address is not this machine's"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The identity.
    #[error(
        "the site's key cannot be used for TLS; restore it from a backup, or remove it and pair again"
    )]
    Identity(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A pairing that another site completed with an invitation of this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pairing {
    /// The other site. It is trusted once [`Node::trust`] is given this.
    pub record: PeerRecord,
}

/// Open invitations, and how this site introduces itself in answer to them.
#[derive(Default)]
pub(crate) struct Invitations {
    pub(crate) open: OpenInvitations,
    introduction: Option<Introduction>,
}

impl Invitations {
    pub(crate) fn introduction(&self) -> Option<&Introduction> {
        self.introduction.as_ref()
    }
}

/// What every task of a node shares.
pub(crate) struct Site {
    pub(crate) key: SiteKey,
    name: String,
    incarnation: u64,
    pub(crate) endpoint: Endpoint,
    pub(crate) local_address: SocketAddr,
    pub(crate) options: NodeOptions,
    pub(crate) tls: Tls,
    pub(crate) transport: Arc<TransportConfig>,
    pub(crate) admission: Arc<Admission>,
    invitations: Mutex<Invitations>,
    peers: Mutex<HashMap<SiteKey, Peer>>,
    pairings: mpsc::UnboundedSender<Pairing>,
    /// For lines about those who are not trusted.
    strangers: Gate,
}

impl Site {
    pub(crate) fn invitations(&self) -> MutexGuard<'_, Invitations> {
        self.invitations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<SiteKey, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// At most one for each invitation, so the queue is as short as those are few.
    pub(crate) fn paired(&self, pairing: Pairing) {
        let _ = self.pairings.send(pairing);
    }

    fn close(&self) {
        for (_, peer) in self.peers().drain() {
            peer.remote.close(CloseCode::Bye, "the site stops");
        }
        self.endpoint
            .close(CloseCode::Bye.number(), b"the site stops");
    }
}

/// One site's end of all its links. Dropping it closes them.
pub struct Node {
    site: Arc<Site>,
    buffers: SocketBuffers,
    pairings: tokio::sync::Mutex<mpsc::UnboundedReceiver<Pairing>>,
}

impl Node {
    /// Binds the socket and begins to accept. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be bound or the identity cannot be used.
    pub fn start(identity: &Identity, options: NodeOptions) -> Result<Node, StartError> {
        let listen = |source| StartError::Listen {
            address: options.listen,
            source,
        };
        let (socket, buffers) =
            bind(options.listen, options.link.socket_buffer_bytes).map_err(listen)?;
        let socket = TokioRuntime.wrap_udp_socket(socket).map_err(listen)?;
        Node::start_over(identity, options, socket, buffers)
    }

    /// As [`Node::start`], through a port in place of a UDP socket.
    ///
    /// # Errors
    /// When the identity cannot be used.
    pub fn start_on(
        identity: &Identity,
        options: NodeOptions,
        port: Arc<dyn Port>,
    ) -> Result<Node, StartError> {
        let bytes = options.link.socket_buffer_bytes;
        let buffers = SocketBuffers {
            requested: bytes,
            receive: bytes,
            send: bytes,
        };
        Node::start_over(identity, options, Arc::new(PortSocket(port)), buffers)
    }

    fn start_over(
        identity: &Identity,
        options: NodeOptions,
        socket: Arc<dyn AsyncUdpSocket>,
        buffers: SocketBuffers,
    ) -> Result<Node, StartError> {
        let listen = |source| StartError::Listen {
            address: options.listen,
            source,
        };
        let tls = Tls::new(identity);
        let admission = Arc::new(Admission::default());
        let crypto = tls
            .server(admission.clone())
            .map_err(|error| StartError::Identity(Box::new(error)))?;
        let transport = Arc::new(options.link.transport());
        let mut server = ServerConfig::with_crypto(Arc::new(crypto));
        server
            .transport_config(transport.clone())
            .max_incoming(2 * limits::MAX_HANDSHAKES)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(1 << 20);
        let endpoint = Endpoint::new_with_abstract_socket(
            endpoint_config(identity),
            Some(server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(listen)?;
        let local_address = endpoint.local_addr().map_err(listen)?;
        let (pairings, completed) = mpsc::unbounded_channel();
        let site = Arc::new(Site {
            key: identity.key(),
            name: identity.site().to_owned(),
            incarnation: rand::random(),
            endpoint,
            local_address,
            options,
            tls,
            transport,
            admission,
            invitations: Mutex::default(),
            peers: Mutex::default(),
            pairings,
            strangers: Gate::default(),
        });
        tokio::spawn(accept(site.clone()));
        Ok(Node {
            site,
            buffers,
            pairings: tokio::sync::Mutex::new(completed),
        })
    }

    /// The address that was bound, with the port the system chose if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.site.local_address
    }

    /// What the system gave as socket buffers.
    pub fn socket_buffers(&self) -> SocketBuffers {
        self.buffers
    }

    /// The random number of this process that peers see.
    pub fn incarnation(&self) -> u64 {
        self.site.incarnation
    }

    /// Opens an invitation of this site: one site may pair with it until it
    /// expires. Opening the same one again (after a restart) is fine.
    ///
    /// # Errors
    /// When it is another site's, has expired, or too many are open.
    pub fn invite(&self, invitation: &Invitation) -> Result<(), InviteError> {
        if invitation.key() != self.site.key {
            return Err(InviteError::NotOurs);
        }
        let mut invitations = self.site.invitations();
        invitations.open.open(now_unix(), invitation)?;
        invitations.introduction = Some(invitation.introduction.clone());
        self.site.admission.admit_strangers(true);
        Ok(())
    }

    /// Accepts another site's invitation: dials it, proves the secret both ways,
    /// and returns what to give to [`Node::trust`]. May be repeated when the
    /// connection failed midway.
    ///
    /// # Errors
    /// With a sentence that says what to do.
    pub async fn accept_invitation(
        &self,
        invitation: &Invitation,
        own: &Introduction,
    ) -> Result<PeerRecord, PairError> {
        accept_invitation(&self.site, invitation, own).await
    }

    /// The next pairing another site completed with an invitation of this one.
    pub async fn pairing(&self) -> Option<Pairing> {
        self.pairings.lock().await.recv().await
    }

    /// Trusts a site from now on, and keeps a link to it up. A site that is
    /// trusted already gets its record replaced; the link is the same.
    pub fn trust(&self, record: PeerRecord) -> Peer {
        let mut peers = self.site.peers();
        if let Some(peer) = peers.get(&record.key) {
            *peer
                .remote
                .record
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = record;
            return peer.clone();
        }
        let own = (self.site.key, self.site.name.clone(), self.site.incarnation);
        let remote = Remote::new(record, own, self.site.options.link.clone());
        let peer = Peer {
            remote: remote.clone(),
        };
        peers.insert(remote.key, peer.clone());
        self.site.admission.trust(remote.key);
        tokio::spawn(dial::keep_up(self.site.clone(), remote));
        peer
    }

    /// The link to a trusted site.
    pub fn peer(&self, key: SiteKey) -> Option<Peer> {
        self.site.peers().get(&key).cloned()
    }

    /// Ends the trust in a site: its link is closed, its key refused, and an
    /// invitation it used is of no more use. False when it was not trusted.
    pub fn revoke(&self, key: SiteKey) -> bool {
        self.site.admission.revoke(key);
        self.site.invitations().open.revoke(key);
        let removed = self.site.peers().remove(&key);
        if let Some(peer) = &removed {
            peer.remote.close(
                CloseCode::Revoked,
                "this site ended the trust; pair again to connect",
            );
        }
        removed.is_some()
    }

    /// Closes every link, tells the peers, and waits a bounded time until that is
    /// sent. The port is free again when the node is dropped.
    pub async fn shutdown(&self) {
        self.site.close();
        let _ = timeout(SHUTDOWN, self.site.endpoint.wait_idle()).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.site.close();
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("key", &self.site.key)
            .field("address", &self.site.local_address)
            .finish_non_exhaustive()
    }
}

/// Takes what comes in, a bounded number of handshakes at once.
async fn accept(site: Arc<Site>) {
    let handshakes = Arc::new(Semaphore::new(limits::MAX_HANDSHAKES));
    while let Some(incoming) = site.endpoint.accept().await {
        let strangers = site.invitations().open.admits_strangers(now_unix());
        site.admission.admit_strangers(strangers);
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let under_way = limits::MAX_HANDSHAKES - handshakes.available_permits();
        if under_way > limits::HANDSHAKES_BEFORE_RETRY && incoming.may_retry() {
            // Under load, an address proves that it can be answered before it
            // costs a handshake.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(greet(site.clone(), incoming, permit));
    }
}

/// From the handshake to the task that owns the connection.
async fn greet(site: Arc<Site>, incoming: Incoming, permit: OwnedSemaphorePermit) {
    let address = incoming.remote_address();
    let limit = site.options.link.handshake_timeout;
    let connection = match incoming.accept() {
        Ok(mut connecting) => match timeout(limit, &mut connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                if let Some(more) = site.strangers.pass(Instant::now()) {
                    tracing::info!(%address, more, "handshake failed: {}", describe(&error));
                }
                return;
            }
            Err(_) => return,
        },
        Err(error) => {
            tracing::debug!(%address, "not accepted: {error}");
            return;
        }
    };
    let purpose = connection
        .handshake_data()
        .and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|data| Purpose::from_protocol(data.protocol.as_deref()?));
    match (purpose, key_of_connection(&connection)) {
        (Some(Purpose::Pairing), Some(key)) => answer(site, connection, key).await,
        (Some(Purpose::Session), Some(key)) => {
            let peer = site.peers().get(&key).cloned();
            match peer {
                Some(peer) => {
                    // From here on the peer's own limit counts.
                    drop(permit);
                    let (_, why) = connection::run(peer.remote.clone(), connection, false).await;
                    tracing::info!(peer = %peer.record().site, "link ended: {why}");
                }
                None => {
                    if let Some(more) = site.strangers.pass(Instant::now()) {
                        tracing::warn!(%key, %address, more, "refused: this key is not paired");
                    }
                    connection.close(
                        CloseCode::Untrusted.number(),
                        b"this site does not trust your key; pair the two sites again",
                    );
                }
            }
        }
        _ => connection.close(CloseCode::Protocol.number(), b"no purpose, or no key"),
    }
}
