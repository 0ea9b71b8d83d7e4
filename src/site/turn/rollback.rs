//! Back: to the source, whose stopped copy goes on, or here, from another point.
//!
//! To the source it goes in this order, each step durable before the next:
//! that a rollback is under way; this copy is stopped; the next term, which is
//! the source's; only then is the source told. It answers that its copy runs,
//! and this one is discarded; or that it does not, and then this one goes on
//! under a newer term, once the source has confirmed that. While there is no
//! answer nothing of the guest runs here, and it is asked again.

mod here;

use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_storage_sync::catalogue::CatalogueError;
use farhaven_storage_sync::unit::GuestId;

use super::super::Site;
use super::super::operate::{FENCE_WAIT, OperateError, failed};
use super::super::promote::ActivateError;
use super::super::records::Activation;
use super::super::remote::{AskError, Remote};
use super::super::standby::{Standby, State, step};
use super::commit::not_here;
use super::view::{RollBack, RollbackReport};
use crate::activate::fence::Term;
use crate::activate::place::Ready;
use crate::replicate::message::{CopyState, Message, TurnMessage};

/// The source lets its copy go on within this time, or it is asked again.
const GO_BACK: Duration = Duration::from_secs(60);

impl Site {
    /// Rolls a guest back that was moved or taken over: see [`RollBack`].
    ///
    /// # Errors
    /// When it does not run here or was committed; to the source, when that
    /// does not hold a stopped copy, or something would be lost and that is not
    /// accepted. The message says where the guest runs.
    pub async fn rollback(
        self: &Arc<Self>,
        name: &str,
        to: RollBack,
    ) -> Result<RollbackReport, OperateError> {
        if to.point.is_none()
            && let Some(standby) = self.standby_named(name)
            && standby.active().is_none()
        {
            return self.rolled_back_before(&standby).await;
        }
        let standby = self.taken_over_named(name)?;
        match to.point {
            Some(point) => self.roll_back_to(&standby, point).await,
            None => self.roll_back(&standby, to.accept_loss).await,
        }
    }

    /// The answer to an earlier rollback was lost, or there is nothing to roll back.
    pub(in crate::site) async fn rolled_back_before(
        &self,
        standby: &Arc<Standby>,
    ) -> Result<RollbackReport, OperateError> {
        let owner = self.fence.current(standby.guest);
        let remote = standby.remote();
        let theirs = owner.filter(|term| term.owner == remote.record.key);
        match (theirs, look(remote, standby.guest).await) {
            (Some(term), Ok(copy)) if copy.runs == Some(true) && term.number > 1 => {
                Ok(RollbackReport {
                    guest: standby.name(),
                    at: standby.from(),
                    point: None,
                    term: term.number,
                    lost_ms: 0,
                    blackout_ms: 0.0,
                    note: "it runs there already; nothing was done".to_owned(),
                })
            }
            _ => Err(not_here(standby)),
        }
    }

    async fn roll_back(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        accept_loss: bool,
    ) -> Result<RollbackReport, OperateError> {
        let mut state = standby.state.lock().await;
        let state = &mut *state;
        let Some((active, ready)) = state.active.clone() else {
            return Err(not_here(standby));
        };
        if active.returning.is_some() {
            return self.hand_back(standby, state, Instant::now()).await;
        }
        let may = self.may_go_back(standby, &active, accept_loss);
        self.unless_overruled(&[standby.guest], may).await??;
        let begun = Instant::now();
        let term = self
            .stop_to_go_back(standby, state, &active, &ready)
            .await?;
        if let Err(why) = self.give_terms(vec![term]).await {
            let went_on = self.let_go_on(standby, state, &active, &ready).await;
            return Err(not_rolled_back(standby, went_on, &why));
        }
        self.hand_back(standby, state, begun).await
    }

