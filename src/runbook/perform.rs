//! What a site must be able to do so that runbooks can be conducted at it: one
//! method for each kind of step, with typed results.
//!
//! The conductor begins a step only after that is recorded, and may drop its
//! future when its time is over, when somebody aborts the run or when the
//! daemon ends. So for every method but `exec` and `webhook`:
//!
//! - It may be called again with the same [`Scope::key`] when it is not known
//!   whether it was done, and then finds that out: done twice is done once.
//! - A future that is dropped leaves what another call, or [`Perform::undo`],
//!   can take from there.
//! - [`Perform::undo`] may be called for what was begun and not done, or done in
//!   part: undoing what is not there is no failure.
//! - It fails with [`Failure::clean`] only if nothing at all was changed, and
//!   with [`Failure::source_lost`] when the other site does not answer.
//!
//! The promises of terms hold below this: whatever a runbook or a person says,
//! a side with an older term runs no guest.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use farhaven_policies::runbook::run::Cause;
use farhaven_policies::runbook::{Action, Mode, PointChoice, Readiness};

/// What a step is done to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The run.
    pub run: String,
    /// What it is run for.
    pub mode: Mode,
    /// The step's name.
    pub step: String,
    /// The groups that it acts on, with their guests, or those of them that it
    /// names; an empty list means all guests of the group.
    pub groups: BTreeMap<String, Vec<String>>,
    /// The same for every call that may repeat another.
    pub key: String,
    /// How often it was begun.
    pub attempt: u32,
    /// How long it may take; `None` for what ends by itself.
    pub timeout: Option<Duration>,
}

/// Why a step was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// Why, and what to do.
    pub why: String,
    /// In which way.
    pub cause: Cause,
}

impl Failure {
    /// It may have been done in part.
    pub fn fault(why: impl Into<String>) -> Failure {
        Failure {
            why: why.into(),
            cause: Cause::Fault,
        }
    }

    /// Nothing was changed.
    pub fn clean(why: impl Into<String>) -> Failure {
        Failure {
            why: why.into(),
            cause: Cause::Clean,
        }
    }

    /// The other site does not answer.
    pub fn source_lost(why: impl Into<String>) -> Failure {
        Failure {
            why: why.into(),
            cause: Cause::SourceLost,
        }
    }
}

/// How a health check looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// By the guests' own checks.
    Own,
    /// `host:port` accepts a connection.
    Tcp(String),
    /// A URL answers with a status from 200 to 399.
    Http(String),
    /// The guest agents answer.
    Agent,
    /// A program ends with status 0.
    Script(Vec<String>),
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// What was looked at, and what was seen.
    pub seen: Vec<(Readiness, String)>,
}

/// What came of a final sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synced {
    /// The last point.
    pub point: u64,
    /// Bytes sent for it.
    pub bytes: u64,
}

/// What came of a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fenced {
    /// The term in force.
    pub term: u64,
    /// The source said that its guests are stopped; else it learns of the term
    /// when it is next heard of.
    pub confirmed: bool,
}

/// What came of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promoted {
    /// From which point.
    pub point: u64,
    /// What is lost: from its cut until the run was started, in milliseconds.
    pub rpo_ms: u64,
}

/// What came of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// The beginning of what it printed.
    pub said: String,
}

/// What came of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Called {
    /// The status, from 200 to 299.
    pub status: u16,
}

/// Guests that something was done to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guests {
    /// Their names.
    pub guests: Vec<String>,
}

/// What came of a reprotection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reprotected {
    /// Bytes that differed and were sent.
    pub bytes: u64,
}

/// What is not there any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// For people.
    pub removed: Vec<String>,
}

/// How a step ends.
pub type Ended<T> = Result<T, Failure>;

