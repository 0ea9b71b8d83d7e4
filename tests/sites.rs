//! Two sites and a guest: protected, lost, taken over.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::site::{Pair, TestSite};
use support::{GuestOptions, GuestVm};

const LINK: &str = "100mbit,80ms,0.1%";
const COPY: Duration = Duration::from_secs(120);

#[test]
fn a_lost_site_s_guest_runs_on_at_the_peer() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = GuestVm::start(dir.path(), &GuestOptions::default()) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    guest.console.await_beat(20, COPY);
    let qmp = guest.qmp.to_str().unwrap().to_owned();
    pair.east
        .cli(&["guest", "add", "web", "--qmp", &qmp])
        .good();
    pair.east.cli(&["guest", "check", "web"]).good();
    pair.east
        .cli(&["protect", "web", "--to", "west", "--rpo", "3s"])
        .good();
    pair.east.until_sealed("web", 3, COPY);
    pair.west.cli(&["failover", "web"]).bad("is alive");

    let last = guest.console.last_beat().unwrap();
    pair.east.kill();
    guest.kill();
    pair.west.until("the link is down", COPY, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web", "--json"]).good();
    let active = pair.west.target("web").active.unwrap();
    let console = TestSite::console_of(&active);
    let beat = console.await_beat(last.number + 20, COPY);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
    assert!(console.check(COPY).is_ok());
    pair.west.cli(&["failover", "web"]).bad("runs here already");
}
