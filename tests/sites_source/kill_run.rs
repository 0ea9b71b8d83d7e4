//! Kills of every kind: both daemons of a real guest under load die at random moments, the
//! link is cut, the store's filesystem is full, the clocks are wrong. After each, nothing
//! that was acknowledged is missing, the newest point reads to its last byte (alone, or with
//! all that is stored), and the next one is sealed. At the end the site is lost: the guest runs at the other, and checks itself.
//!
//! A few of them are a test. So many kills as are asked for, in a schedule that a seed
//! makes again (not the instants within it: the daemons are real):
//!
//!     FARHAVEN_KILLS=300 [FARHAVEN_KILLS_SEED=7] cargo test --profile ci \
//!         --test sites_source kills_of_every_kind -- --nocapture

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

const PATIENCE: Duration = Duration::from_secs(240);
/// Every so many faults of the long form the newest point is run.
const TESTED: usize = 20;
/// Most days that a clock is wrong, either way.
const DAYS: u64 = 10;

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
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: not a number: {text}")),
    )
}

struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % most
    }

    fn often(&mut self, of_ten: u64) -> bool {
        self.below(10) < of_ten
    }

    fn millis(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most))
    }
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

use Kind::{Both, LinkCut, Source, StoreFull, Target, WrongClock};

/// One of the schedule.
#[derive(Debug, Clone)]
struct Fault {
    kind: Kind,
    /// From the point before until it.
    after: Duration,
    /// How long a cut link or a full store is one.
    lasts: Duration,
    /// Whose daemon is killed.
    source: bool,
    target: bool,
    /// The store is read while its daemon is dead. Else the daemon finds it as the kill left it.
    read: bool,
    /// By which the clocks of source and target are wrong.
    seconds: [i64; 2],
}

impl Fault {
    fn kills(&self) -> u64 {
        u64::from(self.source) + u64::from(self.target)
    }

    fn new(kind: Kind, random: &mut Random) -> Fault {
        let (source, target) = match kind {
            Source => (true, false),
            Target => (false, true),
            Both | WrongClock => (true, true),
            LinkCut => (random.often(5), random.often(5)),
            StoreFull => (random.often(3), random.often(7)),
        };
        let mut wrong = || (random.below(2 * DAYS * 86_400) as i64) - (DAYS * 86_400) as i64;
        let seconds = [wrong(), wrong()];
        Fault {
            kind,
            after: random.millis(2000),
            lasts: Duration::from_millis(500) + random.millis(2500),
            source,
            target,
            read: random.often(5),
            seconds,
        }
    }
}

/// As many faults as kill so many daemons, each kind as often as `deck` has it; only
/// one deck of them without a number.
fn schedule(seed: u64, deck: &[Kind], kills: Option<u64>) -> Vec<Fault> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut all: Vec<Fault> = Vec::new();
    let killed = |all: &[Fault]| all.iter().map(Fault::kills).sum::<u64>();
    loop {
        let mut deck = deck.to_vec();
        while !deck.is_empty() {
            let kind = deck.swap_remove(random.below(deck.len() as u64) as usize);
            all.push(Fault::new(kind, &mut random));
            if kills.is_some_and(|kills| killed(&all) >= kills) {
                return all;
            }
        }
        if kills.is_none() {
            return all;
        }
    }
}

/// A small filesystem for the store.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Option<Small> {
        fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=512m,mode=700", "farhaven-test"]);
        let mounted = mount.arg(at).status().is_ok_and(|status| status.success());
        mounted.then(|| Small(at.to_owned()))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    fn fill(&self) {
        let mut file = File::create(self.ballast()).unwrap();
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
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
    cc.args(["-shared", "-fPIC", "-O1", "-o"]);
    cc.args([&library, &source]).arg("-ldl");
    cc.status()
        .is_ok_and(|status| status.success())
        .then_some(library)
}

/// Reads the newest point of the one peer whose daemon is dead, every byte verified.
fn newest_reads(stores: &Path, guest: GuestId) -> u64 {
    let mut found = fs::read_dir(stores)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let store = found.find(|path| path.is_dir()).expect("a peer's store");
    let (store, report) = Store::open(&store, StoreOptions::default()).unwrap();
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
    is_whole(&console, 1);
    west.cli(&["test", "cleanup", "web"]).good();
}

#[track_caller]
fn is_whole(console: &Console, from: u64) {
    let first = console.await_beat(from, PATIENCE);
    let beat = console.await_beat(first.number + 3, PATIENCE);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
    let check = console.check(PATIENCE);
    assert!(check.is_ok(), "{check:?}");
}

/// What the faults fall on.
struct Run {
    pair: Pair,
    small: Option<Small>,
    library: Option<PathBuf>,
    stores: PathBuf,
    guest: GuestId,
    /// Newest points that were read to the last byte, with the daemon dead.
    read: u64,
    /// Whole stores that were read beside the daemon's work, the newest point in them.
    scrubbed: u64,
}

