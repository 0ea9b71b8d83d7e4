//! Points against a model: sealed, dropped in any order, opened again, all
//! that stay restore bit for bit.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use common::{Model, Site, open, send};
use farhaven_storage_sync::disk::simulated::{Fault, SimulatedDisk};
use farhaven_storage_sync::replica::ReplicaError;
use farhaven_storage_sync::store::{SealError, Store};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn points_restore_whatever_else_is_dropped(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new();
        let (mut store, _) = open(dir.path());
        let mut guests = [Model::new(1, &[700, 1200]), Model::new(2, &[300, 900])];
        for point in 1..random.random_range(4..20) {
            let guest = &mut guests[random.random_range(0..2)];
            guest.step(&site, &store, point, &mut random).unwrap();
            match random.random_range(0..6) {
                0 => {
                    let mut keep = BTreeMap::new();
                    for guest in &mut guests {
                        let newest = guest.sealed.keys().last().copied();
                        guest.sealed.retain(|&at, _| Some(at) == newest || random.random());
                        if !guest.sealed.is_empty() {
                            let points: BTreeSet<u64> = guest.sealed.keys().copied().collect();
                            keep.insert(guest.id, points);
                        }
                    }
                    let plan = store.plan_prune(&keep).unwrap();
                    let retired = plan.retire.iter().copied().collect();
                    site.index.lock().unwrap().remove_seqs(&retired);
                    let before = store.bytes();
                    let report = store.perform_prune(&plan).unwrap();
                    prop_assert_eq!(report.bytes_freed, before - store.bytes());
                    prop_assert_eq!(report.revived, 0);
                    for seq in &plan.retire {
                        prop_assert!(!store.contains(*seq));
                    }
                }
                1 => {
                    drop(store);
                    let (again, report) = open(dir.path());
                    prop_assert!(report.damaged.is_empty() && report.log.bad.is_empty());
                    prop_assert_eq!(report.log.torn_bytes, 0);
                    store = again;
                }
                _ => {}
            }
        }
        guests.iter().for_each(|guest| guest.check(&store));
        let last = store.last_seq();
        let newest = store.newest_seqs(20);
        prop_assert_eq!(newest.first().copied().unwrap_or(0), last);
        prop_assert!(newest.is_sorted_by(|one, next| one > next) && newest.len() <= 20);
        prop_assert!(newest.iter().all(|seq| store.contains(*seq)));
        drop(store);
        let (store, report) = open(dir.path());
        prop_assert_eq!(store.last_seq(), last);
        prop_assert_eq!(store.newest_seqs(20), newest);
        prop_assert_eq!(report.points, guests.iter().map(|guest| guest.sealed.len()).sum::<usize>());
        guests.iter().for_each(|guest| guest.check(&store));
    }
}

#[test]
fn a_point_with_a_name_is_dropped_by_no_prune() {
    let (dir, site, store, mut guest, mut random) = started();
    for point in 1..=5 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    let all_but_newest = BTreeMap::from([(guest.id, BTreeSet::from([5]))]);
    let planned = store.plan_prune(&all_but_newest).unwrap();
    store.keep_point(guest.id, 2, "before upgrade").unwrap();
    // One that was planned before it had its name is not dropped either.
    assert!(planned.dropped.contains(&(guest.id, 2)));
    let retired = planned.retire.iter().copied().collect();
    site.index.lock().unwrap().remove_seqs(&retired);
    store.perform_prune(&planned).unwrap();
    let numbers =
        |store: &Store| -> Vec<u64> { store.points(guest.id).iter().map(|p| p.point).collect() };
    assert_eq!(numbers(&store), [2, 5]);
    for (point, name) in [(2, "4711"), (2, ""), (3, "gone"), (5, "before upgrade")] {
        assert!(store.keep_point(guest.id, point, name).is_err(), "{name}");
    }
    assert!(store.release_point(guest.id, 5).is_err());
    // Not even when its guest is given up.
    let given_up = BTreeMap::from([(guest.id, BTreeSet::new())]);
    assert_eq!(store.plan_prune(&given_up).unwrap().dropped, []);
    drop(store);
    let kept = dir.path().join("manifests").join(guest.id.to_string());
    let kept = kept.join(format!("{:020}.kept", 2));
    let (store, _) = open(dir.path());
    assert_eq!(
        store.kept(guest.id),
        BTreeMap::from([(2, "before upgrade".to_owned())])
    );
    drop(store);
    // Damaged, it keeps the point all the same.
    let mut bytes = std::fs::read(&kept).unwrap();
    bytes[10] ^= 1;
    std::fs::write(&kept, bytes).unwrap();
    let (store, _) = open(dir.path());
    let name = farhaven_storage_sync::store::NAME_LOST;
    assert_eq!(store.kept(guest.id), BTreeMap::from([(2, name.to_owned())]));
    assert_eq!(store.plan_prune(&all_but_newest).unwrap().dropped, []);
    guest.sealed.retain(|point, _| [2, 5].contains(point));
    guest.check(&store);
    store.release_point(guest.id, 2).unwrap();
    assert!(!kept.exists());
    assert_eq!(
        store.plan_prune(&all_but_newest).unwrap().dropped,
        [(guest.id, 2)]
    );
}

