//! What runs of runbooks ask of tests.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::promote::ActivateError;
use super::super::standby::{Standby, step};
use super::super::view::TestEnded;
use super::error::TestError;
use super::place::Places;
use crate::activate::place::Ready;

impl Standby {
    /// The machine of a test that runs, and is a part of this run.
    pub(in crate::site) async fn tested_by(&self, run: &str) -> Option<Arc<Ready>> {
        let drill = self.drill.lock().await;
        let test = drill.as_ref().filter(|d| d.run.as_deref() == Some(run));
        let test = test.filter(|test| test.waiting.is_none());
        test.map(|test| test.ready.clone())
    }

    /// The channel to the agent of what runs here of it: of its test, or of the guest
    /// itself; `None` where it has none.
    ///
    /// # Errors
    /// When it does not run.
    pub(in crate::site) async fn agent(&self, tested: bool) -> Result<Option<PathBuf>, String> {
        let ready = match tested {
            true => {
                let drill = self.drill.lock().await;
                let test = drill.as_ref().filter(|test| test.waiting.is_none());
                test.map(|test| test.ready.clone())
            }
            false => {
                let state = self.state.lock().await;
                state.active.as_ref().map(|(_, ready)| ready.clone())
            }
        };
        let ready = ready.ok_or("it does not run here")?;
        Ok(ready.agent())
    }

    /// Does a test of it run, by its machine's word?
    pub(in crate::site) async fn test_runs(&self) -> bool {
        let ready = {
            let drill = self.drill.lock().await;
            drill.as_ref().map(|test| test.ready.clone())
        };
        let Some(ready) = ready else { return false };
        let runs = step(move || ready.runs()).await;
        runs.is_ok_and(|runs| runs.unwrap_or(false))
    }

    /// Ends the test of this run, if there is one; waits for who has it in hand.
    pub(in crate::site) async fn end_test_of(
        self: &Arc<Self>,
        run: &str,
    ) -> Result<Option<TestEnded>, TestError> {
        let mut drill = self.drill.lock().await;
        match drill.take_if(|test| test.run.as_deref() == Some(run)) {
            Some(running) => Ok(Some(self.throw_away(running).await?)),
            None => Ok(None),
        }
    }

    /// Where a test's files are while there is one.
    pub(in crate::site) fn test_places(&self) -> Result<[PathBuf; 2], ActivateError> {
        let places = Places::of(&*self.site()?, self.guest);
        Ok([places.ram, places.run])
    }
}
