//! A guest that a peer sends here: kept warm, made ready, run.
//!
//! Everything that touches its RAM file and its QEMU happens under one lock,
//! in one order: launch and RAM side by side, then the device state, then the
//! guest goes on. A term is durable before any of it can run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use tokio::sync::watch;

use super::drill::{Drill, TestSeen};
use super::promote::ActivateError;
use super::records::{Activation, StandbyRecord};
use super::remote::Remote;
use super::turn::view::CommitView;
use super::view::{ActiveView, ConsolePaths, TargetView};
use super::{Site, age};
use crate::activate::fence::Term;
use crate::activate::place::{Ground, Ready};
use crate::activate::point::boots;
use crate::activate::warm::Warm;
use crate::guest::Definition;
use crate::replicate::message::{Opening, PointContext};

/// A guest that a peer sends here.
pub(super) struct Standby {
    pub(super) site: Weak<Site>,
    remote: Arc<Remote>,
    pub(super) guest: GuestId,
    opening: RwLock<Opening>,
    pub(super) state: Arc<tokio::sync::Mutex<State>>,
    seen: Arc<Mutex<Seen>>,
    /// A test of it that runs here: apart from the state, whose lock it never takes.
    pub(super) drill: Arc<tokio::sync::Mutex<Option<Drill>>>,
    /// Grows when the source begins anew: seals of before are not waited for.
    attempt: watch::Sender<u64>,
    /// How many requests to hold the guest the source has not answered yet.
    pub(super) expecting: AtomicUsize,
    /// Held while one of its points is being sealed: however many seals a peer
    /// asks for, one at a time waits for data and looks at the store.
    pub(super) sealing: tokio::sync::Mutex<()>,
    /// The point that is none to run: what was here when the guest turned round; 0 for none.
    base: AtomicU64,
    /// It turned round: it is this site's own now, and nothing of it is run from here.
    turned: AtomicBool,
}

/// Only touched under the lock.
#[derive(Default)]
pub(super) struct State {
    pub(super) warm: Warm,
    pub(super) ready: Option<Ready>,
    pub(super) active: Option<(Activation, Arc<Ready>)>,
    /// A copy that was stopped for good and lives in this process, until
    /// another is made ready.
    pub(super) evidence: Option<Arc<Ready>>,
    /// It ran here before a restart of this daemon, and its QEMU lives and
    /// does not answer yet.
    pub(super) unwatched: Option<Activation>,
    /// The source holds its guest for a run here, which may run it under this term.
    pub(super) staged: Option<Term>,
}

impl State {
    /// Is this the copy that runs here, still?
    pub(super) fn is_active(&self, ready: &Arc<Ready>) -> bool {
        let active = self.active.as_ref();
        active.is_some_and(|(_, active)| Arc::ptr_eq(active, ready))
    }

    /// What runs here, or may run here.
    pub(super) fn runs(&self) -> Option<&Activation> {
        let watched = self.active.as_ref().map(|(active, _)| active);
        watched.or(self.unwatched.as_ref())
    }
}

/// What `status` shows without waiting for the lock.
#[derive(Default, Clone)]
pub(super) struct Seen {
    pub(super) warm_point: Option<u64>,
    pub(super) active: Option<Activation>,
    pub(super) hydration: Option<(u64, u64)>,
    pub(super) test: Option<TestSeen>,
    pub(super) trouble: String,
}

impl Standby {
    pub(super) fn new(site: &Arc<Site>, remote: Arc<Remote>, opening: Opening) -> Self {
        Self {
            site: Arc::downgrade(site),
            remote,
            guest: opening.guest,
            opening: RwLock::new(opening),
            state: Arc::default(),
            seen: Arc::default(),
            drill: Arc::default(),
            attempt: watch::Sender::new(0),
            expecting: AtomicUsize::new(0),
            sealing: tokio::sync::Mutex::default(),
            base: AtomicU64::new(0),
            turned: AtomicBool::new(false),
        }
    }

