//! The API over TLS 1.3: who shows the token of a [`Tokens`] entry is let in.
//! The certificate is the configured one, or one that the site makes itself;
//! its public key's digest is what clients pin.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use farhaven_policies::site::Api;
use farhaven_wan::link::Gate;
use farhaven_wan::{Identity, SiteKey};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::version::TLS13;

use super::rights::Refused;
use super::serve::{CONNECTIONS, PATIENCE, Served, converse};

/// Connections of one address at a time: one client cannot take all places.
const OF_ADDRESS: usize = 32;

/// Wrong tokens of one address within [`WINDOW`] after which it is told to wait.
const FAILURES: u32 = 10;

/// How long wrong tokens are remembered.
const WINDOW: Duration = Duration::from_secs(60);

/// Addresses whose wrong tokens are remembered.
const REMEMBERED: usize = 1024;

/// The listener, and what it shows.
pub(super) struct Secure {
    listener: TcpListener,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    fingerprint: SiteKey,
}

/// What is known of those who knock.
#[derive(Default)]
struct Door {
    wrong: Mutex<HashMap<IpAddr, (u32, Instant)>>,
    open: Mutex<HashMap<IpAddr, usize>>,
    lines: Gate,
}

impl Secure {
    /// Binds the address; nothing is accepted yet.
    ///
    /// # Errors
    /// When the address is taken, or certificate and key are not fit.
    pub(super) async fn bind(
        address: SocketAddr,
        api: &Api,
        own: &Path,
        site: &str,
    ) -> io::Result<Self> {
        let (chain, key) = match api.certificate.as_os_str().is_empty() {
            true => own_certificate(own, site)?,
            false => configured(&api.certificate, &api.key)?,
        };
        let first = chain
            .first()
            .ok_or_else(|| io::Error::other("api.certificate has no certificate in it"))?;
        let fingerprint = SiteKey::of_certificate(first)
            .ok_or_else(|| io::Error::other("the API's certificate cannot be read"))?;
        let unfit = |e| io::Error::other(format!("the API's certificate and key: {e}"));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(unfit)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let listener = TcpListener::bind(address)
            .await
            .map_err(|e| io::Error::new(e.kind(), format!("api.listen is {address}, but {e}")))?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            acceptor: TlsAcceptor::from(Arc::new(config)),
            fingerprint,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn fingerprint(&self) -> SiteKey {
        self.fingerprint
    }

    /// Accepts until the daemon stops.
    pub(super) async fn serve(
        self,
        router: Router,
        served: Arc<Served>,
        mut stopped: watch::Receiver<bool>,
    ) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let door = Arc::new(Door::default());
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let accepted = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => break,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "the API's address accepts nothing at this moment");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Who finds no place is sent away at once: nobody waits unseen.
            let place = places.clone().try_acquire_owned();
            let (Ok(place), Some(entered)) = (place, Entered::by(&door, from.ip())) else {
                door.say(from, "there is no place for one more connection");
                continue;
            };
            let (acceptor, router, served) =
                (self.acceptor.clone(), router.clone(), served.clone());
            let (door, stopped) = (door.clone(), stopped.clone());
            connections.spawn(async move {
                let _held = (place, entered);
                greet(stream, from, acceptor, router, served, door, stopped).await;
            });
        }
        while connections.join_next().await.is_some() {}
    }
}

async fn greet(
    stream: TcpStream,
    from: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    served: Arc<Served>,
    door: Arc<Door>,
    stopped: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return door.say(from, &format!("its TLS handshake failed: {error}")),
        Err(_) => return door.say(from, "its TLS handshake did not come in time"),
    };
    let who = move |request: &hyper::Request<hyper::body::Incoming>| {
        let shown = request.headers().get(AUTHORIZATION);
        let shown = shown.and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| value.strip_prefix("Bearer "));
        match token.and_then(|token| served.tokens.caller(token.trim())) {
            Some(caller) => Ok(caller),
            None => Err(door.refuse(from, token.is_some())),
        }
    };
    converse(stream, router, stopped, who).await;
}

impl Door {
    /// A line about somebody who is not let in, one a second at most.
    fn say(&self, from: SocketAddr, what: &str) {
        if let Some(more) = self.lines.pass(Instant::now()) {
            tracing::warn!(%from, more, "the API refused a client: {what}");
        }
    }

    /// Nobody that is known. A right token is let in however many wrong ones
    /// came from the same address: else anybody behind it could lock all out.
    fn refuse(&self, from: SocketAddr, shown: bool) -> Refused {
        self.say(from, "it shows no token that counts");
        if self.failed(network(from.ip()), Instant::now()) {
            return (
                StatusCode::TOO_MANY_REQUESTS,
                format!("too many wrong tokens; wait {WINDOW:?}"),
            );
        }
        let why = match shown {
            true => "this token does not count here: it is wrong, expired or revoked",
            false => {
                "this needs a token, as the header `Authorization: Bearer TOKEN`; `farhaven --token-file FILE` sends it"
            }
        };
        (StatusCode::UNAUTHORIZED, why.to_owned())
    }

