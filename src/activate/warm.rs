//! RAM of a recovery point in the files that the guest's machine will map: filled whole once,
//! then brought from point to point by what differs.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::{UNIT, Volume, VolumeIndex, VolumeKind};

use super::point::boots;
use crate::guest::Definition;
use crate::site::files::private_directory;

/// Units read at once.
const PIECE: u64 = 256;

/// What the RAM files hold.
#[derive(Default)]
pub struct Warm {
    at: Option<Arc<Replica>>,
    /// Device and inode of each block's file. One that was removed (a cleaned
    /// /dev/shm) and made anew is empty, whatever is remembered of it.
    files: BTreeMap<String, (u64, u64)>,
}

/// The RAM file of a block, in a guest's directory.
pub fn ram_file(directory: &Path, block: &str) -> PathBuf {
    let plain: String = block
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    // Two blocks whose names differ in odd characters only stay two files.
    let sum = blake3::hash(block.as_bytes()).to_hex();
    directory.join(format!("{plain}-{}.ram", &sum[..8]))
}

impl Warm {
    /// The point whose RAM is in the files.
    pub fn point(&self) -> Option<u64> {
        self.at.as_ref().map(|r| r.header().point)
    }

    /// Makes the RAM files, at their full size, with whatever they hold. One
    /// that is larger may be mapped by a machine: it is left to that, and
    /// another takes its name.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn make_files(&self, directory: &Path, definition: &Definition) -> io::Result<()> {
        private_directory(directory)?;
        for (name, bytes) in definition.ram() {
            let path = ram_file(directory, name);
            let file = open(&path)?;
            let file = match file.metadata()?.len() > bytes {
                true => {
                    std::fs::remove_file(&path)?;
                    open(&path)?
                }
                false => file,
            };
            file.set_len(bytes)?;
        }
        Ok(())
    }

    /// Makes them anew, empty: nothing of another guest, nor of this one's past, is
    /// in the memory that a guest boots with. Before its machine is there.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn make_empty(directory: &Path, definition: &Definition) -> io::Result<()> {
        for (name, _) in definition.ram() {
            match std::fs::remove_file(ram_file(directory, name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Self::default().make_files(directory, definition)
    }

    /// Brings the files to a point. Answers the bytes written. After an error
    /// the files count as empty.
    ///
    /// # Errors
    /// When the point cannot be read, or the files cannot be written.
    pub fn bring_to(
        &mut self,
        directory: &Path,
        replica: &Arc<Replica>,
        definition: &Definition,
    ) -> Result<u64, crate::site::ActivateError> {
        let from = self.at.take();
        let io = |source| crate::site::ActivateError::Io {
            what: format!("filling RAM files in {}", directory.display()),
            source,
        };
        self.make_files(directory, definition).map_err(io)?;
        let mut bytes = 0;
        let volumes = replica.volumes();
        if boots(volumes) {
            // Nothing comes for it; what is in it by now is its machine's.
            self.files.clear();
        }
        let same = from.filter(|f| f.volumes().iter().zip(volumes).all(|(a, b)| same_ram(a, b)));
        for (index, volume) in (0..).zip(volumes) {
            if volume.kind != VolumeKind::Ram {
                continue;
            }
            let file = open(&ram_file(directory, &volume.name)).map_err(io)?;
            let inode = file.metadata().map(|m| (m.dev(), m.ino())).map_err(io)?;
            let filled = self.files.insert(volume.name.clone(), inode) == Some(inode);
            bytes += match same.as_ref().filter(|_| filled) {
                Some(from) => differences(&file, index, from, replica).map_err(|e| e.or(io))?,
                None => {
                    empty(&file).map_err(io)?;
                    whole(&file, index, replica).map_err(|e| e.or(io))?
                }
            };
        }
        self.at = Some(replica.clone());
        Ok(bytes)
    }

    /// Removes the files.
    pub fn discard(&mut self, directory: &Path) {
        self.at = None;
        if let Err(error) = std::fs::remove_dir_all(directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %directory.display(), "RAM files stay behind");
        }
    }
}

