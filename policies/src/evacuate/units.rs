//! Facts -> numbers: groups as units of scheduling, checked, with their chains.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use super::bytes::Load;
use super::{Facts, GroupFacts, MOST_GUESTS, PlanError};

/// A cut is not made finer than this: shorter than what a round costs anyway.
const SHORTEST_TAIL: f64 = 0.02;
/// Stands for a time that never comes. Finite, so that sums stay numbers.
pub(super) const NEVER: f64 = 1e15;

/// Seconds as a span, the longest where they do not fit.
pub(super) fn span(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

/// A group as the scheduler sees it. Times in seconds, rates in bytes a second.
#[derive(Debug, Clone)]
pub(super) struct Unit {
    /// Its place in [`Site::groups`].
    pub(super) group: usize,
    /// Index of its link.
    pub(super) link: usize,
    /// What it has to copy now.
    pub(super) load: Load,
    /// Most that it gets of its link.
    pub(super) cap: f64,
    /// It may be cut when so many bytes are left.
    pub(super) tail: f64,
    /// Percent of time that its guests may lose.
    pub(super) throttle: u8,
    /// From its last byte until all its guests are healthy.
    pub(super) span: f64,
    /// From its last byte until the last of its guests runs.
    pub(super) runs: f64,
    /// Shortest blackout that one of its guests must keep.
    pub(super) max_blackout: f64,
    /// Units that wait for it, and from its last byte how long.
    pub(super) followers: Vec<(usize, f64)>,
    /// How many units it waits for.
    pub(super) waits_for: usize,
    /// From its last byte until everything that waits for it is healthy, at best.
    pub(super) rest: f64,
    /// The highest priority of its own and of what waits for it.
    pub(super) priority: u8,
}

/// Everything that is to be moved.
#[derive(Debug, Clone)]
pub(super) struct Site<'a> {
    pub(super) groups: &'a [GroupFacts],
    /// In an order in which nothing stands before what it waits for.
    pub(super) units: Vec<Unit>,
    /// Bytes a second of each link.
    pub(super) rates: Vec<f64>,
}

impl<'a> Site<'a> {
    /// Checks facts, and takes from them what scheduling needs.
    pub(super) fn new(facts: &'a Facts) -> Result<Site<'a>, PlanError> {
        let homes = homes(facts)?;
        let mut rates = Vec::new();
        let mut links = HashMap::new();
        for link in &facts.links {
            if links.insert(link.peer.as_str(), rates.len()).is_some() {
                return Err(twice("link to", &link.peer));
            }
            rates.push(link.rate as f64);
        }
        // Groups without a link are on one that carries nothing.
        rates.push(0.0);
        let mut units = Vec::with_capacity(facts.groups.len());
        let mut edges = Vec::with_capacity(facts.groups.len());
        let mut offsets = HashMap::new();
        for (index, group) in facts.groups.iter().enumerate() {
            let starts = starts(facts, group)?;
            let link = links
                .get(group.peer.as_str())
                .copied()
                .unwrap_or(rates.len() - 1);
            units.push(unit(index, group, link, rates[link], &starts));
            let mut waits = BTreeSet::new();
            for (guest, (_, healthy)) in group.guests.iter().zip(&starts) {
                offsets.insert(guest.name.as_str(), *healthy);
                for after in guest
                    .after
                    .iter()
                    .filter(|name| !facts.moved.contains(*name))
                {
                    let home =
                        *homes
                            .get(after.as_str())
                            .ok_or_else(|| PlanError::UnknownGuest {
                                guest: guest.name.clone(),
                                after: after.clone(),
                            })?;
                    if home != index {
                        waits.insert((home, after.as_str()));
                    }
                }
            }
            edges.push(waits);
        }
        for (index, waits) in edges.iter().enumerate() {
            let mut delays = BTreeMap::new();
            for (home, guest) in waits {
                let delay = delays.entry(*home).or_insert(0.0f64);
                *delay = delay.max(offsets.get(guest).copied().unwrap_or_default());
            }
            units[index].waits_for = delays.len();
            for (home, delay) in delays {
                units[home].followers.push((index, delay));
            }
        }
        let order = sorted(units.len(), |of| {
            units[of].followers.iter().map(|(unit, _)| *unit).collect()
        })
        .map_err(|cycle| PlanError::Cycle {
            names: names(&cycle, &facts.groups),
        })?;
        let mut site = Site {
            groups: &facts.groups,
            units: renumbered(&units, &order),
            rates,
        };
        site.chains();
        Ok(site)
    }

    /// The group of a unit.
    pub(super) fn group(&self, unit: usize) -> &'a GroupFacts {
        &self.groups[self.units[unit].group]
    }

