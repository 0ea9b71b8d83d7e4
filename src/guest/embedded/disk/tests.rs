#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::instant::View;
use super::*;
use crate::activate::hydrate::HydrationState;

const UNIT64: u64 = UNIT as u64;

/// A point's disk: bytes that do not change, with holes, that may fail.
struct Point {
    bytes: Vec<u8>,
    fails_from: AtomicU64,
}

impl Point {
    fn new(seed: u64, bytes: u64) -> Arc<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut content = vec![0; bytes as usize];
        for unit in content.chunks_mut(UNIT) {
            if random.random_bool(0.6) {
                random.fill_bytes(unit);
            }
        }
        Arc::new(Self {
            bytes: content,
            fails_from: AtomicU64::new(u64::MAX),
        })
    }
}

impl BlockSource for Point {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        if end > self.fails_from.load(Ordering::SeqCst) {
            return Err(io::Error::other("the store's disk is gone"));
        }
        buf.copy_from_slice(&self.bytes[offset as usize..end as usize]);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let range = offset..offset + length;
        parts(&range, |unit| {
            let start = (unit * UNIT64) as usize;
            is_zero(&self.bytes[start..(start + UNIT).min(self.bytes.len())])
        })
        .into_iter()
        .map(|(part, zero)| (part.end - part.start, zero))
        .collect()
    }
}

