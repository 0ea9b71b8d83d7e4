//! What is told of commits, rollbacks, reprotection and evidence. Every figure is measured.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::replicate::message::CommitTerms;
use crate::site::age;

/// Whether a guest that was taken over can be rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitView {
    /// It stays: there is no way back by a rollback.
    pub committed: bool,
    /// Milliseconds until its window is over; 0 once it is, or once committed.
    pub left_ms: u64,
    /// It commits by itself then.
    pub when_over: bool,
}

impl CommitView {
    pub(crate) fn of(at: u64, committed_at: Option<u64>, terms: CommitTerms) -> Self {
        let left = terms.window.saturating_sub(age(at));
        let committed = committed_at.is_some();
        Self {
            committed,
            left_ms: if committed {
                0
            } else {
                left.as_millis() as u64
            },
            when_over: terms.when_over,
        }
    }
}

/// What came of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitReport {
    /// The guest.
    pub guest: String,
    /// The site that it came from.
    pub from: String,
    /// When, nanoseconds since 1970.
    pub committed_at: u64,
    /// That site knows of it; else it is told when it is back.
    pub told: bool,
    /// What else there is to say; empty for nothing.
    pub note: String,
}

/// Where to roll back to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RollBack {
    /// Here, from this point; to the source when absent.
    pub point: Option<u64>,
    /// What was written since is lost, and so may be what the source's copy lacks.
    pub accept_loss: bool,
}

/// What came of a rollback.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RollbackReport {
    /// The guest.
    pub guest: String,
    /// The site where it runs now.
    pub at: String,
    /// The point that it was rolled back to; none at its source, where it goes on as it was.
    pub point: Option<u64>,
    /// The term it runs under.
    pub term: u64,
    /// What ran here before that is lost: from the takeover until it was stopped.
    pub lost_ms: u64,
    /// How long it ran nowhere.
    pub blackout_ms: f64,
    /// What else there is to say; empty for nothing.
    pub note: String,
}

/// What came of a reprotection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReprotectReport {
    /// The guest.
    pub guest: String,
    /// The site it is protected to now.
    pub to: String,
    /// Its first point there; 0 when that is still under way.
    pub point: u64,
    /// Bytes of the guest that differed from what was there.
    pub changed_bytes: u64,
    /// Bytes of the batches that carried them.
    pub sent_bytes: u64,
    /// Bytes that its old copy takes in that site's store, until the first prune.
    pub base_bytes: u64,
    /// How long it took, the reading of the old copy included.
    pub took_ms: u64,
    /// What else there is to say; empty for nothing.
    pub note: String,
}

/// A copy of a guest that was stopped for good, or what is left of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvidenceView {
    /// The guest.
    pub guest: String,
    /// Its id.
    pub id: String,
    /// Which of its copies: tells them apart.
    pub copy: String,
    /// What it is, for people.
    pub what: String,
    /// Its monitor lives, with its memory: the machine is stopped.
    pub alive: bool,
    /// It holds nothing that the site that runs the guest does not have.
    pub unchanged: bool,
    /// It is still needed for a rollback.
    pub needed: bool,
    /// QEMU's control socket, where it lives.
    pub qmp: Option<PathBuf>,
    /// What this site keeps of it.
    pub directory: PathBuf,
    /// Bytes of the files there.
    pub bytes: u64,
}

/// A file of exported evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedFile {
    /// Its name in the directory.
    pub file: String,
    /// What it is: `definition`, `memory`, `disk`, `console`.
    pub what: String,
    /// Where it was.
    pub from: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content, in hexadecimal.
    pub blake3: String,
}

/// The manifest of exported evidence, as `manifest.json` beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvidenceManifest {
    /// The guest.
    pub guest: String,
    /// Its id.
    pub id: String,
    /// Which of its copies.
    pub copy: String,
    /// The site that exported it.
    pub site: String,
    /// When, nanoseconds since 1970.
    pub at: u64,
    /// What is there.
    pub files: Vec<ExportedFile>,
    /// What could not be exported, and why.
    pub missing: Vec<String>,
}

/// Evidence that is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discarded {
    /// The guest.
    pub guest: String,
    /// What went, for people.
    pub removed: Vec<String>,
    /// What stays although it is a part of it: files of the operator's own.
    pub left: Vec<PathBuf>,
}
