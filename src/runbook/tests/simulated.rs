//! Two sites in memory that runbooks are conducted at, with faults at any step.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use farhaven_policies::runbook::run::Moment;
use farhaven_policies::runbook::{Action, Mode, PointChoice, Readiness};
use tokio::sync::Notify;

use crate::runbook::conduct::Host;
use crate::runbook::perform::*;

/// Time that passes only when everybody waits for it.
#[derive(Clone, Default)]
pub(super) struct Virtual(Arc<Mutex<Timers>>);

#[derive(Default)]
struct Timers {
    millis: u64,
    waiting: Vec<(u64, Waker)>,
}

impl Virtual {
    fn millis(&self) -> u64 {
        self.0.lock().unwrap().millis
    }

    async fn sleep_until(&self, end: u64) {
        std::future::poll_fn(|context| {
            let mut timers = self.0.lock().unwrap();
            if timers.millis >= end {
                return Poll::Ready(());
            }
            timers.waiting.push((end, context.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// Runs to the end; when nothing can go on, it is the time of the next timer.
    pub(super) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        struct Woken(AtomicBool);
        impl Wake for Woken {
            fn wake(self: Arc<Self>) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        let waker = Waker::from(woken.clone());
        let mut future = pin!(future);
        loop {
            while woken.0.swap(false, Ordering::SeqCst) {
                if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return done;
                }
            }
            let mut timers = self.0.lock().unwrap();
            let next = timers.waiting.iter().map(|(end, _)| *end).min();
            timers.millis = next.expect("everybody waits, and nothing will happen");
            let now = timers.millis;
            let due = timers.waiting.extract_if(.., |(end, _)| *end <= now);
            due.for_each(|(_, waker)| waker.wake());
        }
    }
}

impl Host for Virtual {
    fn now(&self) -> Moment {
        Moment(1_790_000_000_000 + self.millis())
    }

    async fn sleep(&self, span: Duration) {
        self.sleep_until(self.millis() + span.as_millis() as u64)
            .await;
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        Ok(work())
    }
}

/// What goes wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing is done.
    Clean,
    /// It is done, and then said to have failed.
    Dirty,
    /// It is done, and never said.
    Hang,
    /// The source is lost before it, and back after so many seconds.
    Lost(u64),
    /// The source is lost for good.
    Gone,
    /// The daemon is killed before its effect, once.
    KilledBefore,
    /// The daemon is killed after its effect, once.
    KilledAfter,
}

/// What is true of both sites.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct World {
    pub(super) at_source: BTreeMap<String, &'static str>,
    pub(super) at_target: BTreeMap<String, &'static str>,
    pub(super) frozen: bool,
    pub(super) term: u64,
    pub(super) committed: bool,
    pub(super) reprotected: bool,
    pub(super) mapped: bool,
    /// Programs and calls that took effect: each key once.
    pub(super) outside: BTreeSet<String>,
}

pub(super) struct Sites {
    pub(super) world: Mutex<World>,
    /// By step, and whether it is its undoing.
    faults: Mutex<BTreeMap<(String, bool), Fault>>,
    /// When the source is back; None: it is there.
    lost_until: Mutex<Option<u64>>,
    time: Virtual,
    pub(super) killed: Notify,
}

impl Sites {
    pub(super) fn new(
        time: &Virtual,
        guests: &[&str],
        faults: &[(&str, bool, Fault)],
    ) -> Arc<Sites> {
        let runs = guests.iter().map(|guest| ((*guest).to_owned(), "running"));
        let faults = faults.iter();
        Arc::new(Sites {
            world: Mutex::new(World {
                at_source: runs.collect(),
                ..World::default()
            }),
            faults: Mutex::new(
                faults
                    .map(|(step, undo, fault)| (((*step).to_owned(), *undo), *fault))
                    .collect(),
            ),
            lost_until: Mutex::new(None),
            time: time.clone(),
            killed: Notify::new(),
        })
    }

    fn source(&self) -> Ended<()> {
        let lost = self.lost_until.lock().unwrap();
        match *lost {
            Some(until) if until > self.time.millis() => {
                Err(Failure::source_lost("the source does not answer"))
            }
            _ => Ok(()),
        }
    }

    async fn kill(&self) -> ! {
        self.killed.notify_one();
        std::future::pending().await
    }

    /// An effect with its fault around it.
    async fn act<T>(
        &self,
        scope: &Scope,
        undo: bool,
        needs_source: bool,
        effect: impl FnOnce(&mut World) -> T + Send,
    ) -> Ended<T> {
        self.time.sleep(Duration::from_millis(100)).await;
        let which = (scope.step.clone(), undo);
        let fault = self.faults.lock().unwrap().get(&which).copied();
        let once = || {
            self.faults.lock().unwrap().remove(&which);
        };
        match fault {
            Some(Fault::Clean) => return Err(Failure::clean("it cannot be")),
            Some(Fault::Lost(secs)) => {
                once();
                let until = self.time.millis() + secs * 1000;
                *self.lost_until.lock().unwrap() = Some(until);
            }
            Some(Fault::Gone) => {
                let until = u64::MAX;
                *self.lost_until.lock().unwrap() = Some(until);
            }
            Some(Fault::KilledBefore) => {
                once();
                self.kill().await;
            }
            _ => {}
        }
        if needs_source {
            self.source()?;
        }
        let done = {
            let mut world = self.world.lock().unwrap();
            let done = effect(&mut world);
            // The promise above all others, after every single effect.
            for (guest, state) in &world.at_target {
                let twice = *state == "running" && world.at_source.get(guest) == Some(&"running");
                assert!(!twice, "{guest} runs at both sites after {}", scope.step);
            }
            done
        };
        match fault {
            Some(Fault::Dirty) => Err(Failure::fault("it broke half way")),
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::KilledAfter) => {
                once();
                self.kill().await
            }
            _ => Ok(done),
        }
    }
}

fn guests(scope: &Scope) -> Vec<String> {
    scope.groups.values().flatten().cloned().collect()
}

/// The source's guests from one of these states to another.
fn turn(states: &mut BTreeMap<String, &'static str>, from: &[&str], to: &'static str) {
    for state in states.values_mut().filter(|state| from.contains(state)) {
        *state = to;
    }
}

impl Perform for Sites {
    async fn check(&self, scope: &Scope, _: &[Readiness]) -> Ended<Checked> {
        self.act(scope, false, false, |_| ()).await?;
        Ok(Checked {
            seen: vec![(Readiness::Point, "41".to_owned())],
        })
    }

