//! Why a launch failed, with QEMU's own last words.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::guest::qemu::instantiate::InstantiateError;
use crate::guest::qemu::qmp::QmpError;

/// QEMU's words that an error shows: the end of its log.
const SHOWN: u64 = 2000;

/// Why a guest could not be launched, restored or ended.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The command line.
    #[error(transparent)]
    Instantiate(#[from] InstantiateError),
    /// A file or directory.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The program does not run.
    #[error(
        "cannot start {program}: {source}. Install it: apt-get install -y qemu-system-x86 qemu-utils"
    )]
    Program {
        /// Its name.
        program: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The definition names something that is not QEMU.
    #[error(
        "the guest's definition names the program {0:?}, which is none of QEMU's; it is not run. Add the guest again at its site"
    )]
    NotQemu(String),
    /// A QEMU of this guest is there already: two would write the same memory and disks.
    #[error(
        "the guest's QEMU runs here already as process {pid} ({qmp}); it is not started twice. Adopt it, or end it: kill {pid}"
    )]
    AlreadyRunning {
        /// Its process.
        pid: u32,
        /// Its QMP socket.
        qmp: PathBuf,
    },
    /// A socket's path is too long.
    #[error(
        "{0} is longer than the 107 bytes a socket's path may have; choose a shorter run directory"
    )]
    LongPath(PathBuf),
    /// An overlay could not be made.
    #[error("qemu-img cannot make the overlay {path}: {words}")]
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// What qemu-img said.
        words: String,
    },
    /// QEMU ended, or does not answer.
    #[error("QEMU {doing}: {why}. Its last words (all in {log}): {words}")]
    Qemu {
        /// Whether it started or was restoring.
        doing: &'static str,
        /// What we saw.
        why: String,
        /// Its log file.
        log: PathBuf,
        /// The end of its log.
        words: String,
    },
    /// A later command failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// Where a launched QEMU's output goes.
pub(super) fn log_path(run: &Path) -> PathBuf {
    run.join("qemu.log")
}

/// An error with what QEMU wrote last.
pub(super) fn died(run: &Path, doing: &'static str, why: &str) -> LaunchError {
    let log = log_path(run);
    LaunchError::Qemu {
        doing,
        why: why.to_owned(),
        words: last_words(&log),
        log,
    }
}

fn last_words(log: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(log) {
        let length = file.metadata().map_or(0, |facts| facts.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(SHOWN)));
        let _ = file.take(SHOWN).read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes).trim().replace('\n', "; ");
    if text.is_empty() {
        "none".to_owned()
    } else {
        text
    }
}
