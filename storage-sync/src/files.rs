//! Files and directories as the store wants them: private, and durable when it says so.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// An operation on a path that failed, with the system's reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}{}", path.display(), advice(source))]
pub struct FileError {
    /// What was tried: "read", "write" and so on.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
        let path = path.to_path_buf();
        move |source| FileError {
            action,
            path,
            source,
        }
    }

    /// Is there no room left, on the disk or in the quota?
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        _ if is_full(error) => {
            ": that file system is full; free space there, what is sealed is safe"
        }
        io::ErrorKind::ReadOnlyFilesystem => ": it is read-only; mount it writable",
        io::ErrorKind::PermissionDenied => ": not permitted; give this user the directory",
        io::ErrorKind::NotFound => ": it does not exist",
        _ => "; check the disk and the kernel's log",
    }
}

/// Makes the directory and its parents, for this user only.
pub(crate) fn make_dir(path: &Path) -> Result<(), FileError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(FileError::at("make directory", path))
}

/// Makes what was done in a directory (new names, renames, removals) durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), FileError> {
    let synced = File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(FileError::at("sync directory", path))
}

/// Opens for reading and writing, for this user only, making it if needed.
pub(crate) fn open_private(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    options.open(path).map_err(FileError::at("open", path))
}

/// Puts a file in place whole or not at all: temporary file, sync, rename, sync the directory.
pub(crate) fn put_whole(path: &Path, parts: &[&[u8]]) -> Result<(), FileError> {
    let temporary = path.with_extension("tmp");
    let write = || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary)?;
        for part in parts {
            file.write_all(part)?;
        }
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    if let Err(source) = write() {
        // Best effort: the next open removes leftovers as well.
        let _ = std::fs::remove_file(&temporary);
        return Err(FileError {
            action: "write",
            path: path.to_path_buf(),
            source,
        });
    }
    match path.parent() {
        Some(dir) => sync_dir(dir),
        None => Ok(()),
    }
}

/// Takes the directory for this process; held as long as the file is.
pub(crate) fn lock(dir: &Path) -> Result<File, LockError> {
    let path = dir.join("lock");
    let file = open_private(&path)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Held {
            dir: dir.to_path_buf(),
        }),
        Err(error) => Err(FileError {
            action: "lock",
            path,
            source: error.into(),
        }
        .into()),
    }
}

/// Why a directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process, or another part of this one, has it.
    #[error("{} is in use by another farhaven daemon; stop that one first", dir.display())]
    Held {
        /// The directory.
        dir: PathBuf,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}
