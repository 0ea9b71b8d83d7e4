//! What a target says of content that it had, and that is damaged there.

use farhaven_storage_sync::unit::{GuestId, VolumeIndex};
use serde::{Deserialize, Serialize};

use super::RETIRE_BATCHES;

/// Most runs of units in one message, at most 22 bytes each.
pub const LOST_RUNS: usize = 16 * 1024;

/// Most batches in one message, at most 9 bytes each.
pub const LOST_BATCHES: usize = RETIRE_BATCHES / 2;

/// Content of a guest's newest point that is damaged at the target: the source
/// is to send it with the next point, as it is then. Asked again until a point
/// needs it no more, so a source need not remember it over a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostContent {
    /// Of whom.
    pub guest: GuestId,
    /// Volume, first unit, how many.
    pub units: Vec<(VolumeIndex, u64, u64)>,
    /// Batches that nothing may refer to any more.
    pub batches: Vec<u64>,
}

impl LostContent {
    /// Within what one message may ask.
    pub fn is_sound(&self) -> bool {
        self.units.len() <= LOST_RUNS && self.batches.len() <= LOST_BATCHES
    }
}
