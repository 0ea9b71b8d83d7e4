//! A guest that ran here before a restart of this daemon: a QEMU lives on by
//! itself and is found again; a guest inside of the daemon ended with it.

use std::sync::Arc;
use std::time::Duration;

use farhaven_storage_sync::catalogue::Table;

use super::promote::ActivateError;
use super::records::Activation;
use super::standby::{Standby, State, ground, step};
use crate::activate::place::Ready;

/// A QEMU that did not answer after a restart is asked again after this time.
const FIND: Duration = Duration::from_secs(2);

impl Standby {
    /// After a daemon's restart: serves and watches a guest that runs here.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        activation: Activation,
    ) -> Result<(), ActivateError> {
        let mut state = self.state.lock().await;
        self.adopt_in(&mut state, activation).await
    }

    /// As [`Standby::adopt`], by who holds its state: nobody finds it unwatched between.
    pub(super) async fn adopt_in(
        self: &Arc<Self>,
        state: &mut State,
        activation: Activation,
    ) -> Result<(), ActivateError> {
        state.unwatched = Some(activation.clone());
        self.see(|s| s.active = Some(activation.clone()));
        let site = self.site()?;
        if let (Some(returning), None) = (activation.returning, site.fence.current(self.guest)) {
            // The file with its term is gone, and the source may have been told to go on.
            site.fence.adopt(returning)?;
        }
        // It runs: what of its point is damaged meanwhile ends nothing.
        let (replica, context) = self.open_in_part(activation.point)?;
        let embedded = context.definition.is_embedded();
        let found = {
            let (site, guest) = (site.clone(), self.guest);
            let (hydrated, ran) = (activation.hydrated, activation.running);
            let run = activation.directory().to_owned();
            step(move || {
                let mut ground = ground(&site, guest, 0);
                ground.run = run;
                let found = Ready::adopt(&ground, &replica, &context.definition, hydrated)?;
                match found {
                    // This daemon ended before the guest was let go: it never ran.
                    Some(ready) if !ran && !ready.runs()? => {
                        ready.discard();
                        Ok(None)
                    }
                    found => Ok::<_, ActivateError>(found),
                }
            })
            .await??
        };
        let fenced = site.fence.may_run(self.guest, site.key()).is_err();
        let why = match (found, fenced) {
            (Some(ready), false) => {
                let mut activation = activation;
                activation.running = true;
                let ready = match activation.returning.take() {
                    // A rollback that was not begun in earnest: nothing was handed over.
                    Some(_) => step(move || ready.go_on().map(|()| ready)).await??,
                    None => ready,
                };
                site.keep_activation(&activation)?;
                self.see(|s| {
                    s.active = Some(activation.clone());
                    s.trouble.clear();
                });
                state.unwatched = None;
                self.look_after(state, activation, Arc::new(ready));
                return Ok(());
            }
            // A rollback of which it is not known how it ended: it is asked for on, and
            // the stopped copy here is the newest there is until then.
            (Some(ready), true)
                if activation.returning.is_some()
                    && activation.returning == site.fence.current(self.guest) =>
            {
                let stopped = step(move || ready.stop().map(|()| ready)).await;
                let ready = stopped.and_then(|done| done)?;
                let told = super::turn::in_doubt(self);
                self.see(|s| s.trouble = told);
                state.unwatched = None;
                self.look_after(state, activation, Arc::new(ready));
                return Ok(());
            }
            // A newer term was heard, and this daemon ended before it had obeyed.
            (Some(ready), true) => {
                step(move || ready.stop()).await.and_then(|done| done)?;
                self.tell_fenced("fenced: it ran here against a newer term; it was stopped here and is kept as evidence");
                "fenced: it runs elsewhere under a newer term; it was stopped here and is kept as evidence"
            }
            (None, true) => "fenced: it ran here under an older term",
            (None, false) if activation.running && embedded => {
                "it ran inside this daemon and ended with it; take it over again from a point: farhaven failover"
            }
            (None, false) if activation.running => {
                "it was taken over here before, and its QEMU has ended; take it over again from a point: farhaven failover"
            }
            (None, false) => {
                "it was being taken over when this site was stopped, and never ran; it can be taken over again"
            }
        };
        // Only now: what may run and is not watched is neither given up nor taken for stopped.
        state.unwatched = None;
        self.see(|s| {
            s.active = None;
            s.trouble = why.to_owned();
        });
        self.leave_evidence(state, &site);
        Ok(())
    }

    /// It is here; what was not done with it yet goes on.
    fn look_after(self: &Arc<Self>, state: &mut State, activation: Activation, ready: Arc<Ready>) {
        let (hydrated, frozen) = (activation.hydrated, activation.frozen);
        state.active = Some((activation, ready.clone()));
        self.thaw(ready.clone(), frozen.then_some(true));
        if !hydrated {
            tokio::spawn(self.clone().hydrate(ready));
        }
    }

    /// As [`Standby::adopt`]; what does not answer is asked again until it does.
    pub(super) async fn find_again(self: &Arc<Self>, activation: Activation) {
        let Err(error) = self.adopt(activation.clone()).await else {
            return;
        };
        tracing::error!(guest = %self.name(), %error, "what runs here cannot be watched yet");
        self.keep_finding(activation, &error);
    }

    /// What runs here and cannot be watched is asked for again and again.
    pub(super) fn keep_finding(self: &Arc<Self>, activation: Activation, error: &ActivateError) {
        self.see(|s| s.trouble = format!("what runs here cannot be watched yet: {error}"));
        let standby = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(FIND).await;
                if standby.adopt(activation.clone()).await.is_ok() {
                    return;
                }
            }
        });
    }

    /// It does not run here any more.
    pub(super) fn forget_activation(
        &self,
        site: &Arc<super::Site>,
    ) -> Result<(), farhaven_storage_sync::catalogue::CatalogueError> {
        super::rebuild::drop_activation_notes(site, self.guest);
        site.catalogue
            .remove(Table::Activations, &self.guest.to_string())?;
        site.catalogue.flush()
    }
}
