//! QMP, QEMU's machine protocol: one JSON object a line over a unix socket.
//!
//! Blocking, with a deadline on every reply. Replies stay `serde_json` values:
//! we talk to QEMU 7.2 and to what comes after it, and must not fail on an
//! enumeration value that a newer one adds.
//! Protocol: QEMU documentation, "QEMU Machine Protocol Specification".

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Longest reply line taken. `qom-list` and `query-qmp-schema` of QEMU 10 stay under 1 MiB;
/// parsed, a line may take sixteen times its length.
const MAX_LINE: u64 = 4 << 20;

/// Most events that are kept, and most bytes of their lines.
const EVENTS: usize = 1024;
const EVENT_BYTES: usize = 1 << 20;

/// What can go wrong on a QMP socket.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No socket there, or nobody listens.
    #[error(
        "cannot reach QEMU at {path}: {source}. Is the guest running, and is this its -qmp socket?"
    )]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// QEMU serves one QMP client at a time.
    #[error(
        "QEMU at {path} does not greet: another QMP client holds the socket. Give QEMU a second one for Farhaven (-qmp unix:PATH2,server=on,wait=off)"
    )]
    Busy {
        /// The socket's path.
        path: PathBuf,
    },
    /// The connection ended: usually QEMU did.
    #[error(
        "QEMU closed its QMP socket {path} during {command}: the guest has ended or QEMU crashed"
    )]
    Closed {
        /// The socket's path.
        path: PathBuf,
        /// The command under way.
        command: String,
    },
    /// No reply in time.
    #[error("QEMU at {path} did not answer {command} within {after:?}; it may be stuck on storage")]
    TimedOut {
        /// The socket's path.
        path: PathBuf,
        /// The command under way.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// Not QMP.
    #[error("{path} does not speak QMP ({why}); name the socket of QEMU's -qmp option")]
    Protocol {
        /// The socket's path.
        path: PathBuf,
        /// What was wrong.
        why: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
}

/// A connection to one QEMU. A clone is the same connection: each command and
/// its reply go as a whole, whichever thread they come from.
#[derive(Clone)]
pub struct Qmp {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
}

impl Qmp {
    /// Connects and negotiates. `timeout` bounds the greeting and every later reply.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::Busy`], [`QmpError::Protocol`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        Ok(Self {
            path: path.to_owned(),
            connection: Arc::new(Mutex::new(Connection::open(path, timeout)?)),
        })
    }

    /// Gives the connection up and makes a new one. The old one ends first:
    /// QEMU serves one client at a time.
    ///
    /// # Errors
    /// As for [`Qmp::connect`].
    pub fn reconnect(&mut self, timeout: Duration) -> Result<(), QmpError> {
        let mut connection = self.connection();
        let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        let mut fresh = Connection::open(&self.path, timeout)?;
        fresh.timeout = connection.timeout;
        *connection = fresh;
        Ok(())
    }

    /// QEMU's version: major, minor, micro.
    pub fn version(&self) -> (u64, u64, u64) {
        self.connection().version
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process that listens on the socket, as the kernel tells it.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn pid(&self) -> std::io::Result<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(self.connection().stream.as_fd())?;
        Ok(credentials.pid.as_raw_nonzero().get().unsigned_abs())
    }

    /// Runs a command and returns its `return` value. Events that arrive
    /// meanwhile are kept for [`Qmp::take_event`].
    ///
    /// # Errors
    /// Every variant of [`QmpError`] but `Connect` and `Busy`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.connection().execute(command, &arguments)
    }

    /// Takes the oldest kept event of that name, without waiting.
    pub fn take_event(&mut self, name: &str) -> Option<Value> {
        let mut connection = self.connection();
        connection.take_event(|event| event["event"] == name)
    }

    /// Waits for an event of that name whose `data` satisfies `wanted`.
    ///
    /// # Errors
    /// [`QmpError::TimedOut`] after `timeout`, or the connection's end.
    pub fn wait_event(
        &mut self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QmpError> {
        self.connection().wait_event(name, timeout, wanted)
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // Whoever panicked in a command left at worst an unread reply, which is skipped by its id.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An event that nobody has asked for yet.
struct Kept {
    event: Value,
    /// Of its line.
    bytes: usize,
}

struct Connection {
    path: PathBuf,
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    events: VecDeque<Kept>,
    event_bytes: usize,
    timeout: Duration,
    version: (u64, u64, u64),
    commands: u64,
}

impl Connection {
    fn open(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let failed = |source| QmpError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        // No other client of this QEMU has counted from here.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let first = now.map_or(0, |now| now.as_nanos() as u64);
        Self::over(stream, path, timeout, first)
    }

    /// Negotiates over a connected socket; commands are counted from `commands`.
    fn over(
        stream: UnixStream,
        path: &Path,
        timeout: Duration,
        commands: u64,
    ) -> Result<Self, QmpError> {
        let reader = stream.try_clone().map_err(|source| QmpError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let mut qmp = Self {
            path: path.to_owned(),
            stream,
            reader: BufReader::new(reader),
            events: VecDeque::new(),
            event_bytes: 0,
            timeout,
            version: (0, 0, 0),
            commands,
        };
        let greeting = qmp.greeting(timeout)?;
        let version = &greeting["QMP"]["version"]["qemu"];
        let part = |name: &str| version[name].as_u64();
        qmp.version = match (part("major"), part("minor"), part("micro")) {
            (Some(major), Some(minor), Some(micro)) => (major, minor, micro),
            _ => return Err(qmp.protocol("its first line is no QMP greeting")),
        };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// What QEMU begins with. It does not tell its clients apart: events and replies
    /// for the one before, when that has just left, may come ahead of it.
    fn greeting(&mut self, timeout: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + timeout;
        loop {
            let line = match self.line("the greeting", deadline) {
                Err(QmpError::TimedOut { .. }) => {
                    return Err(QmpError::Busy {
                        path: self.path.clone(),
                    });
                }
                other => other?.0,
            };
            if !["event", "return", "error"]
                .iter()
                .any(|key| line.get(key).is_some())
            {
                return Ok(line);
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        // The id ties a reply to its command: the late answer to a command that timed
        // out, or to one of the client before, must not pass for the answer to this one.
        self.commands += 1;
        let id = self.commands;
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        if let Err(error) = self.stream.write_all(line.as_bytes()) {
            return Err(self.io(command, &error));
        }
        let deadline = Instant::now() + self.timeout;
        loop {
            let (mut reply, bytes) = self.line(command, deadline)?;
            if reply.get("event").is_some() {
                self.keep(reply, bytes);
            } else if reply
                .get("id")
                .and_then(Value::as_u64)
                .is_some_and(|answered| answered != id)
            {
                tracing::debug!(command, "skipped the late reply to an earlier command");
            } else if let Some(error) = reply.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                });
            } else if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(self.protocol("a line is neither reply, error nor event"));
            }
        }
    }

    fn wait_event(
        &mut self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, QmpError> {
        if let Some(event) = self.take_event(|e| e["event"] == name && wanted(&e["data"])) {
            return Ok(event);
        }
        let deadline = Instant::now() + timeout;
        loop {
            let (line, bytes) = self.line(name, deadline)?;
            if line["event"] == name && wanted(&line["data"]) {
                return Ok(line);
            }
            self.keep(line, bytes);
        }
    }

    /// A guest that raises events endlessly must not grow us: the oldest go.
    fn keep(&mut self, event: Value, bytes: usize) {
        self.events.push_back(Kept { event, bytes });
        self.event_bytes += bytes;
        while self.events.len() > EVENTS || self.event_bytes > EVENT_BYTES {
            let Some(oldest) = self.events.pop_front() else {
                break;
            };
            self.event_bytes -= oldest.bytes;
        }
    }

    fn take_event(&mut self, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
        let at = self.events.iter().position(|kept| wanted(&kept.event))?;
        let taken = self.events.remove(at)?;
        self.event_bytes -= taken.bytes;
        Some(taken.event)
    }

    /// The next line, and how long it was.
    fn line(&mut self, command: &str, deadline: Instant) -> Result<(Value, usize), QmpError> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::TimedOut {
                    path: self.path.clone(),
                    command: command.to_owned(),
                    after: self.timeout,
                });
            }
            self.stream
                .set_read_timeout(Some(left))
                .map_err(|e| self.io(command, &e))?;
            let allowed = MAX_LINE.saturating_sub(line.len() as u64);
            if allowed == 0 {
                return Err(self.protocol("a line is longer than 4 MiB"));
            }
            let mut limited = std::io::Read::take(&mut self.reader, allowed);
            match limited.read_until(b'\n', &mut line) {
                Ok(0) => return Err(self.closed(command)),
                Ok(_) if line.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(e) => return Err(self.io(command, &e)),
            }
        }
        let value = serde_json::from_slice(&line);
        let value = value.map_err(|e| self.protocol(&format!("not JSON: {e}")))?;
        Ok((value, line.len()))
    }

    fn io(&self, command: &str, error: &std::io::Error) -> QmpError {
        match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => QmpError::TimedOut {
                path: self.path.clone(),
                command: command.to_owned(),
                after: self.timeout,
            },
            _ => self.closed(command),
        }
    }

    fn closed(&self, command: &str) -> QmpError {
        QmpError::Closed {
            path: self.path.clone(),
            command: command.to_owned(),
        }
    }

    fn protocol(&self, why: &str) -> QmpError {
        QmpError::Protocol {
            path: self.path.clone(),
            why: why.to_owned(),
        }
    }
}

/// A conversation over a socket on which all has been said.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(stream: UnixStream, timeout: Duration) {
    let Ok(mut connection) = Connection::over(stream, Path::new("qmp.sock"), timeout, 0) else {
        return;
    };
    for _ in 0..4 {
        let _ = connection.execute("query-status", &json!({}));
        assert!(connection.events.len() <= EVENTS && connection.event_bytes <= EVENT_BYTES);
    }
    let _ = connection.take_event(|event| event["event"] == "STOP");
    let _ = connection.wait_event("MIGRATION", timeout, |data| data["status"] == "failed");
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
pub(super) mod tests;
