//! What was found damaged: nothing new refers to it, what is sent anew makes the
//! next point whole, and what is whole again counts again.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Model, Site, check_point, literal_batches, open, send, unit};
use farhaven_storage_sync::codec::{Batch, Encoder};
use farhaven_storage_sync::replica::ReplicaError;
use farhaven_storage_sync::store::{Damaged, SealError, Store, Suspect};
use farhaven_storage_sync::unit::UNIT;

const UNITS: usize = 200;

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

fn manifest(dir: &Path, guest: &Model, point: u64) -> std::path::PathBuf {
    let of_guest = dir.join("manifests").join(guest.id.to_string());
    of_guest.join(format!("{point:020}.man"))
}

/// Point 1 of many batches, point 2 of one unit more, both sealed.
fn two_points(dir: &Path) -> (Site, Store, Model, Vec<Batch>) {
    let (store, _) = open(dir);
    let (site, mut guest) = (Site::new(), Model::new(3, &[UNITS, 1]));
    let first = literal_batches(&site, &mut guest, 1, UNITS);
    assert!(first.len() > 2);
    send(&site, &store, &first);
    store.seal(guest.seal_of(1, 0, &first)).unwrap();
    guest.sealed.insert(1, guest.now.clone());
    guest.now[0][0] = 4711;
    let second = told(&site, &guest, 2, [0]);
    send(&site, &store, &second);
    store.seal(guest.seal_of(2, 1, &second)).unwrap();
    guest.sealed.insert(2, guest.now.clone());
    (site, store, guest, first)
}

/// These units of the guest's first volume, as they are now.
fn told(
    site: &Site,
    guest: &Model,
    point: u64,
    units: impl IntoIterator<Item = u64>,
) -> Vec<Batch> {
    let mut encoder = Encoder::new(guest.id, point, site.seqs.clone(), site.index.clone(), 1);
    let mut batches = Vec::new();
    for at in units {
        let bytes = unit(guest.now[0][at as usize]);
        batches.extend(encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap());
    }
    batches.extend(encoder.flush());
    batches
}

#[test]
fn the_next_point_is_whole_when_what_is_damaged_is_sent_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (site, store, guest, first) = two_points(dir.path());
    assert!(store.is_sound() && store.needs().is_empty() && store.damage().is_empty());
    // In the body of the first batch.
    flip(&dir.path().join("segments").join("00000001.seg"), 2000);
    let report = store.check();
    assert_eq!(report.damage.len(), 1);
    let rotten = first[0].seq;
    assert_eq!(report.damage[0].what, Damaged::Batch(rotten));
    assert_eq!(report.damage[0].points, [(guest.id, 1), (guest.id, 2)]);
    assert_eq!(store.damage(), report.damage);
    for point in [1, 2] {
        assert!(store.damaged_point(guest.id, point).is_some());
        let refused = store.open_point(guest.id, point);
        assert!(matches!(refused, Err(ReplicaError::Lost { .. })));
    }
    // What of it is whole reads on.
    let in_part = store.open_in_part(guest.id, 2).unwrap();
    let mut read = vec![0; UNIT];
    in_part.read(0, 0, 1, &mut read).unwrap();
    assert_eq!(read, unit(4711));
    assert!(in_part.read(0, 1, 1, &mut read).is_err());
    drop(in_part);

    // The source does not know yet, and refers to it: that is no point.
    let needs = store.needs();
    assert_eq!((needs.len(), needs[0].point), (1, 2));
    assert_eq!(
        (needs[0].guest, &needs[0].batches[..]),
        (guest.id, &[rotten][..])
    );
    let lacking: Vec<u64> = (needs[0].units.iter())
        .flat_map(|(volume, first, count)| {
            assert_eq!(*volume, 0);
            *first..first + count
        })
        .collect();
    // All 64 literals of the batch but the unit that has another content by now.
    assert_eq!(lacking, (1..64).collect::<Vec<_>>());
    let referring = told(&site, &guest, 3, lacking.iter().copied());
    send(&site, &store, &referring);
    let refused = store.seal(guest.seal_of(3, 2, &referring));
    assert!(
        matches!(refused, Err(SealError::Dangling { missing, .. }) if missing == rotten),
        "{refused:?}"
    );

    // It forgets them, as the target asks it to, and sends them.
    let gone = needs[0].batches.iter().copied().collect();
    site.index.lock().unwrap().remove_seqs(&gone);
    store.abandon(guest.id);
    let anew = told(&site, &guest, 4, lacking);
    send(&site, &store, &anew);
    store.seal(guest.seal_of(4, 2, &anew)).unwrap();
    check_point(&store, guest.id, 4, &guest.now);
    assert_eq!(store.damaged_point(guest.id, 4), None);
    assert!(store.damaged_point(guest.id, 2).is_some());
    assert!(store.needs().is_empty());
    assert_eq!(store.damage()[0].points, [(guest.id, 1), (guest.id, 2)]);

    // After a restart it is known again by its name.
    let suspects = store.suspects();
    assert_eq!(suspects, [Suspect::Batch(rotten)]);
    drop(store);
    let (store, _) = open(dir.path());
    assert!(store.is_sound());
    store.suspect(&suspects);
    store.suspect(&[Suspect::Batch(1 << 40), Suspect::Manifest(guest.id, 99)]);
    assert_eq!(store.suspects(), suspects);

    // The batch itself, as it was: all of it is whole.
    let changes = store.damage_changes();
    send(&site, &store, &first[..1]);
    assert!(store.is_sound() && store.damage_changes() > changes);
    for (point, content) in &guest.sealed {
        check_point(&store, guest.id, *point, content);
    }
    assert!(store.check().damage.is_empty());
}

