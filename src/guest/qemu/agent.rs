//! The guest agent (`qemu-guest-agent`), through the virtio-serial channel that
//! QEMU gives it: whether it answers, and freezing and thawing filesystems.
//!
//! One JSON object a line over a unix socket, as QMP, but without a greeting, and
//! with no word from a channel whose guest has no agent: everything that is asked
//! has a deadline. What an earlier client left unread is passed over by
//! `guest-sync-delimited`. The guest is not trusted: what it says is bounded.
//! Protocol: QEMU documentation, "QEMU Guest Agent Protocol Reference".

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::check::Finding;
use super::definition::Definition;
use super::options::Argument;
use super::qmp::{Qmp, QmpError};

/// What a virtio-serial port is called that leads to an agent.
pub const PORT: &str = "org.qemu.guest_agent.0";
/// Longest line taken of a guest.
const LONGEST_LINE: usize = 64 * 1024;
/// Most of a refusal's words that are told.
const MOST_WORDS: usize = 300;
/// Before an answer that follows whatever was left unread.
const DELIMITER: u8 = 0xff;
/// One try to thaw takes no longer.
const THAW: Duration = Duration::from_secs(5);
/// A check of a guest waits so long for its agent.
const LOOK: Duration = Duration::from_secs(2);

/// What can go wrong with an agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No socket there, or nobody listens.
    #[error("the guest agent's channel {path} cannot be reached: {source}. Is the guest running?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// QEMU serves one client at a time.
    #[error(
        "another program holds the guest agent's channel {path}; give the guest a channel that only Farhaven uses"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// Nothing came in time.
    #[error(
        "the guest agent at {path} did not answer {command} within {after:?}: it does not run in the guest (systemctl start qemu-guest-agent), is held up there, or another program holds its channel"
    )]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// The command under way.
        command: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The connection broke.
    #[error("the guest agent's channel {path} closed during {command}: {why}")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command under way.
        command: &'static str,
        /// How that showed.
        why: String,
    },
    /// No answer of an agent.
    #[error("what answers {command} at {path} is no guest agent: {why}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// The command under way.
        command: &'static str,
        /// What was wrong.
        why: &'static str,
    },
    /// The agent said no.
    #[error("the guest agent refused {command}: {why}")]
    Refused {
        /// The command under way.
        command: &'static str,
        /// Its words.
        why: String,
    },
}

/// The character device behind the port of an agent that a command line names.
pub fn port(arguments: &[Argument]) -> Option<String> {
    arguments.iter().find_map(|argument| {
        if argument.option != "device" {
            return None;
        }
        let keys = argument.keys("driver");
        let is_port = keys.value("name") == Some(PORT);
        is_port.then(|| keys.value("chardev").map(str::to_owned))?
    })
}

/// The socket of that channel, as the command line writes it; `None` also when
/// the channel is no socket that QEMU listens on.
pub fn channel(arguments: &[Argument]) -> Option<String> {
    let port = port(arguments)?;
    arguments.iter().find_map(|argument| {
        if argument.option != "chardev" {
            return None;
        }
        let keys = argument.keys("backend");
        let is_it = keys.value("id") == Some(&port)
            && keys.value("backend") == Some("socket")
            && keys.on("server");
        is_it.then(|| keys.value("path").map(str::to_owned))?
    })
}

impl Definition {
    /// Where a guest that was launched from this in that run directory has the
    /// channel to its agent; `None` when it has none.
    pub fn agent(&self, run: &Path) -> Option<PathBuf> {
        let path = channel(&self.arguments)?;
        Some(match path.strip_prefix("{run}/") {
            Some(name) => run.join(name),
            None => PathBuf::from(path),
        })
    }
}

