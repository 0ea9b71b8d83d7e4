//! Evacuation: everything off this site, against a deadline.
//!
//! An [`Order`] becomes a plan, which prints ([`Site::plan_evacuation`]), or is
//! performed ([`Site::begin_evacuation`]) by one task ([`conduct`]). Data passes
//! through it so: [`select`] says who can go; [`facts`] measures what each has to
//! copy and what the link carries; `farhaven_policies::evacuate` plans; [`conduct`]
//! protects what is not protected, moves guest after guest, and plans anew when
//! figures change; [`record`] keeps all of it, so that the next daemon goes on.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use farhaven_policies::evacuate::{self, LeftReason, Plan, Verdict};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::Site;
use super::operate::{OperateError, failed};
use super::remote::{AskError, Remote};
use super::view::bytes;
use crate::replicate::message::Message;

mod conduct;
mod facts;
mod record;
mod select;

pub use facts::{Basis, GuestBasis, LinkBasis};
pub use record::{Change, Evacuation, EvacuationState, Evacuee, GuestState, Order, Planned};
pub use select::Excluded;

pub(super) use record::EVACUATIONS;

use conduct::{Conductor, Word};
use record::Records;
use select::Selected;

/// What an evacuation would do. Nothing is done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Preview {
    /// What was asked for.
    pub order: Order,
    /// What would be done, and whether the deadline can be met.
    pub plan: Plan,
    /// The figures it rests on.
    pub basis: Basis,
    /// Guests that cannot go, and why.
    pub excluded: Vec<Excluded>,
    /// What would have to give, or may go wrong, for people.
    pub remarks: Vec<String>,
}

/// How others reach the evacuation under way.
pub(super) struct Handle {
    words: mpsc::Sender<(Word, oneshot::Sender<Result<(), String>>)>,
    seen: watch::Receiver<Evacuation>,
}

/// An evacuation in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// Its number.
    pub id: u64,
    /// Where to.
    pub to: String,
    /// Where it stands.
    pub state: EvacuationState,
    /// When it began, nanoseconds since 1970.
    pub begun_at: u64,
    /// How long it took so far.
    pub elapsed_ms: u64,
    /// Guests that moved.
    pub moved: usize,
    /// All its guests.
    pub guests: usize,
}

impl Site {
    /// What an evacuation would do now. Nothing is done.
    ///
    /// # Errors
    /// When a name is not known, nothing can be moved, the peer cannot be reached,
    /// or the start order makes no sense.
    pub async fn plan_evacuation(self: &Arc<Self>, order: &Order) -> Result<Preview, OperateError> {
        let (remote, selected) = self.look(order)?;
        self.preview(order, &remote, &selected).await
    }

    /// Begins an evacuation, durably; it goes on in the background.
    ///
    /// # Errors
    /// As of [`Site::plan_evacuation`]; when one is under way; when not everything
    /// fits before the deadline and `order.partial` is not set
    /// ([`OperateError::TooLong`]): nothing is done then.
    pub async fn begin_evacuation(
        self: &Arc<Self>,
        order: &Order,
    ) -> Result<Evacuation, OperateError> {
        self.none_under_way()?;
        let (remote, selected) = self.look(order)?;
        let trouble = remote.trouble();
        if !trouble.is_empty() {
            return Err(OperateError::Conflict(format!(
                "site '{}' cannot take anything in now: {trouble}",
                order.to
            )));
        }
        let preview = self.preview(order, &remote, &selected).await?;
        if preview.plan.verdict == Verdict::DoesNotFit && !order.partial {
            return Err(OperateError::TooLong(format!(
                "not everything fits before the deadline; nothing was begun.\n  {}\nTo move what fits, by priority: add --partial. To look at the whole plan: --dry-run",
                preview.remarks.join("\n  ")
            )));
        }
        let records = Records::new(&self.config.site.state_dir);
        let site = self.clone();
        let begin = move || -> Result<Evacuation, OperateError> {
            let mut slot = site
                .evacuation
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            none_in(slot.as_ref())?;
            let id = records.numbers().last().map_or(1, |last| last + 1);
            let record = conduct::begun(id, &preview, &selected);
            records.keep(&record).map_err(|error| {
                failed(format!(
                    "nothing was begun, as the evacuation cannot be written down: {error}"
                ))
            })?;
            records.forget_old();
            tracing::warn!(evacuation = id, to = %record.order.to, guests = record.guests.len(), "an evacuation begins");
            *slot = Some(Conductor::start(&site, record.clone(), Some(preview.basis)));
            Ok(record)
        };
        // Its task needs the runtime that a blocking thread has, too.
        crate::work::spawn_blocking(begin).await.map_err(failed)?
    }

