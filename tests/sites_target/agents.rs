//! A real guest agent, Debian's, in a real QEMU: points whose filesystems are frozen
//! for the cut, thawed after it and where the guest is run; and guests whose disks
//! alone are copied, which it shuts down before they boot elsewhere.

use farhaven::guest::qemu::agent::Agent;
use farhaven::site::view::PointView;
use farhaven_policies::runbook::run::Outcome;

use super::*;

const FROZEN: &str = "[protect]\nquiesce = \"agent\"\nquiesce_timeout = \"900ms\"";

fn newest(site: &TestSite) -> PointView {
    let told = site.cli(&["points", "web", "--json"]).good();
    let points: Vec<PointView> = serde_json::from_str(&told.out).unwrap();
    points.into_iter().next_back().unwrap()
}

/// Waits for a point after `after` whose filesystems were frozen, or were not in time.
#[track_caller]
fn until_quiesced(site: &TestSite, after: u64, wanted: bool) -> PointView {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let point = newest(site);
        if point.point > after && point.quiesced == Some(wanted) {
            return point;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "never: {wanted}, but {point:?}\n{}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits until the agent says that nothing is frozen.
#[track_caller]
pub(super) fn thawed(channel: &Path) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let asked =
            Agent::connect(channel, Duration::from_secs(5)).and_then(|mut agent| agent.is_frozen());
        if matches!(asked, Ok(false)) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{asked:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn alerts(site: &TestSite) -> String {
    site.cli(&["alert", "list", "--json"]).good().out
}

#[test]
fn points_are_frozen_by_the_agent_and_thawed_wherever_the_guest_runs() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("g")).unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.load=database farhaven.fill=8 farhaven.pages=2048".to_owned(),
        extra: Vec::new(),
    };
    let Some(guest) = GuestVm::start_with_agent(&dir.path().join("g"), &options) else {
        return;
    };
    let channel = dir.path().join("g/agent.sock");
    let pair = Pair::start(LINK, FROZEN, "");
    // Its agent is there some time after its workload.
    thawed(&channel);
    protect(&pair, "web", &guest);
    let first = until_quiesced(&pair.west, 0, true);
    assert!(!alerts(&pair.east).contains("not_quiesced"));
    whole(&guest.console);

    // Somebody else holds the channel: points go on, and say what they are.
    let holder = std::os::unix::net::UnixStream::connect(&channel).unwrap();
    let crash = until_quiesced(&pair.west, first.point, false);
    pair.east.until("the alert", PATIENCE, |_| {
        alerts(&pair.east).contains("not_quiesced").then_some(())
    });
    assert!(beats(&guest.console));
    drop(holder);
    let again = until_quiesced(&pair.west, crash.point, true);
    pair.east.until("its end", PATIENCE, |_| {
        (!alerts(&pair.east).contains("not_quiesced")).then_some(())
    });

    // A test from a frozen point: thawed there, and its agent answers.
    let point = again.point.to_string();
    let run = [
        "point", "keep", "web", "--point", &point, "--name", "frozen",
    ];
    pair.west.cli(&run).good();
    pair.west.cli(&["test", "web", "--point", "frozen"]).good();
    let id = pair.west.target("web").id;
    thawed(&pair.west.dir.join("run").join(&id).join("test/agent.sock"));
    pair.west.cli(&["test", "cleanup", "web"]).good();

    // A planned run whose last cut is frozen, and whose health is the agent's word.
    let text = "name = \"book\"\nmodes = [\"planned\"]\n[groups]\nweb = []\n\
        [[steps]]\nname = \"freeze\"\ndo = \"quiesce\"\n\
        [[steps]]\nname = \"sync\"\ndo = \"final-sync\"\n\
        [[steps]]\nname = \"promote\"\ndo = \"promote\"\n\
        [[steps]]\nname = \"start\"\ndo = \"start-group\"\n\
        [[steps]]\nname = \"well\"\ndo = \"wait-healthy\"\nagent = true\n";
    let file = dir.path().join("book.toml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let told = pair.west.cli(&[
        "runbook", "run", file, "--mode", "planned", "--as", "anna", "--json",
    ]);
    let run: farhaven::site::runs::view::RunView = serde_json::from_str(&told.good().out).unwrap();
    let outcome = runs::until(&pair.west, &run.id, "its end", |view| view.outcome);
    assert_eq!(outcome, Outcome::Succeeded);
    let last = newest(&pair.west);
    assert_eq!(last.quiesced, Some(true), "{last:?}");
    let told = pair.west.cli(&["report", &run.id, "--json"]).good();
    let report: farhaven::runbook::report::Report = serde_json::from_str(&told.out).unwrap();
    assert_eq!(report.guests[0].quiesced, Some(true));
    let there = runs_at(&pair.west, "web");
    let active = pair.west.target("web").active.unwrap();
    let qmp = active.qmp.unwrap();
    thawed(&Path::new(&qmp).with_file_name("agent.sock"));
    assert!(beats(&there));
    whole(&there);
}

