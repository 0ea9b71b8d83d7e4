//! The catalogue's journal as a fuzz target: without sled, which is no parser of ours.

use std::path::Path;
use std::sync::Arc;

use super::Rows;
use super::journal::{self, Journal, OpenError, Tail};
use crate::disk::simulated::SimulatedDisk;
use crate::disk::{Access, Disk};

const PATH: &str = "/catalogue.journal";

/// A journal of these changes.
pub(crate) fn journal_of(rows: &[(&[u8], Option<&[u8]>)]) -> Vec<u8> {
    let mut bytes = journal::MAGIC.to_vec();
    let records = rows.iter().map(|(row, value)| journal::record(row, *value));
    records.for_each(|record| bytes.extend(record));
    bytes
}

/// It, its rows and what is torn; what can be read of a damaged one; nothing of a newer one.
fn read(disk: &SimulatedDisk) -> Result<(Journal, Rows, Tail), Option<Rows>> {
    match Journal::open(Arc::new(disk.clone()), Path::new(PATH)) {
        Ok(read) => Ok(read),
        Err(OpenError::Damaged(rows)) => Err(Some(rows)),
        Err(OpenError::File(error)) if error.is_newer() => Err(None),
        Err(OpenError::File(error)) => panic!("a disk without faults: {error}"),
    }
}

/// Opens it, and makes it whole; what was read is read again, and nothing is torn.
pub(crate) fn journal(bytes: &[u8]) {
    let disk = SimulatedDisk::new();
    let file = disk.open(Path::new(PATH), Access::Replace);
    let file = file.expect("a disk without faults");
    file.write_all_at(bytes, 0).expect("a disk without faults");
    file.sync().expect("a disk without faults");
    match read(&disk) {
        Ok((mut journal, rows, tail)) => {
            assert!(tail.bytes <= bytes.len() as u64);
            if tail.doubtful {
                // Not before it is written anew: that may be given up midway.
                let again = read(&disk).map(|(_, rows, tail)| (rows, tail.bytes));
                assert_eq!(again, Ok((rows.clone(), tail.bytes)));
                journal.rewrite(&rows).expect("a disk without faults");
            }
            let again = read(&disk).map(|(_, rows, tail)| (rows, tail.bytes));
            assert_eq!(again, Ok((rows, 0)));
        }
        // Nothing is changed in one that is damaged before its end, or newer.
        Err(rows) => assert_eq!(read(&disk).map(|(_, rows, _)| rows), Err(rows)),
    }
}
