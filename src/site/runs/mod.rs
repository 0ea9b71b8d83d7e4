//! Runs of runbooks at this site, the target: started, conducted, spoken to,
//! shown, and gone on with after a restart.
//!
//! Of each run there are, under `{state}/runs`: the runbook as it was given
//! (`{id}.toml`), the audit record that is the run (`{id}.jsonl`), what it
//! learned ([`facts`], `{id}.facts`) and pictures of screens. All of it is at
//! this site: a run needs nothing from the other one but its guests' last changes.

pub mod api;
pub mod facts;
pub mod hold;
pub(in crate::site) mod power;
pub mod view;

mod activate;
mod health;
mod open;
mod outside;
mod perform;
mod pictures;
mod planned;
mod points;
mod quick;
mod quiesce;
mod readiness;
mod reports;
mod shutdown;
pub(in crate::site) mod stage;
pub mod start;
mod stays;
mod sync;
mod targets;
mod trial;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use farhaven_policies::runbook::run::{Event, Moment, Next, Run};
use farhaven_storage_sync::unit::GuestId;
use tokio::task::JoinHandle;

use self::facts::now_ms;
use self::perform::AtSite;
use self::view::{Hands, RunView, run_view};
use super::operate::{OperateError, failed};
use super::{Site, SiteError};
use crate::runbook::conduct::{Baton, TellError};
use crate::runbook::record::{AuditLog, RecordError};

/// Most runs that are conducted at a time.
const MOST_OPEN: usize = 64;
/// Most runs that a listing shows, the newest.
pub const MOST_LISTED: usize = 200;

/// A run that was ended is over within this time, or goes on ending.
const FREED: Duration = Duration::from_secs(30);

/// The runs of a site.
pub struct Runs {
    directory: PathBuf,
    open: Mutex<BTreeMap<String, Open>>,
    /// Tests without a runbook, which go on until somebody ends them, by guest.
    tests: Mutex<BTreeMap<String, quick::Quick>>,
}

/// A run that is conducted.
struct Open {
    baton: Baton,
    perform: AtSite,
    /// The guests that it is about.
    guests: Vec<String>,
    task: JoinHandle<()>,
}

impl Runs {
    /// Those kept in a directory; none is conducted yet.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub(super) fn open(directory: PathBuf) -> Result<Self, SiteError> {
        super::files::private_directory(&directory).map_err(|source| SiteError::Directory {
            path: directory.clone(),
            key: "site.state_dir",
            source,
        })?;
        Ok(Self {
            directory,
            open: Mutex::default(),
            tests: Mutex::default(),
        })
    }

    /// Where they are kept.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tests(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, quick::Quick>> {
        self.tests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.jsonl"))
    }

    /// The ids of all runs, oldest first.
    fn ids(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten();
        let mut ids: Vec<String> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                Some(name.strip_suffix(".jsonl")?.to_owned())
            })
            .collect();
        ids.sort();
        ids
    }

    /// The run that has a guest, if one is conducted.
    pub(super) fn of_guest(&self, guest: &str) -> Option<String> {
        let open = self.lock();
        let mut open = open.iter();
        let has = open.find(|(_, run)| run.guests.iter().any(|name| name == guest));
        has.map(|(id, _)| id.clone())
    }

    /// Who goes on with a run.
    fn hands(&self, id: &str) -> Hands {
        if self.lock().contains_key(id) {
            return Hands::Conducted;
        }
        let tests = self.tests();
        let test = tests.iter().find(|(_, quick)| quick.run.id() == id);
        test.map_or(Hands::None, |(name, _)| Hands::Test(name.clone()))
    }

    /// The point that a run here goes on from with this guest: it must stay.
    pub(super) fn point_of(&self, guest: &str) -> Option<u64> {
        let open = self.lock();
        let mut of = open
            .values()
            .filter(|run| run.guests.iter().any(|name| name == guest));
        of.find_map(|run| run.perform.facts.of(guest).point)
    }

    /// The daemon stops: what is conducted is left as it is, for the next one.
    pub(super) async fn stop(&self) {
        let open = std::mem::take(&mut *self.lock());
        for (_, run) in open {
            run.perform.live.store(false, Ordering::SeqCst);
            run.task.abort();
            let _ = run.task.await;
        }
    }
}

impl Site {
    /// Nothing else may be done to a guest that a run has, or to a group with one.
    ///
    /// # Errors
    /// When one has it.
    pub(super) fn not_in_a_run(&self, name: &str) -> Result<(), OperateError> {
        let members = self.members_of(name).unwrap_or_default();
        let names = members.into_iter().map(|member| member.name);
        for guest in names.chain([name.to_owned()]) {
            if let Some(id) = self.runs.of_guest(&guest) {
                return Err(OperateError::Conflict(format!(
                    "run '{id}' has '{guest}'; see farhaven run show {id}, and end it first: farhaven run abort {id}"
                )));
            }
        }
        Ok(())
    }

