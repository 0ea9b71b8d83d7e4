//! Made-up sites whose evacuation is known to be possible: a hidden schedule is
//! simulated, and the deadline is when it ended, or a little later.

use std::collections::BTreeSet;
use std::time::Duration;

use farhaven_policies::evacuate::{Facts, GroupFacts, GuestFacts, LinkFacts};

use super::simulate::{Rule, Truth, simulate};

/// SplitMix64: seeds that differ by one give streams that have nothing in common.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Each power of ten as likely as another.
    pub(crate) fn scale(&mut self, low: f64, high: f64) -> f64 {
        self.between(low.ln(), high.ln()).exp()
    }

    pub(crate) fn below(&mut self, count: usize) -> usize {
        (self.next() % count.max(1) as u64) as usize
    }

    pub(crate) fn chance(&mut self, of: f64) -> bool {
        self.unit() < of
    }
}

/// A site, what its guests really do, and what is known of it.
pub(crate) struct Made {
    /// As the planner is told: dirty rates are measured, which is not exact.
    pub(crate) facts: Facts,
    /// As it is.
    pub(crate) truth: Vec<Vec<Truth>>,
    /// When the hidden schedule ended.
    pub(crate) hidden: f64,
}

/// Makes a site of so many guests.
pub(crate) fn make(guests: usize, seed: u64) -> Made {
    let mut random = Random(seed);
    let links = 1 + random.below(if guests >= 50 { 3 } else { 2 });
    let mut facts = Facts::default();
    let mut named = 0;
    while named < guests {
        let wanted = if random.chance(0.6) {
            1
        } else {
            2 + random.below(4)
        };
        let count = wanted.min(guests - named);
        let group = group(&mut random, facts.groups.len(), named, count, links);
        named += count;
        facts.groups.push(group);
    }
    chains(&mut random, &mut facts);
    let target = random.scale(120.0, 5400.0);
    rates(&mut random, &mut facts, links, target);
    long_chain(&mut random, &mut facts, target);
    let truth: Vec<Vec<Truth>> = facts
        .groups
        .iter()
        .map(|group| {
            let guests = group.guests.iter();
            guests.map(|guest| Truth::of(&mut random, guest)).collect()
        })
        .collect();

    let rule = hidden_rule(&mut random, &facts);
    let hidden = simulate(&facts, &truth, &rule).finish;
    // What is told of dirty rates is wrong by up to a fifth: closer than this nobody can tell.
    let slack = if random.chance(0.3) {
        0.02
    } else {
        random.between(0.02, 0.1)
    };
    facts.deadline = Some(Duration::from_secs_f64(hidden * (1.0 + slack)));
    for guest in facts.groups.iter_mut().flat_map(|group| &mut group.guests) {
        guest.dirty_rate = (guest.dirty_rate as f64 * random.between(0.8, 1.2)) as u64;
        guest.working_set = (guest.working_set as f64 * random.between(0.9, 1.1)) as u64;
    }
    Made {
        facts,
        truth,
        hidden,
    }
}

fn group(
    random: &mut Random,
    index: usize,
    named: usize,
    count: usize,
    links: usize,
) -> GroupFacts {
    let guests = (0..count).map(|guest| {
        let size = random.scale(0.3e9, 20e9);
        let dirty = random.scale(10e3, 2e6);
        let set = size * random.between(0.005, 0.05);
        let protected = random.chance(0.6);
        let remaining = if protected {
            (dirty * random.between(2.0, 10.0)).min(set)
        } else {
            size
        };
        GuestFacts {
            name: format!("guest-{}", named + guest),
            remaining: remaining as u64,
            dirty_rate: dirty as u64,
            working_set: set as u64,
            max_throttle: 80,
            max_blackout: Duration::from_millis(300 + random.next() % 1700),
            start: Duration::from_millis(50 + random.next() % 150),
            healthy: Duration::from_secs_f64(random.scale(0.2, 20.0)),
            after: Vec::new(),
        }
    });
    GroupFacts {
        guests: guests.collect(),
        name: format!("group-{index}"),
        peer: format!("peer-{}", random.below(links)),
        priority: (random.below(5) * 50) as u8,
        rate_cap: None,
        share: if random.chance(0.2) {
            20 + random.below(60) as u8
        } else {
            100
        },
    }
}

