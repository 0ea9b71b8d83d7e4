//! Is a guest healthy? By the checks that its group's policy file gives it.
//!
//! A check is looked at again and again until it passes or its time is over.
//! Programs run here only if this site's own policy files name them for that
//! very guest: what a peer tells of its groups chooses no program of this host.
//! Verbs on groups and steps of runbooks look by the same code.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farhaven_policies::files::Health;
use serde::{Deserialize, Serialize};

use super::breach::plain;
use super::standby::Standby;
use crate::call::{Call, call};
use crate::guest::qemu::agent::Agent;
use crate::program::{self, LeftBehind, ProgramError};

/// One look takes no longer; the next one comes after the check's `every`.
pub(super) const LOOK: Duration = Duration::from_secs(10);

/// So much of what a program prints is kept; the rest is read and dropped.
const KEPT: usize = 1 << 10;

/// What became of a health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// It is healthy by this.
    Passed,
    /// It was not healthy within the check's time.
    Failed,
    /// It cannot be looked at where the guest runs; it counts as neither.
    NotLookedAt,
}

/// A health check of a guest, and what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckView {
    /// Its name in the policy file.
    pub check: String,
    /// What became of it.
    pub outcome: CheckOutcome,
    /// What was seen last, for people.
    pub seen: String,
    /// Milliseconds from the guest's start until that.
    pub took_ms: u64,
}

/// Of which guest, and where it runs.
#[derive(Clone, Default)]
pub(super) struct About {
    /// The guest's name.
    pub(super) guest: String,
    /// Its group's.
    pub(super) group: String,
    /// `failover`, `test`, `move`, `rollback`, or a run's mode: programs are told.
    pub(super) mode: &'static str,
    /// Its addresses here by the policy of its group, with spaces between them: told
    /// to programs unless it is on no network.
    pub(super) addresses: String,
    /// It is on no network.
    pub(super) isolated: bool,
    /// The checks whose program this site's own policy files name.
    pub(super) own_programs: Vec<String>,
    /// What runs here of it.
    pub(super) standby: Option<Arc<Standby>>,
}

/// One look at a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    Well(String),
    NotYet(String),
    /// Looking again would change nothing.
    Never(String),
    /// It cannot be looked at where the guest runs: nobody hangs on that.
    NotLookedAt(String),
}

/// Waits until each check has passed, or its time is over, or `goes_on` says that
/// nobody waits any more.
pub(super) async fn healthy(
    about: &About,
    checks: &BTreeMap<String, Health>,
    goes_on: impl Fn() -> bool,
) -> Vec<CheckView> {
    let started = Instant::now();
    let mut views = Vec::new();
    for (name, health) in checks {
        let deadline = started + health.timeout.duration();
        let (outcome, seen) = loop {
            match look(about, name, health).await {
                Seen::Well(seen) => break (CheckOutcome::Passed, seen),
                Seen::NotLookedAt(seen) => break (CheckOutcome::NotLookedAt, seen),
                Seen::Never(why) => break (CheckOutcome::Failed, why),
                Seen::NotYet(why) if Instant::now() >= deadline => {
                    let why = format!("not within {}: {why}", health.timeout);
                    break (CheckOutcome::Failed, why);
                }
                Seen::NotYet(why) if !goes_on() => break (CheckOutcome::Failed, why),
                Seen::NotYet(_) => {}
            }
            let every = health.every.duration().max(Duration::from_millis(10));
            let left = deadline.saturating_duration_since(Instant::now());
            tokio::time::sleep(every.min(left)).await;
        };
        tracing::info!(guest = about.guest, check = name, ?outcome, seen, "health");
        views.push(CheckView {
            // A peer may have told of them.
            check: plain(name),
            outcome,
            seen: plain(&seen),
            took_ms: started.elapsed().as_millis() as u64,
        });
    }
    views
}

/// The first check that failed, for people; `None` when none did.
pub(super) fn fault(checks: &[CheckView]) -> Option<String> {
    let failed = |view: &&CheckView| view.outcome == CheckOutcome::Failed;
    let failed = checks.iter().find(failed)?;
    Some(format!("{}: {}", failed.check, failed.seen))
}

