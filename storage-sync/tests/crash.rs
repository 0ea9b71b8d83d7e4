//! What a crash, a full disk, a rotten byte or another process may do to a store.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::{Model, Site, literal_batches, open, options, send};
use farhaven_storage_sync::LogError;
use farhaven_storage_sync::codec::EntriesView;
use farhaven_storage_sync::replica::ReplicaError;
use farhaven_storage_sync::store::{Store, StoreError, StoreOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Bytes of a segment before the first mark, and of a mark, which is before each batch.
const FRONT: usize = 240;
const MARK: usize = 16;

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir.join("segments"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

fn manifest(dir: &Path, guest: &Model, point: u64) -> PathBuf {
    dir.join("manifests")
        .join(guest.id.to_string())
        .join(format!("{point:020}.man"))
}

#[test]
fn a_torn_last_batch_is_cut_off_at_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let mut guest = Model::new(1, &[40, 4]);
    let whole = literal_batches(&site, &mut guest, 1, 3);
    let (store, _) = open(dir.path());
    send(&site, &store, &whole);
    store.seal(guest.seal_of(1, 0, &whole)).unwrap();
    guest.sealed.insert(1, guest.now.clone());
    let before = store.bytes();
    guest.now[0][0] = 5;
    let torn = guest.tell_all(&site, 2);
    assert_eq!(torn.len(), 1);
    send(&site, &store, &torn);
    drop(store);
    let path = segments(dir.path()).pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    // Every byte of header and entries and of the end; the body in steps.
    let close = |end: &usize| {
        end - before as usize <= MARK + 160 || bytes.len() - end < 64 || end.is_multiple_of(41)
    };
    for end in (before as usize..bytes.len()).filter(close) {
        fs::write(&path, &bytes[..end]).unwrap();
        let (store, report) = open(dir.path());
        assert_eq!(report.log.torn_bytes, end as u64 - before);
        assert!(report.log.bad.is_empty());
        // Once what is told of its number is whole, that number is not given again.
        let told = EntriesView::parse(&bytes[end.min(before as usize + MARK)..end]);
        let last = told.map_or(whole[0].seq, |told| told.header.seq);
        assert_eq!((store.bytes(), store.last_seq()), (before, last));
        assert_eq!(store.newest_seqs(9), [whole[0].seq]);
        assert!(store.unsealed(guest.id, 2).is_empty());
        if end % 97 == 0 {
            guest.check(&store);
        }
    }
    // A length that reached the disk before the data did.
    fs::write(&path, [&bytes[..bytes.len() - 30], &[0; 30][..]].concat()).unwrap();
    let (store, report) = open(dir.path());
    assert_eq!(report.log.torn_bytes, bytes.len() as u64 - before);
    send(&site, &store, &torn);
    guest.sealed.insert(2, guest.now.clone());
    store.seal(guest.seal_of(2, 1, &torn)).unwrap();
    guest.check(&store);
}

#[test]
fn damage_in_the_middle_costs_only_what_lies_there() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let (store, _) = open(dir.path());
    let mut guests = Vec::new();
    let mut random = StdRng::seed_from_u64(3);
    for id in 1..6 {
        let mut guest = Model::new(id, &[90, 4]);
        let batches = literal_batches(&site, &mut guest, 1, random.random_range(5..9));
        send(&site, &store, &batches);
        store.seal(guest.seal_of(1, 0, &batches)).unwrap();
        guest.sealed.insert(1, guest.now.clone());
        guests.push((guest, batches[0].seq, batches[0].bytes.len()));
    }
    let batches = store.last_seq();
    drop(store);
    // All in one segment, the last: the second batch loses its header.
    let path = segments(dir.path()).pop().unwrap();
    assert_eq!(segments(dir.path()).len(), 1);
    let mut bytes = fs::read(&path).unwrap();
    let start = FRONT + MARK + guests[0].2;
    bytes[start..start + 300].fill(0xee);
    fs::write(&path, &bytes).unwrap();
    let (store, report) = open(dir.path());
    assert_eq!(report.log.bad.len(), 1, "{report:?}");
    assert_eq!(report.log.bad[0].offset, start as u64);
    assert_eq!(report.log.bad[0].bytes, (MARK + guests[1].2) as u64);
    assert_eq!(
        (report.log.torn_bytes, report.log.batches),
        (0, batches - 1)
    );
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].guest, Some(guests[1].0.id));
    for (at, (guest, seq, _)) in guests.iter().enumerate() {
        assert_eq!(store.contains(*seq), at != 1);
        if at != 1 {
            guest.check(&store);
        }
    }
    // What is sent again is taken, and everything is as it was.
    assert!(store.points(guests[1].0.id).is_empty());
}

