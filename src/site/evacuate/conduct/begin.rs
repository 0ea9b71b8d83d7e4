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
            self.at_work.insert(work.id(), vec![index]);
            self.settle(index, GuestState::Copying, String::new());
        }
    }

    /// Moves what is protected and waits for nobody, a few at a time.
    pub(super) fn move_next(&mut self, site: &Arc<Site>) {
        for index in self.next_of(GuestState::Ready) {
            if self.record.count(GuestState::Moving) >= MOVES {
                return;
            }
            // Begun with another of its group.
            if self.busy(index) || !self.able.contains(&index) {
                continue;
            }
            if let Some((group, guests)) = self.company(site, index) {
                self.move_group(site, group, guests);
                continue;
            }
            if !self.may_start(index) {
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
            self.at_work.insert(work.id(), vec![index]);
            self.settle(index, GuestState::Moving, String::new());
        }
    }

    /// The group that a guest goes with as one, and all who do; `None` where it
    /// goes by itself: it has no company here, or has lost it by now.
    fn company(&self, site: &Site, index: usize) -> Option<(String, Vec<usize>)> {
        let group = site.group_of(self.record.guests[index].id)?;
        if !group.goes_as_one(&self.record.order.to) {
            return None;
        }
        let place = |guest| self.record.guests.iter().position(|g| g.id == guest);
        let members = group.members.values();
        let guests: Vec<usize> = members.map(|m| place(m.guest)).collect::<Option<_>>()?;
        let over = |index: &usize| self.record.guests[*index].state.is_over();
        (!guests.iter().any(over)).then_some((group.name, guests))
    }

    /// Moves a whole group as one, once all of it can be.
    fn move_group(&mut self, site: &Arc<Site>, group: String, guests: Vec<usize>) {
        let now = Instant::now();
        let can = |index: &usize| {
            self.record.guests[*index].state == GuestState::Ready
                && self.able.contains(index)
                && !self.busy(*index)
                && self.retry_at.get(index).is_none_or(|at| *at <= now)
        };
        if !guests.iter().all(can) {
            return;
        }
        for index in &guests {
            let guest = &mut self.record.guests[*index];
            guest.tries += 1;
            site.limits.favour(guest.id, true);
        }
        let accept_pause = self.record.order.accept_pause;
        let convoy = Some(self.convoy.clone());
        let (site, all) = (site.clone(), guests.clone());
        let work = async move {
            let moved = site.move_group_among(&group, accept_pause, convoy).await;
            Ended::Together(all, moved.map(Box::new))
        };
        let work = self.works.spawn(work);
        self.at_work.insert(work.id(), guests.clone());
        for index in guests {
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
