//! Test failover: a guest of a peer runs here from one of its points, cut off
//! from every network, while protection from its source goes on.
//!
//! A test takes no term and never raises one: it is a copy that nobody talks
//! to, and it is thrown away. It has RAM files and overlays of its own
//! (`{ram}/<guest>-test`, `{run}/<guest>/test`); the warm RAM of the newest
//! point stays with protection, and its locks are not taken: points are sealed
//! and a real failover begins as if there were no test. The tested point is
//! pinned against pruning from before it is opened until all is removed.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::GuestId;

mod error;
mod of_run;
mod place;
mod verbs;

use self::error::TestError;
pub(super) use self::place::free_memory;
use self::place::{Places, allocated, remove};
use super::promote::ActivateError;
use super::standby::{Standby, ground, step};
use super::view::{ConsolePaths, TestEnded, TestReport, TestView};
use super::{Site, age, unix_ns};
use crate::activate::launch::Launched;
use crate::activate::machine::Builders;
use crate::activate::place::{Ready, builder};
use crate::activate::point::boots;
use crate::activate::warm::{Warm, ram_file};
use crate::guest::Definition;
use crate::replicate::message::{ActivationTimes, PointContext};

/// Memory that is left to the host beside a guest's RAM.
const BESIDE: u64 = 128 << 20;

/// A test waits so long for another one's beginning or end.
const SETTLES: Duration = Duration::from_secs(2);

/// A test that runs.
pub(super) struct Drill {
    ready: Arc<Ready>,
    point: u64,
    since: Instant,
    /// The run that it is a part of, if it is of one.
    run: Option<String>,
    /// Set until it runs.
    waiting: Option<Waiting>,
}

/// A test that is made ready, and does not run yet.
struct Waiting {
    replica: Arc<Replica>,
    times: ActivationTimes,
    cut_at: u64,
}

/// What `status` and pruning know of a test.
#[derive(Debug, Clone)]
pub(super) struct TestSeen {
    pub(super) point: u64,
    /// Nanoseconds since 1970.
    at: u64,
    /// Set once it runs.
    running: Option<(Option<PathBuf>, Option<u32>, Option<ConsolePaths>)>,
}

impl TestSeen {
    /// For `status`.
    pub(super) fn view(self) -> TestView {
        let running = self.running.is_some();
        let (qmp, pid, console) = self.running.unwrap_or_default();
        TestView {
            point: self.point,
            since_ms: age(self.at).as_millis() as u64,
            running,
            qmp: qmp.map(|path| path.display().to_string()),
            pid,
            console,
        }
    }
}

impl Standby {
    /// The point that a test runs from: it must stay.
    pub(super) fn tested(&self) -> Option<u64> {
        self.seen().test.map(|test| test.point)
    }

    /// What runs here, or is about to, goes on from these points: they must stay.
    pub(super) fn points_in_use(&self) -> [Option<u64>; 3] {
        let site = self.site.upgrade();
        let of_run = site.and_then(|site| site.runs.point_of(&self.name()));
        [self.active().map(|a| a.point), self.tested(), of_run]
    }

    async fn test(
        self: &Arc<Self>,
        point: Option<u64>,
        declared: Instant,
    ) -> Result<TestReport, TestError> {
        self.prepare_test(point, declared, None).await?;
        self.run_test(declared).await
    }

