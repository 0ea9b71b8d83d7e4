//! Performs a plan's rule on guests that write as they do, not as was measured.
//!
//! Each guest is copied in rounds, as the real engine does: a round takes all that
//! is dirty at its start, and what is written meanwhile is the next one's. Writes
//! come in bursts. A group is cut at the end of a round, when what the round left
//! is little enough. The planner's formulas are not used.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use farhaven_policies::evacuate::{Facts, GuestFacts, Plan};

use super::sites::Random;

/// Seconds that finding the dirty pages takes after each round.
const SCAN: f64 = 0.01;
const MOST_ROUNDS: usize = 30;

/// How a guest really writes.
#[derive(Debug, Clone)]
pub(crate) struct Truth {
    dirty: f64,
    set: f64,
    cold: f64,
    hot: f64,
    /// Writes come in bursts: for half of this time more, for half of it less.
    period: f64,
    phase: f64,
}

impl Truth {
    pub(crate) fn of(random: &mut Random, guest: &GuestFacts) -> Truth {
        let (remaining, set) = (guest.remaining as f64, guest.working_set as f64);
        let hot = remaining.min(set);
        Truth {
            dirty: guest.dirty_rate as f64,
            set,
            cold: remaining - hot,
            hot,
            period: random.scale(0.2, 20.0),
            phase: random.unit(),
        }
    }

    /// Bytes written from the start until `time`, however often to the same place.
    fn written(&self, time: f64) -> f64 {
        let turns = time / self.period + self.phase;
        let burst = |turns: f64| {
            let part = turns.fract();
            turns.floor()
                + if part < 0.5 {
                    1.6 * part
                } else {
                    0.8 + 0.4 * (part - 0.5)
                }
        };
        self.dirty * self.period * (burst(turns) - burst(self.phase))
    }

    /// Dirty bytes at `until`, when there were `dirty` at `from`.
    fn dirtied(&self, dirty: f64, from: f64, until: f64, slowed: f64) -> f64 {
        if self.set <= 0.0 {
            return dirty;
        }
        let written = (self.written(until) - self.written(from)) * slowed;
        self.set - (self.set - dirty) * (-written / self.set).exp()
    }
}

/// Which groups a link serves first: the rule that `Plan` states.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    turn: Vec<usize>,
    urgent_from: Vec<f64>,
}

impl Rule {
    /// By turn alone, in this order of groups.
    pub(crate) fn in_order(order: &[usize]) -> Rule {
        let mut turn = vec![0; order.len()];
        for (place, group) in order.iter().enumerate() {
            turn[*group] = place;
        }
        Rule {
            urgent_from: vec![f64::INFINITY; order.len()],
            turn,
        }
    }

    /// What a plan says; groups that it leaves have no turn.
    pub(crate) fn of(facts: &Facts, plan: &Plan) -> Rule {
        let places: HashMap<_, _> = facts
            .groups
            .iter()
            .enumerate()
            .map(|(place, group)| (group.name.as_str(), place))
            .collect();
        let mut rule = Rule {
            turn: vec![usize::MAX; facts.groups.len()],
            urgent_from: vec![f64::INFINITY; facts.groups.len()],
        };
        for passage in plan.waves.iter().flat_map(|wave| &wave.groups) {
            let place = places[passage.group.as_str()];
            rule.turn[place] = passage.turn;
            rule.urgent_from[place] = passage.urgent_from.as_secs_f64();
        }
        rule
    }
}

/// What happened.
#[derive(Debug, Clone)]
pub(crate) struct Happened {
    /// When everything that has a turn ran and was healthy; infinite if something never did.
    pub(crate) finish: f64,
    /// Bytes that crossed.
    pub(crate) bytes: f64,
    /// Guests that ran nowhere for longer than their policy says.
    pub(crate) blackouts_over: usize,
    /// Guests that started before what they wait for was healthy.
    pub(crate) out_of_order: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Round { left: f64 },
    Scanning { until: f64 },
    Holding,
    Cutting { left: f64 },
    Over { at: f64 },
}

