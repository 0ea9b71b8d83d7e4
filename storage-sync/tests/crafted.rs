//! A guest that holds what looks like a batch, with a number of its choice: where the
//! batch around it is broken, it is never taken for one.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{Model, Site, check_point, literal_batches, open, send};
use farhaven_storage_sync::codec::{Batch, BatchView, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::store::Store;
use farhaven_storage_sync::unit::{GuestId, UNIT};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// Bytes before the first mark, and of a mark.
const FRONT: usize = 240;
const MARK: usize = 16;

fn segment(dir: &Path) -> PathBuf {
    dir.join("segments").join("00000001.seg")
}

fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; UNIT];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A whole batch that says of itself what its maker likes.
fn crafted(guest: GuestId, number: u64, point: u64) -> Vec<u8> {
    let index = Arc::new(Mutex::new(DedupIndex::new(1 << 16)));
    let numbers = Arc::new(Sequence::starting_at(number));
    let mut encoder = Encoder::new(guest, point, numbers, index, 3);
    let site = Site::new();
    for at in 0..8 {
        let bytes = vec![0x66 + at as u8; UNIT];
        encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap();
    }
    let bytes = encoder.flush().unwrap().bytes.to_vec();
    assert!(BatchView::parse(&bytes).is_ok() && bytes.len() < UNIT);
    bytes
}

/// The same of a version that is none.
fn newer(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[4] = 3;
    let entries = u32::from_le_bytes([40, 41, 42, 43].map(|at| bytes[at])) as usize;
    let told = [&bytes[..88], &bytes[120..120 + entries]].concat();
    bytes[88..120].copy_from_slice(blake3::hash(&told).as_bytes());
    bytes
}

/// A batch that carries `inner` in the memory of its guest, as it is.
fn carrier(site: &Site, guest: &Model, inner: &[u8]) -> Batch {
    let mut encoder = Encoder::new(guest.id, 1, site.seqs.clone(), site.index.clone(), 1);
    for at in 0..3 {
        let mut bytes = noise(at);
        bytes[100..100 + inner.len()].copy_from_slice(inner);
        encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap();
    }
    let batch = encoder.flush().unwrap();
    let found = batch.bytes.windows(inner.len()).any(|part| part == inner);
    assert!(found, "it is compressed away");
    batch
}

/// Three guests, a batch each: one that is attacked, one that attacks, one behind.
struct Told {
    guests: [Model; 3],
    batches: [Batch; 3],
}

