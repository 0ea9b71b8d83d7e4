//! The calls of the simulated disk.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use rustix::io::Errno;

use super::{Change, Content, Fault, Name, NameChange, SimulatedDisk, State, apply};
use crate::disk::{Access, Disk, DiskFile, OpenFile};

#[derive(Debug)]
struct SimulatedFile {
    disk: SimulatedDisk,
    file: u64,
    path: PathBuf,
    holds_lock: AtomicBool,
}

impl Disk for SimulatedDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<OpenFile> {
        let mut state = self.state();
        let found = state.names.get(path).copied();
        let made = found.is_none() && access != Access::Read;
        state.plain("open", path, made || access == Access::Replace, made)?;
        let file = match found {
            Some(Name::Dir) => return Err(ErrorKind::IsADirectory.into()),
            Some(Name::File(file)) => file,
            None if access == Access::Read || !state.is_dir(path.parent()) => {
                return Err(ErrorKind::NotFound.into());
            }
            None => {
                state.next_file += 1;
                let file = state.next_file;
                state.files.insert(file, Content::default());
                state.name(NameChange::Made(path.to_path_buf(), Name::File(file)));
                file
            }
        };
        if access == Access::Replace
            && let Some(content) = state.files.get_mut(&file)
            && !content.shown.is_empty()
        {
            content.change(Change::Length(0));
        }
        drop(state);
        Ok(Arc::new(SimulatedFile {
            disk: self.clone(),
            file,
            path: path.to_path_buf(),
            holds_lock: false.into(),
        }))
    }

    fn make_dir(&self, path: &Path) -> io::Result<bool> {
        let mut state = self.state();
        let there = state.is_dir(Some(path));
        state.plain("make directory", path, !there, !there)?;
        if there {
            return Ok(false);
        }
        if !state.is_dir(path.parent()) {
            return Err(ErrorKind::NotFound.into());
        }
        state.name(NameChange::Made(path.to_path_buf(), Name::Dir));
        Ok(true)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let mut state = self.state();
        state.plain("list", dir, false, false)?;
        if !state.is_dir(Some(dir)) {
            return Err(ErrorKind::NotFound.into());
        }
        let names = state.names.keys();
        let inside = names.filter(|path| path.parent() == Some(dir));
        Ok(inside
            .filter_map(|path| Some(path.file_name()?.to_owned()))
            .collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.plain("rename", from, true, true)?;
        let Some(&Name::File(file)) = state.names.get(from) else {
            return Err(ErrorKind::NotFound.into());
        };
        state.name(NameChange::Renamed(
            from.to_path_buf(),
            to.to_path_buf(),
            file,
        ));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.plain("remove", path, true, false)?;
        if !matches!(state.names.get(path), Some(Name::File(_))) {
            return Err(ErrorKind::NotFound.into());
        }
        state.name(NameChange::Removed(path.to_path_buf()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.plain("sync directory", dir, true, false)?;
        if !state.is_dir(Some(dir)) {
            return Err(ErrorKind::NotFound.into());
        }
        let State {
            unsynced_names,
            medium_names,
            ..
        } = &mut *state;
        unsynced_names.retain(|change| {
            let here = change.dir() == Some(dir);
            if here {
                change.apply(medium_names);
            }
            !here
        });
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let mut state = self.state();
        state.plain("find", path, false, false)?;
        Ok(state.names.contains_key(path))
    }
}

impl SimulatedFile {
    /// The disk and how this call fails.
    fn call(
        &self,
        what: &str,
        changes: bool,
        may: &[Fault],
    ) -> (MutexGuard<'_, State>, Option<Fault>) {
        let mut state = self.disk.state();
        let fault = state.call(what, &self.path, changes, may);
        (state, fault)
    }
}

fn content(state: &mut State, file: u64) -> io::Result<&mut Content> {
    state.files.get_mut(&file).ok_or(ErrorKind::NotFound.into())
}

impl DiskFile for SimulatedFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let (mut state, fault) = self.call("read", false, &[Fault::Io, Fault::Short]);
        if fault == Some(Fault::Io) {
            return Err(Errno::IO.into());
        }
        let shown = &content(&mut state, self.file)?.shown;
        let rest = shown.get(offset as usize..).unwrap_or_default();
        let mut count = rest.len().min(out.len());
        if fault == Some(Fault::Short) && count > 1 {
            count /= 2;
        }
        out[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let (mut state, fault) = self.call("write", true, &[Fault::Io, Fault::Full, Fault::Short]);
        let broken = std::mem::take(&mut state.broken);
        state.broken = fault == Some(Fault::Short);
        let content = content(&mut state, self.file)?;
        let half = bytes.len() / 2;
        match fault {
            Some(Fault::Io) => {
                content.change(Change::Bytes(offset, bytes[..half].into()));
                Err(Errno::IO.into())
            }
            Some(Fault::Full) => {
                content.change(Change::Bytes(offset, bytes[..half].into()));
                Err(Errno::NOSPC.into())
            }
            Some(Fault::Short) => {
                content.change(Change::Bytes(offset, bytes[..half].into()));
                Ok(half)
            }
            None if broken => Err(Errno::IO.into()),
            None => {
                content.change(Change::Bytes(offset, bytes.into()));
                Ok(bytes.len())
            }
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let (mut state, fault) = self.call("cut", true, &[Fault::Io]);
        if fault == Some(Fault::Io) {
            return Err(Errno::IO.into());
        }
        content(&mut state, self.file)?.change(Change::Length(bytes));
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        let (mut state, fault) = self.call("measure", false, &[Fault::Io]);
        if fault == Some(Fault::Io) {
            return Err(Errno::IO.into());
        }
        Ok(content(&mut state, self.file)?.shown.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let (mut state, fault) = self.call("sync", true, &[Fault::Io, Fault::Full]);
        let content = content(&mut state, self.file)?;
        let unsynced = std::mem::take(&mut content.unsynced);
        match fault {
            // Bytes are dropped, for good; lengths are the file system's own and stay.
            Some(fault @ (Fault::Io | Fault::Full)) => {
                let lengths = unsynced.into_iter();
                let lengths = lengths.filter(|change| matches!(change, Change::Length(_)));
                content.unsynced = lengths.collect();
                Err(match fault {
                    Fault::Full => Errno::NOSPC.into(),
                    _ => Errno::IO.into(),
                })
            }
            _ => {
                let Content { medium, .. } = content;
                unsynced.iter().for_each(|change| apply(medium, change));
                Ok(())
            }
        }
    }

    fn forget(&self) -> io::Result<()> {
        let (mut state, fault) = self.call("forget", false, &[Fault::Io]);
        if fault == Some(Fault::Io) {
            return Err(Errno::IO.into());
        }
        let content = content(&mut state, self.file)?;
        let mut shown = content.medium.clone();
        content
            .unsynced
            .iter()
            .for_each(|change| apply(&mut shown, change));
        content.shown = shown;
        Ok(())
    }

    fn lock(&self) -> io::Result<bool> {
        let (mut state, fault) = self.call("lock", false, &[Fault::Io]);
        if fault == Some(Fault::Io) {
            return Err(Errno::IO.into());
        }
        let content = content(&mut state, self.file)?;
        let taken = std::mem::replace(&mut content.locked, true);
        if !taken {
            self.holds_lock.store(true, Ordering::Relaxed);
        }
        Ok(!taken)
    }
}

impl Drop for SimulatedFile {
    fn drop(&mut self) {
        if self.holds_lock.load(Ordering::Relaxed)
            && let Some(content) = self.disk.state().files.get_mut(&self.file)
        {
            content.locked = false;
        }
    }
}
