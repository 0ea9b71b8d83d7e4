//! Failover, and who may run a guest afterwards.

use super::*;

#[test]
fn a_guest_taken_over_by_force_runs_at_one_site_whatever_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = small(&dir.path().join("g")) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "hydrate_rate = \"4mbit\"");
    pair.west.cli(&["failover", "web"]).bad("no guest 'web'");
    protect(&pair, "web", &guest);
    sealed(&pair.east, "web");
    pair.west
        .cli(&["failover", "web", "--point", "999", "--force"])
        .bad("no point 999");
    pair.west.cli(&["failover", "web"]).bad("is alive");
    assert!(beats(&guest.console), "refusals stop nothing");
    let points: Vec<serde_json::Value> =
        serde_json::from_str(&pair.west.cli(&["points", "web", "--json"]).good().out).unwrap();
    assert!(points.len() >= 2);
    let older = points[points.len() - 2]["point"].to_string();

    pair.west
        .cli(&["failover", "web", "--point", &older, "--force"])
        .good();
    let stopped = guest.console.last_beat().unwrap().number;
    let console = runs_at(&pair.west, "web");
    assert_eq!(guest.console.last_beat().unwrap().number, stopped);
    assert!(phase(&pair.east, "web", Phase::Fenced).contains("stopped and is kept"));
    assert!(lives(&guest), "it is kept, not killed");
    pair.west.cli(&["failover", "web"]).bad("runs here already");
    pair.east
        .cli(&["move", "web"])
        .bad("not protected at this moment");

    // The target's daemon dies while the disks are still on its store.
    assert!(!pair.west.target("web").active.unwrap().hydrated);
    pair.west.kill();
    std::thread::sleep(Duration::from_secs(2));
    pair.west.start();
    assert!(pair.west.target("web").active.is_some());
    whole(&console);
    pair.west.cli(&["failover", "web"]).bad("runs here already");
    let qemu = pair.west.target("web").active.unwrap().pid.unwrap();
    assert!(pair.west.terminate());
    // What it reads and has not yet is waited for; it is there, and goes on below.
    assert!(Path::new(&format!("/proc/{qemu}/exe")).exists());
    // Its configuration is read anew: hydration goes on, faster.
    let file = pair.west.dir.join("site.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("4mbit", "2000mbit")).unwrap();
    pair.west.start();
    pair.west.until("hydrated", PATIENCE, |view| {
        view.standbys[0]
            .active
            .as_ref()
            .filter(|a| a.hydrated)
            .map(drop)
    });
    whole(&console);

    // The source restarts, twice: it never lets the guest go.
    for _ in 0..2 {
        pair.east.kill();
        pair.east.start();
        phase(&pair.east, "web", Phase::Fenced);
        assert_eq!(guest.console.last_beat().unwrap().number, stopped);
    }
    pair.east.cli(&["unprotect", "web"]).good();
    pair.east
        .cli(&["protect", "web", "--to", "west"])
        .bad("fenced");

    // The whole catalogue of the target is gone: it still knows what it runs.
    pair.west.kill();
    std::fs::remove_dir_all(pair.west.dir.join("catalogue")).unwrap();
    pair.west.start();
    assert!(pair.west.target("web").active.is_some());
    pair.west.cli(&["failover", "web"]).bad("runs here already");
    whole(&console);

    // A damaged term file.
    pair.east.kill();
    let terms = pair.east.dir.join("terms");
    let term = std::fs::read_dir(&terms)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::write(&term, "rubbish").unwrap();
    pair.east.start_silently();
    let ended = pair.east.exit_status(PATIENCE).expect("it does not start");
    assert!(!ended.success());
    assert!(
        pair.east.log().contains("is damaged"),
        "{}",
        pair.east.log()
    );
    guest.kill();
}

#[test]
fn a_source_that_comes_back_stops_its_guest_even_when_qemu_is_busy_at_first() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small(&dir.path().join("g")) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    protect(&pair, "web", &guest);
    pair.east.kill();
    pair.west.until("the link is down", PATIENCE, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web"]).good();
    runs_at(&pair.west, "web");
    assert!(beats(&guest.console), "nobody has told it yet");
    let mut busy = Some(guest.connect());
    pair.east.start();
    pair.east
        .until("it says that it cannot stop it", PATIENCE, |view| {
            view.guests[0]
                .trouble
                .contains("COULD NOT BE STOPPED")
                .then_some(())
        });
    drop(busy.take());
    pair.east.until("stopped", PATIENCE, |view| {
        view.guests[0]
            .trouble
            .contains("was stopped and is kept")
            .then_some(())
    });
    assert!(!beats(&guest.console));

    // A guest that is protected no more, and taken over from what it left.
    let Some(other) = small(&dir.path().join("o")) else {
        return;
    };
    protect(&pair, "api", &other);
    pair.east.cli(&["unprotect", "api"]).good();
    assert!(beats(&other.console));
    pair.west.cli(&["failover", "api", "--force"]).good();
    let stopped = other.console.last_beat().unwrap().number;
    whole(&runs_at(&pair.west, "api"));
    assert_eq!(other.console.last_beat().unwrap().number, stopped);
}

/// Its QEMU has one client at a time, and somebody else's comes first.
#[test]
fn a_guest_that_was_let_go_of_for_a_reprotection_that_failed_is_watched_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small(&dir.path().join("g")) else {
        return;
    };
    let pair = Pair::start(LINK, "", "");
    protect(&pair, "web", &guest);
    pair.east.cli(&["move", "web", "--accept-pause"]).good();
    let console = runs_at(&pair.west, "web");
    pair.west.cli(&["commit", "web"]).good();
    pair.west.until("hydrated", PATIENCE, |view| {
        let active = view.standbys[0].active.as_ref()?;
        active.hydrated.then_some(())
    });
    let qmp = pair.west.target("web").active.unwrap().qmp.unwrap();
    // It is served as soon as the site lets go.
    let somebody = std::os::unix::net::UnixStream::connect(qmp).unwrap();
    pair.west.cli(&["reprotect", "web"]).bad("");
    let view = pair.west.view();
    assert!(view.guests.is_empty(), "it is none of west's own");
    let standby = &view.standbys[0];
    assert!(standby.active.is_some());
    assert!(
        standby.trouble.contains("cannot be watched yet"),
        "{}",
        standby.trouble
    );
    assert!(beats(&console));
    drop(somebody);
    pair.west.until("watched again", PATIENCE, |view| {
        let standby = &view.standbys[0];
        (standby.active.is_some() && standby.trouble.is_empty()).then_some(())
    });
    // By one client, which lets go once more.
    pair.west.cli(&["reprotect", "web"]).good();
    assert!(pair.west.view().standbys.is_empty());
    sealed(&pair.west, "web");
    whole(&console);
}
