//! The steps of a run by which its source's guests go on there: what a final sync,
//! a start or a fence did is undone, or the group rolls back.

use std::time::{Duration, Instant};

use farhaven_policies::runbook::Mode;

use super::perform::{AtSite, fault, named};
use super::shutdown;
use super::targets::Target;
use crate::activate::fence::Term;
use crate::replicate::message::{Message, RunMessage, TurnMessage};
use crate::runbook::perform::{Ended, Failure, Guests, Scope};
use crate::site::remote::AskError;
use crate::site::turn::RollBack;

/// A source acts on a word at once; it may have to attach to a guest for it.
const GOES_ON: Duration = Duration::from_secs(60);

/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A question to the source failed.
pub(super) fn asked(error: AskError) -> Failure {
    match error {
        AskError::Unreachable(_) | AskError::TimedOut(..) => {
            Failure::source_lost(error.to_string())
        }
        error => Failure::fault(error.to_string()),
    }
}

/// The source still holds its guest, alive. What runs here is discarded only
/// then: else nothing would be left of it.
async fn still_held(target: &Target) -> Ended<()> {
    let standby = &target.standby;
    let guest = standby.guest;
    let question = Message::Run(RunMessage::StillHeld { guest });
    match standby.remote().ask_within(question, GOES_ON).await {
        Ok(Message::Run(RunMessage::Held(_))) => Ok(()),
        Ok(_) => Err(asked(AskError::Unfitting(standby.from()))),
        Err(AskError::Refused { why, .. }) => Err(Failure::fault(format!(
            "'{}' runs on here, since it could not go on at '{}': {why}",
            target.name,
            standby.from()
        ))),
        Err(error) => Err(asked(error)),
    }
}

/// Ends what this run runs here, when its source holds its own copy of it.
async fn end_here(run: &AtSite, target: &Target) -> Ended<()> {
    let known = run.facts.of(&target.name);
    let Some(term) = known.term else {
        return Ok(());
    };
    if target.standby.active().is_some() {
        still_held(target).await?;
    }
    target.standby.end_staged(term).await.map_err(fault)?;
    run.note(&target.name, |guest| guest.started_at = None)
        .await
}

/// Undoes a start: after a planned move the guests end here, and are held at
/// their source still. After a failover they go back to it at once, so that
/// what runs here is discarded only when its copy there runs.
pub(super) async fn take_back(run: AtSite, scope: Scope) -> Ended<()> {
    if scope.mode == Mode::Unplanned {
        return give_back(run, scope).await;
    }
    for target in run.targets(&scope)?.iter().rev() {
        run.goes_on()?;
        end_here(&run, target).await?;
    }
    Ok(())
}

/// The groups return to their source, by a step of the runbook.
pub(super) async fn roll_back(run: AtSite, scope: Scope) -> Ended<Guests> {
    let guests = named(&run.targets(&scope)?);
    match scope.mode {
        Mode::Unplanned => give_back(run, scope).await?,
        _ => {
            let_go_on(run.clone(), scope.clone()).await?;
            shutdown::start_again(run, scope).await?;
        }
    }
    Ok(guests)
}

/// Undoes a final sync: the source's guests go on there.
pub(super) async fn let_go_on(run: AtSite, scope: Scope) -> Ended<()> {
    let targets = run.targets(&scope)?;
    let_these_go_on(&run, &targets).await?;
    tracing::info!(run = run.run, guests = ?named(&targets).guests, "they go on at their source");
    Ok(())
}

