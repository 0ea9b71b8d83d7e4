//! A disk in memory that does what real ones do on a bad day, from a seed.
//!
//! Memory and medium are kept apart. What is written or named shows at once,
//! and reaches the medium when it is synced. [`SimulatedDisk::power_cut`] gives
//! the disk as a machine finds it that lost power now: of all that was not
//! synced any part may be there and any other not, in sectors of 512 bytes and
//! in whole names. A failed sync drops the written bytes for good while memory
//! goes on showing them, and the next sync says that all is well, as Linux
//! does; names that failed to sync stay unsynced.

mod calls;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

/// What a disk keeps or loses as one.
const SECTOR: usize = 512;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// EIO. Of a write some sectors are there, of a sync nothing.
    Io,
    /// ENOSPC, for calls that need room; others go through.
    Full,
    /// Half a write is done and said to be; then EIO. Other calls go through.
    Short,
}

#[derive(Debug, Clone)]
enum Change {
    Bytes(u64, Arc<[u8]>),
    Length(u64),
}

#[derive(Debug, Clone, Default)]
struct Content {
    /// What reading shows.
    shown: Vec<u8>,
    /// What the medium has.
    medium: Vec<u8>,
    /// What it has not yet, in order.
    unsynced: Vec<Change>,
    locked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Dir,
    File(u64),
}

#[derive(Debug, Clone)]
enum NameChange {
    Made(PathBuf, Name),
    Renamed(PathBuf, PathBuf, u64),
    Removed(PathBuf),
}

impl NameChange {
    fn dir(&self) -> Option<&Path> {
        match self {
            NameChange::Made(path, _)
            | NameChange::Renamed(path, ..)
            | NameChange::Removed(path) => path.parent(),
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Name>) {
        match self {
            NameChange::Made(path, name) => drop(names.insert(path.clone(), *name)),
            NameChange::Renamed(from, to, file) => {
                names.remove(from);
                names.insert(to.clone(), Name::File(*file));
            }
            NameChange::Removed(path) => drop(names.remove(path)),
        }
    }
}

/// A moment at which the power may go.
#[derive(Debug, Clone)]
pub struct Moment {
    /// Which call was next, counted from 1.
    pub call: u64,
    /// That call, in words.
    pub what: String,
    /// The disk just before it.
    pub disk: SimulatedDisk,
}

#[derive(Debug, Clone, Default)]
struct State {
    files: HashMap<u64, Content>,
    next_file: u64,
    names: BTreeMap<PathBuf, Name>,
    medium_names: BTreeMap<PathBuf, Name>,
    unsynced_names: Vec<NameChange>,
    calls: u64,
    fault: Option<(u64, Fault)>,
    /// The next write ends in EIO: it follows a short one.
    broken: bool,
    hit: Option<String>,
    watched: Option<Vec<Moment>>,
    last: Option<Last>,
    listener: Option<Listener>,
}

/// The last change that a daemon makes before it dies.
#[derive(Clone)]
struct Last {
    /// How many changes there are to it.
    left: u64,
    told: Arc<Told>,
}

type Told = dyn Fn(SimulatedDisk) + Send + Sync;

impl std::fmt::Debug for Last {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Last({})", self.left)
    }
}

/// Hears of every call, from the thread that makes it: what it is, and whether it
/// fails as it was told to.
#[derive(Clone)]
struct Listener(Arc<Hears>);

type Hears = dyn Fn(&str, bool) + Send + Sync;

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

/// A handle to the disk: clones share it.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk(Arc<Mutex<State>>);

fn write_into(bytes: &mut Vec<u8>, offset: usize, new: &[u8]) {
    if bytes.len() < offset + new.len() {
        bytes.resize(offset + new.len(), 0);
    }
    bytes[offset..offset + new.len()].copy_from_slice(new);
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Bytes(offset, new) => write_into(bytes, *offset as usize, new),
        Change::Length(length) => bytes.resize(*length as usize, 0),
    }
}

