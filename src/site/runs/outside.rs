//! What reaches outside of the sites: programs and calls, bounded and ended
//! with the step.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::call::{Call, call};
use crate::runbook::perform::{Called, Ended, Executed, Failure, Scope};

/// So much of what a program prints is kept; the rest is read and dropped.
const KEPT: usize = 3 << 10;
/// A call that is not ended by its step before is ended then.
const LONGEST_CALL: Duration = Duration::from_secs(24 * 3600);

/// A program and all that it started, ended with the step that runs it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // All of them may have ended by themselves.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs a program of the site to its end.
pub(super) async fn exec(scope: &Scope, run: &[String]) -> Ended<Executed> {
    let Some((program, arguments)) = run.split_first() else {
        return Err(Failure::clean("no program is named"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("FARHAVEN_KEY", &scope.key)
        .env("FARHAVEN_RUN", &scope.run)
        .env("FARHAVEN_MODE", scope.mode.word())
        .env("FARHAVEN_STEP", &scope.step)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let child = command.spawn().map_err(|error| {
        Failure::clean(format!(
            "{program} cannot be run: {error}; it must be on this host, and may be run by the daemon's user"
        ))
    })?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut group = Group(pid.and_then(Pid::from_raw));
    let (status, said) = to_its_end(child).await?;
    match status.success() {
        true => {
            // What it left in the background may stay: a hook may start something.
            group.0 = None;
            Ok(Executed { said })
        }
        false => Err(Failure::fault(format!(
            "{program} ended with {status}: {said}"
        ))),
    }
}

async fn to_its_end(mut child: Child) -> Ended<(std::process::ExitStatus, String)> {
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let failed =
        |error: std::io::Error| Failure::fault(format!("it cannot be waited for: {error}"));
    let (mut told, mut complained) = (Vec::new(), Vec::new());
    let status = {
        let reading = async {
            tokio::join!(beginning(out, &mut told), beginning(err, &mut complained));
        };
        tokio::pin!(reading);
        let mut is_read = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status.map_err(failed)?,
                () = &mut reading, if !is_read => is_read = true,
            }
        };
        // What it started and left behind may hold its output open for ever.
        if !is_read {
            let _ = tokio::time::timeout(Duration::from_millis(200), reading).await;
        }
        status
    };
    let (out, err) = (
        String::from_utf8_lossy(&told),
        String::from_utf8_lossy(&complained),
    );
    let said = [out.trim(), err.trim()];
    let said: Vec<&str> = said.into_iter().filter(|text| !text.is_empty()).collect();
    Ok((status, said.join("\n")))
}

/// Reads to the end; what is kept of it is there also when nobody waits for that.
async fn beginning(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut from) = from else {
        return;
    };
    let mut read = [0; 4096];
    while let Ok(bytes @ 1..) = from.read(&mut read).await {
        let room = KEPT.saturating_sub(kept.len()).min(bytes);
        kept.extend_from_slice(&read[..room]);
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
