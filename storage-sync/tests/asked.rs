//! What a source that asks by digest is told: from the log, from images, after
//! restarts, losses and damage, and beside a prune.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Model, Site, open, send, unit};
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{BatchView, DedupIndex, Encoder};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::limits::IMAGE_SEQ;
use farhaven_storage_sync::store::{
    ImageError, ImageProgress, LocalError, Prefix, Seal, SealError, Store, StoreOptions,
};
use farhaven_storage_sync::unit::{Digest, GuestId, Place, UNIT, Volume, VolumeKind};
use proptest::prelude::*;

fn prefix(digest: &Digest) -> Prefix {
    *digest.0.first_chunk().unwrap()
}

/// Asks for content; what was told, by digest.
fn ask(store: &Store, key: &DigestKey, content: &[u64]) -> HashMap<Digest, Place> {
    let asked: Vec<Prefix> = content
        .iter()
        .map(|of| prefix(&key.of(&unit(*of))))
        .collect();
    let mut told = HashMap::new();
    for batch in store.find(key, &asked).batches {
        let slots = (0..64).filter(|slot| batch.slots >> slot & 1 == 1);
        assert_eq!(batch.slots.count_ones() as usize, batch.digests.len());
        for (slot, digest) in slots.zip(batch.digests) {
            told.insert(digest, Place::new(batch.seq, slot));
        }
    }
    told
}

fn fill(store: &Store) {
    while store.fill_hints() {}
}

/// What befalls the hints.
type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);

/// A raw image of these units.
fn image(dir: &Path, content: impl Iterator<Item = u64>) -> std::path::PathBuf {
    let path = dir.join("image.raw");
    std::fs::write(&path, content.flat_map(unit).collect::<Vec<u8>>()).unwrap();
    path
}

/// A guest whose one disk holds these, sent under what the source knows; its batches' bytes.
fn first_copy(site: &Site, store: &Store, id: u8, content: &[u64]) -> usize {
    let id = GuestId([id; 16]);
    let mut encoder = Encoder::new(id, 1, site.seqs.clone(), site.index.clone(), 1);
    let mut batches = Vec::new();
    for (at, of) in content.iter().enumerate() {
        let bytes = unit(*of);
        let batch = encoder.unit(0, at as u64, &bytes, site.key.of(&bytes));
        batches.extend(batch.unwrap());
    }
    batches.extend(encoder.flush());
    send(site, store, &batches);
    let volume = Volume {
        name: "disk".into(),
        kind: VolumeKind::Disk,
        bytes: (content.len() * UNIT) as u64,
    };
    let mut chain = farhaven_storage_sync::codec::Chain::new();
    batches.iter().for_each(|b| chain.push(b.seq, &b.hash));
    store
        .seal(Seal {
            guest: id,
            point: 1,
            parent: 0,
            cut_at_unix_ns: 1,
            volumes: vec![volume],
            batches: chain.count(),
            chain: chain.finish(),
            context: Vec::new(),
            stats: PointStats::default(),
        })
        .unwrap();
    batches.iter().map(|batch| batch.bytes.len()).sum()
}

fn reads(store: &Store, id: GuestId, content: &[u64]) {
    let mut read = vec![0; content.len() * UNIT];
    let replica = store.open_point(id, 1).unwrap();
    replica.read(0, 0, content.len() as u64, &mut read).unwrap();
    let expected: Vec<u8> = content.iter().flat_map(|of| unit(*of)).collect();
    assert!(read == expected);
}

fn learn(site: &Site, told: HashMap<Digest, Place>) {
    let mut index = site.index.lock().unwrap();
    told.into_iter()
        .for_each(|(digest, place)| index.insert(digest, place));
}

#[test]
fn a_guest_made_from_a_stored_image_sends_its_differences_only() {
    let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, _) = open(dir.path());
    let site = Site::new();
    // An ordinary guest comes first: numbers of images are none of its.
    first_copy(&site, &store, 1, &[1, 2, 3]);
    let path = image(images.path(), 1000..3000);
    let progress = ImageProgress::default();
    let added = store.add_image(&path, "debian-12", &progress).unwrap();
    assert_eq!(
        (added.name.as_str(), added.bytes),
        ("debian-12", 2000 * 4096)
    );
    assert_eq!(store.images(), std::slice::from_ref(&added));
    assert!(!store.guests().contains(&added.id), "an image is no guest");
    assert!(store.last_seq() < IMAGE_SEQ);
    assert!(
        ask(&store, &site.key, &[1000]).is_empty(),
        "the key is not known yet"
    );
    store.hint_with(&site.key);
    fill(&store);

    let mut content: Vec<u64> = (1000..3000).collect();
    content.iter_mut().step_by(100).for_each(|of| *of += 50_000);
    let told = ask(&store, &site.key, &content);
    assert!(told.values().all(|place| place.seq() >= IMAGE_SEQ));
    assert!(told.len() >= 1980);
    learn(&site, told);
    let sent = first_copy(&site, &store, 2, &content);
    let whole = first_copy(
        &Site {
            key: site.key.clone(),
            seqs: site.seqs.clone(),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 20))),
        },
        &store,
        3,
        &content,
    );
    assert!(sent * 50 < whole, "{sent} of {whole} bytes");
    reads(&store, GuestId([2; 16]), &content);
    let last = store.last_seq();
    drop(store);

    let (store, report) = open(dir.path());
    assert!(
        report.damaged.is_empty() && report.points == 3,
        "{report:?}"
    );
    assert_eq!((store.images().len(), store.last_seq()), (1, last));
    reads(&store, GuestId([2; 16]), &content);
    // It goes; what the guest's point refers to stays.
    let plan = store
        .plan_prune(&BTreeMap::from([(added.id, BTreeSet::new())]))
        .unwrap();
    store.perform_prune(&plan).unwrap();
    assert!(store.images().is_empty());
    reads(&store, GuestId([2; 16]), &content);
    // And under its name another one can be stored, under other numbers.
    let again = store.add_image(&path, "debian-12", &progress).unwrap();
    assert_ne!(again.id, added.id);
    reads(&store, GuestId([2; 16]), &content);
    reads(&store, again.id, &(1000..3000).collect::<Vec<_>>());
}

