//! An invitation: what one operator hands the other, as one pasteable token.

use std::fmt;
use std::str::FromStr;

use bytes::{BufMut, Bytes, BytesMut};

use super::{Introduction, NameError, SiteKey, base32};
use crate::fields::Fields;
use crate::frame::{Kind, put_introduction};
use crate::limits;

/// What a token begins with. The digit is its version.
const PREFIX: &str = "fh1-";

/// Bytes of the digest that ends a token, so that a typo is told from a refusal.
const CHECKSUM_BYTES: usize = 8;

/// Who invites, where it is reached, and the one-time secret that proves the invitation.
///
/// Whoever holds it may become a trusted site until it is used or expires:
/// it travels by a way the operators trust.
#[derive(Clone, PartialEq, Eq)]
pub struct Invitation {
    pub(crate) introduction: Introduction,
    pub(crate) key: SiteKey,
    pub(crate) secret: [u8; 32],
    pub(crate) expires_unix: u64,
}

impl Invitation {
    /// An invitation by the site of `key`, with a fresh secret, good until
    /// `expires_unix` (seconds). At least one address is needed: the invited
    /// side dials it.
    ///
    /// # Errors
    /// For a bad name or address, or none at all.
    pub fn new(
        site: &str,
        key: SiteKey,
        addresses: Vec<String>,
        expires_unix: u64,
    ) -> Result<Invitation, NameError> {
        if addresses.is_empty() {
            return Err(NameError::Address(String::new()));
        }
        Ok(Invitation {
            introduction: Introduction::new(site, addresses)?,
            key,
            secret: rand::random(),
            expires_unix,
        })
    }

    /// The name of the site that invites.
    pub fn site(&self) -> &str {
        self.introduction.site()
    }

    /// The key of the site that invites.
    pub fn key(&self) -> SiteKey {
        self.key
    }

    /// Where it is reached.
    pub fn addresses(&self) -> &[String] {
        self.introduction.addresses()
    }

    /// When it ends, in seconds since 1970.
    pub fn expires_unix(&self) -> u64 {
        self.expires_unix
    }

    /// What a token says, without its checksum.
    pub(crate) fn body(&self) -> BytesMut {
        let mut bytes = BytesMut::new();
        bytes.put_slice(&self.secret);
        bytes.put_slice(self.key.as_bytes());
        bytes.put_u64_le(self.expires_unix);
        put_introduction(&mut bytes, &self.introduction);
        bytes
    }
}

impl fmt::Debug for Invitation {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation")
            .field("introduction", &self.introduction)
            .field("key", &self.key)
            .field("expires_unix", &self.expires_unix)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Invitation {
    /// The token, secret included: this is what is pasted at the other site.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&token_of(&self.body()))
    }
}

/// The token of these bytes, whatever they are.
pub(crate) fn token_of(body: &[u8]) -> String {
    let bytes = [body, &checksum(body)].concat();
    format!("{PREFIX}{}", base32::encode(&bytes))
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = blake3::derive_key("farhaven 2026-11 invitation checksum", bytes);
    digest.first_chunk().copied().unwrap_or_default()
}

/// Why a text is not an invitation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not look like one.
    #[error(
        "this is no invitation; one begins with \"fh1-\", as `farhaven pair` printed it at the other site"
    )]
    NotAToken,
    /// It is one of another version.
    #[error(
        "this invitation was made by another version of farhaven; upgrade the older site, then make a new one"
    )]
    OtherVersion,
    /// A character is wrong or missing.
    #[error(
        "the invitation is damaged: a character is wrong or missing; copy the whole token again"
    )]
    Damaged,
}

impl FromStr for Invitation {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.len() > limits::MAX_TOKEN_CHARACTERS {
            return Err(TokenError::NotAToken);
        }
        let (prefix, rest) = text.split_once('-').ok_or(TokenError::NotAToken)?;
        let prefix = prefix.to_ascii_lowercase();
        match prefix.strip_prefix("fh") {
            Some("1") => {}
            Some(version) if version.parse::<u16>().is_ok() => {
                return Err(TokenError::OtherVersion);
            }
            _ => return Err(TokenError::NotAToken),
        }
        let bytes = base32::decode(rest).ok_or(TokenError::Damaged)?;
        let (body, sum) = bytes
            .split_last_chunk::<CHECKSUM_BYTES>()
            .ok_or(TokenError::Damaged)?;
        if checksum(body) != *sum {
            return Err(TokenError::Damaged);
        }
        let mut fields = Fields::new(Kind::PairRequest, Bytes::copy_from_slice(body));
        let parse = |fields: &mut Fields| {
            let secret = fields.array()?;
            let key = SiteKey::from_bytes(fields.array()?);
            let expires_unix = u64::from_le_bytes(fields.array()?);
            let introduction = fields.introduction()?;
            Ok::<_, crate::frame::FrameError>(Invitation {
                introduction,
                key,
                secret,
                expires_unix,
            })
        };
        let invitation = parse(&mut fields).map_err(|_| TokenError::Damaged)?;
        if fields.end().is_err() || invitation.addresses().is_empty() {
            return Err(TokenError::Damaged);
        }
        Ok(invitation)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn invitation() -> Invitation {
        let key = SiteKey::from_bytes([7; 32]);
        let addresses = vec!["dr.example.org:7443".to_owned(), "[::1]:7443".to_owned()];
        Invitation::new("west", key, addresses, 1_800_000_000).expect("valid")
    }

    #[test]
    fn a_token_comes_back_however_it_was_pasted() {
        let invitation = invitation();
        let token = invitation.to_string();
        assert_eq!(token.parse(), Ok(invitation.clone()));
        let wrapped = format!("  {}\n{} ", &token[..40], &token[40..].to_uppercase());
        assert_eq!(wrapped.parse(), Ok(invitation.clone()));
        assert!(!format!("{invitation:?}").contains("secret"));
        assert!(Invitation::new("west", invitation.key, vec![], 0).is_err());
    }

    proptest! {
        #[test]
        fn one_wrong_character_is_noticed(at in any::<prop::sample::Index>(), with in "[0-9a-hjkmnp-tv-z]") {
            let token = invitation().to_string();
            let at = PREFIX.len() + at.index(token.len() - PREFIX.len());
            let mut typo = token.clone();
            typo.replace_range(at..=at, &with);
            prop_assume!(typo != token);
            prop_assert_eq!(typo.parse::<Invitation>(), Err(TokenError::Damaged));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(fh1-)?\\PC{0,300}") {
            let _ = text.parse::<Invitation>();
        }
    }

    #[test]
    fn other_texts_are_told_apart() {
        assert_eq!("hello".parse::<Invitation>(), Err(TokenError::NotAToken));
        assert_eq!(
            "ssh-ed25519 AAAA".parse::<Invitation>(),
            Err(TokenError::NotAToken)
        );
        assert_eq!(
            "fh2-abc".parse::<Invitation>(),
            Err(TokenError::OtherVersion)
        );
        assert_eq!("fh1-".parse::<Invitation>(), Err(TokenError::Damaged));
    }
}