    /// Nothing stands against its rollback to the source; looks, and does nothing.
    pub(in crate::site) async fn may_go_back(
        &self,
        standby: &Standby,
        active: &Activation,
        accept_loss: bool,
    ) -> Result<(), OperateError> {
        if active.committed_at.is_some() {
            return Err(committed(standby));
        }
        let name = standby.name();
        let from = standby.from();
        let remote = standby.remote();
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if !remote.alive() {
            return conflict(format!(
                "'{name}' runs on here: site '{from}' is not reached, and only its own word tells that its copy is stopped and whole. To go back to another point here: farhaven rollback {name} --point NUMBER"
            ));
        }
        let copy = look(remote, standby.guest).await.map_err(failed)?;
        if copy.runs.is_none() || copy.committed {
            return conflict(format!(
                "'{name}' runs on here: no copy of it is kept at '{from}' that could go on. To go back to a point here: farhaven rollback {name} --point NUMBER"
            ));
        }
        if copy.runs == Some(true) {
            return conflict(format!(
                "'{name}' runs on here, and by its word at '{from}' too; see farhaven status at both sites"
            ));
        }
        if !copy.unchanged && !accept_loss {
            let since = super::super::age(active.at).as_secs();
            return conflict(format!(
                "'{name}' was taken over from a point, not moved: at '{from}' it would go on from the instant at which it was stopped there, and what was written here in the {since} s since the failover would be lost. If that is what you want, add --accept-loss"
            ));
        }
        Ok(())
    }

    /// Stops it here. Answers the term under which its source is to go on: nobody
    /// has heard of that one, and it is not in force.
    pub(in crate::site) async fn stop_to_go_back(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        active: &Activation,
        ready: &Arc<Ready>,
    ) -> Result<Term, OperateError> {
        self.fence
            .may_run(standby.guest, self.key())
            .map_err(failed)?;
        let number = self.fence.current(standby.guest).map_or(0, |t| t.number);
        let term = Term {
            group: standby.guest,
            number: number + 1,
            owner: standby.remote().record.key,
        };
        if let Err(error) = self.note_returning(standby, state, Some(term)) {
            let _ = self.note_returning(standby, state, None);
            return Err(failed(error));
        }
        let stopping = ready.clone();
        match step(move || stopping.stop()).await.and_then(|done| done) {
            Ok(()) => Ok(term),
            Err(error) => {
                let went_on = self.let_go_on(standby, state, active, ready).await;
                Err(not_rolled_back(standby, went_on, &error.to_string()))
            }
        }
    }

    /// Writes down that these guests are their sources', or that none of them is.
    /// What failed, else.
    pub(in crate::site) async fn give_terms(
        self: &Arc<Self>,
        terms: Vec<Term>,
    ) -> Result<(), String> {
        let site = self.clone();
        let given = step(move || site.fence.adopt_all(&terms)).await;
        let given = given.map_err(|error| error.to_string())?;
        given.map_err(|error| error.to_string())
    }

    /// What was stopped to go back goes on here, since nobody has heard of it.
    ///
    /// # Errors
    /// What to tell the operator when it stays stopped.
    pub(in crate::site) async fn let_go_on(
        &self,
        standby: &Standby,
        state: &mut State,
        active: &Activation,
        ready: &Arc<Ready>,
    ) -> Result<(), String> {
        // Unless it is elsewhere by now: whoever heard of that waits for this to end.
        if self.fence.may_run(standby.guest, self.key()).is_err() {
            let _ = self.note_returning(standby, state, None);
            return Err(
                "it stays stopped here, since a newer term of it is another site's".to_owned(),
            );
        }
        let went_on = go_on(ready).await;
        let _ = self.note_returning(standby, state, None);
        went_on.map_err(|error| {
            let process = active.process();
            format!("IT IS STOPPED HERE and could not be let go on ({error}){process}")
        })
    }

