//! One round of a planned move: what changed goes to the peer while the guest runs.
//!
//! A long round is a point. Sealing is little beside it, and the RPO holds. A
//! short one is not sealed: round trips and syncs would take longer than its
//! bytes, and the guest writes on meanwhile. What short rounds bring belongs to
//! the point of the cut after them, so a move that is given up loses none of it.
//! The next look at the guest's memory begins while the link still carries the
//! last of the one before: as much as it carries while a cut scans, which is
//! gone when the cut has found what to send. So a round takes what its bytes
//! take, and what the guest writes meanwhile is less.
//! Nothing waits for the cut in a move's rounds ([`crate::guest::hot`]): it is
//! the cut that is to be short.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_policies::decide::MoveFacts;

use super::converge::{measured, outright, told_rate};
use super::cut::Sealed;
use super::driver::{Attached, DriveError, Driver};
use super::remote::AskError;
use crate::guest::After;
use crate::replicate::outlet::Outlet;
use crate::replicate::send::Outgoing;

/// A round that the link carries for so long is sealed.
const SEALED_FROM: Duration = Duration::from_secs(2);
/// What a short round takes beside the scan and its bytes, before one was measured.
const SHORT: Duration = Duration::from_millis(50);
/// What only a cut carries is too much when the link takes so long for it.
const REST: Duration = Duration::from_millis(100);
/// What a guest changed in some time, it may have changed in a third of it.
const AT_LEAST: f64 = 1.0 / 3.0;
/// From the end of a round to the stop of the last cut: the move is written down.
const UNTIL_STOPPED: Duration = Duration::from_millis(30);
/// How often the session is asked whether a round has left.
const LOOK: Duration = Duration::from_millis(3);

/// The rounds of one move so far.
pub(super) struct Rounds {
    newest: Sealed,
    /// When the newest look at the guest's memory began.
    looked: Instant,
    overhead: Duration,
    /// What the newest round that was large enough showed of the link, bytes a second.
    shown: Option<u64>,
    dirty: u64,
    remaining: u64,
    rest: u64,
}

impl Rounds {
    /// None yet, after this point.
    pub(super) fn after(driver: &Driver, newest: Sealed) -> Self {
        let facts = measured(driver, &newest);
        Self {
            looked: newest.stopped,
            overhead: SHORT + newest.scan * 2,
            shown: None,
            dirty: facts.dirty_bytes_per_second,
            remaining: facts.remaining_bytes,
            rest: newest.state_bytes,
            newest,
        }
    }

    /// What a round now would find, by the newest look.
    pub(super) fn before_the_next(&self, driver: &Driver) -> MoveFacts {
        MoveFacts {
            remaining_bytes: self.remaining.max(self.written()),
            dirty_bytes_per_second: self.dirty,
            overhead: self.overhead,
            ..measured(driver, &self.newest)
        }
    }

    /// Bytes that the guest's changes since the newest look need, as fast as it
    /// was seen to write.
    fn written(&self) -> u64 {
        (self.dirty as f64 * self.looked.elapsed().as_secs_f64()) as u64
    }

    /// Makes a round, and tells what is left after it.
    pub(super) async fn next(
        &mut self,
        driver: &mut Driver,
        attached: &mut Attached,
    ) -> Result<MoveFacts, DriveError> {
        let facts = self.before_the_next(driver);
        let takes = |bytes: u64| bytes as f64 / facts.link_bytes_per_second.max(1) as f64;
        // Disks that rounds do not read grow until a cut takes them.
        let a_cut_serves =
            takes(self.rest) > REST.as_secs_f64() && self.rest > facts.remaining_bytes / 2;
        if takes(self.written()) >= SEALED_FROM.as_secs_f64() || a_cut_serves {
            return self.sealed(driver, attached).await;
        }
        self.short(driver, attached).await
    }

    async fn sealed(
        &mut self,
        driver: &mut Driver,
        attached: &mut Attached,
    ) -> Result<MoveFacts, DriveError> {
        let short_before = attached.shipment.is_some();
        let looked = self.looked;
        let sealed = driver.point(attached, After::Continue).await?;
        let shown = outright(driver, sealed.final_bytes, sealed.took);
        *self = Self {
            overhead: self.overhead,
            shown: shown.or(self.shown),
            ..Self::after(driver, sealed)
        };
        if short_before {
            // The point holds what they brought, too; a last cut would find what it did.
            let between = sealed.stopped.saturating_duration_since(looked);
            self.dirty = per_second(sealed.final_bytes, between);
            self.remaining = left_after(sealed.final_bytes, between, sealed.took);
        }
        Ok(MoveFacts {
            remaining_bytes: self.remaining,
            dirty_bytes_per_second: self.dirty,
            overhead: self.overhead,
            ..measured(driver, &sealed)
        })
    }