/// As [`let_go_on`], these guests; ends when the source has said so of those it held.
pub(super) async fn let_these_go_on(run: &AtSite, targets: &[Target]) -> Ended<()> {
    let site = run.site()?;
    let mut held = Vec::new();
    for target in targets.iter().rev() {
        run.goes_on()?;
        end_here(run, target).await?;
        target.standby.unready().await;
        if run.facts.of(&target.name).held {
            held.push(target);
        }
        release(run, target).await?;
    }
    for target in held {
        let released = RunMessage::Release {
            guest: target.standby.guest,
        };
        let remote = target.standby.remote();
        remote.ask(Message::Run(released)).await.map_err(asked)?;
        // It says so by a newer term of its own.
        let deadline = Instant::now() + GOES_ON;
        loop {
            let current = site.fence.current(target.standby.guest);
            if current.is_none_or(|term| term.owner == remote.record.key) {
                break;
            }
            if Instant::now() > deadline {
                return Err(Failure::source_lost(format!(
                    "site '{}' has not said within {GOES_ON:?} that '{}' goes on there; it asks by itself when it is back",
                    target.standby.from(),
                    target.name
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    Ok(())
}

/// What is held is not held any more: written down before the source is told.
pub(super) async fn release(run: &AtSite, target: &Target) -> Ended<()> {
    run.note(&target.name, |guest| guest.held = false).await?;
    target.standby.stage(None).await;
    Ok(())
}

/// Undoes a fence: the source owns its guests again, under a newer term.
pub(super) async fn give_back(run: AtSite, scope: Scope) -> Ended<()> {
    for target in run.targets(&scope)?.iter().rev() {
        run.goes_on()?;
        let Some(ours) = run.facts.of(&target.name).term else {
            continue;
        };
        match target.standby.active() {
            Some(active) if active.term == ours => hand_back(&run, target).await?,
            Some(active) => {
                return Err(Failure::fault(format!(
                    "'{}' runs here under term {}, which is none of this run's",
                    target.name, active.term.number
                )));
            }
            None => hand_term_back(&run, target, ours).await?,
        }
    }
    Ok(())
}

/// It runs here: it is stopped, its source's copy goes on, and only then what
/// ran here is discarded.
async fn hand_back(run: &AtSite, target: &Target) -> Ended<()> {
    let site = run.site()?;
    // Whoever rolls an unplanned run back has decided that; how much it is, is told.
    let home = RollBack {
        point: None,
        accept_loss: true,
    };
    let report = site.rollback(&target.name, home).await.map_err(|error| {
        match target.standby.remote().alive() {
            true => fault(error),
            false => Failure::source_lost(error.to_string()),
        }
    })?;
    run.note(&target.name, move |guest| {
        guest.started_at = None;
        guest.lost_ms = Some(report.lost_ms);
    })
    .await
}

/// It does not run here: its source gets a newer term of its own.
async fn hand_term_back(run: &AtSite, target: &Target, ours: Term) -> Ended<()> {
    let site = run.site()?;
    let standby = &target.standby;
    standby.unready().await;
    let guest = standby.guest;
    let question = Message::Turn(Box::new(TurnMessage::Look { guest }));
    let seen = standby.remote().ask_within(question, GOES_ON).await;
    if let Message::Turn(seen) = seen.map_err(asked)?
        && let TurnMessage::Seen(copy) = *seen
        && copy.runs.is_none()
    {
        return Err(Failure::fault(format!(
            "'{}' cannot go on at '{}': no copy of it is left there. End the run, and take it over here: farhaven failover {0} --force",
            target.name,
            standby.from()
        )));
    }
    let current = site.fence.current(guest).unwrap_or(ours);
    let theirs = Term {
        group: guest,
        number: current.number + 1,
        owner: standby.remote().record.key,
    };
    let theirs = match current.owner == theirs.owner {
        true => current,
        false if current == ours => {
            let fence = site.clone();
            let adopted = crate::work::spawn_blocking(move || fence.fence.adopt(theirs)).await;
            adopted.map_err(fault)?.map_err(fault)?
        }
        false => {
            return Err(Failure::fault(format!(
                "a newer term of '{}' than this run's is known here: {}",
                target.name, current.number
            )));
        }
    };
    let order = Message::Turn(Box::new(TurnMessage::GoBack { term: theirs }));
    match standby.remote().ask_within(order, GOES_ON).await {
        Ok(Message::Running { .. }) => Ok(()),
        Ok(_) => Err(asked(AskError::Unfitting(standby.from()))),
        Err(error) => Err(asked(error)),
    }
}