impl Content {
    fn change(&mut self, change: Change) {
        apply(&mut self.shown, &change);
        self.unsynced.push(change);
    }

    /// What a power cut leaves: each sector and each length by itself.
    fn cut(&self, chance: f64, random: &mut StdRng) -> Vec<u8> {
        let mut left = self.medium.clone();
        for change in &self.unsynced {
            match change {
                Change::Length(_) if !random.random_bool(chance) => {}
                Change::Length(_) => apply(&mut left, change),
                Change::Bytes(offset, new) => {
                    let offset = *offset as usize;
                    // A length may arrive before the bytes that it is for.
                    if random.random_bool(chance / 2.0) && left.len() < offset + new.len() {
                        left.resize(offset + new.len(), 0);
                    }
                    let mut at = 0;
                    while at < new.len() {
                        let end = new.len().min(at + SECTOR - (offset + at) % SECTOR);
                        if random.random_bool(chance) {
                            write_into(&mut left, offset + at, &new[at..end]);
                        }
                        at = end;
                    }
                }
            }
        }
        left
    }
}

impl SimulatedDisk {
    /// An empty disk, with the directory `/`.
    pub fn new() -> SimulatedDisk {
        let disk = SimulatedDisk::default();
        let mut state = disk.state();
        state.names.insert("/".into(), Name::Dir);
        state.medium_names.insert("/".into(), Name::Dir);
        drop(state);
        disk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the disk that goes its own way; nobody has files of it open.
    pub fn copy(&self) -> SimulatedDisk {
        self.state().aside()
    }

    /// The disk after the power went. Each part that was not synced is there
    /// with this chance, by this seed.
    pub fn power_cut(&self, seed: u64, chance: f64) -> SimulatedDisk {
        let mut random = StdRng::seed_from_u64(seed);
        let now = self.state();
        let mut after = State {
            next_file: now.next_file,
            names: now.medium_names.clone(),
            ..State::default()
        };
        for change in &now.unsynced_names {
            if random.random_bool(chance) {
                change.apply(&mut after.names);
            }
        }
        // What is under a directory that has no name is gone.
        let names = after.names.clone();
        let reached = |path: &Path| {
            let mut above = path.ancestors().skip(1);
            above.all(|dir| names.get(dir) == Some(&Name::Dir))
        };
        after.names.retain(|path, _| reached(path));
        let mut files: Vec<u64> = Vec::new();
        files.extend(after.names.values().filter_map(|name| match name {
            Name::File(file) => Some(*file),
            Name::Dir => None,
        }));
        files.sort_unstable();
        for file in files {
            if let Some(content) = now.files.get(&file) {
                let left = content.cut(chance, &mut random);
                let content = Content {
                    shown: left.clone(),
                    medium: left,
                    ..Content::default()
                };
                after.files.insert(file, content);
            }
        }
        after.medium_names = after.names.clone();
        SimulatedDisk(Arc::new(Mutex::new(after)))
    }

    /// Calls so far, of all kinds.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// The `nth` call from now on fails so.
    pub fn fail(&self, nth: u64, fault: Fault) {
        let mut state = self.state();
        state.fault = Some((state.calls + nth, fault));
        state.hit = None;
    }

    /// Did a call fail as it was told to?
    pub fn was_hit(&self) -> bool {
        self.state().hit.is_some()
    }

    /// The call that failed, in words, if one did; none will any more.
    pub fn heal(&self) -> Option<String> {
        let mut state = self.state();
        state.fault = None;
        state.broken = false;
        state.hit.take()
    }

    /// Has every call told to `listener`, with the disk held: it must not call it.
    pub fn listen(&self, listener: impl Fn(&str, bool) + Send + Sync + 'static) {
        self.state().listener = Some(Listener(Arc::new(listener)));
    }

    /// `told` gets a copy of the disk as it is right before the `nth` change from now on,
    /// with this one held: it must not call it.
    pub fn die_at(&self, nth: u64, told: impl Fn(SimulatedDisk) + Send + Sync + 'static) {
        let (left, told) = (nth.max(1), Arc::new(told));
        self.state().last = Some(Last { left, told });
    }

    /// Nobody is told of a change any more.
    pub fn spare(&self) {
        self.state().last = None;
    }

    /// Bytes of memory that all of it takes up.
    pub fn memory(&self) -> usize {
        let of = |content: &Content| {
            let unsynced = content.unsynced.iter().map(|change| match change {
                Change::Bytes(_, bytes) => bytes.len(),
                Change::Length(_) => 0,
            });
            content.shown.capacity() + content.medium.capacity() + unsynced.sum::<usize>()
        };
        self.state().files.values().map(of).sum()
    }

    /// Begins to keep the disk as it is before every call that changes it.
    pub fn watch(&self) {
        self.state().watched = Some(Vec::new());
    }

    /// Ends that, and gives those moments.
    pub fn moments(&self) -> Vec<Moment> {
        self.state().watched.take().unwrap_or_default()
    }

    /// All files, with what they hold.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let state = self.state();
        let files = state.names.iter().filter_map(|(path, name)| match name {
            Name::File(file) => Some((path.clone(), state.files.get(file)?.shown.clone())),
            Name::Dir => None,
        });
        files.collect()
    }

