//! Operators who order things of sites, at bad moments.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};

use farhaven::site::view::Phase;
use rand::Rng;

use super::orders::{Order, perform};
use super::terms::Terms;
use super::world::{GROUPED, GUESTS, SECOND, World};

/// After an operator decided against what the other site may do, that site may
/// run the guest until it hears of it: so long after both can speak again.
const HEARS_WITHIN: u64 = 30 * SECOND;
/// A link that carried for so long has a connection, and both know so.
const SETTLED: u64 = 15 * SECOND;

/// How often an operator who looks at a guest that is held for a move, and whose
/// fate is not known, has it taken back by force.
const TAKEN_BACK: f64 = 0.3;

/// An order under way, or done.
#[derive(Debug)]
struct Given {
    order: Order,
    side: usize,
    guest: u32,
    process: u64,
    /// It is a person's decision against what the other site may know.
    overrides: bool,
    done: Option<u64>,
}

impl Given {
    fn concerns(&self, guest: u32) -> bool {
        match self.order.of_group() {
            true => GROUPED.contains(&guest),
            false => self.guest == guest,
        }
    }
}

/// All orders of a run.
pub struct Operators {
    given: Vec<Given>,
    answers: Receiver<(usize, Result<String, String>)>,
    answer: Sender<(usize, Result<String, String>)>,
    pub ordered: u64,
    pub succeeded: u64,
}

impl Operators {
    pub fn new() -> Operators {
        let (answer, answers) = channel();
        Operators {
            given: Vec::new(),
            answers,
            answer,
            ordered: 0,
            succeeded: 0,
        }
    }

    /// Orders something of a site.
    pub fn order(&mut self, world: &World, side: usize, guest: u32, order: Order) {
        let Some(process) = &world.hosts[side].process else {
            return;
        };
        // By force with the link up: the other site is made to stop it first.
        let overrides = order.decides() && !(order.by_force() && world.whole_for(SETTLED));
        let (at, answer) = (self.given.len(), self.answer.clone());
        self.given.push(Given {
            order,
            side,
            guest,
            process: process.number,
            overrides,
            done: None,
        });
        self.ordered += 1;
        let (site, name) = (process.site.clone(), format!("g{guest}"));
        let peer = world.hosts[1 - side].name.clone();
        let (room, number) = (world.room.clone(), process.number);
        process.runtime.spawn(async move {
            let done = perform(&site, &name, &peer, order).await;
            // One that died within its work answers nobody.
            if room.is_alive(number) {
                let _ = answer.send((at, done));
            }
        });
    }

    /// Takes in what came of orders; each in words.
    pub fn listen(&mut self, world: &World, terms: &mut Terms) -> Vec<String> {
        let mut words = Vec::new();
        while let Ok((at, outcome)) = self.answers.try_recv() {
            let given = &mut self.given[at];
            given.done = Some(world.now);
            self.succeeded += u64::from(outcome.is_ok());
            let (guest, order) = (given.guest, given.order);
            if outcome.is_err() && given.overrides {
                // Unless it was refused only after its term was taken.
                terms.look(world, given.side);
                let mut guests = (0..GUESTS).filter(|guest| given.concerns(*guest));
                given.overrides = guests.any(|guest| terms.owns(world, given.side, guest));
            }
            words.push(match outcome {
                Ok(done) => format!("g{guest}: {order:?}: done {done}"),
                Err(why) => format!("g{guest}: {order:?}: refused: {why}"),
            });
        }
        words
    }

    /// The link was cut, or a site killed: a decision under way finds the other
    /// site silent, and what a killed site was told is done as far as it is.
    pub fn disturbed(&mut self, world: &World) {
        let lives = |process: u64| {
            let mut live = world.hosts.iter().filter_map(|host| host.process.as_ref());
            live.any(|live| live.number == process)
        };
        for given in self.given.iter_mut().filter(|given| given.done.is_none()) {
            given.overrides |= given.order.decides();
            if !lives(given.process) && !given.order.outlives_its_daemon() {
                given.done = Some(world.now);
            }
        }
    }

