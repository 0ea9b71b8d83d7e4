//! One task per protected guest: everything that happens to it is decided here.
//!
//! An attempt reads as a list: attach, open, resume, first copy, then cut
//! after cut. What fails ends the attempt, gives back what was not sealed, and
//! the next attempt begins after a pause. Commands arrive in a bounded queue
//! and are looked at between the steps; those that must not wait (fence,
//! pause, end) stop the step under way.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::decide::{self, Measured};
use farhaven_policies::files::Mode;
use farhaven_storage_sync::unit::Digest;
use farhaven_wan::SiteKey;
use farhaven_wan::pace::Flow;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub(super) use super::commands::{Command, NotMoved};
use super::cut::{Sealed, Seen};
use super::records::{GuestRecord, Protection};
use super::remote::{AskError, Remote};
use super::runs::power::PowerOrder;
use super::view::{MoveOutlook, Phase, SourceView};
use super::{Site, converge, handover};
use crate::guest::embedded::VmmError;
use crate::guest::{Guest, GuestError};
use crate::replicate::send::{Outgoing, Shipment, Totals};

/// Why an attempt ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriveError {
    /// A move would take longer than the policy allows, and nobody accepted that.
    #[error("{0}")]
    TooLong(String),
    /// A move that is not wanted any more.
    #[error("{0}")]
    GivenUp(String),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Fence(#[from] crate::activate::fence::FenceError),
    #[error("{0}")]
    Other(String),
    /// A command wants to be looked at.
    #[error(
        "another order came first (a pause, the end of its protection, or a newer term of another site); see farhaven status"
    )]
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
    /// The newest point of this attempt.
    pub(super) sealed: Option<Sealed>,
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
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) waiting: VecDeque<Command>,
    /// Its turns on the link.
    pub(super) flow: Option<Arc<Flow>>,
    /// The largest number of any point of this process: none is used twice.
    pub(super) last_point: u64,
    /// A cut of ours stopped it and could not let it go on.
    pub(super) left_stopped: bool,
    /// It stood before its last cut was made: it is not for its move to let it go on.
    pub(super) stood_before: bool,
    /// When the newest sealed cut of this process was made.
    pub(super) last_cut: Option<Instant>,
    /// So many of its next cuts are to be of frozen filesystems, whatever its policy says.
    pub(super) quiesce_next: u8,
    /// Whoever moves a guest of disks alone accepts that it is stopped hard if it does
    /// not shut down.
    pub(super) accept_hard_stop: bool,
    /// Tells the peer what the guest is owed by now.
    pub(super) telling: JoinSet<()>,
    /// When this attempt's first round began.
    pub(super) looked: Option<Instant>,
    sealing: Measured,
    pausing: Measured,
}

/// How others reach a driver.
#[derive(Clone)]
pub(super) struct DriverHandle {
    /// The site that its guest is protected to.
    pub(super) to: SiteKey,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) view: watch::Receiver<SourceView>,
    pub(super) totals: Arc<Totals>,
}

/// How often the peer is asked whether it has the seed by now.
const LOOK_FOR_SEED: Duration = Duration::from_secs(5);

