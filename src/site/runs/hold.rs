//! The source's part of a run that is conducted at the target: its guest is
//! moved to the point where it stands still and its last changes are sealed
//! there; then it is held until the run has run it, or has given it back.
//!
//! From the hold on, the source asks again and again what became of the guest,
//! as after any move whose word did not come. The target answers that it is not
//! decided yet, that the guest runs there, or that it is given up: then it goes
//! on here, under a newer term.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::activate::fence::Term;
use crate::guest::{After, Guest};
use crate::replicate::message::{Handed, HeldGuest, Message, Refusal, RunMessage};
use crate::site::answer::refused;
use crate::site::commands::Convoy;
use crate::site::converge::{converge, throttle};
use crate::site::cut;
use crate::site::driver::{Attached, Command, DriveError, Driver};
use crate::site::groups::Place;
use crate::site::handover;
use crate::site::remote::{AskError, Remote};
use crate::site::runs::power;
use crate::site::view::Phase;
use crate::site::{Site, guests};

mod group;

/// How often the target is asked what became of a held guest.
pub(in crate::site) const ASK_AGAIN: Duration = Duration::from_millis(500);

/// The last point of a guest that stands still is sealed within this time, or
/// the guest goes on.
const SEALED: Duration = Duration::from_secs(300);

/// A guest that stands still for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPoint {
    /// Its last point, sealed at the peer.
    pub point: u64,
    /// Bytes sent for it while the guest stood still.
    pub bytes: u64,
    /// When it was stopped, nanoseconds since 1970.
    pub stopped_at: u64,
    /// Whether its filesystems were frozen for it, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
    /// Its group's instant, if all of that were stopped with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub together: Option<Together>,
}

/// The instant at which all guests of a group were stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Together {
    /// The cut's number.
    pub cut: u64,
    /// From the first guest's stop to the last one's, nanoseconds.
    pub skew_ns: u64,
}

impl HeldPoint {
    /// As a target is told of it, with the term of the hand-over.
    fn told(self, term: Term) -> HeldGuest {
        HeldGuest {
            point: self.point,
            bytes: self.bytes,
            stopped_at: self.stopped_at,
            term,
            quiesced: self.quiesced,
        }
    }
}

/// To whom the hold of a guest is told.
pub(in crate::site) type HoldReply = oneshot::Sender<Result<(HeldPoint, Term), NotHeld>>;

/// Why a guest is not held.
#[derive(Debug)]
pub(in crate::site) struct NotHeld {
    pub(in crate::site) why: String,
    /// It is about to be copied on: whoever asks again finds it so, within seconds.
    pub(in crate::site) soon: bool,
}

impl From<String> for NotHeld {
    fn from(why: String) -> Self {
        Self { why, soon: false }
    }
}

impl NotHeld {
    fn refused(self) -> Message {
        let code = match self.soon {
            true => Refusal::OutOfStep,
            false => Refusal::Unable,
        };
        refused(code, self.why)
    }
}

/// A guest is to come to stand still.
#[derive(Debug)]
pub(in crate::site) struct HoldOrder {
    /// Its agent freezes filesystems for its last cut.
    pub(in crate::site) quiesce: bool,
    /// Its place among those of its group, who stop at one instant.
    pub(in crate::site) place: Option<Place>,
    pub(in crate::site) reply: HoldReply,
}

/// Answers a target's message about a run.
pub(in crate::site) async fn answer(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    asked: RunMessage,
) -> Message {
    match asked {
        RunMessage::Hold { guest, quiesce } => {
            let order = |reply| {
                Command::Hold(HoldOrder {
                    quiesce,
                    place: None,
                    reply,
                })
            };
            held(site, remote, guest, order).await
        }
        RunMessage::HoldGroup { group, guests } => group::hold(site, remote, group, guests).await,
        RunMessage::Quiesce { guest, next_points } => {
            let ask = |reply| Command::Quiesce(next_points, reply);
            have_driver_do(site, remote, guest, ask).await
        }
        RunMessage::ShutDown { guest, within_ms } => {
            power::shut_down(site, remote, guest, within_ms).await
        }
        RunMessage::StartAgain { guest } => power::start_again(site, remote, guest).await,
        RunMessage::StillHeld { guest } => held(site, remote, guest, Command::IsHeld).await,
        RunMessage::Release { guest } => {
            if let Some(commands) = driver_of(site, remote, guest) {
                let _ = commands.send(Command::Ask).await;
            }
            Message::Done
        }
        RunMessage::Held(_) | RunMessage::GroupHeld { .. } | RunMessage::Undecided => {
            refused(Refusal::Unknown, "that is an answer, not a question")
        }
    }
}

pub(super) fn driver_of(
    site: &Site,
    remote: &Remote,
    guest: GuestId,
) -> Option<tokio::sync::mpsc::Sender<Command>> {
    let drivers = site.drivers.read().unwrap_or_else(PoisonError::into_inner);
    let driver = drivers.get(&guest)?;
    (driver.to == remote.record.key).then(|| driver.commands.clone())
}

