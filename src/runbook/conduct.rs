//! Conducts a run: asks it what is next, keeps the record, has it performed.
//!
//! One task for each run. What people say (approvals, pauses, answers) comes to
//! it through a [`Baton`] and is decided there, one after the other. Every
//! transition is durable before what follows from it is begun; a conductor that
//! is killed at any place is followed by another, from the record.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farhaven_policies::runbook::plan::Plan;
use farhaven_policies::runbook::run::{Attempt, Event, Moment, Next, Outcome, Refused, Run};
use farhaven_policies::runbook::{Action, Kind};
use tokio::sync::{mpsc, oneshot, watch};

use super::perform::{Ended, Failure, Perform, Probe, Scope};
use super::record::{AuditLog, RecordError};

/// People's words that may wait to be heard.
const MOST_WORDS: usize = 64;
/// A clock may be set while somebody sleeps by it.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Why a run is not conducted any further.
#[derive(Debug, thiserror::Error)]
pub enum ConductError {
    /// Its record cannot be kept or read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The record tells of something that cannot have happened.
    #[error(
        "the audit record makes no sense: {0}. Nobody goes on from it; see at both sites which one runs the group"
    )]
    Senseless(#[source] Refused),
    /// A plan that cannot be run.
    #[error("this cannot be run: {0}")]
    Plan(#[source] Refused),
    /// A thread that wrote the record died.
    #[error("the audit record could not be written: {0}; resume the run")]
    Writer(String),
}

/// Why a word was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// It cannot be now.
    #[error("that cannot be done now: {0}")]
    Refused(#[source] Refused),
    /// The run is not conducted any more.
    #[error("the run is over, or the daemon is stopping")]
    Over,
    /// Too many wait.
    #[error("too many requests of this run wait already; try again in a moment")]
    Busy,
}

/// What a conductor needs of the process that it is in.
pub trait Host: Clone + Send + Sync + 'static {
    /// What time it is.
    fn now(&self) -> Moment;

    /// Ends after so long.
    fn sleep(&self, span: Duration) -> impl Future<Output = ()> + Send;

    /// Does what blocks, away from what must not wait.
    ///
    /// # Errors
    /// Why it did not come to its end.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = Result<T, String>> + Send;
}

/// The daemon's process: the system's clock, tokio's timers and threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process;

impl Host for Process {
    fn now(&self) -> Moment {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Moment(since.map_or(0, |since| since.as_millis() as u64))
    }

    async fn sleep(&self, span: Duration) {
        tokio::time::sleep(span).await;
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let done = crate::work::spawn_blocking(work).await;
        done.map_err(|error| error.to_string())
    }
}

struct Word {
    by: String,
    event: Event,
    heard: oneshot::Sender<Result<(), Refused>>,
}

/// Speaks to a conductor, and sees how its run stands.
#[derive(Debug, Clone)]
pub struct Baton {
    words: mpsc::Sender<Word>,
    seen: watch::Receiver<Run>,
}

impl Baton {
    /// Says something in a person's name: an approval, a refusal, a pause, its
    /// end, an abort, an answer. It is durable when this returns.
    ///
    /// # Errors
    /// See [`TellError`].
    pub async fn tell(&self, by: &str, event: Event) -> Result<(), TellError> {
        if !event.needs_person() {
            let why = "people do not say that".to_owned();
            return Err(TellError::Refused(Refused::new(why)));
        }
        let (heard, answer) = oneshot::channel();
        let by = by.to_owned();
        match self.words.try_send(Word { by, event, heard }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(TellError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(TellError::Over),
        }
        let answer = answer.await.map_err(|_| TellError::Over)?;
        answer.map_err(TellError::Refused)
    }

    /// How the run stands now.
    pub fn run(&self) -> Run {
        self.seen.borrow().clone()
    }

    /// Waits until it stands otherwise; false when it is not conducted any more.
    pub async fn changed(&mut self) -> bool {
        self.seen.changed().await.is_ok()
    }
}

/// Conducts one run.
pub struct Conductor<P, H> {
    run: Run,
    log: Arc<Mutex<AuditLog>>,
    perform: Arc<P>,
    host: H,
    words: mpsc::Receiver<Word>,
    show: watch::Sender<Run>,
}

type InFlight = Pin<Box<dyn Future<Output = Ended<String>> + Send>>;

impl<P: Perform, H: Host> Conductor<P, H> {
    /// A new run, whose start is durable when this returns. Blocks for that long.
    ///
    /// # Errors
    /// See [`ConductError`].
    pub fn start(
        directory: &Path,
        id: &str,
        plan: Plan,
        by: &str,
        perform: Arc<P>,
        host: H,
    ) -> Result<(Self, Baton), ConductError> {
        let (run, first) = Run::new(id, plan, by, host.now()).map_err(ConductError::Plan)?;
        let mut log = AuditLog::create(directory, id)?;
        log.append(&first)?;
        Ok(Self::new(run, log, perform, host))
    }

