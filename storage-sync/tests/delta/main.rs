//! Differences: whatever happens to acknowledgements, points and batches in
//! between, what was sealed restores bit for bit, and what does not fit
//! together is refused.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod refused;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use common::open;
use farhaven_storage_sync::codec::{BatchView, Content};
use farhaven_storage_sync::limits::BATCH_HEADER;
use farhaven_storage_sync::unit::{GuestId, Place, UNIT};
use guest::{Guest, Source, Unit, append, noise, two};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_history_restores_bit_for_bit(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = open(dir.path());
        let bytes = [0, 64 * 1024, 4 << 20][random.random_range(0..3)];
        let mut source = Source::starting_at(1, bytes);
        let mut guests = [Guest::new(1, &[90, 40]), Guest::new(2, &[60])];
        let mut deltas = 0u64;
        for point in 1..random.random_range(8..30) {
            let guest = &mut guests[random.random_range(0..2)];
            guest.change(&mut random);
            let batches = guest.encode(&source, point);
            deltas += batches.iter().map(|batch| u64::from(batch.deltas)).sum::<u64>();
            match random.random_range(0..8) {
                // The link is lost before all arrived: the point is given up.
                0 => {
                    let arrived = random.random_range(0..=batches.len());
                    append(&store, &batches[..arrived]);
                    batches[..arrived].iter().for_each(|batch| {
                        if random.random() { source.acknowledge(batch.seq) }
                    });
                    source.forget(&batches[arrived..].iter().map(|batch| batch.seq).collect());
                    store.abandon(guest.id);
                }
                // Acknowledgements are lost, or late.
                1 => {
                    append(&store, &batches);
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                    batches.iter().for_each(|batch| {
                        if random.random() { source.acknowledge(batch.seq) }
                    });
                }
                // The peer restarts between append and seal.
                2 => {
                    append(&store, &batches);
                    drop(store);
                    let (again, report) = open(dir.path());
                    prop_assert!(report.damaged.is_empty() && report.log.bad.is_empty());
                    store = again;
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                    batches.iter().for_each(|batch| source.acknowledge(batch.seq));
                }
                // The source restarts.
                3 => {
                    append(&store, &batches);
                    store.abandon(guest.id);
                    source = Source::restarted(&store, bytes);
                }
                _ => {
                    append(&store, &batches);
                    batches.iter().for_each(|batch| source.acknowledge(batch.seq));
                    store.seal(guest.seal_of(&store, point, &batches)).unwrap();
                    guest.was_sealed(point);
                }
            }
            if random.random_range(0..4) == 0 {
                let mut keep = BTreeMap::new();
                for guest in &mut guests {
                    let newest = guest.sealed.keys().last().copied();
                    guest.sealed.retain(|&at, _| Some(at) == newest || random.random_range(0..4) == 0);
                    if !guest.sealed.is_empty() {
                        keep.insert(guest.id, guest.sealed.keys().copied().collect());
                    }
                }
                let plan = store.plan_prune(&keep).unwrap();
                source.forget(&plan.retire.iter().copied().collect());
                let report = store.perform_prune(&plan).unwrap();
                prop_assert_eq!(report.revived, 0);
                for seq in &plan.retire {
                    prop_assert_eq!(store.contains(*seq), plan.stay.contains(seq));
                }
            }
            if random.random_range(0..4) == 0 {
                guests.iter().for_each(|guest| guest.check(&store));
            }
        }
        prop_assert!(deltas > 0 || bytes == 0);
        guests.iter().for_each(|guest| guest.check(&store));
        drop(store);
        let (store, report) = open(dir.path());
        prop_assert!(report.damaged.is_empty(), "{:?}", report);
        guests.iter().for_each(|guest| guest.check(&store));
    }
}

