//! What the plain tests of a crate do with its fuzz targets: every seed, every input that
//! was kept because it broke something, arbitrary bytes, and seeds that were changed.
//!
//! Shared by path, as the crates share no other: `wan`, `storage-sync`, `policies` and
//! `farhaven` each name it in their `fuzzing` module.

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

/// Its name, what takes the bytes, and valid inputs.
pub(crate) type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// One change of an input.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    /// A number that often stands at a limit, so many bytes wide.
    Number(Index, u64, usize),
    Cut(Index),
    Remove(Index, Index),
    Repeat(Index, Index),
    Insert(Index, Vec<u8>),
    /// The end of another seed.
    Graft(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = || any::<Index>();
    let number = prop_oneof![
        any::<u64>(),
        (0u32..64, any::<bool>()).prop_map(|(bit, below)| (1u64 << bit) - u64::from(below)),
        Just(u64::MAX),
    ];
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, with)| Change::Flip(at, with)),
        2 => (index(), number, 1usize..=8).prop_map(|(at, of, wide)| Change::Number(at, of, wide)),
        1 => index().prop_map(Change::Cut),
        1 => (index(), index()).prop_map(|(from, to)| Change::Remove(from, to)),
        1 => (index(), index()).prop_map(|(from, to)| Change::Repeat(from, to)),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, new)| Change::Insert(at, new)),
        1 => (index(), index(), index()).prop_map(|(at, of, from)| Change::Graft(at, of, from)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change, seeds: &[Vec<u8>]) {
    if bytes.is_empty() {
        return;
    }
    let length = bytes.len();
    let span = |one: &Index, other: &Index| {
        let (one, other) = (one.index(length), other.index(length));
        one.min(other)..one.max(other)
    };
    match change {
        Change::Flip(at, with) => bytes[at.index(length)] ^= with,
        Change::Number(at, of, wide) => {
            let at = at.index(length);
            let end = length.min(at + wide);
            bytes[at..end].copy_from_slice(&of.to_le_bytes()[..end - at]);
        }
        Change::Cut(at) => bytes.truncate(at.index(length)),
        Change::Remove(from, to) => drop(bytes.drain(span(from, to))),
        Change::Repeat(from, to) => {
            let again = bytes[span(from, to)].to_vec();
            bytes.extend(again);
        }
        Change::Insert(at, new) => {
            let at = at.index(length);
            bytes.splice(at..at, new.iter().copied());
        }
        Change::Graft(at, of, from) => {
            let other = of.get(seeds);
            bytes.truncate(at.index(length));
            if !other.is_empty() {
                bytes.extend_from_slice(&other[from.index(other.len())..]);
            }
        }
    }
}

/// Runs every target over all of it, `cases` changed inputs each. `fuzz` is the
/// directory of that name.
pub(crate) fn all(targets: &[Target], fuzz: &Path, cases: u32) {
    for (name, run, seeds) in targets {
        let seeds = seeds();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        run(&[]);
        seeds.iter().for_each(|seed| run(seed));
        let mut kept: Vec<_> = std::fs::read_dir(fuzz.join("kept").join(name))
            .into_iter()
            .flatten()
            .map(|entry| entry.expect("a directory that can be read").path())
            .collect();
        kept.sort();
        for path in kept {
            println!("{}", path.display());
            run(&std::fs::read(path).expect("a file that can be read"));
        }
        let mut runner = TestRunner::new(Config {
            cases,
            failure_persistence: None,
            ..Config::default()
        });
        let arbitrary = prop::collection::vec(any::<u8>(), 0..400);
        let changed =
            (any::<Index>(), prop::collection::vec(change(), 1..8)).prop_map(|(which, changes)| {
                let mut bytes = which.get(&seeds).clone();
                changes
                    .iter()
                    .for_each(|change| apply(&mut bytes, change, &seeds));
                bytes
            });
        let inputs = prop_oneof![1 => arbitrary, 4 => changed];
        if let Err(error) = runner.run(&inputs, |bytes| {
            run(&bytes);
            Ok(())
        }) {
            panic!("{name}: {error}");
        }
    }
}
