//! The codec: what goes in comes out, and no bytes can do harm.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{Site, unit};
use farhaven_storage_sync::codec::{
    Batch, BatchError, BatchView, Chain, Content, Crew, DedupIndex, EncodeError, Encoder,
    EntryReader, Expander, Sequence,
};
use farhaven_storage_sync::limits::{BATCH_BYTES, BATCH_ENTRIES, BATCH_HEADER, VOLUME_UNITS};
use farhaven_storage_sync::unit::{Digest, GuestId, Place, UNIT};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Unit(u16, u64, u64),
    Zeros(u16, u64, u64),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let volume = prop_oneof![Just(0u16), Just(1), Just(900)];
    let at = prop_oneof![0u64..300, Just(VOLUME_UNITS - 400)];
    (volume, at, 0u64..200, 0u8..20, 1u64..100).prop_map(|(volume, at, of, kind, count)| match kind
    {
        0 => Step::Flush,
        1..4 => Step::Zeros(volume, at, count),
        _ => Step::Unit(volume, at, of),
    })
}

/// What the batches say, unit by unit; literals looked up in all of them.
fn decode(batches: &[Batch]) -> BTreeMap<(u16, u64), Vec<u8>> {
    let mut literals = BTreeMap::new();
    let mut units = BTreeMap::new();
    let mut expander = Expander::new();
    let mut chain = Chain::new();
    for batch in batches {
        assert!(batch.bytes.len() <= BATCH_BYTES);
        let view = BatchView::parse(&batch.bytes).unwrap();
        let header = view.header();
        assert_eq!(
            (header.seq, header.hash, header.literals),
            (batch.seq, batch.hash, batch.literals)
        );
        let mut body = Vec::new();
        view.literals(&mut expander, &mut body).unwrap();
        for (index, literal) in body.chunks(UNIT).enumerate() {
            literals.insert(Place::new(batch.seq, index as u8), literal.to_vec());
        }
        let mut described = 0;
        for entry in view.entries() {
            described += entry.count;
            for at in 0..entry.count {
                let bytes = match entry.content {
                    Content::Zeros => vec![0; UNIT],
                    _ => literals[&Place(entry.place(batch.seq).0 + at)].clone(),
                };
                units.insert((entry.volume, entry.unit + at), bytes);
            }
        }
        assert_eq!(described, batch.units);
        chain.push(batch.seq, &batch.hash);
    }
    assert_eq!(chain.count(), batches.len() as u64);
    units
}

fn batch() -> Batch {
    let site = Site::new();
    let mut encoder = Encoder::new(GuestId([3; 16]), 5, site.seqs, site.index, 3);
    for at in 0..20 {
        let bytes = unit(1 + at % 9);
        let full = encoder
            .unit(0, at * 2, &bytes, site.key.of(&bytes))
            .unwrap();
        assert!(full.is_none());
    }
    encoder.zeros(1, 7, 1000).unwrap();
    encoder.flush().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_goes_in_comes_out(
        steps in prop::collection::vec(step(), 0..400), tiny: bool, crew: bool
    ) {
        let site = Site::new();
        let index = Arc::new(Mutex::new(DedupIndex::new(if tiny { 1 } else { 1 << 20 })));
        let mut encoder = Encoder::new(GuestId([3; 16]), 5, site.seqs.clone(), index, 1);
        if crew {
            encoder = encoder.with_crew(Arc::new(Crew::of(2).unwrap()));
        }
        let (mut batches, mut model) = (Vec::new(), BTreeMap::new());
        for step in &steps {
            match *step {
                Step::Unit(volume, at, of) => {
                    encoder.beside(of % 7 != 0);
                    batches.extend(std::iter::from_fn(|| encoder.overdue()));
                    let bytes = unit(of);
                    let digest = if of % 17 == 1 { Digest::UNKNOWN } else { site.key.of(&bytes) };
                    batches.extend(encoder.unit(volume, at, &bytes, digest).unwrap());
                    model.insert((volume, at), bytes);
                }
                Step::Zeros(volume, at, count) => {
                    batches.extend(encoder.zeros(volume, at, count).unwrap());
                    (at..at + count).for_each(|at| { model.insert((volume, at), vec![0; UNIT]); });
                }
                Step::Flush => batches.extend(encoder.flush()),
            }
        }
        batches.extend(std::iter::from_fn(|| encoder.flush()));
        prop_assert!(batches.is_sorted_by_key(|batch| batch.seq));
        prop_assert!(decode(&batches) == model);
    }

    #[test]
    fn a_changed_batch_is_refused(at: prop::sample::Index, flip in 1u8.., cut: prop::sample::Index) {
        let batch = batch();
        let mut bytes = batch.bytes.to_vec();
        prop_assert!(BatchView::parse(&bytes[..cut.index(bytes.len())]).is_err());
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(BatchView::parse(&bytes).is_err());
    }

    /// A peer that hashes its garbage properly: only the rules of the format help.
    #[test]
    fn well_hashed_garbage_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        more in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = batch().bytes.to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.extend(more);
        seal_by_hand(&mut bytes);
        if let Ok(view) = BatchView::parse(&bytes) {
            let header = *view.header();
            for entry in view.entries() {
                prop_assert!(entry.count > 0 && entry.unit + entry.count <= VOLUME_UNITS);
                if let Content::Refs(place) = entry.content {
                    prop_assert!(place.seq() <= header.seq && place != Place::ZERO);
                    prop_assert!(u64::from(place.index()) + entry.count <= 64);
                }
            }
            let mut out = Vec::new();
            if view.literals(&mut Expander::new(), &mut out).is_ok() {
                prop_assert_eq!(out.len(), usize::from(header.literals) * UNIT);
            }
        }
    }

    #[test]
    fn random_bytes_are_no_batch(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(BatchView::parse(&bytes).is_err());
        let mut reader = EntryReader::new(&bytes, 1 << 30);
        let mut read = 0;
        while let Ok(Some(_)) = reader.take() {
            read += 1;
        }
        prop_assert!(read <= bytes.len());
    }
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

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> BatchError {
    let mut bytes = batch().bytes.to_vec();
    change(&mut bytes);
    seal_by_hand(&mut bytes);
    BatchView::parse(&bytes).unwrap_err()
}

