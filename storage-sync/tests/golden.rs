//! The bytes of batches and manifests, pinned, and a whole small store: what this
//! version writes, and what every later one must read. What a newer version
//! wrote is refused. After a change of version that is meant,
//! `FARHAVEN_GOLDEN=write` makes new files beside the old ones' names.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{Model, Site};
use farhaven_storage_sync::catalogue::{Catalogue, Table};
use farhaven_storage_sync::codec::{
    BatchHeader, BatchView, Chain, DedupIndex, Encoder, Expander, Sequence,
};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{Seal, Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT};
use rand::SeedableRng;
use rand::rngs::StdRng;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

fn pinned(name: &str, bytes: &[u8]) {
    let path = golden(name);
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    let kept = fs::read(&path).unwrap();
    assert!(
        kept == bytes,
        "{name}: this version writes other bytes than the golden file has"
    );
}

/// A batch with every kind of entry. Its body is raw: zstd may change, the layout may not.
fn batch() -> farhaven_storage_sync::codec::Batch {
    let index = Arc::new(Mutex::new(DedupIndex::new(1 << 16)));
    let key = DigestKey::new([7; 32]);
    let mut encoder = Encoder::new(
        GuestId(*b"golden guest 001"),
        300,
        Arc::new(Sequence::starting_at(1000)),
        index,
        3,
    );
    let noise = |seed: u32| -> Vec<u8> {
        let mut bytes = vec![0; UNIT];
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    };
    let mut put = |volume, unit, seed| {
        let bytes = noise(seed);
        assert!(
            encoder
                .unit(volume, unit, &bytes, key.of(&bytes))
                .unwrap()
                .is_none()
        );
    };
    put(0, 0, 1);
    put(0, 1, 2);
    put(0, 500, 3);
    put(2, 70, 1);
    put(2, 71, 2);
    put(2, 3, 3);
    encoder.zeros(1, 1 << 20, 12_345).unwrap();
    encoder.flush().unwrap()
}

#[test]
fn a_batch_keeps_its_bytes() {
    let batch = batch();
    pinned("batch-1.bin", &batch.bytes);
    let bytes = fs::read(golden("batch-1.bin")).unwrap();
    let view = BatchView::parse(&bytes).unwrap();
    let header = view.header();
    assert_eq!(
        (header.seq, header.point, header.literals, header.entries),
        (1000, 300, 3, 5)
    );
    let mut body = Vec::new();
    view.literals(&mut Expander::new(), &mut body).unwrap();
    assert_eq!(body.len(), 3 * UNIT);
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    // The time of sealing is in it, so the file is one that was once written.
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let guest = Model {
        id: GuestId(*b"golden guest 001"),
        ..Model::new(1, &[600, 10, 100])
    };
    let mut volumes = guest.volumes();
    volumes[1].bytes = 8 << 30;
    let batch = batch();
    store.append(std::slice::from_ref(&batch.bytes)).unwrap();
    let mut seal = guest.seal_of(300, 0, &[batch]);
    seal.volumes = volumes;
    store.seal(seal).unwrap();
    drop(store);
    let place = format!("manifests/{}/{:020}.man", guest.id, 300);
    let written = fs::read(dir.path().join(&place)).unwrap();
    let path = golden("manifest-1.bin");
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        fs::write(&path, &written).unwrap();
    }
    let kept = fs::read(&path).unwrap();
    assert_eq!(kept.len(), written.len());
    // All but the time, and the hashes over it.
    let differing = kept.iter().zip(&written).filter(|(a, b)| a != b).count();
    assert!(differing <= 8 + 32 + 32, "{differing} bytes differ");
    assert_eq!(kept[..32], written[..32]);
    fs::write(dir.path().join(&place), &kept).unwrap();
    let (store, report) = Store::open(dir.path(), StoreOptions::default()).unwrap();
    assert!(report.damaged.is_empty(), "{report:?}");
    let replica = store.open_point(guest.id, 300).unwrap();
    assert_eq!(replica.header().cut_at_unix_ns, 1300);
    assert_eq!(replica.context(), b"definition 300");
    let runs: Vec<_> = (0..3)
        .map(|volume| replica.nonzero_runs(volume).collect::<Vec<_>>())
        .collect();
    assert_eq!(
        runs,
        [vec![(0, 2), (500, 1)], vec![], vec![(3, 1), (70, 2)]]
    );
}

