//! Planned moves that succeed, and moves that are cut short at any moment.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use super::*;

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Every heartbeat that a copy at west ever gave, over all of its launches.
fn beats_at_west(west: &TestSite, id: &str) -> Vec<u64> {
    let directory = west.dir.join("run").join(id);
    let launches = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let logs = launches.map(|l| std::fs::read(l.path().join("console.log")).unwrap_or_default());
    let numbers = logs.flat_map(|log| {
        let text = String::from_utf8_lossy(&log).into_owned();
        let beat = |line: &str| line.strip_prefix("HB ")?.split(' ').next()?.parse().ok();
        text.lines().filter_map(beat).collect::<Vec<u64>>()
    });
    numbers.collect()
}

/// Waits until the move has an end, and checks that the guest runs once.
/// True: at west.
#[track_caller]
fn ended_well(pair: &Pair, name: &str, guest: &GuestVm) -> bool {
    let moved = pair.east.until("an end of the move", PATIENCE, |view| {
        match view.guests.into_iter().find(|g| g.name == name)?.phase {
            Phase::Moved => Some(true),
            Phase::Protected | Phase::Shipping => Some(false),
            _ => None,
        }
    });
    let id = pair.east.source(name).id;
    let last = guest.console.last_beat().unwrap().number;
    if moved {
        let console = runs_at(&pair.west, name);
        let first = *beats_at_west(&pair.west, &id).first().unwrap();
        assert!(first <= last + 1, "beats from {last} to {first} are lost");
        assert!(first + 1 >= last, "both ran: {first} there, {last} here");
        assert!(lives(guest), "the source's QEMU is kept, stopped");
        assert_eq!(guest.console.last_beat().unwrap().number, last);
        whole(&console);
    } else {
        assert_eq!(beats_at_west(&pair.west, &id), [0; 0], "it never ran there");
        assert!(pair.west.target(name).active.is_none());
        guest.console.await_beat(last + 3, PATIENCE);
    }
    moved
}

#[test]
fn a_move_succeeds_or_leaves_the_guest_running_here() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = small(&dir.path().join("g")) else {
        return;
    };
    // West's QEMU is a script that can be broken.
    let qemu = dir.path().join("qemu-wrapped");
    let works = "#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n";
    std::fs::write(&qemu, works).unwrap();
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755)).unwrap();
    let more = format!("qemu = \"{}\"", qemu.display());
    let mut pair = Pair::start(LINK, "", &more);
    protect(&pair, "web", &guest);

    std::fs::write(&qemu, "#!/bin/sh\necho no such machine >&2\nexit 1\n").unwrap();
    pair.east.cli(&["move", "web"]).bad("no such machine");
    assert!(!ended_well(&pair, "web", &guest));
    // Not even stopped by force when it cannot be run.
    pair.west
        .cli(&["failover", "web", "--force"])
        .bad("no such machine");
    assert!(beats(&guest.console));
    std::fs::write(&qemu, works).unwrap();
    sealed(&pair.east, "web");
    pair.east.cli(&["take-back", "web"]).bad("--force");
    pair.east
        .cli(&["take-back", "web", "--force"])
        .bad("not held");

    // West is killed as the move begins.
    std::thread::scope(|scope| {
        let told = scope.spawn(|| pair.east.cli(&["move", "web"]));
        pair.east.until("moving", PATIENCE, |v| {
            (v.guests[0].phase == Phase::Moving).then_some(())
        });
        kill(pair.west.pid());
        assert!(!told.join().unwrap().ok);
    });
    assert!(beats(&guest.console));
    pair.west.kill();
    pair.west.start();
    sealed(&pair.east, "web");

    // Its next attempt at protection begins a moment after the one that failed.
    phase(&pair.east, "web", Phase::Protected);
    sealed(&pair.east, "web");
    pair.east.cli(&["move", "web"]).good();
    assert!(ended_well(&pair, "web", &guest));
    pair.east.kill();
    pair.east.start();
    assert!(phase(&pair.east, "web", Phase::Moved).contains("west"));
    pair.east.cli(&["move", "web"]).bad("runs at 'west'");
    guest.kill();
}

