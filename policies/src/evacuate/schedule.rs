//! Runs an order of groups over the links, event by event, in closed form.
//!
//! Each link serves what is being cut, then what is urgent, then the rest by
//! turn: the rule that [`super::Plan`] states for whoever performs it.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};

use super::bytes::Load;
use super::units::{NEVER, Site};

/// Where writes are faster than this part of the rate, rounds hardly shrink: a move
/// throttles the guest then, as [`crate::decide::next_move_step`] does.
const SLOW: f64 = 0.8;

/// A group that holds is copied again when so many times what it may be cut with is left...
const TOP_UP: f64 = 2.0;
/// ...where no more than this hold.
const MOST_TOPPED_UP: usize = 64;

/// An order to try.
#[derive(Debug, Clone)]
pub(super) struct Order {
    /// The turn of each unit.
    pub(super) turn: Vec<usize>,
    /// From when each goes before the rest.
    pub(super) urgent_from: Vec<f64>,
}

/// What became of a unit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    pub(super) copy_from: f64,
    pub(super) cut_at: f64,
    /// The last byte is over there.
    pub(super) over_at: f64,
    /// All guests healthy.
    pub(super) done: f64,
    pub(super) sent: f64,
    /// Writes had to be throttled.
    pub(super) throttled: bool,
}

/// An order and how it ends.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) order: Order,
    pub(super) outcomes: Vec<Outcome>,
    pub(super) finish: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Copied while it runs.
    Copying,
    /// Little is left; it waits for others to be healthy.
    Holding,
    /// Stopped; its last bytes cross.
    Cutting,
    Over,
}

#[derive(Debug, Clone, Copy)]
struct State {
    phase: Phase,
    load: Load,
    /// When `load` was true.
    at: f64,
    rate: f64,
    /// It may be cut when so little is left.
    tail: f64,
    waits: usize,
    outcome: Outcome,
}

/// Something that happens at its time.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Event {
    at: f64,
    unit: usize,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// One of those that the unit waits for is healthy.
    Healthy,
    /// The unit becomes urgent.
    Urgent,
}

impl Eq for Event {}

impl Ord for Event {
    fn cmp(&self, other: &Event) -> Ordering {
        // The earliest first: the heap gives its greatest.
        let by_time = other.at.total_cmp(&self.at);
        by_time.then_with(|| other.unit.cmp(&self.unit))
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Event) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Place in a link's queue: class, then order within it.
type Place = (u8, usize, usize);

struct Link {
    rate: f64,
    queue: BTreeSet<Place>,
    /// Those that get something now.
    served: Vec<usize>,
    /// The next of them to get where it must, and when.
    next: Option<(f64, usize)>,
    changed: bool,
}

struct Running<'a> {
    site: &'a Site<'a>,
    order: &'a Order,
    urgency: Vec<usize>,
    urgent: Vec<bool>,
    states: Vec<State>,
    links: Vec<Link>,
    events: BinaryHeap<Event>,
    /// Units that hold.
    holding: BTreeSet<usize>,
    now: f64,
}

/// Runs an order to its end. What can never end is done at [`NEVER`].
pub(super) fn run(site: &Site<'_>, order: Order) -> Run {
    let mut running = Running::new(site, &order);
    // Each unit starts, is urgent, holds, is cut and ends once; each releases its followers.
    let edges: usize = site.units.iter().map(|unit| unit.followers.len()).sum();
    let limit = 128 * (site.units.len() + edges) + 64;
    for _ in 0..limit {
        if !running.step() {
            break;
        }
    }
    let outcomes: Vec<_> = running.states.iter().map(|state| state.outcome).collect();
    let finish = outcomes
        .iter()
        .map(|outcome| outcome.done)
        .fold(0.0, f64::max);
    Run {
        order,
        outcomes,
        finish,
    }
}

