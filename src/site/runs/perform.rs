//! What this site does for a runbook: see [`Perform`] for what each method
//! keeps to. A run is conducted at the target; the source is asked over the link.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use farhaven_policies::runbook::{Action, Mode, PointChoice, Readiness};

use super::facts::FactsFile;
use super::targets::{Target, targets};
use super::{health, outside, planned, quiesce, readiness, shutdown, stays, sync, trial};
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
    /// Who changes something for this run: one at a time.
    pub(super) hands: Arc<tokio::sync::Mutex<()>>,
    /// How many steps and undoings were begun, and which of them this is.
    pub(super) begun: Arc<AtomicU64>,
    pub(super) mine: u64,
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

    /// A step or an undoing is begun: what was begun before does nothing more.
    pub(super) fn begin(&self) -> AtSite {
        let mine = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        AtSite {
            mine,
            ..self.clone()
        }
    }

    /// Nothing more is begun for a run that has ended, nor by a step whose time
    /// was over, or that was aborted.
    pub(super) fn goes_on(&self) -> Ended<()> {
        let overtaken = self.mine != 0 && self.mine != self.begun.load(Ordering::SeqCst);
        match self.live.load(Ordering::SeqCst) && !overtaken {
            true => Ok(()),
            false => Err(Failure::fault("this step was ended meanwhile")),
        }
    }

    /// Changes what is known of a guest; durable when it returns.
    pub(super) async fn note(
        &self,
        guest: &str,
        change: impl FnOnce(&mut super::facts::GuestFacts) + Send + 'static,
    ) -> Ended<()> {
        let (facts, guest) = (self.facts.clone(), guest.to_owned());
        let noted = crate::work::spawn_blocking(move || facts.note(&guest, change)).await;
        noted.map_err(|e| Failure::fault(e.to_string()))?
    }

    /// Keeps what was seen, for the report.
    pub(super) async fn saw(&self, seen: super::facts::Seen) -> Ended<()> {
        let facts = self.facts.clone();
        let kept = crate::work::spawn_blocking(move || facts.saw(seen)).await;
        kept.map_err(|e| Failure::fault(e.to_string()))?
    }

    /// Does something to its end even if who waits for it does not: half a
    /// step would leave machines that nobody knows of. Whatever was begun before
    /// has come to its end by then.
    pub(super) async fn whole<T, W>(
        &self,
        work: impl FnOnce(AtSite) -> W + Send + 'static,
    ) -> Ended<T>
    where
        T: Send + 'static,
        W: Future<Output = Ended<T>> + Send + 'static,
    {
        let run = self.clone();
        let ended = tokio::spawn(async move {
            let hands = run.hands.clone();
            let _alone = hands.lock().await;
            run.goes_on()?;
            work(run).await
        });
        ended
            .await
            .unwrap_or_else(|e| Err(Failure::fault(format!("it ended early: {e}; see the log"))))
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

impl Perform for AtSite {
    async fn check(&self, scope: &Scope, checks: &[Readiness]) -> Ended<Checked> {
        readiness::check(self, scope, checks).await
    }

    async fn quiesce(&self, scope: &Scope) -> Ended<Guests> {
        quiesce::quiesce(&self.begin(), scope).await
    }

    async fn shutdown_source(&self, scope: &Scope) -> Ended<Guests> {
        shutdown::shut_down(&self.begin(), scope).await
    }

    async fn final_sync(&self, scope: &Scope) -> Ended<Synced> {
        sync::final_sync(&self.begin(), scope).await
    }

    async fn fence(&self, scope: &Scope) -> Ended<Fenced> {
        let scope = scope.clone();
        self.begin().whole(|run| run.take_terms(scope)).await
    }

    async fn promote(&self, scope: &Scope, point: PointChoice) -> Ended<Promoted> {
        let (run, scope) = (self.begin(), scope.clone());
        match scope.mode {
            Mode::Test => {
                run.whole(move |run| trial::promote(run, scope, point))
                    .await
            }
            _ => run.whole(move |run| run.make_ready(scope, point)).await,
        }
    }

    async fn remap(&self, scope: &Scope, networks: &BTreeMap<String, String>) -> Ended<()> {
        let (scope, networks) = (scope.clone(), networks.clone());
        match scope.mode {
            // It is on none, whatever the runbook says.
            Mode::Test => Ok(()),
            _ => {
                let run = self.begin();
                run.whole(move |run| run.map_networks(scope, networks))
                    .await
            }
        }
    }

    async fn start_group(&self, scope: &Scope) -> Ended<Guests> {
        let (run, scope) = (self.begin(), scope.clone());
        match scope.mode {
            Mode::Test => run.whole(move |run| trial::start(run, scope)).await,
            _ => run.whole(move |run| run.start(scope)).await,
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

    async fn commit(&self, scope: &Scope) -> Ended<()> {
        let scope = scope.clone();
        self.begin().whole(|run| stays::commit(run, scope)).await
    }

    async fn rollback(&self, scope: &Scope) -> Ended<Guests> {
        let scope = scope.clone();
        self.begin()
            .whole(|run| planned::roll_back(run, scope))
            .await
    }

    async fn reprotect(&self, scope: &Scope) -> Ended<Reprotected> {
        let scope = scope.clone();
        self.begin().whole(|run| stays::reprotect(run, scope)).await
    }

    async fn cleanup(&self, scope: &Scope) -> Ended<Removed> {
        let scope = scope.clone();
        self.begin().whole(|run| trial::cleanup(run, scope)).await
    }

    async fn undo(&self, scope: &Scope, action: &Action) -> Ended<()> {
        let (run, scope) = (self.begin(), scope.clone());
        match (action, scope.mode) {
            (Action::Promote { .. } | Action::StartGroup, Mode::Test) => {
                let cleaned = run.whole(|run| trial::cleanup(run, scope)).await;
                cleaned.map(|_| ())
            }
            (Action::StartGroup, _) => run.whole(|run| planned::take_back(run, scope)).await,
            (Action::Promote { .. }, _) => run.whole(|run| run.unready(scope)).await,
            (Action::Fence, _) => run.whole(|run| planned::give_back(run, scope)).await,
            (Action::ShutdownSource, _) => run.whole(|run| shutdown::start_again(run, scope)).await,
            (Action::Quiesce, Mode::Planned) => quiesce::forget(&run, &scope).await,
            (Action::FinalSync, _) => run.whole(|run| planned::let_go_on(run, scope)).await,
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