#[test]
fn what_a_newer_version_writes_is_refused_by_that_name() {
    let newer = [
        changed(|bytes| bytes[4] = 2),
        changed(|bytes| bytes[6] = 4),
        changed(|bytes| bytes[7] = 2),
        changed(|bytes| bytes[BATCH_HEADER] = 5),
        changed(|bytes| bytes[BATCH_HEADER] |= 0x40),
    ];
    for error in newer {
        assert!(matches!(error, BatchError::Newer { .. }), "{error}");
        assert!(error.to_string().contains("newer version"));
    }
}

#[test]
fn a_body_that_expands_to_more_than_it_says_is_refused() {
    // A frame of 16 MiB of zeros in place of a body of eight units.
    let bomb = zstd::bulk::compress(&vec![0; 16 << 20], 19).unwrap();
    let mut bytes = batch().bytes.to_vec();
    let entries = u32::from_le_bytes(bytes[40..44].try_into().unwrap()) as usize;
    bytes.truncate(BATCH_HEADER + entries);
    bytes[52..56].copy_from_slice(&(bomb.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&bomb);
    seal_by_hand(&mut bytes);
    let view = BatchView::parse(&bytes).unwrap();
    let mut out = Vec::new();
    let error = view.literals(&mut Expander::new(), &mut out).unwrap_err();
    assert!(matches!(error, BatchError::Body { .. }));
    assert!(out.capacity() <= 256 * 1024);
}

#[test]
fn a_crew_makes_the_same_batches_in_the_same_order() {
    let encoded = |crew: Option<Crew>| {
        let site = Site::new();
        let mut encoder = Encoder::new(GuestId([3; 16]), 1, site.seqs, site.index, 3);
        if let Some(crew) = crew {
            encoder = encoder.with_crew(Arc::new(crew));
        }
        let mut batches = Vec::new();
        for at in 0..2000 {
            // Some come again, in the same batch and in one that the crew still has.
            let bytes = unit(1 + if at % 5 == 0 { at / 2 } else { at });
            batches.extend(encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap());
            encoder.level(if at < 1000 { 3 } else { 1 });
            if at == 1500 {
                encoder.alone();
            }
            batches.extend(std::iter::from_fn(|| encoder.overdue()));
        }
        batches.extend(std::iter::from_fn(|| encoder.flush()));
        assert!(encoder.compressing() > std::time::Duration::ZERO);
        batches
    };
    let (alone, crew) = (encoded(None), encoded(Some(Crew::of(3).unwrap())));
    assert!(alone.len() > 20);
    assert_eq!(alone.len(), crew.len());
    for (alone, crew) in alone.iter().zip(&crew) {
        assert_eq!((alone.seq, alone.hash), (crew.seq, crew.hash));
    }
    decode(&crew);
}

#[test]
fn sequential_units_cost_one_entry_and_repeats_no_body() {
    let site = Site::new();
    let mut encoder = Encoder::new(GuestId([3; 16]), 1, site.seqs, site.index.clone(), 3);
    let mut full = None;
    for at in 0..64 {
        assert!(full.is_none());
        let bytes = unit(1 + at);
        full = encoder.unit(0, at, &bytes, site.key.of(&bytes)).unwrap();
    }
    let first = full.unwrap();
    assert_eq!((first.literals, first.units), (64, 64));
    assert_eq!(BatchView::parse(&first.bytes).unwrap().entries().count(), 1);
    assert_eq!(site.index.lock().unwrap().len(), 64);
    for at in 0..64 {
        let bytes = unit(1 + at);
        assert!(
            encoder
                .unit(0, 100 + at, &bytes, site.key.of(&bytes))
                .unwrap()
                .is_none()
        );
    }
    let second = encoder.flush().unwrap();
    assert_eq!((second.literals, second.units), (0, 64));
    assert!(
        second.bytes.len() < BATCH_HEADER + 16,
        "{} bytes",
        second.bytes.len()
    );
    assert!(encoder.flush().is_none());
}

#[test]
fn a_batch_closes_when_its_entries_are_many() {
    let site = Site::new();
    let mut encoder = Encoder::new(GuestId([3; 16]), 1, site.seqs, site.index, 3);
    let mut batches = Vec::new();
    for at in 0..20_000u64 {
        let far = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % VOLUME_UNITS;
        batches.extend(encoder.zeros((at % 1000) as u16, far, 1).unwrap());
    }
    batches.extend(encoder.flush());
    assert!(batches.len() > 4);
    for batch in &batches {
        let view = BatchView::parse(&batch.bytes).unwrap();
        assert!(view.header().entries <= BATCH_ENTRIES);
    }
    assert_eq!(batches.iter().map(|batch| batch.units).sum::<u64>(), 20_000);
}

#[test]
fn a_later_number_of_another_guest_is_not_referred_to() {
    let site = Site::new();
    let mine = GuestId([1; 16]);
    let mut early = Encoder::new(mine, 1, site.seqs.clone(), site.index.clone(), 3);
    assert!(early.zeros(0, 0, 1).unwrap().is_none());
    let mut later = Encoder::new(
        GuestId([2; 16]),
        1,
        site.seqs.clone(),
        site.index.clone(),
        3,
    );
    let bytes = unit(9);
    let digest = site.key.of(&bytes);
    later.unit(0, 0, &bytes, digest).unwrap();
    let theirs = later.flush().unwrap();
    site.index.lock().unwrap().acknowledge(theirs.seq);
    early.unit(0, 1, &bytes, digest).unwrap();
    let batch = early.flush().unwrap();
    assert!(batch.seq < theirs.seq);
    assert_eq!(batch.literals, 1, "it carries the unit itself");
    BatchView::parse(&batch.bytes).unwrap();
}

#[test]
fn what_cannot_be_encoded_is_an_error() {
    let site = Site::new();
    let new = |point, seqs| Encoder::new(GuestId([3; 16]), point, seqs, site.index.clone(), 3);
    let mut encoder = new(1, site.seqs.clone());
    assert!(matches!(
        encoder.unit(0, 0, &[1; 5], Digest::UNKNOWN),
        Err(EncodeError::Length(5))
    ));
    assert!(matches!(
        encoder.zeros(0, VOLUME_UNITS, 1),
        Err(EncodeError::Range { .. })
    ));
    assert!(matches!(
        encoder.zeros(0, u64::MAX, 2),
        Err(EncodeError::Range { .. })
    ));
    assert!(matches!(
        encoder.zeros(1024, 0, 1),
        Err(EncodeError::Range { .. })
    ));
    assert!(encoder.zeros(0, 0, 0).unwrap().is_none());
    assert!(encoder.flush().is_none());
    assert!(matches!(
        new(0, site.seqs.clone()).zeros(0, 0, 1),
        Err(EncodeError::Numbers)
    ));
    let used_up = Arc::new(Sequence::starting_at(u64::MAX));
    assert!(matches!(
        new(1, used_up).zeros(0, 0, 1),
        Err(EncodeError::Numbers)
    ));
}
