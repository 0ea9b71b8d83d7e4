//! What fits before a deadline, what is left if not everything does, and what
//! would make it fit.

use super::bound;
use super::choose::{Way, again, best};
use super::schedule::Run;
use super::units::{NEVER, Site, span};
use super::{Left, LeftReason, WouldDo};

/// Rates up to so many times today's are looked at.
const FASTEST: f64 = 1000.0;
/// Tries of each search: each halves what is unknown.
const TRIES: u32 = 12;

/// What is expected to end so much after the deadline is tried in full: dirty
/// rates are not measured more exactly than that, and last in turn is what
/// matters least.
pub(super) const TIGHT: f64 = 0.02;
/// The same in seconds, where that is more.
const TIGHT_SECONDS: f64 = 0.5;

/// What is done, and what is not.
pub(super) struct Fit {
    /// Units that go, in an order in which nothing stands before what it waits for.
    pub(super) keep: Vec<usize>,
    pub(super) run: Run,
    /// When everything would be moved, were there no deadline.
    pub(super) everything: f64,
    pub(super) left: Vec<Left>,
    pub(super) would_do: Option<WouldDo>,
}

/// Finds what fits: everything, or by priority as much as may be.
pub(super) fn fit(site: &Site<'_>, deadline: Option<f64>) -> Fit {
    let (way, run) = best(site, deadline);
    let everything = run.finish;
    let limit = deadline.map_or(NEVER * 0.99, |deadline| {
        deadline + (deadline * TIGHT).max(TIGHT_SECONDS)
    });
    if run.finish <= limit || site.units.is_empty() {
        return Fit {
            keep: (0..site.units.len()).collect(),
            run,
            everything,
            left: Vec::new(),
            would_do: None,
        };
    }
    let reasons = impossible(site, limit);
    let candidates = by_worth(site, &reasons);
    let keep = most(site, &candidates, way, limit);
    let (_, run) = best(&site.only(&keep), deadline);
    // What was told to fit must: the way that found it is not always the best for it.
    let run = if run.finish <= limit {
        run
    } else {
        again(&site.only(&keep), way, limit)
    };
    let mut kept = vec![false; site.units.len()];
    keep.iter().for_each(|unit| kept[*unit] = true);
    Fit {
        left: left(site, &kept, &reasons),
        would_do: Some(would_do(site, way, deadline, everything)),
        keep,
        run,
        everything,
    }
}

/// Units that cannot be in time even alone, and those that wait for them.
fn impossible(site: &Site<'_>, limit: f64) -> Vec<Option<LeftReason>> {
    let earliest = bound::earliest(site);
    let mut reasons: Vec<Option<LeftReason>> = vec![None; site.units.len()];
    for index in 0..site.units.len() {
        let unit = &site.units[index];
        if site.rates[unit.link] <= 0.0 {
            reasons[index] = Some(LeftReason::NoLink);
        } else if reasons[index].is_none() && earliest[index] > limit {
            reasons[index] = Some(LeftReason::TooLong {
                needs: span(earliest[index]),
            });
        }
        if reasons[index].is_some() {
            for (follower, _) in &unit.followers {
                reasons[*follower] = Some(LeftReason::WaitsFor {
                    group: site.group(index).name.clone(),
                });
            }
        }
    }
    reasons
}

/// Units that could go: the highest priority first, then the smallest; nothing
/// before what it waits for, as that has at least its priority.
fn by_worth(site: &Site<'_>, reasons: &[Option<LeftReason>]) -> Vec<usize> {
    // What is waited for stands no later than whoever waits: it takes over the smaller size.
    let mut sizes: Vec<f64> = site.units.iter().map(|unit| unit.load.most()).collect();
    for index in (0..site.units.len()).rev() {
        for (follower, _) in &site.units[index].followers {
            if site.units[*follower].priority == site.units[index].priority {
                sizes[index] = sizes[index].min(sizes[*follower]);
            }
        }
    }
    let mut units: Vec<usize> = (0..site.units.len())
        .filter(|unit| reasons[*unit].is_none())
        .collect();
    units.sort_by(|a, b| {
        let priority = site.units[*b].priority.cmp(&site.units[*a].priority);
        let size = sizes[*a].total_cmp(&sizes[*b]);
        priority.then(size).then(a.cmp(b))
    });
    units
}

