//! A planned move, seen from the source: prepare, copy until little is left,
//! stop, ship the last of it with the next term, let go.
//!
//! The guest is stopped from the last cut until the peer says that it runs.
//! Before that cut, the term of the hand-over is written down: a daemon that
//! comes back finds it and asks the peer how the move ended. The guest is
//! taken back only when the peer confirms that it gave up, or when an operator
//! decides so.

use std::time::{Duration, Instant};

pub(super) mod shutdown;

use self::shutdown::stays_down;

use super::commands::Convoy;
use super::converge::{Converged, converge, throttle};
use super::cut;
use super::driver::{Attached, DriveError, Driver};
use super::groups::together;
use super::remote::AskError;
use super::runs::hold;
use super::steps::{blocking, take};
use super::view::{MoveReport, Phase};
use crate::activate::fence::Term;
use crate::guest::{After, Guest, GuestError};
use crate::replicate::message::{ActivationTimes, Message};

/// The peer launches QEMU and fills RAM in this time, or the move is not begun.
const PREPARATION: Duration = Duration::from_secs(120);

/// Performs the move of a protected guest. On an error before the peer had its
/// say the guest runs here; else the error says that it is held.
pub(super) async fn perform(
    driver: &mut Driver,
    attached: &mut Attached,
    accept_pause: bool,
    convoy: Option<&Convoy>,
) -> Result<MoveReport, DriveError> {
    if let Some(guest) = attached.guest.as_mut() {
        guest.leave_to_the_cut(false);
    }
    driver.accept_hard_stop = accept_pause;
    let outcome = match convoy.and_then(|convoy| Some((convoy, convoy.place()?))) {
        Some((convoy, place)) => {
            together::hand_over(driver, attached, accept_pause, convoy, place).await
        }
        None => hand_over(driver, attached, accept_pause, convoy).await,
    };
    if let Some(guest) = attached.guest.as_mut() {
        guest.leave_to_the_cut(true);
    }
    driver.accept_hard_stop = false;
    // However it ended: a guest that is still here gets all of its time.
    throttle(attached, 0).await.unwrap_or_else(|error| {
        tracing::warn!(guest = %driver.record.name, %error, "the guest may still be throttled; it is let free with the next attach");
    });
    outcome
}

async fn hand_over(
    driver: &mut Driver,
    attached: &mut Attached,
    accept_pause: bool,
    convoy: Option<&Convoy>,
) -> Result<MoveReport, DriveError> {
    let declared = Instant::now();
    driver.phase(Phase::Moving);
    let (term, mut converged) = get_ready(driver, attached, accept_pause, convoy).await?;
    keep_moving(driver, term).await?;
    driver.phase(Phase::Held);
    let made = match cut::make(driver, attached, After::Hold, None).await {
        Ok(made) => made,
        Err(error) => {
            let went_on = runs_on(driver, attached).await;
            give_up(driver);
            went_on?;
            return Err(not_begun(driver, error));
        }
    };
    let outcome = cut::seal_and_run(driver, attached, &made, term).await;
    let blackout = made.stopped.elapsed();
    // A peer that is lost now must not keep others from their last cuts.
    drop(converged.turn.take());
    match outcome {
        Ok(times) => {
            end(driver, attached.guest.take(), term).await?;
            tracing::info!(guest = %driver.record.name, blackout_ms = blackout.as_millis() as u64, "moved");
            Ok(report(
                driver,
                &made,
                blackout,
                declared.elapsed(),
                times,
                term,
                converged,
            ))
        }
        Err(error) => {
            tracing::warn!(guest = %driver.record.name, %error, "the hand-over is in doubt");
            match how_it_ended(driver, attached.guest.take()).await? {
                Some(times) => {
                    let note = join(converged, "the peer's word came late".to_owned());
                    Ok(report(
                        driver,
                        &made,
                        made.stopped.elapsed(),
                        declared.elapsed(),
                        times,
                        term,
                        note,
                    ))
                }
                None => Err(DriveError::Other(format!(
                    "the move failed and '{}' runs on here: {error}",
                    driver.record.name
                ))),
            }
        }
    }
}

