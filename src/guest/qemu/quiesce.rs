//! Frozen filesystems for a cut: frozen by the guest's agent within a bounded
//! time, thawed as soon as the guest runs on, whatever became of the cut.
//!
//! A guest whose filesystems stay frozen is as good as dead. So a mark is in the
//! work directory from before the freeze until the agent has said that they are
//! thawed; whoever attaches next, or lets a held guest go on, thaws by it. It is
//! done by a thread of its own that tries until it is done, and nobody waits for
//! it but the next freeze. A freeze whose answer did not come in time may be done
//! late: it is thawed, too.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::Quiesced;
use super::agent::{Agent, AgentError, thaw_until_done};
use super::attach::HELD_MARK;
use super::throttle::lives;

/// In the work directory while filesystems are frozen, or may be.
pub(super) const FROZEN_MARK: &str = "frozen";

/// How long filesystems may stay frozen before that is told.
const REMARKABLE: Duration = Duration::from_secs(2);

/// What freezes one guest's filesystems.
pub(super) struct Quiesce {
    name: String,
    work_dir: PathBuf,
    /// `None` when the guest has none.
    channel: Option<PathBuf>,
    /// QEMU's process: when it has ended nothing is frozen any more.
    process: Option<(u32, String)>,
    /// Asked of the next cuts.
    pub(super) within: Option<Duration>,
    /// Frozen, by this connection.
    frozen: Option<Agent>,
    /// They are frozen or may be, and nobody thaws them yet.
    owed: bool,
    thawing: Option<JoinHandle<()>>,
}

impl Quiesce {
    /// Of a guest that was attached to just now.
    pub(super) fn new(
        name: &str,
        work_dir: &Path,
        channel: Option<PathBuf>,
        process: Option<(u32, String)>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            work_dir: work_dir.to_owned(),
            owed: mark(work_dir).exists(),
            channel,
            process,
            within: None,
            frozen: None,
            thawing: None,
        }
    }

    /// Does the agent answer?
    pub(super) fn ask(&self, within: Duration) -> Result<(), String> {
        let asked = Agent::connect(self.channel()?, within).and_then(|mut agent| agent.ping());
        asked.map_err(|error| error.to_string())
    }

    /// Has the agent shut the guest down; false when it has none that answers.
    pub(super) fn shut_down(&self, within: Duration) -> bool {
        let Some(channel) = &self.channel else {
            return false;
        };
        let told = Agent::connect(channel, within).and_then(|mut agent| {
            agent.within(within);
            agent.shut_down()
        });
        if let Err(error) = &told {
            tracing::info!(guest = %self.name, %error, "its agent does not shut it down; its power button is pressed");
        }
        told.is_ok()
    }

    /// Freezes, if that is asked. Takes no longer than was allowed.
    pub(super) fn freeze(&mut self) -> Quiesced {
        let Some(within) = self.within else {
            return Quiesced::NotAsked;
        };
        match self.try_freeze(within) {
            Ok(filesystems) => Quiesced::Frozen { filesystems },
            Err(why) => {
                self.thaw();
                Quiesced::Failed(why)
            }
        }
    }

    fn channel(&self) -> Result<&Path, String> {
        self.channel.as_deref().ok_or_else(|| {
            format!(
                "QEMU has no channel to a guest agent that can be reached (see farhaven guest check {})",
                self.name
            )
        })
    }

    fn try_freeze(&mut self, within: Duration) -> Result<u64, String> {
        let deadline = Instant::now() + within;
        let channel = self.channel()?.to_owned();
        while self.thawing.as_ref().is_some_and(|it| !it.is_finished()) {
            if Instant::now() >= deadline {
                return Err(
                    "its filesystems were frozen for an earlier cut, and its agent has not thawed them yet"
                        .to_owned(),
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.thawing = None;
        let words = |error: AgentError| error.to_string();
        let left = deadline.saturating_duration_since(Instant::now());
        let mut agent = Agent::connect(&channel, left).map_err(words)?;
        if agent.is_frozen().map_err(words)? {
            // Not ours to thaw.
            return Err("another program has frozen its filesystems".to_owned());
        }
        let marked = std::fs::File::create(mark(&self.work_dir));
        marked.map_err(|error| format!("that they are frozen cannot be written down: {error}"))?;
        self.owed = true;
        match agent.freeze().map_err(words)? {
            0 => Err("its agent froze no filesystem".to_owned()),
            filesystems => {
                self.frozen = Some(agent);
                Ok(filesystems)
            }
        }
    }

    /// The guest runs on: what was frozen is thawed. Nobody waits for that.
    pub(super) fn thaw(&mut self) {
        if !std::mem::take(&mut self.owed) {
            return;
        }
        let first = self.frozen.take();
        let Some(channel) = self.channel.clone() else {
            tracing::error!(guest = %self.name, "its filesystems may be frozen, and it has no channel to its agent any more; thaw them inside of the guest: fsfreeze --unfreeze MOUNTPOINT");
            return;
        };
        let (name, work_dir, process) = (
            self.name.clone(),
            self.work_dir.clone(),
            self.process.clone(),
        );
        let thawing = std::thread::Builder::new()
            .name("thaw".to_owned())
            .spawn(move || thaw(&name, &channel, &work_dir, process.as_ref(), first));
        match thawing {
            Ok(thawing) => self.thawing = Some(thawing),
            // Tried again with the next cut, or the next attach.
            Err(error) => {
                self.owed = true;
                tracing::error!(guest = %self.name, %error, "its filesystems could not be thawed yet");
            }
        }
    }
}

fn mark(work_dir: &Path) -> PathBuf {
    work_dir.join(FROZEN_MARK)
}

fn thaw(
    name: &str,
    channel: &Path,
    work_dir: &Path,
    process: Option<&(u32, String)>,
    first: Option<Agent>,
) {
    let began = Instant::now();
    let mut told = false;
    // A guest that is stopped again answers nothing; whoever resumes it thaws it.
    let goes_on = || lives(process) && !work_dir.join(HELD_MARK).exists();
    let done = thaw_until_done(channel, first, goes_on, |error| {
        if !told && began.elapsed() >= REMARKABLE {
            told = true;
            tracing::error!(guest = name, %error, "its filesystems are FROZEN still; it is tried on. By hand, inside of the guest: fsfreeze --unfreeze MOUNTPOINT");
        }
    });
    if done {
        let _ = std::fs::remove_file(mark(work_dir));
        if told {
            tracing::info!(guest = name, "its filesystems are thawed");
        }
    }
}

#[cfg(test)]
mod tests;