    /// Flips a bit on the medium. `false`: there is no such byte.
    pub fn flip(&self, path: &Path, byte: usize, bit: u8) -> bool {
        let mut state = self.state();
        let Some(&Name::File(file)) = state.names.get(path) else {
            return false;
        };
        let Some(content) = state.files.get_mut(&file) else {
            return false;
        };
        for bytes in [&mut content.shown, &mut content.medium] {
            match bytes.get_mut(byte) {
                Some(byte) => *byte ^= 1 << (bit & 7),
                None => return false,
            }
        }
        true
    }
}

impl State {
    /// A disk as this one is, that goes its own way.
    fn aside(&self) -> SimulatedDisk {
        let mut copy = self.clone();
        copy.files.values_mut().for_each(|file| file.locked = false);
        (copy.watched, copy.fault, copy.hit) = (None, None, None);
        (copy.last, copy.listener) = (None, None);
        SimulatedDisk(Arc::new(Mutex::new(copy)))
    }

    /// Counts a call, keeps the moment, and says how it is to fail.
    fn call(&mut self, what: &str, path: &Path, changes: bool, may: &[Fault]) -> Option<Fault> {
        self.calls += 1;
        let words = || format!("{what} {}", path.display());
        if changes && self.watched.is_some() {
            let moment = Moment {
                call: self.calls,
                what: words(),
                disk: self.aside(),
            };
            self.watched.get_or_insert_default().push(moment);
        }
        if changes && let Some(last) = &mut self.last {
            last.left -= 1;
            if last.left == 0
                && let Some(last) = self.last.take()
            {
                (last.told)(self.aside());
            }
        }
        let failing = match self.fault {
            Some((at, fault)) if at == self.calls && may.contains(&fault) => {
                self.hit = Some(format!("{fault:?} at call {at}: {}", words()));
                Some(fault)
            }
            _ => None,
        };
        if let Some(listener) = &self.listener {
            (listener.0)(what, failing.is_some());
        }
        failing
    }

    /// A call that fails with EIO or ENOSPC and then does nothing at all.
    fn plain(&mut self, what: &str, path: &Path, changes: bool, grows: bool) -> io::Result<()> {
        let may = [Fault::Io, Fault::Full];
        let may = if grows { &may[..] } else { &may[..1] };
        match self.call(what, path, changes, may) {
            Some(Fault::Full) => Err(Errno::NOSPC.into()),
            Some(_) => Err(Errno::IO.into()),
            None => Ok(()),
        }
    }

    fn name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.unsynced_names.push(change);
    }

    fn is_dir(&self, path: Option<&Path>) -> bool {
        path.is_some_and(|path| self.names.get(path) == Some(&Name::Dir))
    }
}
