//! Answers to a source that asks which of its units are here, by digest.
//!
//! It tells the first bytes of digests; it is told places, and the whole
//! digests of what lies there. Those are computed from the batches, which were
//! verified when they were read: from the hints comes only where to look.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::hints::prefix_of;
use super::{Prefix, Reader, Store, held};
use crate::codec::{Body, Slot};
use crate::digest::DigestKey;
use crate::limits::{ANSWER_BATCHES, ASKED, BATCH_BODY_RAW};
use crate::unit::{Digest, UNIT};

/// From so many hits in a batch on, all of its digests are told: what is asked
/// next lies there as well.
const NEIGHBOURS: usize = 4;

/// What is here of what was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Batches that hold some of it, those that hold the most first.
    pub batches: Vec<HeldBatch>,
    /// Only digests whose sixth byte ends in so many zero bits are worth asking for.
    pub sampling: u8,
}

/// A batch, and digests of some of its units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBatch {
    /// Its number.
    pub seq: u64,
    /// Which slots: a bit each.
    pub slots: u64,
    /// Their digests, in order.
    pub digests: Vec<Digest>,
}

impl Store {
    /// Says where content lies whose digests begin like these, under the
    /// source's key. At most [`ASKED`] are looked for, and at most
    /// [`ANSWER_BATCHES`] batches told. Batches that a prune is about to remove
    /// are not. While hints are still being made some are not found.
    pub fn find(&self, key: &DigestKey, asked: &[Prefix]) -> Held {
        let inner = &self.0;
        let mut hits: BTreeMap<u64, usize> = BTreeMap::new();
        let wanted: BTreeSet<Prefix> = asked.iter().take(ASKED).copied().collect();
        let sampling = {
            let hints = held(&inner.hints);
            if !hints.is_of(key) {
                return Held::default();
            }
            for prefix in &wanted {
                hints
                    .find(*prefix)
                    .for_each(|seq| *hits.entry(seq).or_default() += 1);
            }
            hints.sampling()
        };
        let mut likely: Vec<(usize, u64)> = hits.into_iter().map(|(seq, n)| (n, seq)).collect();
        likely.sort_unstable_by(|a, b| b.cmp(a));
        let mut answer = Held {
            batches: Vec::new(),
            sampling,
        };
        let (mut reader, mut body) = (Reader::default(), Body::new());
        for (_, seq) in likely.into_iter().take(ANSWER_BATCHES) {
            let known = held(&inner.hints).answers.get(&seq).cloned();
            let digests = match known {
                Some(digests) => digests,
                None => match inner.expand(seq, &mut reader, &mut body) {
                    Ok(()) => by_slot(key, &body),
                    // Pruned meanwhile, or damaged: then it is not here.
                    Err(error) => {
                        tracing::debug!(seq, %error, "a hint leads to nothing");
                        continue;
                    }
                },
            };
            answer.batches.extend(matching(seq, &digests, &wanted));
            let mut hints = held(&inner.hints);
            if hints.is_of(key) {
                hints.keep_answer(seq, digests);
            }
        }
        let state = held(&inner.state);
        answer.batches.retain(|batch| {
            !state.retiring.contains(&batch.seq) && inner.log.locate(batch.seq).is_some()
        });
        answer
    }
}

/// Digests of the literals of a batch; differences are left out.
fn by_slot(key: &DigestKey, body: &Body) -> Arc<[Digest]> {
    debug_assert!(body.literals().len() <= BATCH_BODY_RAW && BATCH_BODY_RAW.is_multiple_of(UNIT));
    let mut literals = Vec::new();
    key.digests(body.literals(), &mut literals);
    let mut literals = literals.into_iter();
    let slots = (0..body.len() as u8).map(|slot| match body.slot(slot) {
        Some(Slot::Whole(_)) => literals.next().unwrap_or(Digest::UNKNOWN),
        _ => Digest::UNKNOWN,
    });
    slots.collect()
}

/// What of a batch is told to who wants these.
fn matching(seq: u64, digests: &[Digest], wanted: &BTreeSet<Prefix>) -> Option<HeldBatch> {
    let is_wanted = |digest: &Digest| wanted.contains(&prefix_of(digest));
    let known = |digest: &&Digest| !matches!(**digest, Digest::UNKNOWN | Digest::ZERO_UNIT);
    let hits = digests.iter().filter(known).filter(|d| is_wanted(d));
    let all = hits.count() >= NEIGHBOURS;
    let mut batch = HeldBatch {
        seq,
        slots: 0,
        digests: Vec::new(),
    };
    for (slot, digest) in digests.iter().enumerate().take(64) {
        if known(&digest) && (all || is_wanted(digest)) {
            batch.slots |= 1 << slot;
            batch.digests.push(*digest);
        }
    }
    (batch.slots != 0).then_some(batch)
}
