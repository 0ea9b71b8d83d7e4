//! Is a guest healthy? By the checks that its group's policy file gives it.
//!
//! A check is looked at again and again until it passes or its time is over.
//! Programs run here only if this site's own policy files name them for that
//! very guest: what a peer tells of its groups chooses no program of this host.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use farhaven_policies::files::Health;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::breach::plain;
use crate::call::{Call, call};

/// One look takes no longer; the next one comes after the check's `every`.
const LOOK: Duration = Duration::from_secs(10);

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
#[derive(Debug, Clone, Default)]
pub(super) struct About {
    /// The guest's name.
    pub(super) guest: String,
    /// Its group's.
    pub(super) group: String,
    /// `failover`, `test`, `move` or `rollback`: programs are told.
    pub(super) mode: &'static str,
    /// It is on no network.
    pub(super) isolated: bool,
    /// The checks whose program this site's own policy files name.
    pub(super) own_programs: Vec<String>,
}

/// One look at a check.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Well(String),
    NotYet(String),
    /// Looking again would change nothing.
    Never(String),
    NotLookedAt(String),
}

/// Waits until each check has passed, or its time is over.
pub(super) async fn healthy(about: &About, checks: &BTreeMap<String, Health>) -> Vec<CheckView> {
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

async fn look(about: &About, name: &str, health: &Health) -> Seen {
    let by_network = health.tcp.is_some() || health.http.is_some();
    if by_network && about.isolated {
        return Seen::NotLookedAt("a test is on no network".to_owned());
    }
    if let Some(place) = &health.tcp {
        return match tokio::time::timeout(LOOK, tokio::net::TcpStream::connect(place)).await {
            Ok(Ok(_)) => Seen::Well(format!("tcp {place} accepts")),
            Ok(Err(error)) => Seen::NotYet(format!("tcp {place}: {error}")),
            Err(_) => Seen::NotYet(format!("tcp {place}: nobody accepted within {LOOK:?}")),
        };
    }
    if let Some(url) = &health.http {
        let asked = Call {
            method: "GET",
            url,
            timeout: LOOK,
            ..Call::default()
        };
        return match call(&asked).await {
            Ok(status @ 200..=399) => Seen::Well(format!("http {url}: {status}")),
            Ok(status) => Seen::NotYet(format!("http {url}: status {status}")),
            Err(error) => Seen::NotYet(format!("http {error}")),
        };
    }
    match (&health.script, health.agent) {
        (Some(_), _) if !about.own_programs.iter().any(|own| own == name) => Seen::Never(
            "this site runs no program that only another site's policy files name; put the group's policy file in force here, too (site.policy_files)".to_owned(),
        ),
        (Some(run), _) => match tokio::time::timeout(LOOK, program(about, run)).await {
            Ok(Ok(())) => Seen::Well(format!("{} ended well", run.join(" "))),
            Ok(Err(why)) => Seen::NotYet(why),
            Err(_) => Seen::NotYet(format!(
                "{}: not done within {LOOK:?}, and ended",
                run.join(" ")
            )),
        },
        (None, Some(true)) => Seen::Never(
            "guest agents are not asked by this version; use a tcp, http or script check".to_owned(),
        ),
        (None, _) => Seen::Well("nothing to look at".to_owned()),
    }
}

/// A program and all that it started, ended with the look that runs it.
struct Ended(Option<Pid>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // All of them may have ended by themselves.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs a program of this site to its end; well when that is status 0.
async fn program(about: &About, run: &[String]) -> Result<(), String> {
    let Some((program, arguments)) = run.split_first() else {
        return Err("no program is named".to_owned());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("FARHAVEN_GUEST", &about.guest)
        .env("FARHAVEN_GROUP", &about.group)
        .env("FARHAVEN_MODE", about.mode)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| {
        format!(
            "{program} cannot be run: {error}; it must be on this host, and may be run by the daemon's user"
        )
    })?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let _ended = Ended(pid.and_then(Pid::from_raw));
    let said = child.stderr.take();
    let (status, said) = tokio::join!(child.wait(), beginning(said));
    let status = status.map_err(|e| format!("{program} cannot be waited for: {e}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} ended with {status}: {}", said.trim())),
    }
}

async fn beginning(from: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut from) = from else {
        return String::new();
    };
    let (mut kept, mut read) = (Vec::new(), [0; 4096]);
    while let Ok(bytes @ 1..) = from.read(&mut read).await {
        let room = KEPT.saturating_sub(kept.len()).min(bytes);
        kept.extend_from_slice(&read[..room]);
    }
    String::from_utf8_lossy(&kept).into_owned()
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
        let view = healthy(about, health).await.remove(0);
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
            "echo \"$FARHAVEN_GUEST $FARHAVEN_MODE\" >> {0}; test $(wc -l < {0}) -ge 3",
            file.display()
        );
        let third_time = check(|h| {
            h.script = shell(&script);
            h.timeout = "30s".parse().unwrap();
        });
        let mut about = About {
            guest: "db".to_owned(),
            mode: "failover",
            ..About::default()
        };
        let (failed, seen) = outcome(&about, &third_time).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(seen.contains("site.policy_files"), "{seen}");
        assert!(!file.exists(), "it did not run");
        about.own_programs.push("it".to_owned());
        assert_eq!(outcome(&about, &third_time).await.0, CheckOutcome::Passed);
        let tries = std::fs::read_to_string(&file).unwrap();
        assert_eq!(tries, "db failover\n".repeat(3));
        let fails = check(|h| h.script = shell("echo no database >&2; exit 3"));
        let (failed, seen) = outcome(&about, &fails).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(seen.contains("no database"), "{seen}");
    }

    #[tokio::test]
    async fn an_agent_is_refused_at_once_and_clearly() {
        let agent = check(|h| {
            h.agent = Some(true);
            h.timeout = "1h".parse().unwrap();
        });
        let (failed, seen) = outcome(&About::default(), &agent).await;
        assert_eq!(failed, CheckOutcome::Failed);
        assert!(seen.contains("use a tcp, http or script check"), "{seen}");
    }
}