    /// A run, with all of its steps.
    ///
    /// # Errors
    /// When there is none, or its record cannot be read.
    pub fn run(&self, id: &str) -> Result<RunView, OperateError> {
        let run = self.run_of(id)?;
        let mut view = run_view(&run, &self.runs.hands(id));
        // Over when its guests are free for others.
        if view.conducted && view.outcome.take().is_some() {
            "is ending".clone_into(&mut view.standing);
        }
        Ok(view)
    }

    /// All runs that are kept here, the newest first.
    pub fn runs(&self) -> Vec<RunView> {
        let newest = self.runs.ids().into_iter().rev().take(MOST_LISTED);
        let each = newest.map(|id| match self.run(&id) {
            Ok(view) => view,
            Err(error) => RunView::broken(&id, error.to_string()),
        });
        each.collect()
    }

    /// A run as it stands.
    fn run_of(&self, id: &str) -> Result<Run, OperateError> {
        if let Some(open) = self.runs.lock().get(id) {
            return Ok(open.baton.run());
        }
        Run::resume(&self.records_of(id)?).map_err(failed)
    }

    pub(super) fn records_of(
        &self,
        id: &str,
    ) -> Result<Vec<farhaven_policies::runbook::run::Record>, OperateError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        let unknown =
            || OperateError::Unknown(format!("no run '{id}' here; see farhaven run list"));
        if id.is_empty() || !id.bytes().all(plain) {
            return Err(unknown());
        }
        match AuditLog::read(&self.runs.record(id)) {
            Err(RecordError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Err(unknown())
            }
            read => read.map_err(failed),
        }
    }

    /// Says something to a run in a person's name. An approval or refusal names
    /// its step: whoever read about one does not decide another.
    ///
    /// # Errors
    /// When it cannot be said now.
    pub async fn tell_run(
        &self,
        id: &str,
        by: &str,
        step: Option<&str>,
        event: Event,
    ) -> Result<RunView, OperateError> {
        let baton = {
            let open = self.runs.lock();
            open.get(id).map(|open| open.baton.clone())
        };
        let Some(baton) = baton else {
            let outcome = self.run_of(id)?.outcome();
            return Err(OperateError::Conflict(
                match (outcome, self.runs.hands(id)) {
                    (Some(outcome), _) => format!("run '{id}' is over: it {outcome}"),
                    (None, Hands::Test(name)) => format!(
                        "run '{id}' is a test without a runbook: it runs until it is ended, by farhaven test cleanup {name}"
                    ),
                    (None, _) => format!(
                        "run '{id}' is not conducted: its record could not be kept or read. See the log, and restart the daemon to go on with it"
                    ),
                },
            ));
        };
        if let Some(step) = step {
            let next = baton.run().next(Moment(now_ms()));
            let Next::AwaitApproval { step: awaited, .. } = next else {
                return Err(OperateError::Conflict(format!(
                    "run '{id}' awaits no approval now; see farhaven run show {id}"
                )));
            };
            if awaited != step {
                return Err(OperateError::Conflict(format!(
                    "run '{id}' awaits the approval of '{awaited}', not of '{step}'"
                )));
            }
        }
        baton.tell(by, event).await.map_err(|error| match error {
            TellError::Refused(_) | TellError::Over => OperateError::Conflict(error.to_string()),
            TellError::Busy => OperateError::Failed(error.to_string()),
        })?;
        self.until_free(id, &baton).await;
        self.run(id)
    }

    /// Waits until the guests of a run that has come to its end are free.
    async fn until_free(&self, id: &str, baton: &Baton) {
        let ends = |run: &Run| {
            let next = run.next(Moment(now_ms()));
            matches!(next, Next::Over(_) | Next::Record(Event::Ended { .. }))
        };
        let deadline = tokio::time::Instant::now() + FREED;
        while ends(&baton.run())
            && self.runs.lock().contains_key(id)
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// When this guest of a peer was last tested well, milliseconds since 1970.
    pub(super) fn tested_at(&self, guest: GuestId) -> Option<u64> {
        let at = self.alerts.tested_at(guest)?;
        Some(super::unix_ns(at) / 1_000_000)
    }

    /// When a group or guest was last tested here, and all went well: of a group,
    /// when its last guest to be tested was.
    pub fn last_good_test(&self, name: &str) -> Option<SystemTime> {
        let members = self.members_of(name).ok()?;
        let ages = members.iter().map(|member| self.last_tested(member.guest));
        let oldest = ages.collect::<Option<Vec<_>>>()?.into_iter().max()?;
        SystemTime::now().checked_sub(oldest)
    }
}
