//! What a site tells of itself: the types of the API's answers. Every figure
//! is measured; what is not known yet is absent.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::outlook::MoveOutlook;
use crate::replicate::message::ActivationTimes;

mod outlook;

/// Where a guest's protection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Known, not protected.
    #[default]
    Unprotected,
    /// Reaching the guest's monitor.
    Attaching,
    /// Waiting for the peer.
    Connecting,
    /// After a restart: learning what the peer holds.
    Resuming,
    /// Everything is being copied for the first time.
    FirstCopy,
    /// A first copy is being written to a medium.
    Exporting,
    /// The peer has not imported its seed yet.
    AwaitingSeed,
    /// A cut is being taken or shipped.
    Shipping,
    /// The newest point is sealed; waiting for the next cut.
    Protected,
    /// Paused by the operator.
    Paused,
    /// A planned move is under way.
    Moving,
    /// Stopped for a move; the peer's word is not known yet.
    Held,
    /// It runs at the peer now.
    Moved,
    /// A newer term is known: this copy is stopped for good.
    Fenced,
    /// The guest's monitor is gone.
    Lost,
}

impl Phase {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Phase::Unprotected => "unprotected",
            Phase::Attaching => "attaching",
            Phase::Connecting => "waiting for peer",
            Phase::Resuming => "resuming",
            Phase::FirstCopy => "first copy",
            Phase::Exporting => "writing seed",
            Phase::AwaitingSeed => "waiting for seed",
            Phase::Shipping => "shipping",
            Phase::Protected => "protected",
            Phase::Paused => "paused",
            Phase::Moving => "moving",
            Phase::Held => "HELD",
            Phase::Moved => "moved",
            Phase::Fenced => "FENCED",
            Phase::Lost => "LOST",
        }
    }
}

/// A guest that runs here.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SourceView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The peer it is protected to.
    pub peer: Option<String>,
    /// The group it is in.
    #[serde(default)]
    pub group: Option<String>,
    /// The group whose policy it is protected by. One that it is in no more is
    /// the one it left last: its protection goes on as it was.
    #[serde(default)]
    pub policy_of: Option<String>,
    /// Its disks alone are copied: at the peer it boots.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
    /// A run at the peer has it shut down here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shut_down: bool,
    /// Where it stands.
    pub phase: Phase,
    /// In the pass under way: bytes looked at and to look at.
    pub progress: Option<(u64, u64)>,
    /// Age of the newest sealed cut.
    pub rpo_ms: Option<u64>,
    /// What it should be at most.
    pub rpo_target_ms: Option<u64>,
    /// `ok`, `warning` (twice the target), `critical` (three times).
    pub rpo_health: Option<String>,
    /// How long the last cut stopped the guest.
    pub last_pause_ms: Option<f64>,
    /// Of that: scanning RAM.
    pub last_ram_scan_ms: Option<f64>,
    /// Bytes of RAM looked at in that time.
    pub last_ram_scanned_bytes: Option<u64>,
    /// Bytes that the last round left to the cut, as they change all the time.
    #[serde(default)]
    pub waiting_bytes: u64,
    /// From the last cut until it was sealed.
    pub last_seal_ms: Option<u64>,
    /// Points sealed since the daemon started.
    pub points_sealed: u64,
    /// Newest sealed point.
    pub newest_point: u64,
    /// Guest bytes handed over since the daemon started.
    pub guest_bytes: u64,
    /// Bytes of batches that carried them.
    pub wan_bytes: u64,
    /// The first over the second.
    pub ratio: Option<f64>,
    /// Batch bytes a second, over the last seconds.
    pub throughput_bytes_per_s: u64,
    /// The group's term.
    pub term: Option<u64>,
    /// What a move would take, by the newest point, or by the newest round
    /// while one is under way.
    #[serde(default)]
    pub outlook: Option<MoveOutlook>,
    /// What hinders it, and what to do. Empty when nothing does.
    pub trouble: String,
}

