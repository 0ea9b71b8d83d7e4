//! The small files of a site, beside its stores: what a loss of power leaves.
//!
//! The daemon writes them through the standard library, each where it needs one.
//! What it syncs is seen below that, at libc's `fsync` and `fdatasync`: of a file
//! its bytes, of a directory its names. All else that is there when the power goes
//! is lost or kept, each for itself, as POSIX allows it: names that were given,
//! taken away or put over others, bytes, lengths.
//!
//! A run has a process of its own, so what this module knows is of one run.

#![allow(
    unsafe_code,
    reason = "two calls of libc are answered here, by their C interface"
)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::system;

pub mod moment;

/// Below a site's directory: what guests write to, and what is gone with the
/// power anyway.
const NOT_ITS_OWN: [&str; 3] = ["programs", "ram", "run"];
/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// What is durable, by number of the inode: a tmpfs, which runs are in where there is
/// one, never gives one out again.
#[derive(Default, Clone)]
struct Synced {
    roots: Vec<PathBuf>,
    files: HashMap<u64, Vec<u8>>,
    directories: HashMap<u64, Names>,
}

type Names = BTreeMap<OsString, u64>;

/// What is broken on purpose: nothing is synced, and told to be.
static LIES: AtomicBool = AtomicBool::new(false);

/// From now on syncs are told and not made, or are made.
pub fn lie(lies: bool) {
    LIES.store(lies, Ordering::SeqCst);
}

static SYNCED: LazyLock<Mutex<Synced>> = LazyLock::new(Mutex::default);

/// Everything below a site's directory is durable, and watched from now on.
pub fn settle(root: &Path) {
    let mut synced = SYNCED.lock().unwrap();
    if !synced.roots.iter().any(|known| known == root) {
        synced.roots.push(root.to_owned());
    }
    synced.settle(root).unwrap();
}

/// The power goes: what is not durable is there with this chance.
pub fn power_cut(root: &Path, seed: u64, chance: f64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut synced = SYNCED.lock().unwrap();
    synced.lose(root, root, &mut random, chance).unwrap();
    // What is read after a start of the machine is on its disk.
    synced.settle(root).unwrap();
}

impl Synced {
    fn settle(&mut self, at: &Path) -> io::Result<()> {
        let names = names(at)?;
        for (name, entry) in &names {
            let path = at.join(name);
            match entry.directory {
                true => self.settle(&path)?,
                false => {
                    self.files.insert(entry.inode, fs::read(&path)?);
                }
            }
        }
        self.directories
            .insert(fs::metadata(at)?.ino(), inodes(names));
        Ok(())
    }

    fn lose(&self, root: &Path, at: &Path, random: &mut StdRng, chance: f64) -> io::Result<()> {
        let now = names(at)?;
        let nothing = Names::new();
        let durable = self.directories.get(&fs::metadata(at)?.ino());
        let durable = durable.unwrap_or(&nothing);
        let all: BTreeSet<&OsString> = now.keys().chain(durable.keys()).collect();
        for name in all {
            if at == root && NOT_ITS_OWN.iter().any(|not| name == not) {
                continue;
            }
            let path = at.join(name);
            let (here, before) = (now.get(name), durable.get(name));
            let same = here.map(|entry| entry.inode) == before.copied();
            if same || random.random_bool(chance) {
                match here {
                    Some(entry) if entry.directory => self.lose(root, &path, random, chance)?,
                    Some(entry) => self.tear(&path, entry.inode, random, chance)?,
                    None => {}
                }
                continue;
            }
            match here {
                Some(entry) if entry.directory => fs::remove_dir_all(&path)?,
                Some(_) => fs::remove_file(&path)?,
                None => {}
            }
            // A directory that was taken away stays away.
            if let Some(bytes) = before.and_then(|inode| self.files.get(inode)) {
                write(&path, bytes)?;
            }
        }
        Ok(())
    }

    /// What was written to a file since it was synced.
    fn tear(&self, path: &Path, inode: u64, random: &mut StdRng, chance: f64) -> io::Result<()> {
        let now = fs::read(path)?;
        let nothing = Vec::new();
        let durable = self.files.get(&inode).unwrap_or(&nothing);
        if now == *durable || random.random_bool(chance) {
            return Ok(());
        }
        // Lengths go by themselves, and sectors do.
        let length = match random.random_range(0..3) {
            0 => durable.len(),
            1 => now.len(),
            _ => random.random_range(0..=now.len().max(durable.len())),
        };
        let mut left = vec![0; length];
        for at in (0..length).step_by(SECTOR) {
            let end = (at + SECTOR).min(length);
            let written = now.get(at..end).filter(|_| random.random_bool(0.5));
            if let Some(bytes) = written.or_else(|| durable.get(at..end)) {
                left[at..end].copy_from_slice(bytes);
            } else if let Some(bytes) = durable.get(at..) {
                left[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        write(path, &left)
    }
}

struct Entry {
    inode: u64,
    directory: bool,
}

fn names(at: &Path) -> io::Result<BTreeMap<OsString, Entry>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(at)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() || kind.is_file() {
            let directory = kind.is_dir();
            let inode = match entry.metadata() {
                // The thread that writes events has put it over another.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                known => known?.ino(),
            };
            names.insert(entry.file_name(), Entry { inode, directory });
        }
    }
    Ok(names)
}

fn inodes(names: BTreeMap<OsString, Entry>) -> Names {
    let inodes = names.into_iter().map(|(name, entry)| (name, entry.inode));
    inodes.collect()
}

/// As the daemon makes its files: for nobody else.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = fs::File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)?.write_all(bytes)
}

/// A file or a directory was synced. False: it is none of a site's.
fn synced(file: libc::c_int) -> bool {
    let link = PathBuf::from(format!("/proc/self/fd/{file}"));
    let Ok(path) = fs::read_link(&link) else {
        return false;
    };
    let is_a_sites = {
        let synced = SYNCED.lock().unwrap();
        synced.roots.iter().any(|root| path.starts_with(root))
    };
    if !is_a_sites {
        return false;
    }
    if system::is_here() {
        moment::syncs(&path);
    }
    let mut synced = SYNCED.lock().unwrap();
    if LIES.load(Ordering::SeqCst) {
        return true;
    }
    let Ok(inode) = fs::metadata(&link).map(|meta| meta.ino()) else {
        return false;
    };
    match (names(&link), fs::read(&link)) {
        (Ok(names), _) => {
            synced.directories.insert(inode, inodes(names));
        }
        (_, Ok(bytes)) => {
            synced.files.insert(inode, bytes);
        }
        _ => return false,
    }
    true
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(file: libc::c_int) -> libc::c_int {
    match synced(file) {
        true => 0,
        // SAFETY: the caller's promise is the kernel's.
        false => unsafe { libc::syscall(libc::SYS_fsync, file) as libc::c_int },
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(file: libc::c_int) -> libc::c_int {
    match synced(file) {
        true => 0,
        // SAFETY: the caller's promise is the kernel's.
        false => unsafe { libc::syscall(libc::SYS_fdatasync, file) as libc::c_int },
    }
}
