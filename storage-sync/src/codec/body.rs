//! A batch's body, expanded: what each slot holds.

use crate::codec::entry::{Content, Delta, Entry};
use crate::unit::{GROUP, UNIT};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot<'a> {
    /// A whole unit.
    Whole(&'a [u8; UNIT]),
    /// A difference, still to be applied to its base.
    Difference(Delta, &'a [u8]),
}

#[derive(Debug, Clone, Copy)]
enum At {
    Whole(usize),
    Difference(usize, Delta),
}

/// An expanded body; reused from batch to batch.
#[derive(Debug, Default)]
pub struct Body {
    pub(crate) bytes: Vec<u8>,
    slots: Vec<At>,
}

impl Body {
    /// An empty one.
    pub fn new() -> Body {
        Body::default()
    }

    /// Slots in it.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Slot `index`; `None` when there is no such slot.
    pub fn slot(&self, index: u8) -> Option<Slot<'_>> {
        match *self.slots.get(usize::from(index))? {
            At::Whole(at) => Some(Slot::Whole(self.bytes.get(at..)?.first_chunk()?)),
            At::Difference(at, delta) => {
                let bytes = self.bytes.get(at..at + usize::from(delta.length))?;
                Some(Slot::Difference(delta, bytes))
            }
        }
    }

    /// The literals, one behind the other in the order of their slots.
    pub(crate) fn literals(&self) -> &[u8] {
        let whole = self.slots.iter();
        let whole = whole.filter(|slot| matches!(slot, At::Whole(_))).count();
        self.bytes.get(..whole * UNIT).unwrap_or_default()
    }

    /// The whole units at the front, when there are no differences: all slots together.
    pub(crate) fn all_whole(&self) -> Option<&[u8]> {
        let whole = self.slots.iter().all(|slot| matches!(slot, At::Whole(_)));
        whole.then_some(&self.bytes[..])
    }

    /// Finds every slot of `bytes`, given the batch's entries (verified: at
    /// most 64 slots, and as long together as the body).
    pub(crate) fn lay(&mut self, entries: impl Iterator<Item = Entry>) {
        self.slots.clear();
        let (mut literals, mut differences) = (0, 0);
        for entry in entries {
            match entry.content {
                Content::Literals(_) => {
                    for _ in 0..entry.count.min(GROUP as u64) {
                        self.slots.push(At::Whole(literals));
                        literals += UNIT;
                    }
                }
                Content::Delta(delta) => {
                    self.slots.push(At::Difference(differences, delta));
                    differences += usize::from(delta.length);
                }
                Content::Zeros | Content::Refs(_) => {}
            }
        }
        for slot in &mut self.slots {
            if let At::Difference(at, _) = slot {
                *at += literals;
            }
        }
    }
}
