//! A group that is handed over as one, at the site that takes it: all of its
//! guests are that site's from one instant on, or none of them is.
//!
//! In this order: what is handed over is written down; then the terms of all
//! are in force, by one file; only then does any of the guests start. A daemon
//! that dies before the terms are in force has taken nobody; one that dies after
//! that finds what was written down, and starts all that have not run by it, and
//! those that ended with it before all were known to run: their group is here. A
//! source that asks meanwhile hears that they run here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::waves::{Start, Waves};
use super::{GroupRecord, MAX_MEMBERS};
use crate::activate::fence::Term;
use crate::replicate::message::{ActivationTimes, GroupMessage, Handed, Message, Refusal, Taken};
use crate::site::Site;
use crate::site::answer::{refused, unknown_guest};
use crate::site::checked;
use crate::site::events::EventKind;
use crate::site::health;
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::remote::Remote;
use crate::site::standby::{Standby, step};

/// Longest file of a hand-over that is read: far above what a group needs.
const LONGEST_FILE: u64 = 1 << 20;

/// Where hand-overs are written down, below a site's directory.
pub(in crate::site) const HAND_OVERS: &str = "hand-overs";

/// The last hand-over of each group.
#[derive(Default)]
pub(super) struct HandedOver {
    known: Mutex<BTreeMap<GuestId, HandOver>>,
}

/// What is written down of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::site) struct HandOver {
    group: GuestId,
    members: Vec<Handed>,
    /// All of them ran: nothing of it is left to do.
    #[serde(default)]
    ran: bool,
    /// Those that ran, where others did not: they are not started from it again.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    started: BTreeSet<GuestId>,
}

impl HandOver {
    /// These ran. What was handed over anew meanwhile, under newer terms, is not meant.
    fn have_run(&mut self, handed: &[Handed]) {
        let of_it = handed.iter().filter(|m| self.members.contains(m));
        self.started.extend(of_it.map(|m| m.guest));
        self.ran = self.members.iter().all(|m| self.started.contains(&m.guest));
    }
}

impl Site {
    /// The term under which a guest was handed over with its group, when its
    /// source must hear that it is here: it is about to run, or it ended and
    /// others of its group run here.
    pub(in crate::site) fn handed_over(&self, guest: GuestId) -> Option<Term> {
        let known = self.policies.handed.known.lock();
        let known = known.unwrap_or_else(PoisonError::into_inner);
        let of = |m: &&Handed| m.guest == guest && self.is_in_force(m);
        let (hand_over, term) = known.values().find_map(|hand_over| {
            let handed = hand_over.members.iter().find(of)?;
            Some((hand_over, handed.term))
        })?;
        let is_here = !hand_over.ran || hand_over.members.iter().any(|m| self.runs_under(m));
        is_here.then_some(term)
    }

    fn is_in_force(&self, handed: &Handed) -> bool {
        self.fence.current(handed.guest) == Some(handed.term)
    }

    /// Does it run here as it was handed over?
    fn runs_under(&self, handed: &Handed) -> bool {
        let known = self.activation(handed.guest);
        self.is_in_force(handed)
            && known.is_ok_and(|known| known.is_some_and(|active| active.term == handed.term))
    }

    /// Answers a source that hands a whole group over.
    pub(super) async fn take_over_group(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        group: GuestId,
        members: Vec<Handed>,
    ) -> Message {
        let asked = Instant::now();
        let guests: BTreeSet<GuestId> = members.iter().map(|m| m.guest).collect();
        let given = |m: &Handed| m.term.group == m.guest && m.term.owner == self.key();
        if members.is_empty()
            || members.len() > MAX_MEMBERS
            || guests.len() < members.len()
            || !members.iter().all(given)
        {
            remote.breach("it hands over what is not its own, or no group");
            return refused(
                Refusal::Fenced,
                "that is no hand-over of a group to this site",
            );
        }
        let mut known = self.groups().into_iter();
        let its = |known: &GroupRecord| known.id == group && known.is_of(&remote.record);
        let Some(known) = known.find(its) else {
            return refused(
                Refusal::Unable,
                "this site does not know that group; it is told within seconds, try again",
            );
        };
        let mut standbys = Vec::new();
        for handed in members {
            match self.standby_of(remote, handed.guest) {
                Some(standby) => standbys.push((handed, standby)),
                None => return unknown_guest(),
            }
        }
        standbys.sort_by_key(|(handed, _)| handed.guest);
        if let Err(error) = self.take_terms_of_group(group, &standbys).await {
            return refused(Refusal::Unable, error);
        }
        tracing::warn!(
            group = known.name,
            guests = standbys.len(),
            "a group was handed over: it starts here"
        );
        let members = self.start_handed(&known, standbys, asked).await;
        Message::Group(Box::new(GroupMessage::TakenOver { members }))
    }

