//! The dedup index of one peer: digest of a unit -> the place where it lies there.
//!
//! A miss costs bandwidth only, so the index may forget: it is bounded in
//! bytes and evicts when full. A wrong hit would cost a seal, so two rules
//! guard it. A batch that was given up is taken out ([`DedupIndex::remove_seqs`]).
//! And a batch that is not acknowledged yet is offered to its own guest only,
//! whose next seal waits for it anyway; other guests get it once
//! [`DedupIndex::acknowledge`] was called.
//!
//! The table is 256 shards of buckets of eight. A digest may lie in either of
//! two buckets, so shards fill to about nine tenths before they must grow, and
//! since a shard grows by half on its own, the whole never has two copies.

use std::collections::{BTreeMap, BTreeSet};

use crate::unit::{Digest, GuestId, Place};

const SHARDS: usize = 256;
const SLOTS: usize = 8;

#[derive(Clone, Copy)]
struct Bucket {
    digests: [Digest; SLOTS],
    places: [Place; SLOTS],
}

impl Bucket {
    fn at(&self, slot: usize) -> (Digest, Place) {
        (self.digests[slot], self.places[slot])
    }

    fn free(&self) -> usize {
        self.places
            .iter()
            .filter(|&&place| place == Place::ZERO)
            .count()
    }

    fn empty_slot(&self) -> Option<usize> {
        self.places.iter().position(|&place| place == Place::ZERO)
    }
}

const EMPTY: Bucket = Bucket {
    digests: [Digest::UNKNOWN; SLOTS],
    places: [Place::ZERO; SLOTS],
};

#[derive(Default)]
struct Shard {
    buckets: Vec<Bucket>,
    victim: u32,
}

/// Digest -> place, bounded.
pub struct DedupIndex {
    shards: Vec<Shard>,
    buckets_most: usize,
    len: usize,
    forgotten: u64,
    pending: BTreeMap<u64, GuestId>,
}

impl std::fmt::Debug for DedupIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DedupIndex({} of {} bytes)", self.len, self.bytes())
    }
}

impl DedupIndex {
    /// An empty index that will hold at most `bytes` (24 a unit). Nothing is
    /// allocated before it is needed. Under about 48 KiB it holds that much.
    pub fn new(bytes: usize) -> DedupIndex {
        DedupIndex {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            buckets_most: (bytes / SHARDS / size_of::<Bucket>()).max(1),
            len: 0,
            forgotten: 0,
            pending: BTreeMap::new(),
        }
    }

    /// Where this content lies, if known and usable by any guest.
    pub fn get(&self, digest: Digest) -> Option<Place> {
        self.find(digest)
            .filter(|place| !self.pending.contains_key(&place.seq()))
    }

    /// Where this content lies, if known and usable by `guest`.
    pub fn get_for(&self, guest: GuestId, digest: Digest) -> Option<Place> {
        let place = self.find(digest)?;
        match self.pending.get(&place.seq()) {
            Some(owner) if *owner != guest => None,
            _ => Some(place),
        }
    }

    fn find(&self, digest: Digest) -> Option<Place> {
        let shard = &self.shards[usize::from(digest.0[0])];
        if shard.buckets.is_empty() || digest == Digest::UNKNOWN {
            return None;
        }
        for bucket in candidates(digest, shard.buckets.len()) {
            let bucket = &shard.buckets[bucket];
            for (slot, place) in bucket.digests.iter().zip(&bucket.places) {
                if *slot == digest && *place != Place::ZERO {
                    return Some(*place);
                }
            }
        }
        None
    }

    /// Remembers where this content lies; a place known before is replaced.
    /// [`Digest::UNKNOWN`], [`Digest::ZERO_UNIT`] and [`Place::ZERO`] are not kept.
    pub fn insert(&mut self, digest: Digest, place: Place) {
        if matches!(digest, Digest::UNKNOWN | Digest::ZERO_UNIT) || place == Place::ZERO {
            return;
        }
        let most = self.buckets_most;
        let shard = &mut self.shards[usize::from(digest.0[0])];
        if shard.buckets.is_empty() {
            shard.buckets = vec![EMPTY; 1];
        }
        while !shard.put(digest, place, &mut self.len) {
            if shard.buckets.len() < most {
                shard.grow(most, &mut self.len);
            } else {
                shard.evict(digest, place);
                self.forgotten += 1;
                return;
            }
        }
    }

