//! What this site does for a runbook: see [`Perform`] for what each method
//! keeps to. A run is conducted at the target; the source is asked over the link.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use farhaven_policies::runbook::{Action, Mode, PointChoice, Readiness};

use super::facts::{FactsFile, now_ms};
use super::targets::{Target, targets};
use super::{health, outside, planned, readiness, trial};
use crate::runbook::perform::{
    Called, Checked, Ended, Executed, Failure, Fenced, Guests, Perform, Probe, Promoted, Removed,
    Reprotected, Scope, Synced,
};
use crate::site::Site;

/// A site that is no more connected is asked again after so long at the earliest.
const SOURCE_BACK: Duration = Duration::from_secs(1);

/// One run at this site.
#[derive(Clone)]
pub(super) struct AtSite {
    pub(super) site: Weak<Site>,
    pub(super) run: String,
    /// When it was started, milliseconds since 1970.
    pub(super) declared: u64,
    pub(super) facts: Arc<FactsFile>,
    /// Cleared when it has ended: what is under way in the background begins nothing more.
    pub(super) live: Arc<AtomicBool>,
}

impl AtSite {
    pub(super) fn site(&self) -> Ended<Arc<Site>> {
        self.site
            .upgrade()
            .ok_or_else(|| Failure::fault("the daemon is stopping; it goes on when it is started"))
    }

    pub(super) fn targets(&self, scope: &Scope) -> Ended<Vec<Target>> {
        targets(&self.site()?, scope)
    }

