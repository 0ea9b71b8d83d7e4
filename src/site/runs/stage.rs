//! A standby becomes a running guest step by step, as runbooks have it: the
//! term, the machine made ready, the run; and back.
//!
//! While the source holds its guest for a run (`State::staged`), it is neither
//! told that it may go on nor that the guest runs here: its copy stays as it
//! was until the run has ended or gave it back. What a run holds is written
//! down before it counts, so the same is answered after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::activate::fence::{OVERRULES, Term};
use crate::replicate::message::ActivationTimes;
use crate::site::promote::ActivateError;
use crate::site::standby::{Standby, State, step};

/// How a source's question about its held guest is answered.
#[derive(Debug)]
pub(in crate::site) enum HeldAnswer {
    /// It runs here, for good.
    Running(ActivationTimes, Term),
    /// A run has it, and has not ended.
    Undecided,
    /// It does not run here, and will not under that term.
    GivenUp,
}

/// While it is there, a source's answer to a request to hold its guest is awaited.
pub(super) struct Expecting(Arc<Standby>);

impl Drop for Expecting {
    fn drop(&mut self) {
        self.0.expecting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Standby {
    /// Answers a source that asks what became of the guest that it holds: a run
    /// has it, or it runs here, or else what was prepared is given up.
    pub(in crate::site) async fn give_up(self: &Arc<Self>) -> HeldAnswer {
        self.begin_anew();
        let mut state = self.state.lock().await;
        if state.staged.is_some() || self.expecting.load(Ordering::SeqCst) > 0 {
            return HeldAnswer::Undecided;
        }
        if let Some(active) = state.runs() {
            return HeldAnswer::Running(active.times.clone(), active.term);
        }
        // Handed over with its group, and about to run.
        let site = self.site.upgrade();
        if let Some(term) = site.and_then(|site| site.handed_over(self.guest)) {
            return HeldAnswer::Running(Default::default(), term);
        }
        self.discard(&mut state).await;
        HeldAnswer::GivenUp
    }

    /// The source goes on: what was prepared here is not needed.
    pub(in crate::site) async fn stand_down(self: &Arc<Self>) {
        self.begin_anew();
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
    }

    /// See [`Expecting`].
    pub(super) fn expect(self: &Arc<Self>) -> Expecting {
        self.expecting.fetch_add(1, Ordering::SeqCst);
        Expecting(self.clone())
    }

    /// Nothing stands against a run that takes its term; what an earlier takeover
    /// left of it is ended.
    ///
    /// # Errors
    /// When it runs here already.
    pub(super) async fn may_be_taken(self: &Arc<Self>) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        self.refuse_running(&state)?;
        self.end_evidence(&mut state).await;
        Ok(())
    }

    /// What term the next failover would take: for making ready before it.
    pub(super) fn next_term(&self, held: bool) -> Result<u64, ActivateError> {
        let known = self.site()?.fence.current(self.guest);
        let step = if held { 1 } else { OVERRULES };
        Ok(known.map_or(0, |t| t.number) + step)
    }

    /// Makes the machine and the memory of a point ready, to run under the term
    /// of this number. What is ready already is brought to the point only.
    ///
    /// # Errors
    /// When it runs here already, or cannot be made ready.
    pub(super) async fn make_ready(
        self: &Arc<Self>,
        point: u64,
        number: u64,
        networks: &BTreeMap<String, String>,
        anew: bool,
    ) -> Result<(), ActivateError> {
        self.make_room().await;
        let mut state = self.state.lock().await;
        self.refuse_running(&state)?;
        if !self.points().iter().any(|p| p.point == point) {
            return Err(ActivateError::NoPoint(
                self.name(),
                format!("point {point}"),
            ));
        }
        if anew {
            self.discard(&mut state).await;
        }
        self.end_evidence(&mut state).await;
        self.fill(&mut state, point).await?;
        if state.ready.is_none() {
            state.ready = Some(self.launch_on(point, number, networks.clone()).await?);
        }
        Ok(())
    }

    fn refuse_running(&self, state: &State) -> Result<(), ActivateError> {
        match state.runs() {
            Some(active) => Err(ActivateError::Active(self.name(), active.term.number)),
            None => Ok(()),
        }
    }

    /// Runs a point under a term that a run took before. Done twice is done once.
    ///
    /// # Errors
    /// When a newer term is known, the source was told that the guest is given
    /// up, or it cannot be run.
    pub(super) async fn run_staged(
        self: &Arc<Self>,
        point: u64,
        term: Term,
        held: bool,
    ) -> Result<ActivationTimes, ActivateError> {
        let declared = Instant::now();
        let mut state = self.state.lock().await;
        if let Some(active) = state.runs() {
            return match active.term == term && active.point == point {
                true => Ok(active.times.clone()),
                false => Err(ActivateError::Active(self.name(), active.term.number)),
            };
        }
        if held && state.staged != Some(term) {
            return Err(ActivateError::NotPrepared(self.name()));
        }
        let site = self.site()?;
        if site.fence.current(self.guest) != Some(term) || term.owner != site.key() {
            return Err(ActivateError::Superseded(self.name()));
        }
        self.run(
            &mut state,
            point,
            term,
            declared,
            ActivationTimes::default(),
        )
        .await
    }

    /// Ends what a run started here, and discards what it wrote.
    ///
    /// # Errors
    /// When it may run on; the sentence says what to do.
    pub(super) async fn end_staged(self: &Arc<Self>, term: Term) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
        if let Some(unwatched) = &state.unwatched {
            return Err(ActivateError::Step(format!(
                "'{}' may run here{}, and its QEMU does not answer; end it by hand and repeat this",
                self.name(),
                unwatched.process()
            )));
        }
        let Some((active, ready)) = &state.active else {
            return Ok(());
        };
        if active.term != term {
            return Err(ActivateError::Active(self.name(), active.term.number));
        }
        let ready = ready.clone();
        let removed = step(move || {
            ready.end();
            std::fs::remove_dir_all(ready.run_directory())
        });
        if let Err(error) = removed.await? {
            tracing::warn!(guest = %self.name(), %error, "its directory stays behind");
        }
        state.active = None;
        self.see(|s| {
            s.active = None;
            s.hydration = None;
            s.trouble = "a run took it over and gave it back".to_owned();
        });
        let site = self.site()?;
        self.forget_activation(&site)?;
        Ok(())
    }

