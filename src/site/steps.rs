//! What an attempt of a [`Driver`] is made of: attach, open, resume, a round,
//! a point; and how a step waits while commands queue up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use farhaven_storage_sync::unit::{Digest, UNIT, Volume, VolumeKind};

use super::cut::Sealed;
use super::driver::{Attached, Command, DriveError, Driver};
use super::remote::AskError;
use super::view::Phase;
use crate::activate::fence::Term;
use crate::guest::{After, Guest, GuestError, SinkError};
use crate::replicate::message::{CommitTerms, Message, Opened, Opening};
use crate::replicate::send::{Outgoing, Shipment};

impl Driver {
    pub(super) async fn attach(&mut self) -> Result<Box<dyn Guest>, DriveError> {
        let (site, record) = (self.site.clone(), self.record.clone());
        let key = site.tracking_key.clone();
        let threads = crate::work::threads();
        let attached = blocking(move || site.attach(&record, key, threads)).await?;
        Ok(attached?)
    }

    /// Has the peer imported the guest's first copy? Once it has, that is not
    /// asked again. The peer is asked for points only: an opening would give up
    /// what an import there has brought so far.
    pub(super) async fn seed_is_there(&mut self) -> Result<bool, DriveError> {
        self.phase(Phase::AwaitingSeed);
        let told = format!(
            "nothing is sent before its seed is imported at '{0}' (there: farhaven seed import FILE). To send the first copy over the link instead: farhaven unprotect {1}, then farhaven protect {1} --to {0}",
            self.protection.to, self.record.name
        );
        self.view.send_modify(|v| v.trouble = told);
        let remote = self.remote.clone();
        let guest = self.record.id;
        self.interruptible(remote.reachable()).await?;
        let asked = remote.ask(Message::Points { guest });
        match self.interruptible(asked).await? {
            Ok(Message::PointList { points }) if !points.is_empty() => {}
            // It does not know the guest yet, or is away for a moment.
            _ => return Ok(false),
        }
        self.protection.seeded = false;
        let kept = self.keep_protection().await;
        kept.map_err(DriveError::Other)?;
        self.view.send_modify(|v| v.trouble.clear());
        Ok(true)
    }

    /// A guest that a cut of ours left stopped goes on before anything else: a
    /// stopped guest would be protected as one that its operator had stopped.
    pub(super) async fn let_go_on(
        &mut self,
        mut guest: Box<dyn Guest>,
    ) -> Result<Box<dyn Guest>, DriveError> {
        if !self.left_stopped {
            return Ok(guest);
        }
        // Attaching may have taken a while.
        self.site.fence.may_run(self.record.id, self.site.key())?;
        let (guest, resumed) = blocking(move || {
            let resumed = match guest.running() {
                Some(false) => guest.resume(),
                _ => Ok(()),
            };
            (guest, resumed)
        })
        .await?;
        resumed?;
        self.left_stopped = false;
        tracing::warn!(guest = %self.record.name, "it was left stopped by a cut, and runs on now");
        Ok(guest)
    }

    /// Protection ends while nobody is attached: what it left in QEMU, like
    /// dirty bitmaps, goes now, or every write of the guest would pay for it.
    pub(super) async fn clear_away(&self) {
        if self
            .site
            .fence
            .may_run(self.record.id, self.site.key())
            .is_err()
        {
            // What was stopped for good is evidence.
            return;
        }
        let (site, record) = (self.site.clone(), self.record.clone());
        let left = blocking(move || {
            let key = site.tracking_key.clone();
            site.attach(&record, key, 1)
                .map(|mut guest| guest.detach())
                .map_err(DriveError::from)
        });
        if let Err(error) = left.await.and_then(|done| done) {
            tracing::warn!(
                guest = %self.record.name, %error,
                "what protection left in QEMU stays there until the guest ends"
            );
        }
    }

    /// Tells the peer of the guest and learns what it holds.
    pub(super) async fn open(&mut self, mut guest: Box<dyn Guest>) -> Result<Attached, DriveError> {
        let term = match self.site.fence.current(self.record.id) {
            Some(term) => term,
            None => self.site.fence.raise(self.record.id, self.site.key())?,
        };
        self.view.send_modify(|v| v.term = Some(term.number));
        let opened = self.ask_open(guest.volumes().to_vec(), term).await?;
        let remote = self.remote.clone();
        let bytes =
            usize::try_from(self.site.config.store.index_bytes.bytes()).unwrap_or(usize::MAX);
        let outgoing = self
            .interruptible(remote.outgoing(opened.last_seq, bytes, self.site.tracking_key.clone()))
            .await??;
        let mut state_known = Vec::new();
        if opened.newest > 0 {
            self.phase(Phase::Resuming);
            self.view.send_modify(|v| v.newest_point = opened.newest);
            let cut_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(opened.newest_cut_at);
            self.site.note_sealed(self.record.id, cut_at);
            (guest, state_known) = self.resume_tracking(guest, &outgoing, &opened).await?;
        }
        Ok(Attached {
            guest: Some(guest),
            outgoing,
            newest: opened.newest,
            next: opened
                .next_point
                .max(opened.newest + 1)
                .max(self.last_point + 1),
            state_known,
            shipment: None,
            sealed: None,
        })
    }

