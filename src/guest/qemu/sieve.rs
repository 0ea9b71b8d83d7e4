//! Of the pages that a scan found changed, those that wait for the cut.
//!
//! A scan compares with what the peer holds, so a page that waits is found
//! again in every look: whether it changed since the last one is told by its
//! digest of then.

use std::collections::HashMap;

use farhaven_storage_sync::unit::{Digest, VolumeIndex};

use super::super::hot::Hot;

/// What a scan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// While the guest runs: what changes all the time may wait.
    Round,
    /// The instant: everything is handed over.
    Cut,
}

/// Tells what waits from what goes.
pub(super) struct Sieve<'a> {
    pub(super) look: Look,
    pub(super) hot: &'a mut Hot,
    pub(super) volume: VolumeIndex,
    /// What waited after the last look, as it was then.
    pub(super) before: &'a HashMap<u64, Digest>,
    /// What waits now.
    pub(super) waiting: HashMap<u64, Digest>,
}

impl Sieve<'_> {
    /// Is this changed unit left to the cut?
    pub(super) fn waits(&mut self, unit: u64, digest: Digest) -> bool {
        // It waited; did it change since the last look?
        if self.before.get(&unit) != Some(&digest) {
            self.hot.changed(self.volume, unit, 1);
        }
        let waits = self.look == Look::Round && self.hot.waits(self.volume, unit);
        if waits {
            self.waiting.insert(unit, digest);
        }
        waits
    }
}
