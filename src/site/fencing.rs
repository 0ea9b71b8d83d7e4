//! Terms and their peers; a guest that another site owns by now: its copy here is stopped and kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;

use farhaven_policies::alert::Severity;
use tokio::sync::watch;

use super::Site;
use super::alerts::{Alert, Kind};
use super::answer::refused;
use super::driver::{Command, Driver};
use super::records::GuestRecord;
use super::remote::Remote;
use super::standby::{Standby, State, step};
use super::view::Phase;
use crate::activate::fence::{FenceError, Term};
use crate::guest::Guest;
use crate::replicate::message::{Message, Refusal};

mod overruled;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;

/// What did not stop is tried again so soon: it may run beside the one that owns it.
const STOP_AGAIN: Duration = Duration::from_secs(1);

/// What may run here against terms of other sites that were heard.
#[derive(Default)]
pub(super) struct Unstopped {
    /// By group: the term.
    terms: BTreeMap<GuestId, Term>,
    /// Groups that are tried again.
    tried: BTreeSet<GuestId>,
    /// Changes with every term that is heard.
    told: watch::Sender<()>,
}

impl Unstopped {
    /// This term is in force, and something may run here against it.
    fn heard(&mut self, term: Term) {
        self.terms.insert(term.group, term);
        self.told.send_replace(());
    }
}

/// Why a term that a peer told is not obeyed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotObeyed {
    /// It is not durable, and not in force.
    #[error(transparent)]
    Kept(#[from] FenceError),
    /// Something of the group runs on here against it.
    #[error("{0}")]
    Runs(String),
}

impl Site {
    /// Tells every connected peer the terms in force.
    pub(super) fn tell_terms(self: &Arc<Self>) {
        let remotes: Vec<_> = self
            .remotes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        for remote in remotes.into_iter().filter(|r| r.connected()) {
            let site = self.clone();
            tokio::spawn(async move { remote.tell_terms(&site).await });
        }
    }

    /// Was this group protected from here, to whomever? Its points may still be
    /// there, and be run there. Its id is known only to sites that were told.
    pub(super) fn was_shared(&self, group: GuestId) -> bool {
        let found = self
            .catalogue
            .find::<GuestRecord>(Table::Guests, &group.to_string());
        found.is_ok_and(|record| record.is_some())
    }

    /// Takes over a term heard from a peer, in whatever message: when this returns,
    /// nothing of the group runs here against it. Who adopted it only would leave
    /// what runs here running, as the term is no news when it is heard again.
    ///
    /// # Errors
    /// When it could not be made durable, or something runs on here.
    pub(super) async fn obey(self: &Arc<Self>, term: Term) -> Result<(), NotObeyed> {
        if let Some(now) = self.adopt_heard(term)? {
            self.stop_for(now).await.map_err(NotObeyed::Runs)?;
        }
        Ok(())
    }

    /// A term that cannot be kept, of a peer: obeyed all the same while this process lives.
    ///
    /// # Errors
    /// When something runs on here.
    pub(super) async fn obey_unkept(self: &Arc<Self>, term: Term) -> Result<(), String> {
        if term.owner == self.key() || !self.fence.heed(term) {
            return Ok(());
        }
        self.unstopped().heard(term);
        self.stop_for(term).await
    }

    /// Stops what runs here against a term in force; what does not stop is tried again
    /// until it has.
    async fn stop_for(self: &Arc<Self>, now: Term) -> Result<(), String> {
        let stopped = self.fenced(now).await;
        match &stopped {
            Ok(()) => self.has_stopped(now),
            Err(_) => self.stop_again(now.group),
        }
        stopped
    }

    /// What runs here against this term did not stop: it is tried again until it has.
    pub(super) fn keep_stopping(self: &Arc<Self>, term: Term) {
        self.unstopped().heard(term);
        self.stop_again(term.group);
    }

    /// Is what may run here of this group tried to be stopped again and again?
    pub(super) fn keeps_stopping(&self, group: GuestId) -> bool {
        self.unstopped().tried.contains(&group)
    }

