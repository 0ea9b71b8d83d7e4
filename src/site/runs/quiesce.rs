//! The step `quiesce`: guests' agents freeze filesystems for a point.
//!
//! Nothing is frozen by the step itself: a guest whose filesystems are frozen
//! stands still for its users, and until the cut it may be long. The step makes
//! sure that every agent answers; they freeze right before the cut and are thawed
//! right after it. In planned mode that is the last cut of all, and what runs here
//! from it is thawed here. In a test it is the next point, which the step waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farhaven_policies::runbook::Mode;

use super::facts::{Seen, now_ms};
use super::perform::{AtSite, named};
use super::planned::asked;
use super::points::by_group;
use super::targets::Target;
use crate::guest::Definition;
use crate::guest::qemu::agent::port;
use crate::replicate::message::{Message, RunMessage};
use crate::runbook::perform::{Ended, Failure, Guests, Scope};
use crate::site::remote::AskError;
use crate::site::view::PointView;

/// An agent answers its own site within seconds.
const ANSWER: Duration = Duration::from_secs(30);

/// How often it is looked whether the points are there.
const LOOK: Duration = Duration::from_millis(200);

/// Has it a port for an agent, by its definition?
pub(super) fn has_agent(target: &Target) -> bool {
    match target.standby.opening().definition {
        Definition::Qemu(definition) => port(&definition.arguments).is_some(),
        Definition::Embedded(_) => false,
    }
}

/// See the module's page.
pub(super) async fn quiesce(run: &AtSite, scope: &Scope) -> Ended<Guests> {
    let targets = run.targets(scope)?;
    let before: Vec<u64> = targets.iter().map(|t| t.standby.newest()).collect();
    for target in &targets {
        run.goes_on()?;
        let question = Message::Run(RunMessage::Quiesce {
            guest: target.standby.guest,
            next_points: scope.mode == Mode::Test,
        });
        let remote = target.standby.remote();
        match remote.ask_within(question, ANSWER).await {
            Ok(Message::Done) => {}
            Ok(_) => return Err(asked(AskError::Unfitting(target.standby.from()))),
            Err(AskError::Refused { why, .. }) => {
                return Err(Failure::clean(format!(
                    "the agent of '{}' does not answer: {why}",
                    target.name
                )));
            }
            Err(error) => return Err(asked(error)),
        }
    }
    if scope.mode == Mode::Test {
        for group in by_group(&targets).values() {
            let of: BTreeMap<&str, u64> = targets
                .iter()
                .zip(&before)
                .map(|(target, newest)| (target.name.as_str(), *newest))
                .collect();
            await_point(run, scope, group, &of).await?;
        }
        return Ok(named(&targets));
    }
    for target in &targets {
        run.note(&target.name, |guest| guest.quiesce = true).await?;
    }
    Ok(named(&targets))
}

/// Undoes the step: nothing was frozen, and nothing will be.
pub(super) async fn forget(run: &AtSite, scope: &Scope) -> Ended<()> {
    for target in run.targets(scope)? {
        run.note(&target.name, |guest| guest.quiesce = false)
            .await?;
    }
    Ok(())
}

/// What came of it at the last cut, for the report.
pub(super) async fn tell(run: &AtSite, target: &Target, quiesced: Option<bool>) -> Ended<()> {
    let Some(frozen) = quiesced else {
        return Ok(());
    };
    run.note(&target.name, move |guest| guest.quiesced = quiesced)
        .await?;
    let seen = match frozen {
        true => "its filesystems were frozen at its last cut",
        false => {
            "its agent did not freeze its filesystems in time at its last cut, which is crash-consistent"
        }
    };
    saw(run, "final-sync", target, frozen, seen.to_owned()).await
}

async fn saw(run: &AtSite, step: &str, target: &Target, good: bool, seen: String) -> Ended<()> {
    run.saw(Seen {
        at: now_ms(),
        step: step.to_owned(),
        guest: target.name.clone(),
        what: "quiesced".to_owned(),
        good,
        seen,
    })
    .await
}