    /// The same guest, by another pairing with its site. What runs of it and its
    /// test belong to both; this one is of no more use but to who has it in hand.
    pub(super) fn bound_to(&self, site: &Arc<Site>, remote: Arc<Remote>) -> Arc<Self> {
        self.begin_anew();
        let bound = Self {
            state: self.state.clone(),
            seen: self.seen.clone(),
            drill: self.drill.clone(),
            ..Self::new(site, remote, self.opening())
        };
        bound.turn(self.is_turned(), self.base());
        Arc::new(bound)
    }

    /// The source begins anew, or gave up: what it asked for before is void.
    pub(super) fn begin_anew(&self) {
        self.attempt.send_modify(|n| *n += 1);
    }

    /// To notice the next [`Standby::begin_anew`].
    pub(super) fn attempt(&self) -> watch::Receiver<u64> {
        self.attempt.subscribe()
    }

    /// The peer that sends it, by its name.
    pub(super) fn from(&self) -> String {
        self.remote.record.site.clone()
    }

    /// Does this peer send it?
    pub(super) fn is_from(&self, peer: &SiteKey) -> bool {
        self.remote.record.key == *peer
    }

    pub(super) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    pub(super) fn name(&self) -> String {
        let opening = self.opening.read().unwrap_or_else(PoisonError::into_inner);
        opening.name.clone()
    }