#[test]
fn a_move_cut_short_at_any_moment_leaves_one_guest() {
    let runs: u64 = std::env::var("FARHAVEN_MOVES").map_or(3, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Pair::start(LINK, "", "");
    let seed: u64 = std::env::var("FARHAVEN_SEED").map_or(1, |n| n.parse().unwrap());
    let mut state: u64 = seed;
    let mut random = move |from: u64, to: u64| {
        // A step of a linear congruential generator; its upper half is random enough.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        from + (state >> 33) % (to - from)
    };
    let mut current: Option<(String, GuestVm)> = None;
    let mut ends = Vec::new();
    for run in 0..runs {
        let (name, guest) = match current.take() {
            Some(same) => same,
            None => {
                let name = format!("g{run}");
                let Some(guest) = small(&dir.path().join(&name)) else {
                    return;
                };
                protect(&pair, &name, &guest);
                (name, guest)
            }
        };
        sealed(&pair.east, &name);
        let kind = run % 3;
        // From the moment that it is held: the last data, the seal, its answer.
        let delay = Duration::from_millis(random(0, 450));
        let (east, west, link) = (&pair.east, &mut pair.west, &pair.link);
        std::thread::scope(|scope| {
            let told = scope.spawn(|| east.cli(&["move", &name]));
            let deadline = Instant::now() + PATIENCE;
            while !told.is_finished() && Instant::now() < deadline {
                let phase = east.source(&name).phase;
                if matches!(phase, Phase::Held | Phase::Moved) {
                    break;
                }
            }
            std::thread::sleep(delay);
            match kind {
                0 => {
                    link.cut(true);
                    std::thread::sleep(Duration::from_millis(random(500, 13_000)));
                    link.cut(false);
                }
                1 => kill(east.pid()),
                _ => {
                    west.kill();
                    std::thread::sleep(Duration::from_millis(500));
                    west.start();
                }
            }
        });
        if kind == 1 {
            pair.east.kill();
            pair.east.start();
        }
        let moved = ended_well(&pair, &name, &guest);
        ends.push((kind, delay, moved));
        if !moved {
            current = Some((name, guest));
        }
    }
    println!("{ends:?}");
}

#[test]
fn a_guest_taken_back_by_force_ends_the_one_that_runs_at_the_peer() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small(&dir.path().join("g")) else {
        return;
    };
    // The peer's word takes long enough to be lost, and longer than a blackout may be.
    let pair = Pair::start("200mbit,800ms", "", "");
    protect(&pair, "web", &guest);
    sealed(&pair.east, "web");
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| pair.east.cli(&["move", "web", "--accept-pause"]));
        pair.west.until("it runs at west", PATIENCE, |view| {
            view.standbys[0].active.as_ref().map(drop)
        });
        pair.link.cut(true);
        let there = runs_at(&pair.west, "web");
        let told = phase(&pair.east, "web", Phase::Held);
        assert!(!beats(&guest.console), "held until the peer's word comes");
        let trouble = pair.east.until("it says how to go on", PATIENCE, |view| {
            let trouble = view.guests[0].trouble.clone();
            trouble.contains("take-back web --force").then_some(trouble)
        });
        println!("{told} / {trouble}");

        // The operator says that west is lost for good. It is not.
        pair.east.cli(&["take-back", "web"]).bad("--force");
        pair.east.cli(&["take-back", "web", "--force"]).good();
        answer.join().unwrap().bad("not known");
        assert!(beats(&guest.console), "it runs here again");
        whole(&guest.console);
        assert!(beats(&there), "west has not heard of it");
        pair.link.cut(false);
        let fenced = pair.west.until("west's copy is stopped", PATIENCE, |view| {
            let web = &view.standbys[0];
            (web.active.is_none() && web.trouble.contains("fenced")).then(|| web.trouble.clone())
        });
        println!("{fenced}");
        assert!(!beats(&there), "the older term runs no more");
        assert!(beats(&guest.console));
    });
    pair.west.cli(&["failover", "web"]).bad("is alive");
    sealed(&pair.east, "web");
}