    /// Tells the source to go on, and acts on its answer. The rollback was begun at
    /// this time.
    pub(in crate::site) async fn hand_back(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        begun: Instant,
    ) -> Result<RollbackReport, OperateError> {
        let Some((active, ready)) = state.active.clone() else {
            return Err(not_here(standby));
        };
        let Some(term) = active.returning else {
            return Err(not_here(standby));
        };
        let (name, from) = (standby.name(), standby.from());
        if self.fence.may_run(standby.guest, self.key()).is_ok() {
            // The source gave it back meanwhile: it could not let it go on.
            self.goes_on_here(standby, state, &ready).await?;
            return Err(OperateError::Failed(format!(
                "'{name}' runs on here: its copy at '{from}' could not go on; see farhaven status there"
            )));
        }
        let remote = standby.remote().clone();
        let order = Message::Turn(Box::new(TurnMessage::GoBack { term }));
        match remote.ask_within(order, GO_BACK).await {
            Ok(Message::Running { .. }) => {
                let lost = super::super::age(active.at);
                self.discard_here(standby, state, &ready).await;
                tracing::warn!(
                    guest = name,
                    term = term.number,
                    "rolled back to its source"
                );
                Ok(RollbackReport {
                    guest: name,
                    at: from,
                    point: None,
                    term: term.number,
                    lost_ms: lost.as_millis() as u64,
                    blackout_ms: begun.elapsed().as_secs_f64() * 1e3,
                    note: String::new(),
                })
            }
            Err(AskError::Refused { why, .. }) => {
                self.take_it_again(standby, state, &ready, term).await?;
                Err(OperateError::Failed(format!(
                    "'{name}' was not rolled back, and runs on here: {why}"
                )))
            }
            other => {
                let why = match other {
                    Err(error) => error.to_string(),
                    Ok(_) => "its answer does not fit the question".to_owned(),
                };
                let told = in_doubt(standby);
                standby.see(|s| s.trouble.clone_from(&told));
                Err(OperateError::Failed(format!("{told}. {why}")))
            }
        }
    }

    /// A rollback whose end is not known.
    pub(super) async fn go_on_rolling_back(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
    ) -> Result<RollbackReport, OperateError> {
        let mut state = standby.state.lock().await;
        self.hand_back(standby, &mut state, Instant::now()).await
    }

    /// The source said that it does not run there: it goes on here, once the
    /// source has confirmed a term that is newer than the one handed over.
    pub(in crate::site) async fn take_it_again(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        ready: &Arc<Ready>,
        term: Term,
    ) -> Result<(), OperateError> {
        let remote = standby.remote();
        let own = Term {
            number: term.number + 1,
            owner: self.key(),
            ..term
        };
        // Not `announce_term`: a source that falls silent may run it. And not
        // written down here before that is confirmed: it is not ours until then.
        let told = remote.ask_within(Message::Terms { terms: vec![own] }, FENCE_WAIT);
        let told = match told.await {
            Ok(Message::Done) => Ok(()),
            Ok(_) => Err(AskError::Unfitting(standby.from())),
            Err(error) => Err(error),
        };
        if let Err(error) = told {
            let name = standby.name();
            let why = format!(
                "'{name}' is stopped here for its rollback, and '{}' did not confirm that it is stopped there: it is asked again. If that site is lost for good: farhaven take-back {name} --force",
                standby.from()
            );
            standby.see(|s| s.trouble.clone_from(&why));
            return Err(OperateError::Failed(format!("{why}. {error}")));
        }
        let site = self.clone();
        let now = step(move || site.fence.adopt(own)).await.map_err(failed)?;
        if now.map_err(failed)?.owner != self.key() {
            return Err(OperateError::Failed(format!(
                "a newer term of '{}' is known by now; it stays stopped here",
                standby.name()
            )));
        }
        self.goes_on_here(standby, state, ready).await
    }

