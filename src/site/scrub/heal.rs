//! What is damaged of what a peer sent: which points need it, who is told, and
//! how it is healed.
//!
//! Nothing that is damaged can be made out of what is left: batches are sealed
//! by hashes, and a source has no batches, but guests. So the source is asked for
//! the *units* that the newest point lacks. It sends them with its next point, as
//! they are then, and that point is whole; nothing refers to what is damaged any
//! more. Older points that need it stay as they are: marked, refused, and dropped
//! when their time is over. See docs/decisions/0019-healing.md.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use farhaven_policies::alert::Severity;
use farhaven_storage_sync::store::{Damage, Need, Store};
use farhaven_storage_sync::unit::GuestId;

use super::super::alerts::{Alert, Kind};
use super::super::answer::refused;
use super::super::commands::Command;
use super::super::events::EventKind;
use super::super::remote::Remote;
use super::super::standby::Standby;
use super::super::{Site, records};
use super::keep;
use crate::replicate::message::{LOST_BATCHES, LOST_RUNS, LostContent, Message, Refusal};

/// A source that was asked, and whose points do not come, is asked again.
const AGAIN: Duration = Duration::from_secs(60);

/// Damage that only old points need is looked at again after this time.
const LATER: Duration = Duration::from_secs(600);

/// Most points that are looked through for one that is whole.
const LOOKED_THROUGH: usize = 256;

/// What was last found of the damage in one store.
#[derive(Default)]
pub(super) struct Judged {
    /// Of what the store knew then.
    changes: Option<u64>,
    at: Option<Instant>,
    newest: BTreeMap<GuestId, u64>,
    damage: Vec<Damage>,
    needs: Vec<Need>,
    /// Whose source was asked, when, with which newest point.
    asked: BTreeMap<GuestId, (u64, Instant)>,
}

impl Judged {
    pub(super) fn pieces(&self) -> usize {
        self.damage.len()
    }

    /// Points that cannot be restored in full, and why.
    pub(super) fn points(&self) -> impl Iterator<Item = (GuestId, u64, &str)> {
        let mut points: BTreeMap<(GuestId, u64), &str> = BTreeMap::new();
        for damage in &self.damage {
            for point in &damage.points {
                points.entry(*point).or_insert(&damage.why);
            }
        }
        points
            .into_iter()
            .map(|((guest, point), why)| (guest, point, why))
    }

    pub(super) fn why(&self, guest: GuestId, point: u64) -> Option<&str> {
        let damage = self
            .damage
            .iter()
            .find(|damage| damage.points.contains(&(guest, point)));
        damage.map(|damage| damage.why.as_str())
    }

    /// May other points be damaged by now? Only those that build on damaged ones are
    /// when they come; that some were dropped is found out now and then.
    fn is_stale(&self, newest: &BTreeMap<GuestId, u64>) -> bool {
        match self.healing().next() {
            Some(_) => self.newest != *newest,
            None => self.at.is_none_or(|at| at.elapsed() >= LATER),
        }
    }

    /// Guests whose newest point cannot be restored in full.
    pub(super) fn healing(&self) -> impl Iterator<Item = GuestId> {
        let newest = self.newest.iter();
        newest.filter_map(|(guest, point)| self.why(*guest, *point).map(|_| *guest))
    }
}

impl Site {
    /// Finds out which points need what is damaged, when anything has changed,
    /// mends what can be mended here, and tells of it.
    pub(super) fn judge_damage(&self, peer: &str, store: &Store) {
        let judging = self.scrubs.judging.lock();
        let _judging = judging.unwrap_or_else(PoisonError::into_inner);
        let newest: BTreeMap<GuestId, u64> = store
            .guests()
            .into_iter()
            .filter_map(|guest| Some((guest, store.newest(guest)?.point)))
            .collect();
        {
            let known = self.scrubs.known();
            let Some(known) = known.get(peer) else { return };
            let judged = &known.judged;
            let same = judged.changes == Some(store.damage_changes());
            if same && (store.is_sound() || !judged.is_stale(&newest)) {
                return;
            }
        }
        if let Err(error) = store.mend_manifests() {
            tracing::error!(%error, "a damaged manifest could not be written anew");
        }
        let changes = store.damage_changes();
        let (damage, needs) = (store.damage(), store.needs());
        let suspects = store.suspects();
        let Some(remote) = self.remote(peer) else {
            return;
        };
        let mut all = self.scrubs.known();
        let Some(known) = all.get_mut(peer) else {
            return;
        };
        if known.kept.suspects != suspects {
            known.kept.suspects = suspects;
            keep(self, &self.scrub_file(&remote), &known.kept);
        }
        let judged = &mut known.judged;
        let first = judged.changes.is_none();
        let before: BTreeSet<GuestId> = judged.healing().collect();
        judged.changes = Some(changes);
        judged.at = Some(Instant::now());
        judged.newest = newest;
        judged.damage = damage;
        judged.needs = needs;
        let now: BTreeSet<GuestId> = judged.healing().collect();
        judged.asked.retain(|guest, _| now.contains(guest));
        let healed: Vec<GuestId> = before.difference(&now).copied().collect();
        let alert = self.alert_of(peer, judged, &now);
        drop(all);
        for guest in healed {
            let name = self.standby_name(guest);
            let what = format!("the newest point of '{name}' is whole again");
            self.note(EventKind::Healed, &name, &what);
        }
        match alert {
            Some(alert) => self.raise(alert),
            None if first => {
                // What stood before a restart is not known to be over.
                let whole = store.is_sound() && !self.scrubs.at_opening().contains_key(peer);
                if whole {
                    self.clear(Kind::StoreDamaged, peer);
                }
            }
            None => self.clear(Kind::StoreDamaged, peer),
        }
    }

