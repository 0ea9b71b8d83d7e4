//! What a planned move is expected to take.

use serde::{Deserialize, Serialize};

use super::bytes;

/// What a planned move is expected to take, and the figures that rests on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveOutlook {
    /// Rounds of the move so far; 0 while none is under way.
    pub rounds: u32,
    /// Bytes on the link that a last cut now would need, by estimate.
    pub remaining_bytes: u64,
    /// Bytes a second on the link that the guest's changes need, measured over
    /// the last round.
    pub dirty_bytes_per_s: u64,
    /// By the first look at the guest alone: how fast it writes to its disks is not
    /// known yet, and to its memory in the rough.
    #[serde(default)]
    pub rough: bool,
    /// Bytes a second that the link carries, measured.
    pub link_bytes_per_s: u64,
    /// Percent of its time that the guest loses now.
    pub throttle_percent: u8,
    /// What the policy allows of that.
    pub max_throttle_percent: u8,
    /// How long the guest would run nowhere if the last cut were now, by estimate.
    pub expected_blackout_ms: f64,
    /// What the policy allows of that.
    pub max_blackout_ms: f64,
    /// Is that within the policy?
    pub within: bool,
    /// When this was measured, nanoseconds since 1970.
    pub at: u64,
}

impl MoveOutlook {
    /// The same by the site's limit of now, bytes a second: it may be another than
    /// when this was measured, and the last cut heeds it.
    pub(in crate::site) fn under(mut self, limit: Option<u64>) -> Self {
        let Some(limit) = limit.filter(|limit| *limit < self.link_bytes_per_s) else {
            return self;
        };
        let takes = |rate: u64| self.remaining_bytes as f64 / rate.max(1) as f64 * 1e3;
        self.expected_blackout_ms += takes(limit) - takes(self.link_bytes_per_s);
        self.link_bytes_per_s = limit;
        self.within = self.expected_blackout_ms <= self.max_blackout_ms;
        self
    }
}

impl std::fmt::Display for MoveOutlook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} left, changes {}/s{}, link {}/s, throttle {} %: it would stand for about {:.0} ms (at most {:.0} ms)",
            bytes(self.remaining_bytes),
            bytes(self.dirty_bytes_per_s),
            match self.rough {
                true => " in the rough, its disks not known yet",
                false => "",
            },
            bytes(self.link_bytes_per_s),
            self.throttle_percent,
            self.expected_blackout_ms,
            self.max_blackout_ms
        )
    }
}