pub(super) fn not_protected() -> Message {
    refused(
        Refusal::Unable,
        "this guest is not protected from that site to here any more",
    )
}

/// What the driver of a guest answers a peer that it is protected to; `Err` is what to
/// answer instead.
pub(super) async fn ask_driver<T, E: Into<NotHeld>>(
    site: &Site,
    remote: &Remote,
    guest: GuestId,
    command: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Command,
) -> Result<T, Message> {
    let Some(commands) = driver_of(site, remote, guest) else {
        return Err(not_protected());
    };
    let (reply, answer) = oneshot::channel();
    let _ = commands.send(command(reply)).await;
    match answer.await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(why)) => Err(why.into().refused()),
        Err(_) => Err(refused(Refusal::Unable, "that site's daemon is stopping")),
    }
}

/// As [`ask_driver`], where being done is all there is to answer.
pub(super) async fn have_driver_do(
    site: &Site,
    remote: &Remote,
    guest: GuestId,
    command: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Command,
) -> Message {
    match ask_driver(site, remote, guest, command).await {
        Ok(()) => Message::Done,
        Err(answer) => answer,
    }
}

async fn held(
    site: &Site,
    remote: &Remote,
    guest: GuestId,
    command: impl FnOnce(HoldReply) -> Command,
) -> Message {
    match ask_driver(site, remote, guest, command).await {
        Ok((held, term)) => Message::Run(RunMessage::Held(held.told(term))),
        Err(answer) => answer,
    }
}

impl Driver {
    /// The guest comes to stand still for a run, and stands until that is
    /// decided. An error says where it is.
    pub(in crate::site) async fn hold(
        &mut self,
        attached: &mut Attached,
        order: HoldOrder,
    ) -> Result<(), DriveError> {
        let HoldOrder {
            quiesce,
            place,
            reply,
        } = order;
        self.phase(Phase::Moving);
        if let Some(guest) = attached.guest.as_mut() {
            guest.leave_to_the_cut(false);
        }
        let held = self.come_to_stand(attached, quiesce, place.as_ref()).await;
        if let Some(guest) = attached.guest.as_mut() {
            guest.leave_to_the_cut(true);
        }
        match held {
            Ok(held) => {
                let _ = reply.send(Ok(held));
            }
            Err(error) => {
                if let Some(place) = place {
                    place.party().give_up(&error.to_string());
                }
                let _ = reply.send(Err(error.to_string().into()));
                return Err(error);
            }
        }
        let ended = handover::how_it_ended(self, attached.guest.take()).await;
        ended.map(|_| ())
    }

    async fn come_to_stand(
        &mut self,
        attached: &mut Attached,
        quiesce: bool,
        place: Option<&Place>,
    ) -> Result<(HeldPoint, Term), DriveError> {
        let convoy = place.cloned().map(Convoy::of_group);
        let converged = converge(self, attached, false, convoy.as_ref()).await;
        throttle(attached, 0).await.unwrap_or_else(|error| {
            tracing::warn!(guest = %self.record.name, %error, "the guest may still be throttled; it is let free with the next attach");
        });
        converged.map_err(|error| handover::not_begun(self, error))?;
        let known = self.site.fence.current(self.record.id);
        let term = Term {
            group: self.record.id,
            number: known.map_or(0, |t| t.number) + 1,
            owner: self.remote.record.key,
        };
        // Without this on disk, a daemon that comes back would let the guest go on.
        self.protection.moving = Some(term);
        self.protection.held = None;
        if let Err(why) = self.keep_protection().await {
            self.protection.moving = None;
            return Err(DriveError::Other(format!(
                "'{}' runs on here: that it is to be held cannot be written down: {why}",
                self.record.name
            )));
        }
        self.phase(Phase::Held);
        self.quiesce_next = u8::from(quiesce);
        let made = match self.seal_the_last(attached, term, place).await {
            Ok(made) => made,
            Err(error) => {
                // The peer may not run it: it has no word of the term.
                handover::runs_on(self, attached).await?;
                return Err(handover::not_begun(self, error));
            }
        };
        self.site.note_sealed(self.record.id, made.cut_at);
        let held = HeldPoint {
            point: made.point,
            bytes: made.final_bytes,
            stopped_at: crate::site::unix_ns(made.cut_at),
            quiesced: made.quiesced.told(),
            together: made.group.map(|mark| Together {
                cut: mark.cut,
                skew_ns: mark.skew_ns,
            }),
        };
        self.protection.held = Some(held);
        let kept = self.keep_protection().await;
        kept.map_err(DriveError::Other)?;
        self.view.send_modify(|v| v.newest_point = held.point);
        Ok((held, term))
    }