    async fn ask_open(&mut self, volumes: Vec<Volume>, term: Term) -> Result<Opened, DriveError> {
        let opening = Opening {
            guest: self.record.id,
            name: self.record.name.clone(),
            source: self.site.config.site.name.clone(),
            definition: self.record.definition.clone(),
            volumes,
            term,
            warm: self.protection.policy.warm,
            retention: self.protection.policy.retention.clone(),
            rpo_ms: Some(self.protection.policy.rpo.duration().as_millis() as u64),
            commit: CommitTerms::of(&self.protection.policy),
            schedule: self.protection.schedule.clone(),
        };
        // The answer may be long in coming, and what must not wait may come meanwhile.
        let remote = self.remote.clone();
        let asked = remote.ask(Message::Open(Box::new(opening)));
        match self.interruptible(asked).await?? {
            Message::Opened(opened) if opened.is_sound() => Ok(opened),
            _ => Err(AskError::Unfitting(self.remote.record.site.clone()).into()),
        }
    }

    /// Gives the guest the digests of what the peer holds.
    async fn resume_tracking(
        &mut self,
        mut guest: Box<dyn Guest>,
        outgoing: &Arc<Outgoing>,
        opened: &Opened,
    ) -> Result<(Box<dyn Guest>, Vec<Digest>), DriveError> {
        let mut state_known = Vec::new();
        let volumes = guest.volumes().to_vec();
        for (index, volume) in volumes.iter().enumerate() {
            let held = opened.volumes.get(index);
            let fits = held.is_some_and(|h| h.name == volume.name && h.kind == volume.kind);
            let state = volume.kind == VolumeKind::DeviceState;
            if !fits || (!state && held.is_some_and(|h| h.bytes != volume.bytes)) {
                return Err(DriveError::Other(format!(
                    "volume {index} of '{}' is {} of {} bytes here, but the peer holds another. Were disks changed? Run: farhaven unprotect {} --discard, then protect it anew",
                    self.record.name, volume.name, volume.bytes, self.record.name
                )));
            }
            let units = held.map_or(0, |h| h.units());
            let digests = self
                .baseline(outgoing, opened.newest, index as u16, units)
                .await?;
            if state {
                state_known = digests;
            } else {
                let newest = opened.newest;
                let given = blocking(move || {
                    let mut guest = guest;
                    let given = guest.baseline(newest, index as u16, digests);
                    (guest, given)
                });
                let (back, given) = given.await?;
                given?;
                guest = back;
            }
        }
        Ok((guest, state_known))
    }

    async fn baseline(
        &mut self,
        outgoing: &Arc<Outgoing>,
        point: u64,
        volume: u16,
        units: u64,
    ) -> Result<Vec<Digest>, DriveError> {
        let mut digests = vec![Digest::ZERO_UNIT; usize::try_from(units).unwrap_or(usize::MAX)];
        let mut next = Some(0);
        while let Some(unit) = next {
            let question = Message::Baseline {
                guest: self.record.id,
                point,
                volume,
                unit,
                key: *outgoing.key.bytes(),
            };
            let remote = self.remote.clone();
            let answer = self.interruptible(remote.ask(question)).await??;
            let Message::BaselinePage {
                runs,
                next: following,
            } = answer
            else {
                return Err(AskError::Unfitting(self.remote.record.site.clone()).into());
            };
            for (first, bytes) in runs {
                for (i, digest) in bytes.chunks_exact(16).enumerate() {
                    let at = first.saturating_add(i as u64);
                    if let (Some(slot), Ok(digest)) =
                        (digests.get_mut(at as usize), digest.try_into())
                    {
                        *slot = Digest(digest);
                    }
                }
            }
            self.totals
                .done
                .store(unit * UNIT as u64, Ordering::Relaxed);
            self.totals
                .total
                .store(units * UNIT as u64, Ordering::Relaxed);
            next = following.filter(|n| *n > unit);
        }
        Ok(digests)
    }