/// Looks once.
pub(super) async fn look(about: &About, name: &str, health: &Health) -> Seen {
    let by_network = health.tcp.is_some() || health.http.is_some();
    if by_network && about.isolated {
        return Seen::NotLookedAt("a test is on no network".to_owned());
    }
    let by_network = match (&health.tcp, &health.http) {
        (Some(place), _) => Some(tcp(place).await),
        (None, Some(url)) => Some(http(url).await),
        (None, None) => None,
    };
    if let Some(seen) = by_network {
        return match seen {
            Ok(seen) => Seen::Well(seen),
            Err(why) => Seen::NotYet(why),
        };
    }
    match (&health.script, health.agent) {
        (Some(_), _) if !about.own_programs.iter().any(|own| own == name) => Seen::Never(
            "this site runs no program that only another site's policy files name; put the group's policy file in force here, too (site.policy_files)".to_owned(),
        ),
        (Some(run), _) => match tokio::time::timeout(LOOK, ends_well(about, run)).await {
            Ok(Ok(())) => Seen::Well(format!("{} ended well", run.join(" "))),
            Ok(Err(error)) => Seen::NotYet(error.to_string()),
            Err(_) => Seen::NotYet(format!(
                "{}: not done within {LOOK:?}, and ended",
                run.join(" ")
            )),
        },
        (None, Some(true)) => match &about.standby {
            Some(standby) => agent(standby, about.isolated).await,
            None => Seen::NotLookedAt(NO_AGENT.to_owned()),
        },
        (None, _) => Seen::Well("nothing to look at".to_owned()),
    }
}

/// Why an agent is not asked.
const NO_AGENT: &str = "it has no channel to a guest agent";

/// Does the agent of what runs here of a guest, or of its test, answer?
pub(super) async fn agent(standby: &Standby, tested: bool) -> Seen {
    let channel = match standby.agent(tested).await {
        Ok(Some(channel)) => channel,
        Ok(None) => return Seen::NotLookedAt(NO_AGENT.to_owned()),
        Err(why) => return Seen::NotYet(why),
    };
    let asked = crate::work::spawn_blocking(move || {
        Agent::connect(&channel, LOOK).and_then(|mut agent| agent.ping())
    });
    match asked.await {
        Ok(Ok(())) => Seen::Well("the guest agent answers".to_owned()),
        Ok(Err(error)) => Seen::NotYet(error.to_string()),
        Err(error) => Seen::NotYet(error.to_string()),
    }
}

/// Does somebody accept there? What was seen, or why not.
pub(super) async fn tcp(place: &str) -> Result<String, String> {
    match tokio::time::timeout(LOOK, tokio::net::TcpStream::connect(place)).await {
        Ok(Ok(_)) => Ok(format!("tcp {place} accepts")),
        Ok(Err(error)) => Err(format!("tcp {place}: {error}")),
        Err(_) => Err(format!("tcp {place}: nobody accepted within {LOOK:?}")),
    }
}

/// Does it answer with a status from 200 to 399? What was seen, or why not.
pub(super) async fn http(url: &str) -> Result<String, String> {
    let asked = Call {
        method: "GET",
        url,
        timeout: LOOK,
        ..Call::default()
    };
    match call(&asked)
        .await
        .map_err(|error| format!("http {error}"))?
    {
        status @ 200..=399 => Ok(format!("http {url}: {status}")),
        status => Err(format!("http {url}: status {status}")),
    }
}

