//! What operators and terms ask of a [`Driver`], and what it does about it
//! between its steps.

use std::sync::Arc;
use std::time::Duration;

use farhaven_policies::decide::MoveFacts;
use farhaven_storage_sync::unit::{Digest, VolumeIndex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;

use super::driver::{Attached, DriveError, Driver, Next};
use super::groups::Place;
use super::handover;
use super::records::Owed;
use super::remote::{AskError, Remote};
use super::runs::hold::{HoldOrder, HoldReply};
use super::runs::power::PowerOrder;
use super::turn::TurnOrder;
use super::view::{MoveReport, Phase};
use crate::activate::fence::Term;
use crate::replicate::message::{GroupMessage, Message};

/// How soon it is tried again to tell the peer what a guest is owed.
const TOLD_AGAIN: Duration = Duration::from_secs(1);

/// What a move heeds that is one of many.
#[derive(Debug, Clone)]
pub(super) struct Convoy {
    /// Last cuts to one peer go one after the other: two at once would each
    /// stand for the time of both.
    last_cut: Arc<Semaphore>,
    /// Whoever asked for the moves wants no more of them.
    given_up: watch::Receiver<bool>,
    /// The guest's place among those of its group, which are moved as one.
    place: Option<Place>,
}

impl Convoy {
    /// Moves that go one last cut at a time, until `given_up` becomes true.
    pub(super) fn new(given_up: watch::Receiver<bool>) -> Self {
        Self {
            last_cut: Arc::new(Semaphore::new(1)),
            given_up,
            place: None,
        }
    }

    /// Of one guest of a group that is moved as one.
    pub(super) fn of_group(place: Place) -> Self {
        Self {
            place: Some(place),
            ..Self::new(watch::channel(false).1)
        }
    }

    /// The guest's place among those of its group.
    pub(super) fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// Are moves that have not come to their last cut to end?
    pub(super) fn is_given_up(&self) -> bool {
        self.why_given_up().is_some()
    }

    /// As [`Convoy::is_given_up`], with the reason.
    pub(super) fn why_given_up(&self) -> Option<String> {
        if *self.given_up.borrow() {
            return Some("the evacuation was aborted".to_owned());
        }
        self.place.as_ref().and_then(Place::given_up)
    }

    /// What a last cut would find; of a group that is moved as one, with what all
    /// of its guests have left.
    pub(super) fn with_others(&self, facts: MoveFacts) -> MoveFacts {
        match &self.place {
            Some(place) => place.with_others(facts),
            None => facts,
        }
    }

    /// The turn for a last cut, if nobody has it, and all who are cut together
    /// are near to theirs.
    pub(super) fn turn(&self) -> Option<OwnedSemaphorePermit> {
        if self.place.as_ref().is_some_and(|place| !place.is_turn()) {
            return None;
        }
        self.last_cut.clone().try_acquire_owned().ok()
    }
}

/// What a driver is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Leave the guest alone until told otherwise.
    Pause,
    /// Go on.
    Resume,
    /// Stop protecting; the guest runs on.
    End,
    /// A newer term is known: stop the guest for good. Answered when it is
    /// stopped, or with why it is not.
    Fence(Term, oneshot::Sender<Result<(), String>>),
    /// Move it to the peer, even if it stands longer than the policy allows
    /// when that is accepted.
    Move {
        accept_pause: bool,
        /// The moves that this one is among.
        convoy: Option<Convoy>,
        reply: oneshot::Sender<Result<MoveReport, NotMoved>>,
    },
    /// Bring it to stand still for a run at the peer, and hold it.
    Hold(HoldOrder),
    /// Ask its agent whether it answers, and have it freeze filesystems for the next
    /// cuts if that is asked, too.
    Quiesce(bool, oneshot::Sender<Result<(), String>>),
    /// Shut it down for a run at the peer, or boot what is shut down.
    Power(PowerOrder),
    /// Is it held, and could it go on?
    IsHeld(HoldReply),
    /// Ask the peer now what became of it, if it is held.
    Ask,
    /// What it is owed has changed: from now on this holds.
    Owe(Box<Owed>),
    /// The peer's copy of these units (volume, first, how many) is damaged: they
    /// go with the next point. One that finds nobody attached is void: the peer
    /// asks again.
    Lost(Vec<(VolumeIndex, u64, u64)>),
    /// Give up waiting for the peer's word about a move, and run the guest here.
    TakeBack(oneshot::Sender<Result<(), String>>),
    /// Of the copy that is kept stopped here, since the guest runs at the peer.
    Turn(TurnOrder),
}

