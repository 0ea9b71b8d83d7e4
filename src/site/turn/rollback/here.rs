//! Back to another point, here: what runs ends, and the guest runs from that point.

use std::sync::Arc;
use std::time::Instant;

use super::{committed, not_here};
use crate::replicate::message::ActivationTimes;
use crate::site::Site;
use crate::site::operate::{OperateError, failed};
use crate::site::promote::ActivateError;
use crate::site::standby::{Standby, step};
use crate::site::turn::view::RollbackReport;

impl Site {
    /// Here, from another point: under a newer term, as any takeover.
    pub(super) async fn roll_back_to(
        self: &Arc<Self>,
        standby: &Arc<Standby>,
        point: u64,
    ) -> Result<RollbackReport, OperateError> {
        let begun = Instant::now();
        let mut state = standby.state.lock().await;
        let state = &mut *state;
        let name = standby.name();
        let Some((active, ready)) = state.active.clone() else {
            return Err(not_here(standby));
        };
        if active.committed_at.is_some() {
            return Err(committed(standby));
        }
        if active.returning.is_some() {
            return Err(OperateError::Conflict(format!(
                "'{name}' is being rolled back to '{}'; see farhaven status",
                standby.from()
            )));
        }
        if !standby.points().iter().any(|p| p.point == point) {
            return Err(OperateError::Unknown(format!(
                "there is no point {point} of '{name}' here; see farhaven points {name}"
            )));
        }
        // What can fail is done while it still runs.
        let _stays = standby.open(point).map_err(failed)?;
        standby.refuse_missing_networks().await.map_err(failed)?;
        let (site, guest) = (self.clone(), standby.guest);
        let term = step(move || site.fence.overrule(guest, site.key()))
            .await
            .map_err(failed)?
            .map_err(failed)?;
        let announced = self.announce_term(standby.remote(), term);
        self.unless_overruled(&[guest], announced)
            .await?
            .map_err(|why| OperateError::Failed(format!("'{name}' runs on here: {why}")))?;
        let lost = crate::site::age(active.at);
        state.active = None;
        standby.see(|s| {
            s.active = None;
            s.hydration = None;
        });
        // Its disks stay, as evidence, until somebody discards them.
        step(move || ready.end()).await.map_err(failed)?;
        standby.leave_evidence(state, self);
        let ran: Result<ActivationTimes, _> = standby
            .run(state, point, term, begun, ActivationTimes::default())
            .await;
        let times = ran.map_err(|error| {
            if matches!(error, ActivateError::Superseded(_)) {
                return OperateError::Failed(format!(
                    "'{name}' was ended here, and is another site's by a newer term that came meanwhile; see farhaven status there"
                ));
            }
            OperateError::Failed(format!(
                "'{name}' runs nowhere now: point {point} could not be run ({error}). Take it over from another: farhaven failover {name} --force --point NUMBER"
            ))
        })?;
        Ok(RollbackReport {
            guest: name,
            at: self.config.site.name.clone(),
            point: Some(point),
            term: term.number,
            lost_ms: lost.as_millis() as u64,
            blackout_ms: times.total.as_secs_f64() * 1e3,
            note: String::new(),
        })
    }
}
