//! A driver's part in the move of its guest's group: as a move of that guest
//! alone ([`crate::site::handover`]), but cut at the instant of all, sealed
//! without being handed over, and then held until it is known where all run.

use std::time::{Duration, Instant};

use super::party::{Place, Verdict};
use crate::guest::After;
use crate::replicate::message::Handed;
use crate::site::commands::Convoy;
use crate::site::converge::Converged;
use crate::site::cut;
use crate::site::driver::{Attached, DriveError, Driver};
use crate::site::handover::{
    end, get_ready, give_up, how_it_ended, join, keep_moving, not_begun, report, runs_on,
};
use crate::site::view::{MoveReport, Phase};

/// The last point of one guest is sealed in this time, or three times what was
/// expected, or nobody is moved.
const SEAL: Duration = Duration::from_secs(30);

/// Hands the guest over with all of its group, or none of them.
pub(in crate::site) async fn hand_over(
    driver: &mut Driver,
    attached: &mut Attached,
    accept_pause: bool,
    convoy: &Convoy,
    place: &Place,
) -> Result<MoveReport, DriveError> {
    let declared = Instant::now();
    driver.phase(Phase::Moving);
    let ready = get_ready(driver, attached, accept_pause, Some(convoy)).await;
    let (term, converged) = ready.inspect_err(|error| {
        let name = &driver.record.name;
        place
            .party()
            .give_up(&format!("'{name}' was not moved: {error}"));
    })?;
    if let Err(error) = keep_moving(driver, term).await {
        place.party().give_up(&error.to_string());
        return Err(error);
    }
    driver.phase(Phase::Held);
    let made = cut::make(
        driver,
        attached,
        After::Hold,
        Some(place.party().cut.clone()),
    )
    .await;
    let made = match made {
        Ok(made) => made,
        Err(error) => return Err(goes_on(driver, attached, place, error).await?),
    };
    let patience = SEAL.max(converged.expected * 3);
    match cut::seal_held(driver, attached, &made, patience).await {
        Ok(()) => place.sealed(Handed {
            guest: driver.record.id,
            point: made.point,
            term,
        }),
        Err(error) => return Err(goes_on(driver, attached, place, error).await?),
    }
    let verdict = driver.interruptible(place.verdict()).await?;
    let name = driver.record.name.clone();
    match verdict {
        Verdict::There {
            runs,
            times,
            note,
            asked,
        } => {
            end(driver, attached.guest.take(), term).await?;
            if !runs {
                let to = &driver.protection.to;
                let told = format!("handed over to '{to}', and does not run there: {note}");
                driver.view.send_modify(|v| v.trouble = told);
            }
            let blackout = asked.duration_since(made.stopped) + times.total;
            tracing::info!(guest = %name, blackout_ms = blackout.as_millis() as u64, "moved with its group");
            let total = declared.elapsed();
            // What it has to say of one that does not run is all there is to tell.
            let converged = match runs {
                true => join(converged, note),
                false => Converged { note, ..converged },
            };
            Ok(MoveReport {
                runs,
                ..report(driver, &made, blackout, total, times, term, converged)
            })
        }
        Verdict::Here(why) => {
            let error = DriveError::Other(why);
            Err(goes_on(driver, attached, place, error).await?)
        }
        Verdict::Unknown(why) => {
            tracing::warn!(guest = %name, why, "the hand-over of its group is in doubt");
            let ended = how_it_ended(driver, attached.guest.take()).await?;
            let Some(times) = ended else {
                return Err(DriveError::Other(format!(
                    "the move failed and '{name}' runs on here: {why}"
                )));
            };
            let (blackout, total) = (made.stopped.elapsed(), declared.elapsed());
            let converged = join(converged, "the peer's word came late".to_owned());
            Ok(report(
                driver, &made, blackout, total, times, term, converged,
            ))
        }
    }
}

/// Nothing comes of it, for nobody of the group: the peer was not asked to run
/// any of them. The guest goes on here; what to tell of it.
async fn goes_on(
    driver: &mut Driver,
    attached: &mut Attached,
    place: &Place,
    error: DriveError,
) -> Result<DriveError, DriveError> {
    let name = &driver.record.name;
    let party = place.party();
    party.give_up(&format!("'{name}' was not moved: {error}"));
    let went_on = runs_on(driver, attached).await;
    give_up(driver);
    went_on?;
    Ok(not_begun(driver, error))
}
