//! The link is cut, the target dies, operators pause and end: the guest never
//! waits, what was acknowledged is not sent again, and all is told.

use std::net::UdpSocket;
use std::time::Duration;

use farhaven::site::view::Phase;

use crate::support::site::Pair;
use crate::support::{GuestOptions, GuestVm};
use crate::watch::{Pulse, beats_on, traces};

const COPY: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

#[test]
fn the_link_and_the_target_fail_and_protection_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = GuestVm::start(dir.path(), &GuestOptions::default()) else {
        return;
    };
    let mut pair = Pair::start("100mbit,80ms,0.1%", "", "");
    pair.protect("web", &guest, "2s");

    first_copy_is_interrupted(&mut pair);
    link_is_cut_in_steady_state(&mut pair, &guest);
    target_dies_in_steady_state(&mut pair, &guest);
    garbage_is_not_heard(&pair);
    operators_pause_and_end(&pair, &guest);
    guest_dies(&pair, &mut guest);
}

fn first_copy_is_interrupted(pair: &mut Pair) {
    pair.west.until("20 MB arrived", COPY, |v| {
        (v.peers[0].received_bytes > 20_000_000).then_some(())
    });
    assert_eq!(pair.east.source("web").phase, Phase::FirstCopy);
    pair.link.cut(true);
    std::thread::sleep(Duration::from_secs(6));
    let held = pair.west.peer().received_bytes;
    pair.link.cut(false);
    pair.west.until("on with the copy", COPY, |v| {
        (v.peers[0].received_bytes > held + 20_000_000).then_some(())
    });
    pair.west.kill();
    std::thread::sleep(Duration::from_secs(1));
    pair.west.start();
    let sealed = pair.east.until_sealed("web", 1, COPY);
    let peer = pair.east.peer();
    println!(
        "first copy: {} sent as batches, {} resent, {} UDP",
        sealed.wan_bytes, peer.resent_bytes, peer.sent_bytes
    );
    // What was on its way at the cut and at the kill: the link's product is
    // 1 MB, its queue as much. What waited in QUIC's queues was not sent yet.
    assert!(
        peer.sent_bytes < sealed.wan_bytes * 11 / 10,
        "{peer:?} {sealed:?}"
    );
    // Sent again is what the memory of the killed daemon held, and nothing of
    // what its store has.
    assert!(
        peer.resent_bytes < sealed.wan_bytes / 100 + MIB,
        "{peer:?} {sealed:?}"
    );
    assert_eq!(pair.west.peer().repeated_bytes, 0);
}

fn link_is_cut_in_steady_state(pair: &mut Pair, guest: &GuestVm) {
    pair.east.until_sealed("web", 3, COPY);
    let pulse = Pulse::of(&guest.console);
    pair.link.cut(true);
    let told = pair.east.until(
        "the RPO grows and it is told",
        Duration::from_secs(15),
        |v| {
            let web = &v.guests[0];
            let warns = web.rpo_health.as_deref() != Some("ok") && web.rpo_ms > Some(4000);
            (warns && web.trouble.contains("west")).then(|| web.trouble.clone())
        },
    );
    println!("told: {told}");
    std::thread::sleep(Duration::from_secs(8));
    let gap = pulse.longest_gap();
    println!("longest gap of the heartbeat with the link cut: {gap:?}");
    assert!(gap < Duration::from_millis(2500), "{gap:?}");
    // A daemon that finds no peer tells so, too.
    pair.east.kill();
    pair.east.start();
    let told = pair
        .east
        .until("waiting for the peer", Duration::from_secs(15), |v| {
            let web = &v.guests[0];
            (web.phase == Phase::Connecting && web.trouble.contains("west"))
                .then(|| web.trouble.clone())
        });
    // And how old the newest point is, which it has not heard from the peer.
    let web = pair.east.source("web");
    assert!(
        web.rpo_ms > Some(8000) && web.rpo_health.as_deref() == Some("critical"),
        "{web:?}"
    );
    println!("told after a restart: {told}");
    beats_on(&guest.console);
    let before = pair.east.source("web").points_sealed;
    pair.link.cut(false);
    pair.east
        .until("all is well again", Duration::from_secs(30), |v| {
            let web = &v.guests[0];
            let well = web.points_sealed >= before + 2 && web.rpo_health.as_deref() == Some("ok");
            (well && web.trouble.is_empty()).then_some(())
        });
}

