//! What happens in a run, in order: set up, go wrong, come to rest.

use std::path::Path;
use std::time::Duration;

use rand::Rng;

use super::checks::{Seen, keys_known};
use super::deaths::At;
use super::network::Shape;
use super::operators::Operators;
use super::orders::Order;
use super::system::System;
use super::world::{GUESTS, MS, SECOND, World, shown};
use super::{Broken, Counts, Options, Ran};

/// How often the sites are looked at.
const LOOK: u64 = 100 * MS;
/// How often their stores are.
const LOOK_INTO_STORES: u64 = 7 * SECOND;
/// How often a site that is to die does so at a place of its own within its work, and how
/// often somebody orders something right before.
const DIES_WITHIN: f64 = 0.8;
const ORDERED_BEFORE: f64 = 0.6;
/// How long a run may take to set up.
const SET_UP: u64 = 60 * SECOND;
/// How long it has to come to rest.
const REST: u64 = 100 * SECOND;

struct Story {
    world: World,
    operators: Operators,
    seen: Seen,
    guests: u32,
    link_cuts: u64,
    /// When what happens to the link and to sites ends.
    heals: [Option<u64>; 2],
    next: u64,
    place: String,
    looked: u64,
    stores_looked: u64,
}

/// Runs a seed, on a thread that has done nothing else.
pub(super) fn run(options: &Options, directory: &Path) -> Ran {
    let system = System::new(options.seed);
    let world = World::new(options, &system, directory);
    let mut story = Story {
        guests: 1 + (options.seed % u64::from(GUESTS)) as u32,
        world,
        operators: Operators::new(),
        seen: Seen::default(),
        link_cuts: 0,
        heals: [None; 2],
        next: 0,
        place: directory.display().to_string(),
        looked: 0,
        stores_looked: 0,
    };
    let broken = story.told().err();
    if let Some(broken) = &broken {
        story.say(&format!(
            "BROKEN: promise {}: {}",
            broken.promise, broken.why
        ));
    }
    story.world.end();
    let ran = story.sum(options.seed, broken);
    System::leave();
    ran
}

impl Story {
    fn told(&mut self) -> Result<(), Broken> {
        self.set_up()?;
        let chaos = self.world.random.random_range(40..90) * SECOND;
        let end = self.world.now + chaos;
        while self.world.now < end {
            self.happen()?;
            self.turn()?;
        }
        self.rest()
    }

