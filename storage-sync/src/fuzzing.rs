//! What fuzzing feeds: every reader of stored and received bytes, each as a function that
//! takes any bytes and panics when a promise broke. `fuzz/` has the targets; the tests below
//! run the same functions. Only with the feature `fuzzing`.
//!
//! Most formats are under a hash, which changed bytes would never get past. So each target
//! reads its input as it is, and once more with the hashes, lengths and counts made right.

mod fit;
mod seeds;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::catalogue;
use crate::codec::{
    BatchHeader, BatchView, Body, Chain, Content, EntryReader, Expander, Slot, delta,
};
use crate::digest::DigestKey;
use crate::disk::simulated::SimulatedDisk;
use crate::disk::{Access, Disk};
use crate::limits::{BATCH_BODY_RAW, BATCH_BYTES, IMAGE_SEQ, VOLUME_UNITS, VOLUMES};
use crate::log::segment_of;
use crate::manifest::{self, PointStats};
use crate::store::{OpenReport, Seal, Store, StoreError, StoreOptions};
use crate::unit::{GROUP, GuestId, UNIT, Volume, VolumeKind};

/// A target: its name, what takes the bytes, and valid inputs to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate.
pub const TARGETS: [Target; 7] = [
    ("batches", batches, seeds::batches),
    ("entries", entries, seeds::entries),
    ("manifests", manifests, seeds::manifests),
    ("segments", segments, seeds::segments),
    ("stores", stores, seeds::segments),
    ("journals", journals, seeds::journals),
    ("notes", notes, seeds::notes),
];

/// The guest that inputs are about.
const GUEST: GuestId = GuestId([7; 16]);
const DIR: &str = "/s";

fn options() -> StoreOptions {
    StoreOptions {
        segment_bytes: 64 << 10,
        bytes_most: None,
        map_bytes: 1 << 20,
        cache_bytes: BATCH_BODY_RAW,
        hint_bytes: 16 << 10,
    }
}

/// A file on a simulated disk, durable, with the directories above it.
fn put(disk: &SimulatedDisk, path: &Path, bytes: &[u8]) {
    let Some(dir) = path.parent() else { return };
    let mut above: Vec<_> = dir.ancestors().collect();
    above.pop();
    for dir in above.iter().rev() {
        disk.make_dir(dir).expect("a disk without faults");
    }
    let file = disk
        .open(path, Access::Replace)
        .expect("a disk without faults");
    file.write_all_at(bytes, 0).expect("a disk without faults");
    file.sync().expect("a disk without faults");
}

fn open(disk: &SimulatedDisk) -> Result<(Store, OpenReport), StoreError> {
    Store::open_on(Arc::new(disk.clone()), Path::new(DIR), options())
}

