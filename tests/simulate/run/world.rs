//! The sites of a run: processes in runtimes of their own, which take turns and
//! are killed and started; their disks, clocks and guests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farhaven::guest::embedded::Vmm;
use farhaven::site::view::SiteView;
use farhaven::site::{Site, Surroundings};
use farhaven_policies::policy::Retention;
use farhaven_policies::site::SiteConfig;
use farhaven_policies::units::{ByteSize, Period, RateLimit};
use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_wan::SiteKey;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::{Builder, Runtime};

use super::awaits::Awaits;
use super::deaths::Died;
use super::fibers::Fibers;
use super::files;
use super::guest::{self, Monitor};
use super::memory::Ledger;
use super::network::{Network, Shape};
use super::place::place_identity;
use super::room::{Place, Room};
use super::system::{Clock, System};
use super::{Broken, Fault, Options};

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1_000 * MS;

/// One site, whether its daemon runs or not.
pub struct Host {
    pub name: String,
    pub address: SocketAddr,
    pub directory: PathBuf,
    pub disk: SimulatedDisk,
    pub process: Option<Process>,
    /// Its wall clock runs so many parts in a million too fast.
    drift: i64,
    /// And so many does time itself, as its processors count it.
    pace: i64,
    /// What its clock was set by, in nanoseconds.
    set: i64,
    /// When the daemon is started again.
    pub starts_at: Option<u64>,
    /// Its key, in hexadecimal, once it was started.
    pub key: String,
    /// How it is when it died in the midst of its work.
    pub died: Arc<Mutex<Option<Died>>>,
    /// The disk of up to 8 seconds ago, and of 8 more, for [`Fault::Sync`].
    recent: SimulatedDisk,
    pub older: SimulatedDisk,
}

/// A daemon.
pub struct Process {
    pub number: u64,
    pub runtime: Runtime,
    pub site: Arc<Site>,
    pub awaits: Awaits,
    pub memory: Ledger,
    /// When it was started.
    started: u64,
}

pub struct World {
    pub options: Options,
    pub system: Arc<System>,
    pub network: Network,
    pub room: Arc<Room>,
    pub hosts: Vec<Host>,
    /// Virtual time that all sites have come to.
    pub now: u64,
    /// How far they come in one turn: less than a datagram is on its way.
    turn: u64,
    pub random: StdRng,
    pub shape: Shape,
    processes: u64,
    /// Since when both sites run and the link carries.
    pub whole_since: u64,
    pub kills: u64,
    /// Of kills and losses of power: in the midst of a piece of work, and between two.
    pub kills_within: u64,
    pub kills_between: u64,
    pub power_cuts: u64,
    pub catalogues_lost: u64,
    retention: Retention,
    segment: u64,
    /// Guests 0 and 2 are a protection group, by a policy file at their home.
    pub grouped: bool,
}

/// How many parts in a million too fast or slow time goes at a site, with
/// [`Options::clocks`].
const PACE: i64 = 10_000;

/// Most guests of a run.
pub const GUESTS: u32 = 3;
/// The group, and the numbers of its guests.
pub const GROUP: &str = "pair";
pub const GROUPED: [u32; 2] = [0, 2];

/// The policy file of the group.
const POLICIES: &str = "[sites.west]\n[policies.gold]\nrpo = \"1s\"\n\
    [groups.pair]\npolicy = \"gold\"\npeer = \"west\"\n\
    [groups.pair.guests.g0]\n[groups.pair.guests.g2]\n";