/// Every file below `dir` by its path, with its bytes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => dirs.push(entry.path()),
                false => {
                    let path = entry.path();
                    let name = path.strip_prefix(dir).unwrap().to_owned();
                    found.insert(name, fs::read(path).unwrap());
                }
            }
        }
    }
    found
}

/// What was checked in, where it can be written.
fn kept_store(version: u32) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files(&golden(&format!("store-{version}"))) {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

/// A line for every volume of every point: guest, point, volume, BLAKE3 of all its bytes.
fn restored(store: &Store) -> String {
    let mut lines = String::new();
    for guest in store.guests() {
        for header in store.points(guest) {
            let replica = store.open_point(guest, header.point).unwrap();
            for (index, volume) in replica.volumes().iter().enumerate() {
                let mut bytes = vec![0; volume.bytes as usize];
                replica
                    .read(index as u16, 0, volume.units(), &mut bytes)
                    .unwrap();
                let hash = blake3::hash(&bytes).to_hex();
                lines += &format!("{guest} {} {} {hash}\n", header.point, volume.name);
            }
        }
    }
    lines
}

/// A store of the present version: two guests that share content, one with differences, a
/// kept point, and a catalogue without sled's directory.
fn write_store(dir: &Path) {
    let (store, _) = Store::open(&dir.join("store"), StoreOptions::default()).unwrap();
    let site = Site::new();
    let mut random = StdRng::seed_from_u64(1);
    let mut guests = [Model::new(1, &[4, 6]), Model::new(2, &[5])];
    for point in 1..=4 {
        let guest = &mut guests[point as usize % 2];
        guest.step(&site, &store, point, &mut random).unwrap();
    }
    store
        .keep_point(guests[1].id, 3, "before the upgrade")
        .unwrap();
    // Differences, as they were once written.
    let third = Model {
        id: GuestId(*b"golden guest 001"),
        ..Model::new(3, &[70, 20])
    };
    let told = fs::read(golden("delta-1.bin")).unwrap();
    let mut rest = &told[..];
    let mut parent = 0;
    while !rest.is_empty() {
        let header = BatchHeader::parse(rest).unwrap();
        let (batch, after) = rest.split_at(header.bytes());
        store.append(&[Bytes::copy_from_slice(batch)]).unwrap();
        let mut chain = Chain::new();
        chain.push(header.seq, &header.hash);
        let seal = third.seal_of(header.point, parent, &[]);
        store
            .seal(Seal {
                batches: 1,
                chain: chain.finish(),
                ..seal
            })
            .unwrap();
        (parent, rest) = (header.point, after);
    }
    let points = restored(&store);
    fs::write(dir.join("points.txt"), points).unwrap();
    drop(store);
    let (catalogue, _) = Catalogue::open(&dir.join("catalogue")).unwrap();
    catalogue.put(Table::Peers, "west", &["dr:4747"]).unwrap();
    catalogue.put(Table::Guests, "gone", &1).unwrap();
    catalogue.remove(Table::Guests, "gone").unwrap();
    catalogue.flush().unwrap();
    drop(catalogue);
    fs::remove_dir_all(dir.join("catalogue/catalogue.sled")).unwrap();
    for lock in ["store/lock", "catalogue/lock"] {
        fs::remove_file(dir.join(lock)).unwrap();
    }
}

/// Its segment has neither front nor marks. Every later version must open this one.
#[test]
fn a_store_of_version_1_opens_and_restores() {
    opens_and_restores(1);
}

/// And this one.
#[test]
fn a_store_of_version_2_opens_and_restores() {
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        let _ = fs::remove_dir_all(golden("store-2"));
        fs::create_dir_all(golden("store-2")).unwrap();
        write_store(&golden("store-2"));
        let bytes: usize = files(&golden("store-2")).values().map(Vec::len).sum();
        assert!(bytes < 200_000, "{bytes} bytes are too many to check in");
    }
    opens_and_restores(2);
}

