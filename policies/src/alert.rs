//! (thresholds, measured facts) -> which alerts stand, and what changed since the last look.
//!
//! [`judge`] turns facts into [`Finding`]s; a [`Board`] holds what stands,
//! raises each alert once however often it is found, and clears it only after
//! it was not found for a while: what comes and goes is one alert. What is no
//! measured fact but happens (a policy file that broke, a damaged batch) is told
//! to the board with [`Board::raise`] and [`Board::clear`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::judge::{Facts, PeerFacts, SourceFacts, StandbyFacts, StoreFacts, judge};

mod judge;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;

/// Most alerts that stand at a time: what is found beyond them waits until one is cleared.
pub const MOST_ALERTS: usize = 4096;
/// Longest sentence of an alert, and longest name in it, in bytes.
pub const LONGEST_TEXT: usize = 1024;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something promised is at risk.
    Warning,
    /// Something promised is not kept.
    Critical,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        })
    }
}

/// What an alert is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The newest point is too old.
    RpoOverTarget,
    /// There is nothing to fail over to.
    Unprotected,
    /// No failover was tested for too long.
    TestOverdue,
    /// The file system of the store is nearly full.
    StoreNearlyFull,
    /// The clocks of two sites differ.
    ClockSkew,
    /// A newer term is known: the copy here is stopped for good.
    FenceRaised,
    /// Policy files cannot be used: those of before are in force.
    PolicyBroken,
    /// Stored data is damaged.
    StoreDamaged,
    /// A guest cannot be reached, or has ended.
    GuestLost,
    /// A member of a group is not protected with the others.
    GroupDegraded,
    /// A cut was given up: the guest goes on, its points get older.
    CutGivenUp,
    /// A guest's filesystems were to be frozen for its points, and are not.
    NotQuiesced,
    /// A guest stands still and should not.
    GuestStopped,
    /// A peer was not heard of for a while.
    PeerUnreachable,
    /// Something hinders a peer, by its own word.
    PeerTroubled,
    /// A kind that a newer version wrote down.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::RpoOverTarget => "rpo_over_target",
            Kind::Unprotected => "unprotected",
            Kind::TestOverdue => "test_overdue",
            Kind::StoreNearlyFull => "store_nearly_full",
            Kind::ClockSkew => "clock_skew",
            Kind::FenceRaised => "fence_raised",
            Kind::PolicyBroken => "policy_broken",
            Kind::StoreDamaged => "store_damaged",
            Kind::GuestLost => "guest_lost",
            Kind::GroupDegraded => "group_degraded",
            Kind::CutGivenUp => "cut_given_up",
            Kind::NotQuiesced => "not_quiesced",
            Kind::GuestStopped => "guest_stopped",
            Kind::PeerUnreachable => "peer_unreachable",
            Kind::PeerTroubled => "peer_troubled",
            Kind::Unknown => "unknown",
        })
    }
}

/// Something that deserves an alert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is about.
    pub kind: Kind,
    /// The guest, group, peer or file.
    pub subject: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is the matter, in a sentence.
    pub what: String,
    /// What to do about it.
    pub advice: String,
    /// Not found for so long, it is over.
    #[serde(default)]
    pub clear_after: Duration,
}

impl Finding {
    /// One that is over as soon as it is not found any more.
    pub fn new(
        kind: Kind,
        subject: impl Into<String>,
        severity: Severity,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            kind,
            subject: subject.into(),
            severity,
            what: what.into(),
            advice: advice.into(),
            clear_after: Duration::ZERO,
        }
    }

    /// The same, over only when it was not found for so long.
    #[must_use]
    pub fn clears_after(self, clear_after: Duration) -> Finding {
        Finding {
            clear_after,
            ..self
        }
    }

    fn key(&self) -> String {
        key(self.kind, &self.subject)
    }

    /// Names and sentences come from peers and files: they take bounded memory.
    fn bounded(mut self) -> Finding {
        for text in [&mut self.subject, &mut self.what, &mut self.advice] {
            if text.len() > LONGEST_TEXT {
                let end = (0..=LONGEST_TEXT - 3)
                    .rev()
                    .find(|&at| text.is_char_boundary(at));
                text.truncate(end.unwrap_or(0));
                text.push('…');
            }
        }
        self
    }
}

fn key(kind: Kind, subject: &str) -> String {
    format!("{kind}/{subject}")
}

/// Who has seen an alert and cares for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    /// A name.
    pub by: String,
    /// When, nanoseconds since 1970.
    pub at: u64,
}

/// An alert that stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Active {
    /// Its number, never given twice.
    pub id: u64,
    /// What it is, as found last.
    pub finding: Finding,
    /// When it was raised, nanoseconds since 1970.
    pub since: u64,
    /// Who cares for it.
    pub acknowledged: Option<Acknowledgement>,
    /// It was reported, and stands until that is taken back.
    #[serde(default)]
    reported: bool,
    /// When it was last found. In a daemon that starts anew that is its start:
    /// what stood gets its time to be found again.
    #[serde(skip)]
    seen: Duration,
    /// When it was last found as bad as it is told.
    #[serde(skip)]
    bad: Duration,
}