fn whole(disk: &TrackedDisk) -> Vec<u8> {
    let mut bytes = vec![0; disk.bytes() as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

fn members(map: &Bitmap) -> BTreeSet<u64> {
    map.runs(u64::MAX).flat_map(|(at, n)| at..at + n).collect()
}

/// Every unit of an instant, as its reader gets it.
fn instant(view: &View) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    for (first, count) in view.set().runs(3) {
        let mut bytes = vec![1; count as usize * UNIT];
        view.read(first, &mut bytes).unwrap();
        found.extend((first..).zip(bytes.chunks(UNIT).map(<[u8]>::to_vec)));
        view.read_until(first + count);
    }
    found
}

fn padded(content: &[u8], unit: u64) -> Vec<u8> {
    let start = (unit * UNIT64) as usize;
    let mut bytes = content[start..(start + UNIT).min(content.len())].to_vec();
    bytes.resize(UNIT, 0);
    bytes
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, length: u64, zeros: bool },
    Read { at: u64, length: u64 },
    Take,
    Cut,
    ReadInstant,
    ReadHalf,
    Hydrate,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (any::<u64>(), 1u64..90_000, 0u8..5).prop_map(|(at, length, zeros)| Step::Write {
        at,
        length: if length > 20_000 {
            length
        } else {
            length % 300 + 1
        },
        zeros: zeros == 0,
    });
    let step = prop_oneof![
        10 => write,
        4 => (any::<u64>(), 1u64..30_000).prop_map(|(at, length)| Step::Read { at, length }),
        1 => Just(Step::Take),
        2 => Just(Step::Cut),
        2 => Just(Step::ReadInstant),
        2 => Just(Step::ReadHalf),
        1 => Just(Step::Hydrate),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn behaves_as_bytes_with_exact_changes_and_instants(
        seed: u64,
        bytes in 1u64..300_000,
        layered: bool,
        steps in steps(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk");
        let (disk, mut model) = if layered {
            let below = Point::new(seed, bytes);
            (TrackedDisk::above("d", &image, below.clone()).unwrap(), below.bytes.clone())
        } else {
            (TrackedDisk::open("d", &image, bytes).unwrap(), vec![0; bytes as usize])
        };
        let mut random = StdRng::seed_from_u64(seed);
        let mut changed = BTreeSet::new();
        let mut cut: Option<(View, Vec<u8>, u64)> = None;
        for step in steps {
            match step {
                Step::Write { at, length, zeros } => {
                    let at = at % bytes;
                    let length = length.min(bytes - at);
                    let mut content = vec![0; length as usize];
                    if !zeros {
                        random.fill_bytes(&mut content);
                    }
                    disk.write(at, &content).unwrap();
                    model[at as usize..(at + length) as usize].copy_from_slice(&content);
                    changed.extend(at / UNIT64..(at + length).div_ceil(UNIT64));
                }
                Step::Read { at, length } => {
                    let at = at % bytes;
                    let mut found = vec![1; length.min(bytes - at) as usize];
                    disk.read(at, &mut found).unwrap();
                    prop_assert_eq!(&found, &model[at as usize..at as usize + found.len()]);
                }
                Step::Take => {
                    prop_assert_eq!(members(&disk.take_changed()), std::mem::take(&mut changed));
                }
                Step::Cut => {
                    let mut owed = Bitmap::none(disk.units());
                    owed.set(random.random_range(0..disk.units()));
                    let mut wanted = std::mem::take(&mut changed);
                    wanted.extend(members(&owed));
                    let view = disk.freeze(owed, usize::MAX);
                    prop_assert_eq!(members(view.set()), wanted);
                    cut = Some((view, model.clone(), 0));
                }
                Step::ReadInstant => {
                    if let Some((view, then, from)) = cut.take() {
                        let set = view.set().clone();
                        let mut at = from;
                        while let Some((unit, _)) = set.run_from(at, 1) {
                            let mut found = vec![1; UNIT];
                            view.read(unit, &mut found).unwrap();
                            prop_assert_eq!(found, padded(&then, unit));
                            at = unit + 1;
                        }
                    }
                }
                Step::ReadHalf => {
                    if let Some((view, then, from)) = &mut cut
                        && let Some((first, count)) = view.set().run_from(*from, 5)
                    {
                        let mut found = vec![1; count as usize * UNIT];
                        view.read(first, &mut found).unwrap();
                        for (unit, found) in (first..).zip(found.chunks(UNIT)) {
                            prop_assert_eq!(found, padded(then, unit));
                        }
                        *from = first + count;
                        view.read_until(*from);
                    }
                }
                Step::Hydrate => disk.hydrate(0).unwrap(),
            }
        }
        prop_assert_eq!(whole(&disk), model);
        prop_assert_eq!(members(&disk.take_changed()), changed);
    }
}

/// A guest's thread writes all the time; instants are exact, and each change is told.
#[test]
fn instants_under_load_are_exact_and_every_change_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = 80 * UNIT64 + 100;
    let below = Point::new(3, bytes);
    let disk = TrackedDisk::above("d", &directory.path().join("d"), below.clone()).unwrap();
    disk.hydrate(4 << 20).unwrap();
    // Writes are counted, and a write and its number are one step for the cutter.
    let journal = Arc::new(Mutex::new((0u64, below.bytes.clone())));
    let over = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (disk, journal, over) = (disk.clone(), journal.clone(), over.clone());
        move || {
            let mut random = StdRng::seed_from_u64(5);
            while !over.load(Ordering::Relaxed) {
                let at = random.random_range(0..bytes);
                let mut content = vec![0; random.random_range(1..=20_000).min(bytes - at) as usize];
                random.fill_bytes(&mut content);
                let mut journal = journal.lock().unwrap();
                disk.write(at, &content).unwrap();
                journal.0 += 1;
                journal.1[at as usize..at as usize + content.len()].copy_from_slice(&content);
            }
        }
    });
    let mut peer = below.bytes.clone();
    let begun = Instant::now();
    let mut cuts = 0;
    while begun.elapsed() < Duration::from_secs(2) || cuts < 20 {
        let (view, then) = {
            let journal = journal.lock().unwrap();
            let view = disk.freeze(Bitmap::none(disk.units()), usize::MAX);
            (view, journal.1.clone())
        };
        for (unit, content) in instant(&view) {
            let start = (unit * UNIT64) as usize;
            let end = (start + UNIT).min(peer.len());
            peer[start..end].copy_from_slice(&content[..end - start]);
        }
        assert!(peer == then, "cut {cuts} differs");
        cuts += 1;
    }
    over.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let journal = journal.lock().unwrap();
    assert!(journal.0 > 100 && whole(&disk) == journal.1);
    assert_eq!(disk.hydration().state, HydrationState::Done);
}

