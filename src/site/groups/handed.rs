//! A group that is handed over as one, at the site that takes it: all of its
//! guests are that site's from one instant on, or none of them is.
//!
//! In this order: what is handed over is written down; then the terms of all
//! are in force, by one file; only then does any of the guests start. A daemon
//! that dies before the terms are in force has taken nobody; one that dies after
//! that finds what was written down, and starts those that do not run yet. A
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
use crate::site::events::EventKind;
use crate::site::files;
use crate::site::health;
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::remote::Remote;
use crate::site::standby::{Standby, step};

/// Longest file of a hand-over that is read: far above what a group needs.
const LONGEST_FILE: u64 = 1 << 20;

/// Guests whose terms were taken with their group's, until they run.
#[derive(Default)]
pub(super) struct HandedOver {
    waiting: Mutex<BTreeMap<GuestId, Handed>>,
}

/// What is written down of a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HandOver {
    group: GuestId,
    members: Vec<Handed>,
}

impl Site {
    /// The term under which a guest was handed over with its group, and is about
    /// to run here.
    pub(in crate::site) fn handed_over(&self, guest: GuestId) -> Option<Term> {
        let waiting = self.policies.handed.waiting.lock();
        let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        let term = waiting.get(&guest)?.term;
        (self.fence.current(guest) == Some(term)).then_some(term)
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
        let from = Some(remote.record.site.clone());
        let known = self.groups().into_iter();
        let known = known.filter(|known| known.from == from);
        let Some(known) = known.into_iter().find(|known| known.id == group) else {
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
            if standby.newest() != handed.point {
                let what = format!("point {} as its newest", handed.point);
                return Err(ActivateError::NoPoint(standby.name(), what));
            }
            held.push(state);
        }
        let written = HandOver {
            group,
            members: standbys.iter().map(|(handed, _)| *handed).collect(),
        };
        let site = self.clone();
        step(move || site.write_and_adopt(&written)).await?
    }

    fn write_and_adopt(&self, handed: &HandOver) -> Result<(), ActivateError> {
        let path = self.hand_over_file(handed.group);
        let written = serde_json::to_vec(handed)
            .map_err(std::io::Error::other)
            .and_then(|text| {
                files::private_directory(&self.hand_overs())?;
                files::replace(&path, &text)
            });
        written.map_err(|source| ActivateError::Io {
            what: format!("writing {}", path.display()),
            source,
        })?;
        // Before a question can find the terms in force.
        self.remember_handed(&handed.members);
        let terms: Vec<Term> = handed.members.iter().map(|m| m.term).collect();
        let adopted = self.fence.adopt_all(&terms);
        if adopted.is_err() {
            self.forget_handed(handed.group, &handed.members);
        }
        Ok(adopted?)
    }

    fn remember_handed(&self, members: &[Handed]) {
        let waiting = self.policies.handed.waiting.lock();
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        waiting.extend(members.iter().map(|handed| (handed.guest, *handed)));
    }

    /// These run by now, or nobody was taken.
    fn forget_handed(&self, group: GuestId, members: &[Handed]) {
        let waiting = self.policies.handed.waiting.lock();
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        for handed in members {
            waiting.remove(&handed.guest);
        }
        // Under the lock: what is written down is what waits.
        let path = self.hand_over_file(group);
        let Some(mut written) = read(&path) else {
            return;
        };
        written.members.retain(|handed| !members.contains(handed));
        let kept = match written.members.is_empty() {
            true => std::fs::remove_file(&path),
            false => serde_json::to_vec(&written)
                .map_err(std::io::Error::other)
                .and_then(|text| files::replace(&path, &text)),
        };
        if let Err(error) = kept {
            tracing::error!(path = %path.display(), %error, "what was handed over cannot be written down");
        }
    }

    /// Starts those that do not run yet, in waves.
    async fn start_handed(
        self: &Arc<Self>,
        group: &GroupRecord,
        standbys: Vec<(Handed, Arc<Standby>)>,
        asked: Instant,
    ) -> Vec<Taken> {
        let here = self.members_here(group);
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
            let (site, id) = (self.clone(), group.id);
            let start = Box::pin(async move {
                let name = standby.name();
                let ran = standby
                    .run_under(handed.point, handed.term, asked, Duration::ZERO)
                    .await;
                let active = ran.map_err(|error| {
                    format!("'{name}' does not run: {error}. Its term is this site's and its last point is here, so nothing is lost: there, farhaven failover {name}")
                })?;
                site.forget_handed(id, &[handed]);
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
        started
            .into_iter()
            .map(|started| {
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
                    times,
                    note: note.unwrap_or_default(),
                }
            })
            .collect()
    }

    /// At start: who was handed over to a daemon that died before all of them
    /// ran is started now.
    pub(in crate::site) fn finish_hand_overs(self: &Arc<Self>) {
        let files = std::fs::read_dir(self.hand_overs());
        for file in files.into_iter().flatten().flatten() {
            let path = file.path();
            if path.extension().is_none_or(|ending| ending != "json") {
                continue;
            }
            let Some(written) = read(&path) else { continue };
            let (ours, void): (Vec<Handed>, Vec<Handed>) = written
                .members
                .into_iter()
                .partition(|handed| self.fence.current(handed.guest) == Some(handed.term));
            self.remember_handed(&ours);
            // Nobody was taken then, or somebody decided otherwise since.
            self.forget_handed(written.group, &void);
            let site = self.clone();
            tokio::spawn(async move {
                if let Err(error) = site.start_left(written.group, ours).await {
                    tracing::error!(%error, "who was handed over with a group is not started");
                }
            });
        }
    }

    async fn start_left(
        self: &Arc<Self>,
        group: GuestId,
        handed: Vec<Handed>,
    ) -> Result<(), OperateError> {
        let mut left = Vec::new();
        for handed in handed {
            let standby = {
                let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
                standbys.get(&handed.guest).cloned()
            };
            let Some(standby) = standby else { continue };
            // It ran when that was not written down yet.
            let known = self.activation(handed.guest).map_err(failed)?;
            match known.is_some_and(|active| active.term == handed.term) {
                true => self.forget_handed(group, &[handed]),
                false => left.push((handed, standby)),
            }
        }
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

    fn hand_overs(&self) -> PathBuf {
        self.config.site.state_dir.join("hand-overs")
    }

    fn hand_over_file(&self, group: GuestId) -> PathBuf {
        self.hand_overs().join(format!("{group}.json"))
    }
}

fn read(path: &std::path::Path) -> Option<HandOver> {
    let size = path.metadata().ok()?.len();
    let text = (size <= LONGEST_FILE)
        .then(|| std::fs::read(path))
        .transpose();
    let text = text.map_err(|e| e.to_string()).and_then(|text| match text {
        Some(text) => serde_json::from_slice(&text).map_err(|e| e.to_string()),
        None => Err(format!("it has {size} bytes")),
    });
    text.inspect_err(|error| {
        tracing::error!(path = %path.display(), error, "what was handed over cannot be read");
    })
    .ok()
}