/// Bytes for people: `4.2 MB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A guest that a peer sends here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TargetView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The peer that sends it.
    pub from: String,
    /// Points that can be run.
    pub points: usize,
    /// The newest of them, 0 for none.
    pub newest_point: u64,
    /// That holds disks alone: the guest would boot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
    /// Its age: what a failover now would lose.
    pub rpo_ms: Option<u64>,
    /// The point whose RAM is ready to run.
    pub warm_point: Option<u64>,
    /// The group's term.
    pub term: Option<u64>,
    /// Set when it was taken over and runs here.
    pub active: Option<ActiveView>,
    /// When it was last tested here and all went well, milliseconds since 1970.
    #[serde(default)]
    pub tested_at: Option<u64>,
    /// Set while a test of it runs here, isolated.
    #[serde(default)]
    pub test: Option<TestView>,
    /// What hinders it, and what to do. Empty when nothing does.
    pub trouble: String,
}

/// A guest's serial console: all it wrote, and where to type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsolePaths {
    /// Everything that it wrote.
    pub log: PathBuf,
    /// Who connects sees what it writes from then on, and types into it.
    pub socket: PathBuf,
}

impl ConsolePaths {
    /// The console in a guest's directory, if it has one there.
    pub fn beside(directory: &Path) -> Option<Self> {
        let paths = Self {
            log: directory.join("console.log"),
            socket: directory.join("console.sock"),
        };
        paths.log.is_file().then_some(paths)
    }
}

/// A guest that was taken over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ActiveView {
    /// From which point.
    pub point: u64,
    /// Its QEMU's control socket; none for a guest inside of the daemon.
    pub qmp: Option<String>,
    /// Its QEMU's process; none for a guest inside of the daemon.
    pub pid: Option<u32>,
    /// Its serial console, where it is beside its other files.
    #[serde(default)]
    pub console: Option<ConsolePaths>,
    /// Its disks need the store no longer.
    pub hydrated: bool,
    /// Bytes copied to its own disks, and bytes to copy.
    pub hydration: Option<(u64, u64)>,
    /// Can it be rolled back, and until when is that thought of?
    #[serde(default)]
    pub commit: Option<super::turn::view::CommitView>,
    /// It is being rolled back to its source, and is stopped here for that.
    #[serde(default)]
    pub going_back: bool,
    /// What taking it over took.
    pub times: ActivationTimes,
}

/// A guest that runs as a test, isolated.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestView {
    /// From which point.
    pub point: u64,
    /// How long ago it was asked for.
    pub since_ms: u64,
    /// False while it is being started.
    pub running: bool,
    /// Its QEMU's control socket; none for a guest inside of the daemon.
    pub qmp: Option<String>,
    /// Its QEMU's process; none for a guest inside of the daemon.
    pub pid: Option<u32>,
    /// Its serial console, where it is beside its other files.
    pub console: Option<ConsolePaths>,
}

/// One paired site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerView {
    /// Its name.
    pub site: String,
    /// Its pinned key.
    pub key: String,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// Is there a connection now?
    pub connected: bool,
    /// Measured round trip.
    pub rtt_ms: Option<f64>,
    /// UDP bytes sent to it since the daemon started.
    pub sent_bytes: u64,
    /// UDP bytes received from it.
    pub received_bytes: u64,
    /// Packets found lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes of batches that left again although they had wholly arrived.
    pub resent_bytes: u64,
    /// Bytes of batches that came from it although they were here.
    #[serde(default)]
    pub repeated_bytes: u64,
    /// Bytes of batches that wait to leave, or are on the wire.
    #[serde(default)]
    pub queued_bytes: u64,
    /// Why the last connection ended; empty for never.
    pub last_disconnect: String,
    /// What hinders the peer's store, by its own word.
    pub trouble: String,
    /// Units that it was asked for by digest, since the daemon started.
    #[serde(default)]
    pub asked_units: u64,
    /// Of those, how many it held: they were not sent.
    #[serde(default)]
    pub found_units: u64,
}