#[test]
fn an_instant_that_would_keep_too_much_is_lost_and_the_guest_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let disk = TrackedDisk::open("d", &directory.path().join("d"), 100 * UNIT64).unwrap();
    disk.write(0, &[1; 50 * UNIT]).unwrap();
    let view = disk.freeze(Bitmap::none(100), 3 * UNIT);
    disk.write(50 * UNIT64, &[2; 50 * UNIT]).unwrap();
    assert_eq!(
        view.kept_bytes(),
        0,
        "what the cut does not read is not kept"
    );
    disk.write(0, &[3; 3 * UNIT]).unwrap();
    assert_eq!(view.kept_bytes(), 3 * UNIT);
    disk.write(0, &[4; 3 * UNIT]).unwrap();
    let mut content = vec![0; UNIT];
    view.read(1, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 1));
    view.read_until(2);
    assert_eq!(view.kept_bytes(), UNIT, "what was read is kept no more");
    disk.write(0, &[5; 4 * UNIT]).unwrap();
    disk.write(10 * UNIT64, &[6; UNIT]).unwrap();
    disk.write(11 * UNIT64, &[6; UNIT]).unwrap();
    let lost = view.read(20, &mut content).unwrap_err();
    assert!(lost.to_string().contains("is lost"), "{lost}");
    assert_eq!(view.kept_bytes(), 0);
    assert_eq!(&whole(&disk)[11 * UNIT..12 * UNIT], [6; UNIT]);
    drop(view);
    let next = disk.freeze(Bitmap::none(100), usize::MAX);
    assert_eq!(
        members(next.set()),
        (0..4).chain([10, 11]).chain(50..100).collect()
    );
    let newer = disk.freeze(Bitmap::none(100), usize::MAX);
    let ended = next.read(0, &mut content).unwrap_err();
    assert!(ended.to_string().contains("has ended"), "{ended}");
    drop(next);
    disk.write(0, &[7]).unwrap();
    assert_eq!(
        newer.kept_bytes(),
        0,
        "nothing had changed, nothing is read"
    );
}