    /// All of the terms are this site's, durably, or none is.
    async fn take_terms_of_group(
        self: &Arc<Self>,
        group: GuestId,
        standbys: &[(Handed, Arc<Standby>)],
    ) -> Result<(), ActivateError> {
        // In the order of guests, as whoever takes several; held until the terms
        // are: a source that gives up meanwhile is answered afterwards.
        let mut held = Vec::new();
        for (handed, standby) in standbys {
            let state = standby.state.lock().await;
            if let Some(active) = state.runs() {
                return Err(ActivateError::Active(standby.name(), active.term.number));
            }
            // Gone once a question of the source was answered with "given up".
            if state.ready.is_none() {
                return Err(ActivateError::NotPrepared(standby.name()));
            }
            if !self.is_theirs(standby.remote(), standby) {
                return Err(ActivateError::Superseded(standby.name()));
            }
            if standby.newest() != handed.point {
                let what = format!("point {} as its newest", handed.point);
                return Err(ActivateError::NoPoint(standby.name(), what));
            }
            held.push(state);
        }
        let written = HandOver {
            group,
            members: standbys.iter().map(|(handed, _)| *handed).collect(),
            ran: false,
            started: BTreeSet::new(),
        };
        let site = self.clone();
        step(move || site.write_and_adopt(written)).await?
    }

    fn write_and_adopt(&self, handed: HandOver) -> Result<(), ActivateError> {
        self.write_down(&handed)
            .map_err(|source| ActivateError::Io {
                what: format!("writing {}", self.hand_over_file(handed.group).display()),
                source,
            })?;
        let terms: Vec<Term> = handed.members.iter().map(|m| m.term).collect();
        // Before a question can find the terms in force.
        let before = self.remember(handed.clone());
        let adopted = self.fence.adopt_all(&terms);
        if adopted.is_err() {
            // Nobody was taken. Should this fail: without the terms it is void.
            let kept = match &before {
                Some(before) => self.write_down(before),
                None => std::fs::remove_file(self.hand_over_file(handed.group)),
            };
            self.is_kept(handed.group, kept);
            self.forget(handed.group, before);
        }
        Ok(adopted?)
    }

    fn write_down(&self, handed: &HandOver) -> std::io::Result<()> {
        checked::write(&self.hand_over_file(handed.group), handed)
    }

    fn is_kept(&self, group: GuestId, kept: std::io::Result<()>) {
        if let Err(error) = kept {
            let path = self.hand_over_file(group);
            tracing::error!(path = %path.display(), %error, "what was handed over cannot be written down");
        }
    }

    /// What was known of that group's before.
    fn remember(&self, handed: HandOver) -> Option<HandOver> {
        let known = self.policies.handed.known.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.insert(handed.group, handed)
    }

    fn forget(&self, group: GuestId, before: Option<HandOver>) {
        let known = self.policies.handed.known.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.remove(&group);
        known.extend(before.map(|before| (group, before)));
    }

    /// These of a hand-over ran: whoever ends from here on is not started by itself.
    async fn have_run(self: &Arc<Self>, group: GuestId, handed: Vec<Handed>) {
        let ran = {
            let known = self.policies.handed.known.lock();
            let mut known = known.unwrap_or_else(PoisonError::into_inner);
            let Some(hand_over) = known.get_mut(&group) else {
                return;
            };
            hand_over.have_run(&handed);
            hand_over.clone()
        };
        let site = self.clone();
        let written = crate::work::spawn_blocking(move || site.write_down(&ran)).await;
        self.is_kept(
            group,
            written.unwrap_or_else(|e| Err(std::io::Error::other(e))),
        );
    }

    /// Starts those that do not run yet, in waves.
    async fn start_handed(
        self: &Arc<Self>,
        group: &GroupRecord,
        standbys: Vec<(Handed, Arc<Standby>)>,
        asked: Instant,
    ) -> Vec<Taken> {
        let here = self.members_here(group);
        let handed: Vec<Handed> = standbys.iter().map(|(handed, _)| *handed).collect();
        let mut starting: Vec<(_, Start<ActivationTimes>)> = Vec::new();
        for (handed, standby) in standbys {
            let mut of_group = here.iter().filter(|m| m.guest == handed.guest);
            // Told of before it joined the group: it starts with the first.
            let member = of_group
                .next()
                .cloned()
                .unwrap_or_else(|| super::NamedMember {
                    guest: handed.guest,
                    name: standby.name(),
                    group: Some(group.name.clone()),
                    from: Some(standby.from()),
                    wave: 0,
                    terms: Default::default(),
                });
            let site = self.clone();
            let start = Box::pin(async move {
                let name = standby.name();
                let ran = standby
                    .run_under(handed.point, handed.term, asked, Duration::ZERO)
                    .await;
                let active = ran.map_err(|error| {
                    format!("'{name}' does not run: {error}. Its term is this site's and its last point is here, so nothing is lost: there, farhaven failover {name}")
                })?;
                let what = format!(
                    "'{name}' was handed over with its group, under term {}",
                    handed.term.number
                );
                site.note(EventKind::FailedOver, &name, &what);
                Ok(active.times)
            });
            starting.push((member, start));
        }
        starting.sort_by_key(|(member, _)| member.wave);
        let waves = Waves {
            group,
            mode: "move",
            isolated: false,
            unchecked: false,
            go_on: format!(
                "Its term is that site's and its last point is there: there, farhaven failover {}",
                group.name
            ),
        };
        let started = waves.start(self, starting).await;
        let ran = started.iter().filter(|started| started.ran.is_ok());
        let ran: BTreeSet<GuestId> = ran.map(|started| started.member.guest).collect();
        let ran = handed.into_iter().filter(|m| ran.contains(&m.guest));
        self.have_run(group.id, ran.collect()).await;
        started
            .into_iter()
            .map(|started| {
                let runs = started.ran.is_ok();
                let (times, note) = match started.ran {
                    Ok(times) => (
                        times,
                        health::fault(&started.checks)
                            .map(|fault| format!("it runs, and is not healthy: {fault}")),
                    ),
                    Err(why) => (ActivationTimes::default(), Some(why)),
                };
                Taken {
                    guest: started.member.guest,
                    runs,
                    times,
                    note: note.unwrap_or_default(),
                }
            })
            .collect()
    }

