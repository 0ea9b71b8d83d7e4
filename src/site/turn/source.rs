//! The site that a guest came from: what it answers about the copy that it
//! keeps stopped, and how that goes on when the guest is rolled back.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;
use tokio::sync::oneshot;

use super::super::answer::refused;
use super::super::commands::Command;
use super::super::driver::{Driver, DriverHandle, Next};
use super::super::records::{GuestRecord, Protection};
use super::super::remote::Remote;
use super::super::steps::blocking;
use super::super::view::Phase;
use super::super::{Site, guests};
use super::TurnOrder;
use crate::activate::fence::{FenceError, Term};
use crate::replicate::message::{ActivationTimes, CopyState, Message, Refusal, TurnMessage};

/// Answers the site that runs a guest now.
pub(in crate::site) async fn answer(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    asked: TurnMessage,
) -> Message {
    let answered = match asked {
        TurnMessage::Look { guest } => site.look_at_copy(remote, guest).await.map(seen),
        TurnMessage::GoBack { term } => site.goes_back(remote, term).await,
        TurnMessage::Commit { guest, discard } => site.committed(remote, guest, discard).await,
        TurnMessage::Turn(opening) => return site.turn(remote, *opening).await,
        TurnMessage::Seen(_) | TurnMessage::Turning { .. } | TurnMessage::Turned { .. } => {
            Err("that is no question".to_owned())
        }
    };
    answered.unwrap_or_else(|why| refused(Refusal::Unable, why))
}

fn seen(state: CopyState) -> Message {
    Message::Turn(Box::new(TurnMessage::Seen(state)))
}

impl Site {
    /// What is here of a guest that may run at that peer.
    async fn look_at_copy(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        guest: GuestId,
    ) -> Result<CopyState, String> {
        let gone = CopyState {
            runs: None,
            unchanged: false,
            committed: false,
        };
        let Some((record, protection)) = self.copy_for(remote, guest)? else {
            return Ok(gone);
        };
        let mut state = CopyState {
            unchanged: protection.moved.is_some(),
            committed: protection.committed,
            ..gone
        };
        if self.fence.may_run(guest, self.key()).is_ok() {
            // Its driver may be attached, and QEMU answers one at a time.
            state.runs = Some(true);
            return Ok(state);
        }
        let site = self.clone();
        let runs = crate::work::spawn_blocking(move || guests::copy_runs(&site, &record)).await;
        state.runs = runs
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())?;
        Ok(state)
    }

    /// A guest of this site that is protected to that peer.
    pub(super) fn copy_for(
        &self,
        remote: &Remote,
        guest: GuestId,
    ) -> Result<Option<(GuestRecord, Protection)>, String> {
        let key = guest.to_string();
        let record: Option<GuestRecord> = self
            .catalogue
            .find(Table::Guests, &key)
            .map_err(|e| e.to_string())?;
        let protection: Option<Protection> = self
            .catalogue
            .find(Table::Protections, &key)
            .map_err(|e| e.to_string())?;
        let both = record.zip(protection);
        Ok(both.filter(|(_, protection)| protection.goes_to(&remote.record)))
    }

    pub(in crate::site) fn driver_of(&self, guest: GuestId) -> Option<DriverHandle> {
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        drivers.get(&guest).cloned()
    }

    /// Has a driver do something with its guest's copy.
    async fn order(
        &self,
        guest: GuestId,
        order: impl FnOnce(oneshot::Sender<Result<(), String>>) -> TurnOrder,
    ) -> Result<(), String> {
        let nobody = || "this guest is not protected from here any more".to_owned();
        let driver = self.driver_of(guest).ok_or_else(nobody)?;
        let (reply, answer) = oneshot::channel();
        let sent = driver.commands.send(Command::Turn(order(reply))).await;
        sent.map_err(|_| nobody())?;
        answer.await.map_err(|_| nobody())?
    }

    /// The other site has stopped its copy, and hands the guest back.
    async fn goes_back(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        term: Term,
    ) -> Result<Message, String> {
        let guest = term.group;
        let known = self.fence.current(guest);
        let again = known == Some(term);
        let handed = known.is_some_and(|k| k.owner == remote.record.key && k.number < term.number);
        if term.owner != self.key() || !(again || handed) {
            return Err(
                "that site does not own this guest's newest term, and cannot hand it over"
                    .to_owned(),
            );
        }
        self.order(guest, |reply| TurnOrder::GoBack(term, reply))
            .await?;
        Ok(Message::Running {
            times: ActivationTimes::default(),
            term,
        })
    }

    async fn committed(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        guest: GuestId,
        discard: bool,
    ) -> Result<Message, String> {
        let owner = self.fence.current(guest).map(|term| term.owner);
        if owner != Some(remote.record.key) {
            return Err("that site does not run this guest, and commits nothing of it".to_owned());
        }
        // Without a driver nothing is kept for a rollback.
        if self.driver_of(guest).is_some() {
            self.order(guest, |reply| TurnOrder::Commit(discard, reply))
                .await?;
        }
        Ok(Message::Done)
    }

    /// A term of this site's own was heard: a guest was handed back.
    pub(in crate::site) fn look_again(&self, guest: GuestId) {
        if let Some(driver) = self.driver_of(guest) {
            let _ = driver.commands.try_send(Command::Turn(TurnOrder::Look));
        }
    }
}

