//! What is written down of an evacuation: enough for another process to go on,
//! and for people to see afterwards how it went against its plan. One JSON file
//! each in `evacuations/` of the site's directory, replaced at each step.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farhaven_policies::evacuate::{Plan, Verdict};
use farhaven_policies::units::{Period, Rate};
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::super::checked;
use super::super::view::{MoveOutlook, MoveReport, Phase};

/// Where they are, below a site's directory.
pub(in crate::site) const EVACUATIONS: &str = "evacuations";

/// Longest file that is read.
const LONGEST_FILE: u64 = 64 << 20;
/// So many evacuations are kept; older ones go when a new one begins.
const KEPT: usize = 50;
/// So many changes of the plan are kept, the newest.
const MOST_CHANGES: usize = 500;

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Order {
    /// The peer that everything goes to.
    pub to: String,
    /// Everything is to run there after this time; as soon as may be when absent.
    pub deadline: Option<Period>,
    /// These guests only...
    pub guests: Vec<String>,
    /// ...and those of these groups; every guest of the site when both are empty.
    pub groups: Vec<String>,
    /// Move guests even if they stand longer than their policies allow.
    pub accept_pause: bool,
    /// Begin even if not everything fits before the deadline.
    pub partial: bool,
    /// Count on a link of this rate instead of the measured one.
    pub link_rate: Option<Rate>,
}

/// Where an evacuation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvacuationState {
    /// Guests are being moved.
    Running,
    /// Nothing new is begun until it is resumed.
    Paused,
    /// Nothing new is begun; what has begun its last cut comes to its end.
    Aborting,
    /// Everything runs at the peer.
    Done,
    /// It is over, and something runs on here.
    PartlyDone,
    /// It was aborted; what had not moved runs on here.
    Aborted,
}

impl EvacuationState {
    /// Is it over?
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::PartlyDone | Self::Aborted)
    }

    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "PAUSED",
            Self::Aborting => "ABORTING",
            Self::Done => "done",
            Self::PartlyDone => "PARTLY DONE",
            Self::Aborted => "ABORTED",
        }
    }
}

/// Where a guest stands in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// Not protected yet.
    Waiting,
    /// It is being copied for the first time, or attached.
    Copying,
    /// Protected: it can be moved.
    Ready,
    /// Its move is under way.
    Moving,
    /// It runs at the peer.
    Moved,
    /// It was tried and runs on here.
    Failed,
    /// It was not tried and runs on here.
    Left,
}

impl GuestState {
    /// Is nothing more done about it?
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Moved | Self::Failed | Self::Left)
    }

    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Copying => "first copy",
            Self::Ready => "ready",
            Self::Moving => "moving",
            Self::Moved => "moved",
            Self::Failed => "FAILED",
            Self::Left => "LEFT",
        }
    }
}

/// What the first plan promised of a guest; times since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// In which wave.
    pub wave: usize,
    /// When it stops here.
    pub cut_at_ms: u64,
    /// When it runs at the peer.
    pub runs_at_ms: u64,
    /// Bytes on the link.
    pub bytes: u64,
    /// How long it runs nowhere.
    pub blackout_ms: f64,
}

/// A guest of an evacuation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Evacuee {
    /// Its name.
    pub guest: String,
    /// Its id.
    pub id: GuestId,
    /// Where it stands.
    pub state: GuestState,
    /// Guests that must run at the peer before it goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// What the first plan promised; absent when that left it here.
    pub planned: Option<Planned>,
    /// When the plan in force has it run at the peer, since the beginning; absent
    /// when that leaves it here.
    pub expected_ms: Option<u64>,
    /// It was begun so many times.
    pub tries: u32,
    /// What hinders it, or why it stays.
    pub why: String,
    /// When it ran at the peer, since the beginning.
    pub moved_ms: Option<u64>,
    /// Bytes of its batches since the evacuation began.
    pub bytes: u64,
    /// Its move; absent when nobody heard how that went.
    pub report: Option<MoveReport>,
    /// Where its protection stands. Told, not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// In the pass under way: bytes looked at and to look at. Told, not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<(u64, u64)>,
    /// What its move comes to. Told, not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlook: Option<MoveOutlook>,
}

