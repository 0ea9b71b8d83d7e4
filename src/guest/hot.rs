//! Which units wait for the cut: those that changed in each of the last looks.
//!
//! A look is a round or a cut: a pass in which a guest finds what changed. What
//! changes in look after look will have changed again by the cut, so a round
//! that sends it sends it for nothing. A guest tells [`Hot`] each changed unit of
//! a look; a round asks whether the unit waits. What waits stays changed, and
//! the cut takes it with everything else, so a point is exact whatever is
//! thought hot here: only the way is shorter.
//!
//! Looks are not evenly spaced: a round that has little to send is short, and
//! what is written every second seems to rest in it. So one look without a
//! change cools nothing; two do.
//!
//! A cut must take what waits while the guest stands still, into the capture
//! buffer: no more waits than a share of it. A cut that failed does not end its
//! look: the round that follows at once would else find nothing changed again.

use farhaven_storage_sync::unit::{UNIT, Volume, VolumeIndex, VolumeKind};

/// A unit that changed in so many looks, the present one counted and with no two
/// between them in which it did not, waits for the cut. `examples/waits.rs` counts what 1, 2 and 3 do.
const LOOKS: u8 = 2;

/// Stamps of looks go from 1 to this and begin again: a unit that did not change
/// for exactly so many looks may wait once without need.
const STAMPS: u8 = 15;

/// Of each unit, in a byte: the stamp of the last look in which it changed (0:
/// none) and in how many looks it had by then, with no two without a change between.
pub struct Hot {
    volumes: Vec<Vec<u8>>,
    stamp: u8,
    /// The look has not come to its end.
    open: bool,
    /// A first look finds everything, and says nothing of time.
    first: bool,
    looks: u8,
    most: u64,
    waiting: u64,
}

impl Hot {
    /// Nothing is hot yet. `buffer_bytes` is what a cut can take in: half of it
    /// may wait.
    pub fn new(volumes: &[Volume], buffer_bytes: u64) -> Self {
        let units = |volume: &Volume| match volume.kind {
            VolumeKind::DeviceState => 0,
            _ => usize::try_from(volume.units()).unwrap_or(usize::MAX),
        };
        Self {
            // Zeroed pages of the system's: a volume that never changes costs none.
            volumes: volumes.iter().map(|v| vec![0; units(v)]).collect(),
            stamp: 1,
            open: true,
            first: true,
            looks: LOOKS,
            most: buffer_bytes / 2 / UNIT as u64,
            waiting: 0,
        }
    }

    /// Another number of looks than usual; 0 has nothing wait.
    pub fn after(&mut self, looks: u8) {
        self.looks = looks;
    }

    /// The usual number of looks, or nothing waits.
    pub fn leave(&mut self, leave: bool) {
        self.after(if leave { LOOKS } else { 0 });
    }

    /// A look begins, unless one that failed goes on.
    pub fn begin(&mut self) {
        self.waiting = 0;
        if !self.open {
            self.stamp = self.stamp % STAMPS + 1;
            self.open = true;
        }
    }

    /// The look has seen everything.
    pub fn end(&mut self) {
        (self.open, self.first) = (false, false);
    }

    /// These units changed since the look before.
    pub fn changed(&mut self, volume: VolumeIndex, first: u64, count: u64) {
        if self.first {
            return;
        }
        let (stamp, before) = (self.stamp, self.ago(1));
        let earlier = self.ago(2);
        let Some(units) = self.volumes.get_mut(usize::from(volume)) else {
            return;
        };
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        for unit in units.iter_mut().skip(first).take(count) {
            let (last, times) = (*unit >> 4, *unit & 15);
            if last == stamp {
                continue;
            }
            let times = match last {
                last if last == before => (times + 1).min(15),
                last if last == earlier => times,
                _ => 1,
            };
            *unit = stamp << 4 | times;
        }
    }

    fn ago(&self, looks: u8) -> u8 {
        (self.stamp + STAMPS - 1 - looks) % STAMPS + 1
    }

    /// Does this unit, which a round is about to send, wait for the cut? It
    /// counts as waiting then.
    pub fn waits(&mut self, volume: VolumeIndex, unit: u64) -> bool {
        let units = self.volumes.get(usize::from(volume));
        let known = usize::try_from(unit)
            .ok()
            .and_then(|unit| units?.get(unit).copied())
            .unwrap_or(0);
        let last = known >> 4;
        let waits = (last == self.stamp || last == self.ago(1))
            && known & 15 >= self.looks
            && self.looks > 0
            && self.waiting < self.most;
        self.waiting += u64::from(waits);
        waits
    }

    /// Units that the look under way, or the last one, left to the cut.
    pub fn waiting(&self) -> u64 {
        self.waiting
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNITS: u64 = 20;

    fn hot(most: u64) -> Hot {
        let volume = |kind| Volume {
            name: "v".to_owned(),
            kind,
            bytes: UNITS * UNIT as u64,
        };
        let volumes = [
            volume(VolumeKind::Ram),
            volume(VolumeKind::Disk),
            volume(VolumeKind::DeviceState),
        ];
        let mut hot = Hot::new(&volumes, 2 * most * UNIT as u64);
        hot.changed(0, 0, UNITS);
        hot.end();
        hot
    }

    proptest! {
        /// Looks that succeed or fail, over more of them than there are stamps.
        #[test]
        fn what_changed_in_the_last_looks_waits(
            looks in prop::collection::vec((prop::collection::btree_set(0..UNITS, 0..12), any::<bool>()), 0..14),
            most in 0..30u64,
        ) {
            let mut hot = hot(most);
            // Of each unit: the last look with a change, and how many there were.
            let mut known: Vec<Option<(u32, u8)>> = vec![None; UNITS as usize];
            let mut look = 1;
            for (changed, ends) in looks {
                hot.begin();
                for unit in changed {
                    hot.changed(1, unit, 1);
                    let times = match known[unit as usize] {
                        Some((last, times)) if last == look || last + 2 == look => times,
                        Some((last, times)) if last + 1 == look => times + 1,
                        _ => 1,
                    };
                    known[unit as usize] = Some((look, times));
                }
                let mut waiting = 0;
                for unit in 0..UNITS {
                    let is_hot = known[unit as usize]
                        .is_some_and(|(last, times)| last + 1 >= look && times >= LOOKS);
                    let waits = is_hot && waiting < most;
                    waiting += u64::from(waits);
                    prop_assert_eq!(hot.waits(1, unit), waits, "{}", unit);
                    prop_assert!(!hot.waits(0, unit));
                }
                prop_assert_eq!(hot.waiting(), waiting);
                if ends {
                    hot.end();
                    look += 1;
                }
            }
        }
    }

    #[test]
    fn what_is_not_there_is_not_hot() {
        let mut hot = hot(100);
        for _ in 0..40 {
            hot.begin();
            hot.changed(0, UNITS - 1, u64::MAX);
            hot.changed(7, 0, 1);
            hot.end();
        }
        assert!(hot.waits(0, UNITS - 1));
        for (volume, unit) in [(0, UNITS), (0, u64::MAX), (2, 0), (7, 0)] {
            assert!(!hot.waits(volume, unit));
        }
        hot.after(0);
        assert!(!hot.waits(0, UNITS - 1), "nothing waits");
        hot.leave(true);
        assert!(hot.waits(0, UNITS - 1));
        hot.leave(false);
        assert!(!hot.waits(0, UNITS - 1), "nothing is left");
    }
}
