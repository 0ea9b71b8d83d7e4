//! The steps of a run after which there is no way back by it: the guests stay
//! here, and protection turns round.

use super::perform::{AtSite, fault};
use super::planned;
use crate::replicate::message::{Message, RunMessage};
use crate::runbook::perform::{Ended, Failure, Reprotected, Scope};

/// The guests stay here. What their source held until now, it holds no more.
pub(super) async fn commit(run: AtSite, scope: Scope) -> Ended<()> {
    let site = run.site()?;
    let targets = run.targets(&scope)?;
    if let Some(target) = targets.iter().find(|t| t.standby.active().is_none()) {
        return Err(Failure::clean(format!(
            "'{}' does not run here, so there is nothing to commit",
            target.name
        )));
    }
    for target in &targets {
        run.goes_on()?;
        if run.facts.of(&target.name).held {
            planned::release(&run, target).await?;
            let guest = target.standby.guest;
            let released = Message::Run(RunMessage::Release { guest });
            // It asks by itself, too, and is told of the commit when it is back.
            let _ = target.standby.remote().ask(released).await;
        }
        let report = site.commit(&target.name, false).await.map_err(fault)?;
        run.note(&target.name, move |guest| {
            guest.committed_at = Some(report.committed_at / 1_000_000);
        })
        .await?;
    }
    Ok(())
}

/// Protection turns round; of a whole protection group, by the group's policy, and
/// the group with it. Once it has, the guests are this site's own, so they are known
/// by name only.
pub(super) async fn reprotect(run: AtSite, scope: Scope) -> Ended<Reprotected> {
    let site = run.site()?;
    let mut bytes = 0u64;
    for (group, guests) in &scope.groups {
        let whole = site.whole_group(group, guests);
        for name in guests {
            run.goes_on()?;
            let turned = match &whole {
                Some(group) => site.reprotect_of(group, name).await,
                None => site.reprotect(name, None).await,
            };
            let report = turned.map_err(|error| {
                let standby = site.standby_named(name);
                match standby.is_some_and(|standby| !standby.remote().alive()) {
                    true => Failure::source_lost(error.to_string()),
                    false => fault(error),
                }
            })?;
            bytes = bytes.saturating_add(report.sent_bytes);
            let group = group.clone();
            run.note(name, move |guest| {
                guest.group = group;
                guest.reprotected_bytes = Some(report.sent_bytes);
            })
            .await?;
        }
        if let Some(group) = whole {
            site.turn_group(group).await.map_err(fault)?;
        }
    }
    Ok(Reprotected { bytes })
}
