//! The bytes of batches and manifests, pinned: what this version writes, and
//! what every later one must read. After a change of version that is meant,
//! `FARHAVEN_GOLDEN=write` makes new files beside the old ones' names.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::Model;
use farhaven_storage_sync::codec::{BatchView, DedupIndex, Encoder, Expander, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT};

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
