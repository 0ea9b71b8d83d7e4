//! A site -> what the planner needs: who is to go, what each has to copy, what
//! the link carries.
//!
//! What is measured is taken; what is not is estimated from sizes, and told as
//! an estimate. A guest that waits goes on being protected, so what a cut of it
//! would have to copy stays what it is, and what protection takes of the link is
//! not counted on for moves. Guests of a group that go together are one unit of the
//! plan: they are cut at one instant, and stand still for all of their bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use farhaven_policies::evacuate::{Facts, GroupFacts, GuestFacts, LinkFacts};
use farhaven_policies::policy::Policy;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::super::Site;
use super::super::converge::HAND_OVER;
use super::super::groups::GroupMember;
use super::super::limits::LinkView;
use super::super::records::{GuestRecord, Protection};
use super::super::remote::Remote;
use super::super::view::{Phase, SourceView};
use super::record::Order;
use crate::guest::Definition;

/// Bytes on the link from which on their ratio to guest bytes tells something.
const TELLING_BYTES: u64 = 1 << 20;
/// Protection takes its part of the link; moves get this part (in percent) of it at least.
const LEAST_FOR_MOVES: u64 = 25;

/// Images of disks are looked at for so long.
const IMAGES: Duration = Duration::from_secs(2);
/// Whoever looks at images.
static LOOK: Semaphore = Semaphore::const_new(1);

/// A guest of which is known what it takes to move it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestBasis {
    /// Its name.
    pub guest: String,
    /// Where its protection stands.
    pub phase: Phase,
    /// Bytes on the link that a last cut now would need; all of it where nothing was
    /// copied yet.
    pub remaining_bytes: u64,
    /// Bytes a second on the link that its changes need.
    pub dirty_bytes_per_s: u64,
    /// Is that measured? If not, it is estimated from its size.
    pub measured: bool,
}

/// What the link is counted on for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkBasis {
    /// Bytes a second that it carries.
    pub bytes_per_s: u64,
    /// Who says so: `a cut`, `the transport`, `a limit` or `the operator`.
    pub by: String,
    /// Of them: what protection takes of guests that wait.
    pub protection_bytes_per_s: u64,
}

/// The figures that a plan rests on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Basis {
    /// The link.
    pub link: LinkBasis,
    /// Each guest that is to go.
    pub guests: Vec<GuestBasis>,
}

/// A guest that is to go.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) record: GuestRecord,
    /// Guests that start before it.
    pub(super) after: Vec<String>,
}

/// Facts for the planner: of those that are still here.
pub(super) async fn facts(
    site: &Arc<Site>,
    remote: &Remote,
    order: &Order,
    candidates: &[Candidate],
    moved: BTreeSet<String>,
    deadline: Option<Duration>,
) -> (Facts, Basis) {
    let limits = site.link();
    let ratio = ratio(site);
    let views: Vec<SourceView> = candidates
        .iter()
        .map(|candidate| site.source_view(&candidate.record))
        .collect();
    let mut link = link(remote, order, &views, &limits);
    let start = HAND_OVER + remote.peer.status().rtt.unwrap_or_default();
    let disks = disks(candidates, &views).await;
    let companies = companies(site, order, candidates);
    let mut groups: Vec<GroupFacts> = Vec::with_capacity(candidates.len());
    let mut guests = Vec::with_capacity(candidates.len());
    for (candidate, view) in candidates.iter().zip(&views) {
        let there = disks.get(&candidate.record.id).copied();
        let basis = guest(candidate, view, there.unwrap_or_default(), ratio);
        if basis.measured {
            link.protection_bytes_per_s += basis.dirty_bytes_per_s;
        }
        let policy = site.policy_of(candidate.record.id);
        let alone = alone(order, candidate, &basis, &policy, &limits, start);
        let company = companies.get(&candidate.record.id);
        match company.and_then(|name| groups.iter_mut().find(|group| group.name == *name)) {
            Some(group) => join(group, alone),
            None => groups.push(GroupFacts {
                name: company.unwrap_or(&alone.name).clone(),
                ..alone
            }),
        }
        guests.push(basis);
    }
    let least = link.bytes_per_s * LEAST_FOR_MOVES / 100;
    let for_moves = link.bytes_per_s.saturating_sub(link.protection_bytes_per_s);
    let facts = Facts {
        groups,
        moved,
        links: vec![LinkFacts {
            peer: order.to.clone(),
            rate: for_moves.max(least),
        }],
        deadline,
    };
    (facts, Basis { link, guests })
}

/// Guests that go with others of their group as one, and the name of what goes: no
/// guest's that is no part of it.
fn companies(site: &Site, order: &Order, candidates: &[Candidate]) -> BTreeMap<GuestId, String> {
    let names: BTreeMap<GuestId, &str> = candidates
        .iter()
        .map(|candidate| (candidate.record.id, candidate.record.name.as_str()))
        .collect();
    let groups = site.groups();
    let going = groups.iter().filter(|group| {
        let goes = |member: &GroupMember| names.contains_key(&member.guest);
        group.goes_as_one(&order.to) && group.members.values().all(goes)
    });
    let companies = going.flat_map(|group| {
        let taken = names
            .iter()
            .any(|(guest, name)| *name == group.name && !group.has(*guest));
        let name = match taken {
            true => format!("group {}", group.name),
            false => group.name.clone(),
        };
        let members = group.members.values();
        members.map(move |member| (member.guest, name.clone()))
    });
    companies.collect()
}