/// More changes than the link carries: only a slower guest can be moved in time;
/// where it is not slow enough even so, that is told.
#[test]
fn a_move_of_a_guest_that_changes_faster_than_the_link_throttles_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.load=noise:6 farhaven.noise=2048 farhaven.fill=8 farhaven.pages=1024"
            .to_owned(),
        extra: Vec::new(),
    };
    let Some(guest) = GuestVm::start(dir.path(), &options) else {
        return;
    };
    let pair = Pair::start(LINK, "[protect]\nmax_blackout = \"1s\"", "");
    pair.protect("web", &guest, "2s");
    pair.east.until_sealed("web", 2, PATIENCE);
    pair.link.set("24mbit,20ms".parse().unwrap());
    pair.east.until_sealed("web", 4, PATIENCE);
    let moved = pair.east.cli(&["move", "web", "--json"]).good();
    println!("{}", moved.out);
    for line in pair
        .east
        .log()
        .lines()
        .filter(|l| l.contains("a round of the move"))
    {
        println!("{line}");
    }
    let report: farhaven::site::view::MoveReport = serde_json::from_str(&moved.out).unwrap();
    assert!(report.note.contains("throttled"), "{}", report.note);
    let console = runs_at(&pair.west, "web");
    whole(&console);
}

/// A guest that was moved, and whose rollback was under way when the daemon at the target
/// died and was started again: the sites, the guest and its console at the target.
fn rollback_in_doubt(dir: &Path, west: &str) -> Option<(Pair, GuestVm, Console)> {
    let guest = small(dir)?;
    let mut pair = Pair::start("200mbit,10ms", "", west);
    protect(&pair, "web", &guest);
    pair.east.cli(&["move", "web", "--accept-pause"]).good();
    phase(&pair.east, "web", Phase::Moved);
    let console = runs_at(&pair.west, "web");
    let before = pair.west.target("web").term;
    // Time for a kill between the order to go back and its answer.
    pair.link.set("200mbit,2s".parse().unwrap());
    std::thread::scope(|scope| {
        let told = scope.spawn(|| pair.west.cli(&["rollback", "web"]));
        // Stopped here, its term given away, and the order on its way.
        pair.west.until("on its way back", PATIENCE, |view| {
            let standby = view.standbys.into_iter().find(|s| s.name == "web")?;
            (standby.term > before && standby.active?.going_back).then_some(())
        });
        kill(pair.west.pid());
        assert!(!told.join().unwrap().ok);
    });
    pair.west.kill();
    Some((pair, guest, console))
}

fn is_in_doubt(west: &TestSite) {
    west.until("known to be in doubt", PATIENCE, |view| {
        let standby = view.standbys.into_iter().find(|s| s.name == "web")?;
        standby.active?.going_back.then_some(())
    });
}

/// What is stopped here for a rollback is the newest there is until the source has
/// answered, and the next daemon asks on.
#[test]
fn a_rollback_in_doubt_outlives_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let Some((mut pair, guest, console)) = rollback_in_doubt(&dir.path().join("g"), "") else {
        return;
    };
    pair.west.start();
    is_in_doubt(&pair.west);
    pair.link.set("200mbit,10ms".parse().unwrap());
    let stood = console.last_beat().unwrap().number;
    phase(&pair.east, "web", Phase::Protected);
    assert!(beats(&guest.console));
    pair.west.until("all of it gone", PATIENCE, |view| {
        let standby = view.standbys.into_iter().find(|s| s.name == "web")?;
        standby.active.is_none().then_some(())
    });
    assert_eq!(console.last_beat().map_or(stood, |beat| beat.number), stood);
    whole(&guest.console);
}

/// With the source lost for good it goes on here by an operator's word, and the copying of
/// its disks goes on, as of any guest that was taken over.
#[test]
fn a_rollback_in_doubt_that_is_taken_back_goes_on_and_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let slowly = "hydrate_rate = \"4mbit\"";
    let Some((mut pair, _guest, console)) = rollback_in_doubt(&dir.path().join("g"), slowly) else {
        return;
    };
    pair.east.kill();
    pair.west.start();
    is_in_doubt(&pair.west);
    let active = pair.west.target("web").active.unwrap();
    assert!(!active.hydrated, "it was copied before: {active:?}");
    let stood = console.last_beat().unwrap().number;
    pair.west.cli(&["take-back", "web", "--force"]).good();
    console.await_beat(stood + 2, PATIENCE);
    pair.west.until("being copied", PATIENCE, |view| {
        let standby = view.standbys.into_iter().find(|s| s.name == "web")?;
        let (done, _) = standby.active?.hydration?;
        (done > 0).then_some(())
    });
    whole(&console);
}
