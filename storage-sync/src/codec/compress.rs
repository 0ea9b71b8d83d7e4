//! The body's compression: one zstd frame for the whole group, or raw bytes.
//!
//! What does not compress is found by a [`Probe`] before it costs anything:
//! noise is stored raw at a tenth of the time that zstd takes to give up.

use std::io;

use zstd::bulk::{Compressor, Decompressor};

/// Bytes of a body that are counted first, in pieces from all over it.
const SAMPLE: usize = 4096;
const PIECE: usize = 64;
/// Bits a byte over which the sample looks like noise: noise has 7.95 in 4096 bytes.
const NOISE_BITS: f32 = 7.8;
/// Then one unit in so many is compressed to be sure.
const PART: usize = 8;

/// How a body is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is: it would not shrink.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// A reusable decompressor.
pub struct Expander(Option<Decompressor<'static>>);

impl Expander {
    /// Makes its working memory on first use.
    pub fn new() -> Expander {
        Expander(None)
    }
}

impl Default for Expander {
    fn default() -> Expander {
        Expander::new()
    }
}

impl std::fmt::Debug for Expander {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Expander")
    }
}

/// Expands `body` into `out`, replacing it: exactly `raw` bytes or an error.
pub(crate) fn expand(
    expander: &mut Expander,
    codec: Codec,
    body: &[u8],
    raw: usize,
    out: &mut Vec<u8>,
) -> Result<(), Option<io::Error>> {
    out.clear();
    if codec == Codec::Raw {
        out.extend_from_slice(body);
        return if out.len() == raw { Ok(()) } else { Err(None) };
    }
    let context = match &mut expander.0 {
        Some(context) => context,
        none => none.insert(Decompressor::new().map_err(Some)?),
    };
    out.resize(raw, 0);
    // zstd writes into this slice only, so the declared size is a hard bound.
    let size = context
        .decompress_to_buffer(body, &mut out[..])
        .map_err(Some)?;
    if size == raw { Ok(()) } else { Err(None) }
}

/// Compresses `body` into `out`, replacing it; [`Codec::Raw`] when that does not pay.
pub(crate) fn shrink(context: &mut Compressor<'static>, body: &[u8], out: &mut Vec<u8>) -> Codec {
    out.clear();
    // One byte less than raw is the largest result worth having: zstd gives up
    // ("destination too small") when it cannot keep to that, and raw is right then.
    out.resize(body.len().saturating_sub(1), 0);
    match context.compress_to_buffer(body, &mut out[..]) {
        Ok(size) if size > 0 => {
            out.truncate(size);
            Codec::Zstd
        }
        _ => {
            out.clear();
            out.extend_from_slice(body);
            Codec::Raw
        }
    }
}

/// Finds out cheaply what would not compress, and what units cost alone.
pub(crate) struct Probe {
    fast: Option<Compressor<'static>>,
    part: Vec<u8>,
    packed: Vec<u8>,
}

impl Probe {
    pub(crate) fn new() -> Probe {
        Probe {
            fast: None,
            part: Vec::new(),
            packed: Vec::new(),
        }
    }

    /// Bytes that zstd makes of `bytes` at its fastest useful level; its own
    /// length when they do not shrink.
    pub(crate) fn cost(&mut self, bytes: &[u8]) -> usize {
        self.packed.resize(bytes.len().saturating_sub(1), 0);
        let fast = match &mut self.fast {
            Some(fast) => fast,
            none => match Compressor::new(1) {
                Ok(made) => none.insert(made),
                Err(_) => return bytes.len(),
            },
        };
        let size = fast.compress_to_buffer(bytes, &mut self.packed[..]);
        size.unwrap_or(bytes.len())
    }

    /// Would compressing this body be a waste of time?
    pub(crate) fn incompressible(&mut self, body: &[u8]) -> bool {
        if body.len() < SAMPLE || entropy(body) < NOISE_BITS {
            return false;
        }
        // Bytes evenly spread may still repeat: compress some to be sure.
        let mut part = std::mem::take(&mut self.part);
        part.clear();
        let units = body.chunks(4096);
        units
            .step_by(PART)
            .for_each(|unit| part.extend_from_slice(unit));
        let cost = self.cost(&part);
        let waste = cost * 100 >= part.len() * 99;
        self.part = part;
        waste
    }
}

/// Bits a byte in a sample of the body.
fn entropy(body: &[u8]) -> f32 {
    let mut counts = [0u16; 256];
    let step = (body.len() / (SAMPLE / PIECE)).max(PIECE);
    let mut total = 0u16;
    for start in (0..body.len()).step_by(step).take(SAMPLE / PIECE) {
        for &byte in body[start..].iter().take(PIECE) {
            counts[usize::from(byte)] += 1;
            total += 1;
        }
    }
    let total = f32::from(total);
    let sum: f32 = counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| f32::from(count) * f32::from(count).log2())
        .sum();
    total.log2() - sum / total
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rand::{RngCore, SeedableRng};

    use super::*;

    fn noise(bytes: usize, seed: u64) -> Vec<u8> {
        let mut noise = vec![0; bytes];
        rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut noise);
        noise
    }

    #[test]
    fn noise_is_told_from_what_compresses() {
        let mut probe = Probe::new();
        for seed in 0..20 {
            assert!(probe.incompressible(&noise(256 * 1024, seed)));
            assert!(probe.incompressible(&noise(4096, seed)));
        }
        // Evenly spread bytes that repeat every 512.
        let repeats = noise(512, 1).repeat(512);
        assert!(!probe.incompressible(&repeats));
        let text: Vec<u8> = noise(256 * 1024, 2).iter().map(|b| b % 64 + 32).collect();
        assert!(!probe.incompressible(&text));
        assert!(!probe.incompressible(&vec![0; 256 * 1024]));
        // A fifth of the units compresses: worth it.
        let mut mixed = noise(256 * 1024, 3);
        for unit in mixed.chunks_mut(4096).step_by(5) {
            unit[..3000].fill(7);
        }
        assert!(!probe.incompressible(&mixed));
        assert!(!probe.incompressible(&[1, 2, 3]));
    }
}
