//! What happened at a site: an append-only log that takes bounded room and
//! outlives restarts.
//!
//! Whoever tells of something ([`EventLog::note`]) never waits: the event is in
//! memory at once, and a thread of its own writes it down. Files of JSON lines,
//! each with its checksum, are rotated, the oldest goes. Readers ask for what came
//! after a number, and may wait for more.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farhaven_policies::alert::Severity;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::checked::line;

/// Events that are told: the newest so many.
pub const MOST_EVENTS: usize = 10_000;
/// Size at which a file is closed.
const FILE_BYTES: u64 = 1 << 20;
/// Files kept, the one that is written included.
const MOST_FILES: usize = 8;
/// Longest file that is read: one event over the size at which it is closed.
const LONGEST_FILE: u64 = FILE_BYTES + 64 * 1024;
/// Longest sentence of an event, in bytes.
const LONGEST_TEXT: usize = 2048;
/// Events that wait for the disk.
const WAITING: usize = 4096;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// An alert stands now.
    AlertRaised,
    /// An alert is worse than before.
    AlertWorsened,
    /// An alert is less bad than before.
    AlertEased,
    /// An alert is over.
    AlertCleared,
    /// Somebody cares for an alert.
    AlertAcknowledged,
    /// The daemon began to serve.
    Started,
    /// A peer is reached.
    PeerConnected,
    /// A peer is not reached any more.
    PeerDisconnected,
    /// A guest was moved away, nothing lost.
    Moved,
    /// A guest of a peer was taken over from a point.
    FailedOver,
    /// A test failover runs.
    TestStarted,
    /// A test failover has ended, and all of it is removed.
    TestEnded,
    /// Points past their time were dropped.
    Pruned,
    /// A point was given a name, and stays.
    PointKept,
    /// A point is kept by its age only, as any other.
    PointReleased,
    /// A scrub read everything that is stored.
    Scrubbed,
    /// Damaged data was replaced by whole data.
    Healed,
    /// Something that a newer version wrote down.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            EventKind::AlertRaised => "alert_raised",
            EventKind::AlertWorsened => "alert_worsened",
            EventKind::AlertEased => "alert_eased",
            EventKind::AlertCleared => "alert_cleared",
            EventKind::AlertAcknowledged => "alert_acknowledged",
            EventKind::Started => "started",
            EventKind::PeerConnected => "peer_connected",
            EventKind::PeerDisconnected => "peer_disconnected",
            EventKind::Moved => "moved",
            EventKind::FailedOver => "failed_over",
            EventKind::TestStarted => "test_started",
            EventKind::TestEnded => "test_ended",
            EventKind::Pruned => "pruned",
            EventKind::PointKept => "point_kept",
            EventKind::PointReleased => "point_released",
            EventKind::Scrubbed => "scrubbed",
            EventKind::Healed => "healed",
            EventKind::Unknown => "unknown",
        })
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number, upward from 1, over restarts.
    pub number: u64,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
    /// The guest, group, peer or file that it is about.
    pub subject: String,
    /// How bad it is.
    pub severity: Severity,
    /// In a sentence.
    pub what: String,
    /// Set on events of alerts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<AlertRef>,
}

/// Which alert an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertRef {
    /// Its number.
    pub id: u64,
    /// What it is about.
    pub kind: farhaven_policies::alert::Kind,
    /// What to do about it.
    pub advice: String,
}

enum Work {
    Append(Vec<u8>),
    Replace(PathBuf, Vec<u8>),
}

/// The log of one site.
pub(super) struct EventLog {
    events: Mutex<VecDeque<Event>>,
    newest: watch::Sender<u64>,
    work: Option<SyncSender<Work>>,
    writer: Option<JoinHandle<()>>,
}