    /// Goes on with an evacuation that a daemon before this one left.
    pub(super) fn resume_evacuation(self: &Arc<Self>) {
        let records = Records::new(&self.config.site.state_dir);
        let Some(number) = records.numbers().last().copied() else {
            return;
        };
        match records.read(number) {
            Ok(record) if record.state.is_over() => {}
            Ok(record) => {
                tracing::warn!(
                    evacuation = number,
                    state = record.state.words(),
                    "an evacuation goes on"
                );
                let handle = Conductor::start(self, record, None);
                *self
                    .evacuation
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(handle);
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "the last evacuation cannot be read, and does not go on; see farhaven status what runs here, and begin it anew"
                );
            }
        }
    }

    /// All evacuations that are kept, the newest first.
    #[must_use]
    pub fn evacuations(self: &Arc<Self>) -> Vec<Summary> {
        let records = Records::new(&self.config.site.state_dir);
        let numbers = records.numbers().into_iter().rev();
        numbers
            .filter_map(|number| self.evacuation(Some(number)).ok())
            .map(|record| Summary {
                id: record.id,
                to: record.order.to.clone(),
                state: record.state,
                begun_at: record.begun_at,
                elapsed_ms: record::millis(record.elapsed()),
                moved: record.count(GuestState::Moved),
                guests: record.guests.len(),
            })
            .collect()
    }

    /// One by its number, or the newest.
    ///
    /// # Errors
    /// When there is none, or its record cannot be read.
    pub fn evacuation(self: &Arc<Self>, number: Option<u64>) -> Result<Evacuation, OperateError> {
        let under_way = {
            let slot = self
                .evacuation
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            slot.as_ref().map(|handle| handle.seen.borrow().clone())
        };
        let records = Records::new(&self.config.site.state_dir);
        let mut record = match (under_way, number) {
            (Some(record), None) => record,
            (Some(record), Some(number)) if record.id == number => record,
            (_, Some(number)) if records.numbers().contains(&number) => {
                records.read(number).map_err(failed)?
            }
            (_, Some(number)) => {
                return Err(OperateError::Unknown(format!(
                    "no evacuation {number} is kept here; see farhaven evacuation list"
                )));
            }
            (None, None) => match records.numbers().last() {
                Some(last) => records.read(*last).map_err(failed)?,
                None => {
                    return Err(OperateError::Unknown(
                        "no evacuation was begun here; begin one: farhaven evacuate --to SITE --deadline TIME".to_owned(),
                    ));
                }
            },
        };
        if !record.state.is_over() {
            self.tell_live(&mut record);
        }
        Ok(record)
    }

    /// Begins nothing more until resumed; what is under way comes to its end.
    ///
    /// # Errors
    /// When none is under way, or it is being aborted.
    pub async fn pause_evacuation(&self) -> Result<(), OperateError> {
        self.say(Word::Pause).await
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// When none is under way, or it is being aborted.
    pub async fn resume_paused_evacuation(&self) -> Result<(), OperateError> {
        self.say(Word::Resume).await
    }

    /// Ends it: what has not moved stays here, protected. A guest whose last cut has
    /// begun still moves.
    ///
    /// # Errors
    /// When none is under way.
    pub async fn abort_evacuation(&self) -> Result<(), OperateError> {
        self.say(Word::Abort).await
    }

    async fn say(&self, word: Word) -> Result<(), OperateError> {
        let none = || {
            OperateError::Conflict(
                "no evacuation is under way; see farhaven evacuation list".to_owned(),
            )
        };
        let words = {
            let slot = self
                .evacuation
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            slot.as_ref().map(|handle| handle.words.clone())
        };
        let (reply, answer) = oneshot::channel();
        let words = words.ok_or_else(none)?;
        words.send((word, reply)).await.map_err(|_| none())?;
        let answer = answer.await.map_err(|_| none())?;
        answer.map_err(OperateError::Conflict)
    }

    fn none_under_way(&self) -> Result<(), OperateError> {
        none_in(
            self.evacuation
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .as_ref(),
        )
    }

    /// The peer, reached, and who goes there.
    fn look(self: &Arc<Self>, order: &Order) -> Result<(Arc<Remote>, Selected), OperateError> {
        let remote = self
            .remote(&order.to)
            .ok_or_else(|| self.no_peer(&order.to))?;
        if order
            .deadline
            .is_some_and(|deadline| deadline.duration().is_zero())
        {
            return Err(OperateError::Conflict(
                "a deadline of 0s has passed; give one like 30m, or none: as soon as may be"
                    .to_owned(),
            ));
        }
        let selected = select::select(self, order)?;
        if !remote.alive() {
            return Err(OperateError::Conflict(format!(
                "{}. If that site is lost, nothing can be moved there",
                AskError::Unreachable(order.to.clone())
            )));
        }
        Ok((remote, selected))
    }

    async fn preview(
        self: &Arc<Self>,
        order: &Order,
        remote: &Arc<Remote>,
        selected: &Selected,
    ) -> Result<Preview, OperateError> {
        let deadline = order.deadline.map(|deadline| deadline.duration());
        let moved: BTreeSet<String> = selected.moved.clone();
        let (facts, basis) =
            facts::facts(self, remote, order, &selected.candidates, moved, deadline).await;
        let planned = crate::work::spawn_blocking(move || evacuate::plan(&facts)).await;
        let plan = planned.map_err(failed)?;
        let plan = plan.map_err(|error| OperateError::Conflict(error.to_string()))?;
        let mut remarks = remarks(order, &plan);
        remarks.extend(room(remote, selected, &basis).await);
        Ok(Preview {
            order: order.clone(),
            plan,
            basis,
            excluded: selected.excluded.clone(),
            remarks,
        })
    }

    /// What is seen of guests now beside what is written down.
    fn tell_live(&self, record: &mut Evacuation) {
        for guest in record.guests.iter_mut().filter(|g| !g.state.is_over()) {
            if let Ok(known) = self.guest(&guest.guest) {
                let view = self.source_view(&known);
                guest.phase = Some(view.phase);
                guest.progress = view.progress;
                guest.outlook = view.outlook;
            }
        }
    }
}

