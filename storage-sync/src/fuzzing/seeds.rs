//! Valid inputs to begin with, small, made by the code that writes them.

use std::sync::OnceLock;

use crate::catalogue;
use crate::codec::{BatchHeader, Codec, Content, Delta, Entry, EntryWriter, delta, lay_out};
use crate::limits::{BATCH_HEADER, IMAGE_SEQ};
use crate::manifest::{self, PointHeader, PointStats};
use crate::map::Run;
use crate::unit::{Place, UNIT, Volume, VolumeKind};

use super::GUEST;

/// A batch of these entries, with what they need in its body.
fn made(seq: u64, entries: &[Entry], body: &[u8]) -> Vec<u8> {
    let mut writer = EntryWriter::new(seq);
    entries.iter().for_each(|entry| writer.push(*entry));
    let (count, told) = writer.finish();
    let slots = entries.iter().map(|entry| match entry.content {
        Content::Literals(_) | Content::Delta(_) => entry.count as u8,
        Content::Zeros | Content::Refs(_) => 0,
    });
    let packed = zstd::bulk::compress(body, 3).expect("memory to memory");
    let (codec, stored) = match packed.len() < body.len() {
        true => (Codec::Zstd, &packed[..]),
        false => (Codec::Raw, body),
    };
    let header = BatchHeader {
        seq,
        guest: GUEST,
        point: 1,
        entries_bytes: told.len(),
        entries: count,
        literals: slots.sum(),
        deltas: entries
            .iter()
            .any(|entry| matches!(entry.content, Content::Delta(_))),
        images: entries.iter().any(|entry| entry.of_image(seq)),
        body_raw: body.len(),
        codec,
        body_stored: stored.len(),
        body_hash: [0; 32],
        hash: [0; 32],
    };
    lay_out(header, &told, stored).0.to_vec()
}

fn entry(volume: u16, unit: u64, count: u64, content: Content) -> Entry {
    Entry {
        volume,
        unit,
        count,
        content,
    }
}

/// One unit that compresses to little, and what it becomes by a small change.
fn pair() -> ([u8; UNIT], [u8; UNIT], Vec<u8>) {
    let base = [0x5a; UNIT];
    let mut unit = base;
    unit[100..108].copy_from_slice(b"changed!");
    let mut told = Vec::new();
    delta::diff(&base, &unit, &mut told).expect("a short difference");
    (base, unit, told)
}

/// A batch of each kind; the later ones build on the earlier ones.
fn of_each_kind() -> Vec<Vec<u8>> {
    let (base, unit, told) = pair();
    let change = |index, of, unit: &[u8; UNIT], told: &[u8]| {
        Content::Delta(Delta {
            index,
            base: of,
            length: told.len() as u16,
            check: delta::check_of(unit),
        })
    };
    let literals = [base, [1; UNIT]].concat();
    vec![
        made(
            1,
            &[
                entry(0, 0, 1000, Content::Zeros),
                entry(0, 5, 2, Content::Literals(0)),
                entry(1, 1 << 20, 1, Content::Refs(Place::new(1, 1))),
            ],
            &literals,
        ),
        made(2, &[entry(1, 0, 2, Content::Refs(Place::new(1, 0)))], &[]),
        made(
            3,
            &[
                entry(0, 9, 1, Content::Literals(0)),
                entry(0, 10, 1, change(1, Place::new(1, 0), &unit, &told)),
                entry(1, 4, 1, Content::Refs(Place::new(3, 1))),
            ],
            &[&[2; UNIT][..], &told].concat(),
        ),
        made(
            4,
            &[entry(0, 0, 1, change(0, Place::new(1, 0), &unit, &told))],
            &told,
        ),
    ]
}

pub(super) fn batches() -> Vec<Vec<u8>> {
    let mut batches = of_each_kind();
    let image = entry(0, 3, 1, Content::Refs(Place::new(IMAGE_SEQ + 7, 2)));
    batches.push(made(5, &[image], &[]));
    batches
}

pub(super) fn entries() -> Vec<Vec<u8>> {
    let of = |batch: &Vec<u8>| {
        let length = u32::from_le_bytes([batch[40], batch[41], batch[42], batch[43]]) as usize;
        [&[3], &batch[BATCH_HEADER..BATCH_HEADER + length]].concat()
    };
    let mut seeds: Vec<_> = batches().iter().map(of).collect();
    seeds.push([&[3][..], &pair().2].concat());
    seeds
}

pub(super) fn segments() -> Vec<Vec<u8>> {
    let batches = of_each_kind();
    vec![
        batches.concat(),
        // Begins with no batch: the targets make two segments of it.
        [b"torn".to_vec(), batches.concat()].concat(),
        batches[..2].concat(),
    ]
}

/// A manifest of [`GUEST`]'s point 9.
pub(super) fn a_manifest() -> &'static [u8] {
    static MADE: OnceLock<Vec<u8>> = OnceLock::new();
    MADE.get_or_init(|| manifests().swap_remove(0))
}

pub(super) fn manifests() -> Vec<Vec<u8>> {
    let header = PointHeader {
        guest: GUEST,
        point: 9,
        parent: 8,
        cut_at_unix_ns: 1,
        sealed_at_unix_ns: 2,
        volumes: vec![Volume {
            name: "ram".to_owned(),
            kind: VolumeKind::Ram,
            bytes: 1 << 30,
        }],
        batches: 3,
        chain: [5; 32],
        stored_bytes: 4,
        changed_units: 5,
        stats: PointStats::default(),
    };
    let run = |volume, unit, count, place| Run {
        volume,
        unit,
        count,
        place,
    };
    let runs = [
        run(0, 3, 2, Place::new(7, 1)),
        run(0, 900, 500, Place::ZERO),
        run(1, 1 << 30, 64, Place::new(8, 0)),
        run(3, 0, 1, Place::new(2, 60)),
    ];
    let made =
        |base, runs: &[Run]| manifest::encode(&header, base, b"definition", runs.iter().copied());
    // The first needs nothing that is not there.
    vec![made(0, &runs[1..2]), made(0, &runs), made(8, &runs)]
}

pub(super) fn journals() -> Vec<Vec<u8>> {
    let rows = [
        (&b"\x02west"[..], Some(&br#"{"site":"west"}"#[..])),
        (b"\x03guest", Some(b"{}")),
        (b"\x02west", None),
        (b"\x05a", Some(b"[1,2,3]")),
    ];
    vec![
        catalogue::fuzzing::journal_of(&rows),
        catalogue::fuzzing::journal_of(&rows[..2]),
    ]
}

pub(super) fn notes() -> Vec<Vec<u8>> {
    let kept = [&b"FHkp\x01\0\x06\0golden"[..], &[0; 16]].concat();
    let mut hints = [&b"FHhn\x01\0\0\0"[..], &[3; 32], &[0; 24]].concat();
    for (seq, slots) in [(1u64, 2usize), (7, 0), (9, 3)] {
        hints.extend_from_slice(&seq.to_le_bytes());
        hints.push(slots as u8);
        hints.extend_from_slice(&[0x21; 6].repeat(slots));
        hints.extend_from_slice(&[0; 4]);
    }
    [kept, hints]
        .iter()
        .map(|note| super::fit::notes(note))
        .collect()
}
