//! Hundreds of kills, when asked for: both daemons of a real guest under load die at random
//! moments, the link is cut, the store's filesystem is full, a clock is wrong. After each,
//! nothing that was acknowledged is missing, the newest point reads to its last byte, and
//! the next one is sealed; now and then it is run, and the guest checks itself.
//!
//!     FARHAVEN_KILLS=300 [FARHAVEN_KILLS_SEED=7] cargo test --release --test sites_source \
//!         kills_of_every_kind -- --nocapture

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use farhaven::site::view::TestReport;
use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT};

use crate::support::site::{Pair, TestSite};
use crate::support::{Console, GuestOptions, GuestVm};
use crate::watch::beats_on;

const PATIENCE: Duration = Duration::from_secs(180);
/// Every so many kills the newest point is run.
const TESTED: u64 = 20;

/// Tells a process that it is another time than it is.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, at);
    const char *off = getenv("FARHAVEN_TEST_CLOCK");
    if (off && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += atol(off);
    return done;
}
"#;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % most
    }
}

/// A small filesystem for the store.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Option<Small> {
        fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=1g,mode=700", "farhaven-test"]);
        let mounted = mount.arg(at).status().is_ok_and(|status| status.success());
        mounted.then(|| Small(at.to_owned()))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    fn fill(&self) {
        let mut file = File::create(self.ballast()).unwrap();
        let piece = vec![1; 1 << 20];
        while file.write_all(&piece).is_ok() {}
    }

    fn free(&self) {
        let _ = fs::remove_file(self.ballast());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The library that shifts clocks; `None` without a C compiler.
fn clock(dir: &Path) -> Option<PathBuf> {
    let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
    fs::write(&source, CLOCK).unwrap();
    let mut cc = Command::new("cc");
    let cc = cc
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(&source);
    let made = cc.arg("-ldl").status().is_ok_and(|status| status.success());
    made.then_some(library)
}

/// Reads the newest point of a store whose daemon is dead, every byte verified.
fn newest_reads(store: &Path, guest: GuestId) -> u64 {
    let (store, report) = Store::open(store, StoreOptions::default()).unwrap();
    assert!(
        report.damaged.is_empty() && report.log.bad.is_empty(),
        "{report:?}"
    );
    let newest = store.newest(guest).expect("a sealed point").point;
    let replica = store.open_point(guest, newest).unwrap();
    for volume in 0..replica.volumes().len() as u16 {
        let mut bytes = vec![0; 256 * UNIT];
        let runs: Vec<_> = replica.nonzero_runs(volume).collect();
        for (unit, count) in runs {
            for at in (0..count).step_by(256) {
                let now = (count - at).min(256);
                let out = &mut bytes[..now as usize * UNIT];
                replica.read(volume, unit + at, now, out).unwrap();
            }
        }
    }
    newest
}

/// Runs the newest point beside protection: the guest says whether it is whole.
fn newest_runs(west: &TestSite) {
    let told = west.cli(&["test", "web", "--json"]).good();
    let report: TestReport = serde_json::from_str(&told.out).unwrap();
    let paths = report.console.expect("a console");
    let console = Console {
        log: paths.log,
        socket: paths.socket,
    };
    let first = console.await_beat(1, PATIENCE);
    let beat = console.await_beat(first.number + 3, PATIENCE);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
    assert!(console.check(PATIENCE).is_ok());
    west.cli(&["test", "cleanup", "web"]).good();
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Source,
    Target,
    Both,
    LinkCut,
    StoreFull,
    WrongClock,
}

#[test]
fn kills_of_every_kind() {
    let Some(kills) = number("FARHAVEN_KILLS") else {
        eprintln!("skipped: takes hours; FARHAVEN_KILLS=300 asks for so many kills");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = GuestVm::start(dir.path(), &GuestOptions::default()) else {
        return;
    };
    let seed = number("FARHAVEN_KILLS_SEED").unwrap_or(u64::from(std::process::id())) | 1;
    println!("seed {seed}");
    let store = dir.path().join("small");
    let small = Small::mount(&store);
    let library = clock(dir.path());
    println!(
        "full store: {}, wrong clock: {}",
        small.is_some(),
        library.is_some()
    );
    let kept =
        "[protect.retention]\nall = \"5s\"\nthen_every = \"5s\"\nuntil = \"20s\"\nnewest = 2";
    let small_store = format!(
        "[store]\ndir = \"{}\"\nmin_free = \"1MiB\"",
        store.display()
    );
    let mut pair = Pair::start("200mbit,20ms,0.1%", kept, &small_store);
    pair.protect("web", &guest, "1s");
    pair.east.until_sealed("web", 2, PATIENCE);
    let id: GuestId = pair.east.source("web").id.parse().unwrap();
    let mut random = Random(seed);
    let mut done: BTreeMap<Kind, u64> = BTreeMap::new();
    let (mut read, mut run) = (0u64, 0u64);
    let begun = Instant::now();
    for kill in 1..=kills {
        let kind = match random.below(12) {
            0..=2 => Kind::Source,
            3..=5 => Kind::Target,
            6..=7 => Kind::Both,
            8..=9 => Kind::LinkCut,
            10 if small.is_some() => Kind::StoreFull,
            11 if library.is_some() => Kind::WrongClock,
            _ => Kind::Both,
        };
        let wait = random.below(2500);
        std::thread::sleep(Duration::from_millis(wait));
        // What the source was told to be sealed must be there, whatever comes.
        let told = pair.east.source("web").newest_point;
        let words = format!("kill {kill} ({kind:?} after {wait} ms, {told} sealed, seed {seed})");
        let (mut source, mut target) = (false, false);
        match kind {
            Kind::Source => source = true,
            Kind::Target => target = true,
            Kind::Both => (source, target) = (true, true),
            Kind::LinkCut => {
                pair.link.cut(true);
                std::thread::sleep(Duration::from_millis(random.below(3000)));
                (source, target) = (random.below(2) == 0, random.below(2) == 0);
            }
            Kind::StoreFull => {
                small.as_ref().unwrap().fill();
                std::thread::sleep(Duration::from_millis(500 + random.below(3000)));
                target = true;
            }
            Kind::WrongClock => (source, target) = (true, true),
        }
        if source {
            pair.east.kill();
        }
        if target {
            pair.west.kill();
            // The daemon itself is to find the other half as the kill left them.
            if random.below(2) == 0 {
                let newest = newest_reads(&store, id);
                assert!(newest >= told, "{words}: point {newest} is the newest");
                read += 1;
            }
        }
        if kind == Kind::WrongClock {
            let shift = |random: &mut Random| {
                let offset = random.below(20 * 86_400) as i64 - 10 * 86_400;
                let path = library.as_ref().unwrap().display().to_string();
                let clock = ("FARHAVEN_TEST_CLOCK".to_owned(), offset.to_string());
                vec![("LD_PRELOAD".to_owned(), path), clock]
            };
            pair.east.environment = shift(&mut random);
            pair.west.environment = shift(&mut random);
        } else if source && target {
            pair.east.environment.clear();
            pair.west.environment.clear();
        }
        if let Some(small) = &small {
            small.free();
        }
        if source {
            pair.east.start();
        }
        if target {
            pair.west.start();
        }
        pair.link.cut(false);
        let west = pair.west.target("web");
        assert!(west.newest_point >= told, "{words}: {west:#?}");
        println!("{words}");
        let next = pair.west.until("the next point", PATIENCE, |view| {
            let web = view.standbys.into_iter().find(|web| web.name == "web");
            web.filter(|web| web.newest_point > told)
        });
        assert!(next.active.is_none());
        beats_on(&guest.console);
        if kill % TESTED == 0 {
            newest_runs(&pair.west);
            run += 1;
        }
        *done.entry(kind).or_default() += 1;
    }
    // At last the site is lost, and what was sealed runs.
    let last = guest.console.last_beat().unwrap();
    pair.east.until_sealed("web", 2, PATIENCE);
    pair.east.kill();
    drop(guest);
    pair.west.until("the link is down", PATIENCE, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web"]).good();
    let console = TestSite::console_of(&pair.west.target("web").active.unwrap());
    let beat = console.await_beat(last.number + 5, PATIENCE);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
    assert!(console.check(PATIENCE).is_ok());
    println!(
        "{kills} kills {done:?}: {read} newest points read to the last byte with the daemon dead, \
         {run} run and checked, 0 lost, in {:?}",
        begun.elapsed()
    );
}