enum FillError {
    Io(io::Error),
    Replica(farhaven_storage_sync::replica::ReplicaError),
}

impl FillError {
    fn or(
        self,
        io: impl FnOnce(io::Error) -> crate::site::ActivateError,
    ) -> crate::site::ActivateError {
        match self {
            FillError::Io(error) => io(error),
            FillError::Replica(error) => error.into(),
        }
    }
}

/// Makes it all zero: a hole is the quickest. The file does not shrink on the
/// way: a machine may have it mapped already.
fn empty(file: &File) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let length = file.metadata()?.len();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if length == 0 || fallocate(file, flags, 0, length).is_ok() {
        return Ok(());
    }
    static ZEROS: [u8; 16 * UNIT] = [0; 16 * UNIT];
    let mut at = 0;
    while at < length {
        let piece = (length - at).min(ZEROS.len() as u64);
        file.write_all_at(ZEROS.get(..piece as usize).unwrap_or(&ZEROS), at)?;
        at += piece;
    }
    Ok(())
}

fn same_ram(a: &Volume, b: &Volume) -> bool {
    a.kind == b.kind && (a.kind != VolumeKind::Ram || (a.name == b.name && a.bytes == b.bytes))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn whole(file: &File, volume: VolumeIndex, replica: &Replica) -> Result<u64, FillError> {
    let threads = crate::work::threads();
    let written = AtomicU64::new(0);
    let failed = Mutex::new(None);
    let write = |unit: u64, bytes: &[u8]| {
        written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if let Err(error) = file.write_all_at(bytes, unit * UNIT as u64) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    };
    replica
        .fill_parallel(volume, threads, &write)
        .map_err(FillError::Replica)?;
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(FillError::Io(error)),
        None => Ok(written.into_inner()),
    }
}

fn differences(
    file: &File,
    volume: VolumeIndex,
    from: &Replica,
    to: &Replica,
) -> Result<u64, FillError> {
    let mut written = 0;
    let mut bytes = Vec::new();
    for run in to
        .changes_since(from)
        .into_iter()
        .filter(|run| run.volume == volume)
    {
        let end = run.unit + run.count;
        let mut at = run.unit;
        while at < end {
            let piece = (end - at).min(PIECE);
            bytes.resize(piece as usize * UNIT, 0);
            to.read(volume, at, piece, &mut bytes)
                .map_err(FillError::Replica)?;
            file.write_all_at(&bytes, at * UNIT as u64)
                .map_err(FillError::Io)?;
            written += bytes.len() as u64;
            at += piece;
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail")]

    use super::*;
    use crate::guest::embedded;

    fn definition(bytes: u64) -> Definition {
        Definition::from(embedded::Definition {
            kind: "any".to_owned(),
            vcpus: 1,
            ram: vec![("ram".to_owned(), bytes)],
            disks: Vec::new(),
            config: Vec::new(),
        })
    }

    #[test]
    fn a_file_never_shrinks_under_a_machine() {
        let directory = tempfile::tempdir().unwrap();
        let path = ram_file(directory.path(), "ram");
        let warm = Warm::default();
        let large = 64 * UNIT as u64;
        warm.make_files(directory.path(), &definition(large))
            .unwrap();
        let mapped = open(&path).unwrap();
        mapped.write_all_at(&[7; UNIT], 63 * UNIT as u64).unwrap();
        warm.make_files(directory.path(), &definition(large))
            .unwrap();
        assert_eq!(
            mapped.metadata().unwrap().ino(),
            path.metadata().unwrap().ino()
        );

        warm.make_files(directory.path(), &definition(UNIT as u64))
            .unwrap();
        assert_eq!(path.metadata().unwrap().len(), UNIT as u64);
        assert_eq!(mapped.metadata().unwrap().len(), large);
        empty(&mapped).unwrap();
        assert_eq!(mapped.metadata().unwrap().len(), large);
        let mut last = [1; UNIT];
        mapped.read_exact_at(&mut last, 63 * UNIT as u64).unwrap();
        assert_eq!(last, [0; UNIT]);
    }
}
