//! Where every unit of a point lies: a tree per volume that shares what did not change.
//!
//! Root -> branches of 512 leaves -> leaves of 512 places. Branches and leaves
//! are counted references, copied when written: a new point costs what it
//! changed, and an older one that is being read stays as it is. What reads as
//! zeros has no leaf at all.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::limits::{MAP_BRANCH, MAP_LEAF};
use crate::unit::{Place, VolumeIndex};

const LEAF: u64 = MAP_LEAF as u64;
const BRANCH: u64 = MAP_BRANCH as u64;

/// Units that lie in consecutive places, or all read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The volume.
    pub volume: VolumeIndex,
    /// First unit.
    pub unit: u64,
    /// Number of units.
    pub count: u64,
    /// Place of the first; [`Place::ZERO`]: all of them are zeros.
    pub place: Place,
}

impl Run {
    /// Joins `next` to this run when it continues it.
    fn join(&mut self, next: &Run) -> bool {
        let adjacent = self.volume == next.volume && self.unit + self.count == next.unit;
        let consecutive = match self.place {
            Place::ZERO => next.place == Place::ZERO,
            place => next.place == Place(place.0 + self.count),
        };
        if adjacent && consecutive {
            self.count += next.count;
        }
        adjacent && consecutive
    }

    /// The same in parts of at most `most` units; zeros, which take no memory, in one.
    pub(crate) fn parts(self, most: u64) -> impl Iterator<Item = Run> {
        let most = match self.place {
            Place::ZERO => u64::MAX,
            _ => most.max(1),
        };
        let mut done = 0;
        std::iter::from_fn(move || {
            let count = (self.count - done).min(most);
            let part = Run {
                unit: self.unit + done,
                count,
                place: match self.place {
                    Place::ZERO => Place::ZERO,
                    place => Place(place.0 + done),
                },
                ..self
            };
            done += count;
            (count > 0).then_some(part)
        })
    }

    /// The batches that hold this run: none for zeros.
    pub(crate) fn seqs(&self) -> std::ops::RangeInclusive<u64> {
        match self.place {
            #[allow(clippy::reversed_empty_ranges, reason = "the empty range is meant")]
            Place::ZERO => 1..=0,
            place => place.seq()..=Place(place.0 + self.count - 1).seq(),
        }
    }
}

#[derive(Clone)]
struct Leaf([Place; MAP_LEAF]);

#[derive(Clone)]
struct Branch(Box<[Option<Arc<Leaf>>; MAP_BRANCH]>);

#[derive(Clone, Default)]
struct VolumeMap {
    branches: BTreeMap<u64, Arc<Branch>>,
}

/// Every volume's units -> places, at one point.
#[derive(Clone, Default)]
pub(crate) struct PointMap {
    volumes: Vec<VolumeMap>,
    leaves: usize,
}

impl std::fmt::Debug for PointMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "PointMap({} volumes, {} leaves)",
            self.volumes.len(),
            self.leaves
        )
    }
}

impl PointMap {
    /// Leaves in the tree (4 KiB each), shared ones included.
    pub(crate) fn leaves(&self) -> usize {
        self.leaves
    }

    /// Places a run; a later one wins.
    pub(crate) fn set(&mut self, run: &Run) {
        let volume = usize::from(run.volume);
        if volume >= self.volumes.len() {
            if run.place == Place::ZERO {
                return;
            }
            self.volumes.resize_with(volume + 1, VolumeMap::default);
        }
        let map = &mut self.volumes[volume];
        if run.place == Place::ZERO {
            self.leaves -= map.clear(run.unit, run.unit.saturating_add(run.count));
        } else {
            self.leaves += map.set(run);
        }
    }

    /// Everything of `volume` from `unit` on reads as zeros: it has shrunk.
    pub(crate) fn truncate(&mut self, volume: VolumeIndex, unit: u64) {
        self.set(&Run {
            volume,
            unit,
            count: u64::MAX - unit,
            place: Place::ZERO,
        });
    }

    /// Where a unit lies.
    pub(crate) fn place(&self, volume: VolumeIndex, unit: u64) -> Place {
        let Some(map) = self.volumes.get(usize::from(volume)) else {
            return Place::ZERO;
        };
        map.leaf(unit / LEAF)
            .map_or(Place::ZERO, |leaf| leaf.0[(unit % LEAF) as usize])
    }

    /// The first run of `volume` that is not zeros at or after `from`.
    pub(crate) fn next_run(&self, volume: VolumeIndex, from: u64) -> Option<Run> {
        let map = self.volumes.get(usize::from(volume))?;
        let (unit, place) = map.next_placed(from)?;
        let mut count = 1;
        let mut leaf = map.leaf(unit / LEAF)?;
        loop {
            let unit = unit + count;
            if unit % LEAF == 0 {
                match map.leaf(unit / LEAF) {
                    Some(next) => leaf = next,
                    None => break,
                }
            }
            if leaf.0[(unit % LEAF) as usize].0 != place.0 + count {
                break;
            }
            count += 1;
        }
        Some(Run {
            volume,
            unit,
            count,
            place,
        })
    }

    /// All runs of `volume` that are not zeros.
    pub(crate) fn runs(&self, volume: VolumeIndex) -> impl Iterator<Item = Run> {
        let first = self.next_run(volume, 0);
        std::iter::successors(first, move |run| {
            self.next_run(volume, run.unit + run.count)
        })
    }

