//! A run is conducted: begun anew, or gone on with after a restart; and what
//! follows from its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use farhaven_policies::runbook::plan::Plan;
use farhaven_policies::runbook::run::{Forward, Outcome, Run};
use farhaven_policies::runbook::{Kind, Mode};

use super::Open;
use super::facts::FactsFile;
use super::perform::AtSite;
use super::stage::Expecting;
use super::targets::{Target, of_group};
use super::{planned, trial};
use crate::replicate::message::{Message, RunMessage};
use crate::runbook::conduct::{Baton, Conductor, Process};
use crate::runbook::record::AuditLog;
use crate::site::Site;
use crate::site::operate::{OperateError, failed};

/// What an ended run could not let go of is tried again so often.
const LET_GO_AGAIN: Duration = Duration::from_secs(5);

type Conducts = Conductor<AtSite, Process>;

impl Site {
    /// Begins to conduct a new run. Its start is durable when this returns.
    pub(super) fn conduct_new(
        self: &Arc<Self>,
        id: &str,
        plan: Plan,
        by: &str,
        facts: FactsFile,
        guests: Vec<String>,
    ) -> Result<Baton, OperateError> {
        let perform = self.performer(id, super::facts::now_ms(), &Arc::new(facts));
        let directory = self.runs.directory().to_owned();
        // Held over the check and the start: a guest is in one run.
        let mut open = self.runs.lock();
        for guest in &guests {
            if let Some((other, _)) = open.iter().find(|(_, run)| run.guests.contains(guest)) {
                return Err(OperateError::Conflict(format!(
                    "run '{other}' has '{guest}'; end it first: farhaven run abort {other}"
                )));
            }
        }
        let performer = Arc::new(perform.clone());
        let started = Conductor::start(&directory, id, plan, by, performer, Process);
        let (conductor, baton) = started.map_err(failed)?;
        let task = tokio::spawn(conducted(
            Arc::downgrade(self),
            id.to_owned(),
            conductor,
            None,
        ));
        open.insert(
            id.to_owned(),
            Open {
                baton: baton.clone(),
                perform,
                guests,
                task,
            },
        );
        Ok(baton)
    }

    fn performer(self: &Arc<Self>, id: &str, declared: u64, facts: &Arc<FactsFile>) -> AtSite {
        AtSite {
            site: Arc::downgrade(self),
            run: id.to_owned(),
            declared,
            facts: facts.clone(),
            live: Arc::new(AtomicBool::new(true)),
            hands: Arc::default(),
            begun: Arc::new(AtomicU64::new(0)),
            mine: 0,
        }
    }

    /// At start, before any peer is answered: what runs hold is held again, and
    /// those that have not ended go on.
    pub(in crate::site) async fn resume_runs(self: &Arc<Self>) {
        for id in self.runs.ids() {
            if let Err(error) = self.resume_run(&id).await {
                tracing::error!(run = id, %error, "a run cannot be gone on with");
            }
        }
    }

    async fn resume_run(self: &Arc<Self>, id: &str) -> Result<(), OperateError> {
        let path = self.runs.record(id);
        let facts = Arc::new(FactsFile::open(self.runs.directory(), id).map_err(failed)?);
        let known = facts.now();
        // Held before anything is read that could fail: a source must not be
        // told that its guest was given up while nobody knows how far a run came.
        for (name, guest) in known.guests.iter().filter(|(_, guest)| guest.held) {
            if let Some(standby) = self.standby_named(name) {
                standby.stage(guest.term).await;
            }
        }
        let records = AuditLog::read(&path).map_err(failed)?;
        let run = Run::resume(&records).map_err(failed)?;
        if run.outcome().is_some() {
            // Killed between its last line and what follows from it.
            self.let_all_go(&self.performer(id, 0, &facts)).await;
            return Ok(());
        }
        if known.quick {
            return super::quick::interrupted(&path).map_err(failed);
        }
        let perform = self.performer(id, run.started().0, &facts);
        let performer = Arc::new(perform.clone());
        let (conductor, baton) = Conductor::resume(&path, performer, Process).map_err(failed)?;
        tracing::warn!(run = id, "a run goes on where it was");
        let guests = run.plan().groups.values().flatten().cloned().collect();
        // Until what had started runs again, nobody is told that it does not run here.
        let started = known.guests.iter();
        let started = started.filter(|(_, g)| g.started_at.is_some() && g.committed_at.is_none());
        let standbys = started.filter_map(|(name, _)| self.standby_named(name));
        let expecting = standbys.map(|standby| standby.expect()).collect();
        // Held over both: its end looks for it there.
        let mut open = self.runs.lock();
        let task = tokio::spawn(conducted(
            Arc::downgrade(self),
            id.to_owned(),
            conductor,
            Some((run, perform.clone(), expecting)),
        ));
        open.insert(
            id.to_owned(),
            Open {
                baton,
                perform,
                guests,
                task,
            },
        );
        Ok(())
    }