#[test]
fn answers_outlive_restarts_losses_and_damage() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new();
    let content: Vec<u64> = (1..1500).collect();
    let (store, _) = open(dir.path());
    store.hint_with(&site.key);
    first_copy(&site, &store, 1, &content);
    let right = ask(&store, &site.key, &content);
    assert_eq!(right.len(), content.len());
    for (digest, place) in &right {
        assert_eq!(site.index.lock().unwrap().get(*digest), Some(*place));
    }
    drop(store);
    let path = dir.path().join("hints");
    let kept = std::fs::read(&path).unwrap();
    assert!(kept.len() < content.len() * 8, "{} bytes", kept.len());
    let damages: [Damage<'_>; 5] = [
        &|_| {},
        &|bytes| bytes.clear(),
        &|bytes| bytes[20] ^= 1,
        &|bytes| bytes.truncate(kept.len() / 3),
        &|bytes| bytes[kept.len() / 2] ^= 0x40,
    ];
    for damage in damages {
        let mut bytes = kept.clone();
        damage(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let (store, _) = open(dir.path());
        store.hint_with(&site.key);
        fill(&store);
        assert!(ask(&store, &site.key, &content) == right);
    }
    // Hints that lie, with good checks, lead to batches that do not hold it: no answer.
    let records = &kept[64..];
    let length = 9 + 6 * usize::from(records[8]);
    let mut lie = kept[..64].to_vec();
    lie.extend_from_slice(&records[..length]);
    let other = prefix(&site.key.of(&unit(9_999)));
    lie[64 + 9..64 + 15].copy_from_slice(&other);
    let check = blake3::hash(&lie[64..]);
    lie.extend_from_slice(&check.as_bytes()[..4]);
    std::fs::write(&path, &lie).unwrap();
    let (store, _) = open(dir.path());
    fill(&store);
    assert!(ask(&store, &site.key, &[9_999]).is_empty());
    drop(store);
    // Another key: nothing of the old one is told under it.
    std::fs::write(&path, &kept).unwrap();
    let (store, _) = open(dir.path());
    let other = DigestKey::new([77; 32]);
    assert!(ask(&store, &other, &content).is_empty());
    store.hint_with(&other);
    fill(&store);
    assert_eq!(ask(&store, &other, &content).len(), content.len());
    assert!(ask(&store, &site.key, &content).is_empty());
}

#[test]
fn what_is_about_to_go_is_not_told() {
    let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, _) = open(dir.path());
    let site = Site::new();
    store.hint_with(&site.key);
    fill(&store);
    let content: Vec<u64> = (1..2000).collect();
    let path = image(images.path(), content.iter().copied());
    let added = store
        .add_image(&path, "x", &ImageProgress::default())
        .unwrap();
    assert_eq!(ask(&store, &site.key, &content).len(), content.len());
    let plan = store
        .plan_prune(&BTreeMap::from([(added.id, BTreeSet::new())]))
        .unwrap();
    let told = ask(&store, &site.key, &content);
    assert!(told.len() < content.len() / 10, "{} are told", told.len());
    assert!(
        told.values()
            .all(|place| plan.retire.binary_search(&place.seq()).is_err())
    );
    store.give_up_prune(&plan);
    assert_eq!(ask(&store, &site.key, &content).len(), content.len());
    let plan = store
        .plan_prune(&BTreeMap::from([(added.id, BTreeSet::new())]))
        .unwrap();
    store.perform_prune(&plan).unwrap();
    let told = ask(&store, &site.key, &content);
    assert!(told.values().all(|place| store.contains(place.seq())));
}

