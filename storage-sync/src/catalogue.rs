//! The catalogue: sites, guests, groups and what else is worth a list.
//!
//! Rows are JSON under a table and a key. They are kept in sled, and every
//! change also goes to a journal beside it (`journal.rs`), which is synced
//! before a flush returns. The journal decides: on opening, sled is made equal
//! to it, and a sled directory that is missing or damaged is made again. Where the
//! journal itself is damaged sled's rows are taken. This
//! is the only file that names sled.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod journal;
mod table;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::disk::{Disk, OpenFile, SystemDisk};
use crate::files::{FileError, LockError, aside, lock, make_dir, put_whole, read_front, set_aside};
use crate::limits::{CATALOGUE_KEY, CATALOGUE_VALUE};
use journal::Journal;
pub use table::Table;

/// Memory that sled may use for its cache.
const CACHE: u64 = 8 << 20;

/// Why the catalogue refused.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// Taken by another process.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// sled failed.
    #[error(
        "the catalogue in {} failed: {why}; stop the daemon, remove that directory \
         (it is made again from catalogue.journal) and start it", dir.display()
    )]
    Database {
        /// sled's directory.
        dir: PathBuf,
        /// Its reason.
        why: String,
    },
    /// A row is not what it should be.
    #[error("row {key:?} of {table:?} cannot be read as what is expected there: {source}")]
    Row {
        /// The table.
        table: Table,
        /// The key.
        key: String,
        /// JSON's reason.
        #[source]
        source: serde_json::Error,
    },
    /// Too long.
    #[error("row {key:?} of {table:?} is too long ({bytes} bytes)")]
    Size {
        /// The table.
        table: Table,
        /// The key, cut short.
        key: String,
        /// Bytes of key and value.
        bytes: usize,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What opening had to mend. Worth telling the operator unless it is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CatalogueReport {
    /// The sled directory was made again from the journal.
    pub rebuilt: bool,
    /// The journal was made again from sled.
    pub journal_rebuilt: bool,
    /// What was damaged was renamed to this.
    pub set_aside: Vec<PathBuf>,
    /// Bytes at the journal's end that a crash left; they were never flushed.
    pub torn_bytes: u64,
}

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;
/// Its key, and what it holds.
type Row = (Vec<u8>, Vec<u8>);

/// An open catalogue. All methods may be called from any thread.
pub struct Catalogue {
    sled_dir: PathBuf,
    database: Database,
    journal: Mutex<Journal>,
    _lock: OpenFile,
}

impl std::fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Catalogue({})", self.sled_dir.display())
    }
}

/// Where rows are looked up.
enum Database {
    Sled(sled::Db),
    Memory(Mutex<Rows>),
}

impl Database {
    fn insert(&self, row: Vec<u8>, value: Vec<u8>) -> Result<(), sled::Error> {
        match self {
            Database::Sled(sled) => sled.insert(row, value).map(drop),
            Database::Memory(rows) => {
                held(rows).insert(row, value);
                Ok(())
            }
        }
    }

    fn remove(&self, row: &[u8]) -> Result<bool, sled::Error> {
        match self {
            Database::Sled(sled) => sled.remove(row).map(|old| old.is_some()),
            Database::Memory(rows) => Ok(held(rows).remove(row).is_some()),
        }
    }

    fn get(&self, row: &[u8]) -> Result<Option<Vec<u8>>, sled::Error> {
        match self {
            Database::Sled(sled) => sled.get(row).map(|found| found.map(|v| v.to_vec())),
            Database::Memory(rows) => Ok(held(rows).get(row).cloned()),
        }
    }

    /// Rows that begin with this, in order.
    fn scan(&self, first: u8) -> Result<Vec<Row>, sled::Error> {
        let copied = |(row, value): (sled::IVec, sled::IVec)| (row.to_vec(), value.to_vec());
        match self {
            Database::Sled(sled) => sled
                .scan_prefix([first])
                .map(|row| row.map(copied))
                .collect(),
            Database::Memory(rows) => {
                let rows = held(rows);
                let found = rows.range(vec![first]..);
                let found = found.take_while(|(row, _)| row.first() == Some(&first));
                Ok(found.map(|(k, v)| (k.clone(), v.clone())).collect())
            }
        }
    }

    fn rows(&self) -> Result<Rows, sled::Error> {
        match self {
            Database::Sled(sled) => rows_of(sled),
            Database::Memory(rows) => Ok(held(rows).clone()),
        }
    }

    fn flush(&self) -> Result<(), sled::Error> {
        match self {
            Database::Sled(sled) => sled.flush().map(drop),
            Database::Memory(_) => Ok(()),
        }
    }
}

