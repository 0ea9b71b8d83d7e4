//! What reaches outside of the sites: programs and calls, bounded and ended
//! with the step.

use std::time::Duration;

use crate::call::{Call, call};
use crate::program::{self, LeftBehind, ProgramError};
use crate::runbook::perform::{Called, Ended, Executed, Failure, Scope};

/// So much of what a program prints is kept; the rest is read and dropped.
const KEPT: usize = 3 << 10;
/// A call that is not ended by its step before is ended then.
const LONGEST_CALL: Duration = Duration::from_secs(24 * 3600);

/// Runs a program of the site to its end.
pub(super) async fn exec(scope: &Scope, run: &[String]) -> Ended<Executed> {
    let told = [
        ("FARHAVEN_KEY", scope.key.as_str()),
        ("FARHAVEN_RUN", &scope.run),
        ("FARHAVEN_MODE", scope.mode.word()),
        ("FARHAVEN_STEP", &scope.step),
    ];
    match program::run(run, &told, LeftBehind::Stays, KEPT).await {
        Ok(said) => Ok(Executed { said }),
        Err(error @ (ProgramError::Unnamed | ProgramError::Start(..))) => {
            Err(Failure::clean(error.to_string()))
        }
        Err(error) => Err(Failure::fault(error.to_string())),
    }
}

/// Calls a URL; a status from 200 to 299 is well.
pub(super) async fn webhook(
    scope: &Scope,
    url: &str,
    method: &'static str,
    body: &str,
) -> Ended<Called> {
    let kind = match body.trim_start().starts_with(['{', '[']) {
        true => "application/json",
        false => "text/plain; charset=utf-8",
    };
    let headers = [
        ("idempotency-key", scope.key.as_str()),
        ("content-type", kind),
    ];
    let asked = Call {
        method,
        url,
        headers: &headers,
        body,
        timeout: LONGEST_CALL,
    };
    match call(&asked).await {
        Ok(status @ 200..=299) => Ok(Called { status }),
        Ok(status) => Err(Failure::fault(format!(
            "{url} answered with status {status}"
        ))),
        Err(error @ (crate::call::CallError::Url(..) | crate::call::CallError::Connect(..))) => {
            Err(Failure::clean(error.to_string()))
        }
        Err(error) => Err(Failure::fault(error.to_string())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use farhaven_policies::runbook::Mode;
    use farhaven_policies::runbook::run::Cause;

    fn scope() -> Scope {
        Scope {
            run: "r".to_owned(),
            mode: Mode::Unplanned,
            step: "dns".to_owned(),
            groups: Default::default(),
            key: "r/dns".to_owned(),
            attempt: 1,
            timeout: None,
        }
    }

    fn shell(script: &str) -> Vec<String> {
        ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
    }

    #[tokio::test]
    async fn what_a_program_says_and_how_it_ends() {
        let said = exec(&scope(), &shell("echo $FARHAVEN_KEY $FARHAVEN_MODE")).await;
        assert_eq!(said.unwrap().said, "r/dns unplanned");
        let failed = exec(&scope(), &shell("echo no >&2; exit 3"))
            .await
            .unwrap_err();
        assert!(failed.why.contains("exit status: 3: no"), "{failed}");
        let none = exec(&scope(), &["/nowhere/dns".to_owned()]).await;
        assert_eq!(none.unwrap_err().cause, Cause::Clean);
        let much = exec(&scope(), &shell("yes | head -c 3000000"))
            .await
            .unwrap();
        assert!(much.said.len() <= KEPT);
        // It leaves something behind that holds its output.
        let left = exec(&scope(), &shell("sleep 5 & echo done")).await.unwrap();
        assert_eq!(left.said, "done");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended_with_all_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let run = shell(&script);
        let scope = scope();
        let mut hanging = Box::pin(exec(&scope, &run));
        let pid = loop {
            tokio::select! {
                _ = &mut hanging => panic!("it ended"),
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if let Ok(pid) = text.trim().parse::<u32>() {
                break pid;
            }
        };
        drop(hanging);
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z")
        };
        for _ in 0..500 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("its child lives");
    }
}
