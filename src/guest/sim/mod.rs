//! A guest that needs no /dev/kvm: a seeded program that changes memory and
//! disks by a named workload, and proves itself.
//!
//! [`mutator`] is the program, a pure function of seed and registers; [`content`]
//! and [`layout`] say what it writes where. [`vmm`] runs it in a thread, over a
//! RAM file and [`TrackedDisk`]s, tracks exactly what it writes, and is the
//! monitor that the engine protects. [`build`] makes it anew at the peer, where
//! it goes on from its very next step. On its console it says how it fares, in
//! the words of every guest of ours that proves itself.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use farhaven_storage_sync::unit::UNIT;
use serde::{Deserialize, Serialize};

use super::embedded::console::Console;
use super::embedded::disk::TrackedDisk;
use super::embedded::{Definition, SharedVmm};
use content::Content;
use layout::Layout;
pub use layout::{Workload, WorkloadError};
use mutator::Mutator;
use vmm::SimVmm;

pub mod build;
mod content;
mod layout;
mod mutator;
#[cfg(test)]
mod tests;
mod vmm;

pub use build::SimBuilder;

/// [`Definition::kind`] of a sim guest.
pub const KIND: &str = "sim";

/// Least memory, and least size of a disk.
pub const LEAST_BYTES: u64 = 1 << 20;
/// Most memory.
pub const MOST_RAM: u64 = 1 << 40;
/// Largest disk.
pub const MOST_DISK: u64 = 1 << 42;
/// Most disks.
pub const MOST_DISKS: usize = 16;

/// What a sim guest is made of.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Everything it will do follows from it.
    pub seed: u64,
    /// Bytes of memory: whole 4 KiB pages.
    pub ram_bytes: u64,
    /// Disks: name and bytes.
    pub disks: Vec<(String, u64)>,
    /// What it does all the time.
    pub workload: Workload,
    /// Directory of its console and its disks' images `disk-0.img`, ...; made when missing.
    pub run: PathBuf,
    /// Its RAM file, best on a tmpfs. Made anew, as are the images.
    pub ram: PathBuf,
}

/// A sim guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// Sizes or names that cannot be.
    #[error("{0}")]
    Options(String),
    /// A file of it.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file.
        what: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> SimError {
    let what = format!("{what} {}", path.display());
    move |source| SimError::Io { what, source }
}

/// The builder's part of a definition.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Config {
    /// Of this and of the registers.
    version: u8,
    seed: u64,
    workload: String,
}

/// The only version so far.
const VERSION: u8 = 1;

/// Starts sim guests.
pub struct SimGuest;

impl SimGuest {
    /// Starts a guest from nothing: fills its memory and disks, and lets it run.
    ///
    /// # Errors
    /// When its sizes cannot be, or its files cannot be made.
    pub fn start(options: SimOptions) -> Result<(SharedVmm, Definition), SimError> {
        let definition = options.definition();
        let (mutator, _) = program(&definition).map_err(SimError::Options)?;
        std::fs::create_dir_all(&options.run).map_err(failed("making", &options.run))?;
        let ram = fill_ram(&options.ram, options.ram_bytes, &mutator)
            .map_err(failed("filling", &options.ram))?;
        let mut disks = Vec::new();
        for (index, (name, bytes)) in options.disks.iter().enumerate() {
            let image = image(&options.run, index);
            let disk = fill_disk(name, &image, *bytes, index, &mutator)
                .map_err(failed("filling", &image))?;
            disks.push(disk);
        }
        let console =
            Console::open(&options.run).map_err(failed("opening a console in", &options.run))?;
        let vmm = SimVmm::new(mutator, ram, options.ram_bytes, disks, console)
            .map_err(failed("starting a thread for", &options.run))?;
        vmm.set_running(true);
        Ok((Arc::new(Mutex::new(vmm)), definition))
    }
}

impl SimOptions {
    fn definition(&self) -> Definition {
        let config = Config {
            version: VERSION,
            seed: self.seed,
            workload: self.workload.to_string(),
        };
        let mut bytes = Vec::new();
        // Writing numbers and text to memory fails nowhere; empty, it would be refused.
        let _ = ciborium::into_writer(&config, &mut bytes);
        Definition {
            kind: KIND.to_owned(),
            vcpus: 1,
            ram: vec![("ram".to_owned(), self.ram_bytes)],
            disks: self.disks.clone(),
            config: bytes,
        }
    }
}

/// Where the image of a disk is: names come from elsewhere and name no files.
fn image(run: &Path, index: usize) -> PathBuf {
    run.join(format!("disk-{index}.img"))
}

