//! Times that no plan can beat.

use super::Bound;
use super::units::{NEVER, Site, span};

/// All bounds, for a plan that finishes at `finish`.
pub(super) fn bound(site: &Site<'_>, finish: f64) -> Bound {
    let (mut bytes, mut writes) = (0.0f64, 0.0f64);
    for link in 0..site.rates.len() {
        bytes = bytes.max(copied(site, link));
        writes = writes.max(written(site, link, finish));
    }
    let chain = chain(site);
    Bound {
        bytes: span(bytes),
        writes: span(writes),
        chain: span(chain),
        least: span(least(site).max(writes).max(chain)),
    }
}

/// The greatest of those bounds that do not ask when a plan finishes.
pub(super) fn least(site: &Site<'_>) -> f64 {
    let mut least = chain(site);
    for link in 0..site.rates.len() {
        least = least.max(tails(site, link));
    }
    least
}

/// Bytes that are left now, over the link's rate.
fn copied(site: &Site<'_>, link: usize) -> f64 {
    let on_link = site.units.iter().filter(|unit| unit.link == link);
    over(on_link.map(|unit| unit.load.left()).sum(), site.rates[link])
}

/// Among any set of groups on a link one is copied last, and its own rest comes
/// after all their bytes. Sets of those with the longest rests bind most.
fn tails(site: &Site<'_>, link: usize) -> f64 {
    let mut units: Vec<_> = site.units.iter().filter(|unit| unit.link == link).collect();
    units.sort_by(|a, b| b.rest.total_cmp(&a.rest));
    let (mut bytes, mut least) = (0.0, 0.0f64);
    for unit in units {
        bytes += unit.load.left();
        least = least.max(over(bytes, site.rates[link]) + unit.rest);
    }
    least.min(NEVER)
}

/// The longest chain: each link of it copied alone at its cap, then healthy.
pub(super) fn chain(site: &Site<'_>) -> f64 {
    earliest(site).into_iter().fold(0.0, f64::max)
}

/// The earliest time at which each unit could be healthy, alone with what it waits for.
pub(super) fn earliest(site: &Site<'_>) -> Vec<f64> {
    let mut over_at: Vec<f64> = site
        .units
        .iter()
        .map(|unit| over(unit.load.left(), unit.cap.min(site.rates[unit.link])))
        .collect();
    for index in 0..site.units.len() {
        for (follower, delay) in &site.units[index].followers {
            over_at[*follower] = over_at[*follower].max(over_at[index] + delay);
        }
    }
    let healthy = |(unit, over): (usize, &f64)| (over + site.units[unit].span).min(NEVER);
    over_at.iter().enumerate().map(healthy).collect()
}

/// Bytes over the link's rate, with those that writes add before a group is cut.
///
/// A group cut at time t sends at least what it would have to send had nothing
/// been copied before t: copying early only makes room for more writes. That
/// grows ever more slowly, so up to `finish` it lies over the straight line
/// between its ends. For straight lines the least finish is known: groups one
/// after the other by size over growth (Browne and Yechiali, 1990).
fn written(site: &Site<'_>, link: usize, finish: f64) -> f64 {
    let rate = site.rates[link];
    if rate <= 0.0 || finish >= NEVER {
        return copied(site, link);
    }
    let mut lines: Vec<(f64, f64)> = site
        .units
        .iter()
        .filter(|unit| unit.link == link)
        .map(|unit| {
            let (now, then) = (unit.load.left(), unit.load.after(finish, 0.0).left());
            (now, ((then - now) / finish.max(1e-9)).max(0.0))
        })
        .collect();
    let size_over_growth = |(now, growth): &(f64, f64)| {
        if *growth > 0.0 {
            now / growth
        } else {
            f64::INFINITY
        }
    };
    lines.sort_by(|a, b| size_over_growth(a).total_cmp(&size_over_growth(b)));
    lines
        .into_iter()
        .fold(0.0, |at, (now, growth)| at + (now + growth * at) / rate)
        .min(finish)
}

fn over(bytes: f64, rate: f64) -> f64 {
    if bytes <= 0.0 {
        0.0
    } else if rate > 0.0 {
        (bytes / rate).min(NEVER)
    } else {
        NEVER
    }
}
