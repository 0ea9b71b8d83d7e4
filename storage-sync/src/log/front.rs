//! The front of a segment, and the mark before each of its batches.
//!
//! What a guest holds lies in the batches, and may look like one: a guest knows all that a
//! batch is made of. Where a batch is broken and its length is lost, the next one is
//! known by its mark, made with a secret of the store that no guest can read.

use crate::codec::{MAGIC, hash_of};
use crate::limits::BATCH_HEADER;

/// Bytes before the first mark: the same twice, so that a damaged one leaves the other.
pub(super) const FRONT: u64 = 2 * BATCH_HEADER as u64;
/// Bytes of a mark.
pub(super) const MARK: u64 = 16;
/// To those before it a front is a batch of this layout: they refuse the store.
const VERSION: u16 = 2;
/// Where the secret lies in a front.
const SECRET: usize = 56;
/// Where its hash does.
const HASH: usize = 88;

/// What the marks of a store are made with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Secret([u8; 32]);

impl Secret {
    pub(super) fn new() -> Secret {
        Secret(rand::random())
    }

    /// One of the two copies in a front.
    fn copy(&self) -> [u8; BATCH_HEADER] {
        let mut copy = [0; BATCH_HEADER];
        copy[..4].copy_from_slice(&MAGIC);
        copy[4..6].copy_from_slice(&VERSION.to_le_bytes());
        copy[SECRET..HASH].copy_from_slice(&self.0);
        let hash = hash_of(&copy, &[]);
        copy[HASH..].copy_from_slice(&hash);
        copy
    }

    /// Makes the mark of the batch with this hash that begins at this offset.
    pub(super) fn mark(&self, segment: u32, offset: u64, hash: &[u8]) -> [u8; MARK as usize] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&segment.to_le_bytes());
        hasher.update(&offset.to_le_bytes());
        hasher.update(hash);
        let mut mark = [0; MARK as usize];
        hasher.finalize_xof().fill(&mut mark);
        mark
    }

    /// What is written of a batch at `offset`, with what comes before it.
    pub(super) fn framed(&self, segment: u32, offset: u64, hash: &[u8], batch: &[u8]) -> Vec<u8> {
        let before = before(offset);
        let mut framed = Vec::with_capacity(before as usize + batch.len());
        if offset == 0 {
            framed.extend_from_slice(&self.copy());
            framed.extend_from_slice(&self.copy());
        }
        framed.extend_from_slice(&self.mark(segment, offset + before, hash));
        framed.extend_from_slice(batch);
        framed
    }
}

/// Bytes before a batch that is written at `offset`: its mark, and the front before the first.
pub(super) fn before(offset: u64) -> u64 {
    MARK + if offset == 0 { FRONT } else { 0 }
}

/// What the front of a segment tells.
#[derive(Clone, Copy)]
pub(super) struct Front {
    pub(super) secret: Secret,
    /// Are both copies as they were written?
    pub(super) whole: bool,
}

/// Reads a front; `None`: there is none, or both copies are damaged.
pub(super) fn parse(bytes: &[u8]) -> Option<Front> {
    let copies = [0, BATCH_HEADER].map(|at| {
        let copy = bytes.get(at..at + BATCH_HEADER)?;
        let secret = Secret(*copy.get(SECRET..HASH)?.first_chunk()?);
        (secret.copy() == *copy).then_some(secret)
    });
    let secret = copies[0].or(copies[1])?;
    let whole = copies == [Some(secret); 2];
    Some(Front { secret, whole })
}

/// A first segment of these, each with its mark, whatever they are.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn segment_of(pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        let hash = piece.get(HASH..BATCH_HEADER).unwrap_or_default();
        let framed = Secret([7; 32]).framed(1, bytes.len() as u64, hash, piece);
        bytes.extend(framed);
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::codec::newer;

    #[test]
    fn the_bytes_are_those_of_the_page() {
        let secret = Secret([7; 32]);
        let framed = secret.framed(3, 0, &[9; 32], b"batch");
        let mut fixed = b"FHbt\x02\0".to_vec();
        fixed.resize(56, 0);
        fixed.extend([7; 32]);
        let hash = *blake3::hash(&fixed).as_bytes();
        fixed.extend(hash);
        assert_eq!(framed[..120], fixed);
        assert_eq!(framed[120..240], fixed);
        let told = [&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[9; 32]].concat();
        let mark = blake3::keyed_hash(&[7; 32], &told);
        assert_eq!(framed[240..256], mark.as_bytes()[..16]);
        assert_eq!(framed[256..], *b"batch");
        let later = secret.framed(3, 256, &[9; 32], b"batch");
        assert_eq!((later.len(), before(256)), (21, 16));
    }

    #[test]
    fn a_front_outlives_damage_to_one_of_its_copies() {
        let whole = Secret([7; 32]).framed(1, 0, &[9; 32], b"");
        assert!(parse(&whole).unwrap().whole);
        for at in 0..FRONT as usize {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            let front = parse(&flipped).unwrap();
            assert!(front.secret == Secret([7; 32]) && !front.whole, "byte {at}");
        }
        assert!(parse(&vec![0; whole.len()]).is_none());
    }

    #[test]
    fn who_does_not_know_fronts_takes_one_for_a_newer_batch() {
        let front = Secret([7; 32]).framed(1, 0, &[9; 32], b"");
        assert_eq!(newer(&front).unwrap(), "layout 2");
    }
}
