//! Recovery points -> which to keep and which to drop, with the reason.
//!
//! The answer for a point depends on its own age and on the points of its own
//! span only, and spans lie fixed in time. So a point once worth keeping stays
//! so until its age ends it, and calling this twice drops nothing more.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::policy::Retention;

/// A sealed recovery point, as far as retention cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Its number: a higher one is newer.
    pub number: u64,
    /// When it was cut, by the source's clock.
    pub cut_at: SystemTime,
    /// Something reads it: an active guest, a test, a fetch.
    pub in_use: bool,
}

/// What to do with a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Which point.
    pub number: u64,
    /// Keep it, or drop it.
    pub keep: bool,
    /// Why.
    pub reason: Reason,
}

/// Why a point is kept or dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Kept: something reads it.
    InUse,
    /// Kept: one of the newest.
    Newest,
    /// Kept: younger than the age up to which all are kept.
    Young,
    /// Kept: the first of its span.
    FirstOfSpan,
    /// Dropped: its span has an older one.
    SpanHasOlder,
    /// Dropped: older than anything is kept.
    TooOld,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::InUse => "in use",
            Reason::Newest => "one of the newest",
            Reason::Young => "younger than the time all points are kept",
            Reason::FirstOfSpan => "the first of its span",
            Reason::SpanHasOlder => "its span keeps an older point",
            Reason::TooOld => "older than points are kept",
        })
    }
}

/// Judges every point at the time `now`. Verdicts come in the order of numbers,
/// oldest first. A point from the future (clocks differ) counts as new.
pub fn retain(retention: &Retention, points: &[Point], now: SystemTime) -> Vec<Verdict> {
    let mut points = points.to_vec();
    points.sort_by_key(|point| point.number);
    let (all, until) = (retention.all.duration(), retention.until.duration());
    let span_of = |point: &Point| span(point.cut_at, retention.then_every.duration());

    // The oldest point of each span stands for it, whatever else keeps or drops
    // others: a choice that does not change while the span ages.
    let mut first_of_span = BTreeMap::new();
    for point in &points {
        first_of_span.entry(span_of(point)).or_insert(point.number);
    }
    let newest_from = points
        .len()
        .saturating_sub(usize::try_from(retention.newest.max(1)).unwrap_or(usize::MAX));

    let judge = |(index, point): (usize, &Point)| {
        let age = now.duration_since(point.cut_at).unwrap_or(Duration::ZERO);
        let (keep, reason) = if point.in_use {
            (true, Reason::InUse)
        } else if index >= newest_from {
            (true, Reason::Newest)
        } else if age < all {
            (true, Reason::Young)
        } else if age >= until {
            (false, Reason::TooOld)
        } else if first_of_span.get(&span_of(point)) == Some(&point.number) {
            (true, Reason::FirstOfSpan)
        } else {
            (false, Reason::SpanHasOlder)
        };
        Verdict {
            number: point.number,
            keep,
            reason,
        }
    };
    points.iter().enumerate().map(judge).collect()
}

/// Which span of this length a time lies in; each millisecond its own where the length is zero.
fn span(at: SystemTime, every: Duration) -> u128 {
    at.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_millis()
        / every.as_millis().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Period;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000_020 + secs)
    }

    fn every(secs: u64, count: u64) -> Vec<Point> {
        (0..count)
            .map(|n| Point {
                number: n + 1,
                cut_at: at(n * secs),
                in_use: false,
            })
            .collect()
    }

    fn kept(verdicts: &[Verdict]) -> BTreeSet<u64> {
        verdicts
            .iter()
            .filter(|verdict| verdict.keep)
            .map(|verdict| verdict.number)
            .collect()
    }

    #[test]
    fn the_default_keeps_all_for_ten_minutes_then_one_a_minute_for_an_hour() {
        let points = every(10, 721);
        let verdicts = retain(&Retention::default(), &points, at(7200));
        let count = |reason| {
            verdicts
                .iter()
                .filter(|verdict| verdict.reason == reason)
                .count()
        };
        assert_eq!((count(Reason::Newest), count(Reason::Young)), (3, 57));
        assert_eq!(count(Reason::FirstOfSpan), 50);
        assert_eq!(count(Reason::SpanHasOlder), 250);
        assert_eq!(count(Reason::TooOld), 361);
    }

    #[test]
    fn the_newest_and_those_in_use_are_kept_however_old() {
        let mut points = every(10, 10);
        points[2].in_use = true;
        let verdicts = retain(&Retention::default(), &points, at(1_000_000));
        assert_eq!(kept(&verdicts), BTreeSet::from([3, 8, 9, 10]));
        assert_eq!(verdicts[2].reason, Reason::InUse);
        // Even a policy that says so (it is refused when loaded) loses not the last point.
        let none = Retention {
            newest: 0,
            until: Period::ZERO,
            all: Period::ZERO,
            then_every: Period::ZERO,
        };
        assert_eq!(
            kept(&retain(&none, &every(1, 5), at(100))),
            BTreeSet::from([5])
        );
        assert_eq!(retain(&none, &[], at(0)), []);
    }

    #[test]
    fn clocks_that_went_back_drop_nothing_new() {
        let points = every(10, 10);
        assert_eq!(
            kept(&retain(&Retention::default(), &points, UNIX_EPOCH)).len(),
            10
        );
    }

    proptest! {
        /// While time passes and points are dropped as told, every moment of the
        /// past within the policy keeps a point nearby.
        #[test]
        fn a_journal_has_no_holes(
            gaps in proptest::collection::vec(1u64..40, 50..300),
            all in 10u64..400, then_every in 5u64..120, until in 0u64..3000, newest in 1u32..5,
        ) {
            let seconds = Period::from_secs;
            let retention =
                Retention { all: seconds(all), then_every: seconds(then_every), until: seconds(until), newest };
            let (mut live, mut cuts, mut now): (Vec<Point>, Vec<u64>, u64) = (Vec::new(), Vec::new(), 0);
            for gap in gaps {
                now += gap;
                cuts.push(now);
                live.push(Point { number: cuts.len() as u64, cut_at: at(now), in_use: false });
                let verdicts = retain(&retention, &live, at(now));
                let keep = kept(&verdicts);
                live.retain(|point| keep.contains(&point.number));
                // Twice is once.
                prop_assert_eq!(kept(&retain(&retention, &live, at(now))).len(), live.len());
                prop_assert_eq!(live.last().map(|point| point.number), Some(cuts.len() as u64));
                for (index, cut) in cuts.iter().enumerate().filter(|(_, cut)| now - *cut < until.max(all)) {
                    let near = live.iter().any(|point| {
                        let other = cuts[point.number as usize - 1];
                        point.number == index as u64 + 1
                            || (now - cut >= all && other <= *cut && cut - other < then_every)
                    });
                    // The span's first may itself have just grown too old.
                    let excused = now - cut + then_every > until;
                    prop_assert!(near || excused, "nothing kept for the cut at {cut}, now {now}");
                }
            }
            let thin_limit = (until.saturating_sub(all)) / then_every + 2;
            let young = cuts.iter().filter(|cut| now - *cut < all).count() as u64;
            prop_assert!(live.len() as u64 <= thin_limit + young + u64::from(newest));
        }
    }
}