fn started() -> (tempfile::TempDir, Site, Store, Model, StdRng) {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    (
        dir,
        Site::new(),
        store,
        Model::new(1, &[400, 400]),
        StdRng::seed_from_u64(7),
    )
}

#[test]
fn a_seal_needs_exactly_its_batches() {
    let (_dir, site, store, mut guest, mut random) = started();
    guest.step(&site, &store, 1, &mut random).unwrap();
    let mut batches = guest.change(&site, 2, &mut random);
    while batches.len() < 2 {
        batches.extend(guest.change(&site, 2, &mut random));
    }
    let seal = guest.seal_of(2, 1, &batches);
    send(&site, &store, &batches[1..]);
    let have = batches.len() as u64 - 1;
    let error = store.seal(seal.clone()).unwrap_err();
    assert!(
        matches!(error, SealError::MissingBatches { have: h, want, .. } if h == have && want == have + 1)
    );
    let mut wrong = seal.clone();
    wrong.batches -= 1;
    assert!(matches!(
        store.seal(wrong).unwrap_err(),
        SealError::ChainMismatch { point: 2 }
    ));
    send(&site, &store, &batches[..1]);
    let header = store.seal(seal.clone()).unwrap();
    assert_eq!(
        store.seal(seal.clone()).unwrap(),
        header,
        "sealing again answers the same"
    );
    let mut other = seal;
    other.chain[0] ^= 1;
    assert!(matches!(
        store.seal(other).unwrap_err(),
        SealError::ChainMismatch { point: 2 }
    ));
    guest.sealed.insert(2, guest.now.clone());
    guest.check(&store);
}

#[test]
fn a_seal_builds_on_the_newest_point_or_on_nothing() {
    let (_dir, site, store, mut guest, mut random) = started();
    guest.step(&site, &store, 3, &mut random).unwrap();
    guest.step(&site, &store, 5, &mut random).unwrap();
    let batches = guest.change(&site, 6, &mut random);
    send(&site, &store, &batches);
    let error = store.seal(guest.seal_of(6, 3, &batches)).unwrap_err();
    assert!(matches!(
        error,
        SealError::ParentMismatch {
            newest: 5,
            parent: 3,
            ..
        }
    ));
    let error = store.seal(guest.seal_of(4, 0, &[])).unwrap_err();
    assert!(matches!(
        error,
        SealError::Number {
            point: 4,
            largest: 5
        }
    ));
    // On nothing: what is not told reads as zeros.
    let header = store.seal(guest.seal_of(6, 0, &batches)).unwrap();
    assert_eq!(header.parent, 0);
    let replica = store.open_point(guest.id, 6).unwrap();
    let told: u64 = (0..2)
        .flat_map(|v| replica.nonzero_runs(v))
        .map(|(_, count)| count)
        .sum();
    assert_eq!(told, header.changed_units);
}

#[test]
fn an_abandoned_attempt_leaves_no_trace_in_the_next() {
    let (dir, site, store, mut guest, mut random) = started();
    guest.step(&site, &store, 1, &mut random).unwrap();
    let before = guest.now.clone();
    let lost = guest.change(&site, 2, &mut random);
    send(&site, &store, &lost);
    assert_eq!(store.unsealed(guest.id, 2).len(), lost.len());
    store.abandon(guest.id);
    assert!(store.unsealed(guest.id, 2).is_empty());
    guest.now = before;
    guest.step(&site, &store, 3, &mut random).unwrap();
    guest.check(&store);
    drop(store);
    guest.check(&open(dir.path()).0);
}

