//! A client of a site's HTTP API, over its unix socket or over TLS.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use crate::site::api::{ErrorBody, TOO_LONG};

mod tls;

pub use tls::{TlsError, Trust};

/// Longest answer taken.
const LONGEST_ANSWER: usize = 64 << 20;

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no Farhaven daemon answers at {path}: {source}. If it is another site's, its address, port or fingerprint differ. Start it with: farhaven site run --config FILE; or name its socket with --api"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The daemon said no.
    #[error("{0}")]
    Refused(String),
    /// The guest would stand longer than its policy allows, or not everything
    /// fits before a deadline: nothing was done.
    #[error("{0}")]
    TooLong(String),
    /// The connection broke, or the answer makes no sense.
    #[error("the daemon at {path} gave no proper answer ({why}); see its log")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// How that showed.
        why: String,
    },
}

/// A site's daemon, by its socket or its TLS address.
#[derive(Debug, Clone)]
pub struct Client {
    reach: Reach,
}

#[derive(Debug, Clone)]
enum Reach {
    Socket(PathBuf),
    Tls(tls::Secure),
}

impl Client {
    /// Names the socket; connects with each request.
    pub fn new(socket: &Path) -> Self {
        Self {
            reach: Reach::Socket(socket.to_owned()),
        }
    }

    /// Names `https://host:port`, the file of the token to show, and what the
    /// server is known by; connects with each request.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn over_tls(
        url: &str,
        token_file: Option<&Path>,
        trust: &Trust<'_>,
    ) -> Result<Self, TlsError> {
        let secure = tls::Secure::new(url, token_file, trust)?;
        Ok(Self {
            reach: Reach::Tls(secure),
        })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.broken(e))?;
        self.request(Method::POST, path, body.into()).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", "application/json");
        let unreached = |source| ClientError::Connect {
            path: self.path(),
            source,
        };
        let response = match &self.reach {
            Reach::Socket(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(unreached)?;
                let request = request.header("host", "farhaven").body(Full::new(body));
                self.exchange(stream, request).await?
            }
            Reach::Tls(secure) => {
                let stream = secure.connect().await.map_err(unreached)?;
                let request = request
                    .header("host", &secure.address)
                    .header("authorization", secure.authorization())
                    .body(Full::new(body));
                self.exchange(stream, request).await?
            }
        };
        let status = response.status();
        let answer = Limited::new(response.into_body(), LONGEST_ANSWER)
            .collect()
            .await
            .map_err(|e| self.broken(e))?
            .to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(|e| self.broken(e));
        }
        Err(match serde_json::from_slice::<ErrorBody>(&answer) {
            Ok(body) if body.code.as_deref() == Some(TOO_LONG) => ClientError::TooLong(body.error),
            Ok(body) => ClientError::Refused(body.error),
            Err(_) => {
                let text = String::from_utf8_lossy(&answer[..answer.len().min(300)]).into_owned();
                ClientError::Refused(format!("{status}: {text}"))
            }
        })
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        request: Result<Request<Full<Bytes>>, hyper::http::Error>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = request.map_err(|e| self.broken(e))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.broken(e))?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await;
        response.map_err(|e| self.broken(e))
    }

    /// What it is reached by, for people.
    fn path(&self) -> PathBuf {
        match &self.reach {
            Reach::Socket(socket) => socket.clone(),
            Reach::Tls(secure) => format!("https://{}", secure.address).into(),
        }
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        ClientError::Broken {
            path: self.path(),
            why: why.to_string(),
        }
    }
}
