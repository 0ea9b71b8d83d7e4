//! The steps of a run that the source has a part in: its guests come to stand
//! still, are handed over, or go on there.

use std::time::{Duration, Instant};

use farhaven_policies::runbook::Mode;

use super::perform::{AtSite, fault, named};
use super::targets::Target;
use super::{quiesce, shutdown};
use crate::activate::fence::Term;
use crate::replicate::message::{Message, RunMessage, TurnMessage};
use crate::runbook::perform::{Ended, Failure, Guests, Scope, Synced};
use crate::site::remote::AskError;
use crate::site::standby::Standby;
use crate::site::turn::RollBack;

/// Longest that a source is waited for while it converges; the step's own
/// timeout is what counts.
const HOLD: Duration = Duration::from_secs(24 * 3600);

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

/// Every guest stands still at its source, and its last changes are sealed here.
pub(super) async fn final_sync(run: &AtSite, scope: &Scope) -> Ended<Synced> {
    let site = run.site()?;
    let mut synced = Synced { point: 0, bytes: 0 };
    for target in run.targets(scope)? {
        run.goes_on()?;
        let known = run.facts.of(&target.name);
        // All of it, or it is asked again: the answer is the same while it is held.
        let taken = known.held
            && known.point.is_some()
            && known.term == site.fence.current(target.standby.guest)
            && target.standby.is_staged(known.term).await;
        if !taken {
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
    let ready = target.clone();
    run.whole(move |run| async move {
        let (standby, known) = (&ready.standby, run.facts.of(&ready.name));
        let number = standby.next_term(true).map_err(fault)?;
        let newest = ready.newest()?;
        let made = standby.make_ready(newest, number, &known.networks, false);
        made.await.map_err(fault)
    })
    .await?;
    // From here on, a source that asks is not told that the move was given up.
    let expecting = standby.expect();
    let question = Message::Run(RunMessage::Hold {
        guest: standby.guest,
        quiesce: run.facts.of(&target.name).quiesce,
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
        quiesced,
    }) = answer.map_err(asked)?
    else {
        return Err(asked(AskError::Unfitting(standby.from())));
    };
    let target = target.clone();
    // To its end: what is held is written down, or the source goes on.
    run.whole(move |run| async move {
        let _expecting = expecting;
        quiesce::tell(&run, &target, quiesced).await?;
        handed_over(&run, &target, (point, bytes, stopped_at), term).await
    })
    .await
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
    let points = [(target.name.clone(), point)].into();
    run.keep_points(std::slice::from_ref(target), &points)
        .await?;
    let fence = site.clone();
    let adopted = crate::work::spawn_blocking(move || fence.fence.adopt(term)).await;
    let in_force = adopted.map_err(fault)?.map_err(fault)?;
    match in_force == term {
        true => Ok(()),
        false => Err(Failure::fault(format!(
            "a newer term of '{}' is known here: {}",
            target.name, in_force.number
        ))),
    }
}

/// The source still holds its guest, alive. What runs here is discarded only
/// then: else nothing would be left of it.
async fn still_held(target: &Target) -> Ended<()> {
    let standby = &target.standby;
    let guest = standby.guest;
    let question = Message::Run(RunMessage::StillHeld { guest });
    match standby.remote().ask_within(question, GOES_ON).await {
        Ok(Message::Run(RunMessage::Held { .. })) => Ok(()),
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
    let site = run.site()?;
    let targets = run.targets(&scope)?;
    let mut held = Vec::new();
    for target in targets.iter().rev() {
        run.goes_on()?;
        end_here(&run, target).await?;
        target.standby.unready().await;
        if run.facts.of(&target.name).held {
            held.push(target);
        }
        release(&run, target).await?;
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