/// A recovery point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PointView {
    /// Its number.
    pub point: u64,
    /// When the guest was stopped for it.
    pub cut_at: String,
    /// How long ago that was.
    pub age_ms: u64,
    /// How long the guest was stopped.
    pub pause_ms: f64,
    /// Of that: scanning RAM.
    pub ram_scan_ms: f64,
    /// Bytes of RAM looked at in that time.
    pub ram_scanned_bytes: u64,
    /// Guest bytes that changed since the point before.
    pub changed_bytes: u64,
    /// Bytes sent for it.
    pub sent_bytes: u64,
    /// The cut of its whole group that it is part of.
    #[serde(default)]
    pub group: Option<super::groups::PointGroup>,
    /// Whether the guest's agent had frozen its filesystems: application-consistent
    /// if so. Absent where that was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
    /// It holds disks alone: a guest boots from it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
    /// A scrub found that it cannot be restored in full, and why: it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
    /// Its name: it is kept until that is taken from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A whole site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SiteView {
    /// Its name.
    pub site: String,
    /// Its key.
    pub key: String,
    /// Farhaven's version.
    pub version: String,
    /// Paired sites.
    pub peers: Vec<PeerView>,
    /// Guests that run here.
    pub guests: Vec<SourceView>,
    /// Guests that peers send here.
    pub standbys: Vec<TargetView>,
    /// Protection groups, this site's own and its peers'.
    #[serde(default)]
    pub groups: Vec<super::groups::GroupView>,
    /// The policy files, if any are configured.
    #[serde(default)]
    pub policy_files: Option<super::groups::PolicyFilesView>,
    /// Alerts that stand.
    #[serde(default)]
    pub alerts: Vec<super::alerts::AlertView>,
}

/// What a failover did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FailoverReport {
    /// The guest's name.
    pub guest: String,
    /// From which point.
    pub point: u64,
    /// What was lost: from that point's cut until the declaration.
    pub rpo_ms: u64,
    /// From the declaration until the guest ran.
    pub rto_ms: f64,
    /// The term it runs under.
    pub term: u64,
    /// Its QEMU's control socket; none for a guest inside of the daemon.
    pub qmp: Option<String>,
    /// Its QEMU's process; none for a guest inside of the daemon.
    pub pid: Option<u32>,
    /// Its serial console, where it is beside its other files.
    #[serde(default)]
    pub console: Option<ConsolePaths>,
    /// Step by step.
    pub times: ActivationTimes,
    /// What was done beside that; empty when nothing was.
    #[serde(default)]
    pub note: String,
}

/// What a test failover did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestReport {
    /// The guest's name.
    pub guest: String,
    /// From which point.
    pub point: u64,
    /// When that was cut, in nanoseconds since 1970.
    pub cut_at_unix_ns: u64,
    /// How old that point was at the command: what a failover in its place would have lost.
    pub age_ms: u64,
    /// From the command, for a guest of a group that for all of it, until the guest ran.
    pub rto_ms: f64,
    /// Its QEMU's control socket; none for a guest inside of the daemon.
    pub qmp: Option<String>,
    /// Its QEMU's process; none for a guest inside of the daemon.
    pub pid: Option<u32>,
    /// Its serial console, where it is beside its other files.
    pub console: Option<ConsolePaths>,
    /// Step by step; no term was raised.
    pub times: ActivationTimes,
}

/// What the end of a test freed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestEnded {
    /// The guest's name.
    pub guest: String,
    /// The point it ran from.
    pub point: u64,
    /// From the command until its end.
    pub ran_ms: u64,
    /// Bytes of memory that it held.
    pub ram_bytes: u64,
    /// Bytes of disk that it held: what it wrote, and its logs.
    pub overlay_bytes: u64,
    /// What was removed, for people.
    pub removed: Vec<String>,
}

fn usually() -> bool {
    true
}

/// What a planned move did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MoveReport {
    /// The guest's name.
    pub guest: String,
    /// Where it runs now.
    pub to: String,
    /// Does it? Of a group that site may have the terms of all, and cannot run one.
    #[serde(default = "usually")]
    pub runs: bool,
    /// The point it was handed over with.
    pub point: u64,
    /// From the stop here until word came that it runs there: the blackout and half a round trip.
    pub blackout_ms: f64,
    /// What was expected of that before the last cut.
    #[serde(default)]
    pub expected_blackout_ms: f64,
    /// From the command until it ran.
    pub total_ms: f64,
    /// Bytes sent while it was stopped.
    pub final_bytes: u64,
    /// The term it runs under.
    pub term: u64,
    /// Step by step, at the peer.
    pub times: ActivationTimes,
    /// What was left undone here; empty when nothing was.
    pub note: String,
}