    async fn quiesce(&self, scope: &Scope) -> Ended<Guests> {
        self.act(scope, false, true, |world| world.frozen = true)
            .await?;
        Ok(Guests {
            guests: guests(scope),
        })
    }

    async fn shutdown_source(&self, scope: &Scope) -> Ended<Guests> {
        self.act(scope, false, true, |world| {
            turn(&mut world.at_source, &["running"], "down")
        })
        .await?;
        Ok(Guests {
            guests: guests(scope),
        })
    }

    async fn final_sync(&self, scope: &Scope) -> Ended<Synced> {
        self.act(scope, false, true, |world| {
            world.frozen = false;
            turn(&mut world.at_source, &["running"], "held");
        })
        .await?;
        Ok(Synced {
            point: 42,
            bytes: 4096,
        })
    }

    async fn fence(&self, scope: &Scope) -> Ended<Fenced> {
        let confirmed = self.source().is_ok();
        let term = self
            .act(scope, false, false, |world| {
                // The same key, the same term.
                if world.outside.insert(scope.key.clone()) {
                    world.term += 1;
                }
                turn(&mut world.at_source, &["running", "held", "down"], "fenced");
                world.term
            })
            .await?;
        Ok(Fenced { term, confirmed })
    }

    async fn promote(&self, scope: &Scope, _: PointChoice) -> Ended<Promoted> {
        self.act(scope, false, false, |world| {
            for guest in guests(scope) {
                let state = world.at_target.entry(guest).or_insert("ready");
                assert!(matches!(*state, "ready"), "promoted again while {state}");
            }
        })
        .await?;
        Ok(Promoted {
            point: 42,
            rpo_ms: 900,
        })
    }