#[test]
fn a_reference_to_what_is_not_there_is_refused() {
    let (_dir, site, store, mut guest, mut random) = started();
    let lost = guest.change(&site, 1, &mut random);
    let mut other = Model::new(2, &[400, 400]);
    lost.iter()
        .for_each(|batch| site.index.lock().unwrap().acknowledge(batch.seq));
    // The other guest holds the same, and refers to batches that never arrive.
    other.now = guest.now.clone();
    let batches = other.tell_all(&site, 1);
    send(&site, &store, &batches);
    let error = store.seal(other.seal_of(1, 0, &batches)).unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { missing, .. } if lost.iter().any(|batch| batch.seq == missing)),
        "{error}"
    );
    send(&site, &store, &lost);
    store.seal(other.seal_of(1, 0, &batches)).unwrap();
    common::check_point(&store, other.id, 1, &other.now);
}

#[test]
fn an_open_point_is_not_pruned_and_reads_on() {
    let (_dir, site, store, mut guest, mut random) = started();
    for point in 1..8 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    let replica = store.open_point(guest.id, 2).unwrap();
    let keep = BTreeMap::from([(guest.id, BTreeSet::from([7]))]);
    let plan = store.plan_prune(&keep).unwrap();
    assert_eq!(plan.pinned, [(guest.id, 2)]);
    assert!(plan.to_string().contains("keep point 2"));
    store.perform_prune(&plan).unwrap();
    guest.sealed.retain(|&point, _| point == 2 || point == 7);
    guest.check(&store);
    drop(replica);
    let plan = store.plan_prune(&keep).unwrap();
    // Opened between plan and perform: it stays as well.
    let replica = store.open_point(guest.id, 2).unwrap();
    assert_eq!(store.perform_prune(&plan).unwrap().points, 0);
    guest.check(&store);
    drop(replica);
    let plan = store.plan_prune(&keep).unwrap();
    store.perform_prune(&plan).unwrap();
    guest.sealed.remove(&2);
    guest.check(&store);
}

#[test]
fn what_is_needed_again_after_the_plan_stays() {
    let (_dir, site, store, mut guest, mut random) = started();
    for point in 1..6 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    guest.now.iter_mut().for_each(|units| units.fill(0));
    let batches = guest.tell_all(&site, 6);
    send(&site, &store, &batches);
    store.seal(guest.seal_of(6, 5, &batches)).unwrap();
    let old = guest.sealed[&3].clone();
    let keep = BTreeMap::from([(guest.id, BTreeSet::from([6]))]);
    let plan = store.plan_prune(&keep).unwrap();
    assert!(!plan.retire.is_empty());
    // The source has not heard yet and refers to what is to go.
    guest.now = old;
    let batches = guest.tell_all(&site, 7);
    send(&site, &store, &batches);
    let report = store.perform_prune(&plan).unwrap();
    assert!(report.revived > 0);
    store.seal(guest.seal_of(7, 6, &batches)).unwrap();
    common::check_point(&store, guest.id, 7, &guest.now);
}

#[test]
fn a_guest_that_is_given_up_frees_its_space() {
    let (dir, site, store, mut guest, mut random) = started();
    for point in 1..8 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    let last = store.last_seq();
    let plan = store
        .plan_prune(&BTreeMap::from([(guest.id, BTreeSet::new())]))
        .unwrap();
    assert_eq!(plan.dropped.len(), 7);
    let before = store.bytes();
    store.perform_prune(&plan).unwrap();
    assert!(
        store.bytes() * 2 < before,
        "{} of {before} bytes left",
        store.bytes()
    );
    assert!(store.points(guest.id).is_empty() && store.newest(guest.id).is_none());
    assert!(matches!(
        store.open_point(guest.id, 7).unwrap_err(),
        ReplicaError::NoPoint { newest: 0, .. }
    ));
    drop(store);
    let (store, _) = open(dir.path());
    assert_eq!(store.last_seq(), last, "batch numbers are not used twice");
}

#[test]
fn an_older_point_that_stays_is_itself_when_its_guest_is_given_up() {
    let (dir, site, store, mut guest, mut random) = started();
    for point in 1..=5 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    let given_up = BTreeMap::from([(guest.id, BTreeSet::new())]);
    let planned = store.plan_prune(&given_up).unwrap();
    assert_eq!(planned.dropped.len(), 5);
    // Something reads one by the time that all are to go.
    let replica = store.open_point(guest.id, 2).unwrap();
    let retired = planned.retire.iter().copied().collect();
    site.index.lock().unwrap().remove_seqs(&retired);
    assert_eq!(store.perform_prune(&planned).unwrap().points, 4);
    drop(replica);
    guest.sealed.retain(|&point, _| point == 2);
    guest.check(&store);
    // And what builds on it tells what changed since it, not since the dropped one.
    guest.now = guest.sealed[&2].clone();
    guest.step(&site, &store, 6, &mut random).unwrap();
    guest.check(&store);
    drop(store);
    guest.check(&open(dir.path()).0);
}

