//! What must hold at every instant of a run, and at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use farhaven::replicate::message::PointContext;
use farhaven::site::view::{Phase, SiteView};
use farhaven_storage_sync::digest::is_zero;
use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT, VolumeKind};
use rand::Rng;

use super::Broken;
use super::guest::number_of;
use super::operators::Operators;
use super::room::differs;
use super::terms::Terms;
use super::world::{Host, SECOND, World, number_in, shown};

/// Longest that a cut may stop a guest: bounded waits, and a slow disk.
const STALL: u64 = 5 * SECOND;
/// Newest points of a guest that retention keeps however old they are.
pub const KEPT: usize = 3;
/// Points that are read at each look into a store, besides the newest.
const READ: usize = 3;
/// Bytes of a store beyond which it is not bounded: some hundred times the
/// guests, and retention keeps tens of points of what changes.
const MOST_BYTES: u64 = 96 << 20;
/// Bytes of memory of a site's daemon beyond which it is not bounded: it holds half of that
/// at most, with an index of a mebibyte and windows as they are by default.
const MOST_MEMORY: u64 = 48 << 20;
/// After a run has come to rest, the newest point is at most so old.
const RPO: u64 = 40 * SECOND;

/// What was seen so far.
#[derive(Default)]
pub struct Seen {
    /// What a source was told is durable, by the site that keeps it and the guest.
    sealed: BTreeMap<(usize, String), Sealed>,
    phases: BTreeMap<(usize, String), Phase>,
    /// Batch bytes that left, and that came although they were here, of each process.
    bytes: BTreeMap<(u64, String), u64>,
    repeated: BTreeMap<(u64, String), u64>,
    /// Machines of a guest that ran at both sites, which a person's decision
    /// against a site that was not heard explains.
    pub excused: BTreeSet<(u64, u64)>,
    pub terms: Terms,
    pub points: u64,
    pub read: u64,
    /// Bytes of memory that a site's daemon held at most.
    pub memory: u64,
    pub digest: blake3::Hasher,
}

struct Sealed {
    id: GuestId,
    /// The first one that was told: after a turn what the guest is protected upon, which
    /// goes once something was built upon it.
    first: u64,
    /// Each point, and when it was first told; the newest ones.
    points: BTreeMap<u64, u64>,
}

impl Seen {
    /// Looks at what both sites tell of themselves; in words, what is new.
    pub fn look(&mut self, world: &World) -> Vec<String> {
        let mut words = Vec::new();
        for side in 0..world.hosts.len() {
            let Some(view) = world.view(side) else {
                continue;
            };
            self.sources(world, side, &view, &mut words);
            let number = world.hosts[side].process.as_ref().map_or(0, |p| p.number);
            for peer in view.peers {
                self.repeated
                    .insert((number, peer.site), peer.repeated_bytes);
            }
        }
        words
    }

    fn sources(&mut self, world: &World, side: usize, view: &SiteView, words: &mut Vec<String>) {
        let site = &world.hosts[side].name;
        let number = world.hosts[side].process.as_ref().map_or(0, |p| p.number);
        for guest in &view.guests {
            let key = (side, guest.name.clone());
            if self.phases.insert(key.clone(), guest.phase) != Some(guest.phase) {
                let name = &guest.name;
                words.push(format!(
                    "{site}: {name}: {:?} {}",
                    guest.phase, guest.trouble
                ));
            }
            self.bytes
                .insert((number, guest.name.clone()), guest.wan_bytes);
            if let (Some(number), Ok(id)) = (number_in(&guest.name), guest.id.parse()) {
                self.terms.is(number, id);
            }
            let peer = guest.peer.as_deref().and_then(|peer| world.side(peer));
            let over = matches!(
                guest.phase,
                Phase::Moved | Phase::Fenced | Phase::Unprotected
            );
            let (Some(peer), Ok(id), false) = (peer, guest.id.parse(), over) else {
                continue;
            };
            // It is this site's own: what is here of it is nobody's to keep.
            self.sealed.remove(&key);
            let kept = (peer, guest.name.clone());
            let unknown = || Sealed {
                id,
                first: 0,
                points: BTreeMap::new(),
            };
            let sealed = self.sealed.entry(kept).or_insert_with(unknown);
            if sealed.id != id {
                *sealed = unknown();
            }
            let before = sealed.points.keys().next_back().copied().unwrap_or(0);
            if guest.newest_point > before {
                self.points += 1;
                if sealed.points.is_empty() {
                    sealed.first = guest.newest_point;
                }
                sealed.points.insert(guest.newest_point, world.now);
                if sealed.points.len() > KEPT {
                    sealed.points.pop_first();
                }
                words.push(format!(
                    "{site}: {}: point {}",
                    guest.name, guest.newest_point
                ));
            }
        }
    }

