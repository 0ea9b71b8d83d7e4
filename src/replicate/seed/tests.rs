//! A seed comes back as it was written, or is refused: cut anywhere, changed
//! anywhere, made of anything.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use farhaven_policies::policy::Retention;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, GuestId, UNIT, Volume, VolumeKind};
use proptest::prelude::*;

use super::cipher::Encrypting;
use super::*;
use crate::activate::fence::Term;
use crate::guest::{Definition, Sink, SinkError, embedded};
use crate::replicate::message::{CommitTerms, PointContext, SealRequest};
use crate::replicate::outlet::Outlet;

const GUEST: GuestId = GuestId([7; 16]);
const NAME: &str = "treasury";

/// A key for a name, of which the first letter counts: 52 digits of base 32.
fn site(of: &str) -> SiteKey {
    let first = match of {
        "east" => 'b',
        _ => 'c',
    };
    format!("{first}{}", "0".repeat(51)).parse().unwrap()
}

fn about() -> SeedAbout {
    let definition = Definition::Embedded(embedded::Definition {
        kind: "sim".to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), 1 << 20)],
        disks: Vec::new(),
        config: vec![1, 2, 3],
    });
    let ram = Volume {
        name: "ram".to_owned(),
        kind: VolumeKind::Ram,
        bytes: 1 << 20,
    };
    SeedAbout {
        source: site("east"),
        target: site("west"),
        opening: Opening {
            guest: GUEST,
            name: NAME.to_owned(),
            source: "east".to_owned(),
            definition,
            volumes: vec![ram],
            term: Term {
                group: GUEST,
                number: 1,
                owner: site("east"),
            },
            warm: true,
            retention: Retention::default(),
            rpo_ms: None,
            commit: CommitTerms::default(),
            schedule: None,
        },
        point: 5,
        first: 100,
        last: 10_000,
    }
}

fn seal(about: &SeedAbout, shipped: u64, chain: [u8; 32]) -> SealRequest {
    let opening = &about.opening;
    SealRequest {
        guest: opening.guest,
        point: about.point,
        parent: 0,
        cut_at: 1,
        volumes: opening.volumes.clone(),
        batches: shipped,
        chain,
        context: PointContext {
            name: opening.name.clone(),
            source: opening.source.clone(),
            term: 1,
            definition: opening.definition.clone(),
            pause: Duration::ZERO,
            ram_scan: Duration::ZERO,
            ram_scanned_bytes: 0,
            changed_bytes: 0,
            sent_bytes: 0,
            base: false,
            group: None,
            quiesced: None,
        },
        activate: None,
    }
}

/// Content that does not compress, so that a few units make more than a chunk.
fn noise(units: usize) -> Vec<u8> {
    let mut bytes = vec![0; units * UNIT];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A seed of so many units of noise, and its key.
fn seed_of(units: usize, about: &SeedAbout) -> (Vec<u8>, SeedKey) {
    let (key, digests) = (SeedKey::random(), DigestKey::new([3; 32]));
    let header = SeedHeader::new([9; 16], &about.target);
    let writer = SeedWriter::begin(Vec::new(), &header, &key, about).unwrap();
    let progress = Arc::default();
    let mut shipment = SeedShipment::begin(writer, about, digests.clone(), 1 << 20, progress);
    let bytes = noise(units);
    let mut of = Vec::new();
    digests.digests(&bytes, &mut of);
    shipment.units(0, 0, &bytes, &of).unwrap();
    shipment.zeros(0, units as u64, 3).unwrap();
    shipment.flush().unwrap();
    let (shipped, chain) = shipment.sum();
    let sealed = seal(about, shipped.batches, chain);
    let (file, written) = shipment.finish(&sealed).unwrap();
    assert_eq!(file.len() as u64, written);
    (file, key)
}

/// Reads all of it: how many batches, and its seal.
fn read(mut file: &[u8], key: &SeedKey) -> Result<(usize, SealRequest), SeedError> {
    let header = SeedHeader::read(&mut file)?;
    let mut reader = SeedReader::begin(file, &header, key)?;
    for batches in 0.. {
        match reader.next_record()? {
            SeedRecord::Batch(_) => {}
            SeedRecord::Seal(seal) => return Ok((batches, *seal)),
        }
    }
    unreachable!("a file has an end")
}

#[test]
fn a_seed_comes_back_as_it_was_written_and_tells_nothing_in_the_clear() {
    let about = about();
    for units in [1, 64, 250, 256, 700] {
        let (file, key) = seed_of(units, &about);
        let (batches, seal) = read(&file, &key).unwrap();
        assert_eq!(batches as u64, seal.batches);
        assert!(batches >= units / 64);
        let clear = |words: &[u8]| file.windows(words.len()).any(|w| w == words);
        assert!(!clear(NAME.as_bytes()) && !clear(b"east") && !clear(&GUEST.0));
        assert!(!clear(&noise(1)[..32]) && !clear(b"FHbt"));
        assert!(!clear(about.target.as_bytes()));
    }
    let (file, _) = seed_of(1, &about);
    let header = SeedHeader::read(&mut &file[..]).unwrap();
    assert!(header.is_for(&site("west")) && !header.is_for(&site("east")));
}

/// Chunks of every length up to two, so that the last is empty, full, or between.
#[test]
fn chunks_end_anywhere() {
    let (key, header) = (SeedKey::random(), SeedHeader::new([1; 16], &site("west")));
    for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK] {
        let bytes = noise(length.div_ceil(UNIT))[..length].to_vec();
        let mut stream = Encrypting::begin(Vec::new(), &header, &key).unwrap();
        bytes
            .chunks(70_001)
            .for_each(|piece| stream.write(piece).unwrap());
        let (file, _) = stream.finish().unwrap();
        let mut back = vec![0; length];
        let mut reader = super::cipher::Decrypting::begin(&file[HEADER..], &header, &key);
        assert!(reader.fill(&mut back).unwrap());
        assert!(back == bytes, "{length}");
        reader.end().unwrap();
    }
}

