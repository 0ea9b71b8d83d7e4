//! Old versions of units that the peer holds as literals: what differences are
//! told against.
//!
//! A miss costs bandwidth only, so the cache may forget: it is bounded in
//! bytes. A wrong base would cost a seal, so the rules are the dedup index's
//! own, only stricter: a version counts once its batch is acknowledged
//! ([`Bases::acknowledge`]), and until then the version before it goes on
//! counting; a batch that was given up or retired is taken out
//! ([`Bases::remove_seqs`]).
//!
//! What stays is what is hot. A first copy passes every unit by here once, and
//! must not wash out the pages that change every second: a small sketch counts
//! how often each unit was told lately (counters halve as time goes on), and a
//! unit gets in only in place of a colder one.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasher;

use crate::unit::{GuestId, Place, UNIT, VolumeIndex};

/// Bytes that one version takes, with what keeps track of it.
const VERSION: usize = UNIT + 160;
/// Versions compared to find the coldest.
const SAMPLE: usize = 8;
/// Counters for each version that fits: so many that a scan of ten times what
/// fits leaves most of them alone.
const COUNTERS: usize = 32;
/// Counts for each version that fits, until the counters halve.
const COUNTS: usize = 16;

/// Whose unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key(GuestId, VolumeIndex, u64);

struct Version {
    place: Place,
    bytes: Box<[u8; UNIT]>,
}

/// One unit's versions: the one to tell against, and the one on its way.
struct Kept {
    key: Key,
    acknowledged: Option<Version>,
    pending: Option<Version>,
}

/// How often each unit was told lately, about.
struct Heat {
    counters: Vec<u8>,
    counted: usize,
}

impl Heat {
    fn spots(&self, hash: u64) -> [usize; 2] {
        let most = self.counters.len().max(1);
        [hash as u32 as usize % most, (hash >> 32) as usize % most]
    }

    fn count(&mut self, hash: u64) {
        let [a, b] = self.spots(hash);
        // Only the smaller one rises: the other is someone else's too.
        let least = self.of(hash);
        for spot in [a, b] {
            if let Some(counter) = self.counters.get_mut(spot)
                && *counter == least
            {
                *counter = counter.saturating_add(1);
            }
        }
        self.counted += 1;
        if self.counted >= self.counters.len() / COUNTERS * COUNTS {
            self.counted = 0;
            self.counters.iter_mut().for_each(|counter| *counter /= 2);
        }
    }

    fn of(&self, hash: u64) -> u8 {
        let at = |spot: usize| self.counters.get(spot).copied().unwrap_or(0);
        let [a, b] = self.spots(hash);
        at(a).min(at(b))
    }
}

/// Versions of units that the peer holds, bounded.
pub struct Bases {
    most: usize,
    versions: usize,
    kept: Vec<Kept>,
    at: HashMap<Key, usize>,
    pending: BTreeMap<u64, Vec<Key>>,
    heat: Heat,
    hasher: RandomState,
    turn: u64,
}

impl std::fmt::Debug for Bases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Bases({} versions, {} bytes)",
            self.versions,
            self.bytes()
        )
    }
}