    /// What was stopped for its rollback goes on: it is this site's.
    pub(in crate::site) async fn goes_on_here(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        ready: &Arc<Ready>,
    ) -> Result<(), OperateError> {
        go_on(ready).await.map_err(failed)?;
        self.note_returning(standby, state, None).map_err(failed)?;
        standby.see(|s| s.trouble.clear());
        tracing::warn!(guest = %standby.name(), "not rolled back: it goes on here");
        Ok(())
    }

    /// An operator's decision: the source is lost, and its word not waited for.
    ///
    /// # Errors
    /// When no rollback of it is in doubt, or it cannot go on.
    pub(in crate::site) async fn take_back_here(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
    ) -> Result<(), OperateError> {
        let mut state = standby.state.lock().await;
        let active = state.active.clone();
        let Some((_, ready)) = active.filter(|(active, _)| active.returning.is_some()) else {
            return Err(OperateError::Conflict(format!(
                "no rollback of '{}' is in doubt",
                standby.name()
            )));
        };
        let (site, guest) = (self.clone(), standby.guest);
        step(move || site.fence.overrule(guest, site.key()))
            .await
            .map_err(failed)?
            .map_err(failed)?;
        self.tell_terms();
        self.goes_on_here(standby, &mut state, &ready).await
    }

    fn note_returning(
        &self,
        standby: &Standby,
        state: &mut State,
        term: Option<Term>,
    ) -> Result<(), CatalogueError> {
        let Some((active, _)) = &mut state.active else {
            return Ok(());
        };
        active.returning = term;
        let kept = active.clone();
        standby.see(|s| s.active = Some(kept.clone()));
        self.keep_activation(&kept)
    }

    /// It runs at its source: nothing of this copy is needed.
    async fn discard_here(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        state: &mut State,
        ready: &Arc<Ready>,
    ) {
        state.active = None;
        standby.see(|s| {
            s.active = None;
            s.hydration = None;
            s.trouble.clear();
        });
        let ending = ready.clone();
        let ended = step(move || {
            ending.end();
            std::fs::remove_dir_all(ending.run_directory())
        });
        if let Ok(Err(error)) = ended.await {
            tracing::warn!(guest = %standby.name(), %error, "the directory of the copy that was rolled back stays behind");
        }
        standby.leave_evidence(state, self);
    }
}

/// What was stopped to go back goes on.
async fn go_on(ready: &Arc<Ready>) -> Result<(), ActivateError> {
    let going_on = ready.clone();
    step(move || going_on.go_on()).await.and_then(|done| done)
}

/// It is not known how its rollback ended.
pub(in crate::site) fn in_doubt(standby: &Standby) -> String {
    let (name, from) = (standby.name(), standby.from());
    format!(
        "'{name}' is stopped here for its rollback, and whether it runs at '{from}' is not known: it is found out when that site answers. If that site is lost for good: farhaven take-back {name} --force"
    )
}

/// There is no rollback after a commit.
pub(in crate::site) fn committed(standby: &Standby) -> OperateError {
    let name = standby.name();
    OperateError::Conflict(format!(
        "'{name}' was committed here, and there is no way back by a rollback. To bring it home with nothing lost: farhaven reprotect {name}, then farhaven move {name}"
    ))
}

/// Its rollback was not begun: what it does now, and why.
fn not_rolled_back(standby: &Standby, went_on: Result<(), String>, why: &str) -> OperateError {
    let does = went_on.map_or_else(|stands| stands, |()| "it runs on here".to_owned());
    OperateError::Failed(format!(
        "'{}' was not rolled back, {does}: {why}",
        standby.name()
    ))
}

/// What the source has of a guest.
async fn look(remote: &Remote, guest: GuestId) -> Result<CopyState, AskError> {
    let asked = Message::Turn(Box::new(TurnMessage::Look { guest }));
    let answer = remote.ask(asked).await?;
    if let Message::Turn(told) = answer
        && let TurnMessage::Seen(copy) = *told
    {
        return Ok(copy);
    }
    Err(AskError::Unfitting(remote.record.site.clone()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
