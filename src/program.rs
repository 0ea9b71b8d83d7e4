//! Programs of this host, run because an operator's file names them: what they
//! print is bounded, and they end with whoever waits for them.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

/// How long the last words of a program are waited for once it has ended:
/// what it left behind may hold its output open for ever.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What becomes of processes that a program started and left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeftBehind {
    /// They stay where it ended well: a hook may start something.
    Stays,
    /// They end with it.
    Ends,
}

/// Why a program did not end well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    /// The command is empty. Nothing was begun.
    #[error("no program is named")]
    Unnamed,
    /// It could not be started. Nothing was begun.
    #[error("{0} cannot be run: {1}; it must be on this host, and may be run by the daemon's user")]
    Start(String, #[source] io::Error),
    /// The system does not tell how it ended.
    #[error("{0} cannot be waited for: {1}")]
    Wait(String, #[source] io::Error),
    /// It ended with another status than 0; with what it said.
    #[error("{0} ended with {1}: {2}")]
    Failed(String, ExitStatus, String),
}

/// A program and all that it started, ended with whoever waits for it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // All of them may have ended by themselves.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs a program to its end, with `told` in its environment. Returns the
/// beginning of what it printed, `kept` bytes of either stream.
///
/// # Errors
/// See [`ProgramError`].
pub(crate) async fn run(
    command: &[String],
    told: &[(&str, &str)],
    left_behind: LeftBehind,
    kept: usize,
) -> Result<String, ProgramError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(ProgramError::Unnamed);
    };
    let child = Command::new(program)
        .args(arguments)
        .envs(told.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| ProgramError::Start(program.clone(), error))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut group = Group(pid.and_then(Pid::from_raw));
    let (status, said) = to_its_end(child, kept)
        .await
        .map_err(|error| ProgramError::Wait(program.clone(), error))?;
    if !status.success() {
        return Err(ProgramError::Failed(program.clone(), status, said));
    }
    if left_behind == LeftBehind::Stays {
        group.0 = None;
    }
    Ok(said)
}

async fn to_its_end(mut child: Child, kept: usize) -> io::Result<(ExitStatus, String)> {
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (mut told, mut complained) = (Vec::new(), Vec::new());
    let status = {
        let reading = async {
            tokio::join!(
                beginning(out, kept, &mut told),
                beginning(err, kept, &mut complained)
            );
        };
        tokio::pin!(reading);
        let mut is_read = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status?,
                () = &mut reading, if !is_read => is_read = true,
            }
        };
        if !is_read {
            let _ = tokio::time::timeout(LAST_WORDS, reading).await;
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
async fn beginning(from: Option<impl AsyncRead + Unpin>, most: usize, kept: &mut Vec<u8>) {
    let Some(mut from) = from else {
        return;
    };
    let mut read = [0; 4096];
    while let Ok(bytes @ 1..) = from.read(&mut read).await {
        let room = most.saturating_sub(kept.len()).min(bytes);
        kept.extend_from_slice(&read[..room]);
    }
}