#[test]
fn cut_anywhere_it_is_refused() {
    let (file, key) = seed_of(1, &about());
    for length in 0..file.len() {
        assert!(read(&file[..length], &key).is_err(), "{length} bytes");
    }
    // At the very edges of chunks, too.
    let (file, key) = seed_of(700, &about());
    for edge in [HEADER, HEADER + CHUNK + 16, HEADER + 2 * (CHUNK + 16)] {
        for length in edge - 1..=edge + 1 {
            let error = read(&file[..length], &key).unwrap_err();
            let named = matches!(error, SeedError::Damaged { at } if at as usize <= length);
            assert!(named || length < HEADER, "{length}: {error}");
        }
    }
}

#[test]
fn any_changed_byte_is_refused_and_named() {
    let (mut file, key) = seed_of(1, &about());
    for at in 0..file.len() {
        file[at] ^= 0x40;
        let error = read(&file, &key).expect_err("a changed byte");
        let in_stream = matches!(error, SeedError::Damaged { at } if at == HEADER as u64);
        assert!(at < HEADER || in_stream, "byte {at}: {error}");
        file[at] ^= 0x40;
    }
    assert!(read(&file, &key).is_ok());
}

#[test]
fn chunks_cannot_be_swapped_doubled_or_left_out() {
    let (file, key) = seed_of(700, &about());
    let (header, stream) = file.split_at(HEADER);
    let chunks: Vec<&[u8]> = stream.chunks(CHUNK + 16).collect();
    assert!(chunks.len() >= 3);
    for order in [
        vec![1, 0, 2],
        vec![0, 0, 1, 2],
        vec![0, 2],
        vec![0, 1],
        vec![2],
    ] {
        let mut other = header.to_vec();
        order
            .iter()
            .for_each(|&chunk| other.extend_from_slice(chunks[chunk]));
        let error = read(&other, &key).unwrap_err();
        assert!(
            matches!(error, SeedError::Damaged { .. }),
            "{order:?}: {error}"
        );
    }
    let longer = [&file[..], &[0]].concat();
    assert!(matches!(
        read(&longer, &key),
        Err(SeedError::Damaged { .. })
    ));
    // Of another seed of the very same.
    let (other, _) = seed_of(700, &about());
    let mixed = [header, &other[HEADER..]].concat();
    assert!(matches!(
        read(&mixed, &key),
        Err(SeedError::Damaged { at: 64 })
    ));
}

#[test]
fn each_wrong_file_has_its_own_words() {
    let (file, key) = seed_of(1, &about());
    let words = |change: &dyn Fn(&mut Vec<u8>), key: &SeedKey| {
        let mut file = file.clone();
        change(&mut file);
        read(&file, key).unwrap_err().to_string()
    };
    assert!(words(&|f| f[0] = b'X', &key).contains("not a seed"));
    assert!(words(&|f| f.truncate(20), &key).contains("not a seed"));
    assert!(words(&|f| f[6] = 2, &key).contains("upgrade this site"));
    assert!(words(&|f| f[6] = 0, &key).contains("not a seed"));
    assert!(words(&|_| {}, &SeedKey::random()).contains("at byte 64"));
}

