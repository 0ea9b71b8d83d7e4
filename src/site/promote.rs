//! A standby becomes a running guest: by the hand-over of its source, by an
//! operator's decision, or found again after a restart of this daemon.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::catalogue::Table;

use super::records::Activation;
use super::standby::{Standby, State, ground, step};
use super::unix_ns;
use crate::activate::fence::Term;
use crate::activate::place::Ready;
use crate::activate::warm::Warm;
use crate::replicate::message::ActivationTimes;

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

impl Standby {
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
        site.announce_term(self.remote(), term).await;
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
}
