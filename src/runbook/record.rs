//! The audit record of a run: a file that is only ever appended to.
//!
//! A line is a JSON object of one record, with its time as people write it, and
//! at its end a checksum: BLAKE3 of the checksum before it and of the line's
//! own bytes up to there. So a line that was changed, taken out or put in is
//! found; what cannot be found is that whole lines are missing at the end, so a
//! run that ended says so in its last one. A line is synced before anything is
//! done that follows from it: one that was torn by a crash was never acted on,
//! and is dropped.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use farhaven_policies::runbook::run::{Event, Moment, Record};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::site::checked::line;
use crate::site::files::private_directory;

/// Longest line, in bytes: a plan is in the first one.
pub const LONGEST_LINE: u64 = 8 << 20;
/// Largest record of one run, in bytes.
pub const LARGEST_RECORD: u64 = 64 << 20;
/// The version of a line.
const VERSION: u8 = 1;
/// What the checksums are of.
const CONTEXT: &str = "farhaven 2026-11 runbook audit record v1";
/// The member of a line that has the checksum.
const CHAIN: &str = "chain";

/// Why an audit record cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The system said no.
    #[error(
        "the audit record {path} cannot be {doing}: {source}. Nothing more of this run is done without it; mend that and resume the run"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A line is not what was written.
    #[error(
        "the audit record {path} was changed: line {line} {why}. Nobody goes on from it; keep it, find out who changed it, and see at both sites which one runs the group"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// How that shows.
        why: String,
    },
    /// It would grow, or has grown, beyond all measure.
    #[error("the audit record {path} is too large ({what}); end the run and start another")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Which bound.
        what: &'static str,
    },
    /// Somebody else appends to it.
    #[error("the audit record {0} is in use: another daemon conducts this run")]
    InUse(PathBuf),
    /// An earlier line could not be kept.
    #[error(
        "the audit record {0} failed before and takes no more lines; resume the run to go on from what was kept"
    )]
    Failed(PathBuf),
    /// Not a name of a run.
    #[error("'{0}' cannot be the id of a run; up to 100 letters, digits, - and _ can")]
    Id(String),
}

/// A record as it is kept.
#[derive(Serialize, Deserialize)]
struct Line {
    v: u8,
    number: u64,
    at: jiff::Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    step: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    undo: bool,
    #[serde(flatten)]
    event: Event,
}

/// An audit record that can be appended to.
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    path: PathBuf,
    chain: blake3::Hash,
    bytes: u64,
    failed: bool,
}