#[test]
fn every_point_is_itself_after_a_prune_that_failed() {
    let disk = SimulatedDisk::new();
    let open = |disk: &SimulatedDisk| {
        let disk = Arc::new(disk.clone());
        Store::open_on(disk, Path::new("/store"), common::options()).unwrap()
    };
    let (store, _) = open(&disk);
    let (site, mut guest) = (Site::new(), Model::new(1, &[40, 40]));
    let mut random = StdRng::seed_from_u64(8);
    for point in 1..=5 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    drop(store);
    let given_up = BTreeMap::from([(guest.id, BTreeSet::new())]);
    let mut failed = 0;
    for nth in 1.. {
        let disk = disk.copy();
        let (store, _) = open(&disk);
        // Two stay in one half of the tries, none in the other.
        let pinned = (nth % 2 == 0).then(|| [1, 3].map(|at| store.open_point(guest.id, at)));
        let planned = store.plan_prune(&given_up).unwrap();
        disk.fail(1 + nth / 2, Fault::Io);
        let outcome = store.perform_prune(&planned);
        let hit = disk.heal();
        drop(pinned);
        failed += u32::from(outcome.is_err());
        let check = |store: &Store| {
            let points = store.points(guest.id);
            for header in &points {
                let of = if header.point == 6 {
                    header.parent
                } else {
                    header.point
                };
                let content = &guest.sealed[&of];
                common::check_point(store, guest.id, header.point, content);
            }
            points.last().map(|newest| newest.point)
        };
        if let Some(newest) = check(&store) {
            store.seal(guest.seal_of(6, newest, &[])).unwrap();
        }
        check(&store);
        drop(store);
        check(&open(&disk).0);
        if hit.is_none() && nth % 2 == 1 {
            break;
        }
    }
    assert!(failed > 10, "{failed}");
}

#[test]
fn a_source_rebuilds_its_index_from_the_store() {
    let (_dir, site, store, mut guest, mut random) = started();
    for point in 1..6 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    let (mut from, mut known) = (1, BTreeMap::new());
    loop {
        let page = store.live_digests(&site.key, from, 3);
        assert!(page.batches.len() <= 3);
        for (seq, digests) in page.batches {
            known.extend(
                (0..)
                    .zip(digests)
                    .map(|(index, digest)| ((seq, index), digest)),
            );
        }
        match page.next {
            Some(next) => from = next,
            None => break,
        }
    }
    let replica = store.open_point(guest.id, 5).unwrap();
    for volume in 0..2u16 {
        for run in replica.map_pages(volume) {
            for at in 0..run.count {
                let place = farhaven_storage_sync::unit::Place(run.place.0 + at);
                let of = guest.now[usize::from(volume)][(run.unit + at) as usize];
                let digest = site.key.of(&common::unit(of));
                assert_eq!(known.get(&(place.seq(), place.index())), Some(&digest));
            }
        }
    }
}

#[test]
fn a_resized_volume_reads_zeros_where_it_grew() {
    let (_dir, site, store, mut guest, mut random) = started();
    guest.step(&site, &store, 1, &mut random).unwrap();
    guest.now[1].fill(77);
    let batches = guest.tell_all(&site, 2);
    send(&site, &store, &batches);
    store.seal(guest.seal_of(2, 1, &batches)).unwrap();
    guest.sealed.insert(2, guest.now.clone());
    for (point, units) in [(3, 100), (4, 500)] {
        guest.now[1].resize(units, 0);
        store.seal(guest.seal_of(point, point - 1, &[])).unwrap();
        guest.sealed.insert(point, guest.now.clone());
    }
    guest.check(&store);
    let short = store.open_point(guest.id, 3).unwrap();
    let mut out = vec![0; 4096];
    assert!(matches!(
        short.read(1, 100, 1, &mut out),
        Err(ReplicaError::Range { .. })
    ));
    assert!(matches!(
        short.read(9, 0, 1, &mut out),
        Err(ReplicaError::Range { .. })
    ));
    assert!(matches!(
        short.read(1, 0, 2, &mut out),
        Err(ReplicaError::Range { .. })
    ));
    let changes = short.changes_since(&store.open_point(guest.id, 2).unwrap());
    assert_eq!(changes.iter().map(|run| run.count).sum::<u64>(), 300);
}