    /// The guest is stopped, and its last point sealed; of a group, those of all.
    async fn seal_the_last(
        &mut self,
        attached: &mut Attached,
        term: Term,
        place: Option<&Place>,
    ) -> Result<cut::Made, DriveError> {
        let with = place.map(|place| place.party().cut.clone());
        let made = cut::make(self, attached, After::Hold, with).await?;
        cut::seal_held(self, attached, &made, SEALED).await?;
        if let Some(place) = place {
            place.sealed(Handed {
                guest: self.record.id,
                point: made.point,
                term,
            });
            let all = self.interruptible(place.party().all_sealed()).await?;
            all.map_err(DriveError::GivenUp)?;
        }
        Ok(made)
    }

    /// Answers who wants a guest held that cannot be now, or is already.
    pub(in crate::site) fn hold_again(&self, order: HoldOrder) {
        let held = self.as_held();
        if let (Some(place), Err(not)) = (&order.place, &held) {
            place.party().give_up(&not.why);
        }
        let _ = order.reply.send(held);
    }

    /// As what it is held; the words say why it is not.
    fn as_held(&self) -> Result<(HeldPoint, Term), NotHeld> {
        match (self.protection.held, self.protection.moving) {
            (Some(held), Some(term)) => Ok((held, term)),
            (None, Some(_)) => Err(NotHeld {
                why: format!(
                    "how an earlier move of '{}' ended is not known yet; see farhaven status there",
                    self.record.name
                ),
                soon: true,
            }),
            _ => {
                let view = self.view.borrow();
                Err(NotHeld {
                    why: format!(
                        "'{}' is not protected at this moment: {}; see farhaven status there",
                        self.record.name, view.trouble
                    ),
                    soon: can_be_held(view.phase).is_some(),
                })
            }
        }
    }

    /// As it is held, when its stopped copy could go on. `guest` is
    /// what is attached to it, if anything is.
    pub(in crate::site) async fn is_held(
        &self,
        reply: HoldReply,
        guest: &mut Option<Box<dyn Guest>>,
    ) {
        if self.protection.held.is_none() {
            let _ = reply.send(self.as_held());
            return;
        }
        let (site, record, attached) = (self.site.clone(), self.record.clone(), guest.take());
        let looked = crate::work::spawn_blocking(move || match attached {
            Some(mut attached) => {
                let lives = attached.running().is_some();
                (Some(attached), Ok(lives))
            }
            None => {
                let runs = guests::copy_runs(&site, &record);
                let lives = runs.map(|runs| runs.is_some());
                (None, lives.map_err(|error| error.to_string()))
            }
        });
        let (attached, lives) = match looked.await {
            Ok(looked) => looked,
            Err(error) => (None, Err(error.to_string())),
        };
        *guest = attached;
        let _ = reply.send(match lives {
            Ok(true) => self.as_held(),
            Ok(false) => {
                Err(format!("the stopped copy of '{}' has ended there", self.record.name).into())
            }
            Err(why) => Err(why.into()),
        });
    }
}

/// Can a guest of this phase be held: at once, or soon (`false`)? `None`: not by waiting.
fn can_be_held(phase: Phase) -> Option<bool> {
    match phase {
        Phase::Protected | Phase::Shipping | Phase::Moving | Phase::Held => Some(true),
        Phase::Attaching | Phase::Connecting | Phase::Resuming => Some(false),
        _ => None,
    }
}

/// A held guest waits for the target's word; any command ends the wait.
pub(in crate::site) async fn undecided(
    driver: &mut Driver,
    guest: &mut Option<Box<dyn Guest>>,
) -> Result<(), DriveError> {
    let (name, to) = (driver.record.name.clone(), driver.protection.to.clone());
    driver.view.send_modify(|v| {
        v.phase = Phase::Held;
        v.trouble = format!(
            "it stands still here for a run at '{to}', which decides where it goes on (there: farhaven run list). If that site is lost for good: farhaven take-back {name} --force"
        );
    });
    // What it is asked meanwhile is answered without giving up the wait.
    loop {
        let next = match driver.waiting.pop_front() {
            // It came while the target was asked.
            Some(command) => Ok(Some(command)),
            None => tokio::time::timeout(ASK_AGAIN, driver.commands.recv()).await,
        };
        match next {
            Err(_) | Ok(Some(Command::Ask)) => return Ok(()),
            Ok(Some(Command::Hold(order))) => driver.hold_again(order),
            Ok(Some(Command::IsHeld(reply))) => driver.is_held(reply, guest).await,
            Ok(Some(other)) => {
                driver.waiting.push_front(other);
                return Err(DriveError::Interrupted);
            }
            Ok(None) => return Err(DriveError::Interrupted),
        }
    }
}

/// An answer of the target that leaves open what becomes of a held guest.
pub(in crate::site) fn is_undecided(answer: &Result<Message, AskError>) -> bool {
    matches!(answer, Ok(Message::Run(RunMessage::Undecided)))
}