/// Where a running QEMU listens for clients of its guest's agent, whose port has
/// this character device.
///
/// # Errors
/// When QEMU does not answer.
pub fn at_qemu(qmp: &mut Qmp, port: &str) -> Result<Option<PathBuf>, QmpError> {
    let listed = qmp.execute("query-chardev", json!({}))?;
    let mut listed = listed.as_array().into_iter().flatten();
    let found = listed.find(|device| device["label"] == port);
    let name = found.and_then(|device| device["filename"].as_str());
    let Some(path) = name.and_then(socket_of) else {
        return Ok(None);
    };
    let path = PathBuf::from(path);
    if path.is_absolute() {
        return Ok(Some(path));
    }
    // As QEMU's process sees it.
    let directory = qmp
        .pid()
        .and_then(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")));
    Ok(directory.ok().map(|directory| directory.join(path)))
}

/// The path in what QEMU calls a listening socket: `unix:PATH,server=on`, and
/// `disconnected:` before it while nobody is connected.
fn socket_of(name: &str) -> Option<&str> {
    let name = name.strip_prefix("disconnected:").unwrap_or(name);
    let path = name.strip_prefix("unix:")?.strip_suffix(",server=on")?;
    (!path.contains(",abstract=on")).then_some(path)
}

/// What is the matter with the agent of a guest that has a port for one, asked
/// while nobody else does.
///
/// # Errors
/// When QEMU does not answer.
pub fn finding(qmp: &mut Qmp, arguments: &[Argument]) -> Result<Option<Finding>, QmpError> {
    let Some(port) = port(arguments) else {
        return Ok(None);
    };
    let Some(path) = at_qemu(qmp, &port)? else {
        return Ok(Some(Finding::warns(
            "agent-channel",
            "the guest agent's channel is no socket that QEMU listens on, so the agent is not asked: every point is crash-consistent",
            format!("-chardev socket,id={port},path=/run/NAME.agent,server=on,wait=off"),
        )));
    };
    let asked = Agent::connect(&path, LOOK).and_then(|mut agent| agent.ping());
    Ok(asked.err().map(|error| {
        Finding::warns(
            "agent-silent",
            format!("{error}; points are crash-consistent while that is so"),
            "in the guest: apt-get install qemu-guest-agent, or dnf install qemu-guest-agent; and let nobody else use its channel",
        )
    }))
}

/// A connection to an agent that answers.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    stream: UnixStream,
    within: Duration,
    deadline: Instant,
}

impl Agent {
    /// Connects, and makes sure that somebody answers: all of that within this
    /// time, and what is asked next, too, unless [`Agent::within`] gives it more.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn connect(path: &Path, within: Duration) -> Result<Self, AgentError> {
        let deadline = Instant::now() + within;
        let unreached = |errno: Errno| match errno {
            // The queue of those who wait to be served is full.
            Errno::AGAIN => AgentError::Busy {
                path: path.to_owned(),
            },
            errno => AgentError::Connect {
                path: path.to_owned(),
                source: errno.into(),
            },
        };
        let address = SocketAddrUnix::new(path).map_err(unreached)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(unreached)?;
        rustix::net::connect(&socket, &address).map_err(unreached)?;
        let stream = UnixStream::from(socket);
        let blocks = stream.set_nonblocking(false);
        blocks.map_err(|source| AgentError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let mut agent = Self {
            path: path.to_owned(),
            stream,
            within,
            deadline,
        };
        agent.sync()?;
        Ok(agent)
    }

    /// What is asked from now on is answered within this time, all together.
    pub fn within(&mut self, within: Duration) {
        self.within = within;
        self.deadline = Instant::now() + within;
    }

    /// Does it answer?
    ///
    /// # Errors
    /// When it does not.
    pub fn ping(&mut self) -> Result<(), AgentError> {
        self.execute("guest-ping").map(drop)
    }

    /// Are filesystems of the guest frozen?
    ///
    /// # Errors
    /// When it does not say.
    pub fn is_frozen(&mut self) -> Result<bool, AgentError> {
        let command = "guest-fsfreeze-status";
        match self.execute(command)?.as_str() {
            Some("thawed") => Ok(false),
            Some("frozen") => Ok(true),
            _ => Err(self.odd(command, "it tells neither frozen nor thawed")),
        }
    }

