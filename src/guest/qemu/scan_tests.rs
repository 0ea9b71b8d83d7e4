use super::*;
use std::io::Write;
use std::os::unix::fs::FileExt;

const KEY: [u8; 32] = [7; 32];

/// Keeps what the peer would have, and refuses after `limit` units.
struct Model {
    bytes: Vec<u8>,
    units: usize,
    zeros: u64,
    limit: usize,
}

impl Model {
    fn new(units: usize) -> Self {
        Self {
            bytes: vec![0; units * UNIT],
            units: 0,
            zeros: 0,
            limit: usize::MAX,
        }
    }
}

impl Sink for Model {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        assert_eq!(volume, 3);
        assert_eq!(bytes.len(), digests.len() * UNIT);
        if self.units + digests.len() > self.limit {
            return Err(SinkError::Full);
        }
        let mut own = Vec::new();
        Hasher::new(KEY).digests(bytes, &mut own);
        assert_eq!(own, digests);
        self.units += digests.len();
        let at = unit as usize * UNIT;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, _: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        self.zeros += count;
        let at = unit as usize * UNIT;
        self.bytes[at..at + count as usize * UNIT].fill(0);
        Ok(())
    }
}

fn ram(units: usize) -> (tempfile::NamedTempFile, RamBlock) {
    // On tmpfs, as guest RAM is, where there is one.
    let dir = Path::new("/dev/shm");
    let file = if dir.is_dir() {
        tempfile::NamedTempFile::new_in(dir)
    } else {
        tempfile::NamedTempFile::new()
    };
    let file = file.expect("a file");
    file.as_file()
        .set_len((units * UNIT) as u64)
        .expect("sized");
    let block = RamBlock::open(file.path(), 3).expect("opens");
    (file, block)
}

fn hot() -> Hot {
    let volume = farhaven_storage_sync::unit::Volume {
        name: "ram".to_owned(),
        kind: farhaven_storage_sync::unit::VolumeKind::Ram,
        bytes: (4000 * UNIT) as u64,
    };
    Hot::new(&vec![volume; 4], (100 * UNIT) as u64)
}

fn page(tag: usize) -> Vec<u8> {
    (0..UNIT).map(|i| (i * 31 + tag * 7 + 1) as u8).collect()
}

#[test]
fn each_scan_hands_over_exactly_what_changed() {
    let units = 3000;
    let (file, mut block) = ram(units);
    let mut model = Model::new(units);
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(
        (model.units, model.zeros),
        (0, 0),
        "a new replica reads zero already"
    );
    for unit in [0, 1, 63, 64, 700, 2999] {
        file.as_file()
            .write_all_at(&page(unit), (unit * UNIT) as u64)
            .expect("writes");
    }
    let looked = block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.units, 6);
    assert!(looked < (units * UNIT) as u64, "holes are not looked at");
    assert_eq!(
        block.handed.iter().collect::<Vec<_>>(),
        [0, 1, 63, 64, 700, 2999]
    );
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.units, 6, "nothing changed");
    file.as_file()
        .write_all_at(&page(9), 700 * UNIT as u64)
        .expect("writes");
    file.as_file()
        .write_all_at(&[0; UNIT], 64 * UNIT as u64)
        .expect("writes");
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!((model.units, model.zeros), (7, 1));
    assert_eq!(std::fs::read(file.path()).expect("reads"), model.bytes);
}