/// Waits for a point of all these guests that was cut with frozen filesystems
/// after the points that each had before. The step's timeout ends it.
async fn await_point(
    run: &AtSite,
    scope: &Scope,
    guests: &[&Target],
    before: &BTreeMap<&str, u64>,
) -> Ended<()> {
    loop {
        run.goes_on()?;
        let site = run.site()?;
        let fresh: Vec<Vec<PointView>> = guests
            .iter()
            .map(|target| {
                let mut points = site.points_of(&target.standby);
                let newest = before.get(target.name.as_str()).copied().unwrap_or(0);
                points.retain(|point| point.point > newest);
                points
            })
            .collect();
        if let Some(points) = frozen_together(&fresh) {
            for (target, point) in guests.iter().zip(points) {
                let seen = format!("its filesystems were frozen for point {point}");
                saw(run, &scope.step, target, true, seen).await?;
            }
            return Ok(());
        }
        for (target, points) in guests.iter().zip(&fresh) {
            if let Some(point) = points.iter().find(|point| point.quiesced == Some(false)) {
                return Err(Failure::clean(format!(
                    "the agent of '{}' did not freeze its filesystems in time: point {} is crash-consistent; its source's status says why",
                    target.name, point.point
                )));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Each guest's point of one cut, all of frozen filesystems: of a guest by itself
/// any; of several, of one cut of their group.
fn frozen_together(fresh: &[Vec<PointView>]) -> Option<Vec<u64>> {
    let frozen = |point: &&PointView| point.quiesced == Some(true);
    if let [alone] = fresh {
        return alone
            .iter()
            .rev()
            .find(frozen)
            .map(|point| vec![point.point]);
    }
    let of_cut = |points: &[PointView]| -> BTreeMap<u64, u64> {
        let marked = points.iter().filter(frozen).filter_map(|point| {
            let cut = point.group.as_ref()?.cut;
            Some((cut, point.point))
        });
        marked.collect()
    };
    let each: Vec<BTreeMap<u64, u64>> = fresh.iter().map(|points| of_cut(points)).collect();
    let cuts: BTreeSet<u64> = each.first()?.keys().copied().collect();
    cuts.into_iter().rev().find_map(|cut| {
        each.iter()
            .map(|points| points.get(&cut).copied())
            .collect::<Option<Vec<u64>>>()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::site::groups::PointGroup;
    use farhaven_storage_sync::unit::GuestId;

    fn point(number: u64, cut: Option<u64>, quiesced: Option<bool>) -> PointView {
        PointView {
            point: number,
            cut_at: String::new(),
            age_ms: 0,
            pause_ms: 0.0,
            ram_scan_ms: 0.0,
            ram_scanned_bytes: 0,
            changed_bytes: 0,
            sent_bytes: 0,
            group: cut.map(|cut| PointGroup {
                id: GuestId([1; 16]),
                name: "bank".to_owned(),
                cut,
                skew_ns: 0,
                members: BTreeSet::new(),
            }),
            quiesced,
            disks_only: false,
            damaged: None,
            name: None,
        }
    }

    #[test]
    fn a_group_is_frozen_where_all_of_it_were_at_one_cut() {
        let alone = [vec![point(3, None, Some(true)), point(4, None, None)]];
        assert_eq!(frozen_together(&alone), Some(vec![3]));
        let db = vec![
            point(7, Some(100), Some(true)),
            point(8, Some(200), Some(true)),
        ];
        let half = [db.clone(), vec![point(5, Some(100), None)]];
        assert_eq!(frozen_together(&half), None);
        let whole = [
            db,
            vec![point(5, Some(100), None), point(6, Some(200), Some(true))],
        ];
        assert_eq!(frozen_together(&whole), Some(vec![8, 6]));
        let failed = [vec![point(3, None, Some(false))]];
        assert_eq!(frozen_together(&failed), None);
    }
}