/// What the main loop does after an attempt.
pub(super) enum Next {
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
            policy_of: protection.group.clone(),
            disks_only: protection.policy.mode == Mode::DiskOnly,
            shut_down: protection.shut_down,
            ..SourceView::default()
        };
        let (view, watched) = watch::channel(view);
        let flow = site.limits.join(record.id, &record.name, remote.peer.key());
        site.limits.owe(&protection);
        let totals = Arc::new(Totals::default());
        let to = remote.record.key;
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
            flow,
            last_point: 0,
            left_stopped: false,
            stood_before: false,
            last_cut: None,
            quiesce_next: 0,
            accept_hard_stop: false,
            telling: JoinSet::new(),
            looked: None,
            sealing: Measured::default(),
            pausing: Measured::default(),
        };
        tokio::spawn(driver.run());
        DriverHandle {
            to,
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
                        DriveError::Guest(
                            GuestError::Qmp(_)
                                | GuestError::Gone(_)
                                | GuestError::Vmm(VmmError::Ended(_))
                        )
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

    /// One attempt, from the attach to whatever ends it.
    async fn attempt(&mut self) -> Result<Next, DriveError> {
        // Kept even while nobody listens, unlike `send`.
        self.stop.send_replace(false);
        self.last_cut = None;
        let name = self.record.name.clone();
        if let Err(error) = self.site.fence.may_run(self.record.id, self.site.key()) {
            let moved = self.view.borrow().phase == Phase::Moved;
            if !moved && let Some(term) = self.site.fence.current(self.record.id) {
                if self.protection.moving == Some(term) {
                    return self.resolve_move().await;
                }
                if self.protection.moved == Some(term) {
                    self.view.send_modify(|v| {
                        v.phase = Phase::Moved;
                        v.term = Some(term.number);
                        v.trouble = format!(
                            "it runs at '{}'; its copy here is kept stopped",
                            self.protection.to
                        );
                    });
                    return Ok(self.wait_for_command().await);
                }
                if self.view.borrow().phase != Phase::Fenced {
                    tracing::warn!(guest = %name, %error, "not protected");
                }
                let tried = self.site.keeps_stopping(term.group);
                if !tried && self.fence(term, None).await.is_err() {
                    self.site.keep_stopping(term);
                }
            }
            return Ok(self.wait_for_command().await);
        }
        if self.protection.moving.is_some() {
            return self.resolve_move().await;
        }
        if self.is_kept() {
            if let Some(next) = self.is_anothers_still().await? {
                return Ok(next);
            }
            // Handed back, and this daemon ended before its guest went on.
            self.regain().await.map_err(DriveError::Other)?;
        }
        if self.protection.paused {
            self.phase(Phase::Paused);
            return Ok(self.wait_for_command().await);
        }
        if self.protection.seeded && !self.seed_is_there().await? {
            return Ok(Next::Again(LOOK_FOR_SEED));
        }
        // A lost guest stays lost, and said to be, until it is found again.
        if self.view.borrow().phase != Phase::Lost {
            self.phase(Phase::Attaching);
        }
        let guest = self.attach().await?;
        let guest = self.let_go_on(guest).await?;
        self.phase(Phase::Connecting);
        let remote = self.remote.clone();
        if !remote.connected() {
            let trouble = AskError::Unreachable(self.protection.to.clone()).to_string();
            self.view.send_modify(|v| v.trouble = trouble);
        }
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
            // Whatever else it is told to be: what runs is stopped first.
            Err(_) if self.waiting.iter().any(Command::is_fence) => {
                self.attached_commands(&mut attached).await
            }
            other => other,
        };
        if let Some(guest) = attached.guest.take() {
            // Dropping a guest talks to QEMU; End removes our traces from it.
            let leave = matches!(ended, Ok(Next::Ended));
            let _ = crate::work::spawn_blocking(move || {
                let mut guest = guest;
                if leave {
                    guest.detach();
                }
            })
            .await;
        }
        ended
    }

    /// First copy, then cut after cut.
    async fn protect(&mut self, attached: &mut Attached) -> Result<Next, DriveError> {
        self.view.send_modify(|v| v.trouble.clear());
        if attached.newest == 0 {
            self.phase(Phase::FirstCopy);
        } else {
            self.phase(Phase::Shipping);
        }
        self.looked = Some(Instant::now());
        self.round(attached).await?;
        let mut seat = None;
        loop {
            let sealed = self.next_point(attached, &mut seat).await?;
            self.sealing.observe(sealed.took);
            self.pausing.observe(sealed.pause);
            let facts = converge::measured(self, &sealed);
            let outlook = MoveOutlook {
                rough: sealed.seen == Seen::MemoryRoughly,
                ..converge::outlook(&self.protection.policy, &facts)
            };
            self.view.send_modify(|v| v.outlook = Some(outlook));
            self.phase(Phase::Protected);
            self.look_at_commands();
            while self.waiting.is_empty() {
                let Some(wait) = self.until_next_cut(&sealed) else {
                    break;
                };
                match tokio::time::timeout(wait, self.commands.recv()).await {
                    Ok(Some(command)) => self.waiting.push_back(command),
                    // The daemon stops; protection does not end. Bitmaps stay
                    // in QEMU: they tell the next daemon what to read.
                    Ok(None) => return Err(DriveError::Interrupted),
                    Err(_) => {}
                }
            }
            if self.waiting.iter().any(Command::is_fence) {
                return Err(DriveError::Interrupted);
            }
            match self.waiting.pop_front() {
                None => {}
                Some(Command::Move {
                    accept_pause,
                    convoy,
                    reply,
                }) => {
                    // The others of its group are not kept waiting.
                    seat = None;
                    match self.move_it(attached, accept_pause, convoy.as_ref()).await {
                        Ok(report) => {
                            let _ = reply.send(Ok(report));
                            return Ok(Next::Again(Duration::ZERO));
                        }
                        Err(NotMoved::TooLong(why)) => {
                            // Nothing was done: protection goes on in this very attempt.
                            tracing::warn!(guest = %self.record.name, why, "not moved");
                            self.view.send_modify(|v| v.trouble.clone_from(&why));
                            let _ = reply.send(Err(NotMoved::TooLong(why)));
                        }
                        Err(NotMoved::GivenUp(why)) => {
                            let _ = reply.send(Err(NotMoved::GivenUp(why)));
                        }
                        Err(NotMoved::Failed(why)) => {
                            let _ = reply.send(Err(NotMoved::Failed(why.clone())));
                            return Err(DriveError::Other(why));
                        }
                    }
                }
                Some(Command::Hold(order)) => {
                    seat = None;
                    match self.hold(attached, order).await {
                        Ok(()) => return Ok(Next::Again(Duration::ZERO)),
                        // Nothing was done: protection goes on in this very attempt.
                        Err(DriveError::TooLong(why)) => {
                            self.view.send_modify(|v| v.trouble.clone_from(&why));
                        }
                        Err(DriveError::GivenUp(_)) => {}
                        Err(error) => return Err(error),
                    }
                }
                Some(Command::IsHeld(reply)) => {
                    let why = format!("'{}' runs there, and is not held", self.record.name);
                    let _ = reply.send(Err(why.into()));
                }
                Some(Command::Resume | Command::Ask) => {}
                Some(Command::Quiesce(next_points, reply)) => {
                    self.ask_agent(attached, next_points, reply).await?;
                }
                Some(Command::Power(order)) => self.power(attached, order).await?,
                Some(Command::TakeBack(reply)) if self.protection.shut_down => {
                    self.power(attached, PowerOrder::On(reply)).await?;
                }
                Some(Command::Owe(owed)) => self.owe(*owed).await,
                Some(Command::Lost(units)) => self.lost_at_peer(attached, &units),
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

    /// Is a move under way?
    pub(super) fn moves(&self) -> bool {
        self.view.borrow().phase == Phase::Moving
    }

    pub(super) fn phase(&self, phase: Phase) {
        self.view.send_modify(|v| v.phase = phase);
    }

    pub(super) fn look_at_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.waiting.push_back(command);
        }
    }

    pub(super) async fn wait_for_command(&mut self) -> Next {
        if self.waiting.is_empty() {
            match self.commands.recv().await {
                Some(command) => self.waiting.push_back(command),
                None => return Next::Ended,
            }
        }
        Next::Again(Duration::ZERO)
    }

    /// Writes the protection down, durably. What fails is told in the status, too.
    pub(super) async fn keep_protection(&self) -> Result<(), String> {
        let (site, protection) = (self.site.clone(), self.protection.clone());
        let kept = crate::work::spawn_blocking(move || site.keep_protection(&protection)).await;
        let kept = match kept {
            Ok(kept) => kept.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        kept.inspect_err(|error| {
            tracing::error!(error, "the catalogue cannot be written");
            self.view.send_modify(|v| v.trouble.clone_from(error));
        })
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
}