fn told(dir: &Path, inner: &[u8]) -> Told {
    let (store, _) = open(dir);
    let site = Site::new();
    let mut guests = [1, 2, 3].map(|id| Model::new(id, &[8, 1]));
    let first = literal_batches(&site, &mut guests[0], 1, 8).remove(0);
    let second = carrier(&site, &guests[1], inner);
    let third = literal_batches(&site, &mut guests[2], 1, 8).remove(0);
    let batches = [first, second, third];
    for (guest, batch) in guests.iter_mut().zip(&batches) {
        send(&site, &store, std::slice::from_ref(batch));
        let seal = guest.seal_of(1, 0, std::slice::from_ref(batch));
        store.seal(seal).unwrap();
        guest.sealed.insert(1, guest.now.clone());
    }
    assert_eq!(batches.each_ref().map(|batch| batch.seq), [1, 2, 3]);
    Told { guests, batches }
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Inside of which the second batch lies, its mark included.
fn second(told: &Told) -> std::ops::Range<usize> {
    let [first, second, _] = told.batches.each_ref().map(|batch| batch.bytes.len());
    let start = FRONT + MARK + first;
    start..start + MARK + second
}

/// The store is as if the guest had held anything else.
fn is_not_served(store: &Store, told: &Told, last: u64) {
    assert_eq!(store.last_seq(), last);
    assert!(store.contains(1) && !store.contains(2));
    check_point(store, told.guests[0].id, 1, &told.guests[0].now);
    assert!(store.points(told.guests[1].id).is_empty());
    assert!(store.unsealed(told.guests[0].id, 2).is_empty());
    assert_eq!(store.next_point(told.guests[0].id), 2);
}

/// What a guest may hold: a batch of another's, one with a number that uses up all others,
/// one of a later point, and one that no store may be opened with.
fn all() -> Vec<Vec<u8>> {
    let victim = GuestId([1; 16]);
    vec![
        crafted(victim, 1, 1),
        crafted(victim, (1 << 56) - 1, 1),
        crafted(victim, 7, 1 << 61),
        newer(crafted(victim, 1, 1)),
    ]
}

#[test]
fn what_looks_like_a_batch_within_a_broken_one_is_not_served() {
    for inner in all() {
        // Its header, its header alone, and one byte of its body.
        for (at, length) in [(0, 200), (MARK + 9, 1), (MARK + 5000, 1)] {
            let dir = tempfile::tempdir().unwrap();
            let told = told(dir.path(), &inner);
            let broken = second(&told);
            change(&segment(dir.path()), |bytes| {
                let at = broken.start + at;
                bytes[at..at + length].iter_mut().for_each(|b| *b ^= 0xff);
            });
            let (store, report) = open(dir.path());
            // All of it is lost, nothing else, and that is told.
            assert_eq!((report.log.bad.len(), report.log.torn_bytes), (1, 0));
            let bad = &report.log.bad[0];
            let lost = (bad.offset as usize, bad.bytes as usize);
            assert_eq!(lost, (broken.start, broken.len()));
            assert_eq!((report.log.batches, report.damaged.len()), (2, 1));
            assert_eq!(report.damaged[0].guest, Some(told.guests[1].id));
            is_not_served(&store, &told, 3);
            check_point(&store, told.guests[2].id, 1, &told.guests[2].now);
        }
    }
}

#[test]
fn a_crash_in_the_midst_of_a_batch_does_not_bring_to_light_what_a_guest_put_in_it() {
    for inner in all() {
        // Its last bytes never reached the disk; or its first did not.
        for header in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let told = told(dir.path(), &inner);
            let torn = second(&told);
            change(&segment(dir.path()), |bytes| {
                bytes.truncate(torn.end - 500);
                if !header {
                    bytes[torn.start..torn.start + 512].fill(0);
                }
            });
            let (store, report) = open(dir.path());
            assert!(report.log.bad.is_empty(), "{report:?}");
            assert_eq!(report.log.torn_bytes, torn.len() as u64 - 500);
            assert_eq!(store.bytes(), torn.start as u64);
            is_not_served(&store, &told, 3);
        }
    }
}

#[test]
fn the_front_of_a_segment_may_be_lost_and_no_crafted_batch_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let inner = crafted(GuestId([1; 16]), 1, 1);
    let first = told(dir.path(), &inner);
    // One copy of two: nothing is lost.
    change(&segment(dir.path()), |bytes| bytes[60] ^= 1);
    let (store, report) = open(dir.path());
    assert_eq!((report.log.bad.len(), report.log.batches), (1, 3));
    assert_eq!(
        (report.log.bad[0].offset, report.log.bad[0].bytes),
        (0, 240)
    );
    assert_eq!((report.damaged.len(), report.points), (0, 3));
    drop(store);
    // Both, and the first batch: nobody knows which batches are the store's. All stay.
    change(&segment(dir.path()), |bytes| bytes[..512].fill(0));
    let whole = fs::metadata(segment(dir.path())).unwrap().len();
    let (store, report) = open(dir.path());
    assert_eq!((report.log.torn_bytes, report.log.batches), (0, 0));
    assert_eq!(report.log.bad[0].bytes, whole);
    assert_eq!(report.damaged.len(), 3);
    // Their numbers are not given again; what is sent anew goes to a segment of its own.
    assert_eq!(store.last_seq(), 3);
    let all: Vec<_> = first.batches.iter().map(|b| b.bytes.clone()).collect();
    store.append(&all).unwrap();
    drop(store);
    assert_eq!(fs::metadata(segment(dir.path())).unwrap().len(), whole);
    // With its secret known by another segment, those that are whole are found again.
    let (store, report) = open(dir.path());
    assert_eq!((report.log.batches, report.damaged.len()), (3, 0));
    for guest in [&first.guests[0], &first.guests[2]] {
        check_point(&store, guest.id, 1, &guest.now);
    }
}

