//! The files of the test guest's filesystem that nobody changes: made on the
//! host with a listing of their checksums, checked in the guest.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::content::{PAGE, Words, sum};
use crate::ledger::{Aligned, failure, read_all};

const O_DIRECT: i32 = 0o40000;
const O_DSYNC: i32 = 0o10000;
const LISTING: &str = "LISTING";
/// Largest file that is kept.
const LARGEST: usize = 4 << 20;

/// Files that nobody changes, as listed when the image was made.
pub struct Library {
    pub files: Vec<(PathBuf, u64, u64)>,
    buffer: Aligned,
}

impl Library {
    /// Reads the listing.
    pub fn open(root: &Path) -> Self {
        let listing = fs::read_to_string(root.join(LISTING)).unwrap_or_default();
        let entry = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let bytes = words.next()?.parse().ok()?;
            let sum = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((root.join(words.next()?), bytes, sum))
        };
        Library {
            files: listing.lines().filter_map(entry).collect(),
            buffer: Aligned::new(LARGEST + PAGE),
        }
    }

    /// Is this file as it was listed?
    pub fn check(&mut self, index: u64) -> Result<(), String> {
        let (path, bytes, wanted) = &self.files[index as usize];
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let file = direct(path, false).map_err(|e| failure(&name, &e))?;
        let found = read_all(&file, self.buffer.change()).map_err(|e| failure(&name, &e))?;
        if found as u64 == *bytes && sum(&self.buffer.get()[..found]) == *wanted {
            return Ok(());
        }
        Err(format!("file-{name}-differs"))
    }
}

/// Opens a file around the page cache.
pub fn direct(path: &Path, write: bool) -> io::Result<File> {
    let flags = if write { O_DIRECT | O_DSYNC } else { O_DIRECT };
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path)
}

/// Adds generated files until `root` holds `bytes`, and lists everything there.
pub fn generate(root: &Path, seed: u64, bytes: u64) -> io::Result<()> {
    let mut listing = String::new();
    let mut total = 0;
    let mut folders = vec![root.to_owned()];
    let mut paths = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                paths.push(entry.path());
                total += entry.metadata()?.len();
            }
        }
    }
    let words = Words::new();
    let mut page = [0; PAGE];
    for number in 0.. {
        if total >= bytes {
            break;
        }
        let mut data = Vec::new();
        for index in 0..512 {
            words.fill_page(seed ^ 0xd15c, number * 512 + index, &mut page);
            data.extend_from_slice(&page);
        }
        total += data.len() as u64;
        let path = root.join(format!("generated-{number:03}"));
        fs::write(&path, data)?;
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let data = fs::read(&path)?;
        if data.len() > LARGEST {
            fs::remove_file(&path)?;
            continue;
        }
        let name = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        listing += &format!("{} {:016x} {name}\n", data.len(), sum(&data));
    }
    fs::write(root.join(LISTING), listing)
}
