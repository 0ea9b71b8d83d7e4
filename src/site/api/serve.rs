//! The listeners of the API: always the unix socket, and TLS over TCP where the
//! configuration names an address. Each connection is bounded in header, body
//! and time, and so is their number; a request says who asks ([`Caller`])
//! before any handler sees it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode};
use farhaven_wan::SiteKey;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};

use super::rights::{self, Caller, Refused, refusal};
use super::tls::Secure;
use super::tokens::Tokens;
use super::{GRACE, LONGEST_BODY, router};
use crate::site::{Site, files};

/// Connections at a time, each of the two ways in.
pub(super) const CONNECTIONS: usize = 256;

/// How long a client may take to tell the head of a request, and how long to
/// tell its body; a connection that asks nothing is closed after it, too.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Header lines of a request.
const HEADERS: usize = 64;

/// Bytes that a connection buffers.
const BUFFER: usize = 32 << 10;

/// How long the accepting of connections rests after the system refused one.
const REST: Duration = Duration::from_millis(100);

/// What handlers may know of how the API is served.
pub(super) struct Served {
    pub(super) tokens: Tokens,
    /// The TLS address, if there is one.
    pub(super) listen: Option<SocketAddr>,
    /// The digest of its public key.
    pub(super) fingerprint: Option<SiteKey>,
}

/// Serves the API until `stop` is ready. A socket file left by a daemon that
/// died is replaced; a living daemon's is not.
///
/// # Errors
/// When the socket cannot be made, the TLS address not be listened on, or its
/// certificate, key or the tokens not be read.
pub async fn serve(
    site: Arc<Site>,
    socket: &Path,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let identity = site.config.site.state_dir.join("identity");
    let tokens = Tokens::open(&identity.join("api-tokens.json"))?;
    let secure = match site.config.api.listen_address() {
        None => None,
        Some(address) => {
            let api = &site.config.api;
            let name = &site.config.site.name;
            Some(Secure::bind(address, api, &identity.join("api"), name).await?)
        }
    };
    let listener = bind(socket)?;
    let served = Arc::new(Served {
        tokens,
        listen: secure.as_ref().map(Secure::address),
        fingerprint: secure.as_ref().map(Secure::fingerprint),
    });
    // Around every route, wherever it was added.
    let router = router(site, served.clone()).layer(axum::middleware::from_fn(rights::enforce));
    let (stopping, stopped) = watch::channel(false);
    let mut ways = tokio::task::JoinSet::new();
    ways.spawn(of_host(listener, router.clone(), stopped.clone()));
    if let Some(secure) = secure {
        tracing::info!(
            address = %secure.address(),
            fingerprint = %secure.fingerprint(),
            "the API is served over TLS, to holders of tokens"
        );
        ways.spawn(secure.serve(router, served, stopped));
    }
    stop.await;
    stopping.send_replace(true);
    // Requests under way come to their end; a client that never ends its
    // request must not keep the daemon.
    let _ = tokio::time::timeout(GRACE, async { while ways.join_next().await.is_some() {} }).await;
    ways.shutdown().await;
    let _ = std::fs::remove_file(socket);
    Ok(())
}

fn bind(socket: &Path) -> std::io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            "another daemon answers on it",
        ));
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(directory) = socket.parent() {
        files::private_directory(directory)?;
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whoever may open the socket's file is let in.
async fn of_host(listener: UnixListener, router: Router, mut stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let place = places.clone().acquire_owned().await;
                (place, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (Ok(place), Ok((stream, _))) => {
                let user = stream.peer_cred().ok().map(|peer| peer.uid());
                let caller = Caller::of_host(user);
                let (router, stopped) = (router.clone(), stopped.clone());
                connections.spawn(async move {
                    let _place = place;
                    converse(stream, router, stopped, move |_| Ok(caller.clone())).await;
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "the API's socket accepts nothing at this moment");
                tokio::time::sleep(REST).await;
            }
            (Err(_), _) => break,
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Serves one connection. `who` says who asks, or what is answered to nobody.
pub(super) async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    mut stopped: watch::Receiver<bool>,
    who: impl Fn(&hyper::Request<Incoming>) -> Result<Caller, Refused> + Clone + Send + 'static,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (router, caller) = (router.clone(), who(&request));
        async move {
            let caller = match caller {
                Ok(caller) => caller,
                Err((status, why)) => {
                    // Who is not known keeps no place.
                    let mut refused = refusal(status, why);
                    let close = HeaderValue::from_static("close");
                    refused.headers_mut().insert(CONNECTION, close);
                    return Ok::<_, Infallible>(refused);
                }
            };
            let mut request = match whole_body(request).await {
                Ok(request) => request,
                Err((status, why)) => return Ok(refusal(status, why)),
            };
            request.extensions_mut().insert(caller);
            let service = TowerToHyperService::new(router);
            hyper::service::Service::call(&service, request).await
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_headers(HEADERS)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stopped.wait_for(|stopped| *stopped) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of the API ended early");
    }
}

/// Reads the body before anything is done with the request: within its limit,
/// and not for ever.
async fn whole_body(request: hyper::Request<Incoming>) -> Result<Request, Refused> {
    let (head, body) = request.into_parts();
    let read = axum::body::to_bytes(Body::new(body), LONGEST_BODY);
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(Ok(bytes)) => Ok(Request::from_parts(head, Body::from(bytes))),
        Ok(Err(_)) => Err((
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body was cut off, or is over {LONGEST_BODY} bytes"),
        )),
        Err(_) => Err((
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not come within {PATIENCE:?}"),
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_refused_has_the_connection_closed() {
        let (mut client, stream) = tokio::io::duplex(1 << 16);
        let (_stopping, stopped) = watch::channel(false);
        let nobody = |_: &hyper::Request<Incoming>| {
            Err((StatusCode::UNAUTHORIZED, "no token counts".to_owned()))
        };
        let served = tokio::spawn(converse(stream, Router::new(), stopped, nobody));
        // One request more than it gets an answer to.
        let asked = "GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2);
        client.write_all(asked.as_bytes()).await.unwrap();
        let mut told = String::new();
        client.read_to_string(&mut told).await.unwrap();
        served.await.unwrap();
        assert!(told.starts_with("HTTP/1.1 401"), "{told}");
        let head = told.to_ascii_lowercase();
        assert!(head.contains("\r\nconnection: close\r\n"), "{told}");
        assert_eq!(told.matches("HTTP/1.1").count(), 1, "{told}");
    }
}
