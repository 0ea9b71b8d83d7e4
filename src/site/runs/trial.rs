//! The steps of a run that is a test: isolated copies that no source notices.

use std::time::Instant;

use farhaven_policies::runbook::PointChoice;

use super::facts::{GuestFacts, now_ms};
use super::perform::{AtSite, fault, named};
use super::pictures;
use super::targets::Target;
use crate::runbook::perform::{Ended, Failure, Guests, Promoted, Removed, Scope};
use crate::site::exists;

/// Makes copies of the points ready, each with memory and disks of its own.
pub(super) async fn promote(run: AtSite, scope: Scope, point: PointChoice) -> Ended<Promoted> {
    let targets = run.targets(&scope)?;
    let points = run.choose(&targets, point).await?;
    let promoted = run.keep_points(&targets, &points).await?;
    for target in &targets {
        run.goes_on()?;
        if let Some(point) = points.get(&target.name) {
            prepare(&run, target, *point).await?;
        }
    }
    Ok(promoted)
}

async fn prepare(run: &AtSite, target: &Target, point: u64) -> Ended<()> {
    let standby = &target.standby;
    let ready = standby.prepare_test(Some(point), Instant::now(), Some(&run.run));
    match ready.await.map_err(fault)? {
        ready if ready == point => Ok(()),
        other => Err(Failure::fault(format!(
            "the test of '{}' runs from point {other} already",
            target.name
        ))),
    }
}

/// Runs the copies, in start order.
pub(super) async fn start(run: AtSite, scope: Scope) -> Ended<Guests> {
    let targets = run.targets(&scope)?;
    for target in &targets {
        run.goes_on()?;
        start_one(&run, target).await?;
    }
    Ok(named(&targets))
}

/// Runs one copy, made ready anew if a restart of this daemon threw it away.
pub(super) async fn start_one(run: &AtSite, target: &Target) -> Ended<()> {
    if target.standby.tested_by(&run.run).await.is_some() {
        return Ok(());
    }
    let Some(point) = run.facts.of(&target.name).point else {
        return Err(Failure::clean(format!(
            "'{}' was not promoted in this run yet",
            target.name
        )));
    };
    let began = Instant::now();
    prepare(run, target, point).await?;
    target.standby.run_test(began).await.map_err(fault)?;
    run.note(&target.name, move |guest| {
        guest.started_at.get_or_insert_with(now_ms);
        guest.start_ms = Some(began.elapsed().as_secs_f64() * 1e3);
    })
    .await
}

/// Ends the copies, removes all of them, and looks whether they are gone.
pub(super) async fn cleanup(run: AtSite, scope: Scope) -> Ended<Removed> {
    let mut all = Vec::new();
    for target in run.targets(&scope)?.iter().rev() {
        let standby = &target.standby;
        // What it showed last is in the report.
        pictures::take(&run, target, false).await;
        let pid = match standby.tested_by(&run.run).await {
            Some(ready) => ready.pid(),
            None => None,
        };
        let ended = standby.end_test_of(&run.run).await.map_err(fault)?;
        let places = standby.test_places().map_err(fault)?;
        let mut gone = Vec::new();
        for place in places {
            if exists(&place) {
                return Err(Failure::fault(format!(
                    "{} is still there; see the log, remove it and repeat this",
                    place.display()
                )));
            }
            gone.push(format!("{} is not there", place.display()));
        }
        match pid {
            Some(pid) if exists(&std::path::Path::new("/proc").join(pid.to_string())) => {
                return Err(Failure::fault(format!(
                    "QEMU, process {pid}, is still there; end it and repeat this"
                )));
            }
            Some(pid) => gone.push(format!("process {pid} is not there")),
            None => gone.push("no machine of it is in this daemon".to_owned()),
        }
        let removed = match ended {
            Some(ended) => ended.removed,
            None => vec!["nothing was left of it".to_owned()],
        };
        all.extend(
            removed
                .iter()
                .map(|what| format!("{}: {what}", target.name)),
        );
        run.note(&target.name, move |guest: &mut GuestFacts| {
            if guest.removed.is_empty() {
                guest.removed = removed;
            }
            guest.gone = gone;
        })
        .await?;
    }
    Ok(Removed { removed: all })
}
