//! Are guests healthy? By a check that the runbook names, or by their own of
//! the policy files; a guest without any is healthy while it runs.

use std::time::{Duration, Instant};

use farhaven_policies::files::Health;
use farhaven_policies::runbook::Mode;

use super::facts::{Seen, now_ms};
use super::outside;
use super::perform::{AtSite, named};
use super::pictures;
use super::targets::Target;
use crate::runbook::perform::{Ended, Failure, Guests, Probe, Scope};
use crate::site::health::{LOOK, http, tcp};

/// Looks once; what is seen goes into the report.
pub(super) async fn look(run: &AtSite, scope: &Scope, probe: &Probe) -> Ended<Guests> {
    let targets = run.targets(scope)?;
    if *probe != Probe::Own {
        let said = probed(scope, probe).await;
        let all: Vec<_> = targets.iter().map(|t| t.name.as_str()).collect();
        saw(run, &scope.step, &all.join(", "), &said).await?;
        said.map_err(Failure::fault)?;
    }
    for target in &targets {
        let said = match probe {
            Probe::Own => own(run, scope, target).await,
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
pub(super) async fn await_wave(run: &AtSite, wave: &[&Target]) -> Ended<()> {
    for target in wave {
        let of_guest = target.terms.health.iter();
        for (name, health) in of_guest.filter(|(_, health)| health.agent != Some(true)) {
            let deadline = Instant::now() + health.timeout.duration();
            while let Err(why) = one(run, name, health, target).await {
                run.goes_on()?;
                if Instant::now() > deadline {
                    return Err(Failure::fault(format!(
                        "'{}' is not healthy after {}, and others wait for it: {name}: {why}",
                        target.name, health.timeout
                    )));
                }
                tokio::time::sleep(health.every.duration().max(Duration::from_millis(10))).await;
            }
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
    let facts = run.facts.clone();
    let kept = crate::work::spawn_blocking(move || facts.saw(seen)).await;
    kept.map_err(|e| Failure::fault(e.to_string()))?
}

/// All of the guest's own checks.
async fn own(run: &AtSite, scope: &Scope, target: &Target) -> Result<String, String> {
    let mut said = vec![runs(run, target).await?];
    for (name, health) in &target.terms.health {
        // Isolated, nobody can reach it by a network.
        if scope.mode == Mode::Test && (health.tcp.is_some() || health.http.is_some()) {
            said.push(format!("{name}: not looked at, a test is on no network"));
            continue;
        }
        // A failover at night does not hang on what nobody here can ask.
        if health.agent == Some(true) {
            said.push(format!(
                "{name}: not looked at, this version has no channel to guest agents"
            ));
            continue;
        }
        let seen = one(run, name, health, target).await;
        said.push(seen.map_err(|why| format!("{name}: {why}"))?);
    }
    Ok(said.join("; "))
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

/// What a peer tells of its groups chooses no program of this host: only one
/// that this site's own policy files name for that very guest is run.
fn is_own_program(run: &AtSite, name: &String, target: &Target) -> Result<(), String> {
    let site = run.site().map_err(|failure| failure.why)?;
    let group = target.of.as_ref().and_then(|of| site.group(of).ok());
    let own = group.is_some_and(|group| {
        let mut members = group.members.iter();
        let named = members.find(|(_, member)| member.guest == target.standby.guest);
        named.is_some_and(|(guest, _)| site.own_programs(&group, guest).contains(name))
    });
    match own {
        true => Ok(()),
        false => Err("this site runs no program that only another site's policy files name; put the group's policy file in force here, too (site.policy_files)".to_owned()),
    }
}

async fn one(
    run: &AtSite,
    name: &String,
    health: &Health,
    target: &Target,
) -> Result<String, String> {
    if health.script.is_some() {
        is_own_program(run, name, target)?;
    }
    let probe = match (&health.tcp, &health.http, health.agent, &health.script) {
        (Some(tcp), ..) => Probe::Tcp(tcp.clone()),
        (_, Some(url), ..) => Probe::Http(url.clone()),
        (_, _, Some(true), _) => Probe::Agent,
        (.., Some(script)) => Probe::Script(script.clone()),
        _ => return Ok("nothing to look at".to_owned()),
    };
    let scope = Scope {
        run: run.run.clone(),
        mode: Mode::Unplanned,
        step: String::new(),
        groups: [(target.group.clone(), vec![target.name.clone()])].into(),
        key: format!("{}/health/{}", run.run, target.name),
        attempt: 1,
    };
    probed(&scope, &probe).await
}

async fn probed(scope: &Scope, probe: &Probe) -> Result<String, String> {
    match probe {
        Probe::Own => Ok(String::new()),
        Probe::Tcp(place) => tcp(place).await,
        Probe::Http(url) => http(url).await,
        Probe::Agent => {
            Err("this version has no channel to guest agents; use another check".to_owned())
        }
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
