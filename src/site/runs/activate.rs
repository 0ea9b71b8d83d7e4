//! The steps of a run that make its guests run at this site: terms, machines,
//! networks, the start in order.

use std::collections::BTreeMap;

use farhaven_policies::runbook::PointChoice;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;

use super::facts::now_ms;
use super::health;
use super::perform::{AtSite, fault, named};
use super::targets::Target;
use crate::activate::fence::Term;
use crate::runbook::perform::{Ended, Failure, Fenced, Guests, Promoted, Scope};
use crate::site::networks;

impl AtSite {
    /// The terms of all guests are this site's, and durable, before anything
    /// else: of all at once, or of none.
    pub(super) async fn take_terms(self, scope: Scope) -> Ended<Fenced> {
        let site = self.site()?;
        let targets = self.targets(&scope)?;
        let mut untaken = Vec::new();
        for target in &targets {
            let known = self.facts.of(&target.name).term;
            if known.is_none() || known != site.fence.current(target.standby.guest) {
                target.standby.may_be_taken().await.map_err(fault)?;
                untaken.push(target);
            }
        }
        self.goes_on()?;
        if !untaken.is_empty() {
            let guests: Vec<GuestId> = untaken.iter().map(|t| t.standby.guest).collect();
            let fence = site.clone();
            let taken =
                crate::work::spawn_blocking(move || fence.fence.overrule_all(&guests, fence.key()));
            let terms = taken.await.map_err(fault)?.map_err(fault)?;
            let known: Vec<(String, String, Option<Term>)> = untaken
                .iter()
                .map(|target| {
                    let term = terms.iter().find(|t| t.group == target.standby.guest);
                    (target.name.clone(), target.group.clone(), term.copied())
                })
                .collect();
            let facts = self.facts.clone();
            let noted = crate::work::spawn_blocking(move || {
                facts.change(|facts| {
                    for (name, group, term) in known {
                        let guest = facts.guests.entry(name).or_default();
                        guest.term = term;
                        guest.group = group;
                    }
                })
            });
            noted.await.map_err(fault)??;
        }
        let confirmed = self.announce(&targets).await?;
        let terms = targets.iter().filter_map(|t| self.facts.of(&t.name).term);
        Ok(Fenced {
            term: terms.map(|term| term.number).max().unwrap_or(0),
            confirmed,
        })
    }

    /// Tells each source of the terms of its guests. Answers whether all of them
    /// said that theirs are stopped.
    async fn announce(&self, targets: &[Target]) -> Ended<bool> {
        let site = self.site()?;
        let mut sources: BTreeMap<SiteKey, Vec<&Target>> = BTreeMap::new();
        for target in targets {
            sources
                .entry(target.standby.remote().record.key)
                .or_default()
                .push(target);
        }
        let mut confirmed = true;
        for guests in sources.into_values() {
            let Some(first) = guests.first() else {
                continue;
            };
            let terms = guests.iter().filter_map(|t| self.facts.of(&t.name).term);
            let told = site
                .announce_terms(first.standby.remote(), terms.collect())
                .await;
            let source = first.standby.from();
            let stopped = told.map_err(|why| {
                let names: Vec<&str> = guests.iter().map(|t| t.name.as_str()).collect();
                Failure::fault(format!(
                    "site '{source}' lives and did not say that it stopped {} ({why}). Nothing is run here while it may run there: stop it there, or cut that site off, and repeat this",
                    names.join(", ")
                ))
            })?;
            confirmed &= stopped;
            for target in &guests {
                self.note(&target.name, move |guest| guest.source_stopped = stopped)
                    .await?;
            }
        }
        Ok(confirmed)
    }

    /// Makes the machines and the memory of the chosen points ready.
    pub(super) async fn make_ready(self, scope: Scope, choice: PointChoice) -> Ended<Promoted> {
        let targets = self.targets(&scope)?;
        let points = self.choose(&targets, choice).await?;
        let promoted = self.keep_points(&targets, &points).await?;
        for target in &targets {
            self.goes_on()?;
            let known = self.facts.of(&target.name);
            let Some(point) = known.point else { continue };
            let number = match known.term {
                Some(term) => term.number,
                None => target.standby.next_term(known.held).map_err(fault)?,
            };
            let ready = target
                .standby
                .make_ready(point, number, &known.networks, false);
            ready.await.map_err(fault)?;
        }
        Ok(promoted)
    }

    /// Discards what was made ready and does not run.
    pub(super) async fn unready(self, scope: Scope) -> Ended<()> {
        for target in self.targets(&scope)? {
            target.standby.unready().await;
        }
        Ok(())
    }

    /// Runs the guests, wave after wave; those that others wait for are healthy first.
    pub(super) async fn start(self, scope: Scope) -> Ended<Guests> {
        let targets = self.targets(&scope)?;
        let waves = targets.iter().map(|t| t.wave).max().unwrap_or(0);
        for wave in 0..=waves {
            let of_wave: Vec<&Target> = targets.iter().filter(|t| t.wave == wave).collect();
            for target in &of_wave {
                self.goes_on()?;
                self.start_one(target).await?;
            }
            if wave < waves {
                health::await_wave(&self, scope.mode, &of_wave).await?;
            }
        }
        Ok(named(&targets))
    }

    /// Runs one guest. What runs already is left alone.
    pub(super) async fn start_one(&self, target: &Target) -> Ended<()> {
        let known = self.facts.of(&target.name);
        let (Some(point), Some(term)) = (known.point, known.term) else {
            return Err(Failure::clean(format!(
                "'{}' has no point or no term in this run: a promote, and a fence or final-sync, come before its start",
                target.name
            )));
        };
        let standby = &target.standby;
        if standby.active().is_none() {
            // What was made ready before, a daemon that ended took with it.
            let ready = standby.make_ready(point, term.number, &known.networks, false);
            ready.await.map_err(fault)?;
        }
        let times = standby.run_staged(point, term, known.held).await;
        let times = times.map_err(fault)?;
        self.note(&target.name, move |guest| {
            guest.started_at.get_or_insert_with(now_ms);
            guest.start_ms = Some(times.total.as_secs_f64() * 1e3);
        })
        .await
    }

    /// Gives each guest the networks of this site that its group's policy and the
    /// step name.
    pub(super) async fn map_networks(
        self,
        scope: Scope,
        wanted: BTreeMap<String, String>,
    ) -> Ended<()> {
        let site = self.site()?;
        let own = site.config.site.name.clone();
        for target in self.targets(&scope)? {
            let mut networks = networks::of_policy(&target.terms, &own);
            networks.extend(wanted.iter().map(|(k, v)| (k.clone(), networks::netdev(v))));
            let known = self.facts.of(&target.name);
            if networks == known.networks || known.started_at.is_some() {
                continue;
            }
            let (Some(point), Some(term)) = (known.point, known.term) else {
                return Err(Failure::clean(format!(
                    "'{}' was not promoted in this run yet",
                    target.name
                )));
            };
            let kept = networks.clone();
            self.note(&target.name, move |guest| guest.networks = kept)
                .await?;
            let ready = target
                .standby
                .make_ready(point, term.number, &networks, true);
            ready.await.map_err(fault)?;
        }
        Ok(())
    }
}