impl Command {
    /// Must the step under way stop for it?
    pub(super) fn is_urgent(&self) -> bool {
        match self {
            Command::Pause | Command::End | Command::Fence(..) => true,
            // Whoever hands the guest back answers no opening before this is answered.
            Command::Turn(order) => matches!(order, TurnOrder::GoBack(..)),
            _ => false,
        }
    }

    /// Is it a newer term of another site? It comes before whatever was ordered before.
    pub(super) fn is_fence(&self) -> bool {
        matches!(self, Command::Fence(..))
    }
}

/// Why a guest was not moved.
#[derive(Debug)]
pub(super) enum NotMoved {
    /// It would have stood longer than its policy allows: it runs here, and is
    /// protected as before.
    TooLong(String),
    /// Whoever asked for it wants it no more: as above.
    GivenUp(String),
    /// It went wrong; the message says where the guest is.
    Failed(String),
}

impl Driver {
    /// Commands between attempts, with no guest attached. True: the task ends.
    pub(super) async fn idle_commands(&mut self) -> bool {
        while let Some(command) = self.waiting.pop_front() {
            match command {
                Command::Pause => self.set_paused(true).await,
                Command::Resume => self.set_paused(false).await,
                Command::End => {
                    self.clear_away().await;
                    return true;
                }
                Command::Fence(term, done) => {
                    let _ = done.send(self.fence(term, None).await);
                }
                Command::Move { reply, .. } => {
                    let _ = reply.send(Err(NotMoved::Failed(self.not_attached())));
                }
                Command::Hold(order) => self.hold_again(order),
                Command::Power(order) => self.power_alone(order).await,
                Command::IsHeld(reply) => self.is_held(reply, &mut None).await,
                Command::Quiesce(_, reply) => {
                    let _ = reply.send(Err(self.not_attached()));
                }
                Command::Ask => {}
                Command::Owe(owed) => self.owe(*owed).await,
                Command::Lost(_) => {}
                Command::TakeBack(reply)
                    if self.protection.shut_down && self.protection.moving.is_none() =>
                {
                    self.power_alone(PowerOrder::On(reply)).await;
                }
                Command::TakeBack(reply) => {
                    let answer = self.take_back().await;
                    let _ = reply.send(answer);
                }
                Command::Turn(order) => self.turn_order(order).await,
            }
        }
        false
    }

    pub(super) fn not_attached(&self) -> String {
        let trouble = self.view.borrow().trouble.clone();
        format!(
            "'{}' is not protected at this moment{}{trouble}; see farhaven status",
            self.record.name,
            if trouble.is_empty() { "" } else { ": " },
        )
    }

    /// Urgent commands that stopped an attempt, with the guest still attached.
    pub(super) async fn attached_commands(
        &mut self,
        attached: &mut Attached,
    ) -> Result<Next, DriveError> {
        if let Some(first) = self.waiting.iter().position(Command::is_fence)
            && let Some(fence) = self.waiting.remove(first)
        {
            self.waiting.push_front(fence);
        }
        while let Some(command) = self.waiting.pop_front() {
            match command {
                Command::Pause => self.set_paused(true).await,
                Command::Resume => self.set_paused(false).await,
                Command::End => return Ok(Next::Ended),
                Command::Owe(owed) => self.owe(*owed).await,
                Command::Fence(term, done) => {
                    let _ = done.send(self.fence(term, attached.guest.take()).await);
                }
                later => {
                    self.waiting.push_front(later);
                    break;
                }
            }
        }
        Ok(Next::Again(Duration::ZERO))
    }

