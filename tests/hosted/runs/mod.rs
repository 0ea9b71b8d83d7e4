//! Runbooks run by real daemons over simulated guests: killed at every step,
//! rolled back, refused, hung; what is left, recorded and reported.

mod faults;
mod kills;
mod stays;
mod together;
mod verbs;

use std::time::{Duration, Instant};

use farhaven::runbook::report::Report;
use farhaven::site::records::GuestRecord;
use farhaven::site::runs::view::RunView;
use farhaven_policies::runbook::run::{Forward, Outcome};

use super::support::Console;
use super::support::site::{Pair, TestSite};

const LINK: &str = "200mbit,10ms";
const LONG: Duration = Duration::from_secs(120);

/// Two sites with a small guest at east, protected to west, with some points.
fn stage() -> (Pair, Console) {
    let pair = Pair::start(LINK, "", "");
    let told = pair.east.cli(&[
        "guest", "start", "web", "--kind", "sim", "--ram", "16MiB", "--disk", "4MiB", "--json",
    ]);
    let record: GuestRecord = serde_json::from_str(&told.good().out).unwrap();
    let paths = record.console.unwrap();
    let console = Console {
        log: paths.log,
        socket: paths.socket,
    };
    console.await_beat(3, LONG);
    pair.east
        .cli(&["protect", "web", "--to", "west", "--rpo", "1s"])
        .good();
    pair.east.until_sealed("web", 2, LONG);
    (pair, console)
}

/// A runbook of one mode, of these steps for the guest.
fn runbook(pair: &Pair, mode: &str, steps: &str) -> String {
    let path = pair.dir.path().join("book.toml");
    let text = format!("name = \"book\"\nmodes = [\"{mode}\"]\n[groups]\nweb = []\n{steps}");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Starts a run at a site; its id.
fn begin(site: &TestSite, file: &str, mode: &str, more: &[&str]) -> String {
    let args = [
        "runbook", "run", file, "--mode", mode, "--as", "anna", "--json",
    ];
    let told = site.cli(&[&args[..], more].concat()).good();
    let view: RunView = serde_json::from_str(&told.out).unwrap();
    view.id
}

fn view(site: &TestSite, run: &str) -> RunView {
    let told = site.cli(&["run", "show", run, "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

fn runs(site: &TestSite) -> Vec<RunView> {
    let told = site.cli(&["run", "list", "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

fn report(site: &TestSite, run: &str) -> Report {
    let told = site.cli(&["report", run, "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

/// Waits until the run stands as is wanted.
#[track_caller]
fn until<T>(site: &TestSite, run: &str, what: &str, wanted: impl Fn(&RunView) -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        let view = view(site, run);
        if let Some(found) = wanted(&view) {
            return found;
        }
        let ended = view.outcome.is_some();
        assert!(
            !ended && Instant::now() < deadline,
            "never: {what}\n{view:#?}\n{}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[track_caller]
fn over(site: &TestSite, run: &str) -> Outcome {
    until(site, run, "its end", |view| view.outcome)
}

/// Waits until a step of the run is under way.
#[track_caller]
fn at(site: &TestSite, run: &str, step: &str) {
    until(site, run, step, |view| {
        let of_name = view.steps.iter().find(|s| s.name == step)?;
        (of_name.forward == Forward::Running).then_some(())
    });
}

/// Agrees to a step that waits for somebody.
fn agree(site: &TestSite, run: &str, step: &str) {
    at(site, run, step);
    site.cli(&["approve", run, step, "--as", "anna"]).good();
}

/// The console of the guest that runs at west.
fn there(pair: &Pair) -> Console {
    TestSite::console_of(&pair.west.target("web").active.unwrap())
}

fn sound(console: &Console) {
    let beat = console.check(LONG);
    assert_eq!((beat.memory.as_str(), beat.disk.as_str()), ("ok", "ok"));
}
