//! A site's API over TLS: which server is believed, and the token that is shown.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use farhaven_wan::SiteKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

/// Longest file of a token.
const LONGEST_TOKEN: u64 = 4096;

/// Why a site's API cannot be reached by what was given.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not an address.
    #[error("{0:?} is no address of an API; write https://HOST:PORT, or the path of a unix socket")]
    Address(String),
    /// No token.
    #[error(
        "over TLS the API asks for a token; name its file with --token-file (farhaven token add makes one at the site)"
    )]
    NoToken,
    /// The token's file.
    #[error("the token file {path} cannot be used: {why}")]
    Token {
        /// The file.
        path: String,
        /// Why, and what to do.
        why: String,
    },
    /// Nothing to know the server by.
    #[error(
        "name what the API's server is known by: --api-fingerprint, as `farhaven token add` printed it, or --api-ca, the authority that signed its certificate"
    )]
    NoTrust,
    /// What it is known by cannot be used.
    #[error("{0}")]
    Trust(String),
}

/// How a server is known.
#[derive(Debug, Clone, Default)]
pub struct Trust<'a> {
    /// The digest of its public key.
    pub fingerprint: Option<SiteKey>,
    /// A PEM file of authorities.
    pub authority: Option<&'a Path>,
}

/// An API over TLS.
#[derive(Clone)]
pub(super) struct Secure {
    /// `host:port`.
    pub(super) address: String,
    name: ServerName<'static>,
    connector: TlsConnector,
    token: String,
}

impl fmt::Debug for Secure {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Secure {
    /// `url` is `https://host:port`.
    pub(super) fn new(
        url: &str,
        token_file: Option<&Path>,
        trust: &Trust<'_>,
    ) -> Result<Self, TlsError> {
        let bad = || TlsError::Address(url.to_owned());
        let address = url.strip_prefix("https://").ok_or_else(bad)?;
        let address = address.trim_end_matches('/');
        let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
        port.parse::<u16>().map_err(|_| bad())?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| bad())?;
        let provider = Arc::new(ring::default_provider());
        let wrong = |e: Error| TlsError::Trust(e.to_string());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(wrong)?;
        let mut config = match (trust.fingerprint, trust.authority) {
            (Some(expected), _) => {
                let pinned = Arc::new(Pinned { expected, provider });
                let builder = builder.dangerous();
                builder
                    .with_custom_certificate_verifier(pinned)
                    .with_no_client_auth()
            }
            (None, Some(file)) => builder
                .with_root_certificates(authorities(file)?)
                .with_no_client_auth(),
            (None, None) => return Err(TlsError::NoTrust),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            address: address.to_owned(),
            name,
            connector: TlsConnector::from(Arc::new(config)),
            token: read_token(token_file.ok_or(TlsError::NoToken)?)?,
        })
    }

    pub(super) async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(&self.address).await?;
        self.connector.connect(self.name.clone(), stream).await
    }

    /// The header that shows the token.
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}", self.token)
    }
}

fn authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let unfit = |why: String| TlsError::Trust(format!("--api-ca {}: {why}", file.display()));
    let mut roots = RootCertStore::empty();
    let found = CertificateDer::pem_file_iter(file).map_err(|e| unfit(e.to_string()))?;
    for certificate in found {
        let certificate = certificate.map_err(|e| unfit(e.to_string()))?;
        roots.add(certificate).map_err(|e| unfit(e.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(unfit("it has no certificate in it".to_owned())),
        false => Ok(roots),
    }
}

fn read_token(path: &Path) -> Result<String, TlsError> {
    let unfit = |why: String| TlsError::Token {
        path: path.display().to_string(),
        why,
    };
    let facts = std::fs::metadata(path).map_err(|e| unfit(e.to_string()))?;
    if facts.permissions().mode() & 0o077 != 0 {
        return Err(unfit(
            "others may read it; run chmod 600 on it, and have the token replaced if others did"
                .to_owned(),
        ));
    }
    if facts.len() > LONGEST_TOKEN {
        return Err(unfit("it is too long for a token".to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(|e| unfit(e.to_string()))?;
    let token = text.trim();
    let sound = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    match sound {
        true => Ok(token.to_owned()),
        false => Err(unfit("there is no token in it, as one line".to_owned())),
    }
}

/// Believes the holder of one key, whatever its certificate says.
#[derive(Debug)]
struct Pinned {
    expected: SiteKey,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match SiteKey::of_certificate(end_entity) {
            Some(key) if key == self.expected => Ok(ServerCertVerified::assertion()),
            _ => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
        }
    }

    // What TLS 1.2 would need; it is never negotiated.
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
