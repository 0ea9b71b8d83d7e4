//! Who a site is to another: its key, its name, its addresses, and how two
//! sites come to know each other.
//!
//! A site makes its own key ([`Identity`]); the key's digest ([`SiteKey`]) is
//! what others pin. An [`Invitation`] carries key, addresses and a one-time
//! secret from one operator to the other; [`pairing`] proves that both sides
//! hold the secret. What remains of it is a [`PeerRecord`] on each side.

mod base32;
mod identity;
mod invitation;
pub mod pairing;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits;

pub use identity::{Identity, IdentityError};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use invitation::token_of;
pub use invitation::{Invitation, TokenError};

/// What one site knows a site by: the BLAKE3 digest of its public key (of the
/// DER SubjectPublicKeyInfo, so it outlives the certificate).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteKey([u8; 32]);

impl SiteKey {
    /// The key's digest, as bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> SiteKey {
        SiteKey(bytes)
    }

    /// The bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Of the public key in a DER certificate; `None` when it is none.
    pub fn of_certificate(certificate: &[u8]) -> Option<SiteKey> {
        let certificate = rustls::pki_types::CertificateDer::from(certificate);
        let parsed = rustls::server::ParsedCertificate::try_from(&certificate).ok()?;
        Some(SiteKey::of_public_key(&parsed.subject_public_key_info()))
    }

    /// Of a DER SubjectPublicKeyInfo.
    pub(crate) fn of_public_key(info: &[u8]) -> SiteKey {
        SiteKey(*blake3::hash(info).as_bytes())
    }
}

impl fmt::Display for SiteKey {
    /// Groups of four letters and digits, as one reads them over the phone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, character) in base32::encode(&self.0).chars().enumerate() {
            if at > 0 && at % 4 == 0 {
                f.write_str("-")?;
            }
            write!(f, "{character}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteKey({self})")
    }
}

/// A text that is not a site key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a site key; copy it whole from `farhaven site show` at the other site")]
pub struct SiteKeyError;

impl FromStr for SiteKey {
    type Err = SiteKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > 128 {
            return Err(SiteKeyError);
        }
        let bytes = base32::decode(text).ok_or(SiteKeyError)?;
        Ok(SiteKey(bytes.try_into().map_err(|_| SiteKeyError)?))
    }
}

impl Serialize for SiteKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SiteKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a name or an address is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The site's name.
    #[error(
        "{0:?} is no site name: use 1 to {max} letters, digits, '-', '_' or '.', the first a letter or digit",
        max = limits::MAX_SITE_NAME_BYTES
    )]
    Site(String),
    /// An address.
    #[error(
        "{0:?} is no address: write host:port, for example dr.example.org:7443 or [2001:db8::1]:7443"
    )]
    Address(String),
    /// Too many of them.
    #[error("{0} addresses; a site has at most {max}", max = limits::MAX_ADDRESSES)]
    TooManyAddresses(usize),
}

/// Checks a site's name.
///
/// # Errors
/// When it is empty, too long, or has other characters than its rule allows.
pub fn check_site_name(name: &str) -> Result<(), NameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let fine = name.len() <= limits::MAX_SITE_NAME_BYTES
        && name
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(allowed);
    if fine {
        Ok(())
    } else {
        Err(NameError::Site(shorten(name)))
    }
}

/// Checks an address of the form `host:port`.
///
/// # Errors
/// When it has no host, no port above 0, or characters that belong in neither.
pub fn check_address(address: &str) -> Result<(), NameError> {
    let fine = address.len() <= limits::MAX_ADDRESS_BYTES
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            let named = !host.is_empty()
                && host
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            let literal = host
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'))
                .is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok());
            (named || literal) && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
    if fine {
        Ok(())
    } else {
        Err(NameError::Address(shorten(address)))
    }
}

/// A text of unknown origin, fit for one line of a message.
pub(crate) fn shorten(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .take(200)
        .collect()
}

/// How a site introduces itself when pairing: its name, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Introduction {
    site: String,
    addresses: Vec<String>,
}

impl Introduction {
    /// Checks name and addresses. A site that only dials has no address.
    ///
    /// # Errors
    /// For a bad name or address, or too many addresses.
    pub fn new(site: impl Into<String>, addresses: Vec<String>) -> Result<Introduction, NameError> {
        let site = site.into();
        check_site_name(&site)?;
        if addresses.len() > limits::MAX_ADDRESSES {
            return Err(NameError::TooManyAddresses(addresses.len()));
        }
        for address in &addresses {
            check_address(address)?;
        }
        Ok(Introduction { site, addresses })
    }

    /// The site's name.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Where it is reached, as `host:port`.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }
}

/// A site this one trusts. Kept by the application, given back to
/// [`crate::Node::trust`] at every start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRecord {
    /// The site's name.
    pub site: String,
    /// Its pinned key.
    pub key: SiteKey,
    /// Where it is reached, as `host:port`, tried in this order.
    pub addresses: Vec<String>,
    /// Whether this side dials. Of two sites, the one that accepted the invitation does.
    pub dial: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_key_survives_display(bytes in any::<[u8; 32]>()) {
            let key = SiteKey::from_bytes(bytes);
            prop_assert_eq!(key.to_string().parse(), Ok(key));
            let json = serde_json::to_string(&key).expect("a string");
            prop_assert_eq!(serde_json::from_str::<SiteKey>(&json).expect("a key"), key);
        }

        #[test]
        fn arbitrary_names_never_panic(text in "\\PC{0,100}") {
            let _ = check_site_name(&text);
            let _ = check_address(&text);
            let _ = text.parse::<SiteKey>();
        }
    }

    #[test]
    fn names_and_addresses() {
        for good in ["a", "fra-1", "Site_2.example"] {
            assert_eq!(check_site_name(good), Ok(()));
        }
        for bad in ["", "-a", "a b", "a/b", "..", "é", &"x".repeat(65)] {
            assert!(check_site_name(bad).is_err(), "{bad}");
        }
        for good in ["127.0.0.1:1", "dr.example.org:7443", "[::1]:65535"] {
            assert_eq!(check_address(good), Ok(()));
        }
        for bad in [
            "",
            ":1",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "::1:5",
            "[x]:5",
            "a b:5",
        ] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }
}
