//! Differences back to units, many at once: those that share a base's batch
//! are rebuilt together, so that each batch is read and expanded once.
//!
//! A base is a literal, told whole: one step, whatever a peer wrote. Memory is
//! what waits ([`Waiting::is_full`]) and one expanded batch.

use std::collections::BTreeMap;

use super::{ExpandError, Inner, Reader};
use crate::codec::{Body, Delta, Slot, delta};
use crate::limits::DELTAS_WAITING_BYTES;
use crate::unit::{Place, UNIT};

/// A difference that came to nothing.
#[derive(Debug, thiserror::Error)]
#[error("the difference from {base:?} cannot be rebuilt")]
pub(crate) struct Unbuilt {
    /// What it was told against.
    pub(crate) base: Place,
    /// Why that cannot be read; `None`: it can, and the result is wrong.
    pub(crate) source: Option<ExpandError>,
}

/// Makes a unit out of a slot and the batch of its base. `None`: its base is
/// no literal there, or the result is not what the difference says.
pub(crate) fn rebuild(base: &Body, delta: &Delta, difference: &[u8]) -> Option<[u8; UNIT]> {
    let Some(Slot::Whole(unit)) = base.slot(delta.base.index()) else {
        return None;
    };
    let mut unit = *unit;
    delta::apply(difference, &mut unit)?;
    (delta::check_of(&unit) == delta.check).then_some(unit)
}

struct Item<T> {
    delta: Delta,
    start: usize,
    tag: T,
}

/// Differences that wait for their bases, each with the caller's tag.
pub(crate) struct Waiting<T> {
    items: Vec<Item<T>>,
    bytes: Vec<u8>,
}

impl Waiting<u64> {
    /// Adds all differences of a batch, with its number.
    pub(crate) fn add_all(&mut self, body: &Body, seq: u64) {
        for index in 0..body.len() as u8 {
            if let Some(Slot::Difference(delta, bytes)) = body.slot(index) {
                self.add(&delta, bytes, seq);
            }
        }
    }
}

impl<T: Copy> Waiting<T> {
    pub(crate) fn new() -> Waiting<T> {
        Waiting {
            items: Vec::new(),
            bytes: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, delta: &Delta, difference: &[u8], tag: T) {
        self.items.push(Item {
            delta: *delta,
            start: self.bytes.len(),
            tag,
        });
        self.bytes.extend_from_slice(difference);
    }

    /// Is it time to rebuild what waits?
    pub(crate) fn is_full(&self) -> bool {
        self.bytes.len() + self.items.len() * size_of::<Item<T>>() >= DELTAS_WAITING_BYTES
    }

    /// Rebuilds and empties: calls `built` for every unit, in the order of
    /// their bases, or `failed`, which says whether to go on.
    pub(crate) fn rebuild(
        &mut self,
        inner: &Inner,
        reader: &mut Reader,
        built: &mut dyn FnMut(T, &[u8; UNIT]),
        failed: &mut dyn FnMut(T, Unbuilt) -> bool,
    ) {
        let mut items = std::mem::take(&mut self.items);
        let bytes = std::mem::take(&mut self.bytes);
        items.sort_by_key(|item| item.delta.base);
        let mut body = Body::new();
        for items in items.chunk_by(|a, b| a.delta.base.seq() == b.delta.base.seq()) {
            let seq = items.first().map_or(0, |item| item.delta.base.seq());
            for (at, item) in items.iter().enumerate() {
                // Read anew for each that fails: every one gets its own reason.
                let expanded = match at == 0 || body.is_empty() {
                    true => inner.expand(seq, reader, &mut body),
                    false => Ok(()),
                };
                let base = item.delta.base;
                let difference = bytes
                    .get(item.start..)
                    .and_then(|rest| rest.get(..usize::from(item.delta.length)));
                let outcome = match expanded {
                    Err(error) => Err(Some(error)),
                    Ok(()) => difference
                        .and_then(|difference| rebuild(&body, &item.delta, difference))
                        .ok_or(None),
                };
                match outcome {
                    Ok(unit) => built(item.tag, &unit),
                    Err(source) => {
                        if source.is_some() {
                            body = Body::new();
                        }
                        if !failed(item.tag, Unbuilt { base, source }) {
                            return;
                        }
                    }
                }
            }
        }
    }
}

impl Inner {
    /// The batches of these differences that do not come out right, and the
    /// batch of the first base that is the reason.
    pub(crate) fn wrong(&self, mut waiting: Waiting<u64>) -> BTreeMap<u64, u64> {
        let mut wrong = BTreeMap::new();
        waiting.rebuild(
            self,
            &mut Reader::default(),
            &mut |_, _| {},
            &mut |seq, unbuilt| {
                let why = unbuilt.source.as_ref().map(ToString::to_string);
                tracing::warn!(seq, %unbuilt, ?why, "the seal will be refused");
                wrong.entry(seq).or_insert(unbuilt.base.seq());
                true
            },
        );
        wrong
    }
}