/// A device state, and a definition, of a peer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzzing(state: &[u8], definition: Option<&Definition>) {
    vmm::fuzzing(state);
    if let Some(definition) = definition {
        let _ = program(definition);
    }
}

/// The program that a definition describes, and its memory's size: bytes of a
/// peer. What is wrong is said to people.
fn program(definition: &Definition) -> Result<(Mutator, u64), String> {
    if definition.kind != KIND {
        return Err(format!(
            "a guest of kind '{:.40}' is no sim guest",
            definition.kind
        ));
    }
    if definition.config.len() > 4096 {
        return Err("its configuration is longer than any of a sim guest".to_owned());
    }
    let config: Config = ciborium::from_reader(definition.config.as_slice())
        .map_err(|error| format!("its configuration cannot be read: {error}"))?;
    if config.version != VERSION {
        return Err(format!(
            "its configuration has version {}, this site knows {VERSION}; bring both sites to one version of farhaven",
            config.version
        ));
    }
    let workload: Workload = config
        .workload
        .parse()
        .map_err(|e: WorkloadError| e.to_string())?;
    let [(_, ram)] = definition.ram.as_slice() else {
        return Err(format!(
            "it has {} blocks of memory instead of one",
            definition.ram.len()
        ));
    };
    if !(LEAST_BYTES..=MOST_RAM).contains(ram) || ram % UNIT as u64 != 0 {
        return Err(format!(
            "its memory of {ram} bytes is no whole number of pages, or not within {LEAST_BYTES} to {MOST_RAM}"
        ));
    }
    if definition.disks.len() > MOST_DISKS {
        return Err(format!(
            "it has {} disks, {MOST_DISKS} are the most",
            definition.disks.len()
        ));
    }
    for (index, (name, bytes)) in definition.disks.iter().enumerate() {
        let others = definition.disks.iter().take(index);
        if name.is_empty() || name.len() > 100 || others.into_iter().any(|(other, _)| other == name)
        {
            return Err(format!(
                "'{name:.40}' cannot be a disk's name, or is that of two"
            ));
        }
        if !(LEAST_BYTES..=MOST_DISK).contains(bytes) {
            return Err(format!(
                "disk '{name}' of {bytes} bytes is not within {LEAST_BYTES} to {MOST_DISK}"
            ));
        }
    }
    let disks: Vec<u64> = definition.disks.iter().map(|(_, bytes)| *bytes).collect();
    let layout = Layout::new(*ram, &disks, workload);
    Ok((Mutator::new(config.seed, workload, layout), *ram))
}

/// Pages composed before they are written.
const PIECE: u64 = 64;

/// Writes what is not zeros of `count` pages to a file full of holes.
fn fill(
    count: u64,
    mut compose: impl FnMut(u64, &mut Content),
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut bytes = vec![0; PIECE as usize * UNIT];
    for first in (0..count).step_by(PIECE as usize) {
        let (units, _) = bytes.as_chunks_mut::<UNIT>();
        let mut filled = 0;
        for (at, content) in (first..count).zip(units.iter_mut()) {
            compose(at, content);
            filled += 1;
        }
        let mut at = first;
        let zero = |content: &Content| farhaven_storage_sync::digest::is_zero(content);
        let (units, _) = units.split_at(filled);
        for run in units.chunk_by(|one, next| zero(one) == zero(next)) {
            if run.first().is_some_and(|content| !zero(content)) {
                write(at, run.as_flattened())?;
            }
            at += run.len() as u64;
        }
    }
    Ok(())
}

fn fill_ram(path: &Path, bytes: u64, mutator: &Mutator) -> io::Result<std::fs::File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.set_len(bytes)?;
    fill(
        mutator.layout.pages,
        |page, content| mutator.page(page, content),
        |page, bytes| file.write_all_at(bytes, page * UNIT as u64),
    )?;
    Ok(file)
}

fn fill_disk(
    name: &str,
    image: &Path,
    bytes: u64,
    index: usize,
    mutator: &Mutator,
) -> io::Result<Arc<TrackedDisk>> {
    match std::fs::remove_file(image) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let disk = TrackedDisk::open(name, image, bytes)?;
    fill(
        mutator
            .layout
            .disks
            .get(index)
            .map_or(0, |disk| disk.blocks),
        |block, content| mutator.block(index, block, content),
        |block, bytes| disk.write(block * UNIT as u64, bytes),
    )?;
    Ok(disk)
}
