//! Files and directories as the store wants them: private, and durable when it says so.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use crate::disk::{Access, Disk, OpenFile};

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

    /// A file that only a newer version can read.
    pub(crate) fn newer(path: &Path, what: String) -> FileError {
        FileError::at("read", path)(newer(what))
    }

    /// Did a newer version write it? Then nothing of it was changed here.
    pub fn is_newer(&self) -> bool {
        let inner = self.source.get_ref();
        inner.is_some_and(|inner| inner.is::<NewerVersion>())
    }

    /// Is there no room left, on the disk or in the quota?
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }
}

/// What only a newer version can read: nobody here may guess at it, or cut it off.
#[derive(Debug, thiserror::Error)]
#[error("it was written by a newer version of Farhaven ({0})")]
struct NewerVersion(String);

/// The error of reading what a newer version wrote.
pub(crate) fn newer(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, NewerVersion(what))
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn advice(error: &io::Error) -> Cow<'static, str> {
    if let Some(newer) = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<NewerVersion>())
    {
        return format!(": {newer}; upgrade this site, nothing was changed").into();
    }
    Cow::Borrowed(match error.kind() {
        _ if is_full(error) => {
            ": that file system is full; free space there, what is sealed is safe"
        }
        io::ErrorKind::ReadOnlyFilesystem => ": it is read-only; mount it writable",
        io::ErrorKind::PermissionDenied => ": not permitted; give this user the directory",
        io::ErrorKind::NotFound => ": it does not exist",
        _ => "; check the disk and the kernel's log",
    })
}

/// Makes the directory and its parents, durably, for this user only.
pub(crate) fn make_dir(disk: &dyn Disk, path: &Path) -> Result<(), FileError> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Some(Path::new(".")),
        parent => parent,
    };
    let made = match (disk.make_dir(path), parent) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            make_dir(disk, parent)?;
            disk.make_dir(path)
        }
        (made, _) => made,
    };
    let made = made.map_err(FileError::at("make directory", path))?;
    // Synced even when it was there: who made it may have died before this. A
    // new one needs the names of all those above it, for the same reason.
    let above = path
        .ancestors()
        .skip(1)
        .take(if made { usize::MAX } else { 1 });
    for (at, dir) in above.enumerate() {
        let dir = match dir.as_os_str().is_empty() {
            true => Path::new("."),
            false => dir,
        };
        match sync_dir(disk, dir) {
            // It was there before, and is not for us to read or to sync.
            Err(error) if (at > 0 || !made) && !is_bad_sector(&error.source) => {}
            synced => synced?,
        }
    }
    Ok(())
}

/// Makes what was done in a directory (new names, renames, removals) durable.
pub(crate) fn sync_dir(disk: &dyn Disk, path: &Path) -> Result<(), FileError> {
    disk.sync_dir(path)
        .map_err(FileError::at("sync directory", path))
}

/// Opens for reading and writing, for this user only, making it if needed.
pub(crate) fn open_private(disk: &dyn Disk, path: &Path) -> Result<OpenFile, FileError> {
    disk.open(path, Access::Write)
        .map_err(FileError::at("open", path))
}

/// Opens a file that an earlier process may have left, so that what is read
/// from it now is what the disk holds: synced first, then read from the disk.
/// Without it, bytes that a kill or a failed sync left in memory only would be
/// taken for durable.
pub(crate) fn open_settled(disk: &dyn Disk, path: &Path) -> Result<OpenFile, FileError> {
    let file = open_private(disk, path)?;
    file.sync().map_err(FileError::at("sync", path))?;
    file.forget().map_err(FileError::at("read", path))?;
    Ok(file)
}

/// Reads at most `most` bytes of a file.
pub(crate) fn read_front(disk: &dyn Disk, path: &Path, most: u64) -> Result<Vec<u8>, FileError> {
    let read = || {
        let file = disk.open(path, Access::Read)?;
        let mut bytes = vec![0; file.bytes()?.min(most) as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    read().map_err(FileError::at("read", path))
}

/// Is this what a bad sector answers?
pub(crate) fn is_bad_sector(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Why a file was not put in place.
pub(crate) struct Unplaced {
    pub(crate) error: FileError,
    /// It has its name already, but whether that lasts is not known.
    pub(crate) named: bool,
}

impl From<Unplaced> for FileError {
    fn from(unplaced: Unplaced) -> FileError {
        unplaced.error
    }
}

/// Puts a file in place whole or not at all: temporary file, sync, rename, sync the directory.
pub(crate) fn put_whole(disk: &dyn Disk, path: &Path, parts: &[&[u8]]) -> Result<(), Unplaced> {
    let temporary = path.with_extension("tmp");
    let write = || {
        let file = disk.open(&temporary, Access::Replace)?;
        let mut at = 0;
        for part in parts {
            file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        file.sync()?;
        disk.rename(&temporary, path)
    };
    if let Err(source) = write() {
        // Best effort: the next open removes leftovers as well.
        let _ = disk.remove(&temporary);
        let error = FileError::at("write", path)(source);
        return Err(Unplaced {
            error,
            named: false,
        });
    }
    match path.parent() {
        Some(dir) => sync_dir(disk, dir).map_err(|error| Unplaced { error, named: true }),
        None => Ok(()),
    }
}

/// Where what is damaged can be looked at later: no such file is there.
pub(crate) fn aside(disk: &dyn Disk, path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let named = |number: u32| path.with_file_name(format!("{name}.bad-{number}"));
    (1..)
        .map(named)
        .find(|aside| !disk.exists(aside).unwrap_or(false))
        .unwrap_or_else(|| named(0))
}

/// Renames what is damaged, durably. Returns its new name.
pub(crate) fn set_aside(disk: &dyn Disk, path: &Path) -> Result<PathBuf, FileError> {
    let aside = aside(disk, path);
    disk.rename(path, &aside)
        .map_err(FileError::at("rename", path))?;
    if let Some(dir) = path.parent() {
        sync_dir(disk, dir)?;
    }
    Ok(aside)
}

/// Takes the directory for this process; held as long as the file is.
pub(crate) fn lock(disk: &dyn Disk, dir: &Path) -> Result<OpenFile, LockError> {
    let path = dir.join("lock");
    let file = open_private(disk, &path)?;
    match file.lock().map_err(FileError::at("lock", &path))? {
        true => Ok(file),
        false => Err(LockError::Held {
            dir: dir.to_path_buf(),
        }),
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
