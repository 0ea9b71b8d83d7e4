//! The running hash over a point's batches: both sides compute it, and a seal
//! is refused unless they agree.

/// BLAKE3 over (number, hash) of a point's batches, in the order of their numbers.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    hasher: blake3::Hasher,
    count: u64,
}

impl Chain {
    /// The chain of no batches.
    pub fn new() -> Chain {
        Chain::default()
    }

    /// Adds the next batch.
    pub fn push(&mut self, seq: u64, hash: &[u8; 32]) {
        self.hasher.update(&seq.to_le_bytes()).update(hash);
        self.count += 1;
    }

    /// Batches so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The hash so far.
    pub fn finish(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}