    /// At start: who was handed over to a daemon that died before all of them
    /// ran is started now.
    pub(in crate::site) fn finish_hand_overs(self: &Arc<Self>) {
        let files = std::fs::read_dir(self.config.site.state_dir.join(HAND_OVERS));
        for file in files.into_iter().flatten().flatten() {
            let path = file.path();
            if path.extension().is_none_or(|ending| ending != "json") {
                continue;
            }
            let Some(mut written) = read(&path) else {
                continue;
            };
            // Nobody was taken then, or somebody decided otherwise since.
            written.members.retain(|handed| self.is_in_force(handed));
            if written.members.is_empty() {
                self.is_kept(written.group, std::fs::remove_file(&path));
                continue;
            }
            self.remember(written.clone());
            if written.ran {
                continue;
            }
            let site = self.clone();
            tokio::spawn(async move {
                if let Err(error) = site.start_left(written).await {
                    tracing::error!(%error, "who was handed over with a group is not started");
                }
            });
        }
    }

    async fn start_left(self: &Arc<Self>, written: HandOver) -> Result<(), OperateError> {
        let (mut left, mut ran) = (Vec::new(), Vec::new());
        for handed in written.members {
            if written.started.contains(&handed.guest) {
                continue;
            }
            let standby = {
                let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
                standbys.get(&handed.guest).cloned()
            };
            let Some(standby) = standby else {
                // Forgotten since: there is nothing to start.
                ran.push(handed);
                continue;
            };
            // One that was protected the other way round since is this site's own guest:
            // what runs of it here, or ended, is no matter of the hand-over.
            // One that is not found out about yet may have run, too: it is never started
            // from the hand-over's point over what it may have written since.
            if standby.is_turned() || self.runs_under(&handed) {
                ran.push(handed);
            } else {
                left.push((handed, standby));
            }
        }
        let group = written.group;
        self.have_run(group, ran).await;
        if left.is_empty() {
            return Ok(());
        }
        let groups = self.groups();
        let Some(known) = groups.into_iter().find(|known| known.id == group) else {
            return Err(failed("the group is not known any more"));
        };
        for taken in self.start_handed(&known, left, Instant::now()).await {
            if !taken.note.is_empty() {
                tracing::error!(
                    group = known.name,
                    why = taken.note,
                    "handed over, and not well"
                );
            }
        }
        Ok(())
    }

    fn hand_over_file(&self, group: GuestId) -> PathBuf {
        let directory = self.config.site.state_dir.join(HAND_OVERS);
        directory.join(format!("{group}.json"))
    }
}

fn read(path: &std::path::Path) -> Option<HandOver> {
    let read = checked::read(path, LONGEST_FILE);
    read.inspect_err(|error| {
        tracing::error!(path = %path.display(), %error, "what was handed over cannot be read");
    })
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed(guest: u8, term: u64) -> Handed {
        let guest = GuestId([guest; 16]);
        let owner = format!("b{}", "0".repeat(51)).parse().expect("a key");
        Handed {
            guest,
            point: term,
            term: Term {
                group: guest,
                number: term,
                owner,
            },
        }
    }

    #[test]
    fn a_hand_over_that_ends_late_tells_nothing_of_the_next_one() {
        let mut second = HandOver {
            group: GuestId([9; 16]),
            members: vec![handed(1, 4), handed(2, 4)],
            ran: false,
            started: BTreeSet::new(),
        };
        second.have_run(&[handed(1, 2), handed(2, 2)]);
        assert!(!second.ran && second.started.is_empty(), "{second:?}");
        second.have_run(&[handed(1, 4)]);
        assert!(!second.ran && second.started.len() == 1, "{second:?}");
        second.have_run(&[handed(2, 4)]);
        assert!(second.ran && second.started.len() == 2, "{second:?}");
    }
}