impl World {
    pub fn new(options: &Options, system: &Arc<System>, directory: &Path) -> World {
        let seed = options.seed;
        let mut random = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let delay = [5, 10, 25, 60][random.random_range(0..4)] * MS;
        let shape = Shape {
            delay,
            jitter: [0, 2 * MS, 30 * MS][random.random_range(0..3)],
            lost: [0, 0, 5, 30][random.random_range(0..4)],
            twice: [0, 0, 10][random.random_range(0..3)],
            rate: [250_000, 1_250_000, 12_500_000][random.random_range(0..3)],
        };
        let network = Network::new(system, random.random(), shape);
        let busy = [12, 40, 150][random.random_range(0..3)];
        let room = Room::new(system, random.random(), options.fault, busy);
        let fibers = Fibers::new(system, random.random());
        farhaven::work::set_labour(Some(fibers));
        files::lie(options.fault == Some(Fault::Files));
        if options.fault == Some(Fault::Memory) {
            network.keep_all();
        }
        let hosts = ["east", "west"].into_iter().enumerate();
        let hosts = hosts.map(|(at, name)| Host {
            name: name.to_owned(),
            address: format!("10.0.0.{}:4747", at + 1).parse().unwrap(),
            directory: directory.join(name),
            disk: SimulatedDisk::new(),
            process: None,
            drift: random.random_range(-200..200),
            pace: 0,
            set: random.random_range(-2_000..2_000) * MS as i64,
            starts_at: None,
            key: String::new(),
            died: Arc::default(),
            recent: SimulatedDisk::new(),
            older: SimulatedDisk::new(),
        });
        let mut hosts: Vec<Host> = hosts.collect();
        let all = random.random_range(10..60);
        if options.clocks {
            hosts
                .iter_mut()
                .for_each(|host| host.pace = random.random_range(-PACE..PACE));
        }
        World {
            options: *options,
            system: system.clone(),
            network,
            room,
            hosts,
            now: 0,
            turn: delay,
            shape,
            processes: 0,
            whole_since: 0,
            kills: 0,
            kills_within: 0,
            kills_between: 0,
            power_cuts: 0,
            catalogues_lost: 0,
            retention: Retention {
                all: Period::from_secs(all),
                then_every: Period::from_secs(10),
                until: Period::from_secs(4 * all),
                newest: super::checks::KEPT as u32,
            },
            grouped: seed % 6 == 5,
            segment: [128 << 10, 1 << 20][random.random_range(0..2)],
            random,
        }
    }

    fn config(&self, side: usize) -> SiteConfig {
        let host = &self.hosts[side];
        let mut config = SiteConfig::default();
        config.site.name.clone_from(&host.name);
        config.site.state_dir.clone_from(&host.directory);
        config.activate.ram_dir = host.directory.join("ram");
        config.activate.run_dir = host.directory.join("run");
        config.store.dir = host.directory.join("store");
        config.store.min_free = ByteSize::from_mib(1);
        // A scrub's pace is kept by the system's clock.
        config.store.scrub_rate = RateLimit::NONE;
        config.store.segment_bytes = ByteSize::from_bytes(self.segment);
        config.store.index_bytes = ByteSize::from_mib(1);
        config.listen.address = host.address;
        config.listen.advertise = vec![host.address.to_string()];
        config.protect.retention = self.retention.clone();
        if self.grouped && side == 0 {
            config.site.policy_files = host.directory.join("policies.toml");
            std::fs::create_dir_all(&host.directory).unwrap();
            std::fs::write(&config.site.policy_files, POLICIES).unwrap();
        }
        config
    }

    /// Starts a site's daemon, and the programs of its guests.
    pub fn start(&mut self, side: usize) -> Result<(), Broken> {
        self.processes += 1;
        let number = self.processes;
        let config = self.config(side);
        let host = &self.hosts[side];
        if host.key.is_empty() {
            place_identity(&config.site.state_dir.join("identity"), &mut self.random);
            files::settle(&host.directory);
        }
        self.system.set_clock(host.clock(self.now));
        let mut runtime = Builder::new_current_thread();
        let awaits = Awaits::default();
        if self.options.within {
            awaits.watch(&mut runtime);
        }
        let mut memory = Ledger::new(&host.disk);
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        let surroundings = Surroundings {
            builders: guest::builders(&self.room, side, number),
            disk: Arc::new(host.disk.clone()),
            port: Some(self.network.open(host.address, number)),
            sled: false,
        };
        let started = memory.of(|| runtime.block_on(Site::start_in(config, surroundings)));
        let site = started.map_err(|error| Broken {
            promise: 5,
            why: format!("site {} does not start: {error}", host.name),
        })?;
        let host = &mut self.hosts[side];
        host.key = key_of(&site.key());
        host.starts_at = None;
        host.process = Some(Process {
            number,
            runtime,
            site,
            awaits,
            memory,
            started: self.now,
        });
        self.whole_since = self.now;
        let names = self.view(side).map(|view| view.guests).unwrap_or_default();
        for name in names {
            self.embed(side, &name.name);
        }
        Ok(())
    }

