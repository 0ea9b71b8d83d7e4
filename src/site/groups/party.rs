//! The guests of a group that are moved together, seen from their source: what
//! their drivers know of each other until it is decided where they run.
//!
//! Each driver brings its guest near to its last cut, as for a move by itself,
//! but counts what all of them have left: they share the link. When all are
//! near, they are cut at one instant and held, and each seals its last point.
//! Whatever goes wrong until then, for whomever, gives the move up for all. Only
//! when the last point of the last guest is sealed is the other site asked to
//! take all of them; from there on each goes by that site's word alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_policies::decide::MoveFacts;
use farhaven_storage_sync::unit::GuestId;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{GroupCut, GroupRecord};
use crate::replicate::message::{ActivationTimes, Handed};
use crate::site::commands::Convoy;
use crate::site::converge::HAND_OVER;

/// Where a guest runs, as far as it is known.
#[derive(Debug, Clone)]
pub(in crate::site) enum Verdict {
    /// At the other site, or it will: its term is that site's.
    There {
        /// Does it run by now? Else that site says why not.
        runs: bool,
        /// What running it took there, and what that site has to say of it.
        times: ActivationTimes,
        note: String,
        /// When the other site was asked.
        asked: Instant,
    },
    /// Here: the other site was never asked.
    Here(String),
    /// The other site was asked, and its word is not known.
    Unknown(String),
}

/// The move of a group.
#[derive(Debug)]
pub(in crate::site) struct Party {
    /// The instant of all of them.
    pub(in crate::site) cut: Arc<GroupCut>,
    /// Each guest, and how many waves start before its own.
    guests: BTreeMap<GuestId, usize>,
    state: watch::Sender<State>,
    /// The moves that this one is among.
    convoy: Option<Convoy>,
}

#[derive(Debug, Default)]
struct State {
    /// What each has left, and how fast it changes.
    left: BTreeMap<GuestId, (u64, u64)>,
    near: BTreeSet<GuestId>,
    /// The turn for the last cut among other moves.
    turn: Option<OwnedSemaphorePermit>,
    sealed: BTreeMap<GuestId, Handed>,
    given_up: Option<String>,
    /// The other site is asked: nobody gives up any more.
    asked: bool,
    verdicts: BTreeMap<GuestId, Verdict>,
}

impl Party {
    pub(in crate::site) fn new(group: &GroupRecord, convoy: Option<Convoy>) -> Arc<Self> {
        let mut guests: BTreeMap<GuestId, usize> =
            group.members.values().map(|m| (m.guest, 0)).collect();
        for (wave, members) in group.waves().into_iter().enumerate() {
            guests.extend(members.into_iter().map(|(_, m)| (m.guest, wave)));
        }
        Arc::new(Self {
            cut: Arc::new(GroupCut::held(group)),
            guests,
            state: watch::Sender::default(),
            convoy,
        })
    }

    /// Nothing comes of it: all of them run on here. Too late once the other
    /// site was asked.
    pub(in crate::site) fn give_up(&self, why: &str) {
        let given_up = self.state.send_if_modified(|state| {
            if state.asked || state.given_up.is_some() {
                return false;
            }
            state.given_up = Some(why.to_owned());
            true
        });
        if given_up {
            self.cut.gate.give_up(why);
        }
    }

    /// Waits until all have sealed their last points; from then on nobody gives
    /// up. What is to be handed over, or why nothing is.
    pub(in crate::site) async fn all_sealed(&self) -> Result<Vec<Handed>, String> {
        let mut watched = self.state.subscribe();
        let all = self.guests.len();
        let settled = |state: &State| state.given_up.is_some() || state.sealed.len() == all;
        let _ = watched.wait_for(settled).await;
        let mut decided = Err("it was given up".to_owned());
        self.state.send_if_modified(|state| {
            decided = match &state.given_up {
                Some(why) => Err(why.clone()),
                None => {
                    state.asked = true;
                    Ok(state.sealed.values().copied().collect())
                }
            };
            decided.is_ok()
        });
        decided
    }

