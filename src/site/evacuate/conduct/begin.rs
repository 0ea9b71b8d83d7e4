//! What is begun next: first copies, then moves, in the order of the plan.

use std::sync::Arc;
use std::time::Instant;

use super::super::super::Site;
use super::super::record::GuestState;
use super::{COPIES, Conductor, Ended, MOVES};

impl Conductor {
    /// Guests that may be begun now, in the order of the plan. Those that do not fit come
    /// when all others are under way.
    fn next_of(&self, state: GuestState) -> Vec<usize> {
        let now = Instant::now();
        let fits = |index: usize| self.record.guests[index].expected_ms.is_some();
        let outstanding = (0..self.record.guests.len()).any(|index| {
            let guest = &self.record.guests[index];
            fits(index) && !guest.state.is_over() && !self.busy(index) && guest.tries == 0
        });
        let may = |index: &usize| {
            self.record.guests[*index].state == state
                && !self.busy(*index)
                && (fits(*index) || !outstanding)
                && self.retry_at.get(index).is_none_or(|at| *at <= now)
        };
        self.order.iter().copied().filter(may).collect()
    }

    /// Protects what is not protected, a few at a time.
    pub(super) fn protect_next(&mut self, site: &Arc<Site>) {
        let copying = |conductor: &Self| conductor.record.count(GuestState::Copying);
        for index in self.next_of(GuestState::Waiting) {
            if copying(self) >= COPIES {
                return;
            }
            let (site, to) = (site.clone(), self.record.order.to.clone());
            let name = self.record.guests[index].guest.clone();
            let work = async move { Ended::Protected(index, site.protect(&name, &to, None).await) };
            let work = self.works.spawn(work);
            self.at_work.insert(work.id(), index);
            self.settle(index, GuestState::Copying, String::new());
        }
    }

    /// Moves what is protected and waits for nobody, a few at a time.
    pub(super) fn move_next(&mut self, site: &Arc<Site>) {
        for index in self.next_of(GuestState::Ready) {
            if self.record.count(GuestState::Moving) >= MOVES {
                return;
            }
            if !self.able.contains(&index) || !self.may_start(index) {
                continue;
            }
            let accept_pause = self.record.order.accept_pause;
            let convoy = self.convoy.clone();
            let guest = &mut self.record.guests[index];
            guest.tries += 1;
            // What is moved has the link before what is only protected.
            site.limits.favour(guest.id, true);
            let (site, name) = (site.clone(), guest.guest.clone());
            let work = async move {
                let moved = site.move_among(&name, accept_pause, Some(convoy)).await;
                Ended::Moved(index, moved.map(Box::new))
            };
            let work = self.works.spawn(work);
            self.at_work.insert(work.id(), index);
            self.settle(index, GuestState::Moving, String::new());
        }
    }

    /// Does everything run at the peer that it starts after? What never will leaves it here.
    fn may_start(&mut self, index: usize) -> bool {
        for after in self.record.guests[index].after.clone() {
            let before = self.record.guests.iter().find(|guest| guest.guest == after);
            match before.map(|guest| guest.state) {
                None | Some(GuestState::Moved) => {}
                Some(GuestState::Failed | GuestState::Left) => {
                    let why = format!("it starts after '{after}', which was not moved");
                    self.settle(index, GuestState::Left, why);
                    return false;
                }
                Some(_) => return false,
            }
        }
        true
    }
}