impl Run {
    /// The fault, and what of it is left: the point that is sealed after it.
    fn suffer(&mut self, fault: &Fault) -> (u64, u64) {
        std::thread::sleep(fault.after);
        match fault.kind {
            LinkCut => self.pair.link.cut(true),
            StoreFull => self.small.as_ref().unwrap().fill(),
            _ => {}
        }
        if let LinkCut | StoreFull = fault.kind {
            std::thread::sleep(fault.lasts);
        }
        // What the source was told to be sealed must be there, whatever comes.
        let told = self.pair.east.source("web").newest_point;
        if fault.source {
            self.pair.east.kill();
        }
        if fault.target {
            self.pair.west.kill();
        }
        if let Some(small) = &self.small {
            small.free();
        }
        let mut newest = None;
        if fault.target && fault.read {
            newest = Some(newest_reads(&self.stores, self.guest));
            self.read += 1;
        }
        // Else a point that came after the restart could stand for one that is lost.
        self.pair.link.cut(newest.is_none());
        self.clocks(fault);
        if fault.target {
            self.pair.west.start();
        }
        if fault.source {
            self.pair.east.start();
        }
        let found = newest.unwrap_or_else(|| self.pair.west.target("web").newest_point);
        assert!(
            found >= told,
            "point {told} was told to be sealed, {found} is the newest\n{}",
            self.pair.west.log()
        );
        self.pair.link.cut(false);
        let held = self.pair.west.target("web").newest_point;
        let next = self.pair.west.until("the next point", PATIENCE, |view| {
            let web = view.standbys.into_iter().find(|web| web.name == "web");
            web.filter(|web| web.newest_point > held)
        });
        assert!(next.active.is_none(), "it runs twice: {next:#?}");
        // What was not read while its daemon was dead is read beside its work: all of it.
        if newest.is_none() {
            let scrub = ["scrub", "--rate", "none", "--json"];
            self.pair.west.cli(&scrub).good();
            self.scrubbed += 1;
        }
        (told, next.newest_point)
    }

    /// For the next start of the daemons; right again once both were killed.
    fn clocks(&mut self, fault: &Fault) {
        if !(fault.source && fault.target) {
            return;
        }
        for (site, seconds) in [&mut self.pair.east, &mut self.pair.west]
            .into_iter()
            .zip(fault.seconds)
        {
            site.environment.clear();
            if let (WrongClock, Some(library)) = (fault.kind, &self.library) {
                let library = library.display().to_string();
                site.environment.push(("LD_PRELOAD".to_owned(), library));
                let off = ("FARHAVEN_TEST_CLOCK".to_owned(), seconds.to_string());
                site.environment.push(off);
            }
        }
    }
}

#[test]
fn kills_of_every_kind() {
    let kills = number("FARHAVEN_KILLS");
    let dir = tempfile::Builder::new().prefix("fh").tempdir().unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.load=database farhaven.fill=8 farhaven.pages=2048".to_owned(),
        extra: Vec::new(),
    };
    let Some(guest) = GuestVm::start(dir.path(), &options) else {
        return;
    };
    let seed = number("FARHAVEN_KILLS_SEED").unwrap_or(u64::from(std::process::id()));
    let stores = dir.path().join("stores");
    let (small, library) = (Small::mount(&stores), clock(dir.path()));
    let mut deck = match kills {
        None => vec![Source, Target, Both, LinkCut],
        Some(_) => [Source, Target, Source, Target, Both, LinkCut].repeat(2),
    };
    match &small {
        Some(_) => deck.push(StoreFull),
        None => println!("no filesystem can be mounted here: no full store among the faults"),
    }
    match &library {
        Some(_) => deck.push(WrongClock),
        None => println!("no C compiler here: no wrong clock among the faults"),
    }
    let faults = schedule(seed, &deck, kills);
    let asked = kills.map_or(String::new(), |kills| format!("FARHAVEN_KILLS={kills} "));
    println!(
        "the same schedule again: {asked}FARHAVEN_KILLS_SEED={seed} cargo test --profile ci \
         --test sites_source kills_of_every_kind -- --nocapture"
    );

    let kept =
        "[protect.retention]\nall = \"5s\"\nthen_every = \"5s\"\nuntil = \"20s\"\nnewest = 2";
    let store = format!("[store]\ndir = \"{}\"\nmin_free = \"0B\"", stores.display());
    let pair = Pair::start("200mbit,20ms,0.1%", kept, &store);
    pair.protect("web", &guest, "1s");
    pair.east.until_sealed("web", 2, PATIENCE);
    let id: GuestId = pair.east.source("web").id.parse().unwrap();
    let mut run = Run {
        pair,
        small,
        library,
        stores,
        guest: id,
        read: 0,
        scrubbed: 0,
    };
    let begun = Instant::now();
    let mut done: BTreeMap<Kind, u64> = BTreeMap::new();
    let (mut killed, mut tested) = (0, 0);
    for (at, fault) in faults.iter().enumerate() {
        println!("fault {} of {}: {fault:?}", at + 1, faults.len());
        let (told, next) = run.suffer(fault);
        let last = guest.console.last_beat().unwrap();
        guest.console.await_beat(last.number + 2, PATIENCE);
        killed += fault.kills();
        *done.entry(fault.kind).or_default() += 1;
        if kills.is_some() && (at + 1) % TESTED == 0 {
            newest_runs(&run.pair.west);
            tested += 1;
        }
        println!(
            "  {killed} kills: point {told} was told to be sealed, is there; then {next}; {} s",
            begun.elapsed().as_secs()
        );
    }

    // At last the site is lost, and what was sealed runs.
    let last = guest.console.last_beat().unwrap();
    let before = run.pair.east.source("web").points_sealed;
    run.pair.east.until_sealed("web", before + 2, PATIENCE);
    run.pair.east.kill();
    drop(guest);
    run.pair.west.until("the link is down", PATIENCE, |view| {
        (!view.peers[0].connected).then_some(())
    });
    run.pair.west.cli(&["failover", "web"]).good();
    let active = run.pair.west.target("web").active.unwrap();
    is_whole(&TestSite::console_of(&active), last.number);
    println!(
        "{killed} daemons killed in {} faults {done:?}: {} newest points read to the last byte \
         with the daemon dead, {} whole stores beside its work, {} run and checked, 0 lost, \
         in {:?} (seed {seed})",
        faults.len(),
        run.read,
        run.scrubbed,
        tested + 1,
        begun.elapsed()
    );
}
