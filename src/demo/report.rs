//! What a demo measured.

use serde::{Deserialize, Serialize};

use crate::cli::show::{bytes, millis};

/// The demo's outcome: the object that `--json` prints. Every figure was
/// measured in this run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// `qemu`.
    pub guest: String,
    /// `disaster` or `planned`.
    pub scenario: String,
    /// The guest checked all of its memory and disks after it went on, and its
    /// heartbeat did not begin anew.
    pub verified: bool,
    /// The guest's own words.
    pub verdict: String,
    /// The emulated link.
    pub link: String,
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
    /// How long a cut stopped the guest, median.
    pub pause_ms_median: f64,
    /// And at most.
    pub pause_ms_max: f64,
    /// The most of a pause that was not RAM scan.
    pub pause_without_scan_ms_max: f64,
    /// RAM looked at, over the time that took, in the median cut.
    pub ram_scan_gb_per_s: f64,
    /// What was lost: age of the newest sealed cut when it happened; 0 for a planned move.
    pub rpo_ms: f64,
    /// From the declaration (or the command) until the guest ran, by the site's own clock.
    pub rto_ms: f64,
    /// From the last heartbeat before to the first after, as a reader of the console sees them.
    pub blackout_ms: f64,
    /// A planned move: from the stop until word came that it runs.
    pub hand_over_ms: Option<f64>,
    /// Most private memory of the source's daemon, bytes (RAM file not counted).
    pub source_memory_bytes: u64,
    /// And of the target's.
    pub target_memory_bytes: u64,
    /// Of the source's packets, how many the link's queue dropped.
    pub queue_dropped_ratio: f64,
    /// Batch bytes that were sent again after a reconnect.
    pub resent_bytes: u64,
}

impl Report {
    pub(super) fn print(&self) {
        let row = |name: &str, value: String| println!("  {name:<34}{value}");
        println!();
        println!("What was measured, over {}:", self.link);
        row("first copy", format!("{:.1} s", self.first_copy_s));
        row(
            "  on the wire",
            format!(
                "{}, {:.2} × the floor of {}",
                bytes(self.first_copy_wan_bytes),
                self.first_copy_to_floor,
                bytes(self.first_copy_floor_bytes)
            ),
        );
        row("recovery points sealed", self.points_sealed.to_string());
        row(
            "  steady, on the wire",
            format!(
                "{}/s; points {:.2} × their floor",
                bytes(self.steady_wan_bytes_per_s as u64),
                self.steady_to_floor
            ),
        );
        row(
            "  pause",
            format!(
                "{:.1} ms median, {:.1} ms at most",
                self.pause_ms_median, self.pause_ms_max
            ),
        );
        row(
            "  RAM scanned at",
            format!("{:.1} GB/s", self.ram_scan_gb_per_s),
        );
        if self.scenario == "planned" {
            row("lost", "nothing".to_owned());
            row("command until it ran", format!("{:.0} ms", self.rto_ms));
        } else {
            row("lost (RPO)", millis(self.rpo_ms as u64));
            row(
                "declaration until it ran (RTO)",
                format!("{:.0} ms", self.rto_ms),
            );
        }
        row(
            "heartbeat was silent for",
            format!("{:.0} ms", self.blackout_ms),
        );
        row(
            "memory of the daemons",
            format!(
                "{} at the source, {} at the target",
                bytes(self.source_memory_bytes),
                bytes(self.target_memory_bytes)
            ),
        );
        println!();
        let mark = if self.verified {
            "VERIFIED"
        } else {
            "NOT VERIFIED"
        };
        println!("{mark}: {}", self.verdict);
    }
}
