//! A standby becomes a running guest: by the hand-over of its source, or by an
//! operator's decision.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_storage_sync::PointHeader;

use super::records::Activation;
use super::standby::{Standby, State, step};
use super::unix_ns;
use crate::activate::fence::{OVERRULES, Term};
use crate::activate::place::Ready;
use crate::activate::point::boots;
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
    /// The source may have been told that it does not run here.
    #[error(
        "the move of '{0}' was given up here before its last data came, or this site was started anew meanwhile; it is not run"
    )]
    NotPrepared(String),
    /// The source lives, and did not stop it.
    #[error(
        "its source lives and did not say that it stopped '{0}' ({1}). It is not run here while it may run there: stop it there, or cut that site off, and run this again"
    )]
    SourceRuns(String, String),
    /// A newer term is known.
    #[error("a newer term of '{0}' is known here; it is not run")]
    Superseded(String),
    /// The store.
    #[error(transparent)]
    Replica(#[from] farhaven_storage_sync::replica::ReplicaError),
    /// RAM files, overlays, QEMU, or a builder of embedded guests.
    #[error(transparent)]
    Machine(#[from] crate::activate::machine::MachineError),
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
    /// What it needs is damaged on disk.
    #[error("point {point} of '{name}' is damaged here ({why}), and is not run; {}", instead(name, *whole))]
    Damaged {
        /// The guest.
        name: String,
        /// The point.
        point: u64,
        /// What is wrong.
        why: String,
        /// The newest point that is whole.
        whole: Option<u64>,
    },
    /// A bridge that its networks are mapped to is not here.
    #[error("'{0}' cannot be run at this site: {1}. Nothing was stopped for it; then do it again")]
    Networks(String, String),
    /// A step panicked.
    #[error("a step ended early: {0}")]
    Step(String),
}

fn instead(name: &str, whole: Option<u64>) -> String {
    match whole {
        Some(point) => {
            format!("the newest that is whole is point {point}: name it with --point {point}")
        }
        None => format!("no other point of it is known to be whole: see farhaven points {name}"),
    }
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
        if let Some(active) = state.runs() {
            // The first answer was lost.
            return if active.term == term && active.point == header.point {
                Ok(active.times.clone())
            } else {
                Err(ActivateError::Active(self.name(), active.term.number))
            };
        }
        // The seal may have waited for data over a cut link. What was prepared
        // is gone once a question of the source was answered with "given up":
        // it may run the guest since then.
        if state.ready.is_none() {
            return Err(ActivateError::NotPrepared(self.name()));
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
        if let Some(active) = state.runs() {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        self.end_evidence(&mut state).await;
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
        // Before a term is taken: there may be another point to run.
        self.refuse_damaged(point)?;
        self.refuse_missing_networks().await?;
        let site = self.site()?;
        let raise = {
            let (site, guest) = (site.clone(), self.guest);
            move || site.fence.overrule(guest, site.key())
        };
        if self.remote().alive() && state.ready.is_none() {
            // The source will stop its guest: what can fail is done before that.
            let number = site.fence.current(self.guest).map_or(0, |t| t.number) + OVERRULES;
            self.fill(&mut state, point).await?;
            state.ready = Some(self.launch(point, number).await?);
        }
        let mut times = ActivationTimes::default();
        let began = Instant::now();
        let term = step(raise).await??;
        times.term = began.elapsed();
        site.announce_term(self.remote(), term)
            .await
            .map_err(|why| ActivateError::SourceRuns(self.name(), why))?;
        self.run(&mut state, point, term, declared, times).await?;
        let active = state.active.as_ref().map(|(a, _)| a.clone());
        active
            .map(|a| (point, a))
            .ok_or_else(|| ActivateError::Step("not active".to_owned()))
    }

    pub(super) async fn run(
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
                let _ = self.forget_activation(&site);
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
        self.discard_unless_of(state, &context.definition).await;
        // Until it runs, what was launched stays where a failure finds and ends it.
        match &state.ready {
            Some(_) => {
                let began = Instant::now();
                times.ram_bytes = self.fill(state, point).await?;
                times.ram = began.elapsed();
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
                let (launched, filled) = tokio::join!(
                    self.timed(self.launch(point, term.number)),
                    self.fill(state, point)
                );
                times.ram = began.elapsed();
                let (launched, took) = launched;
                times.launch = took;
                state.ready = Some(launched?);
                times.ram_bytes = filled?;
            }
        }
        let gone = || ActivateError::Step("its machine was ended".to_owned());
        let ready = state.ready.as_ref().ok_or_else(gone)?;
        ready.serve(&replica)?;
        let booted = boots(replica.volumes());
        let mut activation = Activation {
            guest: self.guest,
            point,
            term,
            run: ready.run_directory().to_owned(),
            qmp: ready.qmp(),
            pid: ready.pid(),
            running: false,
            // A guest that boots mounts its filesystems anew.
            frozen: context.quiesced == Some(true) && !booted,
            hydrated: false,
            times: ActivationTimes::default(),
            at: unix_ns(std::time::SystemTime::now()),
            committed_at: None,
            commit_told: false,
            returning: None,
        };
        // Whoever told a newer one meanwhile waits for this to end.
        if site.fence.current(self.guest) != Some(term) {
            return Err(ActivateError::Superseded(self.name()));
        }
        // Before it can run: a daemon that dies now must find its guest again.
        site.keep_activation(&activation)?;
        // From here on, the RAM files are the guest's.
        state.warm = Warm::default();
        let began = Instant::now();
        let ready = state.ready.take().ok_or_else(gone)?;
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
        times.boots = booted;
        activation.running = true;
        activation.times = times.clone();
        self.see(|s| {
            s.active = Some(activation.clone());
            s.warm_point = None;
            s.trouble.clear();
        });
        tracing::warn!(guest = %self.name(), point, term = term.number,
            total_ms = times.total.as_millis() as u64, "taken over: it runs here");
        if let Err(error) = site.keep_activation(&activation) {
            // It runs, and that is what the source must hear.
            tracing::error!(%error, "the catalogue cannot be written");
        }
        let ready = Arc::new(ready);
        state.active = Some((activation, ready.clone()));
        self.thaw(ready.clone(), context.quiesced.filter(|_| !booted));
        tokio::spawn(self.clone().hydrate(ready));
        Ok(())
    }

    async fn timed<T>(&self, work: impl Future<Output = T>) -> (T, Duration) {
        let began = Instant::now();
        let done = work.await;
        (done, began.elapsed())
    }

    /// Announces the guest, then copies its disks out of the store.
    pub(super) async fn hydrate(self: Arc<Self>, ready: Arc<Ready>) {
        let (standby, mine) = (self.clone(), ready.clone());
        let rate = self
            .site
            .upgrade()
            .and_then(|s| s.config.activate.hydrate_rate.rate());
        let rate = rate.map_or(0, |rate| rate.bytes_per_second());
        let done = crate::work::spawn_blocking(move || {
            ready.announce();
            ready.hydrate(rate, |done, total| {
                standby.see(|s| s.hydration = Some((done, total)))
            })
        })
        .await;
        let mut state = self.state.lock().await;
        // It was ended or fenced meanwhile, or taken over anew: nothing is to be told.
        if !state.is_active(&mine) {
            return;
        }
        match done {
            Ok(Ok(())) => {
                let Some((active, _)) = &mut state.active else {
                    return;
                };
                active.hydrated = true;
                let active = active.clone();
                if let Ok(site) = self.site()
                    && let Err(error) = site.keep_activation(&active)
                {
                    tracing::error!(%error, "the catalogue cannot be written");
                }
                self.see(|s| s.active = Some(active));
                tracing::info!(guest = %self.name(), "its disks need the store no longer");
            }
            Ok(Err(error)) => {
                tracing::error!(guest = %self.name(), %error, "its disks stay on the store");
                self.see(|s| s.trouble = format!("its disks stay on the store: {error}"));
            }
            Err(error) => tracing::error!(guest = %self.name(), %error, "hydration ended early"),
        }
    }
}
