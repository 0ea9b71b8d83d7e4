//! What became of each guest: by its driver's word, and by what was begun for it.

use std::sync::Arc;
use std::time::Instant;

use tokio::task::{Id, JoinError};

use super::super::super::Site;
use super::super::super::groups::GroupMove;
use super::super::super::operate::OperateError;
use super::super::super::view::{MoveReport, Phase, SourceView};
use super::super::record::{EvacuationState, GuestState, millis};
use super::{Conductor, Ended, FIRST_WAIT, LONGEST_WAIT, LOOK, MENDING, MOST_TRIES};

impl Conductor {
    /// Looks at every guest.
    pub(super) async fn observe(&mut self, site: &Arc<Site>) {
        self.able.clear();
        if self.known_at.is_none_or(|at| at.elapsed() > LOOK) {
            let records = site.guest_records().into_iter();
            self.known = records.map(|record| (record.id, record)).collect();
            self.known_at = Some(Instant::now());
        }
        let sent = site.sent_bytes();
        for index in 0..self.record.guests.len() {
            let guest = &self.record.guests[index];
            if guest.state.is_over() {
                continue;
            }
            if let Some((before, base)) = self.counted.get(&index) {
                let now = sent.get(&guest.id).copied().unwrap_or(*base);
                self.record.guests[index].bytes = before + now.saturating_sub(*base);
            }
            let id = self.record.guests[index].id;
            match self.known.get(&id) {
                Some(record) => {
                    let view = site.source_view(record);
                    self.look_at(site, index, &view).await;
                }
                None if self.busy(index) => {}
                None => self.settle(
                    index,
                    GuestState::Failed,
                    "it is not known here any more".to_owned(),
                ),
            }
        }
    }

    async fn look_at(&mut self, site: &Arc<Site>, index: usize, view: &SourceView) {
        let state = self.record.guests[index].state;
        if self.busy(index) {
            // Whoever works on it tells; only this must not look as if it went well.
            if view.phase == Phase::Held {
                self.settle(index, GuestState::Moving, view.trouble.clone());
            }
            return;
        }
        if view.phase != Phase::Lost && view.phase != Phase::Paused {
            self.unfit.remove(&index);
        }
        match view.phase {
            Phase::Moved => {
                site.limits.favour(self.record.guests[index].id, false);
                self.record.guests[index].moved_ms = Some(millis(self.record.elapsed()));
                self.settle(
                    index,
                    GuestState::Moved,
                    "nobody heard how its move went: its blackout was not measured".to_owned(),
                );
            }
            Phase::Fenced => self.settle(
                index,
                GuestState::Failed,
                format!("another site owns it: {}", view.trouble),
            ),
            // Its move has just failed, and its driver has not got further yet.
            Phase::Moving if self.waits(index) => {}
            // In doubt: its driver asks the peer until it knows.
            Phase::Held | Phase::Moving => {
                self.settle(index, GuestState::Moving, view.trouble.clone());
            }
            Phase::Lost => self.mend(index, format!("it is LOST: {}", view.trouble)),
            Phase::Paused if state == GuestState::Waiting => {
                if let Err(error) = site.resume(&view.name).await {
                    self.mend(index, error.to_string());
                } else {
                    self.settle(
                        index,
                        GuestState::Copying,
                        "its protection was paused, and goes on".to_owned(),
                    );
                }
            }
            Phase::Paused => self.mend(
                index,
                format!(
                    "its protection was paused; go on with it: farhaven resume {}",
                    view.name
                ),
            ),
            Phase::Unprotected if state == GuestState::Waiting => {}
            Phase::Unprotected if view.peer.is_none() => self.settle(
                index,
                GuestState::Failed,
                "an operator ended its protection".to_owned(),
            ),
            Phase::Protected | Phase::Shipping if view.points_sealed > 0 => {
                self.able.insert(index);
                if state != GuestState::Ready {
                    self.settle(index, GuestState::Ready, String::new());
                }
            }
            _ if state == GuestState::Ready => {}
            _ => self.settle(index, GuestState::Copying, view.trouble.clone()),
        }
    }

    /// Is it to be tried again, later?
    fn waits(&self, index: usize) -> bool {
        let at = self.retry_at.get(&index);
        at.is_some_and(|at| *at > Instant::now())
    }

    /// It cannot be moved as it is; somebody may see to that.
    fn mend(&mut self, index: usize, why: String) {
        let since = *self.unfit.entry(index).or_insert_with(Instant::now);
        let state = match since.elapsed() > MENDING {
            true => GuestState::Failed,
            false => self.record.guests[index].state,
        };
        self.settle(index, state, why);
    }

