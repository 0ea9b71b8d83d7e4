//! A driver's part in the cuts of its guest's group.

use std::sync::Arc;
use std::time::Duration;

use super::{GroupCut, Seat};
use crate::guest::embedded::VmmError;
use crate::guest::{After, GuestError, SinkError};
use crate::site::cut::{self, Sealed};
use crate::site::driver::{Attached, DriveError, Driver};

/// The others of a group are waited for at least so long, and for so many RPOs.
const PATIENCE: (Duration, u32) = (Duration::from_secs(60), 10);

impl Driver {
    /// The next point: of the whole group's instant where all of it are there,
    /// else of this guest alone.
    pub(in crate::site) async fn next_point(
        &mut self,
        attached: &mut Attached,
        seat: &mut Option<Seat>,
    ) -> Result<Sealed, DriveError> {
        let group = match seat {
            Some(seat) => self.group_cut(seat).await,
            None => None,
        };
        let mut made = None;
        if let Some(group) = group {
            match cut::make(self, attached, After::Continue, Some(group)).await {
                Ok(of_group) => made = Some(of_group),
                Err(error) if goes_on(&error) => {
                    tracing::warn!(guest = %self.record.name, %error, "a cut of its group was given up; it is cut by itself");
                    self.view.send_modify(|v| v.trouble = error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        let made = match made {
            Some(made) => made,
            None => cut::make(self, attached, After::Continue, None).await?,
        };
        let mark = made.group.clone();
        let sealed = cut::seal(self, attached, made).await?;
        if let (Some(seat), Some(mark)) = (&seat, &mark) {
            seat.sealed(mark);
        }
        self.take_seat(seat);
        Ok(sealed)
    }

    /// Groups change while guests run.
    fn take_seat(&self, seat: &mut Option<Seat>) {
        let group = self.site.group_of(self.record.id);
        let group = group.filter(|g| g.from.is_none() && g.members.len() > 1);
        let Some(group) = group else {
            *seat = None;
            return;
        };
        if !seat.as_ref().is_some_and(|seat| seat.is_of(&group)) {
            // First of all the old one: it is at the same table.
            *seat = None;
            *seat = Some(self.site.policies.cuts.seat(&group, self.record.id));
        }
    }

    /// The cut of the group, once all of its guests want one. None comes in
    /// time, or something else is to be done: the guest is cut by itself.
    async fn group_cut(&mut self, seat: &Seat) -> Option<Arc<GroupCut>> {
        let rpo = self.protection.policy.rpo.duration();
        let patience = PATIENCE.0.max(rpo * PATIENCE.1);
        let wanted = tokio::time::timeout(patience, seat.wants_cut());
        match self.interruptible_by_any(wanted).await {
            Ok(Ok(Ok(cut))) => cut,
            _ => {
                seat.cut_alone();
                None
            }
        }
    }
}

/// The guest runs on as if nothing had been, and can be cut by itself.
fn goes_on(error: &DriveError) -> bool {
    matches!(
        error,
        DriveError::Guest(
            GuestError::Gate(_)
                | GuestError::Sink(SinkError::Full)
                | GuestError::Vmm(VmmError::DoesNotStop { .. })
        )
    )
}