#[test]
fn the_batches_behind_a_lost_front_are_known_by_the_secret_of_another_segment() {
    let dir = tempfile::tempdir().unwrap();
    let inner = crafted(GuestId([1; 16]), 1, 1);
    let told = told(dir.path(), &inner);
    let site = Site::new();
    let (store, _) = open(dir.path());
    // More than the first segment holds.
    let mut encoder = Encoder::new(
        GuestId([4; 16]),
        1,
        Arc::new(Sequence::starting_at(4)),
        Arc::new(Mutex::new(DedupIndex::new(1 << 16))),
        1,
    );
    for at in 0..60 {
        let bytes = noise(1000 + at);
        let full = encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap();
        assert!(full.is_none());
    }
    let last = encoder.flush().unwrap();
    assert!(last.bytes.len() > 64 * 1024);
    store.append(&[last.bytes]).unwrap();
    drop(store);
    let [first, ..] = told.batches.each_ref().map(|batch| batch.bytes.len());
    change(&segment(dir.path()), |bytes| bytes[..512].fill(0));
    let (store, report) = open(dir.path());
    assert_eq!(report.log.bad.len(), 1);
    let lost = (report.log.bad[0].offset, report.log.bad[0].bytes as usize);
    assert_eq!(lost, (0, FRONT + MARK + first));
    assert!(!store.contains(1) && store.contains(2) && store.contains(3));
    check_point(&store, told.guests[2].id, 1, &told.guests[2].now);
}

/// Takes fronts and marks away: a segment of version 1.
fn made_old(dir: &Path, told: &Told) {
    let batches = told.batches.each_ref().map(|batch| batch.bytes.to_vec());
    fs::write(segment(dir), batches.concat()).unwrap();
}

#[test]
fn a_segment_without_marks_is_read_and_takes_no_crafted_batch_either() {
    for inner in all() {
        let dir = tempfile::tempdir().unwrap();
        let told = told(dir.path(), &inner);
        made_old(dir.path(), &told);
        let (store, report) = open(dir.path());
        assert!(report.log.bad.is_empty() && report.damaged.is_empty());
        assert_eq!((report.log.batches, report.points), (3, 3));
        drop(store);
        let [first, second, third] = told.batches.each_ref().map(|batch| batch.bytes.len());
        let whole = fs::read(segment(dir.path())).unwrap();
        // Its body: its header says where the next one is.
        change(&segment(dir.path()), |bytes| bytes[first + 5000] ^= 1);
        let (store, report) = open(dir.path());
        assert_eq!((report.log.bad.len(), report.log.torn_bytes), (1, 0));
        let bad = &report.log.bad[0];
        assert_eq!((bad.offset, bad.bytes), (first as u64, second as u64));
        is_not_served(&store, &told, 3);
        check_point(&store, told.guests[2].id, 1, &told.guests[2].now);
        drop(store);
        // Its header: nothing behind it is believed, all of it is told, and it stays there.
        let mut bytes = whole.clone();
        bytes[first + 9] ^= 1;
        fs::write(segment(dir.path()), &bytes).unwrap();
        let (store, report) = open(dir.path());
        let bad = &report.log.bad[0];
        let lost = (bad.offset as usize, bad.bytes as usize);
        assert_eq!((report.log.bad.len(), lost), (1, (first, second + third)));
        assert_eq!(report.damaged.len(), 2);
        assert_eq!(fs::read(segment(dir.path())).unwrap(), bytes);
        // Their numbers are known by the manifests.
        is_not_served(&store, &told, 3);
        // What comes now lies in a segment with marks.
        let again = told.batches[2].bytes.clone();
        store.append(&[again]).unwrap();
        drop(store);
        assert_eq!(fs::read(segment(dir.path())).unwrap(), bytes);
        let (store, report) = open(dir.path());
        assert_eq!((report.log.batches, report.damaged.len()), (2, 1));
        check_point(&store, told.guests[2].id, 1, &told.guests[2].now);
    }
}

#[test]
fn a_newer_version_s_batch_is_refused_also_behind_a_broken_one() {
    for broken in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let told = told(dir.path(), b"nothing");
        let mut bytes = fs::read(segment(dir.path())).unwrap();
        let secret: [u8; 32] = bytes[56..88].try_into().unwrap();
        if broken {
            let end = second(&told).end;
            bytes[end..end + 100].fill(0);
        }
        let batch = newer(crafted(GuestId([1; 16]), 9, 1));
        let at = (bytes.len() + MARK) as u64;
        let of = [&1u32.to_le_bytes()[..], &at.to_le_bytes(), &batch[88..120]].concat();
        let mark = blake3::keyed_hash(&secret, &of);
        bytes.extend_from_slice(&mark.as_bytes()[..MARK]);
        bytes.extend_from_slice(&batch);
        fs::write(segment(dir.path()), &bytes).unwrap();
        let error = Store::open(dir.path(), common::options()).unwrap_err();
        assert!(error.to_string().contains("newer version"), "{error}");
        assert_eq!(fs::read(segment(dir.path())).unwrap(), bytes);
    }
}