/// Whatever is in a file is told, no more; unless a newer version wrote it: then nothing is
/// opened, and nothing is changed.
fn open_unless_newer(disk: &SimulatedDisk) -> Option<(Store, OpenReport)> {
    let data = |disk: &SimulatedDisk| {
        let mut files = disk.files();
        files.retain(|(path, _)| path.extension().is_some());
        files
    };
    let before = data(disk);
    match open(disk) {
        Ok(opened) => Some(opened),
        Err(StoreError::File(error)) if error.is_newer() => {
            assert_eq!(data(disk), before);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A batch: its header, its entries, its body.
pub fn batches(bytes: &[u8]) {
    for bytes in [bytes.to_vec(), fit::hashes(bytes), fit::batch(bytes)] {
        if let Ok(header) = BatchHeader::parse(&bytes) {
            assert!(header.bytes() <= BATCH_BYTES && header.body_raw <= BATCH_BODY_RAW);
        }
        if let Ok(view) = BatchView::parse(&bytes) {
            batch(&view);
        }
    }
}

fn batch(view: &BatchView<'_>) {
    let header = view.header();
    let mut entries = EntryCheck::of(header.seq);
    view.entries().for_each(|entry| entries.see(&entry));
    assert_eq!(entries.slots, u64::from(header.literals));
    assert_eq!(entries.count, header.entries);
    let mut body = Body::new();
    if view.expand(&mut Expander::new(), &mut body).is_err() {
        return;
    }
    assert_eq!(body.bytes.len(), header.body_raw);
    assert_eq!(body.len(), usize::from(header.literals));
    for index in 0..header.literals {
        match body.slot(index).expect("each slot is there") {
            Slot::Whole(_) => {}
            Slot::Difference(told, bytes) => {
                assert_eq!(bytes.len(), usize::from(told.length));
                let _ = delta::apply(bytes, &mut [0x5a; UNIT]);
            }
        }
    }
    assert!(body.slot(header.literals).is_none());
}

/// What entries that were read must keep to.
struct EntryCheck {
    seq: u64,
    slots: u64,
    count: usize,
}

impl EntryCheck {
    fn of(seq: u64) -> EntryCheck {
        EntryCheck {
            seq,
            slots: 0,
            count: 0,
        }
    }

    fn see(&mut self, entry: &crate::codec::Entry) {
        self.count += 1;
        assert!(usize::from(entry.volume) < VOLUMES && entry.count > 0);
        assert!(entry.unit + entry.count <= VOLUME_UNITS);
        match entry.content {
            Content::Zeros => {}
            Content::Literals(first) => {
                assert_eq!(u64::from(first), self.slots);
                self.slots += entry.count;
            }
            // Never a later batch: no circle of references can be told.
            Content::Refs(place) => {
                let earlier = place.seq() <= self.seq;
                assert!(place.seq() > 0 && (earlier || place.seq() >= IMAGE_SEQ));
                assert!(u64::from(place.index()) + entry.count <= GROUP as u64);
            }
            Content::Delta(told) => {
                assert!(told.base.seq() > 0 && told.base.seq() < self.seq);
                assert_eq!((u64::from(told.index), entry.count), (self.slots, 1));
                self.slots += 1;
            }
        }
        assert!(self.slots <= GROUP as u64);
    }
}

/// The entries of a batch, and a difference, without anything around them.
pub fn entries(bytes: &[u8]) {
    let seq = bytes.first().map_or(1, |first| 1 + u64::from(*first) * 3);
    let rest = bytes.get(1..).unwrap_or_default();
    let mut reader = EntryReader::new(rest, seq);
    let mut seen = EntryCheck::of(seq);
    while let Ok(Some(entry)) = reader.take() {
        seen.see(&entry);
    }
    let base = [0x5a; UNIT];
    let mut unit = base;
    if delta::apply(rest, &mut unit).is_some() {
        let mut told = Vec::new();
        if delta::diff(&base, &unit, &mut told).is_some_and(|length| length > 0) {
            let mut again = base;
            assert!(delta::apply(&told, &mut again).is_some() && again == unit);
        }
    }
}

/// A manifest, by itself and as the only one of a store.
pub fn manifests(bytes: &[u8]) {
    let path = manifest::path_of(&Path::new(DIR).join("manifests"), GUEST, 9);
    for bytes in [bytes.to_vec(), fit::manifest(bytes)] {
        let mut runs = 0;
        let decoded = manifest::decode(&path, &bytes, &mut |run| {
            assert!(run.count > 0 && run.unit + run.count <= VOLUME_UNITS);
            runs += 1;
        });
        let Ok(head) = decoded else { continue };
        assert!(runs <= bytes.len() && head.base < head.header.point);
        let disk = SimulatedDisk::new();
        put(&disk, &path, &bytes);
        let Some((store, report)) = open_unless_newer(&disk) else {
            continue;
        };
        assert_eq!(store.points(GUEST).len() + report.damaged.len(), 1);
    }
}

/// A directory of segments; also one whose batches have marks.
pub fn segments(bytes: &[u8]) {
    let pieces = fit::pieces(bytes);
    let (fitted, marked) = (pieces.concat(), segment_of(&pieces));
    for bytes in [bytes, &fitted[..], &marked[..]] {
        let (one, other) = match bytes.first() {
            Some(b'F') | None => (bytes, &[][..]),
            Some(_) => bytes.split_at(bytes.len() / 2),
        };
        let disk = SimulatedDisk::new();
        for (name, bytes) in [("00000001.seg", one), ("00000002.seg", other)] {
            put(&disk, &Path::new(DIR).join("segments").join(name), bytes);
        }
        let Some((store, report)) = open_unless_newer(&disk) else {
            continue;
        };
        let lost = report.log.bad.iter().map(|bad| bad.bytes).sum::<u64>();
        assert!(report.log.torn_bytes + lost <= bytes.len() as u64);
        assert_eq!(store.bytes() + report.log.torn_bytes, bytes.len() as u64);
        store.check();
        drop(store);
        // The segment before it is where a crash would have left its traces then.
        if !other.is_empty() && report.log.torn_bytes == other.len() as u64 {
            continue;
        }
        // What was cut off is gone for good; what was kept stays.
        let (_, again) = open(&disk).expect("it opened before");
        assert_eq!(again.log.torn_bytes, 0);
        assert_eq!(again.log.batches, report.log.batches);
        // The reason may be told otherwise: a shorter file, other lengths that do not fit.
        let places = |report: &OpenReport| {
            let bad = report.log.bad.iter();
            bad.map(|bad| (bad.offset, bad.bytes)).collect::<Vec<_>>()
        };
        assert_eq!(places(&again), places(&report));
    }
}

/// Batches of a peer, sealed as a point: it is refused, or every unit of it reads.
pub fn stores(bytes: &[u8]) {
    let disk = SimulatedDisk::new();
    let (store, _) = open(&disk).expect("an empty disk without faults");
    store.hint_with(&DigestKey::new([3; 32]));
    let mut taken = BTreeMap::new();
    for piece in fit::pieces(bytes).into_iter().take(16) {
        let batch = fit::of_one_point(&piece);
        let header = BatchHeader::parse(&batch);
        if store.append(&[batch.into()]).is_ok()
            && let Ok(header) = header
        {
            taken.insert(header.seq, header.hash);
        }
    }
    let mut chain = Chain::new();
    taken.iter().for_each(|(seq, hash)| chain.push(*seq, hash));
    let volume = |name: &str, kind| Volume {
        name: name.to_owned(),
        kind,
        bytes: 1 << 40,
    };
    let sealed = store.seal(Seal {
        guest: GUEST,
        point: 1,
        parent: 0,
        cut_at_unix_ns: 1,
        volumes: vec![
            volume("ram", VolumeKind::Ram),
            volume("disk", VolumeKind::Disk),
        ],
        batches: chain.count(),
        chain: chain.finish(),
        context: Vec::new(),
        stats: PointStats::default(),
    });
    if sealed.is_err() {
        return;
    }
    read(&store);
    drop(store);
    let (store, report) = open(&disk).expect("it opened before");
    assert!(report.damaged.is_empty(), "{report:?}");
    read(&store);
}

/// All of point 1.
fn read(store: &Store) {
    let replica = store.open_point(GUEST, 1).expect("it was sealed");
    let mut unit = vec![0; UNIT];
    for volume in 0..2 {
        let runs = replica.map_pages(volume);
        // Enough of them: an input may tell the same slots a hundred thousand times.
        for at in runs
            .flat_map(|run| run.unit..run.unit + run.count)
            .take(2048)
        {
            let read = replica.read(volume, at, 1, &mut unit);
            read.expect("a sealed point reads");
        }
    }
}

/// The catalogue's journal.
pub fn journals(bytes: &[u8]) {
    catalogue::fuzzing::journal(bytes);
    catalogue::fuzzing::journal(&fit::journal(bytes));
}

/// Small files beside the data: hints, names of kept points.
pub fn notes(bytes: &[u8]) {
    let key = DigestKey::new([3; 32]);
    for bytes in [bytes.to_vec(), fit::notes(bytes)] {
        let disk = SimulatedDisk::new();
        put(&disk, &Path::new(DIR).join("hints"), &bytes);
        let manifest = manifest::path_of(&Path::new(DIR).join("manifests"), GUEST, 9);
        put(&disk, &manifest, seeds::a_manifest());
        put(&disk, &manifest.with_extension("kept"), &bytes);
        let (store, _) = open(&disk).expect("notes are never in the way");
        store.hint_with(&key);
        while store.fill_hints() {}
        // Whatever is in the file, the point is kept.
        assert_eq!(store.kept(GUEST).len(), 1);
    }
}

#[cfg(test)]
#[path = "../../fuzz/tried.rs"]
mod tried;

#[cfg(test)]
mod tests {
    #[test]
    fn no_bytes_break_a_promise() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        super::tried::all(&super::TARGETS, &fuzz, 1000);
    }

    /// A few bytes tell of more units than any memory has places for.
    #[test]
    fn a_run_that_no_memory_holds_is_told() {
        use crate::{map::Run, unit::Place};
        let whole = super::seeds::a_manifest();
        let path = std::path::Path::new("x");
        let head = crate::manifest::decode(path, whole, &mut drop).expect("a manifest");
        let run = Run {
            volume: 0,
            unit: 0,
            count: 1 << 39,
            place: Place::new(7, 0),
        };
        let bytes = crate::manifest::encode(&head.header, 0, b"", [run].into_iter());
        super::manifests(&bytes);
    }

    /// What the targets begin with is what it is meant to be: past every check.
    #[test]
    fn seeds_get_past_every_check() {
        for seed in super::seeds::batches() {
            crate::codec::BatchView::parse(&seed).expect("a batch");
            assert_eq!(
                super::fit::batch(&seed),
                seed,
                "nothing is to be made right"
            );
        }
        for seed in super::seeds::manifests() {
            let path = std::path::Path::new("x");
            crate::manifest::decode(path, &seed, &mut drop).expect("a manifest");
            assert_eq!(super::fit::manifest(&seed), seed);
        }
        for seed in super::seeds::journals() {
            assert_eq!(super::fit::journal(&seed), seed);
        }
    }
}
