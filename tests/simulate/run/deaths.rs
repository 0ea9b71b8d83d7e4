//! How sites die: between two turns, or at a place of their own within one.

use std::fmt;

use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use rand::Rng;
use rand::rngs::StdRng;

use super::Fault;
use super::files::{self, moment, moment::Moment};
use super::place::{forget_terms, lose_catalogue};
use super::world::{Process, World};

/// How often a site that dies has lost its catalogue when it comes back.
const LOSES_ITS_CATALOGUE: f64 = 0.4;
/// At which of its next syncs of a small file a site dies, and at which of its next changes
/// of a store's disk, at most.
const MOST_SYNCS: u32 = 4;
const MOST_CHANGES: u64 = 60;
/// How often its runtime goes on before it dies between two polls of tasks, as a power of
/// two, and how many polls there are from there, at most.
const MOST_WAKES: u32 = 8;
const MOST_POLLS: u32 = 40;

/// Where in its work a site dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Before its next sync but so many of a small file or a directory.
    Sync(u32),
    /// Before its next change but so many of the disk that its stores are on.
    Change(u64),
    /// Where its tasks wait: after its runtime has gone on so often, so many polls later.
    Await { wakes: u32, polls: u32 },
}

impl At {
    pub fn by_chance(random: &mut StdRng) -> At {
        match random.random_range(0..3) {
            0 => At::Sync(random.random_range(1..=MOST_SYNCS)),
            1 => At::Change(random.random_range(1..=MOST_CHANGES)),
            _ => {
                let most = 1 << random.random_range(0..=MOST_WAKES);
                At::Await {
                    wakes: random.random_range(1..=most),
                    polls: random.random_range(0..=MOST_POLLS),
                }
            }
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Sync(nth) => write!(f, "before its next {nth}. sync"),
            At::Change(nth) => write!(f, "before the next {nth}. change of its disk"),
            At::Await { wakes, polls } => write!(f, "{polls} polls after it goes on {wakes} times"),
        }
    }
}

/// What was there when a daemon died in the midst of its work.
pub struct Died {
    disk: SimulatedDisk,
    files: Moment,
    power: bool,
    /// No piece of its work was under way.
    between: bool,
}

impl World {
    /// Kills a site's daemon, or cuts the power of its machine.
    pub fn kill(&mut self, side: usize, power: bool) {
        let seed = self.random.random();
        let chance = [0.0, 0.5, 0.9][self.random.random_range(0..3)];
        let host = &mut self.hosts[side];
        let Some(process) = host.process.take() else {
            return;
        };
        self.network.close(host.address);
        self.room.kill(process.number);
        moment::spare(&host.directory);
        host.disk.spare();
        let died = host.died.lock().unwrap().take();
        if let Some(died) = &died {
            host.disk = died.disk.copy();
        }
        // As it is now: what is unwound below comes too late.
        host.disk = match power {
            true if self.options.fault == Some(Fault::Sync) => host.older.copy(),
            true => host.disk.power_cut(seed, chance),
            false => host.disk.copy(),
        };
        let Process { runtime, site, .. } = process;
        drop(site);
        drop(runtime);
        if let Some(died) = died {
            self.kills_within += u64::from(!died.between);
            self.kills_between += u64::from(died.between);
            moment::put_back(&host.directory, &died.files);
        }
        if power {
            // After the thread that writes events, which is a real one, has ended.
            files::power_cut(&host.directory, seed, chance);
        }
        if self.options.catalogues && self.random.random_bool(LOSES_ITS_CATALOGUE) {
            let host = &self.hosts[side];
            lose_catalogue(&host.disk, &host.directory);
            self.catalogues_lost += 1;
        }
        let host = &self.hosts[side];
        self.kills += u64::from(!power);
        self.power_cuts += u64::from(power);
        if power {
            let _ = std::fs::remove_dir_all(host.directory.join("ram"));
        }
        if self.options.fault == Some(Fault::Terms) {
            forget_terms(&host.directory.join("terms"));
        }
        self.whole_since = u64::MAX;
    }

    /// A site's daemon, or the power of its machine, is to die there.
    pub fn doom(&self, side: usize, at: At, power: bool) {
        let host = &self.hosts[side];
        let Some(process) = &host.process else { return };
        self.spare_one(side);
        let (address, number) = (host.address, process.number);
        let (directory, died) = (host.directory.clone(), host.died.clone());
        let (network, room) = (self.network.clone(), self.room.clone());
        let between = matches!(at, At::Await { .. });
        let dies = move |disk: SimulatedDisk| {
            // Nothing that it does from here on is seen by anybody.
            network.close(address);
            room.kill(number);
            let files = moment::moment(&directory);
            died.lock().unwrap().get_or_insert(Died {
                disk,
                files,
                power,
                between,
            });
        };
        let disk = host.disk.clone();
        match at {
            At::Sync(nth) => moment::die_at(&host.directory, nth, move || dies(disk.copy())),
            At::Change(nth) => disk.die_at(nth, dies),
            At::Await { wakes, polls } => process
                .awaits
                .die_at(wakes, polls, move || dies(disk.copy())),
        }
    }

    fn spare_one(&self, side: usize) {
        let host = &self.hosts[side];
        moment::spare(&host.directory);
        host.disk.spare();
        if let Some(process) = &host.process {
            process.awaits.spare();
        }
    }

    /// Nobody dies at a place of his own any more.
    pub fn spare(&self) {
        (0..self.hosts.len()).for_each(|side| self.spare_one(side));
    }

    /// A site that died in the midst of its work is dead; whether by its power.
    pub fn bury(&mut self, side: usize) -> Option<bool> {
        let power = {
            let died = self.hosts[side].died.lock().unwrap();
            died.as_ref()?.power
        };
        self.kill(side, power);
        Some(power)
    }
}