    pub(super) fn opening(&self) -> Opening {
        self.opening
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn update(&self, opening: Opening) {
        *self.opening.write().unwrap_or_else(PoisonError::into_inner) = opening;
    }

    /// The points that can be run, oldest first.
    pub(super) fn points(&self) -> Vec<PointHeader> {
        let mut points = self.remote.incoming.store.points(self.guest);
        let base = self.base();
        points.retain(|point| point.point != base);
        points
    }

    /// The point that its source builds upon, and that is none to run; 0 for none.
    pub(super) fn base(&self) -> u64 {
        self.base.load(Ordering::Acquire)
    }

    /// Did it turn round? Then it is this site's own, whatever points are here.
    pub(super) fn is_turned(&self) -> bool {
        self.turned.load(Ordering::Acquire)
    }

    /// For [`Standby::record`], which is to be kept.
    pub(super) fn turn(&self, turned: bool, base: u64) {
        self.turned.store(turned, Ordering::Release);
        self.base.store(base, Ordering::Release);
    }

    pub(super) fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn seen(&self) -> Seen {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn active(&self) -> Option<Activation> {
        self.seen().active
    }

    /// For `status`.
    pub(super) fn view(&self) -> TargetView {
        let opening = self.opening();
        let points = self.points();
        let newest = points.last();
        let seen = self.seen();
        let site = self.site.upgrade();
        let overdue = seen
            .active
            .as_ref()
            .and_then(|active| active.overdue(&opening));
        let trouble = match (seen.trouble.is_empty(), overdue) {
            (true, Some(overdue)) => overdue,
            _ => seen.trouble,
        };
        TargetView {
            name: opening.name.clone(),
            id: self.guest.to_string(),
            from: self.from(),
            points: points.len(),
            newest_point: newest.map_or(0, |p| p.point),
            disks_only: newest.is_some_and(|p| boots(&p.volumes)),
            rpo_ms: newest.map(|p| age(p.cut_at_unix_ns).as_millis() as u64),
            warm_point: seen.warm_point,
            term: site
                .as_ref()
                .and_then(|s| s.fence.current(self.guest))
                .map(|t| t.number),
            active: seen.active.map(|a| ActiveView {
                point: a.point,
                console: ConsolePaths::beside(a.directory()),
                qmp: a.qmp.map(|qmp| qmp.display().to_string()),
                pid: a.pid,
                hydrated: a.hydrated,
                hydration: seen.hydration,
                commit: Some(CommitView::of(a.at, a.committed_at, opening.commit)),
                going_back: a.returning.is_some(),
                times: a.times,
            }),
            tested_at: site.as_ref().and_then(|site| site.tested_at(self.guest)),
            test: seen.test.map(TestSeen::view),
            trouble,
        }
    }

    /// Begins to bring the warm RAM to a newly sealed point, in the background.
    pub(super) fn warm_up(self: &Arc<Self>, point: u64) {
        let opening = self.opening();
        // Of a guest that boots, no memory comes.
        let warm = opening.warm && !boots(&opening.volumes);
        if !warm || !self.site.upgrade().is_some_and(|s| s.config.activate.warm) {
            return;
        }
        let standby = self.clone();
        tokio::spawn(async move {
            let mut state = standby.state.lock().await;
            if state.runs().is_some() || point < standby.newest() {
                return;
            }
            if let Err(error) = standby.fill(&mut state, point).await {
                tracing::warn!(guest = %standby.name(), %error, "RAM is not kept warm");
                standby.see(|s| s.trouble = format!("RAM is not kept warm: {error}"));
            }
        });
    }

    /// The newest point that can be run; 0 for none.
    pub(super) fn newest(&self) -> u64 {
        let newest = self.remote.incoming.store.newest(self.guest);
        let newest = newest.map_or(0, |p| p.point);
        // The base is older than every other point, or the only one that counts.
        if newest == self.base() { 0 } else { newest }
    }

    pub(super) fn open(&self, point: u64) -> Result<(Arc<Replica>, PointContext), ActivateError> {
        self.refuse_damaged(point)?;
        let replica = self.remote.incoming.store.open_point(self.guest, point)?;
        self.with_context(replica)
    }

    /// As [`Standby::open`], also when not all of it can be read: for who needs
    /// its context, or what is read of it one by one.
    pub(super) fn open_in_part(
        &self,
        point: u64,
    ) -> Result<(Arc<Replica>, PointContext), ActivateError> {
        let store = &self.remote.incoming.store;
        self.with_context(store.open_in_part(self.guest, point)?)
    }

    fn with_context(
        &self,
        replica: Replica,
    ) -> Result<(Arc<Replica>, PointContext), ActivateError> {
        let point = replica.header().point;
        let context =
            PointContext::of(&replica).map_err(|why| ActivateError::Context(point, why))?;
        if context.base {
            let why = "it only holds what was here of the guest when it turned round".to_owned();
            return Err(ActivateError::Context(point, why));
        }
        Ok((Arc::new(replica), context))
    }

    /// Nothing that is known to be damaged is run.
    pub(super) fn refuse_damaged(&self, point: u64) -> Result<(), ActivateError> {
        let store = &self.remote.incoming.store;
        match store.damaged_point(self.guest, point) {
            None => Ok(()),
            Some(why) => Err(ActivateError::Damaged {
                name: self.name(),
                point,
                why,
                whole: self.newest_whole(),
            }),
        }
    }

    /// Brings the RAM files to `point`; the bytes written.
    pub(super) async fn fill(&self, state: &mut State, point: u64) -> Result<u64, ActivateError> {
        let site = self.site()?;
        let (replica, context) = self.open(point)?;
        self.discard_unless_of(state, &context.definition).await;
        let directory = site.config.ram_dir().join(self.guest.to_string());
        let mut warm = std::mem::take(&mut state.warm);
        let (warm, filled) = step(move || {
            let filled = warm.bring_to(&directory, &replica, &context.definition);
            (warm, filled)
        })
        .await?;
        state.warm = warm;
        self.see(|s| s.warm_point = state.warm.point());
        filled
    }

    pub(super) fn site(&self) -> Result<Arc<Site>, ActivateError> {
        self.site
            .upgrade()
            .ok_or_else(|| ActivateError::Step("the site is shutting down".to_owned()))
    }

    /// Builds the machine of `point` without running anything, to run under
    /// the term of this number. Each has a directory of its own: what an earlier
    /// one left there is evidence, and may be all that is left of its disks.
    pub(super) async fn launch(&self, point: u64, number: u64) -> Result<Ready, ActivateError> {
        self.launch_on(point, number, BTreeMap::new()).await
    }

    /// Gets ready for a planned move.
    pub(super) async fn prepare(self: &Arc<Self>) -> Result<(), ActivateError> {
        self.make_room().await;
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        let newest = self.newest();
        if newest == 0 {
            return Err(ActivateError::NoPoint(
                self.name(),
                "recovery point".to_owned(),
            ));
        }
        self.discard(&mut state).await;
        self.end_evidence(&mut state).await;
        // The RAM files must be there before the machine maps them; their content may come later.
        self.fill(&mut state, newest).await?;
        let known = self.site()?.fence.current(self.guest);
        let number = known.map_or(0, |t| t.number) + 1;
        state.ready = Some(self.launch(newest, number).await?);
        Ok(())
    }

    /// Ends a machine that was made ready and never ran.
    pub(super) async fn discard(&self, state: &mut State) {
        if let Some(ready) = state.ready.take() {
            let _ = crate::work::spawn_blocking(move || ready.discard()).await;
        }
    }

    /// A machine that was made ready for a point of another definition is of
    /// no use, and its RAM files change: it goes before they do.
    pub(super) async fn discard_unless_of(&self, state: &mut State, definition: &Definition) {
        let ready = state.ready.as_ref();
        if ready.is_some_and(|ready| !ready.is_of(definition)) {
            tracing::warn!(guest = %self.name(), "its source tells of another machine than was made ready");
            self.discard(state).await;
        }
    }

    /// The source ends protection.
    pub(super) async fn close(self: &Arc<Self>, discard: bool) -> Result<(), ActivateError> {
        self.begin_anew();
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        let kept = self.remote.incoming.store.kept(self.guest);
        if let (true, Some(name)) = (discard, kept.values().next()) {
            return Err(ActivateError::Step(format!(
                "'{0}' has {1} kept points here (\"{name}\"); nothing is dropped before they are released: farhaven point release {0} --point \"{name}\"",
                self.name(),
                kept.len()
            )));
        }
        // What a test runs from goes, and none may begin until all is gone.
        let _no_test = match discard {
            true => {
                let mut drill = self.drill.clone().lock_owned().await;
                self.stop_test_of(&mut drill).await;
                Some(drill)
            }
            false => None,
        };
        self.discard(&mut state).await;
        let site = self.site()?;
        state
            .warm
            .discard(&site.config.ram_dir().join(self.guest.to_string()));
        self.see(|s| s.warm_point = None);
        let store = self.remote.incoming.store.clone();
        let guest = self.guest;
        store.abandon(guest);
        if discard {
            super::retention::discard_points(&self.remote, guest)
                .await
                .map_err(ActivateError::Step)?;
            site.forget_standby(guest)?;
        }
        Ok(())
    }

    /// Is a machine made ready in that directory, or may it be?
    pub(super) fn is_ready_in(&self, directory: &std::path::Path) -> bool {
        self.state.try_lock().map_or(true, |state| {
            let ready = state.ready.as_ref();
            ready.is_some_and(|ready| ready.run_directory() == directory)
        })
    }

    /// What goes into the catalogue.
    pub(super) fn record(&self) -> StandbyRecord {
        StandbyRecord {
            from: self.from(),
            key: Some(self.remote.record.key),
            opening: self.opening(),
            base: self.base(),
            turned: self.is_turned(),
        }
    }
}

static NO_MACS: BTreeMap<String, String> = BTreeMap::new();

/// Where a guest is put on this host under a term.
pub(super) fn ground(site: &Site, guest: GuestId, term: u64) -> Ground<'_> {
    Ground {
        guest,
        run: site
            .config
            .run_dir()
            .join(guest.to_string())
            .join(format!("t{term}")),
        ram: site.config.ram_dir().join(guest.to_string()),
        exports: &site.exports,
        networks: &site.config.networks,
        macs: &NO_MACS,
        qemu: &site.config.activate.qemu,
        builders: &site.builders,
        isolated: false,
    }
}

pub(super) async fn step<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ActivateError> {
    crate::work::spawn_blocking(work)
        .await
        .map_err(|e| ActivateError::Step(e.to_string()))
}
