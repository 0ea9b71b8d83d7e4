//! Alerts of a site: what stands, who cares for it, and the events they make.
//!
//! What can be measured is looked at every second ([`super::watch`]); what
//! happens is reported with [`Site::raise`] and taken back with [`Site::clear`].
//! Both go through one [`Board`], which tells each alert once. Every change is
//! an event, a line of the log, and is kept over restarts.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::alert::{
    Active, Board, Change, Facts, Finding, Now, Severity, Transition, judge,
};
use farhaven_policies::files::Alerts as Thresholds;
use farhaven_storage_sync::unit::GuestId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use farhaven_policies::alert::{Finding as Alert, Kind};

use super::events::{AlertRef, EventKind, EventLog};
use super::operate::OperateError;
use super::sealed::SealedTimes;
use super::watch::Skew;
use super::{Site, checked};

/// Longest name of who acknowledges, in bytes.
const LONGEST_NAME: usize = 128;
/// Longest file of kept alerts that is read.
const LONGEST_FILE: u64 = 64 << 20;

/// An alert that stands, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertView {
    /// Its number.
    pub id: u64,
    /// What it is about.
    pub kind: Kind,
    /// The guest, group, peer or file.
    pub subject: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is the matter.
    pub what: String,
    /// What to do about it.
    pub advice: String,
    /// When it was raised.
    pub since: Timestamp,
    /// Who cares for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged_by: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged_at: Option<Timestamp>,
}

impl From<&Active> for AlertView {
    fn from(alert: &Active) -> Self {
        let finding = &alert.finding;
        let acknowledged = alert.acknowledged.as_ref();
        Self {
            id: alert.id,
            kind: finding.kind,
            subject: finding.subject.clone(),
            severity: finding.severity,
            what: finding.what.clone(),
            advice: finding.advice.clone(),
            since: timestamp(alert.since),
            acknowledged_by: acknowledged.map(|a| a.by.clone()),
            acknowledged_at: acknowledged.map(|a| timestamp(a.at)),
        }
    }
}

fn timestamp(unix_ns: u64) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(unix_ns)).unwrap_or(Timestamp::MAX)
}

/// What a site holds of alerts and events.
pub(super) struct Alerts {
    pub(super) events: EventLog,
    board: Mutex<Board>,
    thresholds: RwLock<Thresholds>,
    started: Instant,
    kept: PathBuf,
    /// When each guest of a peer was last tested with success...
    tested: SealedTimes,
    /// ...and since when it is known here.
    known: SealedTimes,
    skews: Mutex<BTreeMap<String, Skew>>,
}

