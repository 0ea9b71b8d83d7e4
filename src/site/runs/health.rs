//! Are guests healthy? By a check that the runbook names, or by their own of
//! the policy files; a guest without any is healthy while it runs.

use farhaven_policies::runbook::Mode;

use super::facts::{Seen, now_ms};
use super::outside;
use super::perform::{AtSite, named};
use super::pictures;
use super::targets::Target;
use crate::runbook::perform::{Ended, Failure, Guests, Probe, Scope};
use crate::site::health::{self, About, LOOK, Seen as Look, fault, healthy, http, tcp};
use crate::site::networks;

/// Looks once; what is seen goes into the report.
pub(super) async fn look(run: &AtSite, scope: &Scope, probe: &Probe) -> Ended<Guests> {
    let targets = run.targets(scope)?;
    if !matches!(probe, Probe::Own | Probe::Agent) {
        let said = probed(scope, probe).await;
        let all: Vec<_> = targets.iter().map(|t| t.name.as_str()).collect();
        saw(run, &scope.step, &all.join(", "), &said).await?;
        said.map_err(Failure::fault)?;
    }
    for target in &targets {
        let said = match probe {
            Probe::Own => own(run, scope, target).await,
            Probe::Agent => agent(run, scope, target).await,
            probe => runs(run, target).await.map(|_| words(probe)),
        };
        saw(run, &scope.step, &target.name, &said).await?;
        let said = said.map_err(|why| Failure::fault(format!("'{}': {why}", target.name)))?;
        run.note(&target.name, move |guest| {
            guest.healthy_at.get_or_insert_with(now_ms);
            guest.healthy_by = said;
        })
        .await?;
    }
    for target in &targets {
        pictures::take(run, target, true).await;
    }
    Ok(named(&targets))
}

/// Between two waves of a start: those that others wait for are healthy first.
pub(super) async fn await_wave(run: &AtSite, mode: Mode, wave: &[&Target]) -> Ended<()> {
    for target in wave {
        let about = about(run, target, mode);
        let goes_on = || run.goes_on().is_ok();
        let seen = healthy(&about, &target.terms.health, goes_on).await;
        run.goes_on()?;
        if let Some(why) = fault(&seen) {
            return Err(Failure::fault(format!(
                "'{}' is not healthy, and others wait for it: {why}",
                target.name
            )));
        }
    }
    Ok(())
}

/// Kept when it differs from what was seen before.
async fn saw(run: &AtSite, step: &str, guest: &str, said: &Result<String, String>) -> Ended<()> {
    let (good, seen) = match said {
        Ok(seen) => (true, seen.clone()),
        Err(why) => (false, why.clone()),
    };
    let seen = Seen {
        at: now_ms(),
        step: step.to_owned(),
        guest: guest.to_owned(),
        what: "healthy".to_owned(),
        good,
        seen,
    };
    let before = run.facts.now().checks;
    let mut before = before.iter().rev();
    let last = before.find(|s| s.step == seen.step && s.guest == seen.guest);
    if last.is_some_and(|last| last.good == seen.good && last.seen == seen.seen) {
        return Ok(());
    }
    run.saw(seen).await
}

/// All of the guest's own checks.
async fn own(run: &AtSite, scope: &Scope, target: &Target) -> Result<String, String> {
    let mut said = vec![runs(run, target).await?];
    let about = about(run, target, scope.mode);
    for (name, health) in &target.terms.health {
        match health::look(&about, name, health).await {
            Look::Well(seen) => said.push(seen),
            Look::NotLookedAt(why) => said.push(format!("{name}: not looked at, {why}")),
            Look::NotYet(why) | Look::Never(why) => return Err(format!("{name}: {why}")),
        }
    }
    Ok(said.join("; "))
}

/// Of whom checks of the policy files are. What a peer tells of its groups chooses
/// no program of this host: only one that this site's own policy files name for
/// that very guest is run.
fn about(run: &AtSite, target: &Target, mode: Mode) -> About {
    let site = run.site().ok();
    let group = site
        .as_ref()
        .zip(target.of.as_ref())
        .and_then(|(site, of)| site.group(of).ok());
    let addresses = site
        .as_ref()
        .map(|site| networks::addresses(&target.terms, &site.config.site.name));
    let own = site.zip(group).and_then(|(site, group)| {
        let mut members = group.members.iter();
        let named = members.find(|(_, member)| member.guest == target.standby.guest);
        named.map(|(guest, _)| site.own_programs(&group, guest))
    });
    About {
        guest: target.name.clone(),
        group: target.group.clone(),
        mode: mode.word(),
        addresses: addresses.unwrap_or_default(),
        isolated: mode == Mode::Test,
        own_programs: own.unwrap_or_default(),
        standby: Some(target.standby.clone()),
    }
}

/// Its agent answers; one that has none fails: the runbook asks for it.
async fn agent(run: &AtSite, scope: &Scope, target: &Target) -> Result<String, String> {
    runs(run, target).await?;
    match health::agent(&target.standby, scope.mode == Mode::Test).await {
        Look::Well(seen) => Ok(seen),
        Look::NotYet(why) | Look::Never(why) | Look::NotLookedAt(why) => Err(why),
    }
}

async fn runs(run: &AtSite, target: &Target) -> Result<String, String> {
    let standby = &target.standby;
    let runs = match standby.tested_by(&run.run).await {
        Some(ready) => {
            let asked = crate::work::spawn_blocking(move || ready.runs()).await;
            asked.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
        }
        None => standby.runs_here().await.map_err(|e| e.to_string()),
    };
    match runs? {
        true => Ok("it runs".to_owned()),
        false => Err("it does not run here".to_owned()),
    }
}

async fn probed(scope: &Scope, probe: &Probe) -> Result<String, String> {
    match probe {
        // Of each guest by itself.
        Probe::Own | Probe::Agent => Ok(String::new()),
        Probe::Tcp(place) => tcp(place).await,
        Probe::Http(url) => http(url).await,
        Probe::Script(command) => {
            let ran = outside::exec(scope, command);
            match tokio::time::timeout(LOOK, ran).await {
                Ok(Ok(_)) => Ok(words(probe)),
                Ok(Err(failure)) => Err(failure.to_string()),
                Err(_) => Err(format!(
                    "script {}: not done within {LOOK:?}, and ended",
                    command.join(" ")
                )),
            }
        }
    }
}

fn words(probe: &Probe) -> String {
    match probe {
        Probe::Own => "its own checks".to_owned(),
        Probe::Tcp(place) => format!("tcp {place} accepts"),
        Probe::Http(url) => format!("http {url} answers"),
        Probe::Agent => "the guest agent answers".to_owned(),
        Probe::Script(command) => format!("{} ended well", command.join(" ")),
    }
}