    /// All runs of all volumes that are not zeros.
    pub(crate) fn all_runs(&self) -> impl Iterator<Item = Run> {
        (0..self.volumes.len()).flat_map(|volume| self.runs(volume as VolumeIndex))
    }

    /// What must be set on `old` to make it this map. Shared parts cost nothing.
    pub(crate) fn since(&self, old: &PointMap) -> Vec<Run> {
        let mut runs = Vec::new();
        let none = VolumeMap::default();
        for volume in 0..self.volumes.len().max(old.volumes.len()) {
            let new = self.volumes.get(volume).unwrap_or(&none);
            let old = old.volumes.get(volume).unwrap_or(&none);
            new.since(old, volume as VolumeIndex, &mut runs);
        }
        runs
    }
}

impl VolumeMap {
    fn leaf(&self, number: u64) -> Option<&Leaf> {
        let branch = self.branches.get(&(number / BRANCH))?;
        branch.0[(number % BRANCH) as usize].as_deref()
    }

    fn next_placed(&self, from: u64) -> Option<(u64, Place)> {
        let first = from / LEAF;
        for (&at, branch) in self.branches.range(first / BRANCH..) {
            let start = if at == first / BRANCH {
                first % BRANCH
            } else {
                0
            };
            for index in start..BRANCH {
                let Some(leaf) = &branch.0[index as usize] else {
                    continue;
                };
                let number = at * BRANCH + index;
                let slot = if number == first {
                    (from % LEAF) as usize
                } else {
                    0
                };
                let found = leaf.0[slot..]
                    .iter()
                    .position(|&place| place != Place::ZERO);
                if let Some(found) = found {
                    let slot = slot + found;
                    return Some((number * LEAF + slot as u64, leaf.0[slot]));
                }
            }
        }
        None
    }

    /// Returns how many leaves were made.
    fn set(&mut self, run: &Run) -> usize {
        let mut made = 0;
        let mut done = 0;
        while done < run.count {
            let unit = run.unit + done;
            let (number, slot) = (unit / LEAF, unit % LEAF);
            let branch = self.branches.entry(number / BRANCH);
            let branch =
                branch.or_insert_with(|| Arc::new(Branch(Box::new([const { None }; MAP_BRANCH]))));
            let leaf = &mut Arc::make_mut(branch).0[(number % BRANCH) as usize];
            let leaf = leaf.get_or_insert_with(|| {
                made += 1;
                Arc::new(Leaf([Place::ZERO; MAP_LEAF]))
            });
            let places = &mut Arc::make_mut(leaf).0[slot as usize..];
            for place in places.iter_mut().take((run.count - done) as usize) {
                *place = Place(run.place.0 + done);
                done += 1;
            }
        }
        made
    }

    /// Returns how many leaves went. Only what exists is visited.
    fn clear(&mut self, from: u64, to: u64) -> usize {
        let mut gone = 0;
        if from >= to {
            return gone;
        }
        let span = BRANCH * LEAF;
        let mut empty = Vec::new();
        for (&at, branch) in self.branches.range_mut(from / span..=(to - 1) / span) {
            let start = at * span;
            let low = from.saturating_sub(start) / LEAF;
            let high = (to - start).div_ceil(LEAF).min(BRANCH);
            for index in low..high {
                if branch.0[index as usize].is_none() {
                    continue;
                }
                let leaf = &mut Arc::make_mut(branch).0[index as usize];
                let base = start + index * LEAF;
                let first = from.saturating_sub(base) as usize;
                let last = (to - base).min(LEAF) as usize;
                if let Some(places) = leaf {
                    let places = &mut Arc::make_mut(places).0;
                    places[first..last].fill(Place::ZERO);
                    if places.iter().all(|&place| place == Place::ZERO) {
                        *leaf = None;
                        gone += 1;
                    }
                }
            }
            if branch.0.iter().all(Option::is_none) {
                empty.push(at);
            }
        }
        for at in empty {
            self.branches.remove(&at);
        }
        gone
    }

    fn since(&self, old: &VolumeMap, volume: VolumeIndex, runs: &mut Vec<Run>) {
        let mut numbers: Vec<u64> = self
            .branches
            .keys()
            .chain(old.branches.keys())
            .copied()
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        for at in numbers {
            let (new, old) = (self.branches.get(&at), old.branches.get(&at));
            if let (Some(new), Some(old)) = (new, old)
                && Arc::ptr_eq(new, old)
            {
                continue;
            }
            for index in 0..MAP_BRANCH {
                let new = new.and_then(|branch| branch.0[index].as_ref());
                let old = old.and_then(|branch| branch.0[index].as_ref());
                let same = match (new, old) {
                    (None, None) => true,
                    (Some(new), Some(old)) => Arc::ptr_eq(new, old),
                    _ => false,
                };
                if same {
                    continue;
                }
                let base = (at * BRANCH + index as u64) * LEAF;
                for slot in 0..MAP_LEAF {
                    let place = new.map_or(Place::ZERO, |leaf| leaf.0[slot]);
                    if place == old.map_or(Place::ZERO, |leaf| leaf.0[slot]) {
                        continue;
                    }
                    let run = Run {
                        volume,
                        unit: base + slot as u64,
                        count: 1,
                        place,
                    };
                    if !runs.last_mut().is_some_and(|last| last.join(&run)) {
                        runs.push(run);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