#[test]
fn a_page_that_became_a_hole_reads_zero_at_the_peer() {
    let (file, mut block) = ram(1000);
    let mut model = Model::new(1000);
    for unit in 0..1000 {
        file.as_file()
            .write_all_at(&page(unit), (unit * UNIT) as u64)
            .expect("writes");
    }
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    let hole = (100 * UNIT as u64, 700 * UNIT as u64);
    rustix::fs::fallocate(file.as_file(), flags, hole.0, hole.1).expect("punches");
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.zeros, 700);
    assert_eq!(std::fs::read(file.path()).expect("reads"), model.bytes);
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.zeros, 700, "told once");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(40))]

    /// Whatever is data and whatever a hole, what the peer has is the file,
    /// and looking at it allocates nothing.
    #[test]
    fn any_pattern_of_holes_is_read_as_it_is_and_left_as_it_is(
        rounds in proptest::collection::vec(
            proptest::collection::vec((0usize..700, 1usize..200, 0u8..3), 1..12), 1..4),
    ) {
        use std::os::unix::fs::MetadataExt;
        let units = 700;
        let (file, mut block) = ram(units);
        let mut model = Model::new(units);
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        for (round, changes) in rounds.iter().enumerate() {
            for (first, count, kind) in changes {
                let end = (first + count).min(units);
                let (at, bytes) = ((first * UNIT) as u64, (end - first) * UNIT);
                match kind {
                    0 => rustix::fs::fallocate(file.as_file(), flags, at, bytes as u64).expect("punches"),
                    1 => file.as_file().write_all_at(&vec![0; bytes], at).expect("writes"),
                    _ => {
                        for unit in *first..end {
                            file.as_file()
                                .write_all_at(&page(unit + round * 1000), (unit * UNIT) as u64)
                                .expect("writes");
                        }
                    }
                }
            }
            let held = file.as_file().metadata().expect("facts").blocks();
            block.scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model).expect("scans");
            proptest::prop_assert_eq!(file.as_file().metadata().expect("facts").blocks(), held);
            proptest::prop_assert!(std::fs::read(file.path()).expect("reads") == model.bytes);
        }
    }
}

#[test]
fn what_a_full_sink_did_not_take_comes_again() {
    let (file, mut block) = ram(2000);
    for unit in 0..2000 {
        file.as_file()
            .write_all_at(&page(unit), (unit * UNIT) as u64)
            .expect("writes");
    }
    let mut model = Model::new(2000);
    model.limit = 1000;
    let refused = block.scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model);
    assert!(matches!(refused, Err(GuestError::Sink(SinkError::Full))));
    let taken = model.units;
    assert_eq!(block.handed.iter().count(), taken);
    model.limit = usize::MAX;
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.units, 2000, "what was taken does not come twice");
    assert_eq!(std::fs::read(file.path()).expect("reads"), model.bytes);
    let handed = block.handed.clone();
    block.forget(&handed);
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.units, 4000 - taken);
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let (file, mut block) = ram(1000);
    for unit in 0..1000 {
        file.as_file()
            .write_all_at(&page(unit), (unit * UNIT) as u64)
            .expect("writes");
    }
    file.as_file().set_len(10 * UNIT as u64).expect("shrinks");
    // Seen as a hole, or as an early end; never as a crash.
    let mut model = Model::new(1000);
    let _ = block.scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model);
    let mut odd = tempfile::NamedTempFile::new().expect("a file");
    odd.write_all(b"not RAM").expect("writes");
    assert!(RamBlock::open(odd.path(), 0).is_err());
}