    /// Remembers a batch that is not acknowledged yet: only `guest` may refer to it.
    pub fn insert_pending(&mut self, guest: GuestId, seq: u64, units: &[(Digest, u8)]) {
        if units.is_empty() {
            return;
        }
        self.pending.insert(seq, guest);
        for (digest, index) in units {
            self.insert(*digest, Place::new(seq, *index));
        }
    }

    /// The peer holds this batch durably: every guest may refer to it now.
    pub fn acknowledge(&mut self, seq: u64) {
        self.pending.remove(&seq);
    }

    /// Forgets everything in these batches: they were given up, or are retired
    /// by the peer. Reads the whole table.
    pub fn remove_seqs(&mut self, seqs: &BTreeSet<u64>) {
        if seqs.is_empty() {
            return;
        }
        for seq in seqs {
            self.pending.remove(seq);
        }
        for shard in &mut self.shards {
            for place in shard
                .buckets
                .iter_mut()
                .flat_map(|bucket| &mut bucket.places)
            {
                if *place != Place::ZERO && seqs.contains(&place.seq()) {
                    *place = Place::ZERO;
                    self.len -= 1;
                }
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.shards
            .iter_mut()
            .for_each(|shard| *shard = Shard::default());
        self.pending.clear();
        self.len = 0;
    }

    /// Units known.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Units that had to be forgotten for want of room: the peer may hold more than is known.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Is nothing known?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes allocated for the table.
    pub fn bytes(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.buckets.capacity() * size_of::<Bucket>())
            .sum()
    }
}

/// The two buckets where a digest may lie. Byte 0 chose the shard already.
fn candidates(digest: Digest, buckets: usize) -> [usize; 2] {
    let part = |at: usize| {
        let bytes = [
            digest.0[at],
            digest.0[at + 1],
            digest.0[at + 2],
            digest.0[at + 3],
        ];
        ((u64::from(u32::from_le_bytes(bytes)) * buckets as u64) >> 32) as usize
    };
    [part(1), part(5)]
}

impl Shard {
    /// Puts it into the emptier of its two buckets; `false` when both are full.
    fn put(&mut self, digest: Digest, place: Place, len: &mut usize) -> bool {
        let candidates = candidates(digest, self.buckets.len());
        for bucket in candidates {
            let bucket = &mut self.buckets[bucket];
            for (slot, old) in bucket.digests.iter().zip(&mut bucket.places) {
                if *slot == digest && *old != Place::ZERO {
                    *old = place;
                    return true;
                }
            }
        }
        let [first, second] = candidates;
        let free = |bucket: usize| self.buckets[bucket].free();
        let bucket = if free(first) >= free(second) {
            first
        } else {
            second
        };
        let spot = match self.buckets[bucket].empty_slot() {
            Some(slot) => Some((bucket, slot)),
            None => self.make_room(candidates),
        };
        let Some((bucket, slot)) = spot else {
            return false;
        };
        self.buckets[bucket].places[slot] = place;
        self.buckets[bucket].digests[slot] = digest;
        *len += 1;
        true
    }

    /// Both buckets are full: moves someone in them to their other bucket.
    fn make_room(&mut self, full: [usize; 2]) -> Option<(usize, usize)> {
        for bucket in full {
            for slot in 0..SLOTS {
                let (digest, place) = self.buckets[bucket].at(slot);
                for other in candidates(digest, self.buckets.len()) {
                    if let Some(empty) = self.buckets[other].empty_slot() {
                        self.buckets[other].digests[empty] = digest;
                        self.buckets[other].places[empty] = place;
                        return Some((bucket, slot));
                    }
                }
            }
        }
        None
    }

