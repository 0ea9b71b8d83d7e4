//! A guest's serial console, as the demo reads it: heartbeats, and the answer
//! to a full check of everything the guest ever wrote.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::site::view::ConsolePaths;

/// For a full check: software emulation is slow.
const CHECK: Duration = Duration::from_secs(120);

/// A line longer than this is no heartbeat.
const LONGEST_LINE: usize = 64 << 10;

/// A line that begins with `HB`.
#[derive(Debug, Clone)]
pub(super) struct Heartbeat {
    pub(super) number: u64,
    pub(super) at: Instant,
    pub(super) line: String,
}

impl Heartbeat {
    /// Did the guest find all sound up to here?
    pub(super) fn is_sound(&self) -> bool {
        is_sound(&self.line)
    }
}

/// Do the guest's own words say that memory and disks are as they should be?
pub(super) fn is_sound(line: &str) -> bool {
    let says = |word: &str| line.split(' ').any(|w| w == word);
    says("mem=ok") && says("disk=ok")
}

/// A guest's serial console: read from its log, written through its socket.
pub(super) struct Console {
    socket: PathBuf,
    log: PathBuf,
    read: u64,
    partial: String,
    /// Newest heartbeat seen.
    pub(super) last: Option<Heartbeat>,
    /// First heartbeat seen.
    pub(super) first: Option<Heartbeat>,
    /// Newest answer to a full check.
    pub(super) check: Option<String>,
}

impl Console {
    /// The console of a directory: `console.sock` and `console.log` there.
    pub(super) fn within(directory: &Path) -> Self {
        Self {
            socket: directory.join("console.sock"),
            log: directory.join("console.log"),
            read: 0,
            partial: String::new(),
            last: None,
            first: None,
            check: None,
        }
    }

    /// The console that a daemon tells of.
    pub(super) fn of(paths: Option<&ConsolePaths>) -> Result<Self, String> {
        let paths = paths.ok_or("the daemon does not say where the guest's console is")?;
        Ok(Self {
            socket: paths.socket.clone(),
            log: paths.log.clone(),
            ..Self::within(Path::new(""))
        })
    }

    /// The number of the newest heartbeat, 0 before the first.
    pub(super) fn number(&self) -> u64 {
        self.last.as_ref().map_or(0, |beat| beat.number)
    }

    /// Reads what is new.
    pub(super) fn poll(&mut self) {
        let Ok(mut file) = File::open(&self.log) else {
            return;
        };
        let mut bytes = Vec::new();
        if file.seek(SeekFrom::Start(self.read)).is_err() || file.read_to_end(&mut bytes).is_err() {
            return;
        }
        let at = Instant::now();
        self.read += bytes.len() as u64;
        self.partial.push_str(&String::from_utf8_lossy(&bytes));
        while let Some(end) = self.partial.find('\n') {
            let line = self.partial[..end].trim_end().to_owned();
            self.partial.drain(..=end);
            self.line(line, at);
        }
        if self.partial.len() > LONGEST_LINE {
            self.partial.clear();
        }
    }

    fn line(&mut self, line: String, at: Instant) {
        let number = line
            .strip_prefix("HB ")
            .and_then(|l| l.split(' ').next()?.parse().ok());
        if let Some(number) = number {
            let beat = Heartbeat { number, at, line };
            self.first.get_or_insert_with(|| beat.clone());
            self.last = Some(beat);
        } else if line.starts_with("CHECK ") {
            self.check = Some(line);
        }
    }

    /// Waits for something on the console.
    pub(super) async fn wait<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Console) -> Option<T>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + patience;
        loop {
            self.poll();
            if let Some(found) = wanted(self) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "the guest's console shows no {what} within {patience:?}; last: {}",
                    self.last.as_ref().map_or("nothing", |b| &b.line)
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Has the guest check all its memory and disks; its answer.
    pub(super) async fn full_check(&mut self) -> Result<String, String> {
        self.check = None;
        let failed = |e: std::io::Error| format!("the guest's console: {e}");
        let mut stream = UnixStream::connect(&self.socket)
            .map_err(|e| format!("the guest's console {}: {e}", self.socket.display()))?;
        stream.write_all(b"c").map_err(failed)?;
        // A console that nobody reads stops the QEMU guest that writes to it.
        let mut unread = stream.try_clone().map_err(failed)?;
        let reading = std::thread::spawn(move || std::io::copy(&mut unread, &mut std::io::sink()));
        let answer = self
            .wait("answer to a full check", CHECK, |c| c.check.clone())
            .await;
        let _ = stream.shutdown(std::net::Shutdown::Both);
        let _ = reading.join();
        answer
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_come_in_pieces_among_other_words() {
        let directory = tempfile::tempdir().unwrap();
        let mut console = Console::within(directory.path());
        console.poll();
        assert!(console.last.is_none());
        let log = directory.path().join("console.log");
        std::fs::write(
            &log,
            "booting\nHB 7 seq=1 block=2 mem=ok disk=ok\r\nHB 8 se",
        )
        .unwrap();
        console.poll();
        assert_eq!(console.number(), 7);
        let mut file = File::options().append(true).open(&log).unwrap();
        file.write_all(b"q=3 block=4 mem=ok disk=BAD:lost\nHB x\nCHECK 8 mem=ok disk=ok\n")
            .unwrap();
        console.poll();
        assert_eq!(console.number(), 8);
        assert_eq!(console.first.as_ref().unwrap().number, 7);
        assert!(console.first.as_ref().unwrap().is_sound());
        assert!(!console.last.as_ref().unwrap().is_sound());
        assert!(is_sound(console.check.as_ref().unwrap()));
    }
}
