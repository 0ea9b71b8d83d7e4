//! Where the sim guest keeps what, in its memory and on its disks, and in which
//! order the items of a region are rewritten.

use std::fmt;
use std::str::FromStr;

use farhaven_storage_sync::unit::UNIT;

/// Blocks of a file of the workload `files`.
pub(super) const FILE_BLOCKS: u64 = 64;

/// What a sim guest does all the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Ten changes a second.
    Idle,
    /// Transactions, so many a second: a page in place, a block of the
    /// write-ahead log, and now and then a block of the checkpoint.
    Database(u32),
    /// Files are filled, deleted and rewritten: MB/s.
    Files(u32),
    /// Memory is filled with what nothing compresses: MB/s.
    Noise(u32),
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Workload::Idle => f.write_str("idle"),
            Workload::Database(rate) => write!(f, "database:{rate}"),
            Workload::Files(rate) => write!(f, "files:{rate}"),
            Workload::Noise(rate) => write!(f, "noise:{rate}"),
        }
    }
}

/// Text that names no workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no workload of such a guest; they are idle, database[:CHANGES/S], files[:MB/S] and noise[:MB/S], with rates from 1 to 100000"
)]
pub struct WorkloadError(String);

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Workload, WorkloadError> {
        let unknown = || WorkloadError(text.chars().take(40).collect());
        let (name, rate) = match text.split_once(':') {
            Some((name, rate)) => (name, Some(rate.parse::<u32>().map_err(|_| unknown())?)),
            None => (text, None),
        };
        if rate.is_some_and(|rate| !(1..=100_000).contains(&rate)) {
            return Err(unknown());
        }
        match (name, rate) {
            ("idle", None) => Ok(Workload::Idle),
            ("database", rate) => Ok(Workload::Database(rate.unwrap_or(500))),
            ("files", rate) => Ok(Workload::Files(rate.unwrap_or(8))),
            ("noise", rate) => Ok(Workload::Noise(rate.unwrap_or(8))),
            _ => Err(unknown()),
        }
    }
}

/// Items rewritten in turn: number `seq` (from 1) goes to [`Region::place`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// Page or block of its first item.
    pub(super) first: u64,
    /// A power of two, or 0.
    pub(super) count: u64,
}

/// Odd, so that all places have their turn; spreads neighbours in time over the region.
const STRIDE: u64 = 0x2545_f491_4f6c_dd1d;
/// `STRIDE * BACK` is 1 modulo 2^64: each step of Newton's doubles the bits that fit.
const BACK: u64 = {
    let (mut back, mut step) = (STRIDE, 0);
    while step < 6 {
        back = back.wrapping_mul(2u64.wrapping_sub(STRIDE.wrapping_mul(back)));
        step += 1;
    }
    back
};

impl Region {
    fn new(first: u64, wanted: u64, most: u64) -> Self {
        let count = wanted.min(most).checked_ilog2().map_or(0, |bits| 1 << bits);
        Self { first, count }
    }

    /// First page or block after it.
    pub(super) fn end(self) -> u64 {
        self.first + self.count
    }

    /// The item within the region that a page or block of it is.
    pub(super) fn item(self, at: u64) -> Option<u64> {
        (self.first..self.end())
            .contains(&at)
            .then(|| at - self.first)
    }

    /// The item that number `seq` is written to.
    pub(super) fn place(self, seq: u64) -> u64 {
        seq.wrapping_mul(STRIDE) & self.count.saturating_sub(1)
    }

    /// The last number up to `done` that was written to `item`; 0 for none.
    pub(super) fn last(self, item: u64, done: u64) -> u64 {
        let back = done.wrapping_sub(item.wrapping_mul(BACK)) & self.count.saturating_sub(1);
        done.saturating_sub(back)
    }

    /// The same for a region written from its first item to its last, around and around.
    pub(super) fn last_around(self, item: u64, done: u64) -> u64 {
        let back = done.wrapping_sub(item + 1) & self.count.saturating_sub(1);
        done.saturating_sub(back)
    }
}

/// A disk's regions; the rest never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskLayout {
    /// The write-ahead log.
    pub(super) log: Region,
    /// The checkpoint.
    pub(super) table: Region,
    /// Items are files of [`FILE_BLOCKS`] blocks.
    pub(super) files: Region,
    /// First block of the files.
    pub(super) files_at: u64,
    /// Whole blocks of the disk.
    pub(super) blocks: u64,
}

/// Memory's regions, page 0 being the intents; the rest never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) table: Region,
    pub(super) noise: Region,
    /// The page cache: the first files of the first disk.
    pub(super) cache_at: u64,
    pub(super) cached_files: u64,
    pub(super) pages: u64,
    pub(super) disks: Vec<DiskLayout>,
}

impl Layout {
    pub(super) fn new(ram_bytes: u64, disks: &[u64], workload: Workload) -> Self {
        let unit = UNIT as u64;
        let pages = ram_bytes / unit;
        let disks: Vec<_> = disks.iter().map(|bytes| disk(bytes / unit)).collect();
        let table = Region::new(1, pages / 8, 4096);
        let noisy = matches!(workload, Workload::Noise(_));
        let noise = Region::new(table.end(), if noisy { pages / 8 } else { 0 }, 8192);
        let files = disks.first().map_or(0, |disk| disk.files.count);
        Self {
            table,
            noise,
            cache_at: noise.end(),
            cached_files: files.min(pages / 4 / FILE_BLOCKS),
            pages,
            disks,
        }
    }

    /// First page of memory that never changes.
    pub(super) fn still_page(&self) -> u64 {
        self.cache_at + self.cached_files * FILE_BLOCKS
    }

    pub(super) fn blocks(&self) -> u64 {
        self.disks.iter().map(|disk| disk.blocks).sum()
    }
}

impl DiskLayout {
    /// First block that never changes.
    pub(super) fn still_block(&self) -> u64 {
        self.files_at + self.files.count * FILE_BLOCKS
    }
}

fn disk(blocks: u64) -> DiskLayout {
    let log = Region::new(0, blocks / 16, 1024);
    let table = Region::new(log.end(), blocks / 8, 4096);
    DiskLayout {
        log,
        table,
        files: Region::new(0, blocks / 4 / FILE_BLOCKS, 64),
        files_at: table.end(),
        blocks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_write_to_an_item_is_known() {
        for count in [1u64, 2, 8, 64] {
            let region = Region { first: 5, count };
            let mut last = vec![0; count as usize];
            let mut around = vec![0; count as usize];
            for done in 0..300 {
                if done > 0 {
                    last[region.place(done) as usize] = done;
                    around[((done - 1) % count) as usize] = done;
                }
                for item in 0..count {
                    assert_eq!(region.last(item, done), last[item as usize]);
                    assert_eq!(region.last_around(item, done), around[item as usize]);
                }
            }
        }
    }

    #[test]
    fn workloads_are_read_as_they_are_written() {
        for text in ["idle", "database:7", "files:100000", "noise:200"] {
            assert_eq!(
                text.parse::<Workload>().map(|w| w.to_string()),
                Ok(text.to_owned())
            );
        }
        assert_eq!("noise".parse(), Ok(Workload::Noise(8)));
        for text in ["", "idle:1", "noise:0", "noise:100001", "noise:x", "web"] {
            assert!(text.parse::<Workload>().is_err(), "{text}");
        }
    }
}
