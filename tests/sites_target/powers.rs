//! A run that shuts the guests of a group down first, whose disks alone are
//! protected: in order, or not in time, given up, and to its end.

use farhaven::runbook::report::Report;
use farhaven::site::groups::GroupPointView;
use farhaven::site::runs::view::RunView;
use farhaven_policies::runbook::run::Outcome;

use super::agents::{booted, one_that_boots, sum, sums, thawed};
use super::*;

const FILES: &str = "[sites.west]\n[policies.cold]\nrpo = \"2s\"\nmode = \"disk-only\"\n[groups.bank]\npolicy = \"cold\"\npeer = \"west\"\n[groups.bank.guests.db]\n[groups.bank.guests.web]\nafter = [\"db\"]\n";

const NAMES: [&str; 2] = ["db", "web"];

struct Stage {
    pair: Pair,
    guests: [(&'static str, GuestVm); 2],
    dir: tempfile::TempDir,
}

impl Stage {
    fn set() -> Option<Stage> {
        let dir = tempfile::tempdir().unwrap();
        let db = one_that_boots(&dir.path().join("db"))?;
        let guests = [
            ("db", db),
            ("web", one_that_boots(&dir.path().join("web"))?),
        ];
        let mut pair = Pair::start(LINK, "", "");
        let files = dir.path().join("policies.toml");
        std::fs::write(&files, FILES).unwrap();
        follows(&mut pair.east, &files);
        protected_as_one(&pair, &guests);
        Some(Stage { pair, guests, dir })
    }

    /// Begins a planned run, whose guests have this time to shut down.
    fn begin(&self, shutdown: &str) -> String {
        let text = format!(
            "name = \"book\"\nmodes = [\"planned\"]\n[groups]\nbank = []\n\
            [[steps]]\nname = \"down\"\ndo = \"shutdown-source\"\ntimeout = \"{shutdown}\"\non-error = \"rollback\"\n\
            [[steps]]\nname = \"agree\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"1h\"\n\
            [[steps]]\nname = \"sync\"\ndo = \"final-sync\"\n\
            [[steps]]\nname = \"promote\"\ndo = \"promote\"\n\
            [[steps]]\nname = \"start\"\ndo = \"start-group\"\n"
        );
        let file = self.dir.path().join("book.toml");
        std::fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let told = self.pair.west.cli(&[
            "runbook", "run", file, "--mode", "planned", "--as", "anna", "--json",
        ]);
        let run: RunView = serde_json::from_str(&told.good().out).unwrap();
        run.id
    }

    fn until_agreed(&self, run: &str) {
        runs::until(&self.pair.west, run, "agree", |view| {
            let awaits = view.awaits.as_ref()?;
            (awaits.step == "agree").then_some(())
        });
    }

    fn ends(&self, run: &str, outcome: Outcome) {
        let ended = runs::until(&self.pair.west, run, "its end", |view| view.outcome);
        assert_eq!(ended, outcome);
    }

    /// Both boot where they were, for the `times`-th time, and are protected.
    fn boot_at_home(&self, times: [usize; 2]) {
        for ((name, guest), times) in self.guests.iter().zip(times) {
            let deadline = std::time::Instant::now() + PATIENCE;
            // One that has booted counts its beats from the first.
            while sums(&guest.console).len() < times || !beats(&guest.console) {
                let log = self.pair.east.log();
                assert!(std::time::Instant::now() < deadline, "{name}\n{log}");
                std::thread::sleep(Duration::from_millis(100));
            }
            assert!(!self.pair.east.source(name).shut_down);
            sealed(&self.pair.east, name);
            thawed(&self.dir.path().join(name).join("agent.sock"));
        }
    }
}

#[test]
fn a_group_is_shut_down_in_order_and_boots_at_one_site_or_the_other() {
    let Some(stage) = Stage::set() else {
        return;
    };
    let pair = &stage.pair;

    // Somebody else holds the channel of db's agent, and nobody hears its power
    // button: web, which is down by then, boots again.
    let channel = stage.dir.path().join("db/agent.sock");
    let holder = std::os::unix::net::UnixStream::connect(&channel).unwrap();
    let run = stage.begin("25s");
    stage.ends(&run, Outcome::RolledBack);
    drop(holder);
    let told = pair.west.cli(&["report", &run, "--json"]).good().out;
    assert!(told.contains("'db' was asked to shut down"), "{told}");
    assert!(told.contains("shut down already: web"), "{told}");
    stage.boot_at_home([1, 2]);

    // Who starts last is down first. Given up, they stay down until an operator
    // has them booted.
    let run = stage.begin("2m");
    stage.until_agreed(&run);
    let log = pair.east.log();
    let downs: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("it is shut down here for a run"))
        .map(|line| match line.contains("guest=web") {
            true => "web",
            false => "db",
        })
        .collect();
    assert_eq!(downs, ["web", "web", "db"], "{log}");
    pair.west
        .cli(&["run", "abort", &run, "--as", "anna"])
        .good();
    stage.ends(&run, Outcome::Stopped);
    for name in NAMES {
        assert!(pair.east.source(name).shut_down);
        pair.east.cli(&["take-back", name]).bad("add --force");
        pair.east.cli(&["take-back", name, "--force"]).good();
    }
    stage.boot_at_home([2, 3]);

    // To its end: they boot there, from one point of the group, with the last
    // byte that each had written.
    let run = stage.begin("2m");
    stage.until_agreed(&run);
    pair.west
        .cli(&["approve", &run, "agree", "--as", "anna"])
        .good();
    stage.ends(&run, Outcome::Succeeded);
    let told = pair.west.cli(&["report", &run, "--json"]).good();
    let report: Report = serde_json::from_str(&told.out).unwrap();
    let told = pair.west.cli(&["points", "bank", "--json"]).good();
    let points: Vec<GroupPointView> = serde_json::from_str(&told.out).unwrap();
    let newest = &points.last().unwrap().points;
    for guest in &report.guests {
        assert!(guest.disks_only, "{guest:?}");
        assert_eq!(guest.point, newest.get(&guest.guest).copied(), "{points:?}");
    }
    for (name, guest) in &stage.guests {
        let there = TestSite::console_of(&pair.west.target(name).active.unwrap());
        booted(&there);
        assert_eq!(sums(&there), [sum(&guest.data_disk)]);
        phase(&pair.east, name, Phase::Moved);
    }
}
