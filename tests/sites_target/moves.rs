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
        assert!(!lives(guest), "the source's QEMU has ended");
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
