//! What a demo measured.

use serde::{Deserialize, Serialize};

/// The demo's outcome: the object that `--json` prints. Every figure was
/// measured in this run; what does not apply to the guest or to what happened
/// is null.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// `kvm`, `sim` or `qemu`.
    pub guest: String,
    /// `disaster`, `planned` or `test_failover`.
    pub scenario: String,
    /// Every check passed.
    pub verified: bool,
    /// The guest's own words, or the first check that failed.
    pub verdict: String,
    /// What was looked at, and what was found.
    pub checks: Vec<Check>,
    /// The emulated link.
    pub link: String,
    /// The guest's memory.
    pub ram_bytes: u64,
    /// What the guest did.
    pub workload: String,
    /// The whole demo, seconds.
    pub took_s: f64,
    /// From `protect` until the first point was sealed, seconds.
    pub first_copy_s: f64,
    /// UDP bytes that the source sent in that time, retransmissions included.
    pub first_copy_wan_bytes: u64,
    /// What zstd-3 makes of the distinct non-zero units of that point, in groups of 64.
    pub first_copy_floor_bytes: u64,
    /// The first over the second.
    pub first_copy_to_floor: f64,
    /// Points sealed in all.
    pub points_sealed: u64,
    /// UDP bytes a second that the source sent while protected.
    pub steady_wan_bytes_per_s: f64,
    /// Bytes of batches of the points after the first.
    pub steady_sent_bytes: u64,
    /// What zstd-3 makes of their content that was never sent before.
    pub steady_floor_bytes: u64,
    /// The first over the second.
    pub steady_to_floor: f64,
    /// Guest data over the batches that carried it, first copy included.
    pub ratio: Option<f64>,
    /// The RPO that was asked for.
    pub rpo_target_ms: u64,
    /// While protected: the oldest that the newest sealed point ever was.
    pub rpo_ms_max: u64,
    /// How long a cut stopped the guest, median.
    pub pause_ms_median: f64,
    /// And at most.
    pub pause_ms_max: f64,
    /// The most of a pause that was not RAM scan (of a guest whose RAM is scanned).
    pub pause_without_scan_ms_max: Option<f64>,
    /// RAM looked at, over the time that took, in the median cut (of such a guest).
    pub ram_scan_gb_per_s: Option<f64>,
    /// What was lost: age of the newest sealed cut when the guest died; 0 for a planned move.
    pub rpo_ms: Option<f64>,
    /// From the disaster until the other site was silent long enough for failover
    /// to be declared.
    pub declared_after_ms: Option<f64>,
    /// From the declaration (or the command) until the guest ran, by the site's own clock.
    pub rto_ms: Option<f64>,
    /// From the last heartbeat before to the first after, as a reader of the console sees them.
    pub blackout_ms: Option<f64>,
    /// A planned move: from the stop until word came that it runs.
    pub hand_over_ms: Option<f64>,
    /// A test failover's figures.
    pub test: Option<TestFigures>,
    /// Most private memory of the source's daemon, bytes (RAM file not counted).
    pub source_memory_bytes: u64,
    /// And of the target's.
    pub target_memory_bytes: u64,
    /// Of the source's packets, how many the link's queue dropped.
    pub queue_dropped_ratio: f64,
    /// Batch bytes that were sent again after a reconnect.
    pub resent_bytes: u64,
}

/// Something that was looked at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// What must be so.
    pub what: String,
    /// Is it?
    pub passed: bool,
    /// What was seen.
    pub seen: String,
}

/// What a test failover measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestFigures {
    /// From this point.
    pub point: u64,
    /// From the command until it ran.
    pub rto_ms: f64,
    /// From the command until it was thrown away.
    pub ran_ms: f64,
    /// Points sealed meanwhile.
    pub points_sealed: u64,
    /// The longest that the source's heartbeat was silent meanwhile.
    pub source_silence_ms: f64,
    /// Memory that was freed.
    pub ram_bytes: u64,
    /// What the test wrote to its disks, and was thrown away.
    pub overlay_bytes: u64,
}