impl Driver {
    /// What is asked of the copy that is kept stopped; nobody is attached to it.
    pub(in crate::site) async fn turn_order(&mut self, order: TurnOrder) {
        match order {
            TurnOrder::Look => {}
            TurnOrder::GoBack(term, reply) => {
                let _ = reply.send(self.go_back(term).await);
            }
            TurnOrder::Commit(discard, reply) => {
                let _ = reply.send(self.commit_copy(discard).await);
            }
        }
    }

    async fn go_back(&mut self, term: Term) -> Result<(), String> {
        let id = self.record.id;
        if self.site.fence.current(id) == Some(term) && !self.is_kept() {
            // The answer to an earlier word was lost.
            return Ok(());
        }
        if self.protection.committed {
            return Err(format!(
                "'{}' was committed at '{}'",
                self.record.name, self.protection.to
            ));
        }
        let (site, record) = (self.site.clone(), self.record.clone());
        let runs = blocking(move || guests::copy_runs(&site, &record)).await;
        let runs = runs.map_err(|e| e.to_string())?;
        if runs.map_err(|e| e.to_string())?.is_none() {
            return Err(format!("the copy of '{}' here has ended", self.record.name));
        }
        let now = self.site.fence.adopt(term).map_err(|e| e.to_string())?;
        if now != term {
            return Err("a newer term of this guest is known here".to_owned());
        }
        self.regain().await
    }

    /// Is its copy here one that was stopped for good?
    pub(in crate::site) fn is_kept(&self) -> bool {
        self.protection.moved.is_some() || self.protection.stopped
    }

    /// Where its term is not known here any more, or only an older one (its file was
    /// damaged, and removed): the copy that was stopped for the other site stays that
    /// one's. `None`: it was handed back.
    ///
    /// # Errors
    /// When the term of its hand-over cannot be written down again.
    pub(in crate::site) async fn is_anothers_still(&mut self) -> Result<Option<Next>, FenceError> {
        let known = self.site.fence.current(self.record.id);
        let older = |moved: Term| known.is_none_or(|known| known.number < moved.number);
        let by = [self.protection.moved, self.protection.stopped_by];
        let newest = by.into_iter().flatten().max_by_key(|term| term.number);
        if let Some(theirs) = newest.filter(|theirs| older(*theirs)) {
            self.site.fence.adopt(theirs)?;
            return Ok(Some(Next::Again(Duration::ZERO)));
        }
        if known.is_some() {
            return Ok(None);
        }
        let why = format!(
            "its copy here was stopped for a newer term of '{}', which is not known here any more: it stays stopped until that site tells it",
            self.protection.to
        );
        self.view.send_modify(|v| {
            v.phase = Phase::Fenced;
            v.trouble = why;
        });
        Ok(Some(self.wait_for_command().await))
    }

    /// The guest was handed back: its stopped copy goes on. One that cannot is
    /// handed to the other site again, which has all of its own still.
    ///
    /// # Errors
    /// When it does not run here.
    pub(in crate::site) async fn regain(&mut self) -> Result<(), String> {
        let (site, record) = (self.site.clone(), self.record.clone());
        let resumed = blocking(move || site.resume_guest(&record)).await;
        let resumed = resumed.map_err(|e| e.to_string());
        match resumed.and_then(|done| done.map_err(|e| e.to_string())) {
            Ok(()) => {
                self.protection.moved = None;
                self.protection.stopped = false;
                self.protection.committed = false;
                let _ = self.keep_protection().await;
                self.phase(Phase::Attaching);
                self.view.send_modify(|v| v.trouble.clear());
                self.site.tell_terms();
                tracing::warn!(guest = %self.record.name, "rolled back: it goes on here");
                Ok(())
            }
            Err(why) => {
                let id = self.record.id;
                if self.site.fence.may_run(id, self.site.key()).is_err() {
                    return Err(format!("its copy here may not go on any more: {why}"));
                }
                let number = self.site.fence.current(id).map_or(0, |t| t.number) + 1;
                let theirs = Term {
                    group: id,
                    number,
                    owner: self.remote.record.key,
                };
                self.site.fence.adopt(theirs).map_err(|e| e.to_string())?;
                // It may go on all the same: the other site's own is not let go before
                // this one has stopped.
                self.site.keep_stopping(theirs);
                self.phase(Phase::Fenced);
                self.site.tell_terms();
                tracing::error!(guest = %self.record.name, why, "it was handed back, and cannot go on here");
                Err(format!("its copy here cannot go on: {why}"))
            }
        }
    }

    async fn commit_copy(&mut self, discard: bool) -> Result<(), String> {
        let (id, key) = (self.record.id, self.site.key());
        if self.site.fence.may_run(id, key).is_ok() {
            return Err(format!("'{}' runs here", self.record.name));
        }
        if self.protection.moving.is_some() {
            return Err(format!(
                "how the move of '{}' ended is being found out",
                self.record.name
            ));
        }
        self.protection.committed = true;
        self.keep_protection().await?;
        if discard {
            let (site, record) = (self.site.clone(), self.record.clone());
            let ended = blocking(move || site.let_guest_go(&record)).await;
            let ended = ended.map_err(|e| e.to_string())?;
            ended.map_err(|e| format!("the stopped copy could not be ended: {e}"))?;
        }
        Ok(())
    }
}