/// The peer is prepared, and the guest near to its last cut: under which term it
/// is to be handed over.
pub(super) async fn get_ready(
    driver: &mut Driver,
    attached: &mut Attached,
    accept_pause: bool,
    convoy: Option<&Convoy>,
) -> Result<(Term, Converged), DriveError> {
    let id = driver.record.id;
    let known = driver.site.fence.current(id).map_or(0, |t| t.number);
    let term = Term {
        group: id,
        number: known + 1,
        owner: driver.remote.record.key,
    };

    if driver.record.definition.is_embedded() {
        // What it asks of a host may be more than when it was started.
        let (site, record) = (driver.site.clone(), driver.record.clone());
        let record = blocking(move || site.as_it_is(record)).await?;
        let remote = driver.remote.clone();
        // A newer term may come before the answer does, and the guest runs on meanwhile.
        let asked = super::guests::refused_by_builder(&record, &remote);
        let refused = driver.interruptible(asked).await?;
        if let Some(finding) = refused.first() {
            let why = DriveError::Other(format!("{}; {}", finding.what, finding.mend));
            return Err(not_begun(driver, why));
        }
    }
    // The peer gets ready while rounds make the last cut small.
    let remote = driver.remote.clone();
    let preparing = tokio::spawn(async move {
        remote
            .ask_within(Message::Prepare { guest: id }, PREPARATION)
            .await
    });
    let round = converge(driver, attached, accept_pause, convoy).await;
    let prepared = driver
        .interruptible(preparing)
        .await?
        .map_err(|e| DriveError::Other(format!("preparing the peer ended early: {e}")))?;
    let ready = match (round, prepared) {
        (Ok(converged), Ok(Message::Prepared)) => Ok(converged),
        (Ok(_), Ok(_)) => Err(AskError::Unfitting(driver.protection.to.clone()).into()),
        (Ok(_), Err(error)) => Err(error.into()),
        (Err(error), _) => Err(error),
    };
    match ready {
        Ok(converged) => Ok((term, converged)),
        Err(error) => {
            // Nothing was stopped; the peer's word is not needed.
            give_up(driver);
            Err(not_begun(driver, error))
        }
    }
}

/// Writes down that the guest is about to be held for a move. Without this on
/// disk, a daemon that comes back would let the guest go on.
pub(super) async fn keep_moving(driver: &mut Driver, term: Term) -> Result<(), DriveError> {
    driver.protection.held = None;
    driver.protection.moving = Some(term);
    if let Err(why) = driver.keep_protection().await {
        driver.protection.moving = None;
        give_up(driver);
        return Err(DriveError::Other(format!(
            "'{}' runs on here; the move was not begun, because it cannot be written down: {why}",
            driver.record.name
        )));
    }
    Ok(())
}

pub(super) fn not_begun(driver: &Driver, error: DriveError) -> DriveError {
    match error {
        DriveError::Interrupted => error,
        DriveError::TooLong(why) => DriveError::TooLong(format!(
            "'{}' runs on here, protected as before, and was not moved: {why}. To move it all the same: farhaven move {0} --accept-pause",
            driver.record.name
        )),
        DriveError::GivenUp(why) => DriveError::GivenUp(format!(
            "'{}' runs on here, protected as before: {why}",
            driver.record.name
        )),
        error => DriveError::Other(format!(
            "'{}' runs on here and was not moved: {error}",
            driver.record.name
        )),
    }
}

/// Tells the peer that nothing comes of the move, without waiting for it.
pub(super) fn give_up(driver: &Driver) {
    let (remote, guest) = (driver.remote.clone(), driver.record.id);
    tokio::spawn(async move { remote.ask(Message::GiveUp { guest }).await });
}