    /// What the peer had of these units is damaged there.
    pub(super) fn lost_at_peer(&self, attached: &mut Attached, units: &[(VolumeIndex, u64, u64)]) {
        let Some(guest) = &mut attached.guest else {
            return;
        };
        let state = guest.volumes().len().saturating_sub(1);
        for &(volume, unit, count) in units {
            if usize::from(volume) != state {
                guest.lost_at_peer(volume, unit, count);
                continue;
            }
            let known = attached.state_known.iter_mut();
            let first = usize::try_from(unit).unwrap_or(usize::MAX);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            known
                .skip(first)
                .take(count)
                .for_each(|digest| *digest = Digest::UNKNOWN);
        }
        tracing::warn!(guest = %self.record.name, peer = self.protection.to, runs = units.len(),
            "stored data is damaged there; the next point has it again");
    }

    /// A move, with what is told when it is not made.
    pub(super) async fn move_it(
        &mut self,
        attached: &mut Attached,
        accept_pause: bool,
        convoy: Option<&Convoy>,
    ) -> Result<MoveReport, NotMoved> {
        let outcome = handover::perform(self, attached, accept_pause, convoy).await;
        let held = self.protection.moving.is_some();
        outcome.map_err(|e| match e {
            DriveError::TooLong(why) => NotMoved::TooLong(why),
            DriveError::GivenUp(why) => NotMoved::GivenUp(why),
            e if held => NotMoved::Failed(format!(
                "'{}' is stopped here, and how its move to '{}' ended is not known: it is found out when that site answers (see farhaven status). {e}",
                self.record.name, self.protection.to
            )),
            e => NotMoved::Failed(e.to_string()),
        })
    }

    pub(super) async fn set_paused(&mut self, paused: bool) {
        self.protection.paused = paused;
        let _ = self.keep_protection().await;
        // Fenced, or how its move ended is not known: that is said, paused or not.
        let own = self.site.fence.may_run(self.record.id, self.site.key());
        if paused && self.protection.moving.is_none() && own.is_ok() {
            self.phase(Phase::Paused);
        }
    }

    /// What the guest is owed has changed: it holds from the next cut on.
    pub(super) async fn owe(&mut self, owed: Owed) {
        let rpo = owed.policy.rpo.duration();
        self.protection.policy = owed.policy;
        self.protection.schedule = owed.schedule;
        self.protection.group = owed.group;
        self.protection.share = owed.share;
        let _ = self.keep_protection().await;
        self.site.limits.owe(&self.protection);
        let group = self.protection.group.clone();
        self.view.send_modify(|v| {
            v.rpo_target_ms = Some(rpo.as_millis() as u64);
            v.policy_of = group;
        });
        let told = GroupMessage::Owed {
            guest: self.record.id,
            warm: self.protection.policy.warm,
            retention: self.protection.policy.retention.clone(),
            schedule: self.protection.schedule.clone(),
        };
        // Whatever was told before, and not heard yet, holds no more.
        self.telling = JoinSet::new();
        self.telling.spawn(tell_owed(self.remote.clone(), told));
    }

    pub(super) async fn take_back(&mut self) -> Result<(), String> {
        if self.protection.moving.is_none() {
            return Err(format!("'{}' is not held for a move", self.record.name));
        }
        handover::take_back(self).await.map_err(|e| e.to_string())
    }
}

/// Tells the peer what a guest is owed by now, until it has heard it: a session may
/// outlive the link's cut, and nothing is opened then that would tell it. One that does
/// not know the guest, or this message, hears it with the next opening.
async fn tell_owed(remote: Arc<Remote>, told: GroupMessage) {
    loop {
        remote.reachable().await;
        match remote.ask(Message::Group(Box::new(told.clone()))).await {
            Err(error @ (AskError::Unreachable(_) | AskError::TimedOut(..))) => {
                tracing::debug!(%error, "the peer was not told of a changed policy yet");
                tokio::time::sleep(TOLD_AGAIN).await;
            }
            Err(error) => {
                tracing::debug!(%error, "the peer takes no changed policy now");
                return;
            }
            Ok(_) => return,
        }
    }
}
