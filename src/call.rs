//! Calls a URL of somebody else's: health checks, webhooks. HTTP/1.1, over TLS
//! with the host's own certificate authorities where the URL says https.
//!
//! Bounded in everything: the time of the whole call, the answer's head by
//! hyper's own limit, and its body is not read at all: the status is all that
//! counts. A dropped future drops the connection.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// One call.
#[derive(Debug, Clone, Default)]
pub struct Call<'a> {
    /// `GET`, `POST` or `PUT`.
    pub method: &'a str,
    /// `http://` or `https://`.
    pub url: &'a str,
    /// Beside host, length and agent.
    pub headers: &'a [(&'a str, &'a str)],
    /// What is sent.
    pub body: &'a str,
    /// For all of it.
    pub timeout: Duration,
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Not one that can be called.
    #[error("'{0}' cannot be called: {1}")]
    Url(String, String),
    /// Nobody answers there.
    #[error("{0} cannot be reached: {1}")]
    Connect(String, std::io::Error),
    /// No certificates of this host to judge others by.
    #[error(
        "this host has no certificate authorities, so {0} cannot be trusted; install ca-certificates"
    )]
    NoAuthorities(String),
    /// The connection broke, or that is no HTTP.
    #[error("{0} gave no proper answer: {1}")]
    Broken(String, String),
    /// It thinks too long.
    #[error("{0} did not answer within {1:?}")]
    TimedOut(String, Duration),
}

/// Calls, and answers the status.
///
/// # Errors
/// See [`CallError`].
pub async fn call(call: &Call<'_>) -> Result<u16, CallError> {
    match tokio::time::timeout(call.timeout, send(call)).await {
        Ok(answered) => answered,
        Err(_) => Err(CallError::TimedOut(call.url.to_owned(), call.timeout)),
    }
}

async fn send(call: &Call<'_>) -> Result<u16, CallError> {
    let wrong = |why: &str| CallError::Url(call.url.to_owned(), why.to_owned());
    let uri: Uri = call.url.parse().map_err(|e| wrong(&format!("{e}")))?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(wrong("it begins neither with http:// nor with https://")),
    };
    let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
    // An IPv6 address stands in brackets in a URL, and without them elsewhere.
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let place = format!("{host}:{port}");
    let stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|error| CallError::Connect(place.clone(), error))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder()
        .method(Method::from_bytes(call.method.as_bytes()).map_err(|e| wrong(&e.to_string()))?)
        .uri(path)
        .header("host", authority.as_str())
        .header(
            "user-agent",
            concat!("farhaven/", env!("CARGO_PKG_VERSION")),
        );
    for (name, value) in call.headers {
        request = request.header(*name, *value);
    }
    let body = Full::new(Bytes::copy_from_slice(call.body.as_bytes()));
    let request = request.body(body).map_err(|e| wrong(&e.to_string()))?;
    if !tls {
        return exchange(stream, request, &place).await;
    }
    let name = ServerName::try_from(host.clone()).map_err(|e| wrong(&e.to_string()))?;
    let config = authorities().ok_or_else(|| CallError::NoAuthorities(place.clone()))?;
    let stream = TlsConnector::from(config)
        .connect(name, stream)
        .await
        .map_err(|error| CallError::Connect(place.clone(), error))?;
    exchange(stream, request, &place).await
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
    place: &str,
) -> Result<u16, CallError> {
    let broken = |error: hyper::Error| CallError::Broken(place.to_owned(), error.to_string());
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(broken)?;
    // Driven beside the request, not by a task of its own: it ends with this future.
    let mut asked = std::pin::pin!(sender.send_request(request));
    let answer = tokio::select! {
        answer = &mut asked => answer,
        // Closed right behind the answer, which is here by then, or never comes.
        _ = connection => asked.await,
    };
    Ok(answer.map_err(broken)?.status().as_u16())
}

/// The host's own; read once.
fn authorities() -> Option<Arc<ClientConfig>> {
    static CONFIG: OnceLock<Option<Arc<ClientConfig>>> = OnceLock::new();
    CONFIG
        .get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let (added, _) =
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .ok()?
                .with_root_certificates(roots)
                .with_no_client_auth();
            (added > 0).then(|| Arc::new(config))
        })
        .clone()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn answering(answer: &'static str) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?x=1", listener.local_addr().unwrap());
        let heard = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = vec![0; 4096];
            let read = stream.read(&mut heard).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&heard[..read]).into_owned()
        });
        (url, heard)
    }

    #[tokio::test]
    async fn the_status_and_what_was_sent() {
        let (url, heard) = answering("HTTP/1.1 204 No Content\r\n\r\n").await;
        let asked = Call {
            method: "POST",
            url: &url,
            headers: &[("idempotency-key", "r/s")],
            body: "{}",
            timeout: Duration::from_secs(20),
        };
        assert_eq!(call(&asked).await.unwrap(), 204);
        let heard = heard.await.unwrap();
        assert!(heard.starts_with("POST /hook?x=1 HTTP/1.1"), "{heard}");
        assert!(heard.contains("idempotency-key: r/s"), "{heard}");
    }

    #[tokio::test]
    async fn what_is_no_answer_is_told() {
        let (url, _heard) = answering("SSH-2.0-OpenSSH\r\n").await;
        let asked = |url: String| async move {
            let asked = Call {
                method: "GET",
                url: &url,
                timeout: Duration::from_millis(500),
                ..Call::default()
            };
            call(&asked).await.unwrap_err().to_string()
        };
        assert!(asked(url).await.contains("no proper answer"));
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = silent.local_addr().unwrap();
        assert!(asked(format!("http://{place}/")).await.contains("within"));
        drop(silent);
        assert!(
            asked(format!("http://{place}/"))
                .await
                .contains("cannot be reached")
        );
        assert!(
            asked("ftp://x/".to_owned())
                .await
                .contains("cannot be called")
        );
    }
}