    /// Makes a test ready, from the newest or a named point; nothing runs yet.
    /// Answers the point. One that is ready or runs for the same run is taken.
    pub(super) async fn prepare_test(
        self: &Arc<Self>,
        point: Option<u64>,
        declared: Instant,
        run: Option<&str>,
    ) -> Result<u64, TestError> {
        // What a test before left is gone in a moment.
        let Ok(mut drill) = tokio::time::timeout(SETTLES, self.drill.lock()).await else {
            return Err(TestError::Busy(self.name()));
        };
        if !self.is_known()? {
            return Err(TestError::Dropped(self.name()));
        }
        if let Some(running) = &*drill {
            return match running.run.as_deref() == run && run.is_some() {
                true => Ok(running.point),
                false => Err(TestError::Runs(self.name(), running.point)),
            };
        }
        if let Some(active) = self.active() {
            return Err(TestError::Active(self.name(), active.term.number));
        }
        let newest = self.newest();
        let point = point.unwrap_or(newest);
        if newest == 0 {
            let what = "recovery point".to_owned();
            return Err(ActivateError::NoPoint(self.name(), what).into());
        }
        // Pinned first: whatever is pruned from here on, this point stays.
        self.see(|s| {
            s.test = Some(TestSeen {
                point,
                at: unix_ns(SystemTime::now()),
                running: None,
            });
        });
        match self.ready_test(point).await {
            Ok((ready, waiting)) => {
                *drill = Some(Drill {
                    ready: Arc::new(ready),
                    point,
                    since: declared,
                    run: run.map(str::to_owned),
                    waiting: Some(waiting),
                });
                Ok(point)
            }
            Err(error) => {
                if let Ok(site) = self.site() {
                    let places = Places::of(&site, self.guest);
                    let _ = step(move || remove(&places)).await;
                }
                self.see(|s| s.test = None);
                Err(error)
            }
        }
    }

    /// Lets a test run that was made ready. On an error nothing is left of it.
    pub(super) async fn run_test(
        self: &Arc<Self>,
        declared: Instant,
    ) -> Result<TestReport, TestError> {
        // Whoever waited for the beginning sees it first, and goes away.
        let Ok(mut drill) = tokio::time::timeout(SETTLES, self.drill.lock()).await else {
            return Err(TestError::Busy(self.name()));
        };
        let Some(test) = &mut *drill else {
            return Err(TestError::NoTest(self.name()));
        };
        let Some(waiting) = &test.waiting else {
            return Err(TestError::Runs(self.name(), test.point));
        };
        let (ready, replica) = (test.ready.clone(), waiting.replica.clone());
        let began = Instant::now();
        let (context, booted) = (PointContext::of(&replica), boots(replica.volumes()));
        let ran = step(move || ready.restore_and_run(&replica)).await;
        if let Err(error) = ran.and_then(|ran| ran) {
            self.stop_test_of(&mut drill).await;
            return Err(error.into());
        }
        let (ready, point) = (test.ready.clone(), test.point);
        let quiesced = context.ok().and_then(|context| context.quiesced);
        self.thaw(ready.clone(), quiesced.filter(|_| !booted));
        let waiting = test.waiting.take();
        let (mut times, cut_at) = waiting.map(|w| (w.times, w.cut_at)).unwrap_or_default();
        times.restore = began.elapsed();
        times.total = declared.elapsed();
        times.boots = booted;
        let console = ConsolePaths::beside(ready.run_directory());
        self.see(|s| {
            if let Some(test) = &mut s.test {
                test.running = Some((ready.qmp(), ready.pid(), console.clone()));
            }
        });
        tracing::info!(guest = %self.name(), point, "a test runs here, isolated");
        Ok(TestReport {
            guest: self.name(),
            point,
            cut_at_unix_ns: cut_at,
            age_ms: age(cut_at).saturating_sub(declared.elapsed()).as_millis() as u64,
            rto_ms: times.total.as_secs_f64() * 1e3,
            qmp: ready.qmp().map(|path| path.display().to_string()),
            pid: ready.pid(),
            console,
            times,
        })
    }

    /// Has nobody dropped it, and its points with it, since it was looked up?
    fn is_known(&self) -> Result<bool, ActivateError> {
        let site = self.site()?;
        let standbys = site.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let known = standbys.get(&self.guest);
        Ok(known.is_some_and(|known| Arc::ptr_eq(&known.drill, &self.drill)))
    }

