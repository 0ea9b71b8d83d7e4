//! The table of hints: first bytes of a digest -> a batch that may hold it.
//!
//! Bounded, and thinned instead of emptied when it is full: then only digests
//! whose sixth byte ends in one more zero bit stay and get in. Whoever asks is
//! told ([`HintTable::sampling`]) and leaves the others out of its questions: a
//! hit brings the digests of a whole batch, so one of many is enough to find it.
//!
//! 256 shards by the first byte of the digest; in each, linear probing over
//! entries of twelve bytes.

use super::Prefix;
use crate::limits::IMAGE_SEQ;

const SHARDS: usize = 256;
/// Entries of a shard that came into use.
const FIRST: usize = 16;
/// A shard is full at this many eighths.
const EIGHTHS: usize = 7;
/// Batches told for one digest at most.
const MATCHES: usize = 4;
/// Thinned so often at most: one in 256 stays.
const SAMPLING_MOST: u8 = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Hint {
    /// Bytes 1 to 5 of the digest.
    rest: [u8; 5],
    batch: [u8; 7],
}

const EMPTY: Hint = Hint {
    rest: [0; 5],
    batch: [0; 7],
};
const _: () = assert!(size_of::<Hint>() == 12);

/// Bit 55 says "of an image"; numbers beyond 55 bits are not hinted at.
const OF_IMAGE: u64 = 1 << 55;

impl Hint {
    fn new(rest: [u8; 5], seq: u64) -> Option<Hint> {
        let code = match seq.checked_sub(IMAGE_SEQ) {
            Some(number) => (number < OF_IMAGE).then_some(number | OF_IMAGE),
            None => (seq < OF_IMAGE).then_some(seq),
        }?;
        let [batch @ .., _] = code.to_le_bytes();
        (code != 0).then_some(Hint { rest, batch })
    }

    fn seq(self) -> u64 {
        let [a, b, c, d, e, f, g] = self.batch;
        let code = u64::from_le_bytes([a, b, c, d, e, f, g, 0]);
        match code & OF_IMAGE {
            0 => code,
            _ => (code ^ OF_IMAGE) + IMAGE_SEQ,
        }
    }

    fn home(self, entries: usize) -> usize {
        let [a, b, c, d, _] = self.rest;
        ((u64::from(u32::from_be_bytes([a, b, c, d])) * entries as u64) >> 32) as usize
    }

    fn stays(self, sampling: u8) -> bool {
        sampled(self.rest[4], sampling)
    }
}

/// Does a digest with this sixth byte count at this sampling?
fn sampled(sixth: u8, sampling: u8) -> bool {
    u32::from(sixth) & ((1 << sampling) - 1) == 0
}

#[derive(Default)]
struct Shard {
    entries: Vec<Hint>,
    used: usize,
}

impl Shard {
    /// Where this hint is, or the free entry where it would be.
    fn spot(&self, hint: Hint) -> Option<usize> {
        let home = hint.home(self.entries.len());
        let (before, from) = self.entries.split_at_checked(home)?;
        let places = from.iter().chain(before);
        let found = places
            .enumerate()
            .find(|(_, at)| **at == EMPTY || at.rest == hint.rest)?;
        Some((home + found.0) % self.entries.len())
    }

    fn put(&mut self, hint: Hint) {
        if let Some(entry) = self.spot(hint).and_then(|at| self.entries.get_mut(at)) {
            self.used += usize::from(*entry == EMPTY);
            *entry = hint;
        }
    }

    fn is_full(&self) -> bool {
        (self.used + 1) * 8 > self.entries.len() * EIGHTHS
    }

    /// Keeps what `stays`, in `entries` entries or, where that is too few, in more.
    fn rebuild(&mut self, entries: usize, stays: &dyn Fn(Hint) -> bool) {
        let mut old = std::mem::take(&mut self.entries);
        old.retain(|hint| *hint != EMPTY && stays(*hint));
        self.used = 0;
        self.entries = vec![EMPTY; entries.max(old.len() + 1)];
        old.into_iter().for_each(|hint| self.put(hint));
    }
}

/// Digest -> batches that may hold it.
pub(super) struct HintTable {
    shards: Vec<Shard>,
    /// Entries that a shard may have.
    most: usize,
    sampling: u8,
}

impl HintTable {
    /// An empty one of at most `bytes`; a few thousand bytes are the least.
    pub(super) fn new(bytes: usize) -> HintTable {
        HintTable {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            most: (bytes / SHARDS / size_of::<Hint>()).max(FIRST),
            sampling: 0,
        }
    }

    /// How many low bits of a digest's sixth byte must be zero for it to be here.
    pub(super) fn sampling(&self) -> u8 {
        self.sampling
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        let entries = self.shards.iter().map(|shard| shard.entries.capacity());
        entries.sum::<usize>() * size_of::<Hint>()
    }