#[test]
fn dropped_points_take_their_damage_along() {
    let dir = tempfile::tempdir().unwrap();
    let (site, store, guest, _) = two_points(dir.path());
    flip(&dir.path().join("segments").join("00000001.seg"), 2000);
    // Whoever reads it first tells of it.
    let point = store.open_point(guest.id, 2).unwrap();
    let mut read = vec![0; UNIT];
    assert!(point.read(0, 1, 1, &mut read).is_err());
    drop(point);
    assert!(!store.is_sound());
    site.index.lock().unwrap().clear();
    let all = told(&site, &guest, 3, 0..UNITS as u64);
    send(&site, &store, &all);
    store.seal(guest.seal_of(3, 2, &all)).unwrap();
    assert_eq!(store.damage()[0].points.len(), 2);
    let plan = store.plan_prune(&BTreeMap::from([(guest.id, BTreeSet::from([3]))]));
    store.perform_prune(&plan.unwrap()).unwrap();
    assert!(store.damage().is_empty() && store.is_sound());
    check_point(&store, guest.id, 3, &guest.now);
}

#[test]
fn a_manifest_is_written_anew_from_memory_and_none_builds_on_a_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    let (site, store, mut guest, _) = two_points(dir.path());
    // The last byte: of the hash over its runs. Point 2 builds on it.
    let base = manifest(dir.path(), &guest, 1);
    flip(&base, base.metadata().unwrap().len() - 1);
    let report = store.check();
    assert_eq!(report.damage[0].what, Damaged::Manifest);
    assert_eq!(report.damage[0].points, [(guest.id, 1), (guest.id, 2)]);
    assert_eq!(store.suspects(), [Suspect::Manifest(guest.id, 1)]);
    assert!(store.damaged_point(guest.id, 2).is_some());
    assert_eq!(store.mend_manifests().unwrap(), 1);
    assert_eq!(store.damaged_point(guest.id, 2), None);
    assert!(store.damaged_point(guest.id, 1).is_some());
    assert_eq!(store.damage()[0].points, [(guest.id, 1)]);
    assert_eq!(store.mend_manifests().unwrap(), 0);

    // The front of the newest: what its guest is made of is lost with it.
    let newest = manifest(dir.path(), &guest, 2);
    flip(&newest, 40);
    assert_eq!(store.check().damage.len(), 2);
    assert_eq!(store.mend_manifests().unwrap(), 0);
    guest.now[0][7] = 12;
    let next = told(&site, &guest, 3, [7]);
    send(&site, &store, &next);
    store.seal(guest.seal_of(3, 2, &next)).unwrap();
    drop(store);
    let (store, report) = open(dir.path());
    assert_eq!(report.damaged.len(), 1);
    check_point(&store, guest.id, 3, &guest.now);
}
