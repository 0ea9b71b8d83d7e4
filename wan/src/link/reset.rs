//! QUIC's stateless reset, with keys that outlive the process: a site that was
//! killed and started again tells its peers so at their next packet, and they
//! dial at once instead of waiting for the silence to last.

use std::sync::Arc;

use quinn::EndpointConfig;
use quinn_proto::HashedConnectionIdGenerator;
use quinn_proto::crypto::{CryptoError, HmacKey};

use crate::peer::Identity;

/// Bytes of a signature.
const SIGNATURE_BYTES: usize = 32;

/// Signs connection identifiers; derived from the site's private key.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0)
            .update(data)
            .finalize_xof()
            .fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        SIGNATURE_BYTES
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // blake3::Hash compares in constant time.
        match <[u8; SIGNATURE_BYTES]>::try_from(signature) {
            Ok(signature) if expected == blake3::Hash::from_bytes(signature) => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

/// The endpoint's configuration for a site.
pub(crate) fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let derive = |purpose| blake3::derive_key(purpose, identity.private_key());
    let reset = ResetKey(derive("farhaven 2026-11 QUIC stateless reset"));
    let identifiers = derive("farhaven 2026-11 QUIC connection identifiers");
    // Only tells packets that cannot be of this site from others; no secret rests on it.
    let identifiers = identifiers
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let mut config = EndpointConfig::new(Arc::new(reset));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(identifiers)));
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_of_one_key_and_one_text() {
        let key = ResetKey([1; 32]);
        let mut signature = [0; SIGNATURE_BYTES];
        key.sign(b"identifier", &mut signature);
        assert!(key.verify(b"identifier", &signature).is_ok());
        assert!(key.verify(b"identifies", &signature).is_err());
        assert!(key.verify(b"identifier", &signature[..16]).is_err());
        assert!(ResetKey([2; 32]).verify(b"identifier", &signature).is_err());
    }
}