    /// Tries it once a second, for each group by one task.
    fn stop_again(self: &Arc<Self>, group: GuestId) {
        if !self.unstopped().tried.insert(group) {
            return;
        }
        let site = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(STOP_AGAIN).await;
                let Some(site) = site.upgrade() else { return };
                let Some(now) = site.still_unstopped(group) else {
                    return;
                };
                if site.fenced(now).await.is_ok() {
                    site.has_stopped(now);
                }
            }
        });
    }

    /// The term against which something may run here; `None` ends the trying.
    fn still_unstopped(&self, group: GuestId) -> Option<Term> {
        let mut unstopped = self.unstopped();
        let term = unstopped.terms.get(&group).copied();
        // One that was overruled since stops nothing any more.
        let term = term.filter(|term| self.fence.current(group) == Some(*term));
        if term.is_none() {
            unstopped.terms.remove(&group);
            unstopped.tried.remove(&group);
        }
        term
    }

    /// Changes once a newer term of any group is in force here.
    pub(super) fn terms_heard(&self) -> watch::Receiver<()> {
        self.unstopped().told.subscribe()
    }

    fn unstopped(&self) -> std::sync::MutexGuard<'_, Unstopped> {
        self.unstopped
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Site::obey`], of a term that a question is asked under: it must be the one
    /// in force. `Err` is the answer to give.
    pub(super) async fn obey_offered(
        self: &Arc<Self>,
        remote: &Remote,
        offered: Term,
    ) -> Result<(), Message> {
        if let Err(error) = self.obey(offered).await {
            if matches!(error, NotObeyed::Kept(FenceError::Absurd(_))) {
                remote.breach(&error.to_string());
            }
            return Err(refused(Refusal::Unable, error));
        }
        match self.fence.current(offered.group) {
            Some(now) if now != offered => Err(refused(
                Refusal::Fenced,
                format!(
                    "term {} of this guest belongs to {}; the source's is {}",
                    now.number,
                    self.name_of(&now.owner),
                    offered.number
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Takes over a term heard from a peer. Answers the one in force when
    /// something may run here against it: because it is new, or because the
    /// stop that it asked for before is under way, or failed.
    ///
    /// # Errors
    /// When it could not be made durable.
    fn adopt_heard(&self, term: Term) -> Result<Option<Term>, FenceError> {
        // Held over both: whoever hears the same term at once must find it here.
        let mut unstopped = self.unstopped();
        let before = self.fence.current(term.group);
        let now = self.fence.adopt(term)?;
        if now.owner == self.key() {
            unstopped.terms.remove(&now.group);
            return Ok(None);
        }
        if Some(now) != before {
            unstopped.heard(now);
        }
        Ok(unstopped.terms.contains_key(&now.group).then_some(now))
    }

    /// What that term owns runs here no more.
    fn has_stopped(&self, term: Term) {
        let mut unstopped = self.unstopped();
        if unstopped.terms.get(&term.group) == Some(&term) {
            unstopped.terms.remove(&term.group);
        }
    }

    /// Another site owns this group now: whatever runs of it here is stopped.
    /// Returns when it is.
    ///
    /// # Errors
    /// When it could not be stopped; the sentence says what to do.
    pub(super) async fn fenced(self: &Arc<Self>, term: Term) -> Result<(), String> {
        let own = self.stop_own(term).await;
        let standby = {
            let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
            standbys.get(&term.group).cloned()
        };
        let Some(standby) = standby else { return own };
        let was_own = standby.is_turned();
        standby.fenced(term).await?;
        match standby.is_turned() && !was_own || own.is_err() {
            // It turned round while its copy here was waited for; or whoever watched that
            // copy had its control, and has let go of it.
            true => self.stop_own(term).await,
            false => Ok(()),
        }
    }

    /// What runs here as this site's own guest is stopped.
    async fn stop_own(self: &Arc<Self>, term: Term) -> Result<(), String> {
        let driver = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.get(&term.group).cloned()
        };
        match driver {
            Some(driver) => {
                let (done, stopped) = tokio::sync::oneshot::channel();
                // A driver that ended meanwhile, or ends before it answers, stops nothing.
                // What cannot be sent is dropped with its way to answer.
                let _ = driver.commands.send(Command::Fence(term, done)).await;
                match stopped.await {
                    Ok(stopped) => stopped,
                    Err(_) => self.stop_unprotected(term).await,
                }
            }
            None => self.stop_unprotected(term).await,
        }
    }

    /// A guest that is protected no more was taken over from a point it left behind.
    async fn stop_unprotected(self: &Arc<Self>, term: Term) -> Result<(), String> {
        let found = self
            .catalogue
            .find::<GuestRecord>(Table::Guests, &term.group.to_string());
        let Some(record) = found.map_err(|e| e.to_string())? else {
            return Ok(());
        };
        let name = record.name.clone();
        let site = self.clone();
        let stop = move || super::guests::stop_guest(&site, &record);
        let stopped = crate::work::spawn_blocking(stop).await;
        let stopped = stopped.map_err(|e| e.to_string())?;
        tracing::warn!(
            guest = name,
            term = term.number,
            ?stopped,
            "fenced: it runs elsewhere under a newer term"
        );
        stopped.map_err(|e| format!("'{name}' could not be stopped here: {e}"))
    }
}

impl Driver {
    /// Stops the guest for good, by the one attached or through a new
    /// connection. Else it says why it may run on.
    pub(super) async fn fence(
        &mut self,
        term: Term,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<(), String> {
        if self.site.fence.current(self.record.id).map(|now| now.owner) == Some(self.site.key()) {
            // Overruled on its way: this site runs it under a newer one.
            return Ok(());
        }
        let owner = self.site.name_of(&term.owner);
        let (site, record) = (self.site.clone(), self.record.clone());
        let gone = record.definition.is_embedded() && site.hosted(record.id).is_none();
        let stopped = crate::work::spawn_blocking(move || match guest {
            Some(mut guest) => guest.stop().map_err(|e| e.to_string()),
            None => super::guests::stop_guest(&site, &record).map_err(|e| e.to_string()),
        })
        .await;
        let stopped = stopped.unwrap_or_else(|e| Err(e.to_string()));
        if stopped.is_ok() && self.protection.moving == Some(term) {
            // The term of its own hand-over: how that ends is being asked.
            return Ok(());
        }
        if stopped.is_ok() && !self.is_kept() {
            self.protection.stopped = true;
            self.protection.stopped_by = Some(term);
            // A move under an older term came to nothing, whatever its peer says of it.
            let overruled = |moving: Term| moving.number < term.number;
            if self.protection.moving.is_some_and(overruled) {
                self.protection.moving = None;
                self.protection.held = None;
            }
            // Else a rollback is refused after a restart, and says so.
            let _ = self.keep_protection().await;
        }
        let done = match &stopped {
            Ok(()) if gone => "its copy here ended with the daemon that it lived in".to_owned(),
            Ok(()) => "its copy here was stopped and is kept as evidence".to_owned(),
            Err(error) => format!(
                "ITS COPY HERE COULD NOT BE STOPPED and is tried again; end it by hand: {error}"
            ),
        };
        let why = format!(
            "fenced: site '{owner}' runs this guest under term {}; {done}",
            term.number
        );
        if self.view.borrow().trouble != why {
            tracing::warn!(guest = %self.record.name, "{why}");
        }
        self.view.send_modify(|v| {
            v.phase = Phase::Fenced;
            v.term = Some(term.number);
            v.trouble.clone_from(&why);
        });
        stopped.map_err(|_| why)
    }
}

impl Standby {
    /// A newer term of another owner: what runs here is stopped and kept.
    ///
    /// # Errors
    /// When it may run on; the sentence says what to do.
    pub(super) async fn fenced(self: &Arc<Self>, term: Term) -> Result<(), String> {
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
        if let Some(active) = &state.unwatched {
            // Whoever tries to find it again stops it.
            return Err(format!(
                "'{}' may run here{}, and its QEMU does not answer; end it by hand",
                self.name(),
                active.process()
            ));
        }
        let Some((active, ready)) = &state.active else {
            return Ok(());
        };
        let (ready, number) = (ready.clone(), active.term.number);
        if number > term.number {
            // Overruled on its way, as above.
            return Ok(());
        }
        let stopped = step(move || ready.stop()).await.and_then(|stopped| stopped);
        if let Err(error) = stopped {
            let why = format!(
                "fenced: term {} is newer than {number}, and it COULD NOT BE STOPPED here; end it by hand{}: {error}",
                term.number,
                active.process()
            );
            if self.seen().trouble != why {
                tracing::error!(guest = %self.name(), "{why}");
                self.tell_fenced(&why);
            }
            self.see(|s| s.trouble.clone_from(&why));
            return Err(why);
        }
        let why = format!(
            "fenced: term {} is newer than {number}; it was stopped here and is kept as evidence{}",
            term.number,
            active.process()
        );
        tracing::warn!(guest = %self.name(), "{why}");
        self.tell_fenced(&why);
        // A QEMU stays by itself.
        let stopped = state.active.take().map(|(_, ready)| ready);
        state.evidence = stopped.filter(|ready| ready.pid().is_none());
        self.see(|s| {
            s.active = None;
            s.trouble = why;
        });
        if let Ok(site) = self.site() {
            self.leave_evidence(&mut state, &site);
        }
        Ok(())
    }

    /// Raises an alert, until its source sends it here again.
    pub(super) fn tell_fenced(&self, why: &str) {
        let Ok(site) = self.site() else { return };
        let name = self.name();
        site.raise(Alert::new(
            Kind::FenceRaised,
            &name,
            Severity::Critical,
            format!("'{name}' is {why}"),
            format!("make sure that it runs at '{0}', and protect it from there again; the copy here is evidence until then", self.from()),
        ));
    }

    /// A stopped copy is kept for whoever wants to look at it, and does not run
    /// here any more: QEMU keeps its RAM, whose files are free for newer points.
    pub(super) fn leave_evidence(&self, state: &mut State, site: &Arc<Site>) {
        state
            .warm
            .discard(&site.config.ram_dir().join(self.guest.to_string()));
        if let Err(error) = self.forget_activation(site) {
            tracing::error!(%error, "the catalogue cannot be written");
        }
    }

    /// A stopped copy that lives in this process makes room for a new one.
    pub(super) async fn end_evidence(&self, state: &mut State) {
        if let Some(stopped) = state.evidence.take() {
            tracing::warn!(guest = %self.name(), "its copy that was stopped for good is ended");
            let _ = step(move || stopped.end()).await;
        }
    }
}