    fn grow(&mut self, most: usize, len: &mut usize) {
        let mut to = (self.buckets.len() + self.buckets.len() / 2 + 1).min(most);
        let old = std::mem::take(&mut self.buckets);
        'again: loop {
            // Exactly `to`: the bound counts capacity.
            self.buckets = Vec::with_capacity(to);
            self.buckets.resize(to, EMPTY);
            let mut placed = 0;
            for bucket in &old {
                for (digest, place) in bucket.digests.iter().zip(&bucket.places) {
                    if *place == Place::ZERO {
                        continue;
                    }
                    if !self.put(*digest, *place, &mut placed) {
                        if to == most {
                            continue;
                        }
                        to = (to + to / 2).min(most);
                        continue 'again;
                    }
                }
            }
            let before = old.iter().flat_map(|bucket| &bucket.places);
            *len -= before.filter(|&&place| place != Place::ZERO).count() - placed;
            return;
        }
    }

    /// Replaces any one of the eight in its first bucket: content seldom says
    /// whether it will come again, so which one hardly matters.
    fn evict(&mut self, digest: Digest, place: Place) {
        let [first, _] = candidates(digest, self.buckets.len());
        self.victim = self.victim.wrapping_add(1);
        let slot = self.victim as usize % SLOTS;
        let bucket = &mut self.buckets[first];
        bucket.digests[slot] = digest;
        bucket.places[slot] = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(of: u64) -> Digest {
        let hash = blake3::hash(&of.to_le_bytes());
        let mut cut = [0; 16];
        cut.copy_from_slice(&hash.as_bytes()[..16]);
        Digest(cut)
    }

    fn place(of: u64) -> Place {
        Place::new(1 + of / 64, (of % 64) as u8)
    }

    #[test]
    fn everything_is_found_while_there_is_room() {
        let bytes = 8 << 20;
        let mut index = DedupIndex::new(bytes);
        assert!(index.bytes() < 1024, "nothing is allocated at the start");
        let many = bytes as u64 / 24 * 8 / 10;
        for of in 0..many {
            index.insert(digest(of), place(of));
            index.insert(digest(of), place(of));
        }
        assert_eq!(index.len() as u64, many);
        assert!(index.bytes() <= bytes, "{} bytes", index.bytes());
        for of in 0..many {
            assert_eq!(index.get(digest(of)), Some(place(of)));
        }
        assert_eq!(index.get(digest(many)), None);
    }

    #[test]
    fn a_full_index_forgets_but_stays_within_its_bytes() {
        let bytes = 1 << 20;
        let mut index = DedupIndex::new(bytes);
        for of in 0..500_000 {
            index.insert(digest(of), place(of));
        }
        assert!(index.bytes() <= bytes);
        assert!(index.len() > bytes / 24 * 9 / 10, "{} units", index.len());
        let mut found = 0;
        for of in 0..500_000 {
            if let Some(at) = index.get(digest(of)) {
                assert_eq!(at, place(of));
                found += 1;
            }
        }
        assert_eq!(found, index.len());
    }

    #[test]
    fn removed_batches_are_not_offered_again() {
        let mut index = DedupIndex::new(1 << 20);
        for of in 0..1000 {
            index.insert(digest(of), place(of));
        }
        index.remove_seqs(&BTreeSet::from([1, 3]));
        assert_eq!(index.len(), 1000 - 128);
        assert_eq!(index.get(digest(5)), None);
        assert_eq!(index.get(digest(64)), Some(place(64)));
        index.insert(digest(5), Place::new(99, 0));
        assert_eq!(index.get(digest(5)), Some(Place::new(99, 0)));
    }

    #[test]
    fn an_unacknowledged_batch_is_for_its_own_guest_only() {
        let (mine, other) = (GuestId([1; 16]), GuestId([2; 16]));
        let mut index = DedupIndex::new(1 << 20);
        index.insert_pending(mine, 7, &[(digest(0), 3)]);
        assert_eq!(index.get_for(mine, digest(0)), Some(Place::new(7, 3)));
        assert_eq!(index.get_for(other, digest(0)), None);
        assert_eq!(index.get(digest(0)), None);
        index.acknowledge(7);
        assert_eq!(index.get_for(other, digest(0)), Some(Place::new(7, 3)));
    }

    #[test]
    fn what_stands_for_something_else_is_not_kept() {
        let mut index = DedupIndex::new(1 << 20);
        index.insert(Digest::UNKNOWN, place(0));
        index.insert(Digest::ZERO_UNIT, place(0));
        index.insert(digest(0), Place::ZERO);
        assert!(index.is_empty());
        assert_eq!(index.get(Digest::UNKNOWN), None);
    }
}
