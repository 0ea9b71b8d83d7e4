//! Digests of units: keyed BLAKE3, cut to 16 bytes, many units at once.
//!
//! BLAKE3 of one 4 KiB unit fills only four of the machine's hash lanes. Here
//! the same 1 KiB chunk of 16 units goes through all lanes together, and the
//! three parent nodes of each unit are made the same way: three times the
//! speed, the same result (a property test compares them).

use blake3::IncrementCounter;
use blake3::platform::{Platform, words_from_le_bytes_32};

use crate::unit::{Digest, UNIT};

// Domain flags of the BLAKE3 paper, section 2.3; the crate keeps them private.
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

/// Units hashed together.
const LANES: usize = 16;
const CHUNK: usize = 1024;
const CHUNKS: usize = UNIT / CHUNK;

static ZEROS: [u8; UNIT] = [0; UNIT];

/// The secret under which a pair of sites computes digests.
#[derive(Clone)]
pub struct DigestKey {
    bytes: [u8; 32],
    words: [u32; 8],
    platform: Platform,
    zero: [u8; 32],
}

impl std::fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DigestKey(secret)")
    }
}

impl DigestKey {
    /// The key with these bytes.
    pub fn new(bytes: [u8; 32]) -> DigestKey {
        DigestKey {
            bytes,
            words: words_from_le_bytes_32(&bytes),
            platform: Platform::detect(),
            zero: *blake3::keyed_hash(&bytes, &ZEROS).as_bytes(),
        }
    }

    /// A new key from the system's random source.
    pub fn random() -> DigestKey {
        DigestKey::new(rand::random())
    }

    /// The key's bytes, to be sent to the paired peer only.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// Digest of one unit (4 KiB). Other lengths give [`Digest::UNKNOWN`].
    pub fn of(&self, unit: &[u8]) -> Digest {
        if unit.len() != UNIT {
            return Digest::UNKNOWN;
        }
        self.cut(blake3::keyed_hash(&self.bytes, unit).as_bytes())
    }

    /// Appends the digest of each whole unit in `units`.
    pub fn digests(&self, units: &[u8], out: &mut Vec<Digest>) {
        let (units, _) = units.as_chunks::<UNIT>();
        out.reserve(units.len());
        for units in units.chunks(LANES) {
            self.lanes(units, out);
        }
    }

    fn cut(&self, hash: &[u8; 32]) -> Digest {
        if *hash == self.zero {
            return Digest::ZERO_UNIT;
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash[..16]);
        Digest(digest)
    }

    /// Up to [`LANES`] units: four rounds of chunks, then two levels of parents.
    fn lanes(&self, units: &[[u8; UNIT]], out: &mut Vec<Digest>) {
        let count = units.len();
        let mut chunks = [[[0u8; 32]; LANES]; CHUNKS];
        for (index, values) in chunks.iter_mut().enumerate() {
            let mut inputs: [&[u8; CHUNK]; LANES] = [zero_chunk(); LANES];
            for (input, unit) in inputs.iter_mut().zip(units) {
                *input = &unit.as_chunks::<CHUNK>().0[index];
            }
            self.platform.hash_many(
                &inputs[..count],
                &self.words,
                index as u64,
                IncrementCounter::No,
                KEYED_HASH,
                CHUNK_START,
                CHUNK_END,
                values.as_flattened_mut(),
            );
        }
        let mut pairs = [[[0u8; 32]; 2]; LANES];
        for (half, children) in chunks.as_chunks::<2>().0.iter().enumerate() {
            let values = self.parents(&children[0], &children[1], count, 0);
            for (pair, value) in pairs.iter_mut().zip(values) {
                pair[half] = value;
            }
        }
        let left = pairs.map(|pair| pair[0]);
        let right = pairs.map(|pair| pair[1]);
        let roots = self.parents(&left, &right, count, ROOT);
        out.extend(roots[..count].iter().map(|root| self.cut(root)));
    }

    fn parents(
        &self,
        left: &[[u8; 32]; LANES],
        right: &[[u8; 32]; LANES],
        count: usize,
        flag: u8,
    ) -> [[u8; 32]; LANES] {
        let mut blocks = [[0u8; 64]; LANES];
        for (block, (left, right)) in blocks.iter_mut().zip(left.iter().zip(right)) {
            block[..32].copy_from_slice(left);
            block[32..].copy_from_slice(right);
        }
        let inputs = blocks.each_ref();
        let mut values = [[0u8; 32]; LANES];
        self.platform.hash_many(
            &inputs[..count],
            &self.words,
            0,
            IncrementCounter::No,
            KEYED_HASH | PARENT | flag,
            0,
            0,
            values.as_flattened_mut(),
        );
        values
    }
}

fn zero_chunk() -> &'static [u8; CHUNK] {
    &ZEROS.as_chunks::<CHUNK>().0[0]
}

/// Is the unit all zeros? Reads eight bytes at a time and stops early.
pub fn is_zero(unit: &[u8]) -> bool {
    let (blocks, rest) = unit.as_chunks::<64>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reference(key: &[u8; 32], unit: &[u8]) -> Digest {
        if is_zero(unit) {
            return Digest::ZERO_UNIT;
        }
        let mut cut = [0; 16];
        cut.copy_from_slice(&blake3::keyed_hash(key, unit).as_bytes()[..16]);
        Digest(cut)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn many_units_hash_as_each_alone(key: [u8; 32], seed: u64, count in 0usize..70) {
            use rand::{RngCore, SeedableRng};
            let mut random = rand::rngs::StdRng::seed_from_u64(seed);
            let mut units = vec![0u8; count * UNIT + (seed % 100) as usize];
            random.fill_bytes(&mut units);
            if count > 2 {
                units[UNIT..2 * UNIT].fill(0);
            }
            let digest_key = DigestKey::new(key);
            let mut digests = vec![Digest::UNKNOWN];
            digest_key.digests(&units, &mut digests);
            prop_assert_eq!(digests.len(), count + 1);
            for (unit, digest) in units.chunks_exact(UNIT).zip(&digests[1..]) {
                prop_assert_eq!(*digest, reference(&key, unit));
                prop_assert_eq!(*digest, digest_key.of(unit));
            }
        }
    }

    #[test]
    fn zeros_are_seen_and_one_bit_is_not_zero() {
        let mut unit = vec![0u8; UNIT];
        assert!(is_zero(&unit));
        for at in [0, 63, 64, 2047, UNIT - 1] {
            unit[at] = 1;
            assert!(!is_zero(&unit));
            unit[at] = 0;
        }
        assert_eq!(DigestKey::new([1; 32]).of(&unit), Digest::ZERO_UNIT);
    }

    #[test]
    fn a_short_unit_has_no_digest() {
        assert_eq!(DigestKey::new([1; 32]).of(&[1; 100]), Digest::UNKNOWN);
    }
}