    /// Both sites run and are paired; guests run and are protected.
    fn set_up(&mut self) -> Result<(), Broken> {
        for side in 0..2 {
            self.world.start(side)?;
        }
        let invited = {
            let process = self.world.hosts[1].process.as_ref();
            let process = process.expect("it was started");
            let _within = process.runtime.enter();
            process.site.invite(Duration::from_secs(600))
        };
        let invitation = invited.map_err(|error| Broken {
            promise: 8,
            why: format!("no invitation: {error}"),
        })?;
        let east = self.world.hosts[0]
            .process
            .as_ref()
            .expect("it was started");
        let site = east.site.clone();
        let pairing = east.runtime.spawn(async move {
            // The link may lose what pairs.
            while site.pair(&invitation).await.is_err() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        let begun = self.world.now;
        while !pairing.is_finished() || (0..2).any(|side| !self.paired(side)) {
            self.world.turn();
            self.in_time(begun, "the pairing")?;
        }
        for guest in 0..self.guests {
            let (home, name) = ((guest % 2) as usize, format!("g{guest}"));
            self.world.embed(home, &name);
            self.operators
                .order(&self.world, home, guest, Order::Protect);
        }
        while self.seen.points < u64::from(self.guests) {
            self.turn()?;
            self.in_time(begun, "the first points")?;
        }
        Ok(())
    }

    fn paired(&self, side: usize) -> bool {
        let view = self.world.view(side);
        view.is_some_and(|view| view.peers.iter().any(|peer| peer.connected))
    }

    fn in_time(&self, begun: u64, what: &str) -> Result<(), Broken> {
        match self.world.now < begun + SET_UP {
            true => Ok(()),
            false => Err(Broken {
                promise: 8,
                why: format!("{what} took longer than {}", shown(SET_UP)),
            }),
        }
    }

    fn say(&mut self, what: &str) {
        // Where it runs is no part of what happens.
        let what = what.replace(&self.place, "");
        self.seen.digest.update(&self.world.now.to_le_bytes());
        self.seen.digest.update(what.as_bytes());
        if self.world.options.trace {
            eprintln!("{} {what}", shown(self.world.now));
        }
    }

    /// Something may go wrong now.
    fn happen(&mut self) -> Result<(), Broken> {
        for side in 0..2 {
            if self.heals[side].is_some_and(|at| at <= self.world.now) {
                self.heals[side] = None;
                self.world.cut(side, false);
                self.say(&format!(
                    "{} is heard again",
                    self.world.hosts[side].name.clone()
                ));
            }
            let starts = self.world.hosts[side].starts_at;
            if starts.is_some_and(|at| at <= self.world.now) {
                self.start(side)?;
            }
        }
        if self.world.now < self.next {
            return Ok(());
        }
        let pause = match self.world.options.partitions {
            true => 1_500,
            false => 4_000,
        };
        let wait = match self.world.random.random_range(0..3) {
            0 => self.world.random.random_range(10..200),
            _ => self.world.random.random_range(100..pause),
        };
        self.next = self.world.now + wait * MS;
        let kinds = match self.world.options.partitions {
            true => [50, 75, 90, 100, 100],
            false => [62, 75, 87, 94, 97],
        };
        let side = self.world.random.random_range(0..2);
        let name = self.world.hosts[side].name.clone();
        let draw = self.world.random.random_range(0..100);
        if self.world.options.operations && self.world.random.random_ratio(1, 12) {
            let guest = self.world.random.random_range(0..self.guests);
            let time = self.world.random.random_range(1..120) * 100 * MS;
            self.world.room.refuse(guest, self.world.now + time);
            self.say(&format!("g{guest} does not stop for {}", shown(time)));
        } else if draw < kinds[0] {
            let ordered = self.operators.by_chance(&mut self.world, self.guests);
            self.say(&ordered);
        } else if draw < kinds[1] {
            let both = self.world.random.random_bool(0.7);
            let time = self.world.random.random_range(1..200) * 100 * MS;
            for cut in [side, 1 - side].into_iter().take(1 + usize::from(both)) {
                self.world.cut(cut, true);
                self.heals[cut] = Some(self.world.now + time);
            }
            self.link_cuts += 1;
            self.say(&format!(
                "{name} is not heard for {}, both: {both}",
                shown(time)
            ));
            self.operators.disturbed(&self.world);
        } else if draw < kinds[3] {
            let power = draw >= kinds[2];
            let time = self.world.random.random_range(1..150) * 100 * MS;
            if self.world.options.within && self.world.random.random_bool(DIES_WITHIN) {
                let at = At::by_chance(&mut self.world.random);
                self.world.doom(side, at, power);
                self.say(&format!("{name} is to die {at}"));
                if self.world.random.random_bool(ORDERED_BEFORE) {
                    let ordered = self.operators.by_chance(&mut self.world, self.guests);
                    self.say(&ordered);
                }
                return Ok(());
            }
            // What it knows now it may not know again.
            self.seen.terms.look(&self.world, side);
            self.world.kill(side, power);
            self.is_dead(side, power, time)?;
        } else if draw < kinds[4] {
            let by = self.world.random.random_range(-20_000..20_000) * MS as i64;
            self.world.set_clock(side, by);
            self.say(&format!(
                "the clock of {name} is set by {} ms",
                by / MS as i64
            ));
        } else {
            let lost = self.world.random.random_range(0..60);
            let shape = Shape {
                lost,
                ..self.world.shape
            };
            self.world.network.reshape(shape);
            self.say(&format!("{lost} of a thousand datagrams are lost"));
        }
        Ok(())
    }

    /// A site was killed, and is started again after that time.
    fn is_dead(&mut self, side: usize, power: bool, time: u64) -> Result<(), Broken> {
        let host = &mut self.world.hosts[side];
        host.starts_at.get_or_insert(self.world.now + time);
        let name = host.name.clone();
        self.say(&format!(
            "{name} is killed for {}, power: {power}",
            shown(time)
        ));
        self.operators.disturbed(&self.world);
        if power && keys_known(&self.world.hosts) {
            // Before anybody can send anew what was lost.
            self.seen.stores(&mut self.world, false)?;
        }
        Ok(())
    }

    fn start(&mut self, side: usize) -> Result<(), Broken> {
        let name = self.world.hosts[side].name.clone();
        self.say(&format!("{name} is started"));
        self.world.start(side)
    }

    /// One turn of all sites, and what must hold after it.
    fn turn(&mut self) -> Result<(), Broken> {
        for (side, power) in self.world.turn() {
            let time = self.world.random.random_range(1..150) * 100 * MS;
            self.is_dead(side, power, time)?;
        }
        for words in self.operators.listen(&self.world, &mut self.seen.terms) {
            self.say(&words);
        }
        // What of this turn was before a site heard of a decision is explained by it.
        self.seen.once(&self.world, &self.operators)?;
        if self.world.now >= self.looked + LOOK {
            self.looked = self.world.now;
            for words in self.seen.look(&self.world) {
                self.say(&words);
            }
            self.seen.terms.stops(&self.world)?;
            self.seen.stalled(&self.world)?;
            self.seen.bounded(&self.world)?;
            self.operators.settle(&self.world, &self.seen.terms);
        }
        if self.world.now >= self.stores_looked + LOOK_INTO_STORES && keys_known(&self.world.hosts)
        {
            self.stores_looked = self.world.now;
            self.seen.stores(&mut self.world, false)?;
        }
        Ok(())
    }

    /// All is well again: everybody must find back by himself.
    fn rest(&mut self) -> Result<(), Broken> {
        self.say("everything is well again");
        self.world.spare();
        let shape = Shape {
            lost: 0,
            ..self.world.shape
        };
        self.world.network.reshape(shape);
        for side in 0..2 {
            self.heals[side] = None;
            self.world.cut(side, false);
            if self.world.hosts[side].process.is_none() {
                self.start(side)?;
            }
        }
        let end = self.world.now + REST;
        while self.world.now < end {
            self.turn()?;
        }
        self.seen.goes_on(&self.world)?;
        self.seen.stores(&mut self.world, true)?;
        let (repeated, of) = self.seen.repeated();
        if repeated > of / 100 {
            let why = format!("{repeated} bytes came although they were here, of {of} in batches");
            return Err(Broken { promise: 5, why });
        }
        Ok(())
    }

    fn sum(&mut self, seed: u64, broken: Option<Broken>) -> Ran {
        let (datagrams, datagrams_dropped, wires) = self.world.network.sum();
        self.seen.digest.update(wires.as_bytes());
        let room = self.world.room.digest();
        self.seen.digest.update(room.as_bytes());
        let [_, restored, starts] = self.world.room.counts();
        let (repeated_bytes, batch_bytes) = self.seen.repeated();
        Ran {
            seed,
            broken,
            digest: self.seen.digest.finalize().to_hex()[..32].to_owned(),
            counts: Counts {
                virtual_s: self.world.now / SECOND,
                kills: self.world.kills,
                power_cuts: self.world.power_cuts,
                catalogues_lost: self.world.catalogues_lost,
                kills_within: self.world.kills_within,
                kills_between: self.world.kills_between,
                link_cuts: self.link_cuts,
                orders: self.operators.ordered,
                orders_done: self.operators.succeeded,
                points: self.seen.points,
                points_read: self.seen.read,
                restored,
                starts,
                excused_overlaps: self.seen.excused.len() as u64,
                datagrams,
                datagrams_dropped,
                batch_bytes,
                repeated_bytes,
                memory: self.seen.memory,
            },
        }
    }
}
