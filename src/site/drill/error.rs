//! Why a test failover was not begun, or not ended.

use std::path::PathBuf;

use crate::site::operate::OperateError;
use crate::site::promote::ActivateError;

/// Why a test was not begun, or not ended.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    /// One at a time.
    #[error(
        "a test of '{0}' runs already, from point {1}; end it first: farhaven test cleanup {0}"
    )]
    Runs(String, u64),
    /// One is being begun or ended.
    #[error("a test of '{0}' is being started or ended just now; look again: farhaven status")]
    Busy(String),
    /// Its points were dropped while somebody waited to test it.
    #[error(
        "the points of '{0}' were dropped just now, nothing of it is left here to test; see what is: farhaven status"
    )]
    Dropped(String),
    /// Nothing to end.
    #[error("no test of '{0}' runs here; start one: farhaven test {0}")]
    NoTest(String),
    /// It was taken over.
    #[error(
        "'{0}' was taken over and runs here (term {1}); its points here are of before that. Protect it to its peer and test it there"
    )]
    Active(String, u64),
    /// A network or device that cannot be cut off.
    #[error("'{guest}' cannot be run isolated:\n  {}", reasons.join("\n  "))]
    NotIsolated {
        /// Who.
        guest: String,
        /// Options, each with its reason.
        reasons: Vec<String>,
    },
    /// Its RAM does not fit beside what is here.
    #[error(
        "a test of '{guest}' needs {needed} MiB of memory, and {free} MiB are free in {directory}; end another test, or free memory"
    )]
    NoRoom {
        /// Who.
        guest: String,
        /// MiB.
        needed: u64,
        /// MiB.
        free: u64,
        /// Where RAM files are.
        directory: PathBuf,
    },
    /// The point, its files or its machine.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

impl From<TestError> for OperateError {
    fn from(error: TestError) -> Self {
        match error {
            TestError::NoTest(_) | TestError::Activate(ActivateError::NoPoint(..)) => {
                OperateError::Unknown(error.to_string())
            }
            TestError::Activate(_) => OperateError::Failed(error.to_string()),
            _ => OperateError::Conflict(error.to_string()),
        }
    }
}