/// Runs a program of this site to its end; well when that is status 0.
async fn ends_well(about: &About, run: &[String]) -> Result<(), ProgramError> {
    let addresses = match about.isolated {
        true => "",
        false => &about.addresses,
    };
    let told = [
        ("FARHAVEN_GUEST", about.guest.as_str()),
        ("FARHAVEN_GROUP", &about.group),
        ("FARHAVEN_MODE", about.mode),
        ("FARHAVEN_ADDRESSES", addresses),
    ];
    program::run(run, &told, LeftBehind::Ends, KEPT)
        .await
        .map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut Health)) -> BTreeMap<String, Health> {
        let mut health = Health {
            every: "20ms".parse().unwrap(),
            timeout: "300ms".parse().unwrap(),
            ..Health::default()
        };
        change(&mut health);
        BTreeMap::from([("it".to_owned(), health)])
    }

    fn shell(script: &str) -> Option<Vec<String>> {
        Some(["/bin/sh", "-c", script].map(str::to_owned).to_vec())
    }

    async fn outcome(about: &About, health: &BTreeMap<String, Health>) -> (CheckOutcome, String) {
        let view = healthy(about, health, || true).await.remove(0);
        (view.outcome, view.seen)
    }

    #[tokio::test]
    async fn a_port_is_healthy_once_somebody_accepts() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = listener.local_addr().unwrap().to_string();
        let tcp = check(|h| h.tcp = Some(place.clone()));
        let about = About::default();
        assert_eq!(outcome(&about, &tcp).await.0, CheckOutcome::Passed);
        let isolated = About {
            isolated: true,
            ..About::default()
        };
        assert_eq!(outcome(&isolated, &tcp).await.0, CheckOutcome::NotLookedAt);
        drop(listener);
        let (failed, seen) = outcome(&about, &tcp).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(
            seen.contains("not within 300ms") && seen.contains(&place),
            "{seen}"
        );
    }

    #[tokio::test]
    async fn programs_run_only_by_this_sites_own_word_and_are_ended_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tries");
        let script = format!(
            "echo \"$FARHAVEN_GUEST $FARHAVEN_MODE $FARHAVEN_ADDRESSES\" >> {0}; test $(wc -l < {0}) -ge 3",
            file.display()
        );
        let third_time = check(|h| {
            h.script = shell(&script);
            h.timeout = "30s".parse().unwrap();
        });
        let mut about = About {
            guest: "db".to_owned(),
            mode: "failover",
            addresses: "10.8.0.5/24 fd00::5/64".to_owned(),
            ..About::default()
        };
        let (failed, seen) = outcome(&about, &third_time).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(seen.contains("site.policy_files"), "{seen}");
        assert!(!file.exists(), "it did not run");
        about.own_programs.push("it".to_owned());
        assert_eq!(outcome(&about, &third_time).await.0, CheckOutcome::Passed);
        let tries = std::fs::read_to_string(&file).unwrap();
        assert_eq!(tries, "db failover 10.8.0.5/24 fd00::5/64\n".repeat(3));
        let fails = check(|h| h.script = shell("echo no database >&2; exit 3"));
        let (failed, seen) = outcome(&about, &fails).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(seen.contains("no database"), "{seen}");
    }

    #[tokio::test]
    async fn what_a_program_left_behind_does_not_hold_its_check() {
        let health = check(|h| h.script = shell("sleep 1000 & echo up >&2"));
        let about = About {
            own_programs: vec!["it".to_owned()],
            ..About::default()
        };
        let view = healthy(&about, &health, || true).await.remove(0);
        assert_eq!(view.outcome, CheckOutcome::Passed, "{view:?}");
    }

    #[tokio::test]
    async fn a_guest_without_an_agent_keeps_nobody_waiting() {
        let agent = check(|h| {
            h.agent = Some(true);
            h.timeout = "1h".parse().unwrap();
        });
        let (failed, seen) = outcome(&About::default(), &agent).await;
        assert_eq!(failed, CheckOutcome::NotLookedAt);
        assert!(seen.contains("no channel to a guest agent"), "{seen}");
        // Nor does who does not wait any more.
        let mut never = check(|h| h.script = shell("exit 1"));
        never
            .values_mut()
            .for_each(|h| h.timeout = "1h".parse().unwrap());
        let about = About {
            own_programs: vec!["it".to_owned()],
            ..About::default()
        };
        let view = healthy(&about, &never, || false).await.remove(0);
        assert_eq!(view.outcome, CheckOutcome::Failed);
    }
}
