//! The steps of a run that the source has a part in: its guests come to stand
//! still, are handed over, or go on there.

use std::time::{Duration, Instant};

use super::perform::{AtSite, fault, named};
use super::targets::Target;
use crate::activate::fence::Term;
use crate::replicate::message::{Message, RunMessage};
use crate::runbook::perform::{Ended, Failure, Scope, Synced};
use crate::site::remote::AskError;
use crate::site::standby::Standby;

/// Longest that a source is waited for while it converges; the step's own
/// timeout is what counts.
const HOLD: Duration = Duration::from_secs(24 * 3600);

/// A source acts on a word at once; it may have to attach to a guest for it.
const GOES_ON: Duration = Duration::from_secs(60);

/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A question to the source failed.
fn asked(error: AskError) -> Failure {
    match error {
        AskError::Unreachable(_) | AskError::TimedOut(_) => Failure::source_lost(error.to_string()),
        error => Failure::fault(error.to_string()),
    }
}

/// Every guest stands still at its source, and its last changes are sealed here.
pub(super) async fn final_sync(run: &AtSite, scope: &Scope) -> Ended<Synced> {
    let mut synced = Synced { point: 0, bytes: 0 };
    for target in run.targets(scope)? {
        run.goes_on()?;
        let known = run.facts.of(&target.name);
        if !(known.held && target.standby.is_staged(known.term).await) {
            take(run, &target).await?;
        }
        let known = run.facts.of(&target.name);
        synced.point = synced.point.max(known.point.unwrap_or(0));
        synced.bytes += known.final_bytes.unwrap_or(0);
    }
    Ok(synced)
}

/// Ends when the source is not heard of any more: a connection that died is
/// closed much later.
async fn falls_silent(standby: &Standby) {
    while standby.remote().alive() {
        tokio::time::sleep(LOOK).await;
    }
}

async fn take(run: &AtSite, target: &Target) -> Ended<()> {
    let standby = &target.standby;
    let group = target.group.clone();
    run.note(&target.name, move |guest| guest.group = group)
        .await?;
    if !standby.remote().alive() {
        return Err(Failure::source_lost(format!(
            "site '{}' cannot be reached now",
            standby.from()
        )));
    }
    // What can fail here is done while the guest still runs there.
    let number = standby.next_term(true).map_err(fault)?;
    let networks = run.facts.now().networks;
    standby
        .make_ready(target.newest()?, number, &networks, false)
        .await
        .map_err(fault)?;
    // From here on, a source that asks is not told that the move was given up.
    let expecting = standby.expect();
    let question = Message::Run(RunMessage::Hold {
        guest: standby.guest,
    });
    let answer = tokio::select! {
        answer = standby.remote().ask_within(question, HOLD) => answer,
        () = falls_silent(&target.standby) => Err(AskError::Unreachable(standby.from())),
    };
    let Message::Run(RunMessage::Held {
        point,
        bytes,
        stopped_at,
        term,
    }) = answer.map_err(asked)?
    else {
        return Err(asked(AskError::Unfitting(standby.from())));
    };
    let (run, target) = (run.clone(), target.clone());
    // To its end: what is held is written down, or the source goes on.
    let taken = tokio::spawn(async move {
        let _expecting = expecting;
        handed_over(&run, &target, (point, bytes, stopped_at), term).await
    });
    taken.await.map_err(fault)?
}

async fn handed_over(
    run: &AtSite,
    target: &Target,
    (point, bytes, stopped_at): (u64, u64, u64),
    term: Term,
) -> Ended<()> {
    let site = run.site()?;
    let standby = &target.standby;
    let known = site.fence.current(standby.guest).map_or(0, |t| t.number);
    let sound = term.group == standby.guest && term.owner == site.key();
    if !sound || term.number > known.saturating_add(1 << 16) {
        return Err(Failure::fault(format!(
            "site '{}' hands '{}' over under a term that is none of this site's; do both run the same version?",
            standby.from(),
            target.name
        )));
    }
    // In this order: see `State::staged`.
    standby.stage(Some(term)).await;
    run.note(&target.name, move |guest| {
        guest.held = true;
        guest.term = Some(term);
        guest.final_bytes = Some(bytes);
        guest.stopped_at = Some(stopped_at / 1_000_000);
        guest.source_stopped = true;
    })
    .await?;
    run.keep_point(target, point).await?;
    let fence = site.clone();
    let adopted = tokio::task::spawn_blocking(move || fence.fence.adopt(term)).await;
    let in_force = adopted.map_err(fault)?.map_err(fault)?;
    match in_force == term {
        true => Ok(()),
        false => Err(Failure::fault(format!(
            "a newer term of '{}' is known here: {}",
            target.name, in_force.number
        ))),
    }
}

/// Undoes a final sync: the source's guests go on there.
pub(super) async fn let_go_on(run: &AtSite, scope: &Scope) -> Ended<()> {
    let site = run.site()?;
    let targets = run.targets(scope)?;
    let mut held = Vec::new();
    for target in targets.iter().rev() {
        let known = run.facts.of(&target.name);
        if let Some(term) = known.term {
            target.standby.end_staged(term).await.map_err(fault)?;
        }
        target.standby.unready().await;
        release(run, target).await?;
        if known.held {
            held.push(target);
        }
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
    tracing::info!(run = run.run, guests = ?named(&targets).guests, "they go on at their source");
    Ok(())
}

/// What is held is not held any more: written down before the source is told.
pub(super) async fn release(run: &AtSite, target: &Target) -> Ended<()> {
    run.note(&target.name, |guest| guest.held = false).await?;
    target.standby.stage(None).await;
    Ok(())
}

/// Undoes a fence: the source owns its guests again, under a newer term.
pub(super) async fn give_back(run: &AtSite, scope: &Scope) -> Ended<()> {
    let site = run.site()?;
    for target in run.targets(scope)?.iter().rev() {
        let Some(ours) = run.facts.of(&target.name).term else {
            continue;
        };
        let standby = &target.standby;
        standby.end_staged(ours).await.map_err(fault)?;
        standby.unready().await;
        let current = site.fence.current(standby.guest).unwrap_or(ours);
        let theirs = Term {
            group: standby.guest,
            number: current.number + 1,
            owner: standby.remote().record.key,
        };
        let theirs = match current.owner == theirs.owner {
            true => current,
            false if current == ours => {
                let fence = site.clone();
                let adopted = tokio::task::spawn_blocking(move || fence.fence.adopt(theirs)).await;
                adopted.map_err(fault)?.map_err(fault)?
            }
            false => {
                return Err(Failure::fault(format!(
                    "a newer term of '{}' than this run's is known here: {}",
                    target.name, current.number
                )));
            }
        };
        let question = Message::Run(RunMessage::GiveBack { term: theirs });
        let answer = standby.remote().ask_within(question, GOES_ON).await;
        if !matches!(answer.map_err(asked)?, Message::Done) {
            return Err(asked(AskError::Unfitting(standby.from())));
        }
    }
    Ok(())
}
