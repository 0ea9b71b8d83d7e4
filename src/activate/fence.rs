//! Terms: which site may run a group.
//!
//! Every promotion takes the next term. A site writes the term it knows of,
//! with the owner, into a small checksummed file of its own, and syncs it
//! before it acts on it. Whoever knows a newer term of another owner never
//! runs the group, whatever else it hears or fails to hear.
//!
//! A guest without a group is a group of one, under its own id.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use serde::{Deserialize, Serialize};

use crate::site::checked;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use file::fuzzing;
use file::read_file;

mod file;
mod together;

/// Who may run a group since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// The group.
    pub group: GuestId,
    /// Higher wins.
    pub number: u64,
    /// The site that may run it.
    pub owner: SiteKey,
}

/// No group is ever promoted so often; a larger number is an attack or a fault.
const MOST: u64 = 1 << 60;

/// No site misses so many promotions of a group: a term that leaps further is
/// not believed. Were it, a peer could bring a group to where no honest site
/// believes the next promotion.
const LEAP: u64 = 1 << 20;

/// How far beyond the term in force [`Fence::overrule`] goes.
pub const OVERRULES: u64 = 2;

/// Why a term could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The file cannot be read or written.
    #[error(
        "the term file {path} cannot be {doing}: {source}. No guest is run here without it; mend the directory and start again"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// Read or written.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file is damaged.
    #[error(
        "the term file {path} is damaged ({why}). Find out at the other site which site runs the group, then remove the file and start again: the peer's term is taken over"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that shows.
        why: String,
    },
    /// Not a number that came about by promotions.
    #[error(
        "term {0} did not come about by promotions; it is ignored. Is the peer what it says it is?"
    )]
    Absurd(u64),
    /// Somebody else owns a term at least as new.
    #[error(
        "fenced: term {known} of this group belongs to site {owner}, so term {asked} cannot be taken here"
    )]
    Fenced {
        /// The term known here.
        known: u64,
        /// Its owner.
        owner: SiteKey,
        /// The term that was asked for.
        asked: u64,
    },
}

/// All terms that a site knows, durable.
pub struct Fence {
    directory: PathBuf,
    terms: Mutex<BTreeMap<GuestId, Term>>,
    /// Groups whose term is in force and could not be written yet. Locked within `terms`.
    unwritten: Mutex<BTreeSet<GuestId>>,
    /// Held from writing terms together until they are in files of their own: there is
    /// one file for it.
    together: Mutex<()>,
}

impl Fence {
    /// Reads every term in `directory`, making it when missing.
    ///
    /// # Errors
    /// When one cannot be read: the site must not start then.
    pub fn open(directory: &Path) -> Result<Self, FenceError> {
        let failed = |doing| {
            move |source| FenceError::Io {
                path: directory.to_owned(),
                doing,
                source,
            }
        };
        crate::site::files::private_directory(directory).map_err(failed("made"))?;
        // What is read may be there, and not durable: whoever wrote it may have ended
        // right then. From here on it counts as known.
        crate::site::files::sync_directory(directory).map_err(failed("made durable"))?;
        let mut terms = BTreeMap::new();
        for entry in fs::read_dir(directory).map_err(failed("read"))? {
            let path = entry.map_err(failed("read"))?.path();
            if path.extension().is_some_and(|e| e == "term") {
                let term = read(&path)?;
                terms.insert(term.group, term);
            }
        }
        let fence = Self {
            directory: directory.to_owned(),
            terms: Mutex::new(terms),
            unwritten: Mutex::default(),
            together: Mutex::default(),
        };
        fence.finish_together()?;
        Ok(fence)
    }