    /// What became of a guest, for its driver.
    pub(in crate::site) fn tell(&self, guest: GuestId, verdict: Verdict) {
        self.state.send_modify(|state| {
            state.verdicts.entry(guest).or_insert(verdict);
        });
    }

    /// Whoever decides is gone: nobody waits for a word that never comes.
    pub(in crate::site) fn end(&self, why: &str) {
        self.give_up(why);
        for guest in self.guests.keys() {
            self.tell(*guest, Verdict::Unknown(why.to_owned()));
        }
        // Others of the convoy need not wait for what is in doubt here.
        self.state.send_modify(|state| drop(state.turn.take()));
    }
}

/// A guest's place in it. Dropped before its last point is sealed, it gives up
/// for all.
#[derive(Debug, Clone)]
pub(in crate::site) struct Place {
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    party: Arc<Party>,
    guest: GuestId,
}

impl Drop for Held {
    fn drop(&mut self) {
        let sealed = self.party.state.borrow().sealed.contains_key(&self.guest);
        if !sealed {
            self.party.give_up("one of its guests is not ready for it");
        }
    }
}

/// How much later a wave starts than the first, where no health check is waited for.
pub(super) fn start_of(wave: usize) -> Duration {
    HAND_OVER.saturating_mul(u32::try_from(wave).unwrap_or(u32::MAX))
}

impl Place {
    pub(in crate::site) fn of(party: &Arc<Party>, guest: GuestId) -> Self {
        Self {
            held: Arc::new(Held {
                party: party.clone(),
                guest,
            }),
        }
    }

    pub(in crate::site) fn party(&self) -> &Arc<Party> {
        &self.held.party
    }

    /// Why nothing comes of the move any more.
    pub(in crate::site) fn given_up(&self) -> Option<String> {
        let party = self.party();
        if party.convoy.as_ref().is_some_and(Convoy::is_given_up) {
            party.give_up("the evacuation was aborted");
        }
        party.state.borrow().given_up.clone()
    }

    /// What this guest's last cut would find, with what all the others have left,
    /// and when it starts after those of the waves before.
    pub(in crate::site) fn with_others(&self, own: MoveFacts) -> MoveFacts {
        let guest = self.held.guest;
        let mut facts = own;
        let wave = self.party().guests.get(&guest).copied().unwrap_or_default();
        facts.fixed += start_of(wave);
        self.party().state.send_modify(|state| {
            let figures = (own.remaining_bytes, own.dirty_bytes_per_second);
            state.left.insert(guest, figures);
            let others = state.left.iter().filter(|(other, _)| **other != guest);
            for (_, (left, dirty)) in others {
                facts.remaining_bytes = facts.remaining_bytes.saturating_add(*left);
                facts.dirty_bytes_per_second = facts.dirty_bytes_per_second.saturating_add(*dirty);
            }
        });
        facts
    }

    /// This guest is near to its last cut. True when all are, and it is their turn.
    pub(in crate::site) fn is_turn(&self) -> bool {
        let party = self.party();
        let mut turn = false;
        party.state.send_modify(|state| {
            state.near.insert(self.held.guest);
            if state.near.len() < party.guests.len() {
                return;
            }
            if let Some(convoy) = &party.convoy
                && state.turn.is_none()
            {
                state.turn = convoy.turn();
            }
            turn = party.convoy.is_none() || state.turn.is_some();
        });
        turn
    }

    /// The guest is held, and its last point is sealed.
    pub(in crate::site) fn sealed(&self, handed: Handed) {
        self.party().state.send_modify(|state| {
            state.sealed.insert(self.held.guest, handed);
        });
    }

