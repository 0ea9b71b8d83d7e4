//! The numbers of batches.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits::{IMAGE_SEQ, SEQ};

/// Numbers for the batches of one pair of sites, shared by all its encoders.
#[derive(Debug)]
pub struct Sequence {
    next: AtomicU64,
    last: u64,
}

impl Sequence {
    /// The first batch gets `next` (at least 1): one more than the last the peer holds.
    pub fn starting_at(next: u64) -> Sequence {
        // A source's numbers end where those of images begin.
        let last = if next < IMAGE_SEQ { IMAGE_SEQ - 1 } else { SEQ };
        Sequence::within(next, last)
    }

    /// Numbers from `first` to `last`: a range that was [reserved](Sequence::reserve).
    pub fn within(first: u64, last: u64) -> Sequence {
        Sequence {
            next: AtomicU64::new(first.max(1)),
            last: last.min(SEQ),
        }
    }

    /// Takes `count` numbers out, to be given out elsewhere; the first of them.
    /// `None` when there are not so many.
    pub fn reserve(&self, count: u64) -> Option<u64> {
        let order = Ordering::Relaxed;
        let taken = self.next.fetch_update(order, order, |next| {
            next.checked_add(count).filter(|end| *end <= self.last)
        });
        taken.ok()
    }

    /// The number that the next batch would get.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Makes the next number at least `next`: a peer that was found to hold more.
    pub fn raise_to(&self, next: u64) {
        self.next.fetch_max(next, Ordering::Relaxed);
    }

    pub(crate) fn take(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.next() > self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_reserved_are_given_out_once() {
        let numbers = Sequence::starting_at(5);
        assert_eq!(numbers.reserve(10), Some(5));
        assert_eq!(numbers.take(), 15);
        assert_eq!(numbers.reserve(u64::MAX), None);
        assert_eq!(numbers.reserve(SEQ), None);
        assert_eq!(numbers.take(), 16);
        let range = Sequence::within(5, 6);
        assert_eq!((range.take(), range.is_spent()), (5, false));
        assert_eq!((range.take(), range.is_spent()), (6, true));
    }
}
