//! TLS 1.3 with pinned keys, and nothing else: no authorities, no names, no
//! resumption, no early data. Every side shows its certificate; its public key
//! is looked up among the trusted ones, and the handshake's signature proves
//! that the side holds the private key.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::gate::Gate;
use crate::peer::{Identity, SiteKey, shorten};

/// Names of the protocol, by version: the current one first.
pub(crate) const VERSIONS: [u16; 1] = [1];
const SESSION: &[u8] = b"farhaven/1";
const PAIRING: &[u8] = b"farhaven-pair/1";

/// The name of the current version, for messages.
pub(crate) fn protocol_name() -> &'static str {
    "farhaven/1"
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A session between sites that trust each other.
    Session,
    /// Pairing by an invitation.
    Pairing,
}

impl Purpose {
    pub(crate) fn from_protocol(name: &[u8]) -> Option<Purpose> {
        match name {
            SESSION => Some(Purpose::Session),
            PAIRING => Some(Purpose::Pairing),
            _ => None,
        }
    }

    fn protocol(self) -> &'static [u8] {
        match self {
            Purpose::Session => SESSION,
            Purpose::Pairing => PAIRING,
        }
    }
}

/// Whose keys may finish a handshake.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    trusted: RwLock<HashSet<SiteKey>>,
    /// While an invitation is open, any key may come in, to pair only.
    strangers: AtomicBool,
}

impl Admission {
    pub(crate) fn trust(&self, key: SiteKey) {
        let mut trusted = self.trusted.write().unwrap_or_else(PoisonError::into_inner);
        trusted.insert(key);
    }

    pub(crate) fn revoke(&self, key: SiteKey) {
        let mut trusted = self.trusted.write().unwrap_or_else(PoisonError::into_inner);
        trusted.remove(&key);
    }

    pub(crate) fn trusts(&self, key: SiteKey) -> bool {
        let trusted = self.trusted.read().unwrap_or_else(PoisonError::into_inner);
        trusted.contains(&key)
    }

    pub(crate) fn admit_strangers(&self, admit: bool) {
        self.strangers.store(admit, Ordering::Relaxed);
    }
}

/// The key of a certificate. The certificate is only its envelope.
pub(crate) fn key_of(certificate: &CertificateDer<'_>) -> Result<SiteKey, Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(SiteKey::of_public_key(&parsed.subject_public_key_info()))
}

/// The key a peer proved in the handshake of a connection.
pub(crate) fn key_of_connection(connection: &quinn::Connection) -> Option<SiteKey> {
    let shown = connection.peer_identity()?;
    let chain = shown.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    key_of(chain.first()?).ok()
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// Signatures of Ed25519 keys, as every [`Identity`] has one.
#[derive(Debug)]
struct Signatures(WebPkiSupportedAlgorithms);

impl Signatures {
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if signature.scheme != SignatureScheme::ED25519 {
            return Err(Error::InvalidCertificate(CertificateError::BadSignature));
        }
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }
}

/// What rustls asks of the verifiers of both sides alike, in two traits.
macro_rules! verifies_signatures {
    () => {
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
            self.signatures.verify(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    };
}

#[derive(Debug)]
struct VerifyClient {
    admission: Arc<Admission>,
    signatures: Signatures,
}

impl ClientCertVerifier for VerifyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let key = key_of(end_entity)?;
        if self.admission.trusts(key) || self.admission.strangers.load(Ordering::Relaxed) {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(refused())
        }
    }

    verifies_signatures!();
}

#[derive(Debug)]
struct VerifyServer {
    expected: SiteKey,
    signatures: Signatures,
}

impl ServerCertVerifier for VerifyServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if key_of(end_entity)? == self.expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(refused())
        }
    }

    verifies_signatures!();
}

/// Hands out the site's certificate, and says so when a caller speaks another
/// version: the alert it gets cannot carry that sentence.
#[derive(Debug)]
struct OwnCertificate {
    own: Arc<CertifiedKey>,
    gate: Gate,
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let offered: Vec<&[u8]> = hello.alpn().into_iter().flatten().collect();
        let known = offered
            .iter()
            .any(|name| Purpose::from_protocol(name).is_some());
        if !known && let Some(more) = self.gate.pass(Instant::now()) {
            let names: Vec<_> = offered
                .iter()
                .map(|name| String::from_utf8_lossy(name))
                .collect();
            tracing::warn!(
                more,
                "a caller speaks {:?}, this site {}; if it is a site of yours, upgrade the older one",
                shorten(&names.join(", ")),
                protocol_name(),
            );
        }
        Some(self.own.clone())
    }
}

/// The TLS of one site, in both roles.
#[derive(Debug)]
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    certificate: CertificateDer<'static>,
    private_key: PrivatePkcs8KeyDer<'static>,
}

impl Tls {
    pub(crate) fn new(identity: &Identity) -> Tls {
        Tls {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            certificate: CertificateDer::from(identity.certificate().to_vec()),
            private_key: PrivatePkcs8KeyDer::from(identity.private_key().to_vec()),
        }
    }

    fn signatures(&self) -> Signatures {
        Signatures(self.provider.signature_verification_algorithms)
    }

    /// For accepting connections.
    pub(crate) fn server(&self, admission: Arc<Admission>) -> Result<QuicServerConfig, Error> {
        let verifier = VerifyClient {
            admission,
            signatures: self.signatures(),
        };
        let key = PrivateKeyDer::Pkcs8(self.private_key.clone_key());
        let own = CertifiedKey::from_der(vec![self.certificate.clone()], key, &self.provider)?;
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(OwnCertificate {
                own: Arc::new(own),
                gate: Gate::default(),
            }));
        config.alpn_protocols = vec![SESSION.to_vec(), PAIRING.to_vec()];
        // A resumed session would not look at the trusted keys again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        QuicServerConfig::try_from(config)
            .map_err(|_| Error::General("no cipher suite for QUIC".to_owned()))
    }

    /// For dialling the site of one key.
    pub(crate) fn client(
        &self,
        expected: SiteKey,
        purpose: Purpose,
    ) -> Result<QuicClientConfig, Error> {
        self.client_speaking(expected, vec![purpose.protocol().to_vec()])
    }

    pub(super) fn client_speaking(
        &self,
        expected: SiteKey,
        protocols: Vec<Vec<u8>>,
    ) -> Result<QuicClientConfig, Error> {
        let verifier = VerifyServer {
            expected,
            signatures: self.signatures(),
        };
        let key = PrivateKeyDer::Pkcs8(self.private_key.clone_key());
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(vec![self.certificate.clone()], key)?;
        config.alpn_protocols = protocols;
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        QuicClientConfig::try_from(config)
            .map_err(|_| Error::General("no cipher suite for QUIC".to_owned()))
    }
}