    /// Nothing more is begun for a run that has ended.
    pub(super) fn goes_on(&self) -> Ended<()> {
        match self.live.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(Failure::fault("the run has ended meanwhile")),
        }
    }

    /// Changes what is known of a guest; durable when it returns.
    pub(super) async fn note(
        &self,
        guest: &str,
        change: impl FnOnce(&mut super::facts::GuestFacts) + Send + 'static,
    ) -> Ended<()> {
        let (facts, guest) = (self.facts.clone(), guest.to_owned());
        let noted = tokio::task::spawn_blocking(move || facts.note(&guest, change)).await;
        noted.map_err(|e| Failure::fault(e.to_string()))?
    }

    /// Does something to its end even if who waits for it does not: half a
    /// step would leave machines that nobody knows of.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = Ended<T>> + Send + 'static,
    ) -> Ended<T> {
        let ended = tokio::spawn(work).await;
        ended.unwrap_or_else(|e| Err(Failure::fault(format!("it ended early: {e}; see the log"))))
    }

    /// The term of each guest is this site's, and durable, before anything else.
    async fn take_terms(self, scope: Scope) -> Ended<Fenced> {
        let site = self.site()?;
        let targets = self.targets(&scope)?;
        for target in &targets {
            self.goes_on()?;
            let known = self.facts.of(&target.name).term;
            if known.is_some() && known == site.fence.current(target.standby.guest) {
                continue;
            }
            let term = target.standby.take_term().await.map_err(fault)?;
            let group = target.group.clone();
            self.note(&target.name, move |guest| {
                guest.term = Some(term);
                guest.group = group;
            })
            .await?;
        }
        let (mut number, mut confirmed) = (0, true);
        for target in &targets {
            let Some(term) = self.facts.of(&target.name).term else {
                continue;
            };
            number = number.max(term.number);
            let told = site.announce_term(target.standby.remote(), term).await;
            let stopped = told.map_err(|why| {
                Failure::fault(format!(
                    "site '{}' lives and did not say that it stopped '{}' ({why}). It is not run here while it may run there: stop it there, or cut that site off, and repeat this",
                    target.standby.from(),
                    target.name
                ))
            })?;
            confirmed &= stopped;
            self.note(&target.name, move |guest| guest.source_stopped = stopped)
                .await?;
        }
        Ok(Fenced {
            term: number,
            confirmed,
        })
    }

    async fn make_ready(self, scope: Scope, point: PointChoice) -> Ended<Promoted> {
        let networks = self.facts.now().networks;
        let mut promoted = Promoted {
            point: 0,
            rpo_ms: 0,
        };
        for target in self.targets(&scope)? {
            self.goes_on()?;
            let known = self.facts.of(&target.name);
            let point = match (known.point, point) {
                (Some(point), _) if known.held => point,
                (_, PointChoice::Number(number)) => number,
                (Some(point), PointChoice::Newest) => point,
                (None, PointChoice::Newest) => target.newest()?,
            };
            let rpo_ms = self.keep_point(&target, point).await?;
            let number = match known.term {
                Some(term) => term.number,
                None => target.standby.next_term(known.held).map_err(fault)?,
            };
            target
                .standby
                .make_ready(point, number, &networks, false)
                .await
                .map_err(fault)?;
            promoted.point = promoted.point.max(point);
            promoted.rpo_ms = promoted.rpo_ms.max(rpo_ms);
        }
        Ok(promoted)
    }

    /// Which point a guest runs from, written down; what is lost by it.
    pub(super) async fn keep_point(&self, target: &Target, point: u64) -> Ended<u64> {
        let header = target
            .standby
            .points()
            .into_iter()
            .find(|p| p.point == point);
        let Some(header) = header else {
            return Err(Failure::clean(format!(
                "there is no point {point} of '{}' here; see farhaven points {0}",
                target.name
            )));
        };
        let cut_at = header.cut_at_unix_ns / 1_000_000;
        let group = target.group.clone();
        let lost = self.declared.saturating_sub(cut_at);
        self.note(&target.name, move |guest| {
            // Of a guest that was held, nothing is lost.
            let rpo = if guest.held { 0 } else { lost };
            guest.point = Some(point);
            guest.cut_at = Some(cut_at);
            guest.rpo_ms = Some(rpo);
            guest.group = group;
        })
        .await?;
        Ok(self.facts.of(&target.name).rpo_ms.unwrap_or(lost))
    }

    async fn start(self, scope: Scope) -> Ended<Guests> {
        let targets = self.targets(&scope)?;
        let waves = targets.iter().map(|t| t.wave).max().unwrap_or(0);
        for wave in 0..=waves {
            let of_wave: Vec<&Target> = targets.iter().filter(|t| t.wave == wave).collect();
            for target in &of_wave {
                self.goes_on()?;
                self.start_one(target).await?;
            }
            if wave < waves {
                health::await_wave(&self, &of_wave).await?;
            }
        }
        Ok(named(&targets))
    }

    pub(super) async fn start_one(&self, target: &Target) -> Ended<()> {
        let known = self.facts.of(&target.name);
        let (Some(point), Some(term)) = (known.point, known.term) else {
            return Err(Failure::clean(format!(
                "'{}' has no point or no term in this run: a promote, and a fence or final-sync, come before its start",
                target.name
            )));
        };
        let times = target.standby.run_staged(point, term, known.held).await;
        let times = times.map_err(fault)?;
        self.note(&target.name, move |guest| {
            guest.started_at.get_or_insert_with(now_ms);
            guest.start_ms = Some(times.total.as_secs_f64() * 1e3);
        })
        .await
    }

    async fn drop_started(self, scope: Scope) -> Ended<()> {
        for target in self.targets(&scope)?.iter().rev() {
            if let Some(term) = self.facts.of(&target.name).term {
                target.standby.end_staged(term).await.map_err(fault)?;
                self.note(&target.name, |guest| guest.started_at = None)
                    .await?;
            }
        }
        Ok(())
    }

    async fn map_networks(self, scope: Scope, wanted: BTreeMap<String, String>) -> Ended<()> {
        let site = self.site()?;
        let own = site.config.site.name.clone();
        for target in self.targets(&scope)? {
            let mut networks = readiness::networks_of(&target, &own);
            networks.extend(
                wanted
                    .iter()
                    .map(|(k, v)| (k.clone(), readiness::netdev(v))),
            );
            if networks.is_empty() || self.facts.of(&target.name).started_at.is_some() {
                continue;
            }
            let known = self.facts.of(&target.name);
            let (Some(point), Some(term)) = (known.point, known.term) else {
                return Err(Failure::clean(format!(
                    "'{}' was not promoted in this run yet",
                    target.name
                )));
            };
            let facts = self.facts.clone();
            let kept = networks.clone();
            let kept = tokio::task::spawn_blocking(move || {
                facts.change(|facts| facts.networks.extend(kept))
            });
            kept.await.map_err(|e| Failure::fault(e.to_string()))??;
            target
                .standby
                .make_ready(point, term.number, &networks, true)
                .await
                .map_err(fault)?;
        }
        Ok(())
    }
}

pub(super) fn fault(error: impl ToString) -> Failure {
    Failure::fault(error.to_string())
}

pub(super) fn named(targets: &[Target]) -> Guests {
    Guests {
        guests: targets.iter().map(|t| t.name.clone()).collect(),
    }
}

/// What this version cannot do says so, and changes nothing.
fn not_here(what: &str) -> Failure {
    Failure::clean(what.to_owned())
}