/// What a site does for a runbook; see the module's page for what each must keep to.
pub trait Perform: Send + Sync + 'static {
    /// Looks whether what follows can succeed; all that can be looked at in the
    /// mode when `checks` is empty. Fails when something is not as it should be.
    fn check(
        &self,
        scope: &Scope,
        checks: &[Readiness],
    ) -> impl Future<Output = Ended<Checked>> + Send;

    /// The guest agents answer, and freeze the filesystems for the next cut.
    fn quiesce(&self, scope: &Scope) -> impl Future<Output = Ended<Guests>> + Send;

    /// Shuts the guests down at the source.
    fn shutdown_source(&self, scope: &Scope) -> impl Future<Output = Ended<Guests>> + Send;

    /// Seals the last changes here, with the source's guests held from then on.
    fn final_sync(&self, scope: &Scope) -> impl Future<Output = Ended<Synced>> + Send;

    /// Takes the next term, and tells the source if it lives.
    fn fence(&self, scope: &Scope) -> impl Future<Output = Ended<Fenced>> + Send;

    /// Makes a point's memory and disks ready to run here.
    fn promote(
        &self,
        scope: &Scope,
        point: PointChoice,
    ) -> impl Future<Output = Ended<Promoted>> + Send;

    /// Gives the guests this site's networks; isolated ones in a test.
    fn remap(
        &self,
        scope: &Scope,
        networks: &BTreeMap<String, String>,
    ) -> impl Future<Output = Ended<()>> + Send;

    /// Runs the guests, in start order.
    fn start_group(&self, scope: &Scope) -> impl Future<Output = Ended<Guests>> + Send;

    /// Looks once whether the guests are healthy. The conductor repeats it.
    fn is_healthy(
        &self,
        scope: &Scope,
        probe: &Probe,
    ) -> impl Future<Output = Ended<Guests>> + Send;

    /// Runs a program of the site; `FARHAVEN_KEY` in its environment is the key.
    fn exec(&self, scope: &Scope, run: &[String]) -> impl Future<Output = Ended<Executed>> + Send;

    /// Calls a URL, with the key as the header `Idempotency-Key`.
    fn webhook(
        &self,
        scope: &Scope,
        url: &str,
        method: &'static str,
        body: &str,
    ) -> impl Future<Output = Ended<Called>> + Send;

    /// The groups stay.
    fn commit(&self, scope: &Scope) -> impl Future<Output = Ended<()>> + Send;

    /// The groups return to their source.
    fn rollback(&self, scope: &Scope) -> impl Future<Output = Ended<Guests>> + Send;

    /// Protects the groups the other way round.
    fn reprotect(&self, scope: &Scope) -> impl Future<Output = Ended<Reprotected>> + Send;

    /// Removes the test.
    fn cleanup(&self, scope: &Scope) -> impl Future<Output = Ended<Removed>> + Send;

    /// Undoes a quiesce, shutdown-source, final-sync, fence, promote, remap or
    /// start-group. (Programs and URLs that undo others are called as such.)
    fn undo(&self, scope: &Scope, action: &Action) -> impl Future<Output = Ended<()>> + Send;

    /// Ends when the other site answers.
    fn source_back(&self) -> impl Future<Output = ()> + Send;
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.seen.iter();
        let seen = seen.map(|(check, seen)| format!("{}: {seen}", check.word()));
        f.write_str(&seen.collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for Synced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "point {} sealed, {} bytes", self.point, self.bytes)
    }
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match self.confirmed {
            true => "the source's guests are stopped",
            false => "the source does not answer; it is stopped when it does",
        };
        write!(f, "term {}; {source}", self.term)
    }
}

impl fmt::Display for Promoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "point {}, {} ms old", self.point, self.rpo_ms)
    }
}

impl fmt::Display for Executed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.said)
    }
}

impl fmt::Display for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}", self.status)
    }
}

impl fmt::Display for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.guests.join(", "))
    }
}

impl fmt::Display for Reprotected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes differed", self.bytes)
    }
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.removed.join(", "))
    }
}