pub(super) fn join(mut converged: Converged, then: String) -> Converged {
    let first = &mut converged.note;
    if !first.is_empty() && !then.is_empty() {
        first.push_str("; ");
    }
    first.push_str(&then);
    converged
}

pub(super) fn report(
    driver: &Driver,
    made: &cut::Made,
    blackout: Duration,
    total: Duration,
    times: ActivationTimes,
    term: Term,
    converged: Converged,
) -> MoveReport {
    MoveReport {
        guest: driver.record.name.clone(),
        to: driver.protection.to.clone(),
        runs: true,
        point: made.point,
        blackout_ms: blackout.as_secs_f64() * 1e3,
        expected_blackout_ms: converged.expected.as_secs_f64() * 1e3,
        total_ms: total.as_secs_f64() * 1e3,
        final_bytes: made.final_bytes,
        term: term.number,
        times,
        note: driver.told_of_boot(converged.note),
    }
}

/// After a restart in the middle of a move, or a failed take-back: finds out
/// and acts on it.
pub(super) async fn resolve(driver: &mut Driver) -> Result<(), DriveError> {
    how_it_ended(driver, None).await.map(|_| ())
}

/// Asks the peer until it answers, then lets go or takes back. `Some` when it
/// runs there.
pub(super) async fn how_it_ended(
    driver: &mut Driver,
    mut guest: Option<Box<dyn Guest>>,
) -> Result<Option<ActivationTimes>, DriveError> {
    let Some(term) = driver.protection.moving else {
        return Ok(None);
    };
    let guest_id = driver.record.id;
    let remote = driver.remote.clone();
    let answer = loop {
        let asked = remote.ask_within(Message::GiveUp { guest: guest_id }, Duration::from_secs(60));
        match driver.interruptible(asked).await? {
            answer if hold::is_undecided(&answer) => {
                hold::undecided(driver, &mut guest).await?;
            }
            Err(AskError::Unreachable(_) | AskError::TimedOut(..)) => {
                let name = driver.record.name.clone();
                driver.view.send_modify(|v| {
                    v.phase = Phase::Held;
                    v.trouble = format!(
                        "stopped for a move, and the peer's word is not known: waiting for it. If that site is lost for good: farhaven take-back {name} --force"
                    );
                });
                // Any command ends the wait; the move is resolved in the next attempt.
                driver.interruptible_by_any(remote.reachable()).await?;
            }
            other => break other?,
        }
    };
    match answer {
        Message::Running { term: there, .. } if there != term => {
            // Taken over by an operator, from some point: the held copy may be newer.
            driver.site.fence.adopt(there)?;
            driver.protection.moving = None;
            driver.protection.held = None;
            let _ = driver.keep_protection().await;
            Err(DriveError::Other(format!(
                "'{}' was taken over at '{}' under term {} while it was held here for a move",
                driver.record.name, driver.protection.to, there.number
            )))
        }
        Message::Running { times, .. } => {
            end(driver, guest, term).await?;
            Ok(Some(times))
        }
        Message::GivenUp => {
            // The peer may have written the term of the hand-over down: the next one is ours.
            let own = Term {
                number: term.number + 1,
                owner: driver.site.key(),
                ..term
            };
            match driver.protection.shut_down {
                true => stays_down(driver, guest, own).await?,
                false => run_here(driver, guest, own).await?,
            }
            Ok(None)
        }
        _ => Err(AskError::Unfitting(driver.protection.to.clone()).into()),
    }
}

/// An operator's decision: the peer's word is not waited for.
pub(super) async fn take_back(driver: &mut Driver) -> Result<(), DriveError> {
    let Some(term) = driver.protection.moving else {
        return Ok(());
    };
    match driver
        .site
        .fence
        .may_run(driver.record.id, driver.site.key())
    {
        Err(error) if driver.site.fence.current(driver.record.id) != Some(term) => {
            return Err(error.into());
        }
        _ => {}
    }
    let own = Term {
        number: term.number + 1,
        owner: driver.site.key(),
        ..term
    };
    run_here(driver, None, own).await
}