    /// Promise 3, of the turn that is over.
    pub fn once(&mut self, world: &World, operators: &Operators) -> Result<(), Broken> {
        self.terms.started(world, &world.room.begun())?;
        for (guest, one, other) in world.room.overlaps(world.now) {
            if operators.overrode(world, guest) {
                self.excused
                    .insert((one.place.machine, other.place.machine));
            } else {
                let span = |span: &super::room::Span| {
                    let until = span.until.map_or("now".to_owned(), shown);
                    format!(
                        "{} from {} to {until}",
                        world.hosts[span.place.side].name,
                        shown(span.from)
                    )
                };
                let why = format!(
                    "guest g{guest} ran twice: {}, and {}",
                    span(&one),
                    span(&other)
                );
                return Err(Broken { promise: 3, why });
            }
        }
        world.room.broken().map_or(Ok(()), Err)
    }

    /// Promise 4: nothing but a move and an operator's word stops a guest for long.
    pub fn stalled(&self, world: &World) -> Result<(), Broken> {
        for (place, since) in world.room.standing() {
            if place.test || world.now < since + STALL {
                continue;
            }
            let name = format!("g{}", place.guest);
            let phase = self.phases.get(&(place.side, name.clone()));
            let protected = matches!(
                phase,
                Some(Phase::Attaching | Phase::Connecting | Phase::Resuming | Phase::FirstCopy)
                    | Some(Phase::Shipping | Phase::Protected | Phase::Paused | Phase::Moving)
            );
            let own = world.runs_own(place.side, &name, place.machine);
            if protected && own && !world.room.runs_at(place.guest).contains(&place.side) {
                let site = &world.hosts[place.side].name;
                let since = shown(since);
                let why = format!("{name} stands still at {site} since {since} ({phase:?})");
                return Err(Broken { promise: 4, why });
            }
        }
        Ok(())
    }

    /// Promise 7, of memory.
    pub fn bounded(&mut self, world: &World) -> Result<(), Broken> {
        for side in 0..world.hosts.len() {
            let held = world.memory(side).map_or(0, |held| held.max(0) as u64);
            self.memory = self.memory.max(held);
            if held > MOST_MEMORY {
                let site = &world.hosts[side].name;
                let why = format!("site {site} holds {held} bytes of memory");
                return Err(Broken { promise: 7, why });
            }
        }
        Ok(())
    }

