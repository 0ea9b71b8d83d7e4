//! The catalogue comes back from whichever half is left.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use farhaven_storage_sync::catalogue::{Catalogue, CatalogueError, CatalogueReport, Table};
use serde_json::{Value, json};

fn open(dir: &Path) -> (Catalogue, CatalogueReport) {
    Catalogue::open(dir).unwrap()
}

fn fill(dir: &Path) -> Vec<(String, Value)> {
    let (catalogue, report) = open(dir);
    assert_eq!(report, CatalogueReport::default());
    for at in 0..200 {
        catalogue
            .put(
                Table::Guests,
                &format!("guest{:03}", at % 50),
                &json!({ "at": at }),
            )
            .unwrap();
    }
    catalogue.put(Table::Site, "self", &json!("here")).unwrap();
    assert!(catalogue.remove(Table::Guests, "guest007").unwrap());
    assert!(!catalogue.remove(Table::Guests, "guest007").unwrap());
    catalogue.flush().unwrap();
    let rows = catalogue.list(Table::Guests).unwrap();
    assert_eq!(rows.len(), 49);
    rows
}

fn check(catalogue: &Catalogue, rows: &[(String, Value)]) {
    assert_eq!(catalogue.list::<Value>(Table::Guests).unwrap(), rows);
    assert_eq!(
        catalogue
            .find::<String>(Table::Site, "self")
            .unwrap()
            .unwrap(),
        "here"
    );
    assert_eq!(
        catalogue.find::<String>(Table::Peers, "self").unwrap(),
        None
    );
}

#[test]
fn a_lost_database_is_made_again_from_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fill(dir.path());
    let (catalogue, report) = open(dir.path());
    assert_eq!(report, CatalogueReport::default());
    check(&catalogue, &rows);
    drop(catalogue);
    fs::remove_dir_all(dir.path().join("catalogue.sled")).unwrap();
    let (catalogue, report) = open(dir.path());
    assert!(report.rebuilt && report.set_aside.is_empty());
    check(&catalogue, &rows);
}

#[test]
fn a_damaged_database_is_set_aside_and_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fill(dir.path());
    let sled = dir.path().join("catalogue.sled");
    fs::write(sled.join("conf"), b"garbage that is no configuration").unwrap();
    fs::write(sled.join("db"), vec![0xab; 300_000]).unwrap();
    let (catalogue, report) = open(dir.path());
    assert!(report.rebuilt, "{report:?}");
    assert!(report.set_aside.iter().all(|path| path.exists()) && report.set_aside.len() == 1);
    check(&catalogue, &rows);
}

#[test]
fn a_lost_or_rotten_journal_is_made_again_from_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fill(dir.path());
    let journal = dir.path().join("catalogue.journal");
    fs::remove_file(&journal).unwrap();
    let (catalogue, report) = open(dir.path());
    assert!(report.journal_rebuilt && !report.rebuilt);
    check(&catalogue, &rows);
    drop(catalogue);
    let mut bytes = fs::read(&journal).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let (catalogue, report) = open(dir.path());
    assert!(
        report.journal_rebuilt && report.set_aside.len() == 1,
        "{report:?}"
    );
    check(&catalogue, &rows);
}

#[test]
fn a_torn_end_was_never_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let rows = fill(dir.path());
    let journal = dir.path().join("catalogue.journal");
    let whole = fs::read(&journal).unwrap();
    let (catalogue, _) = open(dir.path());
    catalogue.put(Table::Guests, "guest999", &json!(1)).unwrap();
    catalogue.flush().unwrap();
    drop(catalogue);
    let longer = fs::read(&journal).unwrap();
    for end in whole.len()..longer.len() {
        fs::write(&journal, &longer[..end]).unwrap();
        let (catalogue, report) = open(dir.path());
        assert_eq!(report.torn_bytes, (end - whole.len()) as u64);
        check(&catalogue, &rows);
    }
}

#[test]
fn the_journal_does_not_grow_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let (catalogue, _) = open(dir.path());
    let long = "x".repeat(100_000);
    for _ in 0..100 {
        catalogue.put(Table::Remote, "guest", &long).unwrap();
        catalogue.flush().unwrap();
    }
    let length = fs::metadata(dir.path().join("catalogue.journal"))
        .unwrap()
        .len();
    assert!(length < 5 << 20, "{length} bytes");
    drop(catalogue);
    let (catalogue, _) = open(dir.path());
    assert_eq!(
        catalogue
            .find::<String>(Table::Remote, "guest")
            .unwrap()
            .unwrap(),
        long
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (catalogue, _) = open(dir.path());
    let long = "x".repeat(5 << 20);
    assert!(matches!(
        catalogue.put(Table::Remote, "guest", &long),
        Err(CatalogueError::Size { .. })
    ));
    assert!(matches!(
        catalogue.put(Table::Remote, &long, &1),
        Err(CatalogueError::Size { .. })
    ));
    catalogue.put(Table::Remote, "guest", &"text").unwrap();
    let error = catalogue.find::<u64>(Table::Remote, "guest").unwrap_err();
    assert!(matches!(error, CatalogueError::Row { .. }), "{error}");
    assert!(matches!(
        Catalogue::open(dir.path()),
        Err(CatalogueError::Lock(_))
    ));
}