    /// Discards what was made ready and did not run.
    pub(super) async fn unready(self: &Arc<Self>) {
        let mut state = self.state.lock().await;
        self.discard(&mut state).await;
    }

    /// The source holds its guest for a run, under this term.
    pub(super) async fn stage(self: &Arc<Self>, term: Option<Term>) {
        self.state.lock().await.staged = term;
    }

    /// Is it held by its source for a run, under this term?
    pub(super) async fn is_staged(&self, term: Option<Term>) -> bool {
        term.is_some() && self.state.lock().await.staged == term
    }

    /// The picture that the guest shows, if its machine can draw one.
    ///
    /// # Errors
    /// When it cannot, or nothing runs here.
    pub(super) async fn draw(&self, file: &std::path::Path) -> Result<(), ActivateError> {
        let ready = {
            let state = self.state.lock().await;
            state.active.as_ref().map(|(_, ready)| ready.clone())
        };
        let Some(ready) = ready else {
            return Err(ActivateError::Step("it does not run here".to_owned()));
        };
        let file = file.to_owned();
        step(move || ready.draw(&file)).await?
    }

    /// Does it run here now, by its machine's word?
    ///
    /// # Errors
    /// When its machine does not answer.
    pub(super) async fn runs_here(&self) -> Result<bool, ActivateError> {
        let ready = {
            let state = self.state.lock().await;
            state.active.as_ref().map(|(_, ready)| ready.clone())
        };
        match ready {
            Some(ready) => step(move || ready.runs()).await?,
            None => Ok(false),
        }
    }
}