fn held(rows: &Mutex<Rows>) -> MutexGuard<'_, Rows> {
    rows.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Catalogue {
    /// Opens the catalogue in `dir`, making it if needed.
    ///
    /// # Errors
    /// When it is taken, or its directory cannot be read or written.
    pub fn open(dir: &Path) -> Result<(Catalogue, CatalogueReport), CatalogueError> {
        Catalogue::open_on(Arc::new(SystemDisk), dir, &dir.join("catalogue.sled"))
    }

    /// [`Catalogue::open`] with its journal on another file system than the
    /// machine's own. sled brings its own way to files: its directory is real.
    ///
    /// # Errors
    /// As for [`Catalogue::open`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        sled_dir: &Path,
    ) -> Result<(Catalogue, CatalogueReport), CatalogueError> {
        make_dir(&*disk, dir)?;
        let lock = lock(&*disk, dir)?;
        let mut report = CatalogueReport::default();
        let journal_path = dir.join("catalogue.journal");
        let had_journal = disk.exists(&journal_path);
        let had_journal = had_journal.map_err(FileError::at("find", &journal_path))?;
        let had_sled = sled_dir.exists();
        let mut salvaged = Rows::new();
        let mut journalled = None;
        if had_journal {
            match Journal::open(disk.clone(), &journal_path) {
                Ok((journal, rows, tail)) => {
                    report.torn_bytes = tail.bytes;
                    journalled = Some((journal, rows, tail.doubtful));
                }
                Err(journal::OpenError::File(error)) => return Err(error.into()),
                Err(journal::OpenError::Damaged(rows)) => salvaged = rows,
            }
        }
        let (database, stored) = match open_sled(sled_dir) {
            Ok(opened) => opened,
            Err(error) if journalled.is_none() && salvaged.is_empty() => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "the catalogue's database is made again");
                report.set_aside.push(set_aside(&SystemDisk, sled_dir)?);
                report.rebuilt = true;
                open_sled(sled_dir)?
            }
        };
        let journal = match journalled {
            // sled is flushed after the journal is: what it has more than a
            // journal whose end is damaged was flushed, or is no harm. What it
            // lacks counts for nothing: it is trusted less.
            Some((mut journal, mut rows, true)) => {
                let before = rows.len();
                if had_sled && !report.rebuilt {
                    let newer = stored
                        .iter()
                        .filter(|(key, value)| rows.get(*key) != Some(value));
                    let newer: Rows = newer.map(|(k, v)| (k.clone(), v.clone())).collect();
                    report.journal_rebuilt = !newer.is_empty();
                    rows.extend(newer);
                }
                report.rebuilt |= !had_sled && !rows.is_empty();
                tracing::warn!(before, after = rows.len(), "the journal's end is damaged");
                make_equal(&database, &stored, &rows).map_err(|error| failed(sled_dir, &error))?;
                journal.rewrite(&rows)?;
                journal
            }
            Some((journal, rows, false)) => {
                report.rebuilt |= !had_sled && !rows.is_empty();
                make_equal(&database, &stored, &rows).map_err(|error| failed(sled_dir, &error))?;
                journal
            }
            // What is damaged stays until a whole one takes its place, and nothing
            // is there before: an empty one would count for more than sled, should
            // this end midway.
            None => {
                if had_journal {
                    report.set_aside.push(copy_aside(&*disk, &journal_path)?);
                }
                // Nothing but a damaged journal: what can be read of it is better than
                // nothing.
                report.rebuilt |= stored.is_empty() && !salvaged.is_empty();
                let rows = match stored.is_empty() {
                    true => salvaged,
                    false => stored.clone(),
                };
                report.journal_rebuilt = !rows.is_empty();
                let journal = Journal::of(disk, &journal_path, &rows)?;
                make_equal(&database, &stored, &rows).map_err(|error| failed(sled_dir, &error))?;
                journal
            }
        };
        let journal = Mutex::new(journal);
        let catalogue = Catalogue {
            sled_dir: sled_dir.to_path_buf(),
            database: Database::Sled(database),
            journal,
            _lock: lock,
        };
        catalogue.flush()?;
        Ok((catalogue, report))
    }

    /// [`Catalogue::open_on`] without sled: rows are in memory, and the journal
    /// is all that lasts. For simulations, whose disks sled cannot use.
    ///
    /// # Errors
    /// When it is taken, its journal is damaged, or cannot be read or written.
    pub fn open_in_memory(
        disk: Arc<dyn Disk>,
        dir: &Path,
    ) -> Result<(Catalogue, CatalogueReport), CatalogueError> {
        make_dir(&*disk, dir)?;
        let lock = lock(&*disk, dir)?;
        let path = dir.join("catalogue.journal");
        if !disk.exists(&path).map_err(FileError::at("find", &path))? {
            Journal::of(disk.clone(), &path, &Rows::new())?;
        }
        let opened = Journal::open(disk, &path);
        let (mut journal, rows, tail) = opened.map_err(journal::OpenError::file)?;
        if tail.doubtful {
            journal.rewrite(&rows)?;
        }
        let report = CatalogueReport {
            torn_bytes: tail.bytes,
            ..CatalogueReport::default()
        };
        let catalogue = Catalogue {
            sled_dir: dir.to_path_buf(),
            database: Database::Memory(Mutex::new(rows)),
            journal: Mutex::new(journal),
            _lock: lock,
        };
        catalogue.flush()?;
        Ok((catalogue, report))
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a row, replacing what was there. Durable after [`Catalogue::flush`].
    ///
    /// # Errors
    /// When it is too long, or writing fails.
    pub fn put<T: Serialize>(
        &self,
        table: Table,
        key: &str,
        value: &T,
    ) -> Result<(), CatalogueError> {
        let value = serde_json::to_vec(value).map_err(|source| CatalogueError::Row {
            table,
            key: key.to_string(),
            source,
        })?;
        if key.len() > CATALOGUE_KEY || value.len() > CATALOGUE_VALUE {
            let bytes = key.len() + value.len();
            let key = key.chars().take(40).collect();
            return Err(CatalogueError::Size { table, key, bytes });
        }
        let row = table.row(key);
        let mut journal = self.journal();
        journal.put(&row, Some(&value))?;
        let written = self.database.insert(row, value);
        written.map_err(|error| failed(&self.sled_dir, &error))
    }

    /// Removes a row; `false` when there was none.
    ///
    /// # Errors
    /// When writing fails.
    pub fn remove(&self, table: Table, key: &str) -> Result<bool, CatalogueError> {
        let row = table.row(key);
        let mut journal = self.journal();
        journal.put(&row, None)?;
        let removed = self.database.remove(&row);
        removed.map_err(|error| failed(&self.sled_dir, &error))
    }

    /// Reads a row.
    ///
    /// # Errors
    /// When it is there but is no `T`.
    pub fn find<T: DeserializeOwned>(
        &self,
        table: Table,
        key: &str,
    ) -> Result<Option<T>, CatalogueError> {
        let found = self.database.get(&table.row(key));
        let found = found.map_err(|error| failed(&self.sled_dir, &error))?;
        found.map(|value| parse(table, key, &value)).transpose()
    }

    /// Reads all rows of a table, by ascending key.
    ///
    /// # Errors
    /// When one of them is no `T`.
    pub fn list<T: DeserializeOwned>(
        &self,
        table: Table,
    ) -> Result<Vec<(String, T)>, CatalogueError> {
        let mut rows = Vec::new();
        let found = self.database.scan(table as u8);
        for (row, value) in found.map_err(|error| failed(&self.sled_dir, &error))? {
            let key = String::from_utf8_lossy(row.get(1..).unwrap_or_default()).into_owned();
            let value = parse(table, &key, &value)?;
            rows.push((key, value));
        }
        Ok(rows)
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// When a sync fails. That is final for this journal: open it again.
    pub fn flush(&self) -> Result<(), CatalogueError> {
        let mut journal = self.journal();
        journal.sync()?;
        if journal.is_long() {
            let rows = self.database.rows();
            let rows = rows.map_err(|error| failed(&self.sled_dir, &error))?;
            journal.rewrite(&rows)?;
        }
        self.database
            .flush()
            .map_err(|error| failed(&self.sled_dir, &error))
    }
}

fn parse<T: DeserializeOwned>(table: Table, key: &str, value: &[u8]) -> Result<T, CatalogueError> {
    serde_json::from_slice(value).map_err(|source| CatalogueError::Row {
        table,
        key: key.to_string(),
        source,
    })
}

fn failed(dir: &Path, error: &dyn std::fmt::Display) -> CatalogueError {
    CatalogueError::Database {
        dir: dir.to_path_buf(),
        why: error.to_string(),
    }
}

/// Opens sled and reads every row, so that damage shows now. sled answers some
/// damage with a panic: that is taken as an error too.
fn open_sled(dir: &Path) -> Result<(sled::Db, Rows), CatalogueError> {
    let open = || -> Result<(sled::Db, Rows), sled::Error> {
        let database = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE)
            .flush_every_ms(None)
            .open()?;
        let rows = rows_of(&database)?;
        Ok((database, rows))
    };
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(opened) => opened.map_err(|error| failed(dir, &error)),
        Err(_) => Err(failed(dir, &"it is damaged")),
    }
}

fn rows_of(database: &sled::Db) -> Result<Rows, sled::Error> {
    let rows = database
        .iter()
        .map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())));
    rows.collect()
}

fn make_equal(database: &sled::Db, stored: &Rows, rows: &Rows) -> Result<(), sled::Error> {
    for key in stored.keys().filter(|key| !rows.contains_key(*key)) {
        database.remove(key)?;
    }
    for (key, value) in rows
        .iter()
        .filter(|(key, value)| stored.get(*key) != Some(value))
    {
        database.insert(&key[..], &value[..])?;
    }
    Ok(())
}

/// Copies a file that is damaged.
fn copy_aside(disk: &dyn Disk, path: &Path) -> Result<PathBuf, FileError> {
    let aside = aside(disk, path);
    let bytes = read_front(disk, path, u64::MAX)?;
    put_whole(disk, &aside, &[&bytes])?;
    Ok(aside)
}
