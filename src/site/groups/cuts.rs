//! When the guests of a group are cut: together, as soon as each of them wants
//! to be.
//!
//! A driver takes a seat once its guest has sealed a point. Cuts of the group
//! begin when all of its guests are seated: first copies take their own time,
//! and a guest that is lost does not keep the others from being protected one
//! by one. They are no part of a whole group point then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use farhaven_policies::files::Mode;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::GroupRecord;
use crate::guest::gate::{Patience, Rendezvous, SKEW};
use crate::site::handover::shutdown::SHUT_DOWN;
use crate::site::unix_ns;

/// What a point of a group cut tells of it. A group point is whole where the
/// points of all these guests with this number are: it is read from the points,
/// never written down by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointGroup {
    /// Which group.
    pub id: GuestId,
    /// Its name at the source.
    pub name: String,
    /// The cut's number: milliseconds since 1970, or more where cuts were closer.
    pub cut: u64,
    /// From the first guest's stop to the last one's, nanoseconds.
    pub skew_ns: u64,
    /// All guests of the group.
    pub members: BTreeSet<GuestId>,
}

/// One cut of a group.
#[derive(Debug)]
pub(in crate::site) struct GroupCut {
    pub(in crate::site) gate: Rendezvous,
    cut: u64,
    group: GroupRecord,
}

/// Before the last cut of a move: guests that are in a round come when it is over.
const LAST: Patience = Patience {
    ready: Duration::from_secs(60),
    freeze: Duration::ZERO,
    stopped: Duration::from_secs(5),
    skew: SKEW,
};

/// What agents may take to freeze filesystems, whether the policy or a runbook asks.
fn freeze(group: &GroupRecord) -> Duration {
    group.owed.quiesce_timeout.duration()
}

impl GroupCut {
    /// The last one before a move, in which all of them are held.
    pub(super) fn held(group: &GroupRecord) -> Self {
        Self {
            gate: Rendezvous::new(
                group.members.len(),
                Patience {
                    ready: match group.owed.mode {
                        Mode::Memory => LAST.ready,
                        // Each shuts down by itself first.
                        Mode::DiskOnly => LAST.ready + SHUT_DOWN,
                    },
                    freeze: freeze(group),
                    ..LAST
                },
            ),
            cut: unix_ns(SystemTime::now()) / 1_000_000,
            group: group.clone(),
        }
    }

    /// Given up once a guest of it is to stop for something else, which waits for nobody;
    /// as long as what this returns is kept.
    pub(in crate::site) fn left_at(
        self: &Arc<Self>,
        mut stop: watch::Receiver<bool>,
    ) -> JoinSet<()> {
        let (cut, mut leaves) = (self.clone(), JoinSet::new());
        leaves.spawn(async move {
            if stop.wait_for(|stop| *stop).await.is_ok() {
                cut.gate
                    .give_up("something else came first for one of its guests");
            }
        });
        leaves
    }

    /// What its points tell, once all were stopped.
    pub(in crate::site) fn mark(&self) -> Option<PointGroup> {
        let skew = self.gate.skew()?;
        Some(PointGroup {
            id: self.group.id,
            name: self.group.name.clone(),
            cut: self.cut,
            skew_ns: u64::try_from(skew.as_nanos()).unwrap_or(u64::MAX),
            members: self.group.members.values().map(|m| m.guest).collect(),
        })
    }
}

/// The groups whose guests are cut together.
#[derive(Default)]
pub(in crate::site) struct Cuts {
    tables: Mutex<BTreeMap<GuestId, Arc<Table>>>,
}

#[derive(Default)]
struct Table {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seated: BTreeSet<GuestId>,
    waiting: BTreeMap<GuestId, oneshot::Sender<Option<Arc<GroupCut>>>>,
    last: u64,
    /// Of the newest cuts: which guests sealed them.
    sealed: BTreeMap<u64, BTreeSet<GuestId>>,
    /// The newest cut that all of them sealed.
    whole: Option<u64>,
}

/// Cuts whose seals are waited for.
const CUTS: usize = 64;

impl Cuts {
    /// A guest takes part in its group's cuts from now on, until the seat is dropped.
    pub(in crate::site) fn seat(&self, group: &GroupRecord, guest: GuestId) -> Seat {
        let table = {
            let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
            tables.entry(group.id).or_default().clone()
        };
        table.lock().seated.insert(guest);
        Seat {
            table,
            group: group.clone(),
            guest,
        }
    }