    async fn remap(&self, scope: &Scope, _: &BTreeMap<String, String>) -> Ended<()> {
        self.act(scope, false, false, |world| world.mapped = true)
            .await
    }

    async fn start_group(&self, scope: &Scope) -> Ended<Guests> {
        let runs = match scope.mode {
            // Nobody can talk to it: it is no second copy.
            Mode::Test => "isolated",
            _ => "running",
        };
        self.act(scope, false, false, |world| {
            for guest in guests(scope) {
                assert!(world.mapped, "{guest} would have no network");
                world.at_target.insert(guest, runs);
            }
        })
        .await?;
        Ok(Guests {
            guests: guests(scope),
        })
    }

    async fn is_healthy(&self, scope: &Scope, _: &Probe) -> Ended<Guests> {
        self.act(scope, false, false, |_| ()).await?;
        Ok(Guests {
            guests: guests(scope),
        })
    }

    async fn exec(&self, scope: &Scope, run: &[String]) -> Ended<Executed> {
        let undo = scope.key.contains("/undo");
        let effect = |world: &mut World| world.outside.insert(scope.key.clone());
        self.act(scope, undo, false, effect).await?;
        Ok(Executed {
            said: run.join(" "),
        })
    }

    async fn webhook(&self, scope: &Scope, _: &str, _: &'static str, _: &str) -> Ended<Called> {
        let undo = scope.key.contains("/undo");
        let effect = |world: &mut World| world.outside.insert(scope.key.clone());
        self.act(scope, undo, false, effect).await?;
        Ok(Called { status: 200 })
    }

    async fn commit(&self, scope: &Scope) -> Ended<()> {
        self.act(scope, false, false, |world| world.committed = true)
            .await
    }

    async fn rollback(&self, scope: &Scope) -> Ended<Guests> {
        self.act(scope, false, true, |world| {
            world.at_target.clear();
            turn(&mut world.at_source, &["held", "down", "fenced"], "running");
        })
        .await?;
        Ok(Guests {
            guests: guests(scope),
        })
    }

    async fn reprotect(&self, scope: &Scope) -> Ended<Reprotected> {
        self.act(scope, false, true, |world| world.reprotected = true)
            .await?;
        Ok(Reprotected { bytes: 4096 })
    }

    async fn cleanup(&self, scope: &Scope) -> Ended<Removed> {
        self.act(scope, false, false, |world| {
            world.at_target.clear();
            world.mapped = false;
        })
        .await?;
        Ok(Removed {
            removed: vec!["all of it".to_owned()],
        })
    }

    async fn undo(&self, scope: &Scope, action: &Action) -> Ended<()> {
        let needs_source = matches!(
            action,
            Action::Quiesce | Action::ShutdownSource | Action::FinalSync | Action::Fence
        );
        self.act(scope, true, needs_source, |world| match action {
            Action::Quiesce => world.frozen = false,
            Action::ShutdownSource => turn(&mut world.at_source, &["down"], "running"),
            Action::FinalSync => turn(&mut world.at_source, &["held"], "running"),
            Action::Fence => turn(&mut world.at_source, &["fenced"], "running"),
            Action::Promote { .. } => world.at_target.clear(),
            Action::Remap { .. } => world.mapped = false,
            Action::StartGroup => {
                for guest in guests(scope) {
                    world.at_target.insert(guest, "ready");
                }
            }
            _ => {}
        })
        .await
    }

    async fn source_back(&self) {
        let until = *self.lost_until.lock().unwrap();
        match until {
            Some(until) if until < u64::MAX => self.time.sleep_until(until).await,
            _ => std::future::pending().await,
        }
    }
}