    /// The same with some of its units only. What they wait for must be among them.
    pub(super) fn only(&self, keep: &[usize]) -> Site<'a> {
        let mut site = Site {
            groups: self.groups,
            units: renumbered(&self.units, keep),
            rates: self.rates.clone(),
        };
        site.chains();
        site
    }

    /// The same over links so many times as fast. Caps that came of a policy stay.
    pub(super) fn faster(&self, factor: f64) -> Site<'a> {
        let mut site = self.clone();
        site.rates.iter_mut().for_each(|rate| *rate *= factor);
        for unit in &mut site.units {
            let group = &self.groups[unit.group];
            unit.cap = cap(group, site.rates[unit.link]);
            unit.tail *= unit.cap / cap(group, self.rates[unit.link]).max(1e-9);
        }
        site
    }

    /// What follows from a unit for those that it waits for.
    fn chains(&mut self) {
        for index in (0..self.units.len()).rev() {
            let unit = &self.units[index];
            let (mut rest, mut priority) = (unit.span, self.groups[unit.group].priority);
            for (after, delay) in &unit.followers {
                let after = &self.units[*after];
                rest = rest.max(delay + after.rest);
                priority = priority.max(after.priority);
            }
            let unit = &mut self.units[index];
            (unit.rest, unit.priority) = (rest, priority);
        }
    }
}

fn cap(group: &GroupFacts, rate: f64) -> f64 {
    let share = rate * f64::from(group.share.clamp(1, 100)) / 100.0;
    group
        .rate_cap
        .map_or(share, |cap| share.min(cap.max(1) as f64))
}

fn unit(index: usize, group: &GroupFacts, link: usize, rate: f64, starts: &[(f64, f64)]) -> Unit {
    let cap = cap(group, rate);
    let (mut load, mut budget) = (Load::default(), f64::INFINITY);
    let (mut span, mut runs, mut throttle) = (0.0f64, 0.0f64, 95);
    let mut max_blackout = f64::INFINITY;
    for (guest, (running, healthy)) in group.guests.iter().zip(starts) {
        load.add(guest.remaining, guest.dirty_rate, guest.working_set);
        let allowed = guest.max_blackout.as_secs_f64();
        budget = budget.min(allowed - running);
        max_blackout = max_blackout.min(allowed);
        (span, runs) = (span.max(*healthy), runs.max(*running));
        throttle = guest.max_throttle.min(throttle);
    }
    let guests: Vec<_> = group
        .guests
        .iter()
        .filter(|guest| guest.dirty_rate > 0)
        .map(|guest| (guest.dirty_rate as f64, guest.working_set as f64))
        .collect();
    load.fit(&guests, load.left() / cap.max(1.0));
    // Half of the budget: the other half is for what a round finds too late.
    let tail = cap * (budget.clamp(0.0, 3600.0) / 2.0).max(SHORTEST_TAIL);
    Unit {
        group: index,
        link,
        load,
        cap,
        tail,
        throttle,
        span,
        runs,
        max_blackout,
        followers: Vec::new(),
        waits_for: 0,
        rest: 0.0,
        priority: group.priority,
    }
}