fn until(disk: &TrackedDisk, done: impl Fn(&HydrationState) -> bool) {
    let begun = Instant::now();
    while !done(&disk.hydration().state) {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            disk.hydration()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_copy_that_fails_leaves_the_guest_reading_below_and_begins_anew() {
    let directory = tempfile::tempdir().unwrap();
    let below = Point::new(11, 3 << 20);
    let image = directory.path().join("d");
    let disk = TrackedDisk::above("d", &image, below.clone()).unwrap();
    let other = Point::new(12, 3 << 20);
    disk.replace_below(other.clone()).unwrap();
    assert!(whole(&disk) == other.bytes);
    assert!(
        disk.replace_below(Point::new(1, 4096)).is_err(),
        "another size"
    );
    disk.replace_below(below.clone()).unwrap();
    below.fails_from.store(2 << 20, Ordering::SeqCst);
    disk.hydrate(0).unwrap();
    assert!(disk.replace_below(other).is_err(), "the copy has begun");
    until(&disk, |state| matches!(state, HydrationState::Failed(_)));
    let far = (2 << 20) + 4096 * 7;
    disk.write(far, &[9; UNIT]).unwrap();
    assert!(
        disk.write(far + 5000, &[9; 10]).is_err(),
        "the rest of that unit cannot be had"
    );
    let mut content = vec![0; UNIT];
    assert!(disk.read(far + 8192, &mut content).is_err());
    disk.read(far, &mut content).unwrap();
    below.fails_from.store(u64::MAX, Ordering::SeqCst);
    disk.hydrate(0).unwrap();
    until(&disk, |state| *state == HydrationState::Done);
    assert_eq!(Arc::strong_count(&below), 1, "what lies below is let go");
    let mut wanted = below.bytes.clone();
    wanted[far as usize..far as usize + UNIT].fill(9);
    assert!(whole(&disk) == wanted);
    assert!(std::fs::read(&image).unwrap() == wanted);
    let copied = disk.hydration();
    assert_eq!((copied.done, copied.total), (3 << 20, 3 << 20));
}

#[test]
fn a_copy_keeps_to_its_rate_takes_another_and_ends_with_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let below = Arc::new(Point {
        bytes: vec![7; 4 << 20],
        fails_from: AtomicU64::new(u64::MAX),
    });
    let disk = TrackedDisk::above("d", &directory.path().join("d"), below.clone()).unwrap();
    disk.hydrate(1 << 20).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let done = disk.hydration().done;
    assert!(
        (512 << 10..=1280 << 10).contains(&done),
        "{done} bytes in 0.6 s at 1 MiB/s"
    );
    disk.hydrate(0).unwrap();
    until(&disk, |state| *state == HydrationState::Done);
    let idle = TrackedDisk::above("e", &directory.path().join("e"), below.clone()).unwrap();
    idle.hydrate(1).unwrap();
    drop((disk, idle));
    let begun = Instant::now();
    while Arc::strong_count(&below) > 1 {
        assert!(begun.elapsed() < Duration::from_secs(5), "the copy goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_that_has_ended_lets_go_of_what_lies_below() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = 4 << 20;
    let point = Point::new(9, bytes);
    let disk = TrackedDisk::above("d", &dir.path().join("image"), point.clone()).unwrap();
    disk.write(0, &[7; UNIT]).unwrap();
    disk.hydrate(1).unwrap();
    disk.end();
    let begun = Instant::now();
    while Arc::strong_count(&point) > 1 {
        assert!(begun.elapsed() < Duration::from_secs(20), "it is held");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut content = vec![0; UNIT];
    disk.read(0, &mut content).unwrap();
    assert_eq!(content, [7; UNIT]);
    let error = disk.read(bytes - UNIT64, &mut content).unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
}

#[test]
fn images_of_another_size_and_accesses_past_the_end_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("d");
    let disk = TrackedDisk::open("d", &image, 5000).unwrap();
    assert_eq!((disk.name(), disk.bytes(), disk.units()), ("d", 5000, 2));
    assert!(disk.write(4999, &[1, 2]).is_err());
    assert!(disk.read(u64::MAX, &mut [0]).is_err());
    disk.write(4999, &[1]).unwrap();
    disk.flush().unwrap();
    disk.read(5000, &mut []).unwrap();
    drop(disk);
    assert!(TrackedDisk::open("d", &image, 5001).is_err());
    assert_eq!(
        whole(&TrackedDisk::open("d", &image, 5000).unwrap())[4999],
        1
    );
    assert!(
        TrackedDisk::above("d", &image, Point::new(1, 5000)).is_err(),
        "it exists"
    );
}

#[test]
fn long_zeros_give_their_room_back() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("d");
    let disk = TrackedDisk::open("d", &image, 4 << 20).unwrap();
    disk.write(0, &vec![1; 4 << 20]).unwrap();
    disk.flush().unwrap();
    let before = std::fs::metadata(&image).unwrap().blocks();
    disk.take_changed();
    disk.write(0, &vec![0; 2 << 20]).unwrap();
    assert_eq!(disk.take_changed().count(), 512);
    let mut content = vec![1; 2 << 20];
    disk.read(0, &mut content).unwrap();
    assert!(is_zero(&content));
    let after = std::fs::metadata(&image).unwrap().blocks();
    assert!(after < before, "{before} blocks became {after}");
    assert!(disk.hole(0) >= 2 << 20);
}
