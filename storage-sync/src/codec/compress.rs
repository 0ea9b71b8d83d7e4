//! The body's compression: one zstd frame for the whole group, or raw bytes.

use std::io;

use zstd::bulk::{Compressor, Decompressor};

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