    /// Something that was begun has ended.
    pub(super) fn take_in(&mut self, ended: Result<(Id, Ended), JoinError>) {
        match ended {
            Ok((id, ended)) => {
                self.at_work.remove(&id);
                match ended {
                    Ended::Protected(index, ended) => self.protected(index, ended),
                    Ended::Moved(index, ended) => self.moved(index, ended),
                    Ended::Together(guests, ended) => self.moved_together(&guests, ended),
                }
            }
            Err(error) => {
                let guests = self.at_work.remove(&error.id()).unwrap_or_default();
                tracing::error!(%error, ?guests, "what an evacuation began for guests ended early");
                for index in guests {
                    self.failed(index, format!("it ended early: {error}; see the log"));
                }
            }
        }
    }

    fn protected(&mut self, index: usize, ended: Result<(), OperateError>) {
        match ended {
            Ok(()) => self.settle(index, GuestState::Copying, String::new()),
            Err(error) => {
                let tries = self.copies_tried.entry(index).or_insert(0);
                *tries += 1;
                let wait = FIRST_WAIT * (1 << (*tries).min(4)) / 2;
                match *tries >= MOST_TRIES {
                    true => self.settle(index, GuestState::Failed, error.to_string()),
                    false => {
                        self.retry_at.insert(index, Instant::now() + wait);
                        self.settle(index, GuestState::Waiting, error.to_string());
                    }
                }
            }
        }
    }

    fn moved(&mut self, index: usize, ended: Result<Box<MoveReport>, OperateError>) {
        let guest = &mut self.record.guests[index];
        if let Some(site) = self.site.upgrade() {
            site.limits.favour(guest.id, false);
            let sent = site.sent_bytes().get(&guest.id).copied();
            if let (Some((before, base)), Some(now)) = (self.counted.get(&index), sent) {
                guest.bytes = before + now.saturating_sub(*base);
            }
        }
        match ended {
            Ok(report) => {
                guest.moved_ms = Some(millis(super::super::super::age(self.record.begun_at)));
                let note = report.note.clone();
                guest.report = Some(*report);
                self.settle(index, GuestState::Moved, note);
            }
            Err(error) if self.record.state == EvacuationState::Aborting => {
                // Its own words say that it was given up; the end says the rest.
                self.settle(index, GuestState::Ready, error.to_string());
            }
            Err(OperateError::TooLong(why)) if guest.tries >= MOST_TRIES => {
                self.settle(index, GuestState::Failed, why);
            }
            Err(error) => self.failed(index, error.to_string()),
        }
    }

    /// Each of the group by what is told of it.
    fn moved_together(&mut self, guests: &[usize], ended: Result<Box<GroupMove>, OperateError>) {
        let members = match ended {
            Ok(moved) => moved.members,
            Err(error) => {
                for index in guests {
                    let why = error.to_string();
                    let same = match error {
                        OperateError::TooLong(_) => OperateError::TooLong(why),
                        _ => OperateError::Failed(why),
                    };
                    self.moved(*index, Err(same));
                }
                return;
            }
        };
        for index in guests {
            let name = &self.record.guests[*index].guest;
            let member = members.iter().find(|member| member.guest == *name);
            let ended = match member {
                Some(member) => match &member.report {
                    Some(report) if !report.runs => {
                        // It is no more this site's to move.
                        let why = member.error.clone();
                        self.record.guests[*index].report = Some(report.clone());
                        self.settle(*index, GuestState::Failed, why);
                        continue;
                    }
                    Some(report) => Ok(Box::new(report.clone())),
                    None => Err(OperateError::Failed(member.error.clone())),
                },
                None => Err(OperateError::Failed("nothing was told of it".to_owned())),
            };
            self.moved(*index, ended);
        }
    }

    /// It is tried again after a while, unless it was tried often enough.
    fn failed(&mut self, index: usize, why: String) {
        let tries = self.record.guests[index].tries.max(1);
        if self.record.order.deadline.is_none() && tries >= MOST_TRIES {
            return self.settle(index, GuestState::Failed, why);
        }
        let wait = (FIRST_WAIT * (1 << (tries - 1).min(4))).min(LONGEST_WAIT);
        self.retry_at.insert(index, Instant::now() + wait);
        let guest = self.record.guests[index].guest.clone();
        self.note(format!(
            "'{guest}' was not moved, and is tried again in {wait:?}: {why}"
        ));
        self.settle(index, GuestState::Ready, why);
    }

    /// What was tried and is still here when the deadline passes has failed; what did not
    /// fit is left. What was never tried still goes: late is better than not at all.
    pub(super) fn pass_deadline(&mut self) {
        if self.record.left().is_none_or(|left| !left.is_zero()) {
            return;
        }
        for index in 0..self.record.guests.len() {
            let guest = &self.record.guests[index];
            if guest.state.is_over() || self.busy(index) || guest.state == GuestState::Moving {
                continue;
            }
            let why = guest.why.clone();
            if guest.tries > 0 {
                self.settle(index, GuestState::Failed, why);
            } else if guest.planned.is_none() {
                let why = "it did not fit before the deadline".to_owned();
                self.settle(index, GuestState::Left, why);
            }
        }
    }
}