impl EventLog {
    /// Opens the log in `directory`. What cannot be read of it is left out.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        super::files::private_directory(directory)?;
        let (files, events) = read(directory)?;
        let newest = events.back().map_or(0, |event| event.number);
        let (work, todo) = sync_channel(WAITING);
        let writer = Writer {
            directory: directory.to_owned(),
            files,
            file: None,
        };
        let writer = std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || writer.run(&todo))?;
        Ok(Self {
            events: Mutex::new(events),
            newest: watch::channel(newest).0,
            work: Some(work),
            writer: Some(writer),
        })
    }

    /// Writes down that something happened, now.
    pub(super) fn note(
        &self,
        kind: EventKind,
        subject: &str,
        severity: Severity,
        what: &str,
        alert: Option<AlertRef>,
    ) {
        let mut events = self.lock();
        let event = Event {
            number: events.back().map_or(0, |event| event.number) + 1,
            at: Timestamp::now(),
            kind,
            subject: shortened(subject),
            severity,
            what: shortened(what),
            alert,
        };
        if let Ok(line) = line::text(&event) {
            self.send(Work::Append(line));
        }
        let number = event.number;
        events.push_back(event);
        if events.len() > MOST_EVENTS {
            events.pop_front();
        }
        drop(events);
        self.newest.send_replace(number);
    }

    /// Has a small file replaced, after what was noted before.
    pub(super) fn replace(&self, path: PathBuf, bytes: Vec<u8>) {
        self.send(Work::Replace(path, bytes));
    }

    /// What came after that number, the oldest first, at most so many.
    pub(super) fn after(&self, number: u64, most: usize) -> Vec<Event> {
        let events = self.lock();
        let from = events.partition_point(|event| event.number <= number);
        events.range(from..).take(most).cloned().collect()
    }

    /// The newest event's number; 0 without any.
    pub(super) fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    /// Waits until there is an event after that number, or no longer than `patience`.
    pub(super) async fn wait(&self, number: u64, patience: Duration) {
        let mut newest = self.newest.subscribe();
        let more = newest.wait_for(|newest| *newest > number);
        let _ = tokio::time::timeout(patience, more).await;
    }

    fn send(&self, work: Work) {
        if let Some(Err(TrySendError::Full(_))) = self.work.as_ref().map(|to| to.try_send(work)) {
            tracing::error!("the disk does not take events; one is in memory only");
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EventLog {
    /// What was noted is written when the log is gone.
    fn drop(&mut self) {
        self.work = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn shortened(text: &str) -> String {
    match text.len() > LONGEST_TEXT {
        true => {
            let end = (0..LONGEST_TEXT)
                .rev()
                .find(|&at| text.is_char_boundary(at));
            format!("{}…", &text[..end.unwrap_or(0)])
        }
        false => text.to_owned(),
    }
}

fn path_of(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}.jsonl"))
}

/// The numbers of the files, and the newest of what is in them.
fn read(directory: &Path) -> io::Result<(VecDeque<u64>, VecDeque<Event>)> {
    let mut files: Vec<u64> = fs::read_dir(directory)?
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_suffix(".jsonl")?.parse().ok()
        })
        .collect();
    files.sort_unstable();
    let mut events: VecDeque<Event> = VecDeque::new();
    for &number in files.iter().rev().take(MOST_FILES).rev() {
        let path = path_of(directory, number);
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|f| f.take(LONGEST_FILE).read_to_end(&mut text));
        if let Err(error) = read {
            tracing::warn!(path = %path.display(), %error, "events cannot be read");
            continue;
        }
        let newest = |events: &VecDeque<Event>| events.back().map_or(0, |event| event.number);
        let mut damaged = 0;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            // The last line of a daemon that was killed may be half, and the next one
            // puts an end to it.
            match line.strip_suffix(b"\n").map(line::parse::<Event>) {
                Some(Some(event)) if event.number > newest(&events) => events.push_back(event),
                Some(None) if line.len() > 1 => damaged += 1,
                _ => {}
            }
        }
        if damaged > 0 {
            tracing::warn!(path = %path.display(), lines = damaged, "events are damaged, and left out");
        }
    }
    let surplus = events.len().saturating_sub(MOST_EVENTS);
    events.drain(..surplus);
    Ok((files.into(), events))
}

/// Writes what was noted.
struct Writer {
    directory: PathBuf,
    files: VecDeque<u64>,
    file: Option<(File, u64)>,
}

impl Writer {
    fn run(mut self, todo: &Receiver<Work>) {
        while let Ok(work) = todo.recv() {
            let done = match work {
                Work::Append(line) => self.append(&line),
                Work::Replace(path, bytes) => super::files::replace(&path, &bytes),
            };
            if let Err(error) = done {
                self.file = None;
                tracing::error!(directory = %self.directory.display(), %error, "events are not written down; they are in memory");
            }
        }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let full = self.file.as_ref();
        if full.is_none_or(|(_, bytes)| bytes + line.len() as u64 > FILE_BYTES) {
            let first = self.file.is_none();
            self.file = Some(match first.then(|| self.go_on()).flatten() {
                Some(last) => last?,
                None => (self.begin()?, 0),
            });
        }
        if let Some((file, bytes)) = &mut self.file {
            file.write_all(line)?;
            *bytes += line.len() as u64;
            file.sync_data()?;
        }
        Ok(())
    }