/// When each guest runs and is healthy after its group's last byte, as they start in order.
fn starts(facts: &Facts, group: &GroupFacts) -> Result<Vec<(f64, f64)>, PlanError> {
    let places: HashMap<_, _> = group
        .guests
        .iter()
        .enumerate()
        .map(|(place, guest)| (guest.name.as_str(), place))
        .collect();
    let waits = |place: usize| {
        group.guests[place]
            .after
            .iter()
            .filter(|name| !facts.moved.contains(*name))
            .filter_map(|name| places.get(name.as_str()).copied())
            .collect::<Vec<_>>()
    };
    let mut order = sorted(group.guests.len(), waits).map_err(|cycle| PlanError::Cycle {
        names: cycle
            .into_iter()
            .map(|place| group.guests[place].name.clone())
            .collect(),
    })?;
    // `sorted` puts what is waited for last.
    order.reverse();
    let mut starts = vec![(0.0, 0.0); group.guests.len()];
    for place in order {
        let guest = &group.guests[place];
        let ready = waits(place)
            .into_iter()
            .map(|before: usize| starts[before].1)
            .fold(0.0, f64::max);
        let running = ready + guest.start.as_secs_f64();
        starts[place] = (running, (running + guest.healthy.as_secs_f64()).min(NEVER));
    }
    Ok(starts)
}

/// Which group each guest is in.
fn homes(facts: &Facts) -> Result<HashMap<&str, usize>, PlanError> {
    let guests: usize = facts.groups.iter().map(|group| group.guests.len()).sum();
    if guests > MOST_GUESTS || facts.groups.len() > MOST_GUESTS {
        return Err(PlanError::TooMany {
            guests: guests.max(facts.groups.len()),
        });
    }
    let (mut homes, mut groups) = (HashMap::with_capacity(guests), HashSet::new());
    for (index, group) in facts.groups.iter().enumerate() {
        if !groups.insert(group.name.as_str()) {
            return Err(twice("group", &group.name));
        }
        for guest in &group.guests {
            if homes.insert(guest.name.as_str(), index).is_some() {
                return Err(twice("guest", &guest.name));
            }
        }
    }
    Ok(homes)
}

fn twice(what: &'static str, name: &str) -> PlanError {
    PlanError::Twice {
        what,
        name: name.to_owned(),
    }
}

fn names(cycle: &[usize], groups: &[GroupFacts]) -> Vec<String> {
    cycle
        .iter()
        .map(|group| groups[*group].name.clone())
        .collect()
}

/// Units by a list of their numbers; edges to those that are not in it go.
fn renumbered(units: &[Unit], keep: &[usize]) -> Vec<Unit> {
    let mut places = vec![None; units.len()];
    for (place, unit) in keep.iter().enumerate() {
        places[*unit] = Some(place);
    }
    let mut kept: Vec<Unit> = keep
        .iter()
        .map(|unit| {
            let mut unit = units[*unit].clone();
            unit.followers = unit
                .followers
                .iter()
                .filter_map(|(after, delay)| places[*after].map(|place| (place, *delay)))
                .collect();
            unit.waits_for = 0;
            unit
        })
        .collect();
    for index in 0..kept.len() {
        for edge in 0..kept[index].followers.len() {
            let (after, _) = kept[index].followers[edge];
            kept[after].waits_for += 1;
        }
    }
    kept
}

/// Numbers sorted so that each stands before all that `after` names for it, or a cycle.
fn sorted(count: usize, after: impl Fn(usize) -> Vec<usize>) -> Result<Vec<usize>, Vec<usize>> {
    let edges: Vec<Vec<usize>> = (0..count).map(after).collect();
    let mut waits = vec![0usize; count];
    edges.iter().flatten().for_each(|to| waits[*to] += 1);
    let mut order: Vec<usize> = (0..count).filter(|of| waits[*of] == 0).collect();
    let mut at = 0;
    while let Some(of) = order.get(at).copied() {
        at += 1;
        for to in &edges[of] {
            waits[*to] -= 1;
            if waits[*to] == 0 {
                order.push(*to);
            }
        }
    }
    if order.len() == count {
        return Ok(order);
    }
    // Each that still waits has one before it that does, too: walking back must meet itself.
    let stuck = |of: usize| waits[of] > 0;
    let mut before = vec![None; count];
    for from in (0..count).filter(|of| stuck(*of)) {
        edges[from].iter().for_each(|to| before[*to] = Some(from));
    }
    let (mut walk, mut seen) = (Vec::new(), HashMap::new());
    let mut at = (0..count).find(|of| stuck(*of));
    while let Some(of) = at {
        if let Some(first) = seen.insert(of, walk.len()) {
            walk.drain(..first);
            break;
        }
        walk.push(of);
        at = before[of];
    }
    walk.reverse();
    Err(walk)
}
