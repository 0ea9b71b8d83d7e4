//! Terms of several guests that are taken, or handed over, as one: all of them are
//! in force, or none is, whatever happens meanwhile.
//!
//! One file has all of them at first, replaced as a whole: from then on they hold. They
//! go into files of their own next; whoever dies before that has it done by the next
//! start.

use std::collections::BTreeMap;
use std::fs;
use std::sync::PoisonError;

use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;

use super::{Fence, FenceError, LEAP, MOST, OVERRULES, Term, raised, read_file};

/// Terms that were taken together and are not in files of their own yet.
pub(super) const TOGETHER: &str = "together.terms";

/// Bytes of that file: some hundred guests, far below.
pub(super) const LONGEST: u64 = 1 << 20;

impl Fence {
    /// As [`Fence::overrule`], of several at once: of all, or of none, whatever
    /// happens meanwhile. Durable when it returns.
    ///
    /// # Errors
    /// When one cannot be raised, or they could not be made durable: none is in
    /// force then.
    pub fn overrule_all(
        &self,
        groups: &[GuestId],
        owner: SiteKey,
    ) -> Result<Vec<Term>, FenceError> {
        let _one = self.together.lock().unwrap_or_else(PoisonError::into_inner);
        self.finish_together()?;
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        let raised: Vec<Term> = groups
            .iter()
            .map(|group| raised(&terms, *group, owner, OVERRULES))
            .collect::<Result<_, _>>()?;
        self.write_together(&terms, &raised)?;
        terms.extend(raised.iter().map(|term| (term.group, *term)));
        drop(terms);
        self.try_to_finish_together();
        Ok(raised)
    }

    /// Takes terms over that were handed over together: all of them, or none,
    /// whatever happens meanwhile. Durable when it returns.
    ///
    /// # Errors
    /// When one is not newer than what is known, or they could not be made
    /// durable: none is in force then.
    pub fn adopt_all(&self, handed: &[Term]) -> Result<(), FenceError> {
        let _one = self.together.lock().unwrap_or_else(PoisonError::into_inner);
        self.finish_together()?;
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        for term in handed {
            let known = terms.get(&term.group);
            let number = known.map_or(0, |known| known.number);
            if term.number > MOST || term.number.saturating_sub(number) > LEAP {
                return Err(FenceError::Absurd(term.number));
            }
            if let Some(known) = known
                && (known.number, known.owner) >= (term.number, term.owner)
            {
                return Err(FenceError::Fenced {
                    known: known.number,
                    owner: known.owner,
                    asked: term.number,
                });
            }
        }
        self.write_together(&terms, handed)?;
        terms.extend(handed.iter().map(|term| (term.group, *term)));
        drop(terms);
        self.try_to_finish_together();
        Ok(())
    }

    /// All of these are durable, or after an error none is.
    fn write_together(
        &self,
        known: &BTreeMap<GuestId, Term>,
        terms: &[Term],
    ) -> Result<(), FenceError> {
        match terms {
            [] => return Ok(()),
            [term] => return self.write_in_place_of(known.get(&term.group).copied(), *term),
            _ => {}
        }
        // One file, replaced as a whole.
        let path = self.directory.join(TOGETHER);
        self.write_file(&path, &terms)
            .inspect_err(|_| self.is_undone(&path, fs::remove_file(&path)))
    }

    fn try_to_finish_together(&self) {
        if let Err(error) = self.finish_together() {
            tracing::warn!(%error, "terms taken together are not in files of their own yet");
        }
    }

    /// Terms that were taken together go into files of their own.
    pub(super) fn finish_together(&self) -> Result<(), FenceError> {
        let path = self.directory.join(TOGETHER);
        if !crate::site::exists(&path) {
            return Ok(());
        }
        let together: Vec<Term> = read_file(&path, LONGEST)?;
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        for term in together {
            let known = terms.get(&term.group).copied();
            // Written by now or not: a newer one of this process is, by itself.
            let newest = known.map_or(term, |known| {
                match (known.number, known.owner) >= (term.number, term.owner) {
                    true => known,
                    false => term,
                }
            });
            self.write(newest)?;
            terms.insert(newest.group, newest);
        }
        drop(terms);
        fs::remove_file(&path).map_err(|source| FenceError::Io {
            path,
            doing: "removed",
            source,
        })
    }
}
