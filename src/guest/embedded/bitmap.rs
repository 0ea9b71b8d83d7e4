//! A set of 4 KiB units, one bit each: what was written, what is still owed.

/// Units of one volume, by their index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bitmap {
    units: u64,
    words: Vec<u64>,
}

impl Bitmap {
    /// None of `units` units.
    pub fn none(units: u64) -> Self {
        Self {
            units,
            words: vec![0; usize::try_from(units.div_ceil(64)).unwrap_or(usize::MAX)],
        }
    }

    /// All of `units` units.
    pub fn all(units: u64) -> Self {
        let mut all = Self::none(units);
        all.words.fill(u64::MAX);
        all.trim();
        all
    }

    /// Takes the kernel's form: bit `n % 64` of word `n / 64` is unit `n`.
    /// Missing words are empty, bits past `units` are dropped.
    pub fn from_words(units: u64, mut words: Vec<u64>) -> Self {
        words.resize(usize::try_from(units.div_ceil(64)).unwrap_or(usize::MAX), 0);
        let mut map = Self { units, words };
        map.trim();
        map
    }

    /// How many units there are, set or not.
    pub fn units(&self) -> u64 {
        self.units
    }

    /// Adds a unit; one out of range is ignored.
    pub fn set(&mut self, unit: u64) {
        if unit < self.units
            && let Some(word) = self.words.get_mut((unit / 64) as usize)
        {
            *word |= 1 << (unit % 64);
        }
    }

    /// Takes a unit out.
    pub fn clear(&mut self, unit: u64) {
        if let Some(word) = self.words.get_mut((unit / 64) as usize) {
            *word &= !(1 << (unit % 64));
        }
    }

    /// Is it in?
    pub fn contains(&self, unit: u64) -> bool {
        self.words
            .get((unit / 64) as usize)
            .is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    /// Adds all of another's units.
    pub fn merge(&mut self, other: &Bitmap) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
        self.trim();
    }

    /// Takes all of another's units out.
    pub fn subtract(&mut self, other: &Bitmap) {
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// Adds `count` units from `first` on; those out of range are ignored.
    pub fn set_run(&mut self, first: u64, count: u64) {
        self.each_word(first, count, |word, bits| *word |= bits);
    }

    /// Takes `count` units from `first` on out.
    pub fn clear_run(&mut self, first: u64, count: u64) {
        self.each_word(first, count, |word, bits| *word &= !bits);
    }

    /// What was in; leaves none.
    pub fn take(&mut self) -> Bitmap {
        let none = Bitmap::none(self.units);
        std::mem::replace(self, none)
    }

    /// The first run of units that are in, at `from` or after it: (first, count).
    pub fn run_from(&self, from: u64, longest: u64) -> Option<(u64, u64)> {
        let first = self.next_in(from)?;
        let end = self.next_out(first).min(first.saturating_add(longest));
        Some((first, end - first))
    }

    fn each_word(&mut self, first: u64, count: u64, change: impl Fn(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.units);
        let mut at = first;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                change(word, mask);
            }
            at += bits;
        }
    }

    /// How many are in.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Is none in?
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Runs of units that are in, ascending: (first, count), at most `longest` each.
    pub fn runs(&self, longest: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (first, count) = self.run_from(at, longest)?;
            at = first + count;
            Some((first, count))
        })
    }

    fn next_in(&self, from: u64) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut word = self.words.get(index)? & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            word = *self.words.get(index)?;
        }
        Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
    }

    fn next_out(&self, from: u64) -> u64 {
        let mut index = (from / 64) as usize;
        let Some(first) = self.words.get(index) else {
            return self.units;
        };
        let mut word = !first & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            match self.words.get(index) {
                Some(next) => word = !next,
                None => return self.units,
            }
        }
        (index as u64 * 64 + u64::from(word.trailing_zeros())).min(self.units)
    }

    fn trim(&mut self) {
        let used = self.units % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn is_the_set_it_stands_for(
            units in 1u64..300,
            members in prop::collection::btree_set(0u64..300, 0..120),
            removed in prop::collection::btree_set(0u64..300, 0..40),
            longest in 1u64..80,
        ) {
            let mut map = Bitmap::none(units);
            for unit in &members {
                map.set(*unit);
            }
            for unit in &removed {
                map.clear(*unit);
            }
            let wanted: BTreeSet<u64> = members
                .difference(&removed)
                .copied()
                .filter(|unit| *unit < units)
                .collect();
            let runs: Vec<_> = map.runs(longest).collect();
            prop_assert!(runs.iter().all(|(_, count)| *count >= 1 && *count <= longest));
            let found: BTreeSet<u64> = runs.iter().flat_map(|(at, n)| *at..at + n).collect();
            prop_assert_eq!(&found, &wanted);
            prop_assert_eq!(map.count(), wanted.len() as u64);
            prop_assert_eq!(map.is_empty(), wanted.is_empty());
            let mut all = Bitmap::all(units);
            prop_assert_eq!(all.count(), units);
            all.merge(&map);
            prop_assert_eq!(all.count(), units);
            all.subtract(&map);
            prop_assert_eq!(all.count(), units - map.count());
            prop_assert!(wanted.iter().all(|unit| !all.contains(*unit)));
            let taken = map.take();
            prop_assert!(map.is_empty());
            let (first, count) = (*members.first().unwrap_or(&7), longest);
            let (mut with, mut without) = (taken.clone(), taken);
            with.set_run(first, count);
            without.clear_run(first, count);
            for unit in 0..units {
                let within = unit >= first && unit < first + count;
                prop_assert_eq!(with.contains(unit), within || wanted.contains(&unit));
                prop_assert_eq!(without.contains(unit), !within && wanted.contains(&unit));
            }
        }
    }
}