/// One more guest that is cut with those of a group.
fn join(group: &mut GroupFacts, one: GroupFacts) {
    group.priority = group.priority.max(one.priority);
    // Each keeps within its own.
    group.rate_cap = group
        .rate_cap
        .zip(one.rate_cap)
        .map(|(all, own)| all.saturating_add(own));
    group.guests.extend(one.guests);
}

fn alone(
    order: &Order,
    candidate: &Candidate,
    basis: &GuestBasis,
    policy: &Policy,
    limits: &LinkView,
    start: Duration,
) -> GroupFacts {
    let name = &candidate.record.name;
    let own = limits.guests.iter().find(|guest| guest.name == *name);
    let limit = own.map_or(policy.bandwidth, |own| own.limit);
    GroupFacts {
        name: name.clone(),
        peer: order.to.clone(),
        priority: policy.priority,
        rate_cap: limit.rate().map(|rate| rate.bytes_per_second()),
        share: 100,
        guests: vec![GuestFacts {
            name: name.clone(),
            remaining: basis.remaining_bytes,
            dirty_rate: basis.dirty_bytes_per_s,
            // Cuts go on while it waits: more than one of them finds does not gather.
            working_set: basis.remaining_bytes,
            max_throttle: policy.max_throttle,
            max_blackout: policy.max_blackout.duration(),
            start,
            healthy: Duration::ZERO,
            after: candidate.after.clone(),
        }],
    }
}

/// Was nothing of it copied yet?
fn is_uncopied(view: &SourceView) -> bool {
    view.outlook.is_none() && view.progress.is_none() && view.newest_point == 0
}

/// Bytes of the disks of those of which nothing was copied yet.
async fn disks(candidates: &[Candidate], views: &[SourceView]) -> BTreeMap<GuestId, u64> {
    let both = candidates.iter().zip(views);
    let uncopied: Vec<(GuestId, Definition)> = both
        .filter(|(_, view)| is_uncopied(view))
        .map(|(candidate, _)| (candidate.record.id, candidate.record.definition.clone()))
        .collect();
    let whole = |definition: &Definition| definition.disks().iter().map(|(_, bytes)| bytes).sum();
    let known: BTreeMap<GuestId, u64> = uncopied.iter().map(|(id, of)| (*id, whole(of))).collect();
    // One that hangs keeps its thread: no second one follows it.
    let Ok(alone) = LOOK.try_acquire() else {
        return known;
    };
    let looked = crate::work::spawn_blocking(move || {
        let _alone = alone;
        let there = uncopied.iter().map(|(id, of)| (*id, of.disk_bytes_there()));
        there.collect()
    });
    // Where images cannot be looked at in time, disks count in full.
    match tokio::time::timeout(IMAGES, looked).await {
        Ok(Ok(there)) => there,
        _ => known,
    }
}

/// What a guest has to copy, measured where it can be.
fn guest(candidate: &Candidate, view: &SourceView, disks: u64, ratio: f64) -> GuestBasis {
    let definition = &candidate.record.definition;
    let on_link = |bytes: u64| (bytes as f64 / ratio) as u64;
    let ram = definition.ram_bytes();
    let (remaining, dirty, measured) = match (&view.outlook, view.progress) {
        (Some(outlook), _) => (
            outlook.remaining_bytes,
            outlook.dirty_bytes_per_s,
            !outlook.rough,
        ),
        (None, Some((done, total))) => (on_link(total.saturating_sub(done)), 0, false),
        // The peer holds a point; what changed since is known with the next one.
        (None, None) if view.newest_point > 0 => (on_link(ram), 0, false),
        (None, None) => (on_link(ram.saturating_add(disks)), 0, false),
    };
    GuestBasis {
        guest: candidate.record.name.clone(),
        phase: view.phase,
        remaining_bytes: remaining,
        dirty_bytes_per_s: dirty,
        measured,
    }
}

/// What the link to the peer carries, by the best word there is.
fn link(remote: &Remote, order: &Order, views: &[SourceView], limits: &LinkView) -> LinkBasis {
    let told = |bytes_per_s: u64, by: &str| LinkBasis {
        bytes_per_s,
        by: by.to_owned(),
        protection_bytes_per_s: 0,
    };
    if let Some(rate) = order.link_rate {
        return told(rate.bytes_per_second(), "the operator");
    }
    let outlooks = views.iter().filter_map(|view| view.outlook.as_ref());
    let shown = outlooks.map(|outlook| outlook.link_bytes_per_s).max();
    let status = remote.peer.status();
    let path = status.path.map_or(0, |path| path.bandwidth / 8);
    let window = status.congestion_window_bytes.unwrap_or(0) as f64;
    let by_window = window / status.rtt.unwrap_or_default().as_secs_f64().max(1e-4);
    let measured = match shown.filter(|shown| *shown > 0) {
        Some(shown) => told(shown.max(path), "a cut"),
        None => told(path.max(by_window as u64), "the transport"),
    };
    match limits.limit.rate().map(|rate| rate.bytes_per_second()) {
        Some(limit) if limit < measured.bytes_per_s => told(limit, "a limit"),
        _ => measured,
    }
}