    /// The last file of the process before, unless it is full.
    fn go_on(&self) -> Option<io::Result<(File, u64)>> {
        let path = path_of(&self.directory, *self.files.back()?);
        let opened = OpenOptions::new()
            .append(true)
            .open(path)
            .and_then(|mut file| {
                // Half a line may be at its end: that is one by itself.
                file.write_all(b"\n")?;
                let bytes = file.metadata()?.len();
                Ok((file, bytes))
            });
        match opened {
            Ok((_, bytes)) if bytes >= FILE_BYTES => None,
            opened => Some(opened),
        }
    }

    fn begin(&mut self) -> io::Result<File> {
        let number = self.files.back().map_or(0, |last| *last) + 1;
        let path = path_of(&self.directory, number);
        let mut options = OpenOptions::new();
        let file = options
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        self.files.push_back(number);
        while self.files.len() > MOST_FILES {
            if let Some(oldest) = self.files.pop_front() {
                fs::remove_file(path_of(&self.directory, oldest))?;
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(log: &EventLog, what: &str) {
        log.note(EventKind::Pruned, "west", Severity::Info, what, None);
    }

    #[tokio::test]
    async fn events_outlive_a_restart_and_half_a_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = EventLog::open(dir.path()).expect("opened");
        log.wait(0, Duration::from_millis(1)).await;
        note(&log, "one");
        note(&log, "two");
        drop(log);
        let path = path_of(dir.path(), 1);
        let mut bytes = fs::read(&path).expect("read");
        bytes.truncate(bytes.len() - 9);
        fs::write(&path, bytes).expect("written");
        let log = EventLog::open(dir.path()).expect("opened");
        assert_eq!(log.newest(), 1, "half an event is none");
        note(&log, &"three".repeat(1000));
        log.wait(1, Duration::from_secs(60)).await;
        let all = log.after(0, 10);
        assert_eq!(all.len(), 2);
        assert!(!path_of(dir.path(), 2).exists(), "a restart begins no file");
        assert_eq!((all[1].number, all[1].what.len()), (2, LONGEST_TEXT + 2));
        assert_eq!(log.after(1, 10).len(), 1);
        assert_eq!(log.after(0, 1)[0].what, "one");
        assert_eq!(log.after(2, 10).len(), 0);
    }

    #[test]
    fn an_event_that_has_rotted_is_left_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = EventLog::open(dir.path()).expect("opened");
        for what in ["one", "two", "six"] {
            note(&log, what);
        }
        drop(log);
        let path = path_of(dir.path(), 1);
        let text = fs::read_to_string(&path).expect("read");
        // Still JSON, and another word.
        fs::write(&path, text.replace("\"two\"", "\"twp\"")).expect("written");
        let log = EventLog::open(dir.path()).expect("opened");
        let told: Vec<_> = log.after(0, 10).into_iter().map(|e| e.what).collect();
        assert_eq!(told, ["one", "six"]);
    }

    #[test]
    fn disk_and_memory_are_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("00000003.jsonl"), [0xff; 100]).expect("written");
        let log = EventLog::open(dir.path()).expect("opened");
        let long = "x".repeat(2000);
        for _ in 0..MOST_EVENTS + 100 {
            note(&log, &long);
        }
        assert_eq!(log.after(0, usize::MAX).len(), MOST_EVENTS);
        drop(log);
        let files: Vec<_> = fs::read_dir(dir.path())
            .expect("listed")
            .flatten()
            .collect();
        assert!(files.len() <= MOST_FILES, "{}", files.len());
        let bytes = files.iter().map(|f| f.metadata().expect("there").len());
        assert!(bytes.sum::<u64>() <= MOST_FILES as u64 * FILE_BYTES);
        let log = EventLog::open(dir.path()).expect("opened");
        assert!(log.newest() <= MOST_EVENTS as u64 + 100);
        assert!(log.after(0, usize::MAX).len() > 1000);
    }
}