    async fn short(
        &mut self,
        driver: &mut Driver,
        attached: &mut Attached,
    ) -> Result<MoveFacts, DriveError> {
        let began = Instant::now();
        let mut shipment = driver.shipment(attached);
        // A link that takes nothing ends the move, not the patience of whoever asked for it.
        shipment.hurry(true);
        let before = shipment.sum().0.sent_bytes;
        attached.shipment = Some(shipment);
        driver.round(attached).await?;
        let after = attached
            .shipment
            .as_ref()
            .map_or(before, |s| s.sum().0.sent_bytes);
        let sent = after.saturating_sub(before);
        let ahead = self.link_rate(driver) as f64 * self.newest.scan.as_secs_f64();
        left(driver, attached.outgoing.clone(), ahead as u64).await?;
        let took = began.elapsed();
        self.shown = outright(driver, sent, took).or(self.shown);
        let link = self.link_rate(driver);
        let between = began.duration_since(self.looked);
        self.looked = began;
        let carried = Duration::try_from_secs_f64(sent as f64 / link.max(1) as f64);
        self.overhead = took.saturating_sub(carried.unwrap_or(took));
        let before = std::mem::replace(&mut self.dirty, per_second(sent, between));
        self.rest = self.left_to_the_cut(attached);
        // A throttled guest runs in turns: one look sees more of them than the next.
        let as_before = (before as f64 * between.as_secs_f64()) as u64;
        self.remaining = written_on(sent.max(as_before), between, took + UNTIL_STOPPED) + self.rest;
        Ok(MoveFacts {
            remaining_bytes: self.remaining,
            dirty_bytes_per_second: self.dirty,
            link_bytes_per_second: link,
            overhead: self.overhead,
            ..measured(driver, &self.newest)
        })
    }

    /// As the transport tells it, held against what the last large round showed.
    fn link_rate(&self, driver: &Driver) -> u64 {
        let told = told_rate(driver);
        match self.shown.filter(|_| told > 0) {
            Some(shown) => told.clamp(shown, shown + shown / 4),
            None => told,
        }
    }

    /// Bytes that a last cut carries whatever rounds do: device state, and the
    /// disks of a guest whose rounds do not read them.
    fn left_to_the_cut(&self, attached: &Attached) -> u64 {
        let disks_too = attached
            .guest
            .as_ref()
            .is_some_and(|g| !g.rounds_read_disks());
        let disks = match disks_too {
            true => per_second(self.newest.disk_bytes, self.newest.since_before),
            false => 0,
        };
        let written = disks as f64 * self.newest.stopped.elapsed().as_secs_f64();
        self.newest.state_bytes + written as u64
    }
}

/// What a cut leaves to the next one that found `sent` bytes, changed in the time
/// `between` it and the look before, and was sealed after `took`: as much again, or more
/// if sealing took longer. Not less: what is written again and again counts once.
pub(super) fn left_after(sent: u64, between: Duration, took: Duration) -> u64 {
    let share = took.as_secs_f64() / between.as_secs_f64().max(1e-3);
    (sent as f64 * share.max(1.0)) as u64
}

/// What a guest that changed `sent` bytes in the time `between` two looks leaves after
/// the round took so long. What it writes again and again it may write faster than that.
fn written_on(sent: u64, between: Duration, took: Duration) -> u64 {
    let share = took.as_secs_f64() / between.as_secs_f64().max(1e-3);
    (sent as f64 * share.max(AT_LEAST)) as u64
}

pub(super) fn per_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-3)) as u64
}

/// Waits until no more is before the link than what it holds in flight, and so many bytes.
async fn left(driver: &mut Driver, outgoing: Arc<Outgoing>, ahead: u64) -> Result<(), DriveError> {
    let gone = async move {
        loop {
            let link = outgoing.peer.status();
            let window = link.congestion_window_bytes.unwrap_or(0);
            let path = link.path.and_then(|path| {
                let held = path.bandwidth as f64 / 8.0 * path.base_rtt?.as_secs_f64();
                (held >= 1.0).then_some(held as u64)
            });
            let flight = path.map_or(window, |path| path.min(window));
            if !link.connected || link.queued_bytes <= flight + ahead {
                return link.connected;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    match driver.interruptible(gone).await? {
        true => Ok(()),
        false => Err(AskError::Unreachable(driver.protection.to.clone()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_the_time_but_not_to_nothing() {
        let s = Duration::from_secs;
        assert_eq!(written_on(1000, s(2), s(1)), 500);
        assert_eq!(written_on(1000, s(2), s(4)), 2000);
        // In ten seconds it changed that much; nobody knows in how few of them.
        assert_eq!(written_on(900, s(10), s(1)), 300);
        assert_eq!(written_on(0, Duration::ZERO, s(1)), 0);
        assert_eq!(per_second(500, s(2)), 250);
        // A cut finds no less than the one before did; more, if that was sealed slowly.
        assert_eq!(left_after(1000, s(4), s(2)), 1000);
        assert_eq!(left_after(1000, s(1), s(3)), 3000);
    }
}
