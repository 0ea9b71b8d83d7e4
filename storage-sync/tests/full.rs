//! A store that is full, or may not be written.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;

use common::{Model, Site, literal_batches, open, options, send};
use farhaven_storage_sync::LogError;
use farhaven_storage_sync::codec::Batch;
use farhaven_storage_sync::store::{Store, StoreError, StoreOptions};

#[test]
fn a_quota_refuses_more_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 150_000;
    let (store, _) = Store::open(
        dir.path(),
        StoreOptions {
            bytes_most: Some(limit),
            ..options()
        },
    )
    .unwrap();
    fills_up(&store, |error| {
        assert!(
            matches!(error, StoreError::Log(LogError::Quota { .. })),
            "{error}"
        );
    });
    assert!(store.bytes() <= limit);
}

/// Sends points until one is refused; the sealed ones are whole.
fn fills_up(store: &Store, refused: impl Fn(StoreError)) -> (Site, Model, Vec<Batch>) {
    let site = Site::new();
    let mut guest = Model::new(1, &[400, 4]);
    for point in 1.. {
        let batches = literal_batches(&site, &mut guest, point, 50);
        let bytes: Vec<_> = batches.iter().map(|batch| batch.bytes.clone()).collect();
        match store.append(&bytes) {
            Ok(_) => {}
            Err(error) => {
                refused(error);
                assert!(point > 1);
                guest.check(store);
                return (site, guest, batches);
            }
        }
        store
            .seal(guest.seal_of(point, point - 1, &batches))
            .unwrap();
        guest.sealed.insert(point, guest.now.clone());
    }
    unreachable!("points are refused before numbers end")
}

/// Unmounts whatever happens.
struct Mounted(tempfile::TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn tiny_disk(test: &str) -> Option<Mounted> {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=400k", "farhaven-test"])
        .arg(dir.path())
        .output();
    match mount {
        Ok(output) if output.status.success() => Some(Mounted(dir)),
        _ => {
            eprintln!("{test}: skipped: no right to mount a tmpfs here");
            None
        }
    }
}

#[test]
fn a_full_disk_refuses_more_and_works_again_with_room() {
    let Some(disk) = tiny_disk("a_full_disk") else {
        return;
    };
    let dir = disk.0.path();
    fs::write(dir.join("ballast"), vec![1; 100_000]).unwrap();
    let (store, _) = open(dir);
    let (site, mut guest, batches) = fills_up(&store, |error| {
        assert!(
            matches!(error, StoreError::Log(LogError::Full { .. })),
            "{error}"
        );
        assert!(
            error.to_string().contains(&dir.display().to_string()),
            "{error}"
        );
    });
    fs::remove_file(dir.join("ballast")).unwrap();
    send(&site, &store, &batches);
    let parent = *guest.sealed.keys().last().unwrap();
    store
        .seal(guest.seal_of(parent + 1, parent, &batches))
        .unwrap();
    guest.sealed.insert(parent + 1, guest.now.clone());
    guest.check(&store);
    drop(store);
    let (store, report) = open(dir);
    assert!(
        report.damaged.is_empty() && report.log.bad.is_empty(),
        "{report:?}"
    );
    guest.check(&store);
    drop(store);
}

#[test]
fn a_read_only_store_says_so() {
    let Some(disk) = tiny_disk("a_read_only_store") else {
        return;
    };
    drop(open(disk.0.path()));
    let remount = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(disk.0.path())
        .status();
    assert!(remount.unwrap().success());
    let error = Store::open(disk.0.path(), options()).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}
