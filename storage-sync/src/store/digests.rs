//! Digests of what the log holds: a source that lost its index asks for them.

use super::{Reader, Store, Waiting, held};
use crate::codec::{Body, Slot};
use crate::digest::DigestKey;
use crate::limits::IMAGE_SEQ;
use crate::unit::Digest;

/// Digests of batches in the log, for a source that rebuilds its index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DigestPage {
    /// Batch number and the digest of each of its literals.
    pub batches: Vec<(u64, Vec<Digest>)>,
    /// Where to go on; `None` at the end.
    pub next: Option<u64>,
}

impl Store {
    /// Digests, under the source's key, of the literals of up to `most` batches
    /// from number `from` on. Damaged batches are left out.
    pub fn live_digests(&self, key: &DigestKey, from: u64, most: usize) -> DigestPage {
        let seqs = self
            .0
            .log
            .seqs_in(from.min(IMAGE_SEQ)..IMAGE_SEQ, most.max(1));
        let next = match seqs.last() {
            Some(last) if seqs.len() >= most.max(1) => Some(last + 1),
            _ => None,
        };
        let mut page = DigestPage {
            batches: Vec::with_capacity(seqs.len()),
            next,
        };
        let mut reader = Reader::default();
        let mut body = Body::new();
        let mut waiting = Waiting::new();
        for seq in seqs {
            if held(&self.0.state).retiring.contains(&seq) {
                continue;
            }
            if let Err(error) = self.0.expand(seq, &mut reader, &mut body) {
                tracing::warn!(seq, %error, "a batch is left out of the dedup index");
                continue;
            }
            let mut digests = Vec::with_capacity(body.len());
            match body.all_whole() {
                Some(units) => key.digests(units, &mut digests),
                None => {
                    let at = page.batches.len();
                    digests.resize(body.len(), Digest::UNKNOWN);
                    for (index, digest) in (0..).zip(&mut digests) {
                        match body.slot(index) {
                            Some(Slot::Whole(unit)) => *digest = key.of(unit),
                            Some(Slot::Difference(delta, bytes)) => {
                                waiting.add(&delta, bytes, (at, usize::from(index)));
                            }
                            None => {}
                        }
                    }
                }
            }
            page.batches.push((seq, digests));
        }
        // What cannot be rebuilt stays unknown: nobody will refer to it.
        let batches = &mut page.batches;
        waiting.rebuild(
            &self.0,
            &mut reader,
            &mut |(at, index), unit| {
                if let Some(digest) = batches.get_mut(at).and_then(|(_, all)| all.get_mut(index)) {
                    *digest = key.of(unit);
                }
            },
            &mut |_, _| true,
        );
        page
    }
}