/// A guest whose disks alone are to be protected, with an agent that answers.
pub(super) fn one_that_boots(directory: &Path) -> Option<GuestVm> {
    std::fs::create_dir_all(directory).unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.cold farhaven.load=database farhaven.fill=8 farhaven.pages=2048"
            .to_owned(),
        extra: Vec::new(),
    };
    let guest = GuestVm::start_with_agent(directory, &options)?;
    thawed(&directory.join("agent.sock"));
    Some(guest)
}

#[test]
fn disks_alone_are_protected_and_the_guest_boots_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = one_that_boots(&dir.path().join("g")) else {
        return;
    };
    let pair = Pair::start(LINK, "[protect]\nmode = \"disk-only\"", "");
    protect(&pair, "web", &guest);
    sealed(&pair.east, "web");
    let source = pair.east.source("web");
    assert!(source.disks_only && source.last_ram_scanned_bytes == Some(0));
    let point = newest(&pair.west);
    assert!(point.disks_only && point.quiesced.is_none(), "{point:?}");
    let told = pair.west.cli(&["points", "web"]).good().out;
    assert!(told.contains("disks only, crash"), "{told}");

    // A test boots, from its first beat on, and finds its disks as they should be.
    let before = guest.console.last_beat().unwrap().number;
    assert!(before > 20, "{before}");
    let told = pair.west.cli(&["test", "web", "--json"]).good();
    let report: farhaven::site::view::TestReport = serde_json::from_str(&told.out).unwrap();
    assert!(report.times.boots, "{report:?}");
    let console = report.console.unwrap();
    let there = Console {
        log: console.log,
        socket: console.socket,
    };
    booted(&there);
    pair.west.cli(&["test", "cleanup", "web"]).good();

    // Moved: its agent shuts it down, and it boots there.
    let moved = pair.east.cli(&["move", "web"]).good().out;
    assert!(moved.contains("boots there"), "{moved}");
    phase(&pair.east, "web", Phase::Moved);
    let stood = guest.console.last_beat().unwrap().number;
    let there = TestSite::console_of(&pair.west.target("web").active.unwrap());
    booted(&there);
    assert_eq!(guest.console.last_beat().unwrap().number, stood);
    // To the last byte that it had written.
    assert_eq!(sums(&there), [sum(&guest.data_disk)]);

    // And back: the copy that was shut down here boots again.
    pair.west.cli(&["rollback", "web", "--accept-loss"]).good();
    let deadline = std::time::Instant::now() + PATIENCE;
    let again = || guest.console.last_beat().unwrap().number < stood;
    while sums(&guest.console).len() < 2 || !again() {
        assert!(std::time::Instant::now() < deadline, "{}", pair.east.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(beats(&guest.console));
    whole(&guest.console);
    sealed(&pair.east, "web");
}

#[test]
fn a_takeover_by_force_does_not_wait_for_a_guest_that_shuts_down() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = one_that_boots(&dir.path().join("g")) else {
        return;
    };
    let pair = Pair::start(LINK, "[protect]\nmode = \"disk-only\"", "");
    protect(&pair, "web", &guest);
    // Somebody else holds the channel of its agent, and nobody hears its power button.
    let channel = dir.path().join("g/agent.sock");
    let holder = std::os::unix::net::UnixStream::connect(&channel).unwrap();
    std::thread::scope(|scope| {
        let moves = scope.spawn(|| pair.east.cli(&["move", "web"]));
        pair.east
            .until("it is asked to shut down", PATIENCE, |view| {
                let source = view.guests.iter().find(|guest| guest.name == "web")?;
                source.trouble.contains("shuts down here").then_some(())
            });
        pair.west.cli(&["failover", "web", "--force"]).good();
        moves.join().unwrap().bad("web");
    });
    phase(&pair.east, "web", Phase::Fenced);
    let status = guest
        .connect()
        .execute("query-status", serde_json::json!({}));
    assert_eq!(status.unwrap()["running"], false);
    booted(&TestSite::console_of(
        &pair.west.target("web").active.unwrap(),
    ));
    drop(holder);
}