    /// Whether a person's decision explains that this guest runs twice now.
    pub fn overrode(&self, world: &World, guest: u32) -> bool {
        let decided = self
            .given
            .iter()
            .filter(|given| given.overrides && given.concerns(guest));
        decided.into_iter().any(|given| match given.done {
            None => true,
            Some(done) => {
                let done = done.max(world.room.refuses_until(guest));
                let together = world.whole_since.max(done);
                world.whole_since == u64::MAX
                    || !world.whole_for(0)
                    || together.saturating_add(HEARS_WITHIN) > world.now
            }
        })
    }

    /// A run whose daemon was killed ends under the next one.
    fn end_runs(&mut self, world: &World) {
        let process = |side: usize| world.hosts[side].process.as_ref();
        let orphans = self.given.iter_mut().filter(|given| {
            given.done.is_none()
                && given.order.outlives_its_daemon()
                && process(given.side).is_some_and(|process| process.number != given.process)
        });
        for given in orphans {
            let runs = process(given.side).map(|process| process.site.runs());
            let open = runs.unwrap_or_default();
            if open.iter().all(|run| run.outcome.is_some()) {
                given.done = Some(world.now);
            }
        }
    }

    /// Forgets decisions that both sites have heard of: from then on nothing
    /// explains that a guest runs twice.
    pub fn settle(&mut self, world: &World, terms: &Terms) {
        self.end_runs(world);
        let mut stopped = BTreeSet::new();
        for side in 0..world.hosts.len() {
            let guests = world.view(side).map(|view| view.guests);
            for guest in guests.unwrap_or_default() {
                if matches!(guest.phase, Phase::Fenced | Phase::Moved) {
                    stopped.insert((side, guest.name));
                }
            }
        }
        let whole = world.whole_for(HEARS_WITHIN);
        for given in self.given.iter_mut().filter(|given| given.overrides) {
            let Some(done) = given.done else { continue };
            let mut guests = (0..GUESTS).filter(|guest| given.concerns(*guest));
            let other = 1 - given.side;
            let told = guests.all(|guest| {
                stopped.contains(&(other, format!("g{guest}")))
                    || terms.gave_up(world, other, guest)
            });
            let stops = (0..GUESTS).filter(|guest| given.concerns(*guest));
            let stops = stops.map(|guest| world.room.refuses_until(guest));
            let stops = stops.max().unwrap_or(0);
            // One that did not stop may be told to be fenced, and run on for a while.
            let told = told && (stops == 0 || stops + HEARS_WITHIN <= world.now);
            if told || whole && done.max(stops) + HEARS_WITHIN <= world.now {
                given.overrides = false;
            }
        }
    }

    /// Some order by chance.
    pub fn by_chance(&mut self, world: &mut World, guests: u32) -> String {
        let guest = world.random.random_range(0..guests);
        if let Some(side) = held_at(world, guest)
            && world.random.random_bool(TAKEN_BACK)
        {
            self.order(world, side, guest, Order::TakeBack);
            return format!(
                "{}: g{guest}: {:?}",
                world.hosts[side].name,
                Order::TakeBack
            );
        }
        let order = if world.options.operations && world.random.random_bool(0.6) {
            let grouped = world.grouped && GROUPED.contains(&guest);
            Order::of_operations_by_chance(&mut world.random, grouped)
        } else if world.grouped && world.random.random_bool(0.4) {
            Order::of_group_by_chance(&mut world.random)
        } else {
            Order::by_chance(&mut world.random)
        };
        let runs_at = world.room.runs_at(guest).first().copied();
        let side = match runs_at.filter(|_| world.random.random_bool(0.7)) {
            Some(side) if order.is_for_the_other_site() => 1 - side,
            Some(side) => side,
            None => world.random.random_range(0..world.hosts.len()),
        };
        self.order(world, side, guest, order);
        format!("{}: g{guest}: {order:?}", world.hosts[side].name)
    }
}

/// The site where this guest stands still for a move, by that site's word.
fn held_at(world: &World, guest: u32) -> Option<usize> {
    let name = format!("g{guest}");
    (0..world.hosts.len()).find(|side| {
        let guests = world.view(*side).map(|view| view.guests);
        let mut guests = guests.unwrap_or_default().into_iter();
        guests.any(|guest| guest.name == name && guest.phase == Phase::Held)
    })
}
