//! The guest agent (`qemu-guest-agent`), through the virtio-serial channel that
//! QEMU gives it: whether it answers, and whether filesystems are frozen.
//!
//! One JSON object a line over a unix socket, as QMP, but without a greeting, and
//! with no word from a channel whose guest has no agent: every answer has a
//! deadline. What an earlier client left unread is passed over by
//! `guest-sync-delimited`. The guest is not trusted: what it says is bounded.
//! Protocol: QEMU documentation, "QEMU Guest Agent Protocol Reference".

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::options::Argument;

/// What a virtio-serial port is called that leads to an agent.
pub const PORT: &str = "org.qemu.guest_agent.0";
/// Longest line taken of a guest.
const LONGEST_LINE: usize = 64 * 1024;
/// Before an answer that follows whatever was left unread.
const DELIMITER: u8 = 0xff;

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
        "the guest agent at {path} did not answer {command} within {after:?}: it does not run in the guest (systemctl start qemu-guest-agent), or another program holds its channel"
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

/// The channel to an agent that a command line names: the path of its socket, as it is
/// written there.
#[must_use]
pub fn channel(arguments: &[Argument]) -> Option<String> {
    let port = arguments.iter().find_map(|argument| {
        let keys = argument.keys("driver");
        let is_port = argument.option == "device" && keys.value("name") == Some(PORT);
        is_port.then(|| keys.value("chardev").map(str::to_owned))?
    })?;
    arguments.iter().find_map(|argument| {
        let keys = argument.keys("backend");
        let is_it = argument.option == "chardev"
            && keys.value("id") == Some(&port)
            && keys.value("backend") == Some("socket")
            && keys.on("server");
        is_it.then(|| keys.value("path").map(str::to_owned))?
    })
}

/// A connection to an agent that answers.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    stream: UnixStream,
    patience: Duration,
}

impl Agent {
    /// Connects, and makes sure that somebody answers. `patience` bounds each answer.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, AgentError> {
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
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
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
            patience,
        };
        agent.sync()?;
        Ok(agent)
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

    /// Lets filesystems go that were frozen; how many.
    ///
    /// # Errors
    /// When it does not do so.
    pub fn thaw(&mut self) -> Result<u64, AgentError> {
        let command = "guest-fsfreeze-thaw";
        let thawed = self.execute(command)?;
        thawed
            .as_u64()
            .ok_or_else(|| self.odd(command, "it tells no number of filesystems"))
    }

    /// Passes over what an earlier client left unread.
    fn sync(&mut self) -> Result<(), AgentError> {
        let command = "guest-sync-delimited";
        // The agent takes 53 bits of it to be safe with any JSON reader.
        let id = rand::random::<u64>() >> 12;
        let deadline = Instant::now() + self.patience;
        let mut asked = vec![DELIMITER];
        asked.extend_from_slice(
            format!("{}\n", json!({"execute": command, "arguments": {"id": id}})).as_bytes(),
        );
        self.send(command, &asked, deadline)?;
        loop {
            let line = self.line(command, deadline)?;
            if let Ok(Ok(said)) = answer(&line)
                && said.as_u64() == Some(id)
            {
                return Ok(());
            }
        }
    }

    fn execute(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let deadline = Instant::now() + self.patience;
        let asked = format!("{}\n", json!({"execute": command}));
        self.send(command, asked.as_bytes(), deadline)?;
        let line = self.line(command, deadline)?;
        match answer(&line) {
            Ok(Ok(said)) => Ok(said),
            Ok(Err(why)) => Err(AgentError::Refused { command, why }),
            Err(why) => Err(self.odd(command, why)),
        }
    }

    fn send(
        &mut self,
        command: &'static str,
        bytes: &[u8],
        deadline: Instant,
    ) -> Result<(), AgentError> {
        let sent = left(deadline)
            .and_then(|left| self.stream.set_write_timeout(Some(left)))
            .and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|error| self.broken(command, error))
    }

    /// A line, without its end.
    fn line(&mut self, command: &'static str, deadline: Instant) -> Result<Vec<u8>, AgentError> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            // Byte by byte: answers are short, and nothing of the next one is taken.
            let read = left(deadline)
                .and_then(|left| self.stream.set_read_timeout(Some(left)))
                .and_then(|()| self.stream.read(&mut byte));
            match read {
                Ok(0) => {
                    return Err(self.broken(command, ErrorKind::UnexpectedEof.into()));
                }
                Ok(_) if byte[0] == b'\n' => return Ok(line),
                Ok(_) if line.len() >= LONGEST_LINE => {
                    return Err(self.odd(command, "its answer does not end"));
                }
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(command, error)),
            }
        }
    }

    fn broken(&self, command: &'static str, error: std::io::Error) -> AgentError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => AgentError::TimedOut {
                path: self.path.clone(),
                command,
                after: self.patience,
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
    let why: String = why.unwrap_or("without a reason").chars().take(300).collect();
    Ok(Err(why))
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