    /// What a run that is over held is decided: its guests run here, or at their source.
    /// Those of which that cannot be written down are tried again, as long as this
    /// daemon lives.
    async fn let_all_go(self: &Arc<Self>, run: &AtSite) {
        if self.let_go_of(run).await {
            return;
        }
        let (site, run) = (Arc::downgrade(self), run.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LET_GO_AGAIN).await;
                let Some(site) = site.upgrade() else { return };
                if site.let_go_of(&run).await {
                    return;
                }
            }
        });
    }

    /// Is nothing held any more?
    async fn let_go_of(self: &Arc<Self>, run: &AtSite) -> bool {
        let mut all = true;
        let held = run.facts.now().guests.into_iter();
        for (name, known) in held.filter(|(_, known)| known.held) {
            if self.runs.of_guest(&name).is_some_and(|id| id != run.run) {
                // What holds it is another run by now.
                continue;
            }
            let targets = match of_group(self, &known.group, std::slice::from_ref(&name)) {
                Ok(targets) => targets,
                Err(error) => {
                    // Forgotten here since: there is nobody to hold it for.
                    tracing::error!(run = run.run, guest = name, %error, "its source still waits");
                    continue;
                }
            };
            for target in targets {
                if let Err(error) = planned::release(run, &target).await {
                    tracing::error!(run = run.run, guest = name, %error, "its source still waits");
                    all = false;
                    continue;
                }
                let (remote, guest) = (target.standby.remote().clone(), target.standby.guest);
                // It asks by itself, too.
                tokio::spawn(async move {
                    let released = Message::Run(RunMessage::Release { guest });
                    let _ = remote.ask(released).await;
                });
            }
        }
        all
    }

    /// A run is over. Its guests are free for others when this returns.
    async fn run_ended(self: &Arc<Self>, id: &str, outcome: Outcome) {
        let ended = {
            let open = self.runs.lock();
            open.get(id)
                .map(|open| (open.perform.clone(), open.baton.run()))
        };
        let Some((perform, run)) = ended else { return };
        perform.live.store(false, Ordering::SeqCst);
        // What an aborted step still does comes to its end.
        let hands = perform.hands.clone().lock_owned().await;
        if run.mode() == Mode::Test && outcome == Outcome::Succeeded {
            for guest in perform.facts.now().guests.keys() {
                if let Some(standby) = self.standby_named(guest) {
                    self.note_tested(standby.guest);
                }
            }
        }
        self.let_all_go(&perform).await;
        drop(hands);
        self.runs.lock().remove(id);
        tracing::warn!(run = id, %outcome, "a run is over");
    }
}

async fn conducted(
    site: std::sync::Weak<Site>,
    id: String,
    conductor: Conducts,
    resumed: Option<(Run, AtSite, Vec<Expecting>)>,
) {
    if let (Some((run, perform, expecting)), Some(site)) = (resumed, site.upgrade()) {
        run_again(&site, &run, &perform).await;
        drop(expecting);
    }
    match conductor.conduct().await {
        Ok(outcome) => {
            if let Some(site) = site.upgrade() {
                site.run_ended(&id, outcome).await;
            }
        }
        Err(error) => {
            // Nothing more is done; what it holds stays held.
            tracing::error!(run = id, %error, "a run is not conducted any further");
            if let Some(site) = site.upgrade() {
                site.runs.lock().remove(&id);
            }
        }
    }
}

/// Guests inside of the daemon, and tests, ended with the daemon before. What
/// this run had started runs again, from the same point, before it goes on.
async fn run_again(site: &Arc<Site>, run: &Run, perform: &AtSite) {
    if run.goes_back() {
        return;
    }
    let of_kind = |kind: Kind, state: fn(Forward) -> bool| {
        let mut steps = run.steps().into_iter();
        steps.any(|step| step.kind == kind && state(step.forward))
    };
    let started = of_kind(Kind::StartGroup, |state| state == Forward::Done);
    let cleaned = of_kind(Kind::Cleanup, |state| {
        !matches!(state, Forward::Ahead | Forward::Skipped)
    });
    if !started || cleaned {
        return;
    }
    for (name, known) in perform.facts.now().guests {
        if known.started_at.is_none() {
            continue;
        }
        let targets = of_group(site, &known.group, std::slice::from_ref(&name));
        for target in targets.unwrap_or_default() {
            let ran = match run.mode() {
                Mode::Test => trial::start_one(perform, &target).await,
                _ if inside(&target) => perform.start_one(&target).await,
                _ => Ok(()),
            };
            if let Err(error) = ran {
                tracing::error!(run = perform.run, guest = name, %error, "it ended with the daemon and does not run again");
            }
        }
    }
}

/// It runs inside of a daemon, ended with the one before, and nobody ended it.
fn inside(target: &Target) -> bool {
    target.standby.opening().definition.is_embedded() && target.standby.active().is_none()
}
