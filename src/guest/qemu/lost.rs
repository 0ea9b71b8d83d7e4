//! Units of a disk that the peer lost: they go with the next cut, as QEMU's
//! bitmaps cannot be told of them, and are remembered until that is sealed.

use std::ops::Range;

/// Most ranges that are kept apart; beyond them neighbours are joined, with what
/// lies between.
const RANGES: usize = 65_536;

/// Ranges of units.
#[derive(Default)]
pub(super) struct Lost {
    owed: Vec<Range<u64>>,
    /// Went with cuts that are not sealed yet.
    went: Vec<(u64, Vec<Range<u64>>)>,
}

impl Lost {
    /// These are owed.
    pub(super) fn add(&mut self, units: Range<u64>) {
        if units.is_empty() {
            return;
        }
        self.owed.push(units);
        // Now and then: they come by the thousand.
        if self.owed.len() > 2 * RANGES {
            join(&mut self.owed);
        }
    }

    /// What the next cut is to hand over, whatever else it does.
    pub(super) fn owed(&self) -> Vec<Range<u64>> {
        let mut owed = self.owed.clone();
        join(&mut owed);
        owed
    }

    /// All that was owed went with this cut.
    pub(super) fn went_with(&mut self, point: u64) {
        if !self.owed.is_empty() {
            self.went.push((point, std::mem::take(&mut self.owed)));
        }
    }

    /// The peer has this point, and what went before it.
    pub(super) fn sealed(&mut self, point: u64) {
        self.went.retain(|(with, _)| *with > point);
    }

    /// Nothing that is not sealed got there.
    pub(super) fn give_back(&mut self) {
        let back = self.went.drain(..).flat_map(|(_, ranges)| ranges);
        self.owed.extend(back);
    }
}

/// Sorts and merges; the narrowest gaps go when there are too many.
fn join(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut gap = 0;
    loop {
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges.drain(..) {
            match joined.last_mut() {
                Some(last) if range.start <= last.end.saturating_add(gap) => {
                    last.end = last.end.max(range.end);
                }
                _ => joined.push(range),
            }
        }
        *ranges = joined;
        if ranges.len() <= RANGES {
            return;
        }
        gap = gap * 2 + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owed_until_a_point_that_has_it_is_sealed() {
        let mut lost = Lost::default();
        lost.add(8..10);
        lost.add(2..4);
        lost.add(4..5);
        lost.add(7..7);
        assert_eq!(lost.owed(), [2..5, 8..10]);
        lost.went_with(5);
        assert_eq!(lost.owed(), []);
        lost.add(9..20);
        lost.sealed(4);
        lost.give_back();
        assert_eq!(lost.owed(), [2..5, 8..20]);
        lost.went_with(6);
        lost.sealed(6);
        lost.give_back();
        assert_eq!(lost.owed(), []);
    }

    #[test]
    fn no_more_ranges_than_may_be_are_kept() {
        let mut lost = Lost {
            owed: (0..200_000).map(|at| at * 4..at * 4 + 1).collect(),
            ..Lost::default()
        };
        lost.add(800_000..800_001);
        let owed = lost.owed();
        assert!(owed.len() <= RANGES);
        let covered = |unit: u64| owed.iter().any(|range| range.contains(&unit));
        assert!([0, 4, 399_996, 799_996, 800_000].into_iter().all(covered));
    }
}