    /// When the newest cut was that all guests of a group sealed since the
    /// daemon started: its number, which is milliseconds since 1970.
    pub(in crate::site) fn newest_whole(&self, group: GuestId) -> Option<u64> {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let table = tables.get(&group)?;
        table.lock().whole
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest's place in the cuts of its group.
pub(in crate::site) struct Seat {
    table: Arc<Table>,
    group: GroupRecord,
    guest: GuestId,
}

impl Seat {
    /// Is it a place in this very group?
    pub(in crate::site) fn is_of(&self, group: &GroupRecord) -> bool {
        self.group == *group
    }

    /// The guest wants to be cut. Answered when all of its group want to, or
    /// with `None` when it is to be cut by itself.
    pub(in crate::site) fn wants_cut(&self) -> oneshot::Receiver<Option<Arc<GroupCut>>> {
        let (reply, answer) = oneshot::channel();
        let mut state = self.table.lock();
        state.waiting.insert(self.guest, reply);
        state.begin(&self.group);
        answer
    }

    /// It does not wait any longer.
    pub(in crate::site) fn cut_alone(&self) {
        self.table.lock().waiting.remove(&self.guest);
    }

    /// Its point of that cut is sealed.
    pub(in crate::site) fn sealed(&self, mark: &PointGroup) {
        let mut state = self.table.lock();
        let by = state.sealed.entry(mark.cut).or_default();
        by.insert(self.guest);
        if mark.members.is_subset(by) {
            state.whole = state.whole.max(Some(mark.cut));
            state.sealed = state.sealed.split_off(&(mark.cut + 1));
        }
        while state.sealed.len() > CUTS {
            state.sealed.pop_first();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.table.lock();
        state.seated.remove(&self.guest);
        state.waiting.remove(&self.guest);
        // Those that wait for it wait in vain.
        for (_, reply) in std::mem::take(&mut state.waiting) {
            let _ = reply.send(None);
        }
    }
}

impl State {
    /// Begins a cut when all are there and want one.
    fn begin(&mut self, group: &GroupRecord) {
        let all = |of: &dyn Fn(&GuestId) -> bool| group.members.values().all(|m| of(&m.guest));
        if !all(&|guest| self.seated.contains(guest)) {
            for (_, reply) in std::mem::take(&mut self.waiting) {
                let _ = reply.send(None);
            }
            return;
        }
        if !all(&|guest| self.waiting.contains_key(guest)) {
            return;
        }
        let now = unix_ns(SystemTime::now()) / 1_000_000;
        self.last = now.max(self.last + 1);
        let cut = Arc::new(GroupCut {
            gate: Rendezvous::new(
                self.waiting.len(),
                Patience {
                    freeze: freeze(group),
                    ..Patience::default()
                },
            ),
            cut: self.last,
            group: group.clone(),
        });
        for (_, reply) in std::mem::take(&mut self.waiting) {
            if reply.send(Some(cut.clone())).is_err() {
                cut.gate.give_up("a guest of it waits no more");
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::GroupMember;
    use super::*;
    use crate::guest::gate::CutGate;

    fn group(guests: &[GuestId]) -> GroupRecord {
        let member = |guest: &GuestId| GroupMember {
            guest: *guest,
            terms: Default::default(),
        };
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

    #[test]
    fn a_cut_begins_when_all_want_one_and_none_waits_for_who_has_left() {
        let (a, b) = (GuestId::random(), GuestId::random());
        let (cuts, group) = (Cuts::default(), group(&[a, b]));
        let of_a = cuts.seat(&group, a);
        // The other one is not there yet.
        assert!(of_a.wants_cut().blocking_recv().unwrap().is_none());
        let of_b = cuts.seat(&group, b);
        let first = of_a.wants_cut();
        let second = of_b.wants_cut();
        let (first, second) = (
            first.blocking_recv().unwrap().unwrap(),
            second.blocking_recv().unwrap().unwrap(),
        );
        assert!(Arc::ptr_eq(&first, &second) && first.mark().is_none());
        let waits = of_a.wants_cut();
        drop(of_b);
        assert!(waits.blocking_recv().unwrap().is_none());
    }

    #[test]
    fn who_is_to_stop_for_something_else_waits_for_nobody_at_the_gate() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let cut = Arc::new(GroupCut::held(&group(&[
                GuestId::random(),
                GuestId::random(),
            ])));
            let (stop, leaves) = (watch::Sender::new(false), watch::Sender::new(false));
            let _others = cut.left_at(stop.subscribe());
            drop(cut.left_at(leaves.subscribe()));
            // The one that has left already stops for nobody.
            leaves.send_replace(true);
            let gate = cut.clone();
            let waits = tokio::task::spawn_blocking(move || gate.gate.gather());
            tokio::task::yield_now().await;
            assert!(!waits.is_finished());
            stop.send_replace(true);
            let why = waits.await.unwrap().unwrap_err();
            assert!(why.to_string().contains("came first"), "{why}");
        });
    }

    #[test]
    fn a_cut_is_whole_when_all_have_sealed_it() {
        let (a, b) = (GuestId::random(), GuestId::random());
        let (cuts, group) = (Cuts::default(), group(&[a, b]));
        let (of_a, of_b) = (cuts.seat(&group, a), cuts.seat(&group, b));
        let mark = |cut| PointGroup {
            id: group.id,
            name: group.name.clone(),
            cut,
            skew_ns: 0,
            members: [a, b].into(),
        };
        of_a.sealed(&mark(1));
        of_a.sealed(&mark(2));
        assert_eq!(cuts.newest_whole(group.id), None);
        of_b.sealed(&mark(2));
        assert_eq!(cuts.newest_whole(group.id), Some(2));
    }
}