    async fn ready_test(self: &Arc<Self>, point: u64) -> Result<(Ready, Waiting), TestError> {
        let site = self.site()?;
        let Some(header) = self.points().into_iter().find(|p| p.point == point) else {
            let what = format!("point {point}");
            return Err(ActivateError::NoPoint(self.name(), what).into());
        };
        let (replica, context) = self.open(point)?;
        let definition = isolated(&context.definition, self.guest, &site.builders);
        let definition = definition.map_err(|reasons| TestError::NotIsolated {
            guest: self.name(),
            reasons,
        })?;
        let places = Places::of(&site, self.guest);
        self.has_room(&places.ram, definition.ram_bytes())?;
        let definition = Arc::new(definition);
        // The RAM files must be there before they are mapped; then both go side by side.
        let mut times = ActivationTimes::default();
        let began = Instant::now();
        let mut ram = Warm::default();
        ram.make_files(&places.ram, &definition)
            .map_err(|source| ActivateError::Io {
                what: format!("making RAM files in {}", places.ram.display()),
                source,
            })?;
        let filled = {
            let (directory, replica, definition) =
                (places.ram.clone(), replica.clone(), definition.clone());
            step(move || ram.bring_to(&directory, &replica, &definition))
        };
        let launched = self.launch_test(&site, &replica, &definition);
        let (launched, filled) = tokio::join!(launched, filled);
        times.ram = began.elapsed();
        let (ready, took) = launched?;
        times.launch = took;
        match filled.and_then(|filled| filled) {
            Ok(bytes) => times.ram_bytes = bytes,
            Err(error) => {
                step(move || ready.discard()).await?;
                return Err(error.into());
            }
        }
        let cut_at = header.cut_at_unix_ns;
        Ok((
            ready,
            Waiting {
                replica,
                times,
                cut_at,
            },
        ))
    }

    async fn launch_test(
        &self,
        site: &Arc<Site>,
        replica: &Arc<Replica>,
        definition: &Arc<Definition>,
    ) -> Result<(Ready, Duration), ActivateError> {
        let (site, guest) = (site.clone(), self.guest);
        let (replica, definition) = (replica.clone(), definition.clone());
        step(move || {
            let began = Instant::now();
            let places = Places::of(&site, guest);
            // Never this site's networks.
            let networks = BTreeMap::new();
            let mut ground = ground(&site, guest, 0);
            ground.run = places.run;
            ground.ram = places.ram;
            ground.networks = &networks;
            ground.isolated = true;
            let ready = Ready::launch(&ground, &replica, &definition)?;
            Ok((ready, began.elapsed()))
        })
        .await?
    }

    fn has_room(&self, directory: &Path, needed: u64) -> Result<(), TestError> {
        let free = free_memory(directory);
        if needed.saturating_add(BESIDE) <= free {
            return Ok(());
        }
        Err(TestError::NoRoom {
            guest: self.name(),
            needed: needed.div_ceil(1 << 20),
            free: free >> 20,
            directory: directory.to_owned(),
        })
    }

    pub(super) async fn end_test(self: &Arc<Self>) -> Result<TestEnded, TestError> {
        let Ok(mut drill) = self.drill.try_lock() else {
            return Err(TestError::Busy(self.name()));
        };
        let Some(running) = drill.take() else {
            return Err(TestError::NoTest(self.name()));
        };
        self.throw_away(running).await
    }

    async fn throw_away(&self, running: Drill) -> Result<TestEnded, TestError> {
        let site = self.site()?;
        let places = Places::of(&site, self.guest);
        let (point, since) = (running.point, running.since);
        let (ram_bytes, overlay_bytes, removed) = step(move || {
            let (ram, overlays) = (allocated(&places.ram), allocated(&places.run));
            let process = running.ready.pid();
            running.ready.end();
            let mut removed = remove(&places);
            removed.insert(
                0,
                match process {
                    Some(pid) => format!("QEMU, process {pid}"),
                    None => "the guest inside of the daemon".to_owned(),
                },
            );
            (ram, overlays, removed)
        })
        .await?;
        self.see(|s| s.test = None);
        tracing::info!(guest = %self.name(), point, "the test was ended and thrown away");
        Ok(TestEnded {
            guest: self.name(),
            point,
            ran_ms: since.elapsed().as_millis() as u64,
            ram_bytes,
            overlay_bytes,
            removed,
        })
    }