impl Perform for AtSite {
    async fn check(&self, scope: &Scope, checks: &[Readiness]) -> Ended<Checked> {
        readiness::check(self, scope, checks).await
    }

    async fn quiesce(&self, _: &Scope) -> Ended<Guests> {
        Err(not_here(
            "guest agents are not asked by this version: points are crash-consistent; take the quiesce step out of the runbook, or take it as done",
        ))
    }

    async fn shutdown_source(&self, _: &Scope) -> Ended<Guests> {
        Err(not_here(
            "guests are moved running by this version, and not shut down before; take the shutdown-source step out of the runbook, or take it as done",
        ))
    }

    async fn final_sync(&self, scope: &Scope) -> Ended<Synced> {
        planned::final_sync(self, scope).await
    }

    async fn fence(&self, scope: &Scope) -> Ended<Fenced> {
        self.whole(self.clone().take_terms(scope.clone())).await
    }

    async fn promote(&self, scope: &Scope, point: PointChoice) -> Ended<Promoted> {
        match scope.mode {
            Mode::Test => {
                self.whole(trial::promote(self.clone(), scope.clone(), point))
                    .await
            }
            _ => {
                self.whole(self.clone().make_ready(scope.clone(), point))
                    .await
            }
        }
    }

    async fn remap(&self, scope: &Scope, networks: &BTreeMap<String, String>) -> Ended<()> {
        match scope.mode {
            // It is on none, whatever the runbook says.
            Mode::Test => Ok(()),
            _ => {
                let mapped = self.clone().map_networks(scope.clone(), networks.clone());
                self.whole(mapped).await
            }
        }
    }

    async fn start_group(&self, scope: &Scope) -> Ended<Guests> {
        match scope.mode {
            Mode::Test => self.whole(trial::start(self.clone(), scope.clone())).await,
            _ => self.whole(self.clone().start(scope.clone())).await,
        }
    }

    async fn is_healthy(&self, scope: &Scope, probe: &Probe) -> Ended<Guests> {
        health::look(self, scope, probe).await
    }

    async fn exec(&self, scope: &Scope, run: &[String]) -> Ended<Executed> {
        outside::exec(scope, run).await
    }

    async fn webhook(
        &self,
        scope: &Scope,
        url: &str,
        method: &'static str,
        body: &str,
    ) -> Ended<Called> {
        outside::webhook(scope, url, method, body).await
    }

    async fn commit(&self, _: &Scope) -> Ended<()> {
        Err(not_here(
            "this version does not know uncommitted groups: after a failover or move they stay here; take this step as done",
        ))
    }

    async fn rollback(&self, _: &Scope) -> Ended<Guests> {
        Err(not_here(
            "this version rolls back only while the run goes on: farhaven run abort RUN --rollback",
        ))
    }

    async fn reprotect(&self, _: &Scope) -> Ended<Reprotected> {
        Err(not_here(
            "this version does not protect the groups the other way round; take this step as done",
        ))
    }

    async fn cleanup(&self, scope: &Scope) -> Ended<Removed> {
        self.whole(trial::cleanup(self.clone(), scope.clone()))
            .await
    }

    async fn undo(&self, scope: &Scope, action: &Action) -> Ended<()> {
        let (run, scope) = (self.clone(), scope.clone());
        match (action, scope.mode) {
            (Action::Promote { .. } | Action::StartGroup, Mode::Test) => {
                self.whole(trial::cleanup(run, scope)).await.map(|_| ())
            }
            (Action::StartGroup, _) => self.whole(run.drop_started(scope)).await,
            (Action::Promote { .. }, _) => {
                for target in self.targets(&scope)? {
                    target.standby.unready().await;
                }
                Ok(())
            }
            (Action::Fence, _) => planned::give_back(self, &scope).await,
            (Action::FinalSync, _) => planned::let_go_on(self, &scope).await,
            // Nothing of it is left, or it was never done.
            _ => Ok(()),
        }
    }

    async fn source_back(&self) {
        tokio::time::sleep(SOURCE_BACK).await;
        let Some(site) = self.site.upgrade() else {
            return std::future::pending().await;
        };
        let names: Vec<String> = self.facts.now().guests.into_keys().collect();
        let standbys: Vec<_> = names.iter().filter_map(|n| site.standby_named(n)).collect();
        // Not kept alive by who waits.
        drop(site);
        for standby in standbys {
            standby.remote().reachable().await;
        }
    }
}