    /// A run that another conductor left, from its record. Blocks while it reads.
    ///
    /// # Errors
    /// See [`ConductError`].
    pub fn resume(path: &Path, perform: Arc<P>, host: H) -> Result<(Self, Baton), ConductError> {
        let (mut log, records) = AuditLog::open(path)?;
        let mut run = Run::resume(&records).map_err(ConductError::Senseless)?;
        if run.outcome().is_none() {
            let restarted = run.happened(host.now(), None, Event::Restarted);
            log.append(&restarted.map_err(ConductError::Senseless)?)?;
        }
        Ok(Self::new(run, log, perform, host))
    }

    fn new(run: Run, log: AuditLog, perform: Arc<P>, host: H) -> (Self, Baton) {
        let (say, words) = mpsc::channel(MOST_WORDS);
        let (show, seen) = watch::channel(run.clone());
        let conductor = Self {
            run,
            log: Arc::new(Mutex::new(log)),
            perform,
            host,
            words,
            show,
        };
        (conductor, Baton { words: say, seen })
    }

    /// Conducts the run to its end.
    ///
    /// # Errors
    /// Its record cannot be kept; nothing more is done then.
    pub async fn conduct(mut self) -> Result<Outcome, ConductError> {
        let mut in_flight: Option<InFlight> = None;
        let mut heard = true;
        loop {
            let until = match self.run.next(self.host.now()) {
                Next::Over(outcome) => return Ok(outcome),
                Next::Record(event) => {
                    // What took too long is dropped before that is written down.
                    in_flight = None;
                    self.keep(None, event).await?;
                    continue;
                }
                Next::Begin(attempt) => {
                    self.keep(None, attempt.begun()).await?;
                    in_flight = self.begin(*attempt);
                    continue;
                }
                Next::Await { until } => until,
                Next::AwaitApproval { until, .. }
                | Next::Sleep { until }
                | Next::AwaitSource { until } => Some(until),
                Next::Ask(_) | Next::Paused => None,
            };
            let awaited = matches!(self.run.next(self.host.now()), Next::AwaitSource { .. });
            let (perform, host) = (self.perform.clone(), self.host.clone());
            let span = self.span(until);
            tokio::select! {
                ended = ended(&mut in_flight) => {
                    in_flight = None;
                    let event = match ended {
                        Ok(note) => Event::Done { note },
                        Err(Failure { why, cause }) => Event::Failed { why, cause },
                    };
                    self.keep(None, event).await?;
                }
                word = self.words.recv(), if heard => match word {
                    Some(word) => self.hear(word, &mut in_flight).await?,
                    // Nobody can say anything any more; what is under way goes on.
                    None => heard = false,
                },
                () = perform.source_back(), if awaited => self.keep(None, Event::SourceBack).await?,
                () = host.sleep(span) => {}
            }
        }
    }

    fn span(&self, until: Option<Moment>) -> Duration {
        let left = until.map(|until| until.0.saturating_sub(self.host.now().0));
        left.map_or(LONGEST_SLEEP, |millis| {
            Duration::from_millis(millis).min(LONGEST_SLEEP)
        })
    }

    async fn hear(
        &mut self,
        word: Word,
        in_flight: &mut Option<InFlight>,
    ) -> Result<(), ConductError> {
        let Word { by, event, heard } = word;
        let aborts = matches!(event, Event::Aborted { .. });
        let mut run = self.run.clone();
        match run.happened(self.host.now(), Some(&by), event) {
            Err(refused) => {
                // Whoever asked may have gone.
                let _ = heard.send(Err(refused));
            }
            Ok(record) => {
                if aborts {
                    *in_flight = None;
                }
                self.write(record).await?;
                self.run = run;
                self.show.send_replace(self.run.clone());
                let _ = heard.send(Ok(()));
            }
        }
        Ok(())
    }

    /// Keeps what happened. What the run itself asked for is never refused.
    async fn keep(&mut self, by: Option<&str>, event: Event) -> Result<(), ConductError> {
        let record = self.run.happened(self.host.now(), by, event);
        self.write(record.map_err(ConductError::Senseless)?).await?;
        self.show.send_replace(self.run.clone());
        Ok(())
    }

    async fn write(
        &self,
        record: farhaven_policies::runbook::run::Record,
    ) -> Result<(), ConductError> {
        let log = self.log.clone();
        let written = self.host.blocking(move || {
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&record)
        });
        written.await.map_err(ConductError::Writer)??;
        Ok(())
    }