#[test]
fn ten_changed_bytes_cost_a_few_bytes_each() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let (source, mut guest, batches) = two(&store);
    let [_, second] = &batches[..] else {
        panic!("{} batches", batches.len());
    };
    assert_eq!((second.literals, second.deltas), (10, 10));
    assert!(
        second.bytes.len() < BATCH_HEADER + 10 * 20,
        "{}",
        second.bytes.len()
    );
    source.forget(&BTreeSet::from([2]));
    guest.step(&source, &store, 3);
    guest.check(&store);
    // Units of text that are rewritten go whole: they compress to less.
    let plain = (0..64).map(|unit| {
        let mut bytes = [b' '; UNIT];
        bytes[..8].copy_from_slice(&u64::to_le_bytes(unit));
        bytes
    });
    plain
        .enumerate()
        .for_each(|(unit, bytes)| guest.set(0, unit, bytes));
    guest.step(&source, &store, 4);
    for unit in 0..64 {
        let fill = [b'a' + (unit % 16) as u8; 1500];
        let mut bytes = guest.now[0][unit];
        bytes[200..1700].copy_from_slice(&fill);
        guest.set(0, unit, bytes);
    }
    let batches = guest.step(&source, &store, 5);
    assert!(batches.iter().all(|batch| batch.deltas == 0));
    guest.check(&store);
}

#[test]
fn differences_never_make_a_batch_larger() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let (with, without) = (Source::starting_at(1, 4 << 20), Source::starting_at(1, 0));
        let mut random = StdRng::seed_from_u64(seed);
        let mut guest = Guest::new(1, &[64]);
        // Records of half text, half noise, alike or not, rewritten in part.
        let record = noise(&mut random);
        for unit in 0..64 {
            let mut bytes = [b'x'; UNIT];
            let of = if seed % 2 == 0 {
                record
            } else {
                noise(&mut random)
            };
            bytes[..2048].copy_from_slice(&of[..2048]);
            bytes[4000] = unit as u8;
            guest.set(0, unit, bytes);
        }
        guest.encode(&without, 1);
        guest.step(&with, &store, 1);
        for unit in 0..64 {
            let mut bytes = guest.now[0][unit];
            let count = 1 << (seed % 12);
            let new = noise(&mut random);
            bytes[1000..1000 + count].copy_from_slice(&new[..count]);
            guest.set(0, unit, bytes);
        }
        let plain: usize = guest
            .encode(&without, 2)
            .iter()
            .map(|batch| batch.bytes.len())
            .sum();
        let ours: usize = guest
            .encode(&with, 2)
            .iter()
            .map(|batch| batch.bytes.len())
            .sum();
        assert!(
            ours <= plain,
            "{ours} bytes with differences, {plain} without"
        );
        // Where units are alike, the group's own compression does nearly as well.
        let small = seed % 2 == 1 && seed < 7;
        assert!(
            !small || ours * 10 < plain,
            "seed {seed}: {ours} of {plain} bytes"
        );
    }
}

#[test]
fn a_difference_keeps_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    // The golden batches: noise that blake3 makes, so that it never changes.
    let unit = |seed: u32| -> Unit {
        let mut bytes = [0; UNIT];
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    };
    let source = Source::starting_at(1000, 1 << 20);
    let mut guest = Guest {
        id: GuestId(*b"golden guest 001"),
        ..Guest::new(1, &[70, 20])
    };
    for at in 0..4u32 {
        guest.set(0, at as usize, unit(at));
    }
    guest.set(1, 7, unit(7));
    let first = guest.step(&source, &store, 300);
    for (volume, at) in [(0, 0), (0, 2), (0, 3), (1, 7)] {
        let mut bytes = guest.now[volume][at];
        bytes[at * 100..at * 100 + 8].copy_from_slice(b"farhaven");
        bytes[UNIT - 1] ^= 0xff;
        guest.set(volume, at, bytes);
    }
    guest.set(0, 9, unit(9));
    guest.set(0, 10, guest.now[0][2]);
    let second = guest.step(&source, &store, 301);
    guest.check(&store);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/delta-1.bin");
    let written = [&first[0].bytes[..], &second[0].bytes].concat();
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        std::fs::write(&path, &written).unwrap();
    }
    let kept = std::fs::read(&path).unwrap();
    assert!(
        kept == written,
        "this version writes other bytes than the golden file has"
    );
    // What the file says is read back, not what the encoder had in mind.
    let view = BatchView::parse(&kept[first[0].bytes.len()..]).unwrap();
    let deltas: Vec<_> = view
        .entries()
        .filter_map(|entry| match entry.content {
            Content::Delta(delta) => Some((entry.volume, entry.unit, delta.index, delta.base)),
            _ => None,
        })
        .collect();
    let base = |index| Place::new(1000, index);
    let expected = [
        (0, 0, 0, base(0)),
        (0, 2, 1, base(2)),
        (0, 3, 2, base(3)),
        (1, 7, 4, base(4)),
    ];
    assert_eq!(deltas, expected);
}
