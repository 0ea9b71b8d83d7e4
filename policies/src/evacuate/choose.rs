//! Several orders are run; the one that serves priorities best while it is on
//! time, and hardly later than any other, is taken.
//!
//! Orders differ in what they put first: priority; what waits longest for health
//! checks once it is there (Jackson's rule for tails); what grows fastest for its
//! size (the rule for jobs that deteriorate). Whatever the order, each group is
//! given a time from which it goes before the rest, so that the finish aimed at
//! is kept: the groups are laid backwards from there, the last possible first.

use super::bound;
use super::schedule::{Order, Run, run};
use super::units::{NEVER, Site};

/// The taken order may finish so much later than the fastest one.
const HARDLY_LATER: f64 = 1.01;

/// What an order puts first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum First {
    /// The highest priority, then what grows.
    Priority,
    /// What grows fastest for its size, whatever its priority.
    Growth,
    /// What is waited for longest.
    Rest,
}

/// How an order came about: with the same, a site that differs little gets a like run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    first: First,
    /// Finish aimed at, over the lower bound; `None`: the deadline itself.
    aim: Option<f64>,
}

const WAYS: [Way; 5] = [
    Way {
        first: First::Priority,
        aim: None,
    },
    Way {
        first: First::Priority,
        aim: Some(1.02),
    },
    Way {
        first: First::Growth,
        aim: Some(1.02),
    },
    Way {
        first: First::Growth,
        aim: Some(1.0),
    },
    Way {
        first: First::Rest,
        aim: Some(1.0),
    },
];

/// The best of all ways.
pub(super) fn best(site: &Site<'_>, deadline: Option<f64>) -> (Way, Run) {
    let limit = deadline.unwrap_or(NEVER);
    let late = |run: &Run| {
        run.outcomes
            .iter()
            .filter(|outcome| outcome.done > limit)
            .count()
    };
    let ways = WAYS
        .iter()
        .filter(|way| way.aim.is_some() || deadline.is_some());
    let runs: Vec<_> = ways.map(|way| (*way, by(site, *way, deadline))).collect();
    let fewest = runs.iter().map(|(_, run)| late(run)).min().unwrap_or(0);
    let earliest = runs
        .iter()
        .filter(|(_, run)| late(run) == fewest)
        .map(|(_, run)| run.finish)
        .fold(NEVER, f64::min);
    let good = |run: &Run| late(run) == fewest && run.finish <= earliest * HARDLY_LATER;
    let taken = runs.into_iter().find(|(_, run)| good(run));
    taken.unwrap_or_else(|| {
        let way = WAYS[WAYS.len() - 1];
        (way, by(site, way, deadline))
    })
}

/// One way.
pub(super) fn by(site: &Site<'_>, way: Way, deadline: Option<f64>) -> Run {
    let least = bound::least(site);
    let finish = match (way.aim, deadline) {
        (Some(over), Some(deadline)) => (least * over).min(deadline),
        (Some(over), None) => least * over,
        (None, deadline) => deadline.unwrap_or(least) * 0.995,
    };
    let turn = turns(site, way.first);
    let urgent_from = urgent_from(site, &turn, finish);
    run(site, Order { turn, urgent_from })
}

/// The turn of each unit; nothing comes before what it waits for.
fn turns(site: &Site<'_>, first: First) -> Vec<usize> {
    // Small is first: of two that are alike, more guests are safe sooner.
    let mut keys: Vec<(f64, f64, f64)> = site
        .units
        .iter()
        .map(|unit| {
            let (left, growth) = (unit.load.left(), unit.load.growth());
            let by_growth = if growth > 0.0 { left / growth } else { NEVER };
            match first {
                First::Priority => (-f64::from(unit.priority), by_growth, left),
                First::Growth => (by_growth, left, 0.0),
                First::Rest => (-unit.rest, by_growth, left),
            }
        })
        .collect();
    let less = |a: &(f64, f64, f64), b: &(f64, f64, f64)| {
        let (x, y) = (a.0.total_cmp(&b.0), a.1.total_cmp(&b.1));
        x.then(y).then(a.2.total_cmp(&b.2))
    };
    // What is waited for is at least as early as whoever waits.
    for index in (0..site.units.len()).rev() {
        for (follower, _) in &site.units[index].followers {
            if less(&keys[*follower], &keys[index]).is_lt() {
                keys[index] = keys[*follower];
            }
        }
    }
    let mut sorted: Vec<usize> = (0..site.units.len()).collect();
    sorted.sort_by(|a, b| less(&keys[*a], &keys[*b]).then(a.cmp(b)));
    let mut turn = vec![0; sorted.len()];
    for (place, unit) in sorted.into_iter().enumerate() {
        turn[unit] = place;
    }
    turn
}

/// From when each unit must go first for everything to be done at `finish`.
fn urgent_from(site: &Site<'_>, turn: &[usize], finish: f64) -> Vec<f64> {
    let mut from = vec![NEVER; site.units.len()];
    // Laid from the end: the latest due first, of those the last in turn.
    let mut sorted: Vec<usize> = (0..site.units.len()).collect();
    sorted.sort_by(|a, b| {
        let rest = site.units[*a].rest.total_cmp(&site.units[*b].rest);
        rest.then(turn[*b].cmp(&turn[*a]))
    });
    let mut free_until = vec![finish; site.rates.len()];
    for index in sorted {
        let unit = &site.units[index];
        let rate = site.rates[unit.link];
        if rate <= 0.0 {
            continue;
        }
        // What writes add while it is copied, once.
        let left = unit.load.left();
        let bytes = left + unit.load.growth().min(unit.load.dirty) * left / unit.cap.max(1.0);
        let due = finish - unit.rest;
        let whole = free_until[unit.link].min(due) - bytes / rate;
        free_until[unit.link] = whole;
        from[index] = whole.min(due - bytes / unit.cap.min(rate));
    }
    from
}
