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
    /// What may not use the whole link, the longest first: alone it would waste
    /// the rest of it. Then as by growth.
    Narrow,
}

/// How an order came about: with the same, a site that differs little gets a like run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    first: First,
    /// Finish aimed at, over the lower bound; infinite: nothing is ever urgent; `None`: the deadline itself.
    aim: Option<f64>,
}

/// A finish so near the lower bound needs no other tries...
const NEAR: f64 = 1.01;
/// ...and so near at sites of more groups than this, where tries cost time.
const NEAR_AT_LARGE: f64 = 1.04;
const LARGE: usize = 1000;
/// Single groups are moved to other turns as long as that helps; runs of one group
/// that may be spent on it: an eighth of a second...
const WORK: usize = 300_000;
/// ...and where it is one of many tries.
const WORK_AGAIN: usize = 20_000;
/// Finishes that are aimed at where nothing comes near the bound, over the bound.
const AIMS: [f64; 5] = [1.01, 1.04, 1.1, 1.3, f64::INFINITY];

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
    best_by(site, deadline, WORK)
}

fn best_by(site: &Site<'_>, deadline: Option<f64>, work: usize) -> (Way, Run) {
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
    let mut runs: Vec<_> = ways.map(|way| (*way, by(site, *way, deadline))).collect();
    // Where nothing comes near the bound, groups that are capped and groups that are
    // waited for are in each other's way: a later finish, aimed at, balances them.
    let over = if site.units.len() > LARGE {
        NEAR_AT_LARGE
    } else {
        NEAR
    };
    let near = (bound::least(site) * over).min(limit);
    let earliest = |runs: &[(Way, Run)]| {
        let finishes = runs.iter().map(|(_, run)| run.finish);
        finishes.fold(NEVER, f64::min)
    };
    if earliest(&runs) > near {
        for aim in AIMS {
            for first in [First::Priority, First::Growth, First::Narrow] {
                let way = Way {
                    first,
                    aim: Some(aim),
                };
                runs.push((way, by(site, way, deadline)));
            }
        }
        // Below one move of each group nothing comes of it.
        let moves = work / site.units.len().max(1);
        if moves >= site.units.len() && earliest(&runs) > near {
            let fastest = runs
                .iter()
                .min_by(|a, b| a.1.finish.total_cmp(&b.1.finish))
                .cloned();
            if let Some((way, run)) = fastest {
                let moved = moved(site, &run.order, near, moves);
                runs.push((way, moved));
            }
        }
    }
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

/// A way again, for a site that differs little; a small one is worth more tries.
pub(super) fn again(site: &Site<'_>, way: Way, deadline: f64) -> Run {
    if site.units.len() * site.units.len() <= WORK_AGAIN / 8 {
        best_by(site, Some(deadline), WORK_AGAIN).1
    } else {
        by(site, way, Some(deadline))
    }
}

/// Single groups moved to other turns, and out of urgency, while that ends earlier
/// and not yet near enough.
fn moved(site: &Site<'_>, start: &Order, near: f64, moves: usize) -> Run {
    let count = site.units.len();
    let calm = Order {
        turn: start.turn.clone(),
        urgent_from: vec![NEVER; count],
    };
    // From the other end, too: what is best is often near one of them.
    let mut reversed = calm.clone();
    for turn in &mut reversed.turn {
        *turn = count - 1 - *turn;
    }
    let mut fastest = run(site, start.clone());
    for start in [start.clone(), calm, reversed] {
        let (mut here, mut tries) = (run(site, start), 0);
        while tries < moves / 3 && here.finish > near {
            let before = here.finish;
            for unit in 0..count {
                for place in 0..count {
                    if tries >= moves / 3 {
                        break;
                    }
                    tries += 1;
                    let mut order = here.order.clone();
                    let from = order.turn[unit];
                    for turn in &mut order.turn {
                        // Out of its place, and into the other.
                        *turn -= usize::from(*turn > from);
                        *turn += usize::from(*turn >= place);
                    }
                    order.turn[unit] = place;
                    let tried = run(site, order);
                    if tried.finish < here.finish {
                        here = tried;
                    }
                }
            }
            if here.finish >= before * 0.999 {
                break;
            }
        }
        if here.finish < fastest.finish {
            fastest = here;
        }
    }
    fastest
}

/// One way.
pub(super) fn by(site: &Site<'_>, way: Way, deadline: Option<f64>) -> Run {
    let least = bound::least(site);
    let finish = match (way.aim, deadline) {
        (Some(over), Some(deadline)) if over.is_finite() => (least * over).min(deadline),
        (Some(over), _) if over.is_infinite() => NEVER,
        (Some(over), _) => least * over,
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
            let narrow = unit.cap < 0.999 * site.rates[unit.link];
            match first {
                First::Priority => (-f64::from(unit.priority), by_growth, left),
                First::Growth => (by_growth, left, 0.0),
                First::Rest => (-unit.rest, by_growth, left),
                First::Narrow if narrow => (-1.0, -left / unit.cap - unit.rest, left),
                First::Narrow => (0.0, by_growth, left),
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
    if finish >= NEVER {
        return from;
    }
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