    /// The newest term known of a group.
    pub fn current(&self, group: GuestId) -> Option<Term> {
        self.terms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&group)
            .copied()
    }

    /// Every term known.
    pub fn all(&self) -> Vec<Term> {
        self.terms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .copied()
            .collect()
    }

    /// Takes over a term heard from elsewhere or just decided, when it is
    /// newer than the known one. Durable when it returns. Answers the term in
    /// force afterwards.
    ///
    /// # Errors
    /// When it could not be made durable: it is not in force then.
    pub fn adopt(&self, term: Term) -> Result<Term, FenceError> {
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = terms.get(&term.group).map_or(0, |known| known.number);
        if term.number > MOST || term.number.saturating_sub(known) > LEAP {
            return Err(FenceError::Absurd(term.number));
        }
        match terms.get(&term.group) {
            // Two owners of one number cannot come about by the rules here; if
            // they do (a restored backup), both sides must pick the same one.
            Some(known) if (known.number, known.owner) >= (term.number, term.owner) => {
                let known = *known;
                let unwritten = self.unwritten.lock();
                let unwritten = unwritten.unwrap_or_else(PoisonError::into_inner);
                if unwritten.contains(&known.group) {
                    drop(unwritten);
                    self.write(known)?;
                }
                Ok(known)
            }
            // What fails is not undone: a term of another that is found later does no harm.
            _ => {
                self.write(term)?;
                terms.insert(term.group, term);
                Ok(term)
            }
        }
    }

    /// A newer term of another site that [`Fence::adopt`] could not write: what it forbids
    /// is forbidden all the same while this process lives, and each time that it is heard
    /// again it is tried to write it. Answers whether it is in force.
    pub fn heed(&self, term: Term) -> bool {
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        let known = terms.get(&term.group);
        if known.is_some_and(|known| (known.number, known.owner) > (term.number, term.owner)) {
            return false;
        }
        terms.insert(term.group, term);
        self.unwritten
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(term.group);
        true
    }

    /// Takes the next term of a group for `owner`. Durable when it returns.
    ///
    /// # Errors
    /// When it could not be made durable: it is not in force then.
    pub fn raise(&self, group: GuestId, owner: SiteKey) -> Result<Term, FenceError> {
        self.take(group, owner, 1)
    }

    /// Takes a term of a group for `owner` that no hand-over under way can
    /// have: one beyond the next. Durable when it returns.
    ///
    /// # Errors
    /// When it could not be made durable: it is not in force then.
    pub fn overrule(&self, group: GuestId, owner: SiteKey) -> Result<Term, FenceError> {
        self.take(group, owner, OVERRULES)
    }

    fn take(&self, group: GuestId, owner: SiteKey, step: u64) -> Result<Term, FenceError> {
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        let term = raised(&terms, group, owner, step)?;
        self.write_in_place_of(terms.get(&group).copied(), term)?;
        terms.insert(group, term);
        Ok(term)
    }

    /// May `site` run the group now?
    ///
    /// # Errors
    /// [`FenceError::Fenced`] when another site owns it.
    pub fn may_run(&self, group: GuestId, site: SiteKey) -> Result<(), FenceError> {
        match self.current(group) {
            Some(term) if term.owner != site => Err(FenceError::Fenced {
                known: term.number,
                owner: term.owner,
                asked: term.number,
            }),
            _ => Ok(()),
        }
    }

    /// A file that could not be written for sure may be there all the same: whoever is
    /// told that a term is not in force must not find it in force later.
    fn is_undone(&self, path: &Path, undone: io::Result<()>) {
        let undone = match undone {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            undone => undone.and_then(|()| crate::site::files::sync_directory(&self.directory)),
        };
        if let Err(error) = undone {
            tracing::error!(path = %path.display(), %error, "terms that are not in force may be in this file; if no guest of theirs was moved, remove it before this daemon is started again");
        }
    }

    /// Writes a term, or leaves the one that is known.
    fn write_in_place_of(&self, known: Option<Term>, term: Term) -> Result<(), FenceError> {
        self.write(term).inspect_err(|_| {
            let path = self.file_of(term.group);
            if read(&path).ok() != Some(term) {
                return;
            }
            let undone = match known {
                Some(known) => checked::write(&path, &known),
                None => fs::remove_file(&path),
            };
            self.is_undone(&path, undone);
        })
    }

    fn file_of(&self, group: GuestId) -> PathBuf {
        self.directory.join(format!("{group}.term"))
    }

    fn write(&self, term: Term) -> Result<(), FenceError> {
        self.write_file(&self.file_of(term.group), &term)?;
        self.unwritten
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&term.group);
        Ok(())
    }

    fn write_file(&self, path: &Path, value: &impl Serialize) -> Result<(), FenceError> {
        checked::write(path, value).map_err(|source| FenceError::Io {
            path: path.to_owned(),
            doing: "written",
            source,
        })
    }
}

/// The term that follows a group's known one after so many steps.
fn raised(
    terms: &BTreeMap<GuestId, Term>,
    group: GuestId,
    owner: SiteKey,
    step: u64,
) -> Result<Term, FenceError> {
    let known = terms.get(&group).map_or(0, |term| term.number);
    let number = known.saturating_add(step);
    if number > MOST {
        // The other site would not believe it, and run the group on.
        return Err(FenceError::Absurd(number));
    }
    Ok(Term {
        group,
        number,
        owner,
    })
}

fn read(path: &Path) -> Result<Term, FenceError> {
    let term: Term = read_file(path, 4096)?;
    if path.file_stem().and_then(|s| s.to_str()) != Some(term.group.to_string().as_str()) {
        return Err(FenceError::Damaged {
            path: path.to_owned(),
            why: "it is another group's".to_owned(),
        });
    }
    Ok(term)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