fn none_in(slot: Option<&Handle>) -> Result<(), OperateError> {
    let Some(handle) = slot else { return Ok(()) };
    let seen = handle.seen.borrow();
    if seen.state.is_over() {
        return Ok(());
    }
    Err(OperateError::Conflict(format!(
        "evacuation {} to '{}' is under way: farhaven evacuation status; to end it: farhaven evacuation abort",
        seen.id, seen.order.to
    )))
}

/// Why a group is left, for people.
pub fn left_because(reason: &LeftReason) -> String {
    match reason {
        LeftReason::NoLink => "nothing connects this site with its peer".to_owned(),
        LeftReason::TooLong { needs } => format!(
            "alone on the link it would need {:.0} s",
            needs.as_secs_f64().ceil()
        ),
        LeftReason::WaitsFor { group } => format!("it starts after '{group}', which is left"),
        LeftReason::NoRoom => "the link is needed for those that go before it".to_owned(),
    }
}

/// What would have to give.
fn remarks(order: &Order, plan: &Plan) -> Vec<String> {
    let mut remarks = Vec::new();
    for left in &plan.left {
        remarks.push(format!(
            "'{}' would be left: {}",
            left.group,
            left_because(&left.reason)
        ));
    }
    if let Some(would_do) = &plan.would_do {
        if let Some(deadline) = would_do.deadline {
            remarks.push(format!(
                "everything would fit with --deadline {}s",
                deadline.as_secs()
            ));
        }
        if let Some(percent) = would_do.rate_percent {
            remarks.push(format!(
                "everything would fit before this deadline if the link carried {percent} % of what it does: raise its limit (farhaven link limit), or what its line carries"
            ));
        }
    }
    for give in &plan.gives {
        if give.throttle > 0 {
            remarks.push(format!(
                "'{}' changes faster than the link carries: it would be throttled by up to {} %",
                give.group, give.throttle
            ));
        }
        if give.blackout > give.max_blackout {
            let then = match order.accept_pause {
                true => "that is accepted",
                false => "it stays unless rounds win that, or you add --accept-pause",
            };
            remarks.push(format!(
                "'{}' would stand for about {:.1} s, where its policy allows {:.1} s: {then}",
                give.group,
                give.blackout.as_secs_f64(),
                give.max_blackout.as_secs_f64()
            ));
        }
    }
    remarks
}

/// Has the peer room for what is not there yet? Each guest is checked by itself, too,
/// before it is protected.
async fn room(remote: &Arc<Remote>, selected: &Selected, basis: &Basis) -> Vec<String> {
    let coming = selected.candidates.iter().zip(&basis.guests);
    let coming: Vec<_> = coming
        .filter(|(_, basis)| !basis.measured)
        .map(|(c, _)| c)
        .collect();
    let Some(first) = coming.first() else {
        return Vec::new();
    };
    let ram = coming.iter().fold(0u64, |sum, candidate| {
        sum.saturating_add(candidate.record.definition.ram_bytes())
    });
    let definition = first.record.definition.clone();
    let Ok(Message::FactsKnown { facts }) = remote.ask(Message::Facts { definition }).await else {
        return Vec::new();
    };
    let free = facts.memory_available.min(facts.ram_directory.1);
    match free < ram {
        true => vec![format!(
            "guests that are not there yet have {} of RAM, and the peer has room for {}: the last of them would be refused; free memory there first",
            bytes(ram),
            bytes(free)
        )],
        false => Vec::new(),
    }
}