    /// One pass while the guest runs.
    pub(super) async fn round(&mut self, attached: &mut Attached) -> Result<(), DriveError> {
        let mut guest = take(&mut attached.guest)?;
        let mut shipment = self.shipment(attached);
        let work = blocking(move || {
            let done = guest
                .round(&mut shipment)
                .and_then(|()| Ok(shipment.flush()?));
            (guest, shipment, done)
        });
        let (guest, shipment, done) = self.finishing(work).await?;
        let waiting_bytes = guest.waiting() * UNIT as u64;
        self.view.send_modify(|v| v.waiting_bytes = waiting_bytes);
        attached.guest = Some(guest);
        attached.shipment = Some(shipment);
        self.interrupted_or(done)
    }

    /// Does it stand by somebody else's word?
    pub(super) async fn stands(&mut self, attached: &mut Attached) -> Result<bool, DriveError> {
        let mut guest = take(&mut attached.guest)?;
        let (guest, running) = blocking(move || {
            let running = guest.running();
            (guest, running)
        })
        .await?;
        attached.guest = Some(guest);
        Ok(running == Some(false))
    }

    /// Nothing comes before the cut: no urgent order, and before a last one the shutdown
    /// of a guest that boots at the peer.
    pub(super) async fn ready_for_a_cut(
        &mut self,
        attached: &mut Attached,
        after: After,
    ) -> Result<(), DriveError> {
        self.look_at_commands();
        if self.waiting.iter().any(Command::is_urgent) {
            return Err(DriveError::Interrupted);
        }
        match after {
            After::Hold => self.shut_down_first(attached).await,
            After::Continue => Ok(()),
        }
    }

    /// Cuts, ships and seals one point.
    pub(super) async fn point(
        &mut self,
        attached: &mut Attached,
        after: After,
    ) -> Result<Sealed, DriveError> {
        let made = super::cut::make(self, attached, after, None).await?;
        let sealed = super::cut::seal(self, attached, made).await?;
        Ok(sealed)
    }

    /// The shipment under way for the next point, or a new one.
    pub(super) fn shipment(&self, attached: &mut Attached) -> Shipment {
        attached.shipment.take().unwrap_or_else(|| {
            Shipment::begin(
                &attached.outgoing,
                self.record.id,
                attached.next,
                self.totals.clone(),
                self.stop.subscribe(),
                tokio::runtime::Handle::current(),
            )
            .in_turns_of(self.flow.clone())
        })
    }

    /// Waits for `work` while commands queue up; an urgent one interrupts the wait.
    pub(super) async fn interruptible<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<T, DriveError> {
        tokio::pin!(work);
        loop {
            if self.waiting.iter().any(Command::is_urgent) {
                return Err(DriveError::Interrupted);
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                command = self.commands.recv() => match command {
                    Some(command) => self.waiting.push_back(command),
                    None => return Err(DriveError::Interrupted),
                },
            }
        }
    }

    /// Waits for `work`; any command interrupts the wait.
    pub(super) async fn interruptible_by_any<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<T, DriveError> {
        if self.waiting.is_empty() {
            tokio::select! {
                done = work => return Ok(done),
                command = self.commands.recv() => self.waiting.extend(command),
            }
        }
        Err(DriveError::Interrupted)
    }

    /// Waits for `work`, which has the guest, to its end; an urgent command tells it to stop.
    pub(super) async fn finishing<T>(
        &mut self,
        work: impl Future<Output = Result<T, DriveError>>,
    ) -> Result<T, DriveError> {
        tokio::pin!(work);
        loop {
            if self.waiting.iter().any(Command::is_urgent) {
                self.stop.send_replace(true);
                return work.await;
            }
            tokio::select! {
                done = &mut work => return done,
                command = self.commands.recv() => match command {
                    Some(command) => self.waiting.push_back(command),
                    None => {
                        self.stop.send_replace(true);
                        return work.await;
                    }
                },
            }
        }
    }

    /// A step that was told to stop ended because of that.
    pub(super) fn interrupted_or<T>(&self, done: Result<T, GuestError>) -> Result<T, DriveError> {
        match done {
            Err(GuestError::Sink(SinkError::Closed)) if *self.stop.borrow() => {
                Err(DriveError::Interrupted)
            }
            other => Ok(other?),
        }
    }
}

/// Runs something that blocks; its panic is an error here, not the daemon's end.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DriveError> {
    crate::work::spawn_blocking(work)
        .await
        .map_err(|e| DriveError::Other(format!("a step ended early: {e}")))
}

pub(super) fn take(guest: &mut Option<Box<dyn Guest>>) -> Result<Box<dyn Guest>, DriveError> {
    guest
        .take()
        .ok_or_else(|| DriveError::Other("the guest is not attached".to_owned()))
}