impl Bases {
    /// An empty cache that will hold at most `bytes`, one version in about
    /// 4.2 KiB; too few for one: it keeps nothing.
    pub fn new(bytes: usize) -> Bases {
        let most = bytes / (VERSION + COUNTERS);
        Bases {
            most,
            versions: 0,
            kept: Vec::new(),
            at: HashMap::new(),
            pending: BTreeMap::new(),
            heat: Heat {
                counters: Vec::new(),
                counted: 0,
            },
            hasher: RandomState::new(),
            turn: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.versions * VERSION + self.heat.counters.len()
    }

    /// Versions held, those on their way included.
    pub fn len(&self) -> usize {
        self.versions
    }

    /// Is nothing held?
    pub fn is_empty(&self) -> bool {
        self.versions == 0
    }

    /// The version of this unit that the peer is known to hold, from a batch
    /// before `seq`. Asking counts: the unit is being told again.
    pub fn version(
        &mut self,
        guest: GuestId,
        volume: VolumeIndex,
        unit: u64,
        seq: u64,
    ) -> Option<(Place, &[u8; UNIT])> {
        if self.most == 0 {
            return None;
        }
        let key = Key(guest, volume, unit);
        if self.heat.counters.is_empty() {
            self.heat.counters = vec![0; self.most * COUNTERS];
        }
        self.heat.count(self.hasher.hash_one(key));
        let kept = self.kept.get(*self.at.get(&key)?)?;
        let version = kept.acknowledged.as_ref()?;
        (version.place.seq() < seq).then_some((version.place, &*version.bytes))
    }

    /// This unit is on its way as a literal. It counts once its batch is
    /// [acknowledged](Bases::acknowledge).
    pub fn offer(
        &mut self,
        guest: GuestId,
        volume: VolumeIndex,
        unit: u64,
        place: Place,
        bytes: &[u8; UNIT],
    ) {
        let key = Key(guest, volume, unit);
        let at = match self.at.get(&key) {
            Some(&at) => at,
            None if self.versions < self.most => self.enter(key),
            None => {
                let Some(victim) = self.coldest() else {
                    return;
                };
                let heat = |key: &Key| self.heat.of(self.hasher.hash_one(key));
                if self
                    .kept
                    .get(victim)
                    .is_none_or(|kept| heat(&kept.key) >= heat(&key))
                {
                    return;
                }
                self.drop_kept(victim);
                self.enter(key)
            }
        };
        let Some(kept) = self.kept.get_mut(at) else {
            return;
        };
        let version = Version {
            place,
            bytes: Box::new(*bytes),
        };
        if kept.pending.replace(version).is_none() {
            self.versions += 1;
        }
        self.pending.entry(place.seq()).or_default().push(key);
        // A unit has two versions for a while: another one makes room.
        while self.versions > self.most {
            match self.coldest() {
                Some(victim) => self.drop_kept(victim),
                None => return,
            }
        }
    }

    /// The peer holds this batch durably: its literals count from now on.
    pub fn acknowledge(&mut self, seq: u64) {
        for key in self.pending.remove(&seq).unwrap_or_default() {
            let Some(kept) = self.at.get(&key).and_then(|&at| self.kept.get_mut(at)) else {
                continue;
            };
            // A later version may be on its way already, and this one be gone.
            if kept
                .pending
                .as_ref()
                .is_some_and(|new| new.place.seq() == seq)
            {
                let old = std::mem::replace(&mut kept.acknowledged, kept.pending.take());
                self.versions -= usize::from(old.is_some());
            }
        }
    }

    /// Forgets everything in these batches: they were given up, or are retired
    /// by the peer. Looks at all there is.
    pub fn remove_seqs(&mut self, seqs: &BTreeSet<u64>) {
        for seq in seqs {
            self.pending.remove(seq);
        }
        let gone = |version: &mut Version| seqs.contains(&version.place.seq());
        for at in (0..self.kept.len()).rev() {
            let Some(kept) = self.kept.get_mut(at) else {
                continue;
            };
            let taken = kept.acknowledged.take_if(gone).is_some() as usize
                + kept.pending.take_if(gone).is_some() as usize;
            let empty = kept.acknowledged.is_none() && kept.pending.is_none();
            self.versions -= taken;
            if empty {
                self.drop_kept(at);
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.at.clear();
        self.pending.clear();
        self.versions = 0;
    }

    fn enter(&mut self, key: Key) -> usize {
        self.at.insert(key, self.kept.len());
        self.kept.push(Kept {
            key,
            acknowledged: None,
            pending: None,
        });
        self.kept.len() - 1
    }

    fn drop_kept(&mut self, at: usize) {
        if at >= self.kept.len() {
            return;
        }
        let gone = self.kept.swap_remove(at);
        self.versions -=
            usize::from(gone.acknowledged.is_some()) + usize::from(gone.pending.is_some());
        self.at.remove(&gone.key);
        if let Some(moved) = self.kept.get(at) {
            self.at.insert(moved.key, at);
        }
    }

    /// The coldest of a few.
    fn coldest(&mut self) -> Option<usize> {
        let count = self.kept.len();
        let mut coldest = None;
        for _ in 0..SAMPLE.min(count) {
            // xorshift64: which ones hardly matters.
            self.turn ^= self.turn << 13;
            self.turn ^= self.turn >> 7;
            self.turn ^= self.turn << 17;
            let at = (self.turn % count as u64) as usize;
            let heat = self.heat.of(self.hasher.hash_one(self.kept.get(at)?.key));
            if coldest.is_none_or(|(_, least)| heat < least) {
                coldest = Some((at, heat));
            }
        }
        coldest.map(|(at, _)| at)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const GUEST: GuestId = GuestId([1; 16]);

    fn tell(bases: &mut Bases, unit: u64, seq: u64) {
        bases.version(GUEST, 0, unit, seq);
        bases.offer(GUEST, 0, unit, Place::new(seq, 0), &[seq as u8; UNIT]);
    }

    fn base(bases: &mut Bases, unit: u64) -> Option<u64> {
        let (place, bytes) = bases.version(GUEST, 0, unit, 1 << 40)?;
        assert_eq!(bytes[7], place.seq() as u8);
        Some(place.seq())
    }

    #[test]
    fn only_what_is_acknowledged_counts() {
        let mut bases = Bases::new(1 << 20);
        tell(&mut bases, 5, 1);
        assert_eq!(base(&mut bases, 5), None);
        bases.acknowledge(1);
        assert_eq!(base(&mut bases, 5), Some(1));
        assert!(
            bases.version(GUEST, 0, 5, 1).is_none(),
            "not before its own batch"
        );
        assert!(bases.version(GuestId([2; 16]), 0, 5, 9).is_none());
        // A newer one on its way: the older one counts meanwhile.
        tell(&mut bases, 5, 2);
        assert_eq!(base(&mut bases, 5), Some(1));
        tell(&mut bases, 5, 3);
        bases.acknowledge(2);
        assert_eq!(base(&mut bases, 5), Some(1));
        bases.acknowledge(3);
        assert_eq!(base(&mut bases, 5), Some(3));
        assert_eq!(bases.len(), 1);
    }

    #[test]
    fn what_was_given_up_or_retired_is_gone() {
        let mut bases = Bases::new(1 << 20);
        for unit in 0..10 {
            tell(&mut bases, unit, 1 + unit);
        }
        (1..6).for_each(|seq| bases.acknowledge(seq));
        tell(&mut bases, 2, 20);
        bases.remove_seqs(&BTreeSet::from([3, 5, 8]));
        bases.acknowledge(8);
        let left: Vec<_> = (0..10).map(|unit| base(&mut bases, unit)).collect();
        let one = |seq| Some(seq);
        assert_eq!(left[..5], [one(1), one(2), None, one(4), None]);
        assert_eq!(left[5..], [None; 5]);
        bases.acknowledge(20);
        assert_eq!(base(&mut bases, 2), Some(20));
        bases.clear();
        assert!(bases.is_empty() && base(&mut bases, 2).is_none());
    }

    #[test]
    fn a_full_cache_stays_within_its_bytes_and_keeps_what_is_hot() {
        let bytes = 4 << 20;
        let mut bases = Bases::new(bytes);
        let mut seq = 0;
        for round in 0..4 {
            for unit in 0..300 {
                seq += 1;
                tell(&mut bases, unit, seq);
                bases.acknowledge(seq);
            }
            // A scan of much more than fits.
            for unit in 0..5_000 {
                seq += 1;
                tell(&mut bases, 10_000 + round * 5_000 + unit, seq);
                bases.acknowledge(seq);
                assert!(bases.bytes() <= bytes, "{} bytes", bases.bytes());
            }
        }
        let hot = (0..300).filter(|&unit| base(&mut bases, unit).is_some());
        let hot = hot.count();
        assert!(hot > 270, "{hot} of 300 hot units are left");
        assert!(bases.len() > bytes / (VERSION + COUNTERS) * 9 / 10);
    }

    #[test]
    fn no_bytes_keep_nothing() {
        let mut bases = Bases::new(1000);
        tell(&mut bases, 5, 1);
        bases.acknowledge(1);
        assert!(base(&mut bases, 5).is_none() && bases.bytes() == 0);
    }
}