    /// Notes that `seq` holds this. `live` says which batches are still there:
    /// hints at others make room first.
    pub(super) fn insert(&mut self, prefix: Prefix, seq: u64, live: &dyn Fn(u64) -> bool) {
        let [shard, rest @ ..] = prefix;
        let Some(hint) = Hint::new(rest, seq) else {
            return;
        };
        let at = usize::from(shard);
        while hint.stays(self.sampling) {
            let (most, sampling) = (self.most, self.sampling);
            let Some(shard) = self.shards.get_mut(at) else {
                return;
            };
            if !shard.is_full() {
                return shard.put(hint);
            }
            let used = shard.used;
            let size = shard.entries.len();
            if size >= most && sampling >= SAMPLING_MOST {
                // As thin as it gets: the one in its place makes room.
                let home = hint.home(size);
                if let Some(entry) = shard.entries.get_mut(home) {
                    *entry = hint;
                }
                return;
            }
            shard.rebuild(size, &|hint| live(hint.seq()));
            if shard.used * 8 <= used * EIGHTHS && !shard.is_full() {
                continue;
            }
            let larger = (size + size / 2).max(FIRST).min(most);
            if larger > size {
                shard.rebuild(larger, &|_| true);
            } else {
                self.thin(live);
            }
        }
    }

    fn thin(&mut self, live: &dyn Fn(u64) -> bool) {
        self.sampling += 1;
        let sampling = self.sampling;
        for shard in &mut self.shards {
            let size = shard.entries.len().min(self.most);
            shard.rebuild(size, &|hint| hint.stays(sampling) && live(hint.seq()));
        }
    }

    /// Batches that may hold this.
    pub(super) fn find(&self, prefix: Prefix) -> impl Iterator<Item = u64> + '_ {
        let [shard, rest @ ..] = prefix;
        let entries = self
            .shards
            .get(usize::from(shard))
            .map_or(&[][..], |shard| &shard.entries);
        let home = Hint {
            rest,
            batch: [0; 7],
        }
        .home(entries.len());
        let (before, from) = entries.split_at_checked(home).unwrap_or_default();
        let run = from.iter().chain(before).take_while(|hint| **hint != EMPTY);
        run.filter(move |hint| hint.rest == rest)
            .map(|hint| hint.seq())
            .take(MATCHES)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix(of: u64) -> Prefix {
        let hash = blake3::hash(&of.to_le_bytes());
        *hash.as_bytes().first_chunk().expect("32 bytes")
    }

    #[test]
    fn everything_is_found_while_there_is_room() {
        let mut table = HintTable::new(8 << 20);
        assert_eq!(table.bytes(), 0, "nothing is allocated at the start");
        for of in 0..400_000 {
            table.insert(prefix(of), 1 + of / 64, &|_| true);
        }
        assert_eq!(table.sampling(), 0);
        for of in 0..400_000 {
            assert!(table.find(prefix(of)).any(|seq| seq == 1 + of / 64));
        }
        let strange = (400_000..500_000).filter(|of| table.find(prefix(*of)).next().is_some());
        assert!(strange.count() < 10);
    }

    #[test]
    fn a_full_table_gets_thinner_and_stays_within_its_bytes() {
        let mut table = HintTable::new(1 << 20);
        for of in 0..1_000_000 {
            table.insert(prefix(of), 1 + of / 64, &|_| true);
        }
        assert!(table.bytes() <= 1 << 20, "{} bytes", table.bytes());
        let sampling = table.sampling();
        assert!((3..6).contains(&sampling), "{sampling}");
        for of in 0..1_000_000 {
            let there = table.find(prefix(of)).any(|seq| seq == 1 + of / 64);
            assert_eq!(there, sampled(prefix(of)[5], sampling));
        }
    }

    #[test]
    fn the_thinnest_table_takes_what_is_new() {
        let mut table = HintTable::new(0);
        for of in 0..3_000_000 {
            table.insert(prefix(of), 1 + of, &|_| true);
        }
        assert_eq!(table.sampling(), SAMPLING_MOST);
        assert!(table.bytes() <= SHARDS * FIRST * 12);
    }

    #[test]
    fn hints_at_what_is_gone_make_room() {
        let mut table = HintTable::new(1 << 20);
        for of in 0..1_000_000_u64 {
            let gone = (1 + of / 64).saturating_sub(200);
            table.insert(prefix(of), 1 + of / 64, &|seq| seq > gone);
        }
        assert_eq!(table.sampling(), 0);
    }

    proptest! {
        #[test]
        fn numbers_come_back(seq: u64, rest: [u8; 5]) {
            if let Some(hint) = Hint::new(rest, seq) {
                prop_assert_eq!(hint.seq(), seq);
                prop_assert!(hint != EMPTY);
            } else {
                prop_assert!(seq == 0 || seq >= OF_IMAGE);
            }
        }

        #[test]
        fn an_image_s_numbers_come_back(number in 0..1u64 << 50) {
            let seq = IMAGE_SEQ + number;
            prop_assert_eq!(Hint::new([0; 5], seq).map(Hint::seq), Some(seq));
        }
    }
}
