//! What an operator does with a test: begins it, and ends it.

use std::sync::Arc;
use std::time::Instant;

use crate::site::Site;
use crate::site::events::EventKind;
use crate::site::operate::OperateError;
use crate::site::view::{TestEnded, TestReport};

impl Site {
    /// Runs a peer's guest here as a test, isolated, from its newest or a named
    /// point. Protection goes on.
    ///
    /// # Errors
    /// When one runs already, or it cannot be run; nothing is left behind then.
    pub async fn test(
        self: &Arc<Self>,
        name: &str,
        point: Option<u64>,
    ) -> Result<TestReport, OperateError> {
        self.test_since(name, point, Instant::now()).await
    }

    /// [`Self::test`] of what was `declared` before: for all guests of a group at once.
    pub(in crate::site) async fn test_since(
        self: &Arc<Self>,
        name: &str,
        point: Option<u64>,
        declared: Instant,
    ) -> Result<TestReport, OperateError> {
        let standby = self.standby_here(name)?;
        let report = standby.test(point, declared).await?;
        let what = format!("a test of '{name}' runs from point {}", report.point);
        self.note(EventKind::TestStarted, name, &what);
        Ok(report)
    }

    /// Ends a guest's test and removes all of it.
    ///
    /// # Errors
    /// When none runs.
    pub async fn end_test(self: &Arc<Self>, name: &str) -> Result<TestEnded, OperateError> {
        let standby = self.standby_here(name)?;
        let ran = standby.test_runs().await;
        let ended = standby.end_test().await?;
        if ran {
            // It came up, ran to its end, and nothing of it is left.
            self.note_tested(standby.guest);
        }
        let what = format!(
            "the test of '{name}' from point {} has ended, all of it is removed",
            ended.point
        );
        self.note(EventKind::TestEnded, name, &what);
        Ok(ended)
    }
}