    /// Waits for what becomes of it.
    pub(in crate::site) async fn verdict(&self) -> Verdict {
        let guest = self.held.guest;
        let mut watched = self.party().state.subscribe();
        let told = |state: &State| {
            state.verdicts.contains_key(&guest) || (!state.asked && state.given_up.is_some())
        };
        let state = watched.wait_for(told).await;
        let gone = || Verdict::Unknown("the daemon is shutting down".to_owned());
        let Ok(state) = state else { return gone() };
        match (&state.given_up, state.verdicts.get(&guest)) {
            (Some(why), _) if !state.asked => Verdict::Here(why.clone()),
            (_, Some(verdict)) => verdict.clone(),
            _ => gone(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::GroupMember;
    use super::*;
    use crate::activate::fence::Term;

    fn record() -> GroupRecord {
        let member = |guest: &GuestId| GroupMember {
            guest: *guest,
            terms: Default::default(),
        };
        let guests = [GuestId::random(), GuestId::random()];
        GroupRecord {
            id: GuestId::random(),
            name: "bank".to_owned(),
            from: None,
            peer: "west".to_owned(),
            key: None,
            policy: String::new(),
            owed: Default::default(),
            members: guests.iter().map(|g| (g.to_string(), member(g))).collect(),
        }
    }

    fn party() -> (Arc<Party>, Place, Place) {
        let group = record();
        let party = Party::new(&group, None);
        let mut places = group.members.values().map(|m| Place::of(&party, m.guest));
        let (first, second) = (places.next().unwrap(), places.next().unwrap());
        drop(places);
        (party, first, second)
    }

    fn facts(bytes: u64) -> MoveFacts {
        MoveFacts {
            rounds: 1,
            remaining_bytes: bytes,
            remaining_before: None,
            dirty_bytes_per_second: 10,
            link_bytes_per_second: 1000,
            fixed: Duration::ZERO,
            overhead: Duration::ZERO,
            throttle: 0,
        }
    }

    fn handed(place: &Place) -> Handed {
        let guest = place.held.guest;
        Handed {
            guest,
            point: 7,
            term: Term {
                group: guest,
                number: 2,
                owner: farhaven_wan::SiteKey::from_bytes([1; 32]),
            },
        }
    }

    #[tokio::test]
    async fn one_that_gives_up_before_all_are_sealed_gives_up_for_all() {
        let (party, first, second) = party();
        assert!(!first.is_turn() && second.is_turn() && first.is_turn());
        first.sealed(handed(&first));
        drop(second);
        let why = party.all_sealed().await.unwrap_err();
        assert!(why.contains("not ready"), "{why}");
        assert!(matches!(first.verdict().await, Verdict::Here(_)));
        assert!(first.given_up().is_some());
    }

    #[tokio::test]
    async fn once_the_other_site_is_asked_only_its_word_counts() {
        let (party, first, second) = party();
        for place in [&first, &second] {
            place.sealed(handed(place));
        }
        assert_eq!(party.all_sealed().await.unwrap().len(), 2);
        party.give_up("too late");
        assert_eq!(first.given_up(), None);
        drop(second);
        party.end("the link broke");
        assert!(matches!(first.verdict().await, Verdict::Unknown(_)));
    }

    #[test]
    fn what_is_left_is_that_of_all() {
        let (_party, first, second) = party();
        assert_eq!(first.with_others(facts(100)).remaining_bytes, 100);
        let both = second.with_others(facts(50));
        assert_eq!(
            (both.remaining_bytes, both.dirty_bytes_per_second),
            (150, 20)
        );
        assert_eq!(first.with_others(facts(30)).remaining_bytes, 80);
    }

    #[test]
    fn a_later_wave_starts_later() {
        let mut group = record();
        // Those of one wave start together.
        let together = Party::new(&group, None);
        assert!(together.guests.values().all(|wave| *wave == 0));
        let names: Vec<_> = group.members.keys().cloned().collect();
        let web = group.members.get_mut(&names[1]).unwrap();
        web.terms.after = vec![names[0].clone()];
        let (web, db) = (web.guest, group.members[&names[0]].guest);
        let party = Party::new(&group, None);
        let fixed = |guest| Place::of(&party, guest).with_others(facts(0)).fixed;
        assert_eq!(fixed(db), Duration::ZERO);
        assert_eq!(fixed(web), HAND_OVER);
    }
}