    /// One more wrong token; are they too many?
    fn failed(&self, from: IpAddr, now: Instant) -> bool {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if wrong.len() >= REMEMBERED && !wrong.contains_key(&from) {
            wrong.retain(|_, (_, since)| now.duration_since(*since) < WINDOW);
            if wrong.len() >= REMEMBERED {
                // They come from everywhere: nobody in particular is remembered.
                wrong.clear();
            }
        }
        let (count, since) = wrong.entry(from).or_insert((0, now));
        if now.duration_since(*since) >= WINDOW {
            (*count, *since) = (0, now);
        }
        *count = count.saturating_add(1);
        *count > FAILURES
    }
}

/// A connection of an address, until it is dropped.
struct Entered(Arc<Door>, IpAddr);

/// Who is counted as one: an address, or the IPv6 network of one host.
fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(from) => IpAddr::V6((u128::from(from) & !(u128::from(u64::MAX))).into()),
        from => from,
    }
}

impl Entered {
    fn by(door: &Arc<Door>, from: IpAddr) -> Option<Self> {
        let from = network(from);
        let mut open = door.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(from).or_insert(0);
        if *count >= OF_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Self(door.clone(), from))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.1);
            }
        }
    }
}

type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Made on the first start, and kept: a key of its own, not the one peers pin.
fn own_certificate(directory: &Path, site: &str) -> io::Result<Chain> {
    let identity = Identity::load_or_create(directory, site).map_err(io::Error::other)?;
    let certificate = CertificateDer::from(identity.certificate().to_vec());
    let key = PrivatePkcs8KeyDer::from(identity.private_key().to_vec());
    Ok((vec![certificate], key.into()))
}

fn configured(certificate: &Path, key: &Path) -> io::Result<Chain> {
    let unfit = |what: &'static str, path: &Path, why: String| {
        io::Error::other(format!("{what} is {}: {why}", path.display()))
    };
    let mode = std::fs::metadata(key)
        .map_err(|e| unfit("api.key", key, e.to_string()))?
        .permissions()
        .mode();
    if mode & 0o007 != 0 {
        let why =
            "others may read it; run: chmod o= on it, and replace it if others did".to_owned();
        return Err(unfit("api.key", key, why));
    }
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unfit("api.certificate", certificate, e.to_string()))?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|e| unfit("api.key", key, e.to_string()))?;
    Ok((chain, private))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_tokens_are_counted_by_address_and_forgotten() {
        let (door, now) = (Door::default(), Instant::now());
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for n in 0..FAILURES {
            assert!(!door.failed(one, now), "{n}");
        }
        assert!(door.failed(one, now));
        assert!(!door.failed(other, now));
        assert!(!door.failed(one, now + WINDOW));
        // However many addresses there are, so many are kept.
        for n in 0..5000_u32 {
            door.failed(IpAddr::from(n.to_be_bytes()), now);
        }
        let kept = door
            .wrong
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        assert!(kept <= REMEMBERED, "{kept}");
    }

    #[test]
    fn one_address_does_not_take_all_places() {
        let door = Arc::new(Door::default());
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut held: Vec<_> = (0..OF_ADDRESS).map(|_| Entered::by(&door, one)).collect();
        assert!(held.iter().all(Option::is_some));
        assert!(Entered::by(&door, one).is_none());
        assert!(Entered::by(&door, other).is_some());
        held.pop();
        assert!(Entered::by(&door, one).is_some());
    }

    /// One host has a whole network of them.
    #[test]
    fn addresses_of_one_ipv6_network_are_counted_as_one() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let one = network(address("2001:db8:0:7::1"));
        assert_eq!(network(address("2001:db8:0:7:ffff::2")), one);
        assert_ne!(network(address("2001:db8:0:8::1")), one);
        // Each by itself, however it is written.
        assert_eq!(network(address("::ffff:10.0.0.1")), address("10.0.0.1"));
        assert_ne!(network(address("10.0.0.1")), network(address("10.0.0.2")));

        let door = Arc::new(Door::default());
        let by = |n: usize, net: &str| address(&format!("2001:db8:0:{net}::{n:x}"));
        let held: Vec<_> = (0..OF_ADDRESS)
            .map(|n| Entered::by(&door, by(n, "7")))
            .collect();
        assert!(held.iter().all(Option::is_some));
        assert!(Entered::by(&door, by(OF_ADDRESS, "7")).is_none());
        assert!(Entered::by(&door, by(0, "8")).is_some());
        drop(held);
        assert!(Entered::by(&door, by(0, "7")).is_some());
    }
}
