//! A manifest that rotted: it is named, set aside and never served, the newest whole
//! point goes on, and no other point gets its number.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::{Model, Site, open, options};
use farhaven_storage_sync::store::{SealError, Store, StoreOptions};
use rand::SeedableRng;
use rand::rngs::StdRng;

fn manifest(dir: &Path, guest: &Model, point: u64) -> PathBuf {
    let of_guest = dir.join("manifests").join(guest.id.to_string());
    of_guest.join(format!("{point:020}.man"))
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("man.bad-1")
}

/// Points 1 to 3.
fn three(dir: &Path) -> (Site, Model, StdRng) {
    let (store, _) = open(dir);
    let (site, mut guest) = (Site::new(), Model::new(1, &[700, 700]));
    let mut random = StdRng::seed_from_u64(5);
    for point in 1..=3 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    (site, guest, random)
}

fn numbers(store: &Store, guest: &Model) -> Vec<u64> {
    let points = store.points(guest.id);
    points.iter().map(|header| header.point).collect()
}

/// In its front, in its header, in its last runs, and not all of it there.
const DAMAGE: [fn(&mut Vec<u8>); 4] = [
    |bytes| bytes[4] ^= 2,
    |bytes| bytes[50] ^= 1,
    |bytes| *bytes.last_mut().unwrap() ^= 1,
    |bytes| bytes.truncate(bytes.len() / 2),
];

#[test]
fn a_damaged_newest_manifest_is_set_aside_and_its_number_is_not_given_again() {
    for damage in DAMAGE {
        let dir = tempfile::tempdir().unwrap();
        let (site, mut guest, mut random) = three(dir.path());
        let path = manifest(dir.path(), &guest, 3);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let (store, report) = open(dir.path());
        assert_eq!((report.damaged.len(), report.points), (1, 2));
        assert_eq!(report.damaged[0].guest, Some(guest.id));
        assert_eq!(report.damaged[0].path, aside(&path));
        assert!(!path.exists());
        assert_eq!(fs::read(aside(&path)).unwrap(), bytes);
        guest.sealed.remove(&3);
        guest.now = guest.sealed[&2].clone();
        guest.check(&store);
        assert!(store.open_point(guest.id, 3).is_err());
        assert!(store.check().damage.is_empty());

        // Its number is gone; the next point builds on the newest whole one.
        assert_eq!(store.next_point(guest.id), 4);
        let again = store.seal(guest.seal_of(3, 2, &[])).unwrap_err();
        assert!(
            matches!(again, SealError::Number { largest: 3, .. }),
            "{again}"
        );
        guest.step(&site, &store, 4, &mut random).unwrap();
        guest.check(&store);
        drop(store);

        // Nor is it a point again once it is not the newest.
        let (store, report) = open(dir.path());
        assert_eq!(report.damaged.len(), 1, "it is told as long as it is there");
        assert_eq!(report.damaged[0].path, aside(&path));
        guest.check(&store);
        let keep = BTreeMap::from([(guest.id, BTreeSet::from([4]))]);
        let plan = store.plan_prune(&keep).unwrap();
        store.perform_prune(&plan).unwrap();
        guest.sealed.retain(|&point, _| point == 4);
        guest.check(&store);
        drop(store);
        fs::remove_file(aside(&path)).unwrap();
        let (store, report) = open(dir.path());
        assert!(report.damaged.is_empty());
        guest.check(&store);
        assert_eq!(store.next_point(guest.id), 5);
    }
}

#[test]
fn a_number_that_only_a_damaged_manifest_has_is_not_given_again() {
    for damage in DAMAGE {
        let dir = tempfile::tempdir().unwrap();
        let (_, guest, _) = three(dir.path());
        for point in 1..=3 {
            let path = manifest(dir.path(), &guest, point);
            let mut bytes = fs::read(&path).unwrap();
            damage(&mut bytes);
            fs::write(&path, &bytes).unwrap();
        }
        for _ in 0..3 {
            let (store, report) = open(dir.path());
            assert_eq!((report.damaged.len(), report.points), (3, 0));
            assert!(numbers(&store, &guest).is_empty());
            assert_eq!(store.next_point(guest.id), 4);
        }
    }
}

#[test]
fn points_that_build_on_a_damaged_manifest_are_named_and_not_served() {
    for damage in DAMAGE {
        let dir = tempfile::tempdir().unwrap();
        let (site, mut guest, mut random) = three(dir.path());
        let path = manifest(dir.path(), &guest, 2);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        guest.sealed.retain(|&point, _| point == 1);
        guest.now = guest.sealed[&1].clone();
        for _ in 0..2 {
            let (store, report) = open(dir.path());
            let named: BTreeSet<_> = report.damaged.iter().map(|d| d.path.clone()).collect();
            let newest = manifest(dir.path(), &guest, 3);
            assert_eq!(named, BTreeSet::from([aside(&path), newest]));
            guest.check(&store);
            assert_eq!(store.next_point(guest.id), 4);
        }
        let (store, _) = open(dir.path());
        guest.step(&site, &store, 4, &mut random).unwrap();
        drop(store);
        let (store, _) = open(dir.path());
        guest.check(&store);
        store.plan_prune(&BTreeMap::new()).unwrap();
    }
}

#[test]
fn a_whole_manifest_that_this_machine_has_no_memory_for_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (_, guest, _) = three(dir.path());
    let little = StoreOptions {
        map_bytes: 1,
        ..options()
    };
    let (store, report) = Store::open(dir.path(), little).unwrap();
    assert_eq!((report.damaged.len(), report.points), (3, 0));
    drop(store);
    let (store, report) = open(dir.path());
    assert!(report.damaged.is_empty(), "{report:?}");
    guest.check(&store);
}

#[test]
fn a_manifest_that_rots_while_the_store_is_open_stops_no_prune_of_it() {
    for damage in DAMAGE {
        let dir = tempfile::tempdir().unwrap();
        let (site, mut guest, mut random) = three(dir.path());
        let (store, _) = open(dir.path());
        let path = manifest(dir.path(), &guest, 3);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let found = store.check().damage;
        assert_eq!((found.len(), &found[0].path), (1, &path));
        assert_eq!(found[0].points, [(guest.id, 3)]);
        assert!(store.damaged_point(guest.id, 3).is_some());
        // Its map is in memory: where its front is whole, it reads as it was.
        if store.open_point(guest.id, 3).is_ok() {
            common::check_point(&store, guest.id, 3, &guest.now);
        }
        guest.step(&site, &store, 4, &mut random).unwrap();
        common::check_point(&store, guest.id, 4, &guest.now);
        let keep = BTreeMap::from([(guest.id, BTreeSet::from([4]))]);
        let plan = store.plan_prune(&keep).unwrap();
        store.perform_prune(&plan).unwrap();
        guest.sealed.retain(|&point, _| point == 4);
        guest.check(&store);
        assert!(store.damage().is_empty());
    }
}