#[test]
fn a_run_shuts_its_guest_down_first_and_boots_it_at_one_site_or_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = one_that_boots(&dir.path().join("g")) else {
        return;
    };
    let mut pair = Pair::start(LINK, "[protect]\nmode = \"disk-only\"", "");
    protect(&pair, "web", &guest);
    sealed(&pair.east, "web");
    let text = "name = \"book\"\nmodes = [\"planned\"]\n[groups]\nweb = []\n\
        [[steps]]\nname = \"down\"\ndo = \"shutdown-source\"\n\
        [[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"1h\"\n\
        [[steps]]\nname = \"sync\"\ndo = \"final-sync\"\n\
        [[steps]]\nname = \"agree-too\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"1h\"\n\
        [[steps]]\nname = \"promote\"\ndo = \"promote\"\n\
        [[steps]]\nname = \"start\"\ndo = \"start-group\"\n";
    let file = dir.path().join("book.toml");
    std::fs::write(&file, text).unwrap();
    let begin = |pair: &Pair| {
        let told = pair.west.cli(&[
            "runbook",
            "run",
            file.to_str().unwrap(),
            "--mode",
            "planned",
            "--as",
            "anna",
            "--json",
        ]);
        let run: farhaven::site::runs::view::RunView =
            serde_json::from_str(&told.good().out).unwrap();
        run.id
    };
    let at = |pair: &Pair, run: &str, step: &str| {
        runs::until(&pair.west, run, step, |view| {
            let awaits = view.awaits.as_ref()?;
            (awaits.step == step).then_some(())
        });
    };

    // Shut down, and it stays so while its daemon is killed and comes back.
    let run = begin(&pair);
    at(&pair, &run, "agree");
    assert!(pair.east.source("web").shut_down);
    let stood = guest.console.last_beat().unwrap().number;
    pair.east.kill();
    pair.east.start();
    pair.east.until("points of what is down", PATIENCE, |view| {
        let source = view.guests.into_iter().find(|g| g.name == "web")?;
        let told = source.trouble.contains("shut down here for a run");
        (source.shut_down && told && source.points_sealed > 1).then_some(())
    });
    pair.east
        .cli(&["unprotect", "web"])
        .bad("is shut down here");
    pair.west
        .cli(&["approve", &run, "agree", "--as", "anna"])
        .good();
    at(&pair, &run, "agree-too");
    assert!(newest(&pair.west).disks_only);
    assert_eq!(guest.console.last_beat().unwrap().number, stood);

    // Rolled back: it boots where it was.
    pair.west
        .cli(&["run", "abort", &run, "--rollback", "--as", "anna"])
        .good();
    let outcome = runs::until(&pair.west, &run, "its end", |view| view.outcome);
    assert_eq!(outcome, Outcome::RolledBack);
    let deadline = std::time::Instant::now() + PATIENCE;
    while sums(&guest.console).len() < 2 || guest.console.last_beat().unwrap().number >= stood {
        assert!(std::time::Instant::now() < deadline, "{}", pair.east.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(beats(&guest.console));
    assert!(!pair.east.source("web").shut_down);
    sealed(&pair.east, "web");
    thawed(&dir.path().join("g/agent.sock"));

    // To its end: it boots there, from the last byte that it had written.
    let run = begin(&pair);
    for step in ["agree", "agree-too"] {
        at(&pair, &run, step);
        pair.west
            .cli(&["approve", &run, step, "--as", "anna"])
            .good();
    }
    let outcome = runs::until(&pair.west, &run, "its end", |view| view.outcome);
    assert_eq!(outcome, Outcome::Succeeded);
    let there = TestSite::console_of(&pair.west.target("web").active.unwrap());
    booted(&there);
    assert_eq!(sums(&there), [sum(&guest.data_disk)]);
    phase(&pair.east, "web", Phase::Moved);
    assert!(!pair.east.source("web").shut_down);
}

/// The sum of its raw disk, boot by boot, as its console tells it.
pub(super) fn sums(console: &Console) -> Vec<String> {
    let log = std::fs::read(&console.log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let told = log.lines().filter_map(|line| {
        let (_, sum) = line.split_once("COLD ")?;
        sum.split_whitespace().next().map(str::to_owned)
    });
    told.collect()
}

/// The same of an image, as far as the guest's ledger goes.
pub(super) fn sum(image: &Path) -> String {
    let ledger = std::process::Command::new("sh")
        .args(["-c", "head -c 16777216 \"$0\" | md5sum"])
        .arg(image)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&ledger.stdout).into_owned();
    told.split_whitespace().next().unwrap().to_owned()
}

/// It beats from its first beat on, and its memory and disks are as they should be.
#[track_caller]
pub(super) fn booted(console: &Console) {
    console.await_beat(5, PATIENCE);
    assert_eq!(sums(console).len(), 1);
    whole(console);
}