    /// Promises 1, 2 and 7: what each store would give back if its machine lost
    /// its power now.
    pub fn stores(&mut self, world: &mut World, all: bool) -> Result<(), Broken> {
        for side in 0..world.hosts.len() {
            let seed = world.random.random();
            let disk = match world.random.random_bool(0.5) {
                true => world.hosts[side].disk.power_cut(seed, 0.5),
                false => world.hosts[side].disk.copy(),
            };
            let disk = Arc::new(disk);
            for peer in (0..world.hosts.len()).filter(|peer| *peer != side) {
                self.store(world, side, &world.hosts[peer].key.clone(), &disk, all)?;
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        world: &mut World,
        side: usize,
        key: &str,
        disk: &Arc<SimulatedDisk>,
        all: bool,
    ) -> Result<(), Broken> {
        let directory = world.hosts[side].directory.join("store").join(key);
        if key.is_empty() || !is_there(disk, &directory) {
            let told = self.sealed.keys().find(|(at, _)| *at == side);
            return told.map_or(Ok(()), |(_, name)| {
                let site = &world.hosts[side].name;
                let why = format!(
                    "points of {name} were told to be durable at {site}, and no store is there"
                );
                Err(Broken { promise: 2, why })
            });
        }
        let site = world.hosts[side].name.clone();
        let opened = Store::open_on(disk.clone(), &directory, StoreOptions::default());
        let (store, report) = opened.map_err(|error| Broken {
            promise: 2,
            why: format!("the store of site {site} does not open: {error}"),
        })?;
        if let Some(damaged) = report.damaged.first() {
            let why = format!("site {site}: {}: {}", damaged.path.display(), damaged.why);
            return Err(Broken { promise: 2, why });
        }
        // Of a group, a point that was never one of all of them goes, if it is not the newest.
        let kept = if world.grouped { 1 } else { KEPT };
        let sealed = self.sealed.iter().filter(|((at, _), _)| *at == side);
        for ((_, name), told) in sealed {
            let here: BTreeSet<u64> = store.points(told.id).iter().map(|p| p.point).collect();
            let known: BTreeSet<u64> = here.iter().chain(told.points.keys()).copied().collect();
            for (point, at) in &told.points {
                // The newest ones are kept however old they are.
                let newer = known.range(point + 1..).count();
                let kept = if *point == told.first { 1 } else { kept };
                if newer < kept && !here.contains(point) {
                    let at = shown(*at);
                    let why = format!(
                        "point {point} of {name} was told to be durable at {site} by {at}, and there are {here:?}"
                    );
                    return Err(Broken { promise: 2, why });
                }
            }
        }
        if store.bytes() > MOST_BYTES {
            let why = format!("the store of site {site} has {} bytes", store.bytes());
            return Err(Broken { promise: 7, why });
        }
        // Of each cut of a group: when its guests stood still.
        let mut cuts: BTreeMap<(GuestId, u64), (u64, u64)> = BTreeMap::new();
        for id in store.guests() {
            let mut points: Vec<u64> = store.points(id).iter().map(|p| p.point).collect();
            while !all && points.len() > READ + 1 {
                let at = world.random.random_range(0..points.len() - 1);
                points.remove(at);
            }
            for point in points {
                let replica = store.open_point(id, point);
                let restored = replica.map_err(|e| e.to_string());
                let restored = restored.and_then(|replica| {
                    let number = as_of_its_instant(world, &replica)?;
                    of_one_instant(world, &replica, number, &mut cuts)
                });
                restored.map_err(|why| Broken {
                    promise: 1,
                    why: format!("point {point} of guest {id} at {site}: {why}"),
                })?;
                self.read += 1;
            }
        }
        Ok(())
    }

    /// Promise 5: what came although it was here, in bytes, and of how many.
    pub fn repeated(&self) -> (u64, u64) {
        (self.repeated.values().sum(), self.bytes.values().sum())
    }

    /// At rest, with a link that carries: who is protected has new points.
    pub fn goes_on(&self, world: &World) -> Result<(), Broken> {
        for ((side, name), phase) in &self.phases {
            let Some(view) = world.view(*side) else {
                continue;
            };
            let Some(guest) = view.guests.into_iter().find(|g| g.name == *name) else {
                continue;
            };
            let waits = matches!(
                phase,
                Phase::Paused | Phase::Moved | Phase::Fenced | Phase::Unprotected | Phase::Lost
            );
            let number = number_in(name).unwrap_or(0);
            let runs = world.room.runs_at(number).contains(side);
            let fresh = guest.rpo_ms.is_some_and(|age| age * 1_000_000 < RPO);
            if !waits && runs && !fresh {
                let site = &world.hosts[*side].name;
                let why = format!(
                    "{name} runs at {site} and is not protected any more: {phase:?}, rpo {:?} ms: {}",
                    guest.rpo_ms, guest.trouble
                );
                return Err(Broken { promise: 8, why });
            }
        }
        Ok(())
    }
}

impl World {
    /// Is this machine the newest of a guest that is the site's own?
    fn runs_own(&self, side: usize, name: &str, machine: u64) -> bool {
        let standing = self.room.standing();
        let guest = number_in(name).unwrap_or(0);
        let of_it = standing
            .iter()
            .filter(|(p, _)| p.side == side && p.guest == guest && !p.test);
        of_it.map(|(place, _)| place.machine).max() == Some(machine)
    }
}

/// The disk has that directory.
fn is_there(disk: &SimulatedDisk, directory: &Path) -> bool {
    use farhaven_storage_sync::disk::Disk;
    disk.exists(directory).unwrap_or(false)
}

/// The guests of a group's cut all stood still at one time.
fn of_one_instant(
    world: &World,
    replica: &Replica,
    number: Option<u64>,
    cuts: &mut BTreeMap<(GuestId, u64), (u64, u64)>,
) -> Result<(), String> {
    let context = PointContext::of(replica)?;
    let stood = number.and_then(|number| world.room.stood(number));
    let (Some(group), Some((from, until))) = (context.group, stood) else {
        return Ok(());
    };
    let all = cuts.entry((group.id, group.cut)).or_insert((0, u64::MAX));
    *all = (all.0.max(from), all.1.min(until));
    match all.0 <= all.1 {
        true => Ok(()),
        false => Err(format!(
            "cut {} of its group is not of one instant",
            group.cut
        )),
    }
}

/// A point is what its guest was at the instant that it tells of; its number.
fn as_of_its_instant(world: &World, replica: &Replica) -> Result<Option<u64>, String> {
    let mut content = Vec::new();
    let mut state = Vec::new();
    for (index, volume) in replica.volumes().iter().enumerate() {
        let units = volume.bytes.div_ceil(UNIT as u64);
        let mut bytes = vec![0; units as usize * UNIT];
        let read = replica.read(index as u16, 0, units, &mut bytes);
        read.map_err(|error| format!("volume {}: {error}", volume.name))?;
        bytes.truncate(volume.bytes as usize);
        match volume.kind {
            VolumeKind::DeviceState => state = bytes,
            _ => content.push(blake3::hash(&bytes)),
        }
    }
    if state.is_empty() || is_zero(&state) {
        // What a site had of a guest when it turned round: no point to run.
        return Ok(None);
    }
    let number = number_of(&state).ok_or("its state has no number")?;
    let found: [blake3::Hash; 2] = content.try_into().map_err(|_| "other volumes".to_owned())?;
    let wanted = world.room.instant(number);
    match wanted.as_ref() == Some(&found) {
        true => Ok(Some(number)),
        false => Err(format!(
            "its {} (instant {number})",
            differs(wanted.as_ref(), &found)
        )),
    }
}

/// For [`Seen::stores`], when a site's daemon is down, too.
pub fn keys_known(hosts: &[Host]) -> bool {
    hosts.iter().all(|host| !host.key.is_empty())
}
