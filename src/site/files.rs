//! Directories and small files of a site, private and durable.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Makes a directory (and its parents) that only the owner may enter.
///
/// # Errors
/// As [`DirBuilder::create`].
pub fn private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a directory as [`private_directory`] does, and makes sure that files
/// can be made in it.
///
/// # Errors
/// When it cannot be made or written.
pub fn usable_directory(path: &Path) -> io::Result<()> {
    private_directory(path)?;
    let probe = path.join(".farhaven-writable");
    File::create(&probe)?;
    fs::remove_file(probe)
}

/// Replaces a small file: synced, renamed, directory synced.
///
/// # Errors
/// As of each of those steps; the old file is whole then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}