/// Only a batch of its guest, point and range is taken, in order.
#[test]
fn batches_that_are_not_its_own_are_refused() {
    let theirs = |change: &dyn Fn(&mut SeedAbout)| {
        let mut about = about();
        change(&mut about);
        let (file, key) = seed_of(130, &about);
        let (mut batches, mut medium) = (Vec::new(), &file[..]);
        let header = SeedHeader::read(&mut medium).unwrap();
        let mut reader = SeedReader::begin(medium, &header, &key).unwrap();
        while let SeedRecord::Batch(batch) = reader.next_record().unwrap() {
            batches.push(batch);
        }
        batches
    };
    let taken = |batches: &[bytes::Bytes]| {
        let (about, key) = (about(), SeedKey::random());
        let header = SeedHeader::new([9; 16], &about.target);
        let mut writer = SeedWriter::begin(Vec::new(), &header, &key, &about).unwrap();
        for batch in batches {
            writer.batch(batch).unwrap();
        }
        let (file, _) = writer.finish(&seal(&about, 0, [0; 32])).unwrap();
        read(&file, &key).map(|(batches, _)| batches)
    };
    let own = theirs(&|_| {});
    assert_eq!(taken(&own).unwrap(), own.len());
    assert!(own.len() >= 3);
    let backwards: Vec<_> = own.iter().rev().cloned().collect();
    let twice = [&own[..1], &own[..1]].concat();
    let refused = [
        backwards,
        twice,
        theirs(&|about| about.opening.guest = GuestId([8; 16])),
        theirs(&|about| about.point = 6),
        theirs(&|about| about.first = 50),
        theirs(&|about| (about.first, about.last) = (10_001, 20_000)),
        vec![bytes::Bytes::from_static(b"no batch at all")],
        vec![bytes::Bytes::new()],
    ];
    for batches in refused {
        assert!(matches!(taken(&batches), Err(SeedError::Unsound(_))));
    }
}

#[test]
fn an_export_that_is_stopped_or_out_of_numbers_ends() {
    let (about, key) = (about(), SeedKey::random());
    let header = SeedHeader::new([9; 16], &about.target);
    let units = noise(300);
    let digests = vec![Digest::UNKNOWN; 300];
    let ended = |about: &SeedAbout, progress: Arc<SeedProgress>| {
        let writer = SeedWriter::begin(Vec::new(), &header, &key, about).unwrap();
        let digest_key = DigestKey::new([3; 32]);
        let mut shipment = SeedShipment::begin(writer, about, digest_key, 1 << 20, progress);
        let refused = shipment.units(0, 0, &units, &digests);
        assert_eq!(refused, Err(SinkError::Closed));
        shipment.failure().unwrap()
    };
    let stopped = Arc::new(SeedProgress::default());
    stopped.stop();
    assert!(matches!(ended(&about, stopped), SeedShipError::Stopped));
    let short = SeedAbout {
        last: 101,
        ..about.clone()
    };
    let spent = ended(&short, Arc::default());
    assert!(matches!(spent, SeedShipError::Encode(_)), "{spent}");
}

proptest! {
    /// A peer that knows the key may write anything: it is refused, never a panic.
    #[test]
    fn nothing_that_verifies_panics(
        records in proptest::collection::vec((0u8..5, any::<Option<u32>>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..6),
        honest: bool, rest in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let (about, key) = (about(), SeedKey::random());
        let header = SeedHeader::new([9; 16], &about.target);
        let mut stream = Encrypting::begin(Vec::new(), &header, &key).unwrap();
        if honest {
            let mut bytes = Vec::new();
            ciborium::into_writer(&about, &mut bytes).unwrap();
            stream.write(&[ABOUT]).unwrap();
            stream.write(&(bytes.len() as u32).to_le_bytes()).unwrap();
            stream.write(&bytes).unwrap();
        }
        for (kind, length, bytes) in records {
            stream.write(&[kind]).unwrap();
            stream.write(&length.unwrap_or(bytes.len() as u32).to_le_bytes()).unwrap();
            stream.write(&bytes).unwrap();
        }
        stream.write(&rest).unwrap();
        let (file, _) = stream.finish().unwrap();
        prop_assert!(read(&file, &key).is_err());
    }

    /// Any bytes at all.
    #[test]
    fn no_file_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), genuine: bool) {
        let mut file = bytes;
        if genuine && file.len() >= 8 {
            file[..8].copy_from_slice(b"FHseed\x01\x00");
            let end = file.len().min(48);
            file[43.min(end)..end].fill(0);
        }
        prop_assert!(read(&file, &SeedKey::random()).is_err());
    }

    /// Changes of a larger seed: anywhere, any.
    #[test]
    fn no_change_goes_unseen(at in any::<prop::sample::Index>(), to: u8) {
        use std::sync::OnceLock;
        static SEED: OnceLock<(Vec<u8>, SeedKey)> = OnceLock::new();
        let (file, key) = SEED.get_or_init(|| seed_of(600, &about()));
        let at = at.index(file.len());
        prop_assume!(file[at] != to);
        let mut changed = file.clone();
        changed[at] = to;
        prop_assert!(read(&changed, key).is_err());
    }
}
