//! What does not fit together is refused, and by a name that helps.

use farhaven_storage_sync::codec::{Batch, BatchError, BatchView, Body, Expander, Slot};
use farhaven_storage_sync::limits::BATCH_HEADER;
use farhaven_storage_sync::replica::ReplicaError;
use farhaven_storage_sync::store::SealError;
use farhaven_storage_sync::unit::{Digest, UNIT};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::BTreeSet;

use crate::common::open;
use crate::guest::{Guest, Source, append, noise, two};

#[test]
fn a_base_that_the_peer_does_not_have_is_named_by_the_seal() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, guest, batches) = two(&store);
    let other = tempfile::tempdir().unwrap();
    let (empty, _) = open(other.path());
    append(&empty, &batches[1..]);
    let seal = guest.seal_of(&empty, 2, &batches[1..]);
    let error = empty.seal(seal.clone()).unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 2, missing: 1 }),
        "{error}"
    );
    // And is taken once the base arrived.
    append(&empty, &batches[..1]);
    empty.seal(seal).unwrap();
}

#[test]
fn a_base_with_other_content_is_refused_and_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, guest, batches) = two(&store);
    let other = tempfile::tempdir().unwrap();
    let (wrong, _) = open(other.path());
    // Batch 1 with the content of another guest.
    let source = Source::starting_at(1, 0);
    let mut stranger = Guest::new(2, &[70]);
    let mut random = StdRng::seed_from_u64(99);
    (0..10).for_each(|unit| stranger.set(0, unit, noise(&mut random)));
    append(&wrong, &stranger.encode(&source, 1));
    append(&wrong, &batches[1..]);
    let error = wrong
        .seal(guest.seal_of(&wrong, 2, &batches[1..]))
        .unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 2, missing: 1 }),
        "{error}"
    );
    // A source that lost its index gets no digest for what cannot be rebuilt.
    let page = wrong.live_digests(&source.key, 2, 1);
    assert_eq!(page.batches, [(2, vec![Digest::UNKNOWN; 10])]);
}

#[test]
fn a_difference_from_a_difference_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, mut guest, batches) = two(&store);
    append(&store, &batches[1..]);
    store.seal(guest.seal_of(&store, 2, &batches[1..])).unwrap();
    guest.was_sealed(2);
    // A forged batch 3 that is batch 2 but for its number, so that its bases,
    // counted from its own number, are the differences of batch 2.
    let mut bytes = batches[1].bytes.to_vec();
    bytes[8..16].copy_from_slice(&3u64.to_le_bytes());
    bytes[32..40].copy_from_slice(&3u64.to_le_bytes());
    seal_by_hand(&mut bytes);
    let hash = *BatchView::parse(&bytes).unwrap().header();
    let forged = Batch {
        seq: 3,
        bytes: bytes.into(),
        hash: hash.hash,
        point: 3,
        ..batches[1].clone()
    };
    let forged = [forged];
    append(&store, &forged);
    let error = store.seal(guest.seal_of(&store, 3, &forged)).unwrap_err();
    assert!(
        matches!(error, SealError::Dangling { seq: 3, missing: 2 }),
        "{error}"
    );
    guest.check(&store);
}

/// Puts both hashes right after the bytes were changed.
fn seal_by_hand(bytes: &mut [u8]) {
    let entries = u32::from_le_bytes(bytes[40..44].try_into().unwrap()) as usize;
    let Some(end) = BATCH_HEADER
        .checked_add(entries)
        .filter(|&end| end <= bytes.len())
    else {
        return;
    };
    let body = blake3::hash(&bytes[end..]);
    bytes[56..88].copy_from_slice(body.as_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&bytes[..88])
        .update(&bytes[BATCH_HEADER..end]);
    bytes[88..120].copy_from_slice(hasher.finalize().as_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    /// A peer that hashes its garbage properly: only the rules help.
    #[test]
    fn well_hashed_garbage_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        in_entries: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let (_, guest, batches) = two(&store);
        let mut bytes = batches[1].bytes.to_vec();
        for (at, value) in changes {
            let end = if in_entries { 250.min(bytes.len()) } else { bytes.len() };
            let from = if in_entries { BATCH_HEADER } else { 6 };
            let at = from + at.index(end - from);
            bytes[at] = value;
        }
        seal_by_hand(&mut bytes);
        if let Ok(view) = BatchView::parse(&bytes) {
            let header = *view.header();
            let mut body = Body::new();
            if view.expand(&mut Expander::new(), &mut body).is_ok() {
                prop_assert_eq!(body.len(), usize::from(header.literals));
                for index in 0..header.literals {
                    if let Slot::Difference(delta, bytes) = body.slot(index).unwrap() {
                        prop_assert!(delta.base.seq() > 0 && delta.base.seq() < header.seq);
                        prop_assert_eq!(usize::from(delta.length), bytes.len());
                    }
                }
            }
            let forged = [Batch { seq: header.seq, bytes: bytes.into(), hash: header.hash, ..batches[1].clone() }];
            let taken = store.append(std::slice::from_ref(&forged[0].bytes)).is_ok();
            if taken && store.seal(guest.seal_of(&store, 2, &forged)).is_ok() {
                let replica = store.open_point(guest.id, 2).unwrap();
                let mut out = vec![0; 70 * UNIT];
                replica.read(0, 0, 70, &mut out).unwrap();
                replica.fill(0, |_, _| {}).unwrap();
            }
        }
    }
}

#[test]
fn the_flag_and_the_entries_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (_, _, batches) = two(&store);
    for batch in &batches {
        let mut bytes = batch.bytes.to_vec();
        bytes[6] ^= 1;
        seal_by_hand(&mut bytes);
        let error = BatchView::parse(&bytes).unwrap_err();
        assert!(matches!(error, BatchError::Invalid(_)), "{error}");
    }
}

#[test]
fn a_base_that_rots_on_disk_is_an_error_and_never_data() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (source, mut guest, _) = two(&store);
    source.forget(&BTreeSet::from([2]));
    guest.step(&source, &store, 3);
    drop(store);
    let segment = dir.path().join("segments/00000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[BATCH_HEADER + 5000] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    // The last segment is verified when it is opened: the batch is lost.
    let (store, report) = open(dir.path());
    assert_eq!(report.log.bad.len(), 1);
    assert_eq!(report.damaged.len(), 2, "both points need batch 1");
    assert!(matches!(
        store.open_point(guest.id, 3).unwrap_err(),
        ReplicaError::NoPoint { .. }
    ));
    let page = store.live_digests(&source.key, 2, 9);
    assert!(
        page.batches
            .iter()
            .flat_map(|(_, all)| all)
            .all(|d| *d == Digest::UNKNOWN)
    );
}