    fn alert_of(&self, peer: &str, judged: &Judged, newest: &BTreeSet<GuestId>) -> Option<Alert> {
        let Some(first) = judged.damage.first() else {
            let what = self.scrubs.at_opening().get(peer).cloned()?;
            return Some(Alert::new(
                Kind::StoreDamaged,
                peer,
                Severity::Critical,
                format!("of what '{peer}' sent, {what}"),
                "check the disk under the store (smartctl, dmesg). Everything is being read now: farhaven scrub --status says what that found",
            ));
        };
        let (pieces, points) = (judged.damage.len(), judged.points().count());
        let damaged = format!(
            "{pieces} pieces of what '{peer}' sent are damaged on disk; the first: {} ({})",
            first.why,
            first.path.display()
        );
        let names: Vec<String> = newest
            .iter()
            .take(5)
            .map(|g| self.standby_name(*g))
            .collect();
        Some(match newest.len() {
            0 => Alert::new(
                Kind::StoreDamaged,
                peer,
                Severity::Warning,
                format!(
                    "{damaged}. The newest point of every guest is whole; {points} other points cannot be restored, and are refused"
                ),
                "check the disk under the store (smartctl, dmesg). Damaged points go when their time is over: farhaven points shows them",
            ),
            count => Alert::new(
                Kind::StoreDamaged,
                peer,
                Severity::Critical,
                format!(
                    "{damaged}. {points} points cannot be restored, among them the newest of {count} guests: {}",
                    names.join(", ")
                ),
                format!(
                    "'{peer}' is asked to send it anew, and its next points are whole. While it is not reached, older points are what there is: farhaven points {}. Check the disk under the store (smartctl, dmesg)",
                    names.first().map_or("GUEST", String::as_str)
                ),
            ),
        })
    }

    /// What was sent from here of a guest is damaged at the peer.
    pub(in crate::site) fn lost_at_peer(&self, remote: &Arc<Remote>, lost: LostContent) -> Message {
        if !lost.is_sound() {
            remote.breach("it lost more than fits a message");
            return refused(Refusal::Unable, "more than fits a message");
        }
        let units = lost.units.into_iter();
        let units = units.filter(|(volume, ..)| usize::from(*volume) < records::MAX_VOLUMES);
        let driver = self.driver_of(lost.guest);
        let driver = driver.filter(|driver| driver.to == remote.record.key);
        let Some(driver) = driver else {
            return refused(
                Refusal::Unable,
                "this guest is not protected from here to there",
            );
        };
        if let Some(outgoing) = remote.begun() {
            outgoing.damaged(&lost.batches.into_iter().collect());
        }
        match driver.commands.try_send(Command::Lost(units.collect())) {
            Ok(()) => Message::Done,
            Err(_) => refused(Refusal::Unable, "its guest is busy; ask again"),
        }
    }
}

/// Asks a source for what the newest points of its guests lack.
pub(super) async fn ask(site: &Weak<Site>, remote: &Arc<Remote>) {
    let peer = &remote.record.site;
    let needs = {
        let Some(site) = site.upgrade() else { return };
        let known = site.scrubs.known();
        let Some(judged) = known.get(peer).map(|known| &known.judged) else {
            return;
        };
        let due = |need: &&Need| {
            let asked = judged.asked.get(&need.guest);
            // The next point may have been on its way when it was asked for.
            asked.is_none_or(|(point, at)| need.point > point + 1 || at.elapsed() >= AGAIN)
        };
        let needs: Vec<Need> = judged.needs.iter().filter(due).cloned().collect();
        drop(known);
        let standbys = site.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let fed = |need: &Need| {
            let standby = standbys.get(&need.guest);
            standby.is_some_and(|standby| !standby.is_turned() && standby.active().is_none())
        };
        needs.into_iter().filter(fed).collect::<Vec<_>>()
    };
    for need in needs {
        if !remote.connected() {
            return;
        }
        let (guest, point) = (need.guest, need.point);
        let asked = ask_for(remote, need).await;
        if let Err(why) = asked {
            tracing::warn!(peer, %guest, why, "damaged data is not sent anew yet");
        }
        let Some(site) = site.upgrade() else { return };
        if let Some(known) = site.scrubs.known().get_mut(peer) {
            known.judged.asked.insert(guest, (point, Instant::now()));
        }
    }
}

async fn ask_for(remote: &Remote, need: Need) -> Result<(), String> {
    let mut batches = need.batches.chunks(LOST_BATCHES);
    let mut units = need.units.chunks(LOST_RUNS);
    loop {
        let (some, these) = (batches.next(), units.next());
        if some.is_none() && these.is_none() {
            return Ok(());
        }
        let lost = LostContent {
            guest: need.guest,
            units: these.unwrap_or_default().to_vec(),
            batches: some.unwrap_or_default().to_vec(),
        };
        match remote.ask(Message::Lost(Box::new(lost))).await {
            Ok(Message::Done) => {}
            Ok(_) => return Err("its answer does not fit".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
}

impl Standby {
    /// The newest point that can be run and is whole, as far as is known.
    pub(in crate::site) fn newest_whole(&self) -> Option<u64> {
        let store = &self.remote().incoming.store;
        let points = self.points();
        let mut points = points.iter().rev().take(LOOKED_THROUGH);
        points
            .find(|point| store.damaged_point(self.guest, point.point).is_none())
            .map(|point| point.point)
    }
}