/// Two clocks: one that tells people, one that never goes back.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Nanoseconds since 1970.
    pub wall: u64,
    /// Since some moment of this process.
    pub steady: Duration,
}

/// What became of an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// It stands now.
    Raised,
    /// It is worse than before; nobody has acknowledged that.
    Worsened,
    /// It is less bad than before.
    Eased,
    /// It is over.
    Cleared,
    /// Somebody cares for it.
    Acknowledged,
}

/// An alert and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What became of it.
    pub transition: Transition,
    /// The alert, as it is now or was at its end.
    pub alert: Active,
}

/// The alerts that stand. It is kept as it is, to outlive a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Board {
    newest: u64,
    active: BTreeMap<String, Active>,
}

impl Board {
    /// The alerts that stand: the worst first, then the oldest.
    pub fn active(&self) -> Vec<&Active> {
        let mut all: Vec<&Active> = self.active.values().collect();
        all.sort_by_key(|alert| (std::cmp::Reverse(alert.finding.severity), alert.id));
        all
    }

    /// How bad an alert is that stands.
    pub fn severity(&self, kind: Kind, subject: &str) -> Option<Severity> {
        let alert = self.active.get(&key(kind, subject))?;
        Some(alert.finding.severity)
    }

    /// Subjects of the alerts of this kind that were reported and stand.
    pub fn reported(&self, kind: Kind) -> Vec<String> {
        let these = self.active.values();
        let these = these.filter(|alert| alert.reported && alert.finding.kind == kind);
        these.map(|alert| alert.finding.subject.clone()).collect()
    }

    /// Takes in all that is found now. What was reported counts as found until
    /// [`Board::clear`].
    pub fn observe(&mut self, now: Now, found: Vec<Finding>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut these = BTreeSet::new();
        for finding in found {
            these.insert(finding.key());
            changes.extend(self.found(now, finding, false));
        }
        let over = |(key, alert): &(&String, &Active)| {
            !alert.reported && !these.contains(*key) && passed(alert, alert.seen, now)
        };
        let gone: Vec<String> = self
            .active
            .iter()
            .filter(over)
            .map(|(key, _)| key.clone())
            .collect();
        changes.extend(gone.iter().filter_map(|key| self.end(key)));
        changes
    }

    /// Something happened that stands until it is taken back.
    pub fn raise(&mut self, now: Now, finding: Finding) -> Option<Change> {
        self.found(now, finding, true)
    }

    /// What was reported is over; what is cleared only after a while, when a
    /// look ([`Board::observe`]) finds that it has passed.
    pub fn clear(&mut self, now: Now, kind: Kind, subject: &str) -> Option<Change> {
        let key = key(kind, subject);
        let alert = self.active.get_mut(&key).filter(|alert| alert.reported)?;
        alert.reported = false;
        alert.seen = now.steady;
        match alert.finding.clear_after.is_zero() {
            true => self.end(&key),
            false => None,
        }
    }

    /// Somebody cares for an alert. `None`: there is no such alert.
    pub fn acknowledge(&mut self, now: Now, id: u64, by: &str) -> Option<Change> {
        let alert = self.active.values_mut().find(|alert| alert.id == id)?;
        alert.acknowledged = Some(Acknowledgement {
            by: by.to_owned(),
            at: now.wall,
        });
        Some(Change {
            transition: Transition::Acknowledged,
            alert: alert.clone(),
        })
    }

    fn found(&mut self, now: Now, finding: Finding, reported: bool) -> Option<Change> {
        let finding = finding.bounded();
        let key = finding.key();
        let Some(alert) = self.active.get_mut(&key) else {
            if self.active.len() >= MOST_ALERTS {
                return None;
            }
            self.newest += 1;
            let alert = Active {
                id: self.newest,
                finding,
                since: now.wall,
                acknowledged: None,
                reported,
                seen: now.steady,
                bad: now.steady,
            };
            self.active.insert(key, alert.clone());
            return Some(Change {
                transition: Transition::Raised,
                alert,
            });
        };
        alert.reported |= reported;
        alert.seen = now.steady;
        let (before, found) = (alert.finding.severity, finding.severity);
        let transition = match found.cmp(&before) {
            std::cmp::Ordering::Greater => {
                alert.acknowledged = None;
                Some(Transition::Worsened)
            }
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Less => {
                // As bad as it was until it was not for a while.
                if !passed(alert, alert.bad, now) {
                    return None;
                }
                Some(Transition::Eased)
            }
        };
        alert.bad = now.steady;
        alert.finding = finding;
        transition.map(|transition| Change {
            transition,
            alert: alert.clone(),
        })
    }

    fn end(&mut self, key: &str) -> Option<Change> {
        let alert = self.active.remove(key)?;
        Some(Change {
            transition: Transition::Cleared,
            alert,
        })
    }
}

/// Is that so long ago that it is over?
fn passed(alert: &Active, since: Duration, now: Now) -> bool {
    now.steady.saturating_sub(since) >= alert.finding.clear_after
}