/// Guests wait for guests of their own group, and of groups before it.
fn chains(random: &mut Random, facts: &mut Facts) {
    let mut depth = vec![0; facts.groups.len()];
    for index in 0..facts.groups.len() {
        let (before, here) = facts.groups.split_at_mut(index);
        let group = &mut here[0];
        for guest in 1..group.guests.len() {
            if random.chance(0.4) {
                let on = group.guests[random.below(guest)].name.clone();
                group.guests[guest].after.push(on);
            }
        }
        while !before.is_empty() && random.chance(0.3) {
            let on = random.below(before.len());
            if depth[on] < 5 {
                depth[index] = depth[index].max(depth[on] + 1);
                let name = before[on].guests[random.below(before[on].guests.len())]
                    .name
                    .clone();
                let waiting = random.below(group.guests.len());
                let after = &mut group.guests[waiting].after;
                if !after.contains(&name) {
                    after.push(name);
                }
            }
        }
    }
}

/// Links as fast as makes everything take about `target` seconds; some groups capped.
fn rates(random: &mut Random, facts: &mut Facts, links: usize, target: f64) {
    for link in 0..links {
        let peer = format!("peer-{link}");
        let here = facts.groups.iter().filter(|group| group.peer == peer);
        let bytes: u64 = here
            .flat_map(|group| &group.guests)
            .map(|guest| guest.remaining)
            .sum();
        let rate = (bytes as f64 / target * random.between(0.8, 1.2)).max(2e6);
        facts.links.push(LinkFacts {
            peer: peer.clone(),
            rate: rate as u64,
        });
        for group in facts.groups.iter_mut().filter(|group| group.peer == peer) {
            if random.chance(0.1) {
                group.rate_cap = Some((rate * random.between(0.1, 0.9)) as u64);
            }
            // Guests that outrun what they may use of the link are another test's.
            let share = rate * f64::from(group.share) / 100.0;
            let cap = group.rate_cap.map_or(share, |cap| share.min(cap as f64));
            for guest in &mut group.guests {
                guest.dirty_rate = guest.dirty_rate.min((cap * 0.02) as u64).max(1);
                guest.remaining = guest.remaining.max(1);
            }
        }
    }
}

/// At some sites a chain of health checks takes about as long as all the copying.
fn long_chain(random: &mut Random, facts: &mut Facts, target: f64) {
    if facts.groups.len() < 4 || !random.chance(0.3) {
        return;
    }
    let length = 2 + random.below(facts.groups.len().min(8) - 2);
    let whole = target * random.between(0.3, 1.2);
    let mut chain = BTreeSet::new();
    while chain.len() < length {
        chain.insert(random.below(facts.groups.len()));
    }
    let mut last: Option<String> = None;
    for index in chain {
        let guest = &mut facts.groups[index].guests[0];
        guest.healthy = Duration::from_secs_f64(whole / length as f64 * random.between(0.5, 1.5));
        if let Some(last) = last.replace(guest.name.clone())
            && !guest.after.contains(&last)
        {
            guest.after.push(last);
        }
    }
}

/// Groups in some order in which none stands before what it waits for.
fn hidden_rule(random: &mut Random, facts: &Facts) -> Rule {
    let mut keys: Vec<(usize, u64)> = Vec::new();
    let mut level = std::collections::HashMap::new();
    for group in &facts.groups {
        // Groups wait only for such as are before them in the list.
        let names = group.guests.iter().flat_map(|guest| &guest.after);
        let own = names
            .filter_map(|name| level.get(name.as_str()).copied())
            .max()
            .map_or(0, |level: usize| level + 1);
        for guest in &group.guests {
            level.insert(guest.name.as_str(), own);
        }
        keys.push((own, random.next()));
    }
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by_key(|group| keys[*group]);
    Rule::in_order(&order)
}
