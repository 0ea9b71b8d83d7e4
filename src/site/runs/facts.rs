//! What a run learned and did, beside its audit record: the points that it runs
//! from, the terms that it took, what was measured, what was seen. A small file
//! of its own, `{runs}/{id}.facts`, replaced and synced with every change:
//! what a daemon that comes back must know is in it before it is acted on.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::activate::fence::Term;
use crate::runbook::perform::Failure;
use crate::site::checked;

/// Largest file of facts, in bytes: 64 guests of a group, with their consoles.
const LARGEST: u64 = 8 << 20;
/// Most checks and health answers that are kept; older ones stay.
const MOST_SEEN: usize = 1000;
/// Longest text of one of them.
const LONGEST: usize = 4096;

/// What is known of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunFacts {
    /// Done by `failover`, `move` or `test` themselves, and recorded as a run.
    pub quick: bool,
    /// The source was taken to be lost though it answered.
    pub forced: bool,
    /// By the guest's name.
    pub guests: BTreeMap<String, GuestFacts>,
    /// What checks saw, in order.
    pub checks: Vec<Seen>,
}

/// What is known of one of its guests; times in milliseconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestFacts {
    /// The group under which it is in the runbook.
    pub group: String,
    /// The point that it runs from.
    pub point: Option<u64>,
    /// When that was cut.
    pub cut_at: Option<u64>,
    /// What is lost: from the cut until the run was started.
    pub rpo_ms: Option<u64>,
    /// What it should be at most.
    pub rpo_target_ms: Option<u64>,
    /// The term under which it runs here.
    pub term: Option<Term>,
    /// Its networks here, as netdevs, by its own names for them; others are the site's.
    pub networks: BTreeMap<String, String>,
    /// The source said that its guest is stopped.
    pub source_stopped: bool,
    /// The run asked its source to shut it down, and has not started it again.
    pub shut_down: bool,
    /// Its agent freezes filesystems for its last cut.
    pub quiesce: bool,
    /// Whether it did so, once that is known.
    pub quiesced: Option<bool>,
    /// The source holds its guest for this run, which may run it here.
    pub held: bool,
    /// Bytes sent while the source's guest stood still.
    pub final_bytes: Option<u64>,
    /// When the source's guest was stopped for good.
    pub stopped_at: Option<u64>,
    /// When it ran here.
    pub started_at: Option<u64>,
    /// Bringing it to run here took so long, in milliseconds.
    pub start_ms: Option<f64>,
    /// When it was found to be healthy.
    pub healthy_at: Option<u64>,
    /// By what.
    pub healthy_by: String,
    /// What it showed.
    pub picture: Option<Picture>,
    /// When it was committed: it stays here.
    pub committed_at: Option<u64>,
    /// It was handed back to its source after it had run here for so long, in
    /// milliseconds: what it wrote meanwhile is lost.
    pub lost_ms: Option<u64>,
    /// Bytes sent until it was protected the other way round.
    pub reprotected_bytes: Option<u64>,
    /// What the cleanup removed.
    pub removed: Vec<String>,
    /// What was looked at afterwards, and is not there.
    pub gone: Vec<String>,
}

/// What a guest showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Picture {
    /// Its screen: a PNG in this file beside the facts.
    Screen {
        /// When, milliseconds since 1970.
        at: u64,
        /// The file's name.
        file: String,
    },
    /// The last lines of its serial console.
    Console {
        /// When, milliseconds since 1970.
        at: u64,
        /// The lines.
        text: String,
    },
}

impl Picture {
    /// Is anything to be seen in it? Right after its start a guest has shown nothing yet.
    pub fn shows(&self) -> bool {
        match self {
            Picture::Console { text, .. } => !text.trim().is_empty(),
            Picture::Screen { .. } => true,
        }
    }
}

/// What a check saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// When, milliseconds since 1970.
    pub at: u64,
    /// In which step.
    pub step: String,
    /// Of which guest.
    pub guest: String,
    /// What was looked at.
    pub what: String,
    /// Was it as it should be?
    pub good: bool,
    /// What was seen.
    pub seen: String,
}

/// The facts of one run, and their file.
#[derive(Debug)]
pub struct FactsFile {
    path: PathBuf,
    facts: Mutex<RunFacts>,
}

impl FactsFile {
    /// Of a run: those that are there, or none yet.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn open(directory: &Path, id: &str) -> io::Result<FactsFile> {
        let path = directory.join(format!("{id}.facts"));
        let facts = checked::read_if_there(&path, LARGEST).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok(FactsFile {
            path,
            facts: Mutex::new(facts.unwrap_or_default()),
        })
    }

    /// As they are.
    pub fn now(&self) -> RunFacts {
        self.lock().clone()
    }

    /// Of one guest.
    pub fn of(&self, guest: &str) -> GuestFacts {
        self.lock().guests.get(guest).cloned().unwrap_or_default()
    }

    /// Changes them; durable when it returns. Blocks for that long.
    ///
    /// # Errors
    /// When they cannot be written: they are as before then.
    pub fn change(&self, change: impl FnOnce(&mut RunFacts)) -> Result<(), Failure> {
        let mut facts = self.lock();
        let mut changed = facts.clone();
        change(&mut changed);
        changed.checks.truncate(MOST_SEEN);
        if changed == *facts {
            return Ok(());
        }
        let failed = |why: String| {
            Failure::fault(format!(
                "{} cannot be written: {why}; make room there and repeat the step",
                self.path.display()
            ))
        };
        checked::write(&self.path, &changed).map_err(|e| failed(e.to_string()))?;
        *facts = changed;
        Ok(())
    }

    /// Changes what is known of one guest, as [`FactsFile::change`] does.
    ///
    /// # Errors
    /// As there.
    pub fn note(&self, guest: &str, change: impl FnOnce(&mut GuestFacts)) -> Result<(), Failure> {
        self.change(|facts| change(facts.guests.entry(guest.to_owned()).or_default()))
    }

    /// Keeps what a check saw.
    ///
    /// # Errors
    /// As [`FactsFile::change`].
    pub fn saw(&self, mut seen: Seen) -> Result<(), Failure> {
        let mut end = seen.seen.len().min(LONGEST);
        while !seen.seen.is_char_boundary(end) {
            end -= 1;
        }
        seen.seen.truncate(end);
        self.change(|facts| facts.checks.push(seen))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, RunFacts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    crate::site::unix_ns(std::time::SystemTime::now()) / 1_000_000
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let facts = FactsFile::open(dir.path(), "r").unwrap();
        facts.note("web", |guest| guest.point = Some(7)).unwrap();
        let again = FactsFile::open(dir.path(), "r").unwrap();
        assert_eq!(again.now(), facts.now());
        assert_eq!(again.of("web").point, Some(7));
        assert_eq!(again.of("db"), GuestFacts::default());
        std::fs::write(dir.path().join("r.facts"), "{").unwrap();
        assert!(FactsFile::open(dir.path(), "r").is_err());
    }

    #[test]
    fn a_long_word_is_cut_at_a_letter() {
        let dir = tempfile::tempdir().unwrap();
        let facts = FactsFile::open(dir.path(), "r").unwrap();
        let seen = Seen {
            at: 1,
            step: "s".into(),
            guest: "g".into(),
            what: "w".into(),
            good: true,
            seen: "é".repeat(LONGEST),
        };
        facts.saw(seen).unwrap();
        assert!(facts.now().checks[0].seen.len() <= LONGEST);
    }
}