impl AuditLog {
    /// Begins the record of a run, `{directory}/{id}.jsonl`.
    ///
    /// # Errors
    /// There is one already, or it cannot be made durable.
    pub fn create(directory: &Path, id: &str) -> Result<AuditLog, RecordError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if !(1..=100).contains(&id.len()) || !id.bytes().all(plain) {
            return Err(RecordError::Id(id.escape_default().take(200).collect()));
        }
        let path = directory.join(format!("{id}.jsonl"));
        let failed = |source| RecordError::Io {
            path: path.clone(),
            doing: "made",
            source,
        };
        private_directory(directory).map_err(failed)?;
        let mut options = OpenOptions::new();
        let options = options.read(true).append(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed)?;
        AuditLog::locked(file, path)
    }

    fn locked(file: File, path: PathBuf) -> Result<AuditLog, RecordError> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| RecordError::InUse(path.clone()))?;
        Ok(AuditLog {
            file,
            path,
            chain: first_chain(),
            bytes: 0,
            failed: false,
        })
    }

    /// Opens a record to go on with. A last line that was torn is dropped.
    ///
    /// # Errors
    /// It was changed, is in use or cannot be read.
    pub fn open(path: &Path) -> Result<(AuditLog, Vec<Record>), RecordError> {
        let failed = |doing| {
            move |source| RecordError::Io {
                path: path.to_owned(),
                doing,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(path)
            .map_err(failed("opened"))?;
        let mut log = AuditLog::locked(file, path.to_owned())?;
        let whole = read_lines(&log.file, path)?;
        (log.chain, log.bytes) = (whole.chain, whole.bytes);
        if whole.torn {
            log.file
                .set_len(whole.bytes)
                .and_then(|()| log.file.sync_all())
                .map_err(failed("mended"))?;
        }
        log.file.seek(SeekFrom::End(0)).map_err(failed("opened"))?;
        Ok((log, whole.records))
    }

    /// Reads a record, without the right to go on with it.
    ///
    /// # Errors
    /// It was changed or cannot be read.
    pub fn read(path: &Path) -> Result<Vec<Record>, RecordError> {
        let file = File::open(path).map_err(|source| RecordError::Io {
            path: path.to_owned(),
            doing: "opened",
            source,
        })?;
        Ok(read_lines(&file, path)?.records)
    }

    /// Keeps a record: it is durable when this returns.
    ///
    /// # Errors
    /// It is not, and then this log takes no more.
    pub fn append(&mut self, record: &Record) -> Result<(), RecordError> {
        if self.failed {
            return Err(RecordError::Failed(self.path.clone()));
        }
        let (line, chain) =
            line_of(record, &self.chain).map_err(|source| self.io("written", source))?;
        let too_large = |what| RecordError::TooLarge {
            path: self.path.clone(),
            what,
        };
        if line.len() as u64 > LONGEST_LINE {
            return Err(too_large("one line"));
        }
        let bytes = self.bytes + line.len() as u64;
        if bytes > LARGEST_RECORD {
            return Err(too_large("all lines together"));
        }
        // Whether a write or sync that failed left something is not known.
        self.failed = true;
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| self.io("written", source))?;
        (self.chain, self.bytes, self.failed) = (chain, bytes, false);
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn io(&self, doing: &'static str, source: io::Error) -> RecordError {
        RecordError::Io {
            path: self.path.clone(),
            doing,
            source,
        }
    }
}

/// The checksum of a whole record, in hexadecimal: of its last line and so of all
/// before it.
///
/// # Errors
/// As [`AuditLog::read`].
pub fn last_chain(path: &Path) -> Result<String, RecordError> {
    let file = File::open(path).map_err(|source| RecordError::Io {
        path: path.to_owned(),
        doing: "opened",
        source,
    })?;
    Ok(read_lines(&file, path)?.chain.to_hex().to_string())
}

fn first_chain() -> blake3::Hash {
    blake3::Hash::from_bytes([0; 32])
}

fn next_chain(before: &blake3::Hash, body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(before.as_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn line_of(record: &Record, before: &blake3::Hash) -> io::Result<(Vec<u8>, blake3::Hash)> {
    let millis = i64::try_from(record.at.0).ok();
    let at = millis.and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok());
    let line = line::begun(&Line {
        v: VERSION,
        number: record.number,
        at: at.ok_or_else(|| io::Error::other("its time is none that people know"))?,
        by: record.by.clone(),
        step: record.step.clone(),
        undo: record.undo,
        event: record.event.clone(),
    })?;
    let chain = next_chain(before, &line);
    Ok((line::ended(line, CHAIN, &chain), chain))
}

struct Whole {
    records: Vec<Record>,
    chain: blake3::Hash,
    /// Of all whole lines.
    bytes: u64,
    /// There is more after them.
    torn: bool,
}

fn read_lines(file: &File, path: &Path) -> Result<Whole, RecordError> {
    let failed = |source| RecordError::Io {
        path: path.to_owned(),
        doing: "read",
        source,
    };
    let too_large = |what| RecordError::TooLarge {
        path: path.to_owned(),
        what,
    };
    let length = file.metadata().map_err(failed)?.len();
    if length > LARGEST_RECORD {
        return Err(too_large("all lines together"));
    }
    let mut reader = BufReader::new(file);
    let mut whole = Whole {
        records: Vec::new(),
        chain: first_chain(),
        bytes: 0,
        torn: false,
    };
    loop {
        let mut line = Vec::new();
        let most = (&mut reader).take(LONGEST_LINE + 1);
        let read = { most }.read_until(b'\n', &mut line).map_err(failed)? as u64;
        let last = whole.bytes + read >= length;
        match line.pop() {
            None => break,
            Some(b'\n') => {}
            Some(_) if read > LONGEST_LINE => return Err(too_large("one line")),
            Some(_) => {
                whole.torn = true;
                break;
            }
        }
        let number = whole.records.len() as u64 + 1;
        match record_of(&line, &whole.chain) {
            Ok((record, chain)) => {
                whole.records.push(record);
                (whole.chain, whole.bytes) = (chain, whole.bytes + read);
            }
            // Blocks of the last line that never reached the disk are zeros.
            Err(_) if last && line.contains(&0) => {
                whole.torn = true;
                break;
            }
            Err(why) => {
                return Err(RecordError::Changed {
                    path: path.to_owned(),
                    line: number,
                    why,
                });
            }
        }
    }
    Ok(whole)
}

/// A line of an audit record, as a fuzz target: as it is, and with a right checksum.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzzing(bytes: &[u8]) {
    let before = first_chain();
    let chain = next_chain(&before, bytes);
    let mut right = line::ended(bytes.to_vec(), CHAIN, &chain);
    right.pop();
    let _ = record_of(bytes, &before);
    if let Ok((record, _)) = record_of(&right, &before) {
        let written = line_of(&record, &before).map(|(line, _)| line);
        let mut line = written.expect("what was read can be written");
        line.pop();
        assert!(record_of(&line, &before).is_ok_and(|(again, _)| again.number == record.number));
    }
}

fn record_of(line: &[u8], before: &blake3::Hash) -> Result<(Record, blake3::Hash), String> {
    let (body, digits) = line::taken_apart(line, CHAIN).ok_or("does not end with a checksum")?;
    let chain = next_chain(before, body);
    if chain.to_hex().as_bytes() != digits {
        return Err("is not what its checksum says, or does not follow the line before".to_owned());
    }
    let line: Line = line::object(body).map_err(|e| format!("cannot be understood ({e})"))?;
    if line.v != VERSION {
        return Err(format!(
            "is of version {}, and only {VERSION} is known here",
            line.v
        ));
    }
    let at = u64::try_from(line.at.as_millisecond()).map_err(|_| "is from before 1970")?;
    let record = Record {
        number: line.number,
        at: Moment(at),
        by: line.by,
        step: line.step,
        undo: line.undo,
        event: line.event,
    };
    Ok((record, chain))
}