struct Group {
    phase: Phase,
    rounds: usize,
    /// Since when what is written is not in the round, and what was dirty then.
    since: f64,
    dirty: Vec<f64>,
    taken_last: f64,
    slowed: f64,
    starts: Vec<(f64, f64)>,
    waits: BTreeSet<(usize, usize)>,
    cap: f64,
    link: usize,
    rate: f64,
    at: f64,
    cut_at: f64,
}

/// Performs.
pub(crate) fn simulate(facts: &Facts, truth: &[Vec<Truth>], rule: &Rule) -> Happened {
    Simulation::new(facts, truth, rule).run()
}

struct Simulation<'a> {
    facts: &'a Facts,
    truth: &'a [Vec<Truth>],
    rule: &'a Rule,
    groups: Vec<Group>,
    rates: Vec<f64>,
    queues: Vec<BTreeSet<(u8, u64, usize)>>,
    served: Vec<Vec<usize>>,
    changed: Vec<bool>,
    /// What happens by itself at its time: a scan ends, a guest is healthy, urgency comes.
    later: BTreeMap<(u64, usize), Vec<usize>>,
    now: f64,
    bytes: f64,
}

/// Times in order as whole numbers: a positive float's bits grow with it.
fn key(time: f64) -> u64 {
    time.max(0.0).to_bits()
}

