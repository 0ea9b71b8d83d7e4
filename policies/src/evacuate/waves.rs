//! A run -> waves that an operator can follow.

use std::collections::BTreeMap;

use super::schedule::Run;
use super::units::{NEVER, Site, span};
use super::{Give, Passage, Wave};

/// The whole is cut into so many parts: few enough to read.
const WAVES: f64 = 20.0;

/// Cuts by the part of the whole in which they lie; what waits for a group of its
/// own part goes in the next one.
pub(super) fn waves(site: &Site<'_>, run: &Run) -> Vec<Wave> {
    let cut_at = |unit: usize| run.outcomes[unit].cut_at.min(NEVER);
    let mut by_cut: Vec<usize> = (0..site.units.len()).collect();
    by_cut.sort_by(|a, b| cut_at(*a).total_cmp(&cut_at(*b)).then(a.cmp(b)));
    let last_cut = by_cut.last().map_or(0.0, |unit| cut_at(*unit));
    let part = (last_cut / WAVES).max(1e-9);
    // The part in which a unit may go at the earliest: after those that it waits for.
    let mut earliest = vec![0usize; site.units.len()];
    let mut parts = BTreeMap::<usize, Vec<usize>>::new();
    for unit in by_cut {
        let own = earliest[unit].max((cut_at(unit) / part) as usize);
        for (follower, _) in &site.units[unit].followers {
            earliest[*follower] = earliest[*follower].max(own + 1);
        }
        parts.entry(own).or_default().push(unit);
    }
    let wave = |(index, units): (usize, Vec<usize>)| {
        let outcomes = units.iter().map(|unit| &run.outcomes[*unit]);
        Wave {
            number: index + 1,
            from: span(
                outcomes
                    .clone()
                    .map(|of| of.copy_from)
                    .fold(NEVER, f64::min),
            ),
            until: span(outcomes.map(|of| of.done).fold(0.0, f64::max)),
            groups: units.iter().map(|unit| passage(site, run, *unit)).collect(),
        }
    };
    parts.into_values().enumerate().map(wave).collect()
}

fn passage(site: &Site<'_>, run: &Run, unit: usize) -> Passage {
    let (group, outcome) = (site.group(unit), &run.outcomes[unit]);
    Passage {
        group: group.name.clone(),
        guests: group.guests.iter().map(|of| of.name.clone()).collect(),
        peer: group.peer.clone(),
        turn: run.order.turn[unit],
        urgent_from: span(run.order.urgent_from[unit]),
        copy_from: span(outcome.copy_from),
        cut_at: span(outcome.cut_at),
        healthy_at: span(outcome.done),
        bytes: outcome.sent as u64,
        blackout: span(blackout(site, run, unit)),
    }
}

/// How long the longest of a unit's guests runs nowhere.
fn blackout(site: &Site<'_>, run: &Run, unit: usize) -> f64 {
    let outcome = &run.outcomes[unit];
    outcome.over_at - outcome.cut_at + site.units[unit].runs
}

/// Where policies' bounds are expected to be broken.
pub(super) fn gives(site: &Site<'_>, run: &Run) -> Vec<Give> {
    let broken = |unit: &usize| {
        blackout(site, run, *unit) > site.units[*unit].max_blackout || run.outcomes[*unit].throttled
    };
    (0..site.units.len())
        .filter(broken)
        .map(|unit| Give {
            group: site.group(unit).name.clone(),
            blackout: span(blackout(site, run, unit)),
            max_blackout: span(site.units[unit].max_blackout),
            throttle: if run.outcomes[unit].throttled {
                site.units[unit].throttle
            } else {
                0
            },
        })
        .collect()
}
