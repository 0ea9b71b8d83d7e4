//! The promises seen from where a guest is taken over: terms, moves that fail
//! at every moment, daemons that die, stores that fill up, catalogues that are lost.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

#[path = "sites_target/agents.rs"]
mod agents;
#[path = "sites_target/drills.rs"]
mod drills;
#[path = "sites_target/groups.rs"]
mod groups;
#[path = "sites_target/moves.rs"]
mod moves;
#[path = "sites_target/networks.rs"]
mod networks;
#[path = "sites_target/powers.rs"]
mod powers;
#[path = "sites_target/runs.rs"]
mod runs;
#[path = "sites_target/stores.rs"]
mod stores;
#[path = "sites_target/terms.rs"]
mod terms;

use std::path::Path;
use std::time::Duration;

use farhaven::site::view::Phase;
use support::site::{Pair, TestSite};
use support::{Console, GuestOptions, GuestVm};

const LINK: &str = "200mbit,20ms";
const PATIENCE: Duration = Duration::from_secs(90);

/// A small guest, so that a first copy takes a second or two.
fn small(directory: &Path) -> Option<GuestVm> {
    std::fs::create_dir_all(directory).unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.load=database farhaven.fill=8 farhaven.pages=2048".to_owned(),
        extra: Vec::new(),
    };
    GuestVm::start(directory, &options)
}

/// Adds the guest at east and protects it to west.
fn protect(pair: &Pair, name: &str, guest: &GuestVm) {
    guest.console.await_beat(5, PATIENCE);
    let qmp = guest.qmp.to_str().unwrap();
    pair.east.cli(&["guest", "add", name, "--qmp", qmp]).good();
    pair.east
        .cli(&["protect", name, "--to", "west", "--rpo", "1s"])
        .good();
    sealed(&pair.east, name);
}

/// The site goes on with these policy files.
fn follows(site: &mut TestSite, files: &Path) {
    assert!(site.terminate());
    let config = site.dir.join("site.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let named = format!("[site]\npolicy_files = \"{}\"", files.display());
    std::fs::write(&config, text.replacen("[site]", &named, 1)).unwrap();
    site.start();
}

/// All are known at east, and protected to west as one by its policy files.
fn protected_as_one(pair: &Pair, guests: &[(&str, GuestVm)]) {
    for (name, guest) in guests {
        guest.console.await_beat(5, PATIENCE);
        let qmp = guest.qmp.to_str().unwrap();
        pair.east.cli(&["guest", "add", name, "--qmp", qmp]).good();
    }
    whole_point(pair);
}

fn whole_point(pair: &Pair) {
    pair.west.until("a whole point", PATIENCE * 4, |view| {
        view.groups.first()?.rpo_ms
    });
}

/// Waits for one more sealed point.
#[track_caller]
fn sealed(east: &TestSite, name: &str) {
    let before = east.source(name).newest_point;
    east.until("another point", PATIENCE, |view| {
        let guest = view.guests.into_iter().find(|g| g.name == name)?;
        (guest.newest_point > before).then_some(())
    });
}

#[track_caller]
fn phase(east: &TestSite, name: &str, wanted: Phase) -> String {
    east.until(&format!("{wanted:?}"), PATIENCE, |view| {
        let guest = view.guests.into_iter().find(|g| g.name == name)?;
        (guest.phase == wanted).then_some(guest.trouble)
    })
}

/// Does it beat?
fn beats(console: &Console) -> bool {
    let before = console.last_beat().map_or(0, |b| b.number);
    std::thread::sleep(Duration::from_millis(1200));
    console.last_beat().map_or(0, |b| b.number) > before
}

/// The console of the guest that runs at west; it beats and checks itself.
#[track_caller]
fn runs_at(west: &TestSite, name: &str) -> Console {
    let active = west.target(name).active.expect("it runs there");
    let console = TestSite::console_of(&active);
    let first = console.await_beat(1, PATIENCE);
    console.await_beat(first.number + 5, PATIENCE);
    console
}

#[track_caller]
fn whole(console: &Console) {
    let check = console.check(PATIENCE);
    assert!(check.is_ok(), "{check:?}");
}

/// Its QEMU lives, and is no zombie.
fn lives(guest: &GuestVm) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", guest.pid())).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}