    /// Before the guest is run in earnest: a test goes if its memory is needed.
    /// Says so; empty when nothing had to go.
    pub(super) async fn make_room(self: &Arc<Self>) -> String {
        let (Ok(site), Some(_)) = (self.site(), self.tested()) else {
            return String::new();
        };
        let ram = site.config.ram_dir().join(self.guest.to_string());
        let definition = self.opening().definition;
        // What is warm has its room already.
        let files = definition.ram();
        let has = |(name, bytes): &(&str, u64)| {
            std::fs::metadata(ram_file(&ram, name)).map_or(0, |m| (m.blocks() * 512).min(*bytes))
        };
        let missing = files.iter().map(|file| file.1 - has(file));
        let needed = missing.fold(0, u64::saturating_add);
        if needed.saturating_add(BESIDE) <= free_memory(&ram) {
            return String::new();
        }
        // Held until all of it is gone: none begins meanwhile.
        let mut drill = self.drill.lock().await;
        let Some(running) = drill.take() else {
            return String::new();
        };
        let point = running.point;
        let said = match self.throw_away(running).await {
            Ok(_) => format!("the test of point {point} was ended first: its memory was needed"),
            Err(error) => format!("the test of point {point} could not be ended: {error}"),
        };
        tracing::warn!(guest = %self.name(), "{said}");
        said
    }

    /// At start: a test that an earlier daemon left is ended, and removed.
    pub(super) async fn clear_left_test(self: &Arc<Self>) {
        let Ok(site) = self.site() else { return };
        let places = Places::of(&site, self.guest);
        if !super::exists(&places.run) && !super::exists(&places.ram) {
            return;
        }
        // Taken before anybody can ask for a new test.
        let held = self.drill.clone().lock_owned().await;
        let name = self.name();
        crate::work::spawn_blocking(move || {
            Launched::end(&places.run.join("qmp.sock"), &places.run);
            let removed = remove(&places);
            tracing::warn!(
                guest = name,
                ?removed,
                "a test that ran before a restart was thrown away"
            );
            drop(held);
        });
    }

    /// The daemon stops: a test does not outlive it.
    pub(super) async fn stop_test(self: &Arc<Self>) {
        self.stop_test_of(&mut *self.drill.lock().await).await;
    }

    /// As [`Standby::stop_test`], for who holds the lock; none begins meanwhile.
    pub(super) async fn stop_test_of(&self, drill: &mut Option<Drill>) {
        if let Some(running) = drill.take()
            && let Err(error) = self.throw_away(running).await
        {
            tracing::warn!(guest = %self.name(), %error, "the test was not ended");
        }
    }
}

/// Bytes that tests of guests like these need in a directory for RAM files, what
/// is left to the host included; and what is free there.
pub(super) fn needed_for(definitions: &[Definition], directory: &Path) -> (u64, u64) {
    let ram = definitions.iter().map(Definition::ram_bytes);
    let needed = ram.fold(BESIDE, u64::saturating_add);
    (needed, free_memory(directory))
}

/// The same guest with nobody to talk to.
fn isolated(
    definition: &Definition,
    guest: GuestId,
    builders: &Builders,
) -> Result<Definition, Vec<String>> {
    let embedded = match definition {
        Definition::Qemu(qemu) => return Ok(qemu.isolated(&guest.to_string())?.into()),
        Definition::Embedded(embedded) => embedded,
    };
    let builder = builder(builders, &embedded.kind).map_err(|none| vec![none.to_string()])?;
    match builder.can_isolate() {
        // Its builder sees to that.
        true => Ok(definition.clone()),
        false => Err(vec![format!(
            "the builder of its kind, '{}', does not say that it can build a guest that reaches nobody; its author gives it Builder::can_isolate",
            embedded.kind.escape_default()
        )]),
    }
}
