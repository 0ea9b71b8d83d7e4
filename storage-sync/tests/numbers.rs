//! No batch number is given out twice, whatever is lost of the batch that had it: what
//! names a place in it would read another's units as its own.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{Model, Site, check_point, literal_batches, open, send, unit};
use farhaven_storage_sync::codec::{Batch, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::store::{ImageProgress, Store};
use farhaven_storage_sync::unit::UNIT;

/// Bytes of a mark, which is before each batch.
const MARK: usize = 16;

/// The only segment.
fn segment(dir: &Path) -> PathBuf {
    dir.join("segments").join("00000001.seg")
}

/// Something overwrites the end of the log, from `bytes` before it on.
fn rot(dir: &Path, bytes: usize) {
    let path = segment(dir);
    let mut log = fs::read(&path).unwrap();
    let at = log.len() - bytes;
    log[at..].fill(0xee);
    fs::write(&path, log).unwrap();
}

/// A source that was started anew, and asked for the last number.
fn started_anew(store: &Store) -> Site {
    Site {
        seqs: Arc::new(Sequence::starting_at(store.last_seq() + 1)),
        index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
        ..Site::new()
    }
}

/// One unit of a guest's first volume, as it is now.
fn told(site: &Site, guest: &Model, point: u64, at: u64) -> Vec<Batch> {
    let mut encoder = Encoder::new(guest.id, point, site.seqs.clone(), site.index.clone(), 1);
    let bytes = unit(guest.now[0][at as usize]);
    let full = encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap();
    full.into_iter().chain(encoder.flush()).collect()
}

/// Sends that unit and seals the point.
fn step(site: &Site, store: &Store, guest: &mut Model, point: u64, at: u64) -> Vec<Batch> {
    let batches = told(site, guest, point, at);
    send(site, store, &batches);
    let newest = store.newest(guest.id).map_or(0, |newest| newest.point);
    store.seal(guest.seal_of(point, newest, &batches)).unwrap();
    guest.sealed.insert(point, guest.now.clone());
    batches
}

fn one_point(dir: &Path) -> (Site, Store, Model) {
    let (store, _) = open(dir);
    let (site, mut guest) = (Site::new(), Model::new(3, &[20, 1]));
    let first = literal_batches(&site, &mut guest, 1, 20);
    send(&site, &store, &first);
    store.seal(guest.seal_of(1, 0, &first)).unwrap();
    guest.sealed.insert(1, guest.now.clone());
    (site, store, guest)
}

#[test]
fn a_point_whose_last_batch_was_lost_never_reads_another_s() {
    // Its body alone, and its header too.
    for header in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (site, store, mut guest) = one_point(dir.path());
        guest.now[0][0] = 4711;
        let last = step(&site, &store, &mut guest, 2, 0).remove(0);
        assert_eq!(store.last_seq(), last.seq);
        drop(store);
        rot(dir.path(), if header { last.bytes.len() } else { 1 });
        let (store, report) = open(dir.path());
        assert_eq!(report.log.torn_bytes, (MARK + last.bytes.len()) as u64);
        assert_eq!((report.damaged.len(), report.points), (1, 1));
        // Also when nothing came in between.
        drop(store);
        let (store, _) = open(dir.path());
        assert!(!store.contains(last.seq));
        let site = started_anew(&store);
        guest.now = guest.sealed[&1].clone();
        guest.now[0][0] = 13;
        step(&site, &store, &mut guest, 3, 0);
        drop(store);
        let (store, _) = open(dir.path());
        check_point(&store, guest.id, 1, &guest.sealed[&1]);
        check_point(&store, guest.id, 3, &guest.sealed[&3]);
        let lost = store.open_point(guest.id, 2);
        assert!(lost.is_err(), "it reads what point 3 holds");
    }
}

#[test]
fn what_only_an_older_point_needs_keeps_its_number_too() {
    let dir = tempfile::tempdir().unwrap();
    let (site, store, mut guest) = one_point(dir.path());
    guest.now[0][0] = 4711;
    let mut lost = step(&site, &store, &mut guest, 2, 0);
    // Nothing of it is in use at the newest point, whose batch is lost with it.
    guest.now[0][0] = 0;
    lost.extend(step(&site, &store, &mut guest, 3, 0));
    drop(store);
    let bytes = lost.iter().map(|batch| MARK + batch.bytes.len());
    rot(dir.path(), bytes.sum());
    for _ in 0..2 {
        let (store, report) = open(dir.path());
        assert_eq!((report.damaged.len(), report.points), (0, 3));
        check_point(&store, guest.id, 3, &guest.sealed[&3]);
    }
    let (store, _) = open(dir.path());
    let site = started_anew(&store);
    guest.now[0][1] = 13;
    step(&site, &store, &mut guest, 4, 1);
    drop(store);
    let (store, _) = open(dir.path());
    check_point(&store, guest.id, 4, &guest.sealed[&4]);
    assert!(store.open_point(guest.id, 2).is_err());
}

#[test]
fn a_batch_that_is_cut_off_keeps_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let (site, store, mut guest) = one_point(dir.path());
    // No point tells of these yet.
    guest.now[0][0] = 4711;
    let mut batches = told(&site, &guest, 2, 0);
    guest.now[0][0] = 4712;
    batches.extend(told(&site, &guest, 2, 0));
    send(&site, &store, &batches);
    drop(store);
    // The last byte of each: their headers are whole.
    rot(dir.path(), 1);
    let path = segment(dir.path());
    let mut log = fs::read(&path).unwrap();
    let at = log.len() - batches[1].bytes.len() - MARK - 1;
    log[at] ^= 1;
    fs::write(&path, log).unwrap();
    let (store, report) = open(dir.path());
    assert!(report.log.torn_bytes > batches[1].bytes.len() as u64);
    assert_eq!(store.last_seq(), batches[1].seq);
    assert_eq!(store.newest_seqs(1), [batches[0].seq - 1]);
    // It is no other batch: sent again, it is taken.
    send(&site, &store, &batches);
    store.seal(guest.seal_of(2, 1, &batches)).unwrap();
    check_point(&store, guest.id, 2, &guest.now);
}

#[test]
fn an_image_whose_last_batch_was_lost_never_reads_another_s() {
    let dir = tempfile::tempdir().unwrap();
    let raw = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let add = |store: &Store, name: &str, content: std::ops::Range<u64>| {
        let path = raw.path().join(name);
        fs::write(&path, content.flat_map(unit).collect::<Vec<u8>>()).unwrap();
        let progress = ImageProgress::default();
        store.add_image(&path, name, &progress).unwrap()
    };
    let first = add(&store, "first", 1000..1010);
    drop(store);
    rot(dir.path(), 1);
    let (store, report) = open(dir.path());
    assert_eq!(report.damaged.len(), 1);
    assert!(store.images().is_empty());
    let second = add(&store, "second", 2000..2010);
    drop(store);
    let (store, _) = open(dir.path());
    assert_eq!(store.images(), std::slice::from_ref(&second));
    assert!(store.open_point(first.id, 1).is_err());
    let replica = store.open_point(second.id, 1).unwrap();
    let mut read = vec![0; 10 * UNIT];
    replica.read(0, 0, 10, &mut read).unwrap();
    assert!(read == (2000..2010).flat_map(unit).collect::<Vec<u8>>());
}