/// A change of the plan, or something that people should know of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// When, since the beginning.
    pub at_ms: u64,
    /// Why, or what.
    pub what: String,
    /// When the end was expected before, since the beginning.
    pub finish_before_ms: Option<u64>,
    /// When it is now.
    pub finish_ms: Option<u64>,
}

/// An evacuation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Evacuation {
    /// Its number at this site.
    pub id: u64,
    /// What was asked for.
    pub order: Order,
    /// Where it stands.
    pub state: EvacuationState,
    /// When it began, nanoseconds since 1970.
    pub begun_at: u64,
    /// When it was over, since the beginning.
    pub ended_ms: Option<u64>,
    /// What the first plan said of the deadline.
    pub promised: Verdict,
    /// When the first plan had everything moved, since the beginning.
    pub promised_finish_ms: u64,
    /// The plan in force. Its times are since `planned_ms`.
    pub plan: Plan,
    /// When that was made, since the beginning.
    pub planned_ms: u64,
    /// Its guests, in the order of the first plan.
    pub guests: Vec<Evacuee>,
    /// How the plan changed, the oldest first.
    pub changes: Vec<Change>,
    /// What hinders all of it now; empty when nothing does.
    pub trouble: String,
}

impl Evacuation {
    /// How long it has been going on, or took.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        let ended = self.ended_ms.map(Duration::from_millis);
        ended.unwrap_or_else(|| super::super::age(self.begun_at))
    }

    /// Until the deadline; zero when it has passed.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        let deadline = self.order.deadline?.duration();
        Some(deadline.saturating_sub(self.elapsed()))
    }

    /// When the plan in force has everything moved, since the beginning.
    #[must_use]
    pub fn finish_ms(&self) -> u64 {
        self.planned_ms.saturating_add(millis(self.plan.finish))
    }

    /// So many guests are in this state.
    #[must_use]
    pub fn count(&self, state: GuestState) -> usize {
        self.guests.iter().filter(|g| g.state == state).count()
    }

    pub(super) fn note(&mut self, what: String, finish_before_ms: Option<u64>) {
        let changed = Change {
            at_ms: millis(self.elapsed()),
            what,
            finish_before_ms,
            finish_ms: finish_before_ms.map(|_| self.finish_ms()),
        };
        if self.changes.len() >= MOST_CHANGES {
            self.changes.remove(0);
        }
        self.changes.push(changed);
    }
}

/// Milliseconds of a span.
pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The evacuations of a site, on disk.
#[derive(Debug, Clone)]
pub(super) struct Records {
    directory: PathBuf,
}

impl Records {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self {
            directory: state_dir.join(EVACUATIONS),
        }
    }

    /// Numbers of all that are kept, the oldest first.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                name.to_str()?.strip_suffix(".json")?.parse().ok()
            })
            .collect();
        numbers.sort_unstable();
        numbers
    }

    /// Reads one.
    pub(super) fn read(&self, number: u64) -> Result<Evacuation, String> {
        let path = self.path(number);
        let told = |error: String| format!("{}: {error}", path.display());
        checked::read(&path, LONGEST_FILE).map_err(|e| told(e.to_string()))
    }

    /// Writes one, durably.
    pub(super) fn keep(&self, record: &Evacuation) -> io::Result<()> {
        checked::write(&self.path(record.id), record)
    }

    /// Removes the oldest of too many.
    pub(super) fn forget_old(&self) {
        let numbers = self.numbers();
        for old in &numbers[..numbers.len().saturating_sub(KEPT)] {
            if let Err(error) = fs::remove_file(self.path(*old)) {
                tracing::warn!(evacuation = old, %error, "an old record was not removed");
            }
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number}.json"))
    }
}
