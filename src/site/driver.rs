//! One task per protected guest: everything that happens to it is decided here.
//!
//! An attempt reads as a list: attach, open, resume, first copy, then cut
//! after cut. What fails ends the attempt, gives back what was not sealed, and
//! the next attempt begins after a pause. Commands arrive in a bounded queue
//! and are looked at between the steps; those that must not wait (fence,
//! pause, end) stop the step under way.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::decide::{self, Measured};
use farhaven_storage_sync::unit::{Digest, UNIT, Volume, VolumeKind};
use tokio::sync::{mpsc, oneshot, watch};

use super::records::{GuestRecord, Protection};
use super::remote::{AskError, Remote};
use super::view::{MoveReport, Phase, SourceView};
use super::{Site, handover};
use crate::activate::fence::Term;
use crate::guest::{After, Guest, GuestError, SinkError};
use crate::replicate::message::{Message, Opened, Opening};
use crate::replicate::send::{Outgoing, Shipment, Totals};

/// What a driver is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Leave the guest alone until told otherwise.
    Pause,
    /// Go on.
    Resume,
    /// Stop protecting; the guest runs on.
    End,
    /// A newer term is known: stop the guest for good. Answered when it is stopped.
    Fence(Term, oneshot::Sender<()>),
    /// Move it to the peer.
    Move(oneshot::Sender<Result<MoveReport, String>>),
    /// Give up waiting for the peer's word about a move, and run the guest here.
    TakeBack(oneshot::Sender<Result<(), String>>),
}

impl Command {
    /// Must the step under way stop for it?
    fn is_urgent(&self) -> bool {
        matches!(self, Command::Pause | Command::End | Command::Fence(..))
    }
}

/// Why an attempt ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriveError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Fence(#[from] crate::activate::fence::FenceError),
    #[error("{0}")]
    Other(String),
    /// A command wants to be looked at.
    #[error("interrupted")]
    Interrupted,
}

/// A guest with its change tracking, its way to the peer and what is on it.
pub(super) struct Attached {
    /// `None` only while a blocking step has it.
    pub(super) guest: Option<Box<dyn Guest>>,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) newest: u64,
    pub(super) next: u64,
    pub(super) state_known: Vec<Digest>,
    pub(super) shipment: Option<Shipment>,
}

/// The task of one protected guest.
pub(super) struct Driver {
    pub(super) site: Arc<Site>,
    pub(super) record: GuestRecord,
    pub(super) protection: Protection,
    pub(super) remote: Arc<Remote>,
    pub(super) view: watch::Sender<SourceView>,
    pub(super) totals: Arc<Totals>,
    pub(super) stop: watch::Sender<bool>,
    commands: mpsc::Receiver<Command>,
    waiting: VecDeque<Command>,
    sealing: Measured,
    pausing: Measured,
}

/// How others reach a driver.
#[derive(Clone)]
pub(super) struct DriverHandle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) view: watch::Receiver<SourceView>,
    pub(super) totals: Arc<Totals>,
}

/// What the main loop does after an attempt.
enum Next {
    Again(Duration),
    Ended,
}

