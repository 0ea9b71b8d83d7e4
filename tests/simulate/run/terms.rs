//! What each site knew of who may run a guest, as its disk had it once: kept
//! here, though the site forgets it.

use std::collections::BTreeMap;
use std::path::Path;

use farhaven::activate::fence::Term;
use farhaven_storage_sync::unit::GuestId;
use serde::de::DeserializeOwned;

use super::Broken;
use super::room::{Place, Start};
use super::world::{SECOND, World, key_of, shown};

/// What runs is stopped so long after its site knew that another one owns it.
const STOPS_WITHIN: u64 = 10 * SECOND;

/// The newest term that a site ever knew of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    term: Term,
    /// Since when its owner is that one.
    since: u64,
}

/// The terms that were durable at each site at any time.
#[derive(Default)]
pub struct Terms {
    newest: BTreeMap<(usize, GuestId), Known>,
    /// By the guests' numbers.
    ids: BTreeMap<u32, GuestId>,
}

impl Terms {
    /// A guest of this number was seen under this id.
    pub fn is(&mut self, guest: u32, id: GuestId) {
        self.ids.insert(guest, id);
    }

    /// Looks into the directory of a site.
    pub fn look(&mut self, world: &World, side: usize) {
        let directory = world.hosts[side].directory.join("terms");
        for term in written_in(&directory) {
            let known = self.newest.get(&(side, term.group)).copied();
            let newer = |k: Known| (term.number, term.owner) > (k.term.number, k.term.owner);
            if known.is_none_or(newer) {
                let before = known.filter(|known| known.term.owner == term.owner);
                let since = before.map_or(world.now, |known| known.since);
                self.newest
                    .insert((side, term.group), Known { term, since });
            }
        }
    }

    /// Does this site's disk say that the guest is its own?
    pub fn owns(&self, world: &World, side: usize, guest: u32) -> bool {
        let known = self.known(side, guest);
        known.is_some_and(|known| key_of(&known.term.owner) == world.hosts[side].key)
    }

    /// Has this site known for so long that the guest is another's, that it runs
    /// nothing of it any more?
    pub fn gave_up(&self, world: &World, side: usize, guest: u32) -> bool {
        let known = self.known(side, guest);
        known.is_some_and(|known| known.since + STOPS_WITHIN < world.now)
            && !self.owns(world, side, guest)
    }

    /// Promise 3, for one site alone: it starts nothing that it once knew to be
    /// another's, whatever it lost or did not hear since.
    pub fn started(&mut self, world: &World, starts: &[Start]) -> Result<(), Broken> {
        for start in starts.iter().filter(|start| !start.place.test) {
            let Place { guest, side, .. } = start.place;
            let before = self.known(side, guest);
            // A promotion writes its term down before the guest starts.
            self.look(world, side);
            let now = self.known(side, guest);
            let (Some(before), Some(now)) = (before, now) else {
                continue;
            };
            if before.term == now.term && !self.owns(world, side, guest) {
                let at = shown(start.at);
                return Err(self.broken(world, side, guest, now, &format!("was started at {at}")));
            }
        }
        Ok(())
    }

    /// Nor does it leave running what it knows to be another's.
    pub fn stops(&mut self, world: &World) -> Result<(), Broken> {
        for side in 0..world.hosts.len() {
            self.look(world, side);
        }
        let guests: Vec<u32> = self.ids.keys().copied().collect();
        for guest in guests {
            for side in world.room.runs_at(guest) {
                let known = self.known(side, guest);
                let may_run = world.room.refuses_until(guest) + STOPS_WITHIN > world.now;
                let known = known.filter(|_| !may_run && self.gave_up(world, side, guest));
                if let Some(known) = known {
                    return Err(self.broken(world, side, guest, known, "runs"));
                }
            }
        }
        Ok(())
    }

    fn known(&self, side: usize, guest: u32) -> Option<Known> {
        let id = self.ids.get(&guest)?;
        self.newest.get(&(side, *id)).copied()
    }

    fn broken(&self, world: &World, side: usize, guest: u32, known: Known, does: &str) -> Broken {
        let why = format!(
            "guest g{guest} {does} at {}, which wrote down by {} that another site owns it, and under term {} still does",
            world.hosts[side].name,
            shown(known.since),
            known.term.number
        );
        Broken { promise: 3, why }
    }
}

/// All terms that a directory holds.
fn written_in(directory: &Path) -> Vec<Term> {
    let mut terms = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let kind = path.extension().and_then(|kind| kind.to_str());
        match kind {
            Some("term") => terms.extend(body::<Term>(&path)),
            Some("terms") => terms.extend(body::<Vec<Term>>(&path).into_iter().flatten()),
            _ => {}
        }
    }
    terms
}

/// JSON, over a checksum.
fn body<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = std::fs::read_to_string(path).ok()?;
    serde_json::from_str(text.lines().next()?).ok()
}