impl<'a> Running<'a> {
    fn new(site: &'a Site<'a>, order: &'a Order) -> Running<'a> {
        let never = Outcome {
            copy_from: NEVER,
            cut_at: NEVER,
            over_at: NEVER,
            done: NEVER,
            sent: 0.0,
            throttled: false,
        };
        let states = site.units.iter().map(|unit| State {
            phase: Phase::Copying,
            load: unit.load,
            at: 0.0,
            rate: 0.0,
            tail: unit.tail,
            waits: unit.waits_for,
            outcome: never,
        });
        let links = site.rates.iter().map(|rate| Link {
            rate: *rate,
            queue: BTreeSet::new(),
            served: Vec::new(),
            next: None,
            changed: true,
        });
        let mut by_urgency: Vec<usize> = (0..site.units.len()).collect();
        by_urgency.sort_by(|a, b| {
            let times = order.urgent_from[*a].total_cmp(&order.urgent_from[*b]);
            times.then(order.turn[*a].cmp(&order.turn[*b]))
        });
        let mut urgency = vec![0; site.units.len()];
        for (place, unit) in by_urgency.iter().enumerate() {
            urgency[*unit] = place;
        }
        let mut running = Running {
            site,
            order,
            urgency,
            urgent: vec![false; site.units.len()],
            states: states.collect(),
            links: links.collect(),
            events: BinaryHeap::new(),
            holding: BTreeSet::new(),
            now: 0.0,
        };
        for unit in 0..site.units.len() {
            let from = order.urgent_from[unit];
            running.urgent[unit] = from <= 0.0;
            if from > 0.0 && from < NEVER {
                running.events.push(Event {
                    at: from,
                    unit,
                    kind: Kind::Urgent,
                });
            }
            let place = running.place(unit);
            running.links[site.units[unit].link].queue.insert(place);
        }
        running
    }

    /// Where a unit stands in its link's queue.
    fn place(&self, unit: usize) -> Place {
        if self.states[unit].phase == Phase::Cutting {
            (0, self.order.turn[unit], unit)
        } else if self.urgent[unit] {
            (1, self.urgency[unit], unit)
        } else {
            (2, self.order.turn[unit], unit)
        }
    }

    /// Goes on to the next thing that happens; false when nothing does any more.
    fn step(&mut self) -> bool {
        for link in 0..self.links.len() {
            self.share(link);
        }
        let reached = (0..self.links.len())
            .filter_map(|link| self.links[link].next)
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let event = self.events.peek().copied();
        match (reached, event) {
            (Some((at, unit)), event) if event.is_none_or(|event| at <= event.at) => {
                self.reached(unit, at);
            }
            (_, Some(event)) => {
                self.events.pop();
                self.happened(event);
            }
            _ => return false,
        }
        true
    }

    /// Gives a link's rate to those who stand first.
    fn share(&mut self, index: usize) {
        let (now, link) = (self.now, &mut self.links[index]);
        if !std::mem::take(&mut link.changed) {
            return;
        }
        for unit in link.served.drain(..) {
            let state = &mut self.states[unit];
            state.bring(now);
            state.rate = 0.0;
        }
        let (mut free, mut next) = (link.rate, None::<(f64, usize)>);
        for (_, _, index) in &link.queue {
            // Crumbs would only make more events.
            if free <= link.rate * 1e-6 {
                break;
            }
            let (unit, state) = (&self.site.units[*index], &mut self.states[*index]);
            let most = unit.cap.min(link.rate);
            let rate = most.min(free);
            free -= rate;
            state.bring(now);
            state.rate = rate;
            if state.outcome.copy_from >= NEVER {
                state.outcome.copy_from = now;
                if state.load.left() > state.tail {
                    state.load.begin();
                }
            }
            link.served.push(*index);
            let mut left = state.time_left();
            let hardly = state.load.dirty > SLOW * rate && state.load.set > state.tail;
            if (left.is_none() || hardly) && rate > 0.99 * most && !state.outcome.throttled {
                state.throttle(unit.throttle);
                left = state.time_left();
            }
            if let Some(left) = left
                && next.is_none_or(|(at, _)| now + left < at)
            {
                next = Some((now + left, *index));
            }
        }
        link.next = next;
    }

    /// A unit has no more left than it must have.
    fn reached(&mut self, unit: usize, at: f64) {
        self.now = at;
        let (place, link) = (self.place(unit), self.site.units[unit].link);
        self.links[link].queue.remove(&place);
        let state = &mut self.states[unit];
        state.bring(at);
        match state.phase {
            Phase::Copying if state.waits > 0 => {
                state.phase = Phase::Holding;
                self.holding.insert(unit);
            }
            Phase::Copying => self.cut(unit),
            Phase::Cutting => {
                state.phase = Phase::Over;
                state.outcome.over_at = at;
                state.outcome.done = at + self.site.units[unit].span;
                for (follower, delay) in &self.site.units[unit].followers {
                    self.events.push(Event {
                        at: at + delay,
                        unit: *follower,
                        kind: Kind::Healthy,
                    });
                }
            }
            Phase::Holding | Phase::Over => {}
        }
        self.links[link].changed = true;
    }

    fn cut(&mut self, unit: usize) {
        let state = &mut self.states[unit];
        state.phase = Phase::Cutting;
        state.outcome.cut_at = self.now;
        state.outcome.copy_from = state.outcome.copy_from.min(self.now);
        let place = self.place(unit);
        let link = &mut self.links[self.site.units[unit].link];
        link.queue.insert(place);
        link.changed = true;
    }

    fn copy_again(&mut self, unit: usize) {
        self.states[unit].phase = Phase::Copying;
        let (place, link) = (self.place(unit), self.site.units[unit].link);
        self.links[link].queue.insert(place);
        self.links[link].changed = true;
    }

    /// Whoever holds is copied again now and then, so that little is left when its time comes.
    fn top_up(&mut self) {
        if self.holding.len() > MOST_TOPPED_UP {
            return;
        }
        for unit in self.holding.clone() {
            let state = &mut self.states[unit];
            state.bring(self.now);
            if state.load.left() > TOP_UP * state.tail {
                self.holding.remove(&unit);
                self.copy_again(unit);
            }
        }
    }

    fn happened(&mut self, event: Event) {
        self.now = event.at;
        let unit = event.unit;
        let link = self.site.units[unit].link;
        match event.kind {
            Kind::Healthy => {
                let state = &mut self.states[unit];
                state.waits = state.waits.saturating_sub(1);
                if state.waits == 0 && self.holding.remove(&unit) {
                    state.bring(event.at);
                    if state.load.left() <= state.tail {
                        self.cut(unit);
                    } else {
                        self.copy_again(unit);
                    }
                }
                self.top_up();
            }
            Kind::Urgent => {
                let place = self.place(unit);
                let queued = self.links[link].queue.remove(&place);
                self.urgent[unit] = true;
                if queued {
                    let place = self.place(unit);
                    self.links[link].queue.insert(place);
                    self.links[link].changed = true;
                }
            }
        }
    }
}

impl State {
    /// Counts what was copied and written up to `now`.
    fn bring(&mut self, now: f64) {
        let time = (now - self.at).max(0.0);
        self.at = now;
        if time == 0.0 {
            return;
        }
        match self.phase {
            Phase::Copying => self.load = self.load.after(time, self.rate),
            Phase::Holding => self.load = self.load.after(time, 0.0),
            Phase::Cutting => {
                let left = (self.load.left() - self.rate * time).max(0.0);
                (self.load.cold, self.load.hot) = (left, 0.0);
            }
            Phase::Over => return,
        }
        if self.phase != Phase::Holding {
            self.outcome.sent += self.rate * time;
        }
    }

    /// Until it may be cut, or is over; `None` if never at its rate.
    fn time_left(&self) -> Option<f64> {
        match self.phase {
            Phase::Cutting if self.load.left() <= 0.0 => Some(0.0),
            Phase::Cutting => (self.rate > 0.0).then(|| self.load.left() / self.rate),
            _ => self.load.time_to(self.tail, self.rate),
        }
    }

    /// Writes outrun the link: they are slowed down, and the cut takes what even so is left.
    fn throttle(&mut self, percent: u8) {
        self.load = self.load.throttled(percent);
        self.outcome.throttled = true;
        self.tail = self.tail.max(self.load.floor(self.rate) * 1.05 + 1.0);
    }
}