impl Driver {
    /// Starts the task.
    pub(super) fn start(
        site: Arc<Site>,
        record: GuestRecord,
        protection: Protection,
        remote: Arc<Remote>,
    ) -> DriverHandle {
        let (commands_tx, commands) = mpsc::channel(16);
        let view = SourceView {
            name: record.name.clone(),
            id: record.id.to_string(),
            peer: Some(protection.to.clone()),
            rpo_target_ms: Some(protection.policy.rpo.duration().as_millis() as u64),
            ..SourceView::default()
        };
        let (view, watched) = watch::channel(view);
        let totals = Arc::new(Totals::default());
        let driver = Driver {
            site,
            record,
            protection,
            remote,
            view,
            totals: totals.clone(),
            stop: watch::channel(false).0,
            commands,
            waiting: VecDeque::new(),
            sealing: Measured::default(),
            pausing: Measured::default(),
        };
        tokio::spawn(driver.run());
        DriverHandle {
            commands: commands_tx,
            view: watched,
            totals,
        }
    }

    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let next = match self.attempt().await {
                Ok(next) => next,
                Err(DriveError::Interrupted) => Next::Again(Duration::ZERO),
                Err(error) => {
                    failures = if began.elapsed() > Duration::from_secs(60) {
                        1
                    } else {
                        failures + 1
                    };
                    tracing::warn!(guest = %self.record.name, %error, "protection is interrupted");
                    let lost = matches!(
                        &error,
                        DriveError::Guest(GuestError::Qmp(_) | GuestError::Gone(_))
                    );
                    self.view.send_modify(|v| {
                        v.trouble = error.to_string();
                        if lost {
                            v.phase = Phase::Lost;
                        }
                    });
                    // 0.5 s, 1 s, 2 s … 16 s.
                    Next::Again(Duration::from_millis(500 << failures.clamp(1, 6) >> 1))
                }
            };
            match next {
                Next::Ended => break,
                Next::Again(pause) => {
                    let deadline = tokio::time::Instant::now() + pause;
                    while self.waiting.is_empty() {
                        match tokio::time::timeout_at(deadline, self.commands.recv()).await {
                            Ok(Some(command)) => self.waiting.push_back(command),
                            Ok(None) => return,
                            Err(_) => break,
                        }
                    }
                }
            }
            if self.idle_commands().await {
                break;
            }
        }
    }

    /// Commands between attempts, with no guest attached. True: the task ends.
    async fn idle_commands(&mut self) -> bool {
        while let Some(command) = self.waiting.pop_front() {
            match command {
                Command::Pause => self.set_paused(true).await,
                Command::Resume => self.set_paused(false).await,
                Command::End => return true,
                Command::Fence(term, done) => {
                    self.fence(term, None).await;
                    let _ = done.send(());
                }
                Command::Move(reply) => {
                    let trouble = self.view.borrow().trouble.clone();
                    let _ = reply.send(Err(format!(
                        "'{}' is not protected at this moment{}{trouble}; see farhaven status",
                        self.record.name,
                        if trouble.is_empty() { "" } else { ": " },
                    )));
                }
                Command::TakeBack(reply) => {
                    let answer = self.take_back().await;
                    let _ = reply.send(answer);
                }
            }
        }
        false
    }

    /// One attempt, from the attach to whatever ends it.
    async fn attempt(&mut self) -> Result<Next, DriveError> {
        let _ = self.stop.send(false);
        let name = self.record.name.clone();
        if let Err(error) = self.site.fence.may_run(self.record.id, self.site.key()) {
            let moved = self.view.borrow().phase == Phase::Moved;
            if !moved && let Some(term) = self.site.fence.current(self.record.id) {
                if self.protection.moving == Some(term) {
                    return self.resolve_move().await;
                }
                tracing::warn!(guest = %name, %error, "not protected");
                self.fence(term, None).await;
            }
            return Ok(self.wait_for_command().await);
        }
        if self.protection.moving.is_some() {
            return self.resolve_move().await;
        }
        if self.protection.paused {
            self.phase(Phase::Paused);
            return Ok(self.wait_for_command().await);
        }
        self.phase(Phase::Attaching);
        let guest = self.attach().await?;
        self.phase(Phase::Connecting);
        let remote = self.remote.clone();
        self.interruptible(remote.reachable()).await?;
        let mut attached = self.open(guest).await?;
        let ended = self.protect(&mut attached).await;
        attached.shipment = None;
        match &ended {
            Ok(Next::Ended) => {}
            _ => {
                if let Some(guest) = attached.guest.as_mut() {
                    guest.give_back();
                }
            }
        }
        let ended = match ended {
            Err(DriveError::Interrupted) => self.attached_commands(&mut attached).await,
            other => other,
        };
        if let Some(guest) = attached.guest.take() {
            // Dropping a guest talks to QEMU; End removes our traces from it.
            let leave = matches!(ended, Ok(Next::Ended));
            let _ = tokio::task::spawn_blocking(move || {
                let mut guest = guest;
                if leave {
                    guest.detach();
                }
            })
            .await;
        }
        ended
    }

    /// Urgent commands that stopped an attempt, with the guest still attached.
    async fn attached_commands(&mut self, attached: &mut Attached) -> Result<Next, DriveError> {
        while let Some(command) = self.waiting.pop_front() {
            match command {
                Command::Pause => self.set_paused(true).await,
                Command::Resume => self.set_paused(false).await,
                Command::End => return Ok(Next::Ended),
                Command::Fence(term, done) => {
                    self.fence(term, attached.guest.take()).await;
                    let _ = done.send(());
                }
                later => {
                    self.waiting.push_front(later);
                    break;
                }
            }
        }
        Ok(Next::Again(Duration::ZERO))
    }

    async fn attach(&mut self) -> Result<Box<dyn Guest>, DriveError> {
        let (site, record) = (self.site.clone(), self.record.clone());
        let key = site.tracking_key.clone();
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let attached = blocking(move || site.attach(&record, key, threads)).await?;
        Ok(attached?)
    }

    /// Tells the peer of the guest and learns what it holds.
    async fn open(&mut self, mut guest: Box<dyn Guest>) -> Result<Attached, DriveError> {
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
            next: opened.next_point.max(opened.newest + 1),
            state_known,
            shipment: None,
        })
    }

    async fn ask_open(&self, volumes: Vec<Volume>, term: Term) -> Result<Opened, DriveError> {
        let opening = Opening {
            guest: self.record.id,
            name: self.record.name.clone(),
            source: self.site.config.site.name.clone(),
            definition: self.record.definition.clone(),
            volumes,
            term,
            warm: self.protection.policy.warm,
            fresh: true,
            retention: self.protection.policy.retention.clone(),
        };
        match self.remote.ask(Message::Open(Box::new(opening))).await? {
            Message::Opened(opened) => Ok(opened),
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

    /// First copy, then cut after cut.
    async fn protect(&mut self, attached: &mut Attached) -> Result<Next, DriveError> {
        self.view.send_modify(|v| v.trouble.clear());
        if attached.newest == 0 {
            self.phase(Phase::FirstCopy);
        } else {
            self.phase(Phase::Shipping);
        }
        self.round(attached).await?;
        loop {
            let sealed = self.point(attached, After::Continue).await?;
            self.sealing.observe(sealed.took);
            self.pausing.observe(sealed.pause);
            self.phase(Phase::Protected);
            self.look_at_commands();
            while self.waiting.is_empty() {
                let Some(wait) = self.until_next_cut(&sealed) else {
                    break;
                };
                match tokio::time::timeout(wait, self.commands.recv()).await {
                    Ok(Some(command)) => self.waiting.push_back(command),
                    Ok(None) => return Ok(Next::Ended),
                    Err(_) => {}
                }
            }
            match self.waiting.pop_front() {
                None => {}
                Some(Command::Move(reply)) => {
                    let outcome = handover::perform(self, attached).await;
                    let moved = outcome.is_ok();
                    let told = outcome.map_err(|e| e.to_string());
                    let failed = told.as_ref().err().cloned();
                    let _ = reply.send(told);
                    if moved {
                        return Ok(Next::Again(Duration::ZERO));
                    }
                    return Err(DriveError::Other(failed.unwrap_or_default()));
                }
                Some(Command::Resume) => {}
                Some(Command::TakeBack(reply)) => {
                    let _ = reply.send(Err(format!(
                        "'{}' is not held for a move; it runs here",
                        self.record.name
                    )));
                }
                Some(urgent) => {
                    self.waiting.push_front(urgent);
                    return Err(DriveError::Interrupted);
                }
            }
            self.phase(Phase::Shipping);
        }
    }

    /// How long until the next cut begins, by policy and by what the last took; `None` for now.
    fn until_next_cut(&self, last: &Sealed) -> Option<Duration> {
        let since = SystemTime::now()
            .duration_since(last.cut_at)
            .unwrap_or_default();
        let every = decide::interval(
            &self.protection.policy,
            self.sealing.expect(last.took),
            self.pausing.expect(last.pause),
        );
        every.checked_sub(since).filter(|left| !left.is_zero())
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
        attached.guest = Some(guest);
        attached.shipment = Some(shipment);
        self.interrupted_or(done)
    }

    /// Cuts, ships and seals one point.
    pub(super) async fn point(
        &mut self,
        attached: &mut Attached,
        after: After,
    ) -> Result<Sealed, DriveError> {
        let made = super::cut::make(self, attached, after).await?;
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
        })
    }

    pub(super) fn phase(&self, phase: Phase) {
        self.view.send_modify(|v| v.phase = phase);
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
                let _ = self.stop.send(true);
                return work.await;
            }
            tokio::select! {
                done = &mut work => return done,
                command = self.commands.recv() => match command {
                    Some(command) => self.waiting.push_back(command),
                    None => {
                        let _ = self.stop.send(true);
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

    fn look_at_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.waiting.push_back(command);
        }
    }

    async fn wait_for_command(&mut self) -> Next {
        if self.waiting.is_empty() {
            match self.commands.recv().await {
                Some(command) => self.waiting.push_back(command),
                None => return Next::Ended,
            }
        }
        Next::Again(Duration::ZERO)
    }

    async fn set_paused(&mut self, paused: bool) {
        self.protection.paused = paused;
        self.keep_protection().await;
        if paused {
            self.phase(Phase::Paused);
        }
    }

    pub(super) async fn keep_protection(&self) {
        let (site, protection) = (self.site.clone(), self.protection.clone());
        let kept = tokio::task::spawn_blocking(move || site.keep_protection(&protection)).await;
        if let Ok(Err(error)) = kept {
            tracing::error!(%error, "the catalogue cannot be written");
            self.view.send_modify(|v| v.trouble = error.to_string());
        }
    }

    /// Stops the guest for good, by the one attached or through a new connection.
    pub(super) async fn fence(&mut self, term: Term, guest: Option<Box<dyn Guest>>) {
        let owner = self.site.name_of(&term.owner);
        let (site, record) = (self.site.clone(), self.record.clone());
        let stopped = tokio::task::spawn_blocking(move || match guest {
            Some(mut guest) => guest.stop().map_err(|e| e.to_string()),
            None => site.stop_guest(&record).map_err(|e| e.to_string()),
        })
        .await;
        let done = match stopped {
            Ok(Ok(())) => "its copy here was stopped and is kept as evidence".to_owned(),
            Ok(Err(error)) => format!("its copy here could not be stopped: {error}"),
            Err(error) => format!("its copy here could not be stopped: {error}"),
        };
        let why = format!(
            "fenced: site '{owner}' runs this guest under term {}; {done}",
            term.number
        );
        tracing::warn!(guest = %self.record.name, "{why}");
        self.view.send_modify(|v| {
            v.phase = Phase::Fenced;
            v.term = Some(term.number);
            v.trouble = why;
        });
    }

    /// A move was cut short, here or on the way: ask the peer how it ended.
    async fn resolve_move(&mut self) -> Result<Next, DriveError> {
        self.phase(Phase::Held);
        self.view.send_modify(|v| {
            v.trouble = format!(
                "stopped for a move to '{}', whose word is not known yet; if that site is lost for good: farhaven take-back {} --force",
                self.protection.to, self.record.name
            );
        });
        handover::resolve(self).await?;
        Ok(Next::Again(Duration::ZERO))
    }

    async fn take_back(&mut self) -> Result<(), String> {
        if self.protection.moving.is_none() {
            return Err(format!("'{}' is not held for a move", self.record.name));
        }
        handover::take_back(self).await.map_err(|e| e.to_string())
    }
}

/// A point that is durable at the peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sealed {
    pub(super) cut_at: SystemTime,
    /// How long the guest was stopped for it.
    pub(super) pause: Duration,
    /// From the cut until it was sealed.
    pub(super) took: Duration,
}

/// Runs something that blocks; its panic is an error here, not the daemon's end.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DriveError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| DriveError::Other(format!("a step ended early: {e}")))
}

pub(super) fn take(guest: &mut Option<Box<dyn Guest>>) -> Result<Box<dyn Guest>, DriveError> {
    guest
        .take()
        .ok_or_else(|| DriveError::Other("the guest is not attached".to_owned()))
}