/// As many of the first candidates as fit together, then what still fits beside them.
fn most(site: &Site<'_>, candidates: &[usize], way: Way, limit: f64) -> Vec<usize> {
    let fits = |units: &[usize]| {
        let mut units = units.to_vec();
        units.sort_unstable();
        again(&site.only(&units), way, limit).finish <= limit
    };
    let (mut fit, mut too_many) = (0, candidates.len() + 1);
    while too_many - fit > 1 {
        let middle = fit.midpoint(too_many);
        if fits(&candidates[..middle]) {
            fit = middle;
        } else {
            too_many = middle;
        }
    }
    let mut keep = candidates[..fit].to_vec();
    let mut gone = vec![false; site.units.len()];
    keep.iter().for_each(|unit| gone[*unit] = true);
    let waits = waited_for(site);
    // The first that does not fit is passed over, and smaller ones behind it tried in halves.
    let mut rest: Vec<usize> = candidates[fit..].iter().skip(1).copied().collect();
    for _ in 0..TRIES {
        let mut chunk = Vec::new();
        let room = rest.len().div_ceil(2);
        let mut taken = gone.clone();
        for unit in &rest {
            if chunk.len() < room && waits[*unit].iter().all(|before| taken[*before]) {
                taken[*unit] = true;
                chunk.push(*unit);
            }
        }
        if chunk.is_empty() {
            break;
        }
        let with: Vec<usize> = keep.iter().chain(&chunk).copied().collect();
        if fits(&with) {
            (keep, gone) = (with, taken);
            rest.retain(|unit| !gone[*unit]);
        } else {
            rest.truncate(room.min(rest.len() - 1));
        }
    }
    keep.sort_unstable();
    keep
}

/// For each unit those that it waits for.
fn waited_for(site: &Site<'_>) -> Vec<Vec<usize>> {
    let mut waits = vec![Vec::new(); site.units.len()];
    for (index, unit) in site.units.iter().enumerate() {
        for (follower, _) in &unit.followers {
            waits[*follower].push(index);
        }
    }
    waits
}

fn left(site: &Site<'_>, kept: &[bool], reasons: &[Option<LeftReason>]) -> Vec<Left> {
    let waits = waited_for(site);
    let reason = |unit: usize| {
        let own = reasons[unit].clone();
        let before = waits[unit].iter().find(|before| !kept[**before]);
        own.or_else(|| {
            before.map(|before| LeftReason::WaitsFor {
                group: site.group(*before).name.clone(),
            })
        })
        .unwrap_or(LeftReason::NoRoom)
    };
    (0..site.units.len())
        .filter(|unit| !kept[*unit])
        .map(|unit| Left {
            group: site.group(unit).name.clone(),
            guests: site
                .group(unit)
                .guests
                .iter()
                .map(|guest| guest.name.clone())
                .collect(),
            reason: reason(unit),
        })
        .collect()
}

fn would_do(site: &Site<'_>, way: Way, deadline: Option<f64>, everything: f64) -> WouldDo {
    let rate_percent = deadline.and_then(|deadline| {
        let enough = |factor: f64| again(&site.faster(factor), way, deadline).finish <= deadline;
        if !enough(FASTEST) {
            return None;
        }
        // Halved on the scale of factors, as none is likelier than another.
        let (mut low, mut high) = (0.0, FASTEST.ln());
        for _ in 0..TRIES {
            let middle = f64::midpoint(low, high);
            if enough(middle.exp()) {
                high = middle;
            } else {
                low = middle;
            }
        }
        // In whole percent, upwards.
        Some((high.exp() * 100.0).ceil() as u64)
    });
    WouldDo {
        // A second more than is expected, in whole seconds.
        deadline: (everything < NEVER * 0.99).then(|| span(everything.ceil() + 1.0)),
        rate_percent,
    }
}