#[test]
fn a_rotten_body_is_an_error_and_never_data() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let (store, _) = open(dir.path());
    let mut guest = Model::new(1, &[400, 4]);
    for point in 1..4 {
        let batches = literal_batches(&site, &mut guest, point, 200);
        send(&site, &store, &batches);
        store
            .seal(guest.seal_of(point, point - 1, &batches))
            .unwrap();
        guest.sealed.insert(point, guest.now.clone());
    }
    drop(store);
    let path = segments(dir.path()).remove(0);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (store, report) = open(dir.path());
    assert!(
        report.damaged.is_empty(),
        "headers are whole: it shows when read"
    );
    let replica = store.open_point(guest.id, 1).unwrap();
    let mut out = vec![0; 400 * 4096];
    let error = replica.read(0, 0, 400, &mut out).unwrap_err();
    assert!(matches!(error, ReplicaError::Batch { .. }), "{error}");
    assert!(matches!(
        replica.fill(0, |_, _| {}),
        Err(ReplicaError::Batch { .. })
    ));
    assert!(matches!(
        replica.fill_parallel(0, 2, &|_, _| {}),
        Err(ReplicaError::Batch { .. })
    ));
    drop(replica);
    common::check_point(&store, guest.id, 3, &guest.sealed[&3]);
}

#[test]
fn a_damaged_manifest_costs_its_point_only() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let (store, _) = open(dir.path());
    let mut guest = Model::new(1, &[700, 700]);
    let mut random = StdRng::seed_from_u64(5);
    for point in 1..6 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    drop(store);
    for change in 0..3 {
        let path = manifest(dir.path(), &guest, 5 - change);
        let bytes = fs::read(&path).unwrap();
        match change {
            0 => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
            1 => fs::write(&path, [&bytes[..], b"x"].concat()).unwrap(),
            _ => fs::write(&path, b"").unwrap(),
        }
        fs::write(path.with_extension("tmp"), b"half").unwrap();
        guest.sealed.pop_last();
        let (store, report) = open(dir.path());
        assert_eq!(report.damaged.len(), 1 + change as usize, "{report:?}");
        assert!(!path.with_extension("tmp").exists());
        guest.check(&store);
    }
    // The next point takes a new number and builds on the newest whole one.
    let (store, _) = open(dir.path());
    guest.now = guest.sealed[&2].clone();
    guest.step(&site, &store, 6, &mut random).unwrap();
    guest.check(&store);
}

/// One change that a prune makes to a store's files.
type Step = Box<dyn Fn(&Path)>;

