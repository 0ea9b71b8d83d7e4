//! What comes after a move or a failover: commit or rollback, then protection
//! the other way round (reprotect), and what is left of old copies (evidence).
//!
//! All of it is asked for at the site where the guest runs now ([`commit`],
//! [`rollback`], [`reprotect`]); the site that it came from answers
//! ([`source`], [`base`]). Its copy there is kept stopped, and goes on only
//! under a newer term that is handed to it: whoever hands a term over has
//! stopped its own copy, and has written the term down, before it says a word.

mod base;
mod commit;
mod copy;
mod evidence;
mod export;
mod reprotect;
mod rollback;
mod source;
pub mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use farhaven_storage_sync::unit::GuestId;
use tokio::sync::oneshot;

use super::Site;
use super::records::{Activation, GuestRecord, Protection};
use super::standby::Standby;
use crate::activate::fence::Term;
use crate::guest::embedded::SharedVmm;
use crate::replicate::message::Opening;
use farhaven_storage_sync::catalogue::Table;

pub(super) use commit::not_here;
pub(super) use rollback::{committed, in_doubt};
pub(super) use source::answer;
pub use view::RollBack;

/// How often commits that are not told, and rollbacks in doubt, are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// What a site holds in memory of guests that turn round.
#[derive(Default)]
pub(super) struct Turns {
    /// Copies that are being read for what the other site builds upon.
    reading: Mutex<BTreeMap<GuestId, Arc<base::Reading>>>,
    /// Stopped copies that live in this process, by their evidence's key.
    kept: Mutex<BTreeMap<String, SharedVmm>>,
}

/// What a driver is asked of its guest's stopped copy.
#[derive(Debug)]
pub(super) enum TurnOrder {
    /// Something may have changed: look again.
    Look,
    /// Go on under this term.
    GoBack(Term, oneshot::Sender<Result<(), String>>),
    /// It is not rolled back any more; end it when `true`.
    Commit(bool, oneshot::Sender<Result<(), String>>),
}

impl Activation {
    /// What an operator is told who has not committed in time.
    pub(super) fn overdue(&self, opening: &Opening) -> Option<String> {
        let late = super::age(self.at).checked_sub(opening.commit.window)?;
        if self.committed_at.is_some() || late.is_zero() {
            return None;
        }
        let name = &opening.name;
        Some(format!(
            "neither committed nor rolled back within its window; its old copy is kept stopped at '{}' until then: farhaven commit {name}, or farhaven rollback {name}",
            opening.source
        ))
    }
}

impl Site {
    /// Is this guest one of this site's own by now, whose newest term is its too?
    /// (This daemon may have been killed when only that was written down.)
    pub(super) fn has_turned(&self, guest: GuestId) -> bool {
        let key = guest.to_string();
        let known = self.catalogue.find::<GuestRecord>(Table::Guests, &key);
        let protected = self
            .catalogue
            .find::<Protection>(Table::Protections, &key)
            .ok()
            .flatten();
        let its_own = match protected {
            Some(kept) => kept.moved.is_none() && !kept.stopped,
            // Not protected any more; or not yet, while what took it over is there.
            None => matches!(self.activation(guest), Ok(None)),
        };
        matches!(known, Ok(Some(_))) && its_own && self.fence.may_run(guest, self.key()).is_ok()
    }

    /// Those taken over that run here.
    fn taken_over(&self) -> Vec<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let active = standbys.values().filter(|s| s.active().is_some());
        active.cloned().collect()
    }
}

/// Tells sources of commits that they have not heard of, finds out how a
/// rollback in doubt ended, and commits what its policy has committed in time.
pub(super) async fn watch(site: Weak<Site>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(site) = site.upgrade() else { return };
        for standby in site.taken_over() {
            let Some(active) = standby.active() else {
                continue;
            };
            let name = standby.name();
            let opening = standby.opening();
            if active.returning.is_some() {
                if standby.remote().connected() {
                    let ended = site.go_on_rolling_back(&standby).await;
                    tracing::info!(guest = name, ?ended, "a rollback was in doubt");
                }
            } else if active.committed_at.is_some() {
                if !active.commit_told && standby.remote().alive() {
                    let _ = site.tell_commit(&standby, false).await;
                }
            } else if opening.commit.when_over && active.overdue(&opening).is_some() {
                tracing::warn!(guest = name, "its window is over: committed by its policy");
                if let Err(error) = site.commit(&name, false).await {
                    tracing::error!(guest = name, %error, "could not be committed");
                }
            }
        }
    }
}
