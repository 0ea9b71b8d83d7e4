//! A guest that a peer sends here: kept warm, made ready, run.
//!
//! Everything that touches its RAM file and its QEMU happens under one lock,
//! in one order: launch and RAM side by side, then the device state, then the
//! guest goes on. A term is durable before any of it can run.

use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::GuestId;

use super::records::{Activation, StandbyRecord};
use super::remote::Remote;
use super::view::{ActiveView, TargetView};
use super::{Site, age, unix_ns};
use crate::activate::fence::Term;
use crate::activate::place::{Ground, Ready};
use crate::activate::warm::Warm;
use crate::replicate::message::{ActivationTimes, Opening, PointContext};

/// Why a guest cannot be run here.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// It runs here already.
    #[error("'{0}' was taken over before and runs here (term {1})")]
    Active(String, u64),
    /// Nothing to run.
    #[error("there is no {1} of '{0}' here; see farhaven points {0}")]
    NoPoint(String, String),
    /// Fenced, or the term could not be made durable.
    #[error(transparent)]
    Fence(#[from] crate::activate::fence::FenceError),
    /// A newer term is known.
    #[error("a newer term of '{0}' is known here; it is not run")]
    Superseded(String),
    /// The store.
    #[error(transparent)]
    Replica(#[from] farhaven_storage_sync::replica::ReplicaError),
    /// RAM files, overlays, QEMU.
    #[error(transparent)]
    Launch(#[from] crate::activate::failure::LaunchError),
    /// Files.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The catalogue.
    #[error(transparent)]
    Catalogue(#[from] farhaven_storage_sync::catalogue::CatalogueError),
    /// The point says nothing of how to run it.
    #[error("point {0} cannot be run: {1}")]
    Context(u64, String),
    /// A step panicked.
    #[error("a step ended early: {0}")]
    Step(String),
}

/// A guest that a peer sends here.
pub(super) struct Standby {
    site: Weak<Site>,
    remote: Arc<Remote>,
    guest: GuestId,
    opening: RwLock<Opening>,
    state: tokio::sync::Mutex<State>,
    seen: Mutex<Seen>,
}

/// Only touched under the lock.
#[derive(Default)]
struct State {
    warm: Warm,
    ready: Option<Ready>,
    active: Option<(Activation, Arc<Ready>)>,
}

/// What `status` shows without waiting for the lock.
#[derive(Default, Clone)]
struct Seen {
    warm_point: Option<u64>,
    active: Option<Activation>,
    hydration: Option<(u64, u64)>,
    trouble: String,
}

impl Standby {
    pub(super) fn new(site: &Arc<Site>, remote: Arc<Remote>, opening: Opening) -> Self {
        Self {
            site: Arc::downgrade(site),
            remote,
            guest: opening.guest,
            opening: RwLock::new(opening),
            state: tokio::sync::Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// The peer that sends it.
    pub(super) fn from(&self) -> String {
        self.remote.record.site.clone()
    }

    pub(super) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    pub(super) fn name(&self) -> String {
        self.opening().name
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

    pub(super) fn points(&self) -> Vec<PointHeader> {
        self.remote.incoming.store.points(self.guest)
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn seen(&self) -> Seen {
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
        TargetView {
            name: opening.name,
            id: self.guest.to_string(),
            from: self.from(),
            points: points.len(),
            newest_point: newest.map_or(0, |p| p.point),
            rpo_ms: newest.map(|p| age(p.cut_at_unix_ns).as_millis() as u64),
            warm_point: seen.warm_point,
            term: site
                .and_then(|s| s.fence.current(self.guest))
                .map(|t| t.number),
            active: seen.active.map(|a| ActiveView {
                point: a.point,
                qmp: a.qmp.display().to_string(),
                pid: a.pid,
                hydrated: a.hydrated,
                hydration: seen.hydration,
                times: a.times,
            }),
            trouble: seen.trouble,
        }
    }

    /// Begins to bring the warm RAM to a newly sealed point, in the background.
    pub(super) fn warm_up(self: &Arc<Self>, point: u64) {
        if !self.opening().warm || !self.site.upgrade().is_some_and(|s| s.config.activate.warm) {
            return;
        }
        let standby = self.clone();
        tokio::spawn(async move {
            let mut state = standby.state.lock().await;
            if state.active.is_some() || point < standby.newest() {
                return;
            }
            if let Err(error) = standby.fill(&mut state, point).await {
                tracing::warn!(guest = %standby.name(), %error, "RAM is not kept warm");
                standby.see(|s| s.trouble = format!("RAM is not kept warm: {error}"));
            }
        });
    }

    fn newest(&self) -> u64 {
        self.remote
            .incoming
            .store
            .newest(self.guest)
            .map_or(0, |p| p.point)
    }

    fn open(&self, point: u64) -> Result<(Arc<Replica>, PointContext), ActivateError> {
        let replica = self.remote.incoming.store.open_point(self.guest, point)?;
        let context = ciborium::de::from_reader_with_recursion_limit(replica.context(), 64)
            .map_err(|e: ciborium::de::Error<std::io::Error>| {
                ActivateError::Context(point, e.to_string())
            })?;
        Ok((Arc::new(replica), context))
    }

    /// Brings the RAM files to `point`; the bytes written.
    async fn fill(&self, state: &mut State, point: u64) -> Result<u64, ActivateError> {
        let site = self.site()?;
        let (replica, context) = self.open(point)?;
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

    fn site(&self) -> Result<Arc<Site>, ActivateError> {
        self.site
            .upgrade()
            .ok_or_else(|| ActivateError::Step("the site is shutting down".to_owned()))
    }

    /// Launches QEMU for `point` without running anything.
    async fn launch(&self, point: u64) -> Result<Ready, ActivateError> {
        let site = self.site()?;
        let (replica, context) = self.open(point)?;
        let (guest, term) = (self.guest, site.fence.current(self.guest));
        // Each activation has a directory of its own: what an earlier one left is evidence.
        let term = term
            .filter(|t| t.owner == site.key())
            .map_or_else(|| term.map_or(1, |t| t.number + 1), |own| own.number);
        step(move || Ready::launch(&ground(&site, guest, term), &replica, &context.definition))
            .await?
    }

    /// Gets ready for a planned move.
    pub(super) async fn prepare(self: &Arc<Self>) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        if let Some((active, _)) = &state.active {
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
        // The RAM files must be there before QEMU maps them; their content may come later.
        self.fill(&mut state, newest).await?;
        state.ready = Some(self.launch(newest).await?);
        Ok(())
    }

    /// Ends a QEMU that was made ready and never ran.
    async fn discard(&self, state: &mut State) {
        if let Some(ready) = state.ready.take() {
            let _ = tokio::task::spawn_blocking(move || ready.discard()).await;
        }
    }

    /// Gives up what was prepared, unless it runs already.
    pub(super) async fn give_up(self: &Arc<Self>) -> Option<(ActivationTimes, Term)> {
        let mut state = self.state.lock().await;
        if let Some((active, _)) = &state.active {
            return Some((active.times.clone(), active.term));
        }
        self.discard(&mut state).await;
        None
    }

    /// The source goes on: what was prepared here is not needed.
    pub(super) async fn stand_down(self: &Arc<Self>) {
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
    }

    /// The source handed the guest over: run it from its last point.
    pub(super) async fn take_over(
        self: &Arc<Self>,
        header: &PointHeader,
        term: Term,
    ) -> Result<ActivationTimes, ActivateError> {
        let declared = Instant::now();
        let mut state = self.state.lock().await;
        if let Some((active, _)) = &state.active {
            // The first answer was lost.
            return if active.term == term {
                Ok(active.times.clone())
            } else {
                Err(ActivateError::Active(self.name(), active.term.number))
            };
        }
        let site = self.site()?;
        let fence_term = {
            let site = site.clone();
            move || site.fence.adopt(term)
        };
        let mut times = ActivationTimes::default();
        let in_force = step(fence_term).await??;
        if in_force != term || term.owner != site.key() {
            return Err(ActivateError::Superseded(self.name()));
        }
        times.term = declared.elapsed();
        self.run(&mut state, header.point, term, declared, times)
            .await
    }

    /// An operator's decision: run the guest from a point, under the next term.
    pub(super) async fn fail_over(
        self: &Arc<Self>,
        point: Option<u64>,
        declared: Instant,
    ) -> Result<(u64, Activation), ActivateError> {
        let mut state = self.state.lock().await;
        if let Some((active, _)) = &state.active {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        let point = match point {
            Some(point) if self.points().iter().any(|p| p.point == point) => point,
            Some(point) => {
                return Err(ActivateError::NoPoint(
                    self.name(),
                    format!("point {point}"),
                ));
            }
            None => match self.newest() {
                0 => {
                    return Err(ActivateError::NoPoint(
                        self.name(),
                        "recovery point".to_owned(),
                    ));
                }
                newest => newest,
            },
        };
        let site = self.site()?;
        let raise = {
            let (site, guest) = (site.clone(), self.guest);
            move || site.fence.raise(guest, site.key())
        };
        let mut times = ActivationTimes::default();
        let began = Instant::now();
        let term = step(raise).await??;
        times.term = began.elapsed();
        site.announce_term(&self.remote, term).await;
        self.run(&mut state, point, term, declared, times).await?;
        let active = state.active.as_ref().map(|(a, _)| a.clone());
        active
            .map(|a| (point, a))
            .ok_or_else(|| ActivateError::Step("not active".to_owned()))
    }

    async fn run(
        self: &Arc<Self>,
        state: &mut State,
        point: u64,
        term: Term,
        declared: Instant,
        mut times: ActivationTimes,
    ) -> Result<ActivationTimes, ActivateError> {
        let ran = self
            .run_steps(state, point, term, declared, &mut times)
            .await;
        if let Err(error) = &ran {
            tracing::error!(guest = %self.name(), point, %error, "could not be run here");
            self.see(|s| s.trouble = format!("could not be run from point {point}: {error}"));
            self.discard(state).await;
            state.warm = Warm::default();
            self.see(|s| s.warm_point = None);
            if let Ok(site) = self.site() {
                let _ = site
                    .catalogue
                    .remove(Table::Activations, &self.guest.to_string());
            }
        }
        ran.map(|()| times)
    }

    async fn run_steps(
        self: &Arc<Self>,
        state: &mut State,
        point: u64,
        term: Term,
        declared: Instant,
        times: &mut ActivationTimes,
    ) -> Result<(), ActivateError> {
        let site = self.site()?;
        let (replica, context) = self.open(point)?;
        let ready = match state.ready.take() {
            Some(ready) => {
                let began = Instant::now();
                times.ram_bytes = self.fill(state, point).await?;
                times.ram = began.elapsed();
                ready.serve(&replica)?;
                ready
            }
            None => {
                let directory = site.config.ram_dir().join(self.guest.to_string());
                state
                    .warm
                    .make_files(&directory, &context.definition)
                    .map_err(|source| ActivateError::Io {
                        what: format!("making RAM files in {}", directory.display()),
                        source,
                    })?;
                let began = Instant::now();
                let (launched, filled) =
                    tokio::join!(self.timed(self.launch(point)), self.fill(state, point));
                times.ram = began.elapsed();
                let (launched, took) = launched;
                times.launch = took;
                match (launched, filled) {
                    (Ok(ready), Ok(bytes)) => {
                        times.ram_bytes = bytes;
                        ready
                    }
                    (Ok(ready), Err(error)) => {
                        let _ = tokio::task::spawn_blocking(move || ready.discard()).await;
                        return Err(error);
                    }
                    (Err(error), _) => return Err(error),
                }
            }
        };
        let mut activation = Activation {
            guest: self.guest,
            point,
            term,
            qmp: ready.qmp(),
            pid: ready.pid(),
            running: false,
            hydrated: false,
            times: ActivationTimes::default(),
            at: unix_ns(std::time::SystemTime::now()),
        };
        // Before it can run: a daemon that dies now must find its guest again.
        site.keep_activation(&activation)?;
        // From here on, the RAM files are the guest's.
        state.warm = Warm::default();
        let began = Instant::now();
        let (ready, restored) = step(move || {
            let restored = ready.restore_and_run(&replica);
            (ready, restored)
        })
        .await?;
        if let Err(error) = restored {
            state.ready = Some(ready);
            return Err(error);
        }
        times.restore = began.elapsed();
        times.total = declared.elapsed();
        activation.running = true;
        activation.times = times.clone();
        self.see(|s| {
            s.active = Some(activation.clone());
            s.warm_point = None;
            s.trouble.clear();
        });
        tracing::warn!(guest = %self.name(), point, term = term.number,
            total_ms = times.total.as_millis() as u64, "taken over: it runs here");
        site.keep_activation(&activation)?;
        let ready = Arc::new(ready);
        state.active = Some((activation, ready.clone()));
        tokio::spawn(self.clone().hydrate(ready));
        Ok(())
    }

    async fn timed<T>(&self, work: impl Future<Output = T>) -> (T, Duration) {
        let began = Instant::now();
        let done = work.await;
        (done, began.elapsed())
    }

    /// Announces the guest, then copies its disks out of the store.
    async fn hydrate(self: Arc<Self>, ready: Arc<Ready>) {
        let standby = self.clone();
        let rate = self
            .site
            .upgrade()
            .and_then(|s| s.config.activate.hydrate_rate.rate());
        let rate = rate.map_or(0, |rate| rate.bytes_per_second());
        let done = tokio::task::spawn_blocking(move || {
            ready.announce();
            ready.hydrate(rate, |done, total| {
                standby.see(|s| s.hydration = Some((done, total)))
            })
        })
        .await;
        match done {
            Ok(Ok(())) => {
                let mut state = self.state.lock().await;
                if let Some((active, ready)) = &mut state.active {
                    active.hydrated = true;
                    ready.stop_serving();
                    let active = active.clone();
                    if let Ok(site) = self.site()
                        && let Err(error) = site.keep_activation(&active)
                    {
                        tracing::error!(%error, "the catalogue cannot be written");
                    }
                    self.see(|s| s.active = Some(active));
                }
                tracing::info!(guest = %self.name(), "its disks need the store no longer");
            }
            Ok(Err(error)) => {
                tracing::error!(guest = %self.name(), %error, "its disks stay on the store");
                self.see(|s| s.trouble = format!("its disks stay on the store: {error}"));
            }
            Err(error) => tracing::error!(guest = %self.name(), %error, "hydration ended early"),
        }
    }

    /// After a daemon's restart: serves and watches a guest that runs here.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        activation: Activation,
    ) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        let site = self.site()?;
        let (replica, context) = self.open(activation.point)?;
        let found = {
            let (site, guest) = (site.clone(), self.guest);
            let (term, hydrated) = (activation.term.number, activation.hydrated);
            step(move || {
                Ready::adopt(
                    &ground(&site, guest, term),
                    &replica,
                    &context.definition,
                    hydrated,
                )
            })
            .await?
        };
        match found {
            Ok(ready) => {
                let mut activation = activation;
                activation.running = true;
                site.keep_activation(&activation)?;
                let ready = Arc::new(ready);
                let hydrated = activation.hydrated;
                self.see(|s| s.active = Some(activation.clone()));
                state.active = Some((activation, ready.clone()));
                if !hydrated {
                    tokio::spawn(self.clone().hydrate(ready));
                }
                Ok(())
            }
            Err(error) => {
                self.see(|s| {
                    s.trouble = format!("it was taken over here before, and is gone: {error}")
                });
                site.catalogue
                    .remove(Table::Activations, &self.guest.to_string())?;
                site.catalogue.flush()?;
                Ok(())
            }
        }
    }

    /// A newer term of another owner: what runs here is stopped and kept.
    pub(super) async fn fenced(self: &Arc<Self>, term: Term) {
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
        let Some((active, ready)) = &state.active else {
            return;
        };
        let ready = ready.clone();
        let stopped = tokio::task::spawn_blocking(move || ready.stop()).await;
        let done = match stopped {
            Ok(Ok(())) => "it was stopped here and is kept as evidence".to_owned(),
            Ok(Err(error)) => format!("it could not be stopped here: {error}"),
            Err(error) => format!("it could not be stopped here: {error}"),
        };
        let why = format!(
            "fenced: term {} is newer than {}; {done}",
            term.number, active.term.number
        );
        tracing::warn!(guest = %self.name(), "{why}");
        self.see(|s| s.trouble = why);
    }

    /// The source ends protection.
    pub(super) async fn close(self: &Arc<Self>, discard: bool) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        if let Some((active, _)) = &state.active {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
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
            super::guests::discard_points(&self.remote, guest)
                .await
                .map_err(ActivateError::Step)?;
            site.forget_standby(guest)?;
        }
        Ok(())
    }

    /// What goes into the catalogue.
    pub(super) fn record(&self) -> StandbyRecord {
        StandbyRecord {
            from: self.from(),
            opening: self.opening(),
        }
    }
}

/// Where a guest is put on this host under a term.
fn ground(site: &Site, guest: GuestId, term: u64) -> Ground<'_> {
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
        qemu: &site.config.activate.qemu,
    }
}

async fn step<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ActivateError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ActivateError::Step(e.to_string()))
}