#[test]
fn a_crash_at_any_step_of_a_prune_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let (store, _) = open(dir.path());
    let mut guest = Model::new(1, &[700, 700]);
    let mut random = StdRng::seed_from_u64(6);
    for point in 1..8 {
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    drop(store);
    let whole = tempfile::tempdir().unwrap();
    copy(&dir.path().join("."), whole.path());
    let pruned = tempfile::tempdir().unwrap();
    copy(&dir.path().join("."), pruned.path());
    let (store, _) = open(pruned.path());
    let kept = BTreeSet::from([3, 4, 7]);
    let plan = store
        .plan_prune(&BTreeMap::from([(guest.id, kept.clone())]))
        .unwrap();
    store.perform_prune(&plan).unwrap();
    drop(store);
    guest.sealed.retain(|point, _| kept.contains(point));
    guest.check(&open(pruned.path()).0);
    // After a crash, files are those of before or of after, in the order of the
    // steps: new manifests, old ones gone newest first, copies, segments gone.
    let mut steps: Vec<Step> = Vec::new();
    let of = |root: &Path, path: &Path, base: &Path| root.join(path.strip_prefix(base).unwrap());
    for &point in &kept {
        let path = manifest(pruned.path(), &guest, point);
        steps.push(Box::new(move |root| {
            fs::copy(&path, of(root, &path, pruned_root(&path))).unwrap();
        }));
    }
    for point in [6, 5, 2, 1] {
        let guest = Model::new(1, &[]);
        steps.push(Box::new(move |root| {
            fs::remove_file(manifest(root, &guest, point)).unwrap()
        }));
    }
    for path in segments(pruned.path()) {
        steps.push(Box::new(move |root| {
            fs::copy(&path, root.join("segments").join(path.file_name().unwrap())).unwrap();
        }));
    }
    let left: BTreeSet<_> = segments(pruned.path())
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    for path in segments(whole.path()) {
        let name = path.file_name().unwrap().to_owned();
        if !left.contains(&name) {
            steps.push(Box::new(move |root| {
                fs::remove_file(root.join("segments").join(&name)).unwrap();
            }));
        }
    }
    assert!(steps.len() > 9);
    for done in 0..=steps.len() {
        let crashed = tempfile::tempdir().unwrap();
        copy(&whole.path().join("."), crashed.path());
        steps[..done].iter().for_each(|step| step(crashed.path()));
        let (store, report) = open(crashed.path());
        assert!(report.damaged.is_empty(), "after {done} steps: {report:?}");
        for (&point, content) in &guest.sealed {
            common::check_point(&store, guest.id, point, content);
        }
    }
}

/// Copies what `from` holds. Not with `cp`: until a child runs its own program
/// it has this process's locks too, and tests beside this one open their stores.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap().is_dir() {
            true => copy(&from, &to),
            false => drop(fs::copy(&from, &to).unwrap()),
        }
    }
}

/// The store's directory of a manifest's path.
fn pruned_root(path: &Path) -> &Path {
    path.ancestors().nth(3).unwrap()
}

#[test]
fn two_daemons_cannot_have_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let error = Store::open(dir.path(), options()).unwrap_err();
    assert!(matches!(error, StoreError::Lock(_)));
    assert!(
        error
            .to_string()
            .contains("in use by another farhaven daemon"),
        "{error}"
    );
    drop(store);
    open(dir.path());
    let wrong = StoreOptions {
        segment_bytes: 1,
        ..options()
    };
    assert!(matches!(
        Store::open(dir.path(), wrong),
        Err(StoreError::Options(1))
    ));
}

#[test]
fn files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let site = Site::new();
    let (store, _) = open(&root);
    let mut guest = Model::new(1, &[40, 4]);
    guest
        .step(&site, &store, 1, &mut StdRng::seed_from_u64(1))
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for path in [
        manifest(&root, &guest, 1),
        segments(&root).remove(0),
        root.join("lock"),
    ] {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    for path in [root.clone(), root.join("segments"), root.join("manifests")] {
        assert_eq!(mode(&path), 0o700, "{}", path.display());
    }
}

#[test]
fn the_same_batch_twice_is_one_and_another_of_its_number_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let site = Site::new();
    let mut guest = Model::new(1, &[40, 4]);
    let batches = literal_batches(&site, &mut guest, 1, 5);
    send(&site, &store, &batches);
    let bytes = store.bytes();
    send(&site, &store, &batches);
    let twice = [batches[0].bytes.clone(), batches[0].bytes.clone()];
    assert_eq!(store.append(&twice).unwrap(), [1, 1]);
    assert_eq!(store.bytes(), bytes);
    let other = literal_batches(&Site::new(), &mut guest, 2, 5);
    let error = store.append(&[other[0].bytes.clone()]).unwrap_err();
    assert!(
        matches!(error, StoreError::Log(LogError::Conflict { seq: 1 })),
        "{error}"
    );
    assert_eq!(store.bytes(), bytes);
}