    /// The program of a guest starts it, unless its site says that it may not.
    pub fn embed(&mut self, side: usize, name: &str) -> bool {
        let Some(guest) = number_in(name) else {
            return false;
        };
        let host = &self.hosts[side];
        let Some(process) = &host.process else {
            return false;
        };
        let place = Place {
            guest,
            side,
            process: process.number,
            test: false,
            machine: self.room.machine(),
        };
        let directory = host.directory.join("programs").join(name);
        let _within = process.runtime.enter();
        let monitor = Monitor::start(place, self.room.clone(), &directory);
        let monitor = Arc::new(Mutex::new(monitor));
        let definition = guest::definition(guest);
        let embedded = process.site.embed(name, monitor.clone(), definition);
        if embedded.is_ok() {
            monitor.lock().unwrap().resume().unwrap();
        }
        embedded.is_ok()
    }

    /// Nothing from this site is carried, or all is again.
    pub fn cut(&mut self, side: usize, cut: bool) {
        self.network.cut(self.hosts[side].address, cut);
        self.whole_since = self.now;
    }

    /// Whether both sites run and the link carries both ways, for so long.
    pub fn whole_for(&self, time: u64) -> bool {
        let up = self.hosts.iter().all(|host| host.process.is_some());
        let carried = self
            .hosts
            .iter()
            .all(|host| !self.network.is_cut(host.address));
        up && carried && self.whole_since.saturating_add(time) <= self.now
    }

    /// Sets a site's clock by so much.
    pub fn set_clock(&mut self, side: usize, by: i64) {
        self.hosts[side].set += by;
    }

    /// Every site comes to the end of the next turn; which of them died in the midst of
    /// it, each with whether by its power.
    pub fn turn(&mut self) -> Vec<(usize, bool)> {
        let end = self.now + self.turn;
        let mut died = Vec::new();
        for side in 0..self.hosts.len() {
            let clock = self.hosts[side].clock(self.now);
            let host = &mut self.hosts[side];
            if let Some(process) = &mut host.process {
                self.system.set_clock(clock);
                self.network.rouse(host.address);
                let until = self.system.instant(clock.comes_to(end));
                let turn = tokio::time::Instant::from_std(until);
                let (runtime, awaits) = (&process.runtime, &process.awaits);
                let turn = awaits.until(async { tokio::time::sleep_until(turn).await });
                process.memory.of(|| runtime.block_on(turn));
            }
            died.extend(self.bury(side).map(|power| (side, power)));
        }
        self.now = end;
        self.system.set_now(end);
        if self.options.fault == Some(Fault::Sync)
            && end / (8 * SECOND) != (end - self.turn) / (8 * SECOND)
        {
            for host in &mut self.hosts {
                let before = std::mem::replace(&mut host.recent, host.disk.copy());
                host.older = before;
            }
        }
        died
    }

    /// What a site tells of itself.
    pub fn view(&self, side: usize) -> Option<SiteView> {
        let process = self.hosts[side].process.as_ref()?;
        self.system.set_clock(self.hosts[side].clock(self.now));
        let _within = process.runtime.enter();
        Some(process.site.view())
    }

    /// Bytes of memory that a site's daemon holds.
    pub fn memory(&self, side: usize) -> Option<i64> {
        let process = self.hosts[side].process.as_ref()?;
        let sent = self.network.handed_over(process.number);
        Some(process.memory.held(&self.hosts[side].disk) - sent)
    }

    /// The site of a name.
    pub fn side(&self, name: &str) -> Option<usize> {
        self.hosts.iter().position(|host| host.name == name)
    }

    /// Ends all daemons.
    pub fn end(&mut self) {
        let kills = self.kills;
        for side in 0..self.hosts.len() {
            self.kill(side, false);
        }
        self.kills = kills;
        farhaven::work::set_labour(None);
    }
}

impl Host {
    /// Its clocks at a virtual time.
    fn clock(&self, now: u64) -> Clock {
        Clock {
            wall: self.set + (now / 1_000_000) as i64 * self.drift,
            pace: self.pace,
            started: self.process.as_ref().map_or(now, |process| process.started),
        }
    }
}

/// A key as directories are named by it.
pub fn key_of(key: &SiteKey) -> String {
    key.as_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

/// The number of a guest of this name.
pub fn number_in(name: &str) -> Option<u32> {
    name.strip_prefix('g')?.parse().ok()
}

/// What a virtual time is, for people.
pub fn shown(now: u64) -> String {
    format!("{:.3} s", Duration::from_nanos(now).as_secs_f64())
}