impl<'a> Simulation<'a> {
    fn new(facts: &'a Facts, truth: &'a [Vec<Truth>], rule: &'a Rule) -> Simulation<'a> {
        let rates: Vec<f64> = facts.links.iter().map(|link| link.rate as f64).collect();
        let mut homes = HashMap::new();
        for (group, of) in facts.groups.iter().enumerate() {
            for (guest, of) in of.guests.iter().enumerate() {
                homes.insert(of.name.as_str(), (group, guest));
            }
        }
        let groups = facts
            .groups
            .iter()
            .zip(truth)
            .enumerate()
            .map(|(index, (group, truth))| {
                let link = facts
                    .links
                    .iter()
                    .position(|link| link.peer == group.peer)
                    .expect("made-up groups go where a link leads");
                let share = rates[link] * f64::from(group.share) / 100.0;
                let mut starts: Vec<(f64, f64)> = Vec::new();
                let mut waits = BTreeSet::new();
                // Guests of a group wait only for such as are before them.
                for guest in &group.guests {
                    let mut from = 0.0f64;
                    for home in guest
                        .after
                        .iter()
                        .filter_map(|name| homes.get(name.as_str()))
                    {
                        if home.0 == index {
                            from = from.max(starts[home.1].1);
                        } else {
                            waits.insert(*home);
                        }
                    }
                    let runs = from + guest.start.as_secs_f64();
                    starts.push((runs, runs + guest.healthy.as_secs_f64()));
                }
                Group {
                    phase: Phase::Holding,
                    rounds: 0,
                    since: 0.0,
                    dirty: truth.iter().map(|truth| truth.hot).collect(),
                    taken_last: f64::INFINITY,
                    slowed: 1.0,
                    starts,
                    waits,
                    cap: group.rate_cap.map_or(share, |cap| share.min(cap as f64)),
                    link,
                    rate: 0.0,
                    at: 0.0,
                    cut_at: f64::INFINITY,
                }
            });
        Simulation {
            facts,
            truth,
            rule,
            groups: groups.collect(),
            queues: vec![BTreeSet::new(); rates.len()],
            served: vec![Vec::new(); rates.len()],
            changed: vec![true; rates.len()],
            rates,
            later: BTreeMap::new(),
            now: 0.0,
            bytes: 0.0,
        }
    }

    fn run(mut self) -> Happened {
        for index in 0..self.groups.len() {
            if self.rule.turn[index] != usize::MAX {
                // Nothing is taken before the first byte is to cross: see `enter`.
                self.groups[index].phase = Phase::Round { left: f64::NAN };
                self.enter(index);
                let from = self.rule.urgent_from[index];
                if from > 0.0 && from.is_finite() {
                    self.at(from, index);
                }
            }
        }
        loop {
            (0..self.rates.len()).for_each(|link| self.share(link));
            let reached = self
                .served
                .iter()
                .flatten()
                .map(|index| (self.now + self.time_left(*index), *index))
                .min_by(|a, b| a.0.total_cmp(&b.0));
            let event = self
                .later
                .first_key_value()
                .map(|(key, _)| f64::from_bits(key.0));
            match (reached, event) {
                (Some((at, index)), event) if event.is_none_or(|event| at <= event) => {
                    self.now = at;
                    self.advance(index);
                    self.leave(index);
                    self.sent(index);
                }
                (_, Some(event)) => {
                    self.now = event;
                    let woken = self.later.pop_first().map(|(_, who)| who);
                    for index in woken.into_iter().flatten() {
                        self.woken(index);
                    }
                }
                _ => break,
            }
        }
        self.happened()
    }

    fn at(&mut self, time: f64, index: usize) {
        self.later
            .entry((key(time), index))
            .or_default()
            .push(index);
    }

    fn place(&self, index: usize) -> (u8, u64, usize) {
        if matches!(self.groups[index].phase, Phase::Cutting { .. }) {
            (0, self.rule.turn[index] as u64, index)
        } else if self.rule.urgent_from[index] <= self.now {
            (1, key(self.rule.urgent_from[index]), index)
        } else {
            (2, self.rule.turn[index] as u64, index)
        }
    }

    fn enter(&mut self, index: usize) {
        let (place, link) = (self.place(index), self.groups[index].link);
        self.queues[link].insert(place);
        self.changed[link] = true;
    }

    fn leave(&mut self, index: usize) {
        let link = self.groups[index].link;
        self.queues[link].retain_one(index, self.rule, self.now);
        self.changed[link] = true;
    }

    /// Serves a link's groups by the rule.
    fn share(&mut self, link: usize) {
        if !std::mem::take(&mut self.changed[link]) {
            return;
        }
        for index in std::mem::take(&mut self.served[link]) {
            self.advance(index);
            self.groups[index].rate = 0.0;
        }
        let mut free = self.rates[link];
        let queue: Vec<usize> = {
            let mut taken = Vec::new();
            for (_, _, index) in &self.queues[link] {
                if free <= self.rates[link] * 1e-6 {
                    break;
                }
                free -= self.groups[*index].cap.min(free);
                taken.push(*index);
            }
            taken
        };
        let mut free = self.rates[link];
        for index in &queue {
            let rate = self.groups[*index].cap.min(free);
            free -= rate;
            self.groups[*index].rate = rate;
            self.groups[*index].at = self.now;
            if matches!(self.groups[*index].phase, Phase::Round { left } if left.is_nan()) {
                self.take(*index);
            }
        }
        self.served[link] = queue;
    }

    fn time_left(&self, index: usize) -> f64 {
        let group = &self.groups[index];
        match group.phase {
            Phase::Round { left } | Phase::Cutting { left } => {
                (left / group.rate - (self.now - group.at)).max(0.0)
            }
            _ => 0.0,
        }
    }

    /// Counts what crossed.
    fn advance(&mut self, index: usize) {
        let now = self.now;
        let group = &mut self.groups[index];
        let sent = group.rate * (now - group.at);
        group.at = now;
        if let Phase::Round { left } | Phase::Cutting { left } = &mut group.phase {
            let sent = sent.min(*left);
            *left -= sent;
            self.bytes += sent;
        }
    }

    /// Dirty bytes now that are not in a round.
    fn dirty(&self, index: usize) -> f64 {
        let group = &self.groups[index];
        let guests = self.truth[index].iter().zip(&group.dirty);
        guests
            .map(|(truth, dirty)| truth.dirtied(*dirty, group.since, self.now, group.slowed))
            .sum()
    }

    /// Takes all that is dirty into a round.
    fn take(&mut self, index: usize) {
        let mut taken = self.dirty(index);
        let group = &mut self.groups[index];
        if group.rounds == 0 {
            taken += self.truth[index]
                .iter()
                .map(|truth| truth.cold)
                .sum::<f64>();
        }
        group.rounds += 1;
        group.phase = Phase::Round { left: taken };
        group.dirty.fill(0.0);
        group.since = self.now;
        group.taken_last = taken;
    }

    /// A round or a cut is over there.
    fn sent(&mut self, index: usize) {
        let now = self.now;
        match self.groups[index].phase {
            Phase::Cutting { .. } => {
                self.groups[index].phase = Phase::Over { at: now };
                let starts = self.groups[index].starts.clone();
                for (_, healthy) in starts {
                    // Whoever waits for it looks then.
                    self.at(now + healthy, usize::MAX - 1);
                }
            }
            _ => {
                let until = now + SCAN;
                self.groups[index].phase = Phase::Scanning { until };
                self.at(until, index);
            }
        }
    }

    fn woken(&mut self, index: usize) {
        if index >= self.groups.len() {
            // Somebody became healthy.
            for index in 0..self.groups.len() {
                if self.groups[index].phase == Phase::Holding && self.rule.turn[index] != usize::MAX
                {
                    self.decide(index);
                }
            }
            return;
        }
        match self.groups[index].phase {
            Phase::Scanning { until } if until <= self.now => self.decide(index),
            Phase::Round { .. } => {
                // Urgent from now on.
                self.leave(index);
                self.enter(index);
            }
            _ => {}
        }
    }

    /// After a round: cut, hold, or another round.
    fn decide(&mut self, index: usize) {
        let healthy = |(group, guest): &(usize, usize)| match self.groups[*group].phase {
            Phase::Over { at } => at + self.groups[*group].starts[*guest].1 <= self.now + 1e-9,
            _ => false,
        };
        let free = self.groups[index].waits.iter().all(healthy);
        let left = self.dirty(index);
        let group = &self.groups[index];
        let rate = group.cap.min(self.rates[group.link]);
        let guests = self.facts.groups[index].guests.iter().zip(&group.starts);
        let budget = guests
            .map(|(guest, (runs, _))| guest.max_blackout.as_secs_f64() - runs)
            .fold(f64::INFINITY, f64::min);
        let little = left <= rate * budget.max(2.0 * SCAN);
        let stuck = group.rounds > 1 && left > 0.8 * group.taken_last;
        let group = &mut self.groups[index];
        if little || group.rounds >= MOST_ROUNDS || (stuck && group.slowed < 1.0) {
            if !free {
                group.phase = Phase::Holding;
                // What is written while it waits says nothing about its rounds.
                group.taken_last = f64::INFINITY;
                return;
            }
            group.phase = Phase::Cutting { left };
            group.cut_at = self.now;
        } else {
            if stuck {
                let percent = self.facts.groups[index].guests[0].max_throttle;
                group.slowed = f64::from(100 - percent) / 100.0;
            }
            group.phase = Phase::Round { left: f64::NAN };
        }
        self.enter(index);
    }

    fn happened(self) -> Happened {
        let over = |index: usize| match self.groups[index].phase {
            Phase::Over { at } => at,
            _ => f64::INFINITY,
        };
        let (mut blackouts_over, mut out_of_order) = (0, 0);
        for (index, group) in self.groups.iter().enumerate() {
            let guests = self.facts.groups[index].guests.iter();
            for (guest, (runs, _)) in guests.zip(&group.starts) {
                let blackout = over(index) + runs - group.cut_at;
                blackouts_over += usize::from(blackout > guest.max_blackout.as_secs_f64() * 1.01);
            }
            let early = |(on, guest): &&(usize, usize)| {
                over(*on) + self.groups[*on].starts[*guest].1 > group.cut_at + 1e-6
            };
            out_of_order += group.waits.iter().filter(early).count();
        }
        let healthy = |index: usize| {
            let spans = self.groups[index].starts.iter().map(|start| start.1);
            over(index) + spans.fold(0.0, f64::max)
        };
        let healthy_at: Vec<f64> = (0..self.groups.len()).map(healthy).collect();
        let turns = (0..self.groups.len()).filter(|index| self.rule.turn[*index] != usize::MAX);
        Happened {
            finish: turns.map(|index| healthy_at[index]).fold(0.0, f64::max),
            bytes: self.bytes,
            blackouts_over,
            out_of_order,
        }
    }
}

/// Takes a group out of a queue, whatever place it had.
trait RetainOne {
    fn retain_one(&mut self, index: usize, rule: &Rule, now: f64);
}

impl RetainOne for BTreeSet<(u8, u64, usize)> {
    fn retain_one(&mut self, index: usize, rule: &Rule, _: f64) {
        self.remove(&(0, rule.turn[index] as u64, index));
        self.remove(&(1, key(rule.urgent_from[index]), index));
        self.remove(&(2, rule.turn[index] as u64, index));
    }
}