impl Alerts {
    /// Opens what is kept of them under a site's directory.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn open(state: &Path) -> io::Result<Self> {
        let kept = state.join("alerts.json");
        let board = read_board(&kept).unwrap_or_else(|error| {
            tracing::warn!(path = %kept.display(), %error, "what alerts stood is not known any more; what is found is told anew");
            Board::default()
        });
        Ok(Self {
            events: EventLog::open(&state.join("events"))?,
            board: Mutex::new(board),
            thresholds: RwLock::default(),
            started: Instant::now(),
            kept,
            tested: SealedTimes::open(&state.join("tested")),
            known: SealedTimes::open(&state.join("known")),
            skews: Mutex::default(),
        })
    }

    /// How the clocks of peers stand, by their names.
    pub(super) fn skews(&self) -> MutexGuard<'_, BTreeMap<String, Skew>> {
        self.skews.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When this guest of a peer was last tested well.
    pub(super) fn tested_at(&self, guest: GuestId) -> Option<SystemTime> {
        self.tested.of(guest)
    }

    /// Was this guest of a peer ever tested, and for how long was it not?
    pub(super) fn untested(&self, guest: GuestId) -> (bool, Option<Duration>) {
        let now = SystemTime::now();
        let age = |at| now.duration_since(at).unwrap_or_default();
        if let Some(at) = self.tested.of(guest) {
            return (true, Some(age(at)));
        }
        let known = self.known.of(guest).unwrap_or_else(|| {
            self.known.note(guest, now);
            now
        });
        (false, Some(age(known)))
    }

    fn now(&self) -> Now {
        Now {
            wall: super::unix_ns(SystemTime::now()),
            steady: self.started.elapsed(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the board, and tells of what changed.
    fn change<C: IntoIterator<Item = Change>>(&self, change: impl FnOnce(&mut Board, Now) -> C) {
        let now = self.now();
        let mut board = self.lock();
        let changes: Vec<Change> = change(&mut board, now).into_iter().collect();
        for change in &changes {
            self.tell(change);
        }
        if !changes.is_empty()
            && let Ok(text) = checked::text(&*board)
        {
            // Under the lock: the later one is written later.
            self.events.replace(self.kept.clone(), text.into_bytes());
        }
    }

    fn tell(&self, change: &Change) {
        let (alert, finding) = (&change.alert, &change.alert.finding);
        let (kind, subject) = (finding.kind, finding.subject.as_str());
        let what = match change.transition {
            Transition::Cleared => format!("over: {}", finding.what),
            Transition::Acknowledged => {
                let by = alert.acknowledged.as_ref().map_or("", |a| a.by.as_str());
                format!("{by} cares for it: {}", finding.what)
            }
            _ => finding.what.clone(),
        };
        let (id, advice) = (alert.id, finding.advice.as_str());
        match (change.transition, finding.severity) {
            (Transition::Raised | Transition::Worsened, Severity::Critical) => {
                tracing::error!(alert = id, %kind, subject, advice, "alert, critical: {what}");
            }
            (Transition::Raised | Transition::Worsened, _) => {
                tracing::warn!(alert = id, %kind, subject, advice, "alert: {what}");
            }
            _ => tracing::info!(alert = id, %kind, subject, "alert {what}"),
        }
        let event = match change.transition {
            Transition::Raised => EventKind::AlertRaised,
            Transition::Worsened => EventKind::AlertWorsened,
            Transition::Eased => EventKind::AlertEased,
            Transition::Cleared => EventKind::AlertCleared,
            Transition::Acknowledged => EventKind::AlertAcknowledged,
        };
        let alert = AlertRef {
            id,
            kind,
            advice: advice.to_owned(),
        };
        self.events
            .note(event, subject, finding.severity, &what, Some(alert));
    }
}

fn read_board(path: &Path) -> io::Result<Board> {
    Ok(checked::read_if_there(path, LONGEST_FILE)?.unwrap_or_default())
}

impl Site {
    /// Raises an alert that stands until [`Site::clear`], also over restarts.
    /// One that stands already is told once. Never waits.
    pub fn raise(&self, alert: Alert) {
        self.alerts.change(|board, now| board.raise(now, alert));
    }

    /// What was raised is over. Nothing happens if it does not stand. Never waits.
    pub fn clear(&self, kind: Kind, subject: &str) {
        self.alerts
            .change(|board, now| board.clear(now, kind, subject));
    }

    /// Writes down that something happened. Never waits.
    pub fn note(&self, kind: EventKind, subject: &str, what: &str) {
        self.alerts
            .events
            .note(kind, subject, Severity::Info, what, None);
    }

    /// A test failover of this guest of a peer went well, to its very end.
    pub fn note_tested(&self, guest: GuestId) {
        let kept = self.alerts.tested.note_durably(guest, SystemTime::now());
        if let Err(error) = kept {
            tracing::error!(%guest, %error, "the time of its last good test is not kept; a restart forgets it");
        }
    }

    /// Since its last good test; `None`: there was none.
    pub fn last_tested(&self, guest: GuestId) -> Option<Duration> {
        let at = self.alerts.tested.of(guest)?;
        Some(SystemTime::now().duration_since(at).unwrap_or_default())
    }

    /// The alerts that stand: the worst first, then the oldest.
    pub fn alerts(&self) -> Vec<AlertView> {
        let board = self.alerts.lock();
        board.active().into_iter().map(AlertView::from).collect()
    }

    /// From now on alerts are judged by these thresholds.
    pub fn heed_thresholds(&self, thresholds: Thresholds) {
        let mut held = self
            .alerts
            .thresholds
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *held = thresholds;
    }

    /// Subjects of the alerts of this kind that were raised and stand.
    pub fn raised(&self, kind: Kind) -> Vec<String> {
        self.alerts.lock().reported(kind)
    }

    /// Notes that somebody cares for an alert; it stands until its reason is gone.
    ///
    /// # Errors
    /// When there is no such alert, or no name.
    pub fn acknowledge(&self, id: u64, by: &str) -> Result<AlertView, OperateError> {
        let by = by.trim();
        let plain = !by.is_empty() && by.len() <= LONGEST_NAME && !by.contains(char::is_control);
        if !plain {
            return Err(OperateError::Conflict(format!(
                "say who acknowledges it, in up to {LONGEST_NAME} bytes"
            )));
        }
        let mut acknowledged = None;
        self.alerts.change(|board, now| {
            let change = board.acknowledge(now, id, by);
            acknowledged = change.as_ref().map(|c| AlertView::from(&c.alert));
            change
        });
        acknowledged.ok_or_else(|| {
            OperateError::Unknown(format!(
                "no alert {id} stands; `farhaven alert list` shows those that do, `farhaven events` those that are over"
            ))
        })
    }

    /// Takes in what was measured just now.
    pub(super) fn judge(&self, facts: &Facts) {
        let thresholds = self.alerts.thresholds.read();
        let thresholds = thresholds.unwrap_or_else(PoisonError::into_inner).clone();
        self.alerts.change(|board, now| {
            let found: Vec<Finding> = judge(&thresholds, facts, board);
            board.observe(now, found)
        });
    }

    /// Events after that number, the oldest first, at most so many; where there
    /// are none yet, `patience` is waited for one.
    pub async fn events(
        &self,
        after: u64,
        most: usize,
        patience: Duration,
    ) -> Vec<super::events::Event> {
        let log = &self.alerts.events;
        // A number from a log that was lost: its reader begins anew.
        let after = if after > log.newest() { 0 } else { after };
        log.wait(after, patience).await;
        log.after(after, most)
    }
}
