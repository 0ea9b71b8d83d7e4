//! Why connections end: the codes on the wire, and the sentences for operators.

use quinn::{ConnectionError, VarInt};

use crate::peer::shorten;

/// What a side says when it closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum CloseCode {
    /// The site stops, in good order.
    Bye = 0,
    /// The peer sent something that is not of the protocol, or over a limit.
    Protocol = 1,
    /// The peer's key is not trusted here.
    Untrusted = 2,
    /// A newer connection of the same peer took over.
    Replaced = 3,
    /// No common version.
    Version = 4,
    /// The trust was ended here.
    Revoked = 5,
    /// The application could not keep the data it was handed.
    Refused = 6,
    /// The greeting did not come in time.
    Slow = 7,
    /// Pairing was refused.
    PairingRefused = 8,
    /// Pairing is done.
    Paired = 9,
}

impl CloseCode {
    pub(crate) fn number(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }
}

/// TLS alerts that mean something to an operator.
const ALERT_ACCESS_DENIED: u64 = 0x100 + 49;
const ALERT_CERTIFICATE_REQUIRED: u64 = 0x100 + 116;
const ALERT_NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

/// Whether the peer refused this site's key in the handshake.
pub(crate) fn refused_key(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::ConnectionClosed(close) => {
            let code = u64::from(close.error_code);
            code == ALERT_ACCESS_DENIED || code == ALERT_CERTIFICATE_REQUIRED
        }
        _ => false,
    }
}

/// Why a connection ended, and what to do about it.
pub(crate) fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let said = shorten(&String::from_utf8_lossy(&close.reason));
            match u32::try_from(close.error_code.into_inner()) {
                Ok(code) if code == CloseCode::Bye as u32 => "the peer stopped".to_owned(),
                Ok(code) if code == CloseCode::Replaced as u32 => {
                    "a newer connection took over".to_owned()
                }
                _ if said.is_empty() => format!("the peer closed with code {}", close.error_code),
                _ => format!("the peer closed: {said}"),
            }
        }
        ConnectionError::ConnectionClosed(close) => match u64::from(close.error_code) {
            ALERT_NO_APPLICATION_PROTOCOL => format!(
                "the peer does not speak {}; upgrade the older of the two sites",
                super::tls::protocol_name()
            ),
            ALERT_ACCESS_DENIED | ALERT_CERTIFICATE_REQUIRED => {
                "the peer does not trust this site's key; pair the two sites again".to_owned()
            }
            _ => format!("the peer closed: {}", shorten(&close.to_string())),
        },
        ConnectionError::TransportError(error) => match u64::from(error.code) {
            ALERT_NO_APPLICATION_PROTOCOL => format!(
                "the peer does not speak {}; upgrade the older of the two sites",
                super::tls::protocol_name()
            ),
            ALERT_ACCESS_DENIED => "the site at this address has another key than the paired one; \
                 correct the address, or pair again if the peer was reinstalled"
                .to_owned(),
            _ => format!("the link failed: {}", shorten(&error.to_string())),
        },
        ConnectionError::TimedOut => {
            "no answer; check that the peer runs and that UDP reaches its address".to_owned()
        }
        ConnectionError::Reset => "the peer restarted".to_owned(),
        ConnectionError::LocallyClosed => "closed by this site".to_owned(),
        ConnectionError::VersionMismatch => {
            "the peer speaks another version of QUIC; upgrade the older of the two sites".to_owned()
        }
        ConnectionError::CidsExhausted => "out of connection identifiers".to_owned(),
    }
}