fn target_dies_in_steady_state(pair: &mut Pair, guest: &GuestVm) {
    let points = pair.west.target("web").points;
    let before = pair.east.source("web").points_sealed;
    pair.west.kill();
    std::thread::sleep(Duration::from_secs(3));
    beats_on(&guest.console);
    pair.west.start();
    assert!(pair.west.target("web").points >= points);
    pair.east.until_sealed("web", before + 2, COPY);
}

fn garbage_is_not_heard(pair: &Pair) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for length in (0..1400).step_by(7) {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (word >> 33) as u8
            })
            .collect();
        for listener in [pair.east.listen, pair.west.listen] {
            let _ = socket.send_to(&bytes, listener);
        }
    }
    let before = pair.east.source("web").points_sealed;
    pair.east.until_sealed("web", before + 2, COPY);
}

fn operators_pause_and_end(pair: &Pair, guest: &GuestVm) {
    let east = &pair.east;
    east.cli(&["peer", "remove", "west"]).bad("unprotect");
    east.cli(&["guest", "remove", "web"]).bad("unprotect");
    pair.west.cli(&["points", "web", "--json"]).good();

    east.cli(&["pause", "web"]).good();
    east.until("paused", COPY, |v| {
        (v.guests[0].phase == Phase::Paused).then_some(())
    });
    let before = east.source("web");
    std::thread::sleep(Duration::from_secs(5));
    let paused = east.source("web");
    assert_eq!(paused.points_sealed, before.points_sealed);
    assert!(
        paused.rpo_ms > Some(4500) && paused.rpo_health.as_deref() != Some("ok"),
        "{paused:?}"
    );
    beats_on(&guest.console);
    east.cli(&["resume", "web"]).good();
    let resumed = east.until_sealed("web", before.points_sealed + 2, COPY);
    assert!(
        resumed.wan_bytes - before.wan_bytes < 24 * MIB,
        "{resumed:?}"
    );

    // Ended while it runs, and while it is paused: nothing of ours stays in QEMU.
    east.cli(&["unprotect", "web"]).good();
    assert_eq!(traces(guest), (Vec::new(), "running".to_owned()));
    assert!(pair.west.target("web").points > 0);
    east.cli(&["protect", "web", "--to", "west", "--rpo", "2s"])
        .good();
    let again = east.until_sealed("web", 1, COPY);
    println!("protected again: {} bytes", again.wan_bytes);
    assert!(again.wan_bytes < 24 * MIB, "{again:?}");
    east.cli(&["pause", "web"]).good();
    east.until("paused", COPY, |v| {
        (v.guests[0].phase == Phase::Paused).then_some(())
    });
    let before = bytes_below(&pair.west.dir.join("store"));
    east.cli(&["unprotect", "web", "--discard"]).good();
    assert_eq!(traces(guest), (Vec::new(), "running".to_owned()));
    assert!(
        pair.west.view().standbys.is_empty(),
        "{:#?}",
        pair.west.view().standbys
    );
    pair.west.cli(&["points", "web"]).bad("no guest 'web'");
    pair.west
        .cli(&["failover", "web", "--force"])
        .bad("no guest 'web'");
    let store = bytes_below(&pair.west.dir.join("store"));
    println!("the store before the discard: {before} bytes, after: {store}");
    // The segment that is being written stays.
    assert!(
        store < before / 2 + MIB,
        "{store} of {before} bytes are still in the store"
    );
    east.cli(&["protect", "web", "--to", "west", "--rpo", "2s"])
        .good();
    east.until_sealed("web", 1, COPY);
}

fn guest_dies(pair: &Pair, guest: &mut GuestVm) {
    guest.kill();
    let told = pair.east.until("lost", Duration::from_secs(20), |v| {
        let web = &v.guests[0];
        (web.phase == Phase::Lost).then(|| web.trouble.clone())
    });
    println!("told: {told}");
    assert!(!told.is_empty());
    // It stays told while the attach is tried again and again.
    for _ in 0..40 {
        let web = pair.east.source("web");
        assert!(
            web.phase == Phase::Lost && !web.trouble.is_empty(),
            "{web:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(pair.west.target("web").points > 0);
    pair.east
        .cli(&["move", "web"])
        .bad("not protected at this moment");
    pair.east.cli(&["unprotect", "web"]).good();
    pair.east.cli(&["guest", "remove", "web"]).good();
}

fn bytes_below(directory: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type().unwrap().is_dir() {
            true => bytes_below(&entry.path()),
            false => entry.metadata().unwrap().len(),
        })
        .sum()
}