#[test]
fn a_table_of_another_size_is_refused() {
    let (_file, mut block) = ram(10);
    assert!(block.know(vec![Digest::UNKNOWN; 9]).is_err());
    block.know(vec![Digest::UNKNOWN; 10]).expect("fits");
    let mut model = Model::new(10);
    block
        .scan(&Hasher::new(KEY), 1, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    assert_eq!(model.zeros, 10, "unknown units are told, holes too");
}

/// `cargo test --profile ci --lib scan_speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement: 1 GiB of RAM"]
fn scan_speed() {
    let units = 1 << 18;
    let (file, mut block) = ram(units);
    let mut filler: Vec<u8> = (0..1 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for at in 0..1024_u64 {
        filler[..8].copy_from_slice(&at.to_le_bytes());
        file.as_file()
            .write_all_at(&filler, at << 20)
            .expect("writes");
    }
    let mut model = Model::new(units);
    block
        .scan(&Hasher::new(KEY), 2, (Look::Cut, &mut hot()), &mut model)
        .expect("scans");
    let hasher = Hasher::new(KEY);
    for threads in [1, 2] {
        let cpu = || {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
        };
        let (begun, busy) = (std::time::Instant::now(), cpu());
        let looked = block
            .scan(&hasher, threads, (Look::Cut, &mut hot()), &mut model)
            .expect("scans");
        let rate = looked as f64 / begun.elapsed().as_secs_f64() / 1e9;
        let core = looked as f64 / (cpu() - busy) / 1e9;
        eprintln!("{threads} threads: {rate:.2} GB/s, {core:.2} GB in a core's second");
    }
    assert_eq!(model.units, units);
}

#[test]
fn what_changes_in_every_look_waits_for_the_cut() {
    let units = 600;
    let (file, mut block) = ram(units);
    let (mut model, mut hot) = (Model::new(units), hot());
    let hasher = Hasher::new(KEY);
    let write = |unit: usize, tag: usize| {
        let at = (unit * UNIT) as u64;
        file.as_file().write_all_at(&page(tag), at).expect("writes");
    };
    let mut look = |what: Look, model: &mut Model| {
        hot.begin();
        block
            .scan(&hasher, 2, (what, &mut hot), model)
            .expect("scans");
        hot.end();
        hot.waiting()
    };
    for unit in 0..units {
        write(unit, unit);
    }
    assert_eq!(look(Look::Round, &mut model), 0, "a first look finds all");
    let mut waited = Vec::new();
    for turn in 0..6 {
        for unit in [3, 4, 5, 300] {
            write(unit, 1000 + turn * 7 + unit);
        }
        write(400 + turn, 5000 + turn);
        let before = model.units;
        waited.push(look(Look::Round, &mut model));
        let sent = model.units - before;
        assert_eq!(sent as u64, 5 - waited[turn], "turn {turn}");
    }
    assert_eq!(waited, [0, 4, 4, 4, 4, 4]);
    // One cools down: it goes with the second round that finds it as it was.
    let before = model.units;
    for waits in [4, 3] {
        for unit in [3, 4, 5] {
            write(unit, 9000 + unit + waits);
        }
        assert_eq!(look(Look::Round, &mut model), waits as u64);
    }
    assert_eq!(model.units - before, 1);
    // The cut takes all, and the next round begins with nothing that waits.
    assert_ne!(model.bytes, std::fs::read(file.path()).expect("reads"));
    assert_eq!(look(Look::Cut, &mut model), 0);
    assert_eq!(model.bytes, std::fs::read(file.path()).expect("reads"));
    assert_eq!(look(Look::Round, &mut model), 0);
    assert_eq!(model.units - before, 1 + 3);
}

#[test]
fn any_looks_that_fail_or_not_leave_cuts_exact() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let units = 300;
        let (file, mut block) = ram(units);
        let (mut model, mut hot) = (Model::new(units), hot());
        let (hasher, mut waits) = (Hasher::new(KEY), 0);
        for _ in 0..60 {
            for _ in 0..random.random_range(0..40) {
                let unit = random
                    .random_range(0..units)
                    .min(random.random_range(0..units));
                let tag = random.random_range(0..9);
                let bytes = if tag == 0 { vec![0; UNIT] } else { page(tag) };
                let at = (unit * UNIT) as u64;
                file.as_file().write_all_at(&bytes, at).expect("writes");
            }
            model.limit = match random.random_bool(0.2) {
                true => model.units + random.random_range(0..20),
                false => usize::MAX,
            };
            let what = match random.random_bool(0.6) {
                true => Look::Round,
                false => Look::Cut,
            };
            hot.begin();
            let scanned = block.scan(&hasher, 2, (what, &mut hot), &mut model);
            waits += hot.waiting();
            match scanned {
                Ok(_) => {
                    hot.end();
                    if what == Look::Cut {
                        assert_eq!(model.bytes, std::fs::read(file.path()).expect("reads"));
                    }
                }
                Err(_) if what == Look::Cut => block.forget(&block.handed.clone()),
                Err(_) => {}
            }
        }
        assert!(waits > 0, "nothing ever waited: seed {seed}");
    }
}
