//! A set of sequence numbers, kept as ranges: the numbers are dense, so it
//! stays small however many there are.

use std::collections::BTreeMap;

/// A set of `u64`, as inclusive ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First number of a range to its last.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a number; false when it was there.
    pub fn insert(&mut self, number: u64) -> bool {
        let mut first = number;
        let mut last = number;
        if let Some((&before, &end)) = self.ranges.range(..=number).next_back() {
            if end >= number {
                return false;
            }
            if end + 1 == number {
                first = before;
            }
        }
        if let Some(after) = number.checked_add(1)
            && let Some(end) = self.ranges.remove(&after)
        {
            last = end;
        }
        self.ranges.insert(first, last);
        true
    }

    /// Whether a number is in the set.
    pub fn contains(&self, number: u64) -> bool {
        self.ranges
            .range(..=number)
            .next_back()
            .is_some_and(|(_, &end)| end >= number)
    }

    /// Number of ranges.
    pub fn ranges(&self) -> usize {
        self.ranges.len()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The highest number.
    pub fn highest(&self) -> Option<u64> {
        self.ranges.last_key_value().map(|(_, &last)| last)
    }

    /// The `count` highest ranges, ascending.
    pub fn newest(&self, count: usize) -> Vec<(u64, u64)> {
        let mut newest: Vec<_> = self
            .ranges
            .iter()
            .rev()
            .take(count)
            .map(|(&first, &last)| (first, last))
            .collect();
        newest.reverse();
        newest
    }

    /// Takes out the `count` lowest ranges, ascending.
    pub fn take(&mut self, count: usize) -> Vec<(u64, u64)> {
        let mut taken = Vec::with_capacity(count.min(self.ranges.len()));
        while taken.len() < count {
            let Some(range) = self.ranges.pop_first() else {
                break;
            };
            taken.push(range);
        }
        taken
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }
}

impl FromIterator<u64> for RangeSet {
    fn from_iter<T: IntoIterator<Item = u64>>(numbers: T) -> Self {
        let mut set = RangeSet::default();
        for number in numbers {
            set.insert(number);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(numbers in prop::collection::vec(prop_oneof![0u64..60, u64::MAX - 20..=u64::MAX], 0..200)) {
            let mut model = BTreeSet::new();
            let mut set = RangeSet::default();
            for number in numbers {
                prop_assert_eq!(set.insert(number), model.insert(number));
                prop_assert!(set.contains(number));
            }
            for number in (0..62).chain(u64::MAX - 22..=u64::MAX) {
                prop_assert_eq!(set.contains(number), model.contains(&number));
            }
            prop_assert_eq!(set.highest(), model.last().copied());
            let all = set.newest(usize::MAX);
            prop_assert_eq!(all.len(), set.ranges());
            // Ascending, and apart: a gap of one number at least.
            prop_assert!(all.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
            prop_assert_eq!(
                all.iter().map(|(first, last)| (last - first) as usize + 1).sum::<usize>(),
                model.len()
            );
            prop_assert_eq!(set.take(usize::MAX), all);
            prop_assert!(set.is_empty());
        }
    }
}