#[test]
fn an_image_that_was_not_finished_is_none() {
    let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = image(images.path(), 1..400);
    {
        let (store, _) = Store::open(
            dir.path(),
            StoreOptions {
                bytes_most: Some(300_000),
                ..common::options()
            },
        )
        .unwrap();
        let failed = store.add_image(&path, "x", &ImageProgress::default());
        assert!(
            matches!(failed, Err(ImageError::Local(LocalError::Store(_)))),
            "{failed:?}"
        );
        assert!(store.images().is_empty() && store.guests().is_empty());
    }
    let (store, _) = open(dir.path());
    assert!(store.images().is_empty() && store.guests().is_empty());
    let before = store.bytes();
    let plan = store.plan_prune(&BTreeMap::new()).unwrap();
    store.perform_prune(&plan).unwrap();
    assert!(before == 0 || store.bytes() < before);
    let added = store
        .add_image(&path, "x", &ImageProgress::default())
        .unwrap();
    reads(&store, added.id, &(1..400).collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_an_image_is_refused_in_words() {
    let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, _) = open(dir.path());
    let progress = ImageProgress::default();
    let path = images.path().join("disk.qcow2");
    let said = |store: &Store, path: &Path, name: &str| {
        let error = store.add_image(path, name, &progress).unwrap_err();
        error.to_string()
    };
    assert!(said(&store, &path, "x").contains("cannot be read"));
    std::fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
    assert!(said(&store, &path, "x").contains("qemu-img convert -O raw"));
    std::fs::write(&path, b"").unwrap();
    assert!(said(&store, &path, "x").contains("0 bytes"));
    std::fs::write(&path, b"abc").unwrap();
    assert!(said(&store, &path, "").contains("another name"));
    assert!(said(&store, &path, "a\nb").contains("another name"));
    let added = store.add_image(&path, "x", &progress).unwrap();
    assert!(said(&store, &path, "x").contains("stored already"));
    let mut read = vec![1; UNIT];
    store
        .open_point(added.id, 1)
        .unwrap()
        .read(0, 0, 1, &mut read)
        .unwrap();
    assert!(read.starts_with(b"abc\0") && read[3..].iter().all(|byte| *byte == 0));
}

/// A source that gives numbers or identities of images is refused.
#[test]
fn a_source_cannot_send_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let site = Site::new();
    let send = |id, first| {
        let seqs = Arc::new(farhaven_storage_sync::codec::Sequence::starting_at(first));
        let mut encoder = Encoder::new(id, 1, seqs, site.index.clone(), 1);
        encoder.unit(0, 0, &unit(5), Digest::UNKNOWN).unwrap();
        store.append(&[encoder.flush().unwrap().bytes])
    };
    assert!(send(GuestId([1; 16]), IMAGE_SEQ + 1).is_err());
    assert!(send(GuestId::random_image(), 1).is_err());
    assert!(send(GuestId([1; 16]), 1).is_ok());
}

/// A reference to an image that is not there costs a seal, not data.
#[test]
fn a_wrong_answer_costs_a_seal() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let site = Site::new();
    let mut guest = Model::new(1, &[8]);
    guest.now[0][3] = 42;
    let lie = HashMap::from([(site.key.of(&unit(42)), Place::new(IMAGE_SEQ + 9, 1))]);
    learn(&site, lie);
    let batches = guest.tell_all(&site, 1);
    let view = BatchView::parse(&batches[0].bytes).unwrap();
    assert!(view.header().images, "an older version refuses it by name");
    send(&site, &store, &batches);
    let refused = store.seal(guest.seal_of(1, 0, &batches)).unwrap_err();
    assert!(matches!(refused, SealError::Dangling { missing, .. } if missing == IMAGE_SEQ + 9));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever was sealed, dropped and pruned: what is told is true.
    #[test]
    fn answers_are_true(seed: u64) {
        use rand::SeedableRng;
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let site = Site::new();
        store.hint_with(&site.key);
        fill(&store);
        let mut guest = Model::new(1, &[40, 300]);
        for point in 1..12 {
            guest.step(&site, &store, point, &mut random).unwrap();
            if point % 4 == 0 {
                let keep = BTreeMap::from([(guest.id, BTreeSet::from([point]))]);
                let plan = store.plan_prune(&keep).unwrap();
                site.index.lock().unwrap().remove_seqs(&plan.retire.iter().copied().collect());
                store.perform_prune(&plan).unwrap();
            }
        }
        let content: Vec<u64> = guest.now.iter().flatten().copied().filter(|of| *of > 0).collect();
        let told = ask(&store, &site.key, &content);
        let distinct: BTreeSet<u64> = content.iter().copied().collect();
        for of in &distinct {
            // Everything that the newest point holds is in the log.
            prop_assert!(told.contains_key(&site.key.of(&unit(*of))), "{}", of);
        }
        // What was told reads as that: a fresh guest of references only.
        learn(&site, told);
        let content: Vec<u64> = distinct.into_iter().collect();
        first_copy(&site, &store, 2, &content);
        reads(&store, GuestId([2; 16]), &content);
    }
}