/// This site owns a guest that it had offered: under the next term.
fn own_again(driver: &Driver, own: Term) -> Result<(), DriveError> {
    let now = driver.site.fence.adopt(own)?;
    if now != own {
        return Err(DriveError::Other(
            "a newer term of this guest is known by now".to_owned(),
        ));
    }
    driver.site.tell_terms();
    Ok(())
}

async fn run_here(
    driver: &mut Driver,
    guest: Option<Box<dyn Guest>>,
    own: Term,
) -> Result<(), DriveError> {
    own_again(driver, own)?;
    let (site, record) = (driver.site.clone(), driver.record.clone());
    let stood = driver.stood_before;
    let resumed = blocking(move || match guest {
        // Whoever stopped it before the move lets it go on.
        Some(_) if stood => Ok(()),
        Some(mut guest) => guest.resume(),
        None => site.resume_guest(&record),
    })
    .await?;
    if let Err(GuestError::Gone(_)) = &resumed {
        // It ended while it was held, and no waiting brings it back.
        driver.protection.moving = None;
        driver.protection.held = None;
        let _ = driver.keep_protection().await;
    }
    resumed?;
    driver.protection.moving = None;
    driver.protection.held = None;
    driver.is_shut_down(false);
    // Heard while it was held: it is not stopped for good any more.
    driver.protection.stopped = false;
    let _ = driver.keep_protection().await;
    tracing::warn!(guest = %driver.record.name, term = own.number, "taken back: it runs on here");
    Ok(())
}

/// It runs at the peer: nothing of it may run here again.
pub(super) async fn end(
    driver: &mut Driver,
    guest: Option<Box<dyn Guest>>,
    term: Term,
) -> Result<(), DriveError> {
    driver.site.fence.adopt(term)?;
    // Its stopped copy is what a rollback returns to, and what a reprotection builds upon.
    blocking(move || drop(guest)).await?;
    driver.protection.moving = None;
    driver.protection.held = None;
    driver.is_shut_down(false);
    driver.protection.moved = Some(term);
    driver.protection.committed = false;
    let _ = driver.keep_protection().await;
    let to = driver.protection.to.clone();
    driver.view.send_modify(|v| {
        v.phase = Phase::Moved;
        v.term = Some(term.number);
        v.trouble = format!("it runs at '{to}'; its copy here is kept stopped");
    });
    Ok(())
}

/// The peer was not asked to run it yet: it goes on here, unless an operator has
/// had it taken over there.
pub(super) async fn runs_on(
    driver: &mut Driver,
    attached: &mut Attached,
) -> Result<(), DriveError> {
    let (site, id) = (driver.site.clone(), driver.record.id);
    let ours = site.fence.may_run(id, site.key());
    if ours.is_ok() {
        resume(driver, attached).await?;
    }
    driver.protection.moving = None;
    driver.protection.held = None;
    // Should this fail: the peer has given up by then, and says so.
    let _ = driver.keep_protection().await;
    Ok(ours?)
}

pub(super) async fn resume(driver: &Driver, attached: &mut Attached) -> Result<(), DriveError> {
    if driver.protection.shut_down || driver.stood_before {
        // Its run decides when it boots, or whoever stopped it when it goes on.
        return Ok(());
    }
    let mut guest = take(&mut attached.guest)?;
    let name = driver.record.name.clone();
    let (guest, resumed) = blocking(move || {
        let resumed = if guest.running() == Some(true) {
            Ok(())
        } else {
            guest.resume()
        };
        (guest, resumed)
    })
    .await?;
    attached.guest = Some(guest);
    resumed.inspect_err(|error| tracing::error!(guest = %name, %error, "could not be resumed"))?;
    Ok(())
}
