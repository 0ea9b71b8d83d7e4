//! Where a test's files are, and whether there is room for them.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use farhaven_storage_sync::unit::GuestId;

use crate::guest::qemu::peer::{bytes_free, memory_available};
use crate::site::Site;

/// Where a test's files are.
pub(super) struct Places {
    pub(super) run: PathBuf,
    pub(super) ram: PathBuf,
}

impl Places {
    pub(super) fn of(site: &Site, guest: GuestId) -> Self {
        Self {
            run: site.config.run_dir().join(guest.to_string()).join("test"),
            ram: site.config.ram_dir().join(format!("{guest}-test")),
        }
    }
}

/// Bytes that a new RAM file may still take.
pub(in crate::site) fn free_memory(directory: &Path) -> u64 {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    bytes_free(directory).min(memory_available(&memory))
}

/// Bytes on their filesystem of a directory's files.
pub(super) fn allocated(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512))
        .sum()
}

/// Removes what a test had; what was removed, for people.
pub(super) fn remove(places: &Places) -> Vec<String> {
    let mut removed = Vec::new();
    for (what, directory) in [
        ("memory in", &places.ram),
        ("disks and logs in", &places.run),
    ] {
        let there = crate::site::exists(directory);
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, directory = %directory.display(), "stays behind");
                removed.push(format!("NOT {}: {error}", directory.display()));
            }
            _ if there => removed.push(format!("{what} {}", directory.display())),
            _ => {}
        }
    }
    removed
}