    /// Flushes and freezes all filesystems of the guest; how many.
    ///
    /// # Errors
    /// When it does not say that it did so: they may be frozen all the same, or
    /// come to be so later, if the error is no refusal.
    pub fn freeze(&mut self) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-freeze")
    }

    /// Lets filesystems go that were frozen; how many.
    ///
    /// # Errors
    /// When it does not do so.
    pub fn thaw(&mut self) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-thaw")
    }

    /// Has the guest shut itself down. It says nothing if it does so.
    ///
    /// # Errors
    /// When it refuses, or cannot be told.
    pub fn shut_down(&mut self) -> Result<(), AgentError> {
        match self.execute("guest-shutdown") {
            Ok(_) | Err(AgentError::TimedOut { .. } | AgentError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn count(&mut self, command: &'static str) -> Result<u64, AgentError> {
        let count = self.execute(command)?;
        count
            .as_u64()
            .ok_or_else(|| self.odd(command, "it tells no number of filesystems"))
    }

    /// Passes over what an earlier client left unread.
    fn sync(&mut self) -> Result<(), AgentError> {
        let command = "guest-sync-delimited";
        // Whole in any reader of JSON, whose numbers may have 53 bits.
        let id = rand::random::<u64>() >> 12;
        let mut asked = vec![DELIMITER];
        let sync = json!({"execute": command, "arguments": {"id": id}});
        asked.extend_from_slice(format!("{sync}\n").as_bytes());
        self.send(command, &asked)?;
        loop {
            let line = self.line(command)?;
            if let Ok(Ok(said)) = answer(&line)
                && said.as_u64() == Some(id)
            {
                return Ok(());
            }
        }
    }

    fn execute(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let asked = format!("{}\n", json!({"execute": command}));
        self.send(command, asked.as_bytes())?;
        let line = self.line(command)?;
        match answer(&line) {
            Ok(Ok(said)) => Ok(said),
            Ok(Err(why)) => Err(AgentError::Refused { command, why }),
            Err(why) => Err(self.odd(command, why)),
        }
    }

    fn send(&mut self, command: &'static str, bytes: &[u8]) -> Result<(), AgentError> {
        let sent = left(self.deadline)
            .and_then(|left| self.stream.set_write_timeout(Some(left)))
            .and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|error| self.broken(command, &error))
    }

    /// A line, without its end.
    fn line(&mut self, command: &'static str) -> Result<Vec<u8>, AgentError> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            // Byte by byte: answers are short, and nothing of the next one is taken.
            let read = left(self.deadline)
                .and_then(|left| self.stream.set_read_timeout(Some(left)))
                .and_then(|()| self.stream.read(&mut byte));
            match read {
                Ok(0) => {
                    return Err(self.broken(command, &ErrorKind::UnexpectedEof.into()));
                }
                Ok(_) if byte[0] == b'\n' => return Ok(line),
                Ok(_) if line.len() >= LONGEST_LINE => {
                    return Err(self.odd(command, "its answer does not end"));
                }
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(command, &error)),
            }
        }
    }

    fn broken(&self, command: &'static str, error: &std::io::Error) -> AgentError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => AgentError::TimedOut {
                path: self.path.clone(),
                command,
                after: self.within,
            },
            _ => AgentError::Closed {
                path: self.path.clone(),
                command,
                why: error.to_string(),
            },
        }
    }

    fn odd(&self, command: &'static str, why: &'static str) -> AgentError {
        AgentError::Protocol {
            path: self.path.clone(),
            command,
            why,
        }
    }
}

/// Thaws a guest's filesystems, over and over until its agent says that they are
/// thawed; false when `goes_on` ended that before. Blocks. `first` is a connection
/// that is open still; `tell` hears of each try that failed.
pub fn thaw_until_done(
    channel: &Path,
    first: Option<Agent>,
    goes_on: impl Fn() -> bool,
    mut tell: impl FnMut(&AgentError),
) -> bool {
    const LONGEST_PAUSE: Duration = Duration::from_secs(2);
    let mut open = first;
    let mut pause = Duration::from_millis(20);
    loop {
        let connected = match open.take() {
            Some(agent) => Ok(agent),
            None => Agent::connect(channel, THAW),
        };
        let frozen = connected.and_then(|mut agent| {
            agent.within(THAW);
            agent.thaw()?;
            agent.is_frozen()
        });
        match frozen {
            Ok(false) => return true,
            Ok(true) => {}
            Err(error) => tell(&error),
        }
        if !goes_on() {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Until then; an error when that has passed.
fn left(deadline: Instant) -> std::io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

/// What a line says: a value, or the agent's refusal. What is before a delimiter is left
/// over from before.
fn answer(line: &[u8]) -> Result<Result<Value, String>, &'static str> {
    let from = line.iter().rposition(|byte| *byte == DELIMITER);
    let line = &line[from.map_or(0, |at| at + 1)..];
    let mut said: Value = serde_json::from_slice(line).map_err(|_| "it is no JSON")?;
    if let Some(value) = said.get_mut("return") {
        return Ok(Ok(value.take()));
    }
    let error = said.get("error").ok_or("it is no answer")?;
    let why = error.get("desc").and_then(Value::as_str);
    let why = why.unwrap_or("without a reason").chars().take(MOST_WORDS);
    // For people's terminals and for logs.
    Ok(Err(why
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect()))
}

#[cfg(test)]
mod tests;
