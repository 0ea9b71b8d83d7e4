//! The source's daemon dies at any moment: the guest runs on, nothing that was
//! acknowledged is sent again, and the newest point restores.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use farhaven::site::view::Phase;

use crate::support::site::{Pair, TestSite};
use crate::support::{GuestOptions, GuestVm};
use crate::watch::{beats_on, traces};

const COPY: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const KILLS: u64 = 15;

#[test]
fn the_source_s_daemon_dies_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = GuestVm::start(dir.path(), &GuestOptions::default()) else {
        return;
    };
    let mut pair = Pair::start("100mbit,40ms,0.1%", "", "");
    pair.protect("web", &guest, "1s");

    killed_in_the_first_copy(&mut pair);
    killed_in_steady_state(&mut pair, &guest);
    told_to_stop(&mut pair, &guest);
    killed_again_and_again(&mut pair, &guest);
    warm_memory_is_removed(&pair);

    let last = guest.console.last_beat().unwrap();
    pair.east.kill();
    guest.kill();
    pair.west.until("the link is down", COPY, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web"]).good();
    let active = pair.west.target("web").active.unwrap();
    let console = TestSite::console_of(&active);
    let beat = console.await_beat(last.number + 20, COPY);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
    assert!(console.check(COPY).is_ok());
}

fn killed_in_the_first_copy(pair: &mut Pair) {
    // The whole takes about 108 MB.
    let arrived = pair.west.until("60 MB arrived", COPY, |v| {
        Some(v.peers[0].received_bytes).filter(|bytes| *bytes > 60_000_000)
    });
    assert_eq!(pair.east.source("web").phase, Phase::FirstCopy);
    pair.east.kill();
    pair.east.start();
    let after = pair.east.until_sealed("web", 1, COPY);
    let peer = pair.east.peer();
    println!(
        "killed after {arrived} bytes; then {} more, {} on the wire",
        after.wan_bytes, peer.sent_bytes
    );
    assert!(after.wan_bytes < arrived, "{after:?}");
    assert!(peer.sent_bytes < arrived, "{peer:?}");
}

fn killed_in_steady_state(pair: &mut Pair, guest: &GuestVm) {
    pair.east.until_sealed("web", 3, COPY);
    pair.east.kill();
    beats_on(&guest.console);
    pair.east.start();
    let after = pair.east.until_sealed("web", 1, COPY);
    println!(
        "after a kill in steady state: {} bytes for the first point",
        after.wan_bytes
    );
    assert!(after.wan_bytes < 16 * MIB, "{after:?}");
    assert!(after.newest_point > 1);
}

fn told_to_stop(pair: &mut Pair, guest: &GuestVm) {
    // A client that never finishes its request must not keep the daemon.
    let mut hangs = UnixStream::connect(pair.east.dir.join("api.sock")).unwrap();
    hangs
        .write_all(b"POST /v1/guests HTTP/1.1\r\nHost: f\r\nContent-Len")
        .unwrap();
    for wait in [0, 130, 410, 770] {
        std::thread::sleep(Duration::from_millis(wait));
        let begun = std::time::Instant::now();
        assert!(pair.east.terminate(), "{}", pair.east.log());
        println!("stopped in {:?}", begun.elapsed());
        let (left, status) = traces(guest);
        assert_eq!(status, "running");
        // Nothing but the bitmaps, which tell the next daemon what to read.
        assert!(
            !left.is_empty()
                && left
                    .iter()
                    .all(|t| t.starts_with("query-block:")
                        || t.starts_with("query-named-block-nodes:")),
            "{left:?}"
        );
        beats_on(&guest.console);
        pair.east.start();
        let after = pair.east.until_sealed("web", 1, COPY);
        assert!(after.wan_bytes < 16 * MIB, "{after:?}");
    }
    drop(hangs);
}

fn killed_again_and_again(pair: &mut Pair, guest: &GuestVm) {
    let mut random = u64::from(std::process::id()) | 1;
    let mut waits = Vec::new();
    for kill in 0..KILLS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Half of them at once after the start, half when points are cut.
        if kill % 2 == 0 {
            pair.east.until_sealed("web", 1, COPY);
        }
        let wait = random % 1200;
        waits.push(wait);
        std::thread::sleep(Duration::from_millis(wait));
        pair.east.kill();
        pair.east.start();
    }
    println!("killed after {waits:?} ms");
    pair.east.until_sealed("web", 2, COPY);
    // A busy machine may stop it longer than the policy wants, once; a later cut clears that.
    pair.east.until("nothing hinders it", COPY, |view| {
        view.guests[0].trouble.is_empty().then_some(())
    });
    beats_on(&guest.console);
}

/// Somebody cleans /dev/shm at the peer: what is warm there is made anew, whole.
fn warm_memory_is_removed(pair: &Pair) {
    let text = std::fs::read_to_string(pair.west.dir.join("site.toml")).unwrap();
    let ram = text
        .split("ram_dir = \"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    let mut removed = 0;
    for guest in std::fs::read_dir(ram).unwrap() {
        for file in std::fs::read_dir(guest.unwrap().path()).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
            removed += 1;
        }
    }
    assert!(removed > 0);
    let before = pair.east.source("web").points_sealed;
    pair.east.until_sealed("web", before + 2, COPY);
}