/// Guest bytes for each byte on the link, of all that was sent by this process; 1 where
/// too little was.
fn ratio(site: &Site) -> f64 {
    use std::sync::atomic::Ordering::Relaxed;
    let drivers = site.drivers.read().unwrap_or_else(PoisonError::into_inner);
    let (mut changed, mut sent) = (0u64, 0u64);
    for driver in drivers.values() {
        changed = changed.saturating_add(driver.totals.changed_bytes.load(Relaxed));
        sent = sent.saturating_add(driver.totals.sent_bytes.load(Relaxed));
    }
    match sent < TELLING_BYTES {
        true => 1.0,
        false => (changed as f64 / sent as f64).max(1.0),
    }
}

impl Site {
    /// What a guest is owed: by its protection, or by what that would begin with.
    pub(super) fn policy_of(&self, guest: GuestId) -> Policy {
        let kept = self
            .catalogue
            .find::<Protection>(Table::Protections, &guest.to_string());
        match kept {
            Ok(Some(protection)) => protection.policy,
            _ => self.config.protect.clone(),
        }
    }

    /// Bytes of each guest's batches since the daemon started.
    pub(super) fn sent_bytes(&self) -> BTreeMap<GuestId, u64> {
        use std::sync::atomic::Ordering::Relaxed;
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let sent = drivers
            .iter()
            .map(|(guest, driver)| (*guest, driver.totals.sent_bytes.load(Relaxed)));
        sent.collect()
    }
}

/// Why figures have changed so much that a plan made from the old ones is not to be kept.
pub(super) fn changed(old: &Basis, new: &Basis) -> Option<String> {
    use super::super::view::bytes;
    let (was, is) = (old.link.bytes_per_s.max(1), new.link.bytes_per_s.max(1));
    if is * 4 < was * 3 || was * 4 < is * 3 {
        return Some(format!(
            "the link carries {}/s, {} than the {}/s that were planned with",
            bytes(is),
            if is < was { "less" } else { "more" },
            bytes(was)
        ));
    }
    let before: BTreeMap<_, _> = old.guests.iter().map(|g| (&g.guest, g)).collect();
    new.guests.iter().find_map(|guest| {
        let before = before.get(&guest.guest)?;
        let (was, is) = (before.dirty_bytes_per_s, guest.dirty_bytes_per_s);
        // What is small beside the link does not change a plan.
        let matters = is.abs_diff(was) * 20 > new.link.bytes_per_s;
        let much = is > was.saturating_mul(2) || was > is.saturating_mul(2);
        (matters && much && before.measured && guest.measured).then(|| {
            format!(
                "'{}' changes {}/s, {} than the {}/s that were planned with",
                guest.guest,
                bytes(is),
                if is < was { "less" } else { "more" },
                bytes(was)
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basis(link: u64, dirty: u64) -> Basis {
        Basis {
            link: LinkBasis {
                bytes_per_s: link,
                ..LinkBasis::default()
            },
            guests: vec![GuestBasis {
                guest: "web".to_owned(),
                phase: Phase::Protected,
                remaining_bytes: 1_000_000,
                dirty_bytes_per_s: dirty,
                measured: true,
            }],
        }
    }

    #[test]
    fn a_plan_is_changed_for_what_matters_and_says_why() {
        let old = basis(10_000_000, 1_000_000);
        for (new, words) in [
            (basis(5_000_000, 1_000_000), Some("less than the 10.0 MB/s")),
            (
                basis(20_000_000, 1_000_000),
                Some("more than the 10.0 MB/s"),
            ),
            (basis(9_000_000, 1_000_000), None),
            (
                basis(10_000_000, 3_000_000),
                Some("'web' changes 3.0 MB/s, more"),
            ),
            (
                basis(10_000_000, 300_000),
                Some("'web' changes 300.0 kB/s, less"),
            ),
            (basis(10_000_000, 1_200_000), None),
        ] {
            let told = changed(&old, &new);
            match words {
                None => assert_eq!(told, None),
                Some(words) => {
                    let told = told.expect("a reason");
                    assert!(told.contains(words), "no '{words}' in: {told}");
                }
            }
        }
        // Twice of nearly nothing is nothing.
        assert_eq!(
            changed(&basis(10_000_000, 1000), &basis(10_000_000, 9000)),
            None
        );
        let mut guessed = basis(10_000_000, 0);
        guessed.guests[0].measured = false;
        assert_eq!(changed(&guessed, &basis(10_000_000, 5_000_000)), None);
    }
}