    /// What a site does for this attempt; nothing for what people and time end.
    fn begin(&self, attempt: Attempt) -> Option<InFlight> {
        if matches!(attempt.step.action.kind(), Kind::Approve | Kind::Delay) {
            return None;
        }
        let scope = Scope {
            run: self.run.id().to_owned(),
            mode: self.run.mode(),
            step: attempt.step.name.clone(),
            groups: groups(self.run.plan(), &attempt),
            key: attempt.key.clone(),
            attempt: attempt.attempt,
            timeout: attempt.step.limit().map(|limit| limit.duration()),
        };
        let (perform, host) = (self.perform.clone(), self.host.clone());
        Some(Box::pin(async move {
            match attempt.undo {
                true => undo(&*perform, &scope, &attempt.step.action).await,
                false => forward(&*perform, &host, &scope, &attempt.step.action).await,
            }
        }))
    }
}

async fn ended(in_flight: &mut Option<InFlight>) -> Ended<String> {
    match in_flight {
        Some(step) => step.await,
        None => std::future::pending().await,
    }
}

/// The groups of an attempt, with those of their guests that it is about.
fn groups(plan: &Plan, attempt: &Attempt) -> std::collections::BTreeMap<String, Vec<String>> {
    let named = &attempt.step.guests;
    let each = attempt.groups.iter().map(|name| {
        let members = plan.groups.get(name).map_or(&[][..], Vec::as_slice);
        let chosen = match (named.is_empty(), members.is_empty()) {
            (true, _) => members.to_vec(),
            // Nobody knows whom the group has; whoever performs it does.
            (false, true) => named.clone(),
            (false, false) => {
                let members = members.iter().filter(|guest| named.contains(guest));
                members.cloned().collect()
            }
        };
        (name.clone(), chosen)
    });
    each.filter(|(_, guests)| named.is_empty() || !guests.is_empty())
        .collect()
}

/// A step, as a straight list of what each kind asks of a site.
async fn forward<P: Perform, H: Host>(
    site: &P,
    host: &H,
    scope: &Scope,
    action: &Action,
) -> Ended<String> {
    Ok(match action {
        Action::Check { checks } => site.check(scope, checks).await?.to_string(),
        Action::Quiesce => site.quiesce(scope).await?.to_string(),
        Action::ShutdownSource => site.shutdown_source(scope).await?.to_string(),
        Action::FinalSync => site.final_sync(scope).await?.to_string(),
        Action::Fence => site.fence(scope).await?.to_string(),
        Action::Promote { point } => site.promote(scope, *point).await?.to_string(),
        Action::Remap { networks } => {
            site.remap(scope, networks).await?;
            String::new()
        }
        Action::StartGroup => site.start_group(scope).await?.to_string(),
        Action::WaitHealthy {
            tcp,
            http,
            agent,
            script,
            every,
        } => {
            let probe = match (tcp, http, agent, script) {
                (Some(address), ..) => Probe::Tcp(address.clone()),
                (_, Some(url), ..) => Probe::Http(url.clone()),
                (_, _, Some(true), _) => Probe::Agent,
                (.., Some(script)) => Probe::Script(script.clone()),
                _ => Probe::Own,
            };
            // Until it is, or its time is over.
            loop {
                match site.is_healthy(scope, &probe).await {
                    Ok(guests) => return Ok(guests.to_string()),
                    Err(failure) => tracing::debug!(step = scope.step, %failure, "not healthy yet"),
                }
                host.sleep(every.duration().max(Duration::from_millis(10)))
                    .await;
            }
        }
        Action::Exec { run, .. } => site.exec(scope, run).await?.to_string(),
        Action::Webhook {
            url, method, body, ..
        } => site
            .webhook(scope, url, method.word(), body)
            .await?
            .to_string(),
        Action::Commit => {
            site.commit(scope).await?;
            String::new()
        }
        Action::Rollback => site.rollback(scope).await?.to_string(),
        Action::Reprotect => site.reprotect(scope).await?.to_string(),
        Action::Cleanup => site.cleanup(scope).await?.to_string(),
        Action::Approve { .. } | Action::Delay { .. } => String::new(),
    })
}

async fn undo<P: Perform>(site: &P, scope: &Scope, action: &Action) -> Ended<String> {
    Ok(match action {
        Action::Exec { undo, .. } => site.exec(scope, undo).await?.to_string(),
        Action::Webhook {
            undo: Some(url),
            method,
            body,
            ..
        } => site
            .webhook(scope, url, method.word(), body)
            .await?
            .to_string(),
        action => {
            site.undo(scope, action).await?;
            String::new()
        }
    })
}
