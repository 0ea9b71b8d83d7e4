//! Directories and small files of a site, private and durable.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use farhaven_storage_sync::digest::DigestKey;

/// Makes a directory (and its parents) that only the owner may enter, for good: what
/// is synced in it later is found after a loss of power.
///
/// # Errors
/// As [`DirBuilder::create`], and when a parent cannot be synced.
pub fn private_directory(path: &Path) -> io::Result<()> {
    let missing = path.ancestors().take_while(|at| !at.exists()).count();
    let levels = path.ancestors().take(missing + 1);
    let levels: Vec<&Path> = levels.filter(|at| !at.as_os_str().is_empty()).collect();
    // From above: where one is there, those above it were made for good, but it may
    // not have been itself, if whoever made it ended right then.
    for level in levels.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(level) {
            Err(error) if !level.is_dir() => return Err(error),
            _ => {}
        }
        if let Some(parent) = level.parent() {
            sync_directory(parent)?;
        }
    }
    Ok(())
}

/// What a directory names is durable, and what it does not name any more is gone.
///
/// # Errors
/// When it cannot be synced; one that is not ours to write is let pass.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    let directory = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    match synced {
        // One that is not even ours to read, or that cannot be written, was there before.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(())
        }
        other => other,
    }
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

/// The key of all digests of a site, made when there is none. It is kept, so
/// that what peers remember by digest outlives this process; one that is lost,
/// damaged or was readable by others is replaced: that costs them some reading.
pub fn digest_key(path: &Path) -> DigestKey {
    let private = fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o077 == 0);
    let kept = fs::read(path).ok().filter(|_| private);
    let kept: Option<[u8; 32]> = kept.and_then(|bytes| bytes.try_into().ok());
    if let Some(bytes) = kept {
        return DigestKey::new(bytes);
    }
    let key = DigestKey::random();
    if let Err(error) = replace(path, key.bytes()) {
        tracing::warn!(path = %path.display(), %error, "the digest key cannot be kept; after a restart peers must read what they hold anew");
    }
    key
}

/// Replaces a small file: synced, renamed, directory synced.
///
/// # Errors
/// As of each of those steps; the old file is whole then, or where only the last one
/// failed the new one, which may be lost with the power.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    // Of the whole name: two files that differ in their extensions have each their own.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = Path::new(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(directory)?.sync_all()
}
