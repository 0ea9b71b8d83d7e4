//! Test failovers of a real guest: isolated, beside protection, thrown away.

use std::path::PathBuf;

use farhaven::site::view::{PointView, TestEnded, TestReport};

use super::*;

/// Everything of a test that may lie at west.
fn left(west: &TestSite, id: &str) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(west.dir.join("site.toml")).unwrap();
    let ram = text.split("ram_dir = \"").nth(1).unwrap();
    let ram = Path::new(ram.split('"').next().unwrap());
    let places = [
        west.dir.join("run").join(id).join("test"),
        ram.join(format!("{id}-test")),
    ];
    places.into_iter().filter(|path| path.exists()).collect()
}

fn start(west: &TestSite, args: &[&str]) -> (TestReport, Console) {
    let all: Vec<&str> = ["test", "web", "--json"]
        .iter()
        .chain(args)
        .copied()
        .collect();
    let told = west.cli(&all).good();
    let report: TestReport = serde_json::from_str(&told.out).unwrap();
    let paths = report.console.clone().expect("a console");
    let console = Console {
        log: paths.log,
        socket: paths.socket,
    };
    let first = console.await_beat(1, PATIENCE);
    console.await_beat(first.number + 5, PATIENCE);
    (report, console)
}

fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn a_test_runs_isolated_while_protection_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small(&dir.path().join("g")) else {
        return;
    };
    let kept = "[protect.retention]\nall = \"2s\"\nthen_every = \"2s\"\nuntil = \"3s\"\nnewest = 2";
    let mut pair = Pair::start(LINK, kept, "");
    pair.west.cli(&["test", "web"]).bad("no guest 'web'");
    protect(&pair, "web", &guest);
    let id = pair.east.source("web").id;
    pair.west
        .cli(&["test", "cleanup", "web"])
        .bad("no test of 'web'");
    pair.west
        .cli(&["test", "web", "--point", "4711"])
        .bad("no point 4711");
    pair.east.cli(&["test", "web"]).bad("run this there");
    assert!(left(&pair.west, &id).is_empty());

    let term = pair.west.target("web").term;
    let (report, console) = start(&pair.west, &[]);
    let line = std::fs::read(format!("/proc/{}/cmdline", report.pid.unwrap())).unwrap();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    assert!(line.contains("-netdev user,id=net0,restrict=on"), "{line}");
    let seen = pair.west.target("web").test.expect("the status shows it");
    assert!(seen.running && seen.point == report.point && seen.pid == report.pid);
    assert!(pair.west.target("web").active.is_none());
    pair.west.cli(&["test", "web"]).bad("runs already");
    // Protection goes on.
    for _ in 0..6 {
        sealed(&pair.east, "web");
    }
    // All before it and the one after it go; the tested point is pinned.
    pair.west.until("old points are pruned", PATIENCE, |_| {
        let told = pair.west.cli(&["points", "web", "--json"]).good().out;
        let points: Vec<PointView> = serde_json::from_str(&told).unwrap();
        assert!(points.iter().any(|p| p.point == report.point), "{told}");
        (points[0].point == report.point && points[1].point > report.point + 1).then_some(())
    });
    whole(&console);
    assert!(beats(&guest.console));
    assert_eq!(pair.west.target("web").term, term, "no term is raised");

    let told = pair.west.cli(&["test", "cleanup", "web", "--json"]).good();
    let ended: TestEnded = serde_json::from_str(&told.out).unwrap();
    assert_eq!(ended.point, report.point);
    assert!(
        ended.ram_bytes > 32 << 20 && ended.overlay_bytes > 0,
        "{ended:?}"
    );
    assert_eq!(ended.removed.len(), 3, "{ended:?}");
    assert!(left(&pair.west, &id).is_empty());
    assert!(!runs(report.pid.unwrap()));
    assert!(pair.west.target("web").test.is_none());

    // A daemon that dies leaves its test's QEMU; the next one ends it.
    let (report, _) = start(&pair.west, &[]);
    pair.west.kill();
    assert!(runs(report.pid.unwrap()));
    pair.west.start();
    let deadline = std::time::Instant::now() + PATIENCE;
    while runs(report.pid.unwrap()) || !left(&pair.west, &id).is_empty() {
        assert!(std::time::Instant::now() < deadline, "{}", pair.west.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(pair.west.target("web").test.is_none());
    sealed(&pair.east, "web");

    // A real failover beside a test; the test stays until it is cleaned up.
    let (report, tested) = start(&pair.west, &[]);
    pair.east.kill();
    drop(guest);
    pair.west.until("east is silent", PATIENCE, |view| {
        (!view.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web"]).good();
    let console = runs_at(&pair.west, "web");
    whole(&console);
    assert!(beats(&tested), "the test runs on");
    pair.west.cli(&["test", "web"]).bad("runs already");
    pair.west.cli(&["test", "cleanup", "web"]).good();
    assert!(!runs(report.pid.unwrap()));
    assert!(beats(&console));
    pair.west.cli(&["test", "web"]).bad("runs here");
}