fn opens_and_restores(version: u32) {
    let dir = kept_store(version);
    let expected = fs::read_to_string(dir.path().join("points.txt")).unwrap();
    assert_eq!(expected.lines().count(), 2 * 2 + 2 + 2 * 2, "{expected}");
    let (store, report) = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
    assert!(
        report.damaged.is_empty() && report.log.bad.is_empty(),
        "{report:?}"
    );
    assert_eq!((report.log.torn_bytes, report.points), (0, 6));
    assert_eq!(restored(&store), expected);
    assert_eq!(store.kept(GuestId([2; 16]))[&3], "before the upgrade");
    assert!(store.check().damage.is_empty());
    // It is not only read: the next point builds on it, and a prune leaves the rest whole.
    let guest = Model::new(2, &[5]);
    store.seal(guest.seal_of(9, 3, &[])).unwrap();
    let keep = BTreeMap::from([(guest.id, BTreeSet::from([3, 9]))]);
    let plan = store.plan_prune(&keep).unwrap();
    store.perform_prune(&plan).unwrap();
    let kept = "02020202-0202-0202-0202-020202020202 3 ";
    let line = expected
        .lines()
        .find(|line| line.starts_with(kept))
        .unwrap();
    assert!(restored(&store).lines().any(|now| now == line));
    drop(store);

    let (catalogue, report) = Catalogue::open(&dir.path().join("catalogue")).unwrap();
    assert!(
        report.set_aside.is_empty() && report.torn_bytes == 0,
        "{report:?}"
    );
    let peers: Vec<(String, Vec<String>)> = catalogue.list(Table::Peers).unwrap();
    assert_eq!(peers, [("west".to_owned(), vec!["dr:4747".to_owned()])]);
    assert_eq!(catalogue.find::<u8>(Table::Guests, "gone").unwrap(), None);
}

/// Changes one file of a kept store, which must then be refused, and stay as it is.
fn refused(file: &str, what: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let dir = kept_store(1);
    let found = files(dir.path());
    let path = found
        .keys()
        .find(|path| path.to_string_lossy().contains(file));
    let path = dir.path().join(path.unwrap());
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let error = match file.starts_with("catalogue") {
        true => Catalogue::open(&dir.path().join("catalogue"))
            .unwrap_err()
            .to_string(),
        false => match Store::open(&dir.path().join("store"), StoreOptions::default()) {
            Ok((_, report)) => panic!("opened: {report:?}"),
            Err(error) => error.to_string(),
        },
    };
    let name = path.file_name().unwrap().to_string_lossy();
    for word in [
        "newer version",
        what,
        &name,
        "upgrade this site, nothing was changed",
    ] {
        assert!(error.contains(word), "no '{word}' in: {error}");
    }
    assert!(fs::read(&path).unwrap() == bytes, "{name} was changed");
}

/// A batch that says of itself what this version does not know, under a right hash.
fn newer_batch(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = batch().bytes.to_vec();
    change(&mut bytes);
    let entries = u32::from_le_bytes([40, 41, 42, 43].map(|at| bytes[at])) as usize;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&bytes[..88])
        .update(&bytes[120..120 + entries]);
    bytes[88..120].copy_from_slice(hasher.finalize().as_bytes());
    bytes
}

#[test]
fn what_a_newer_version_wrote_is_refused_and_stays_as_it_is() {
    let add = |batch: Vec<u8>| move |bytes: &mut Vec<u8>| bytes.extend(batch);
    let layout = newer_batch(|bytes| bytes[4] = 3);
    refused(".seg", "layout 3", add(layout));
    // Behind what rotted a mark tells it: `crafted.rs`.
    refused(
        ".seg",
        "flags 0x80",
        add(newer_batch(|bytes| bytes[6] = 0x80)),
    );
    refused(
        ".seg",
        "compression 9",
        add(newer_batch(|bytes| bytes[7] = 9)),
    );
    refused(
        ".seg",
        "entry kind",
        add(newer_batch(|bytes| bytes[120] |= 7)),
    );
    refused(".man", "manifest 2", |bytes| {
        bytes[4] = 2;
        let end = bytes.len() - 32;
        let hash = blake3::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(hash.as_bytes());
    });
    refused("catalogue.journal", "journal 2", |bytes| bytes[4] = 2);
    refused("catalogue.journal", "rows of table 77", |bytes| {
        let mut record = vec![2, 0, 2, 0, 0, 0, 77, b'k', b'{', b'}'];
        let sum = blake3::hash(&record);
        record.extend_from_slice(&sum.as_bytes()[..16]);
        bytes.extend(record);
    });

    // What only looks so, because it rotted, is damage as ever: told, and no refusal.
    for version in [1, 2] {
        let dir = kept_store(version);
        let segment = dir.path().join("store/segments/00000001.seg");
        let mut bytes = fs::read(&segment).unwrap();
        let whole = bytes.len() as u64;
        let mut rotten = batch().bytes.to_vec();
        rotten[4] ^= 2;
        bytes.extend(rotten);
        fs::write(&segment, &bytes).unwrap();
        let (store, report) =
            Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        assert!(report.log.torn_bytes > 0 && store.bytes() == whole);
    }
}
