//! A runbook over a real QEMU, which outlives the daemons of both sites: killed
//! at every boundary between two steps, also before the guest stands still.

use farhaven::runbook::report::Report;
use farhaven::site::runs::view::RunView;
use farhaven_policies::runbook::run::Outcome;

use super::*;

const KINDS: [&str; 6] = [
    "check",
    "final-sync",
    "promote",
    "remap",
    "start-group",
    "wait-healthy",
];

fn view(site: &TestSite, run: &str) -> RunView {
    let told = site.cli(&["run", "show", run, "--json"]).good();
    serde_json::from_str(&told.out).unwrap()
}

#[track_caller]
pub(super) fn until<T>(
    site: &TestSite,
    run: &str,
    what: &str,
    wanted: impl Fn(&RunView) -> Option<T>,
) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let view = view(site, run);
        if let Some(found) = wanted(&view) {
            return found;
        }
        let over = view.outcome.is_some() || view.question.is_some();
        assert!(
            !over && std::time::Instant::now() < deadline,
            "never: {what}\n{view:#?}\n{}",
            site.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_planned_run_of_a_qemu_outlives_both_daemons_and_shows_its_screen() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("g")).unwrap();
    let options = GuestOptions {
        memory: 192,
        cmdline: "farhaven.load=database farhaven.fill=8 farhaven.pages=2048".to_owned(),
        extra: vec!["-device".to_owned(), "VGA".to_owned()],
    };
    let Some(guest) = GuestVm::start(&dir.path().join("g"), &options) else {
        return;
    };
    let mut pair = Pair::start(LINK, "", "");
    protect(&pair, "web", &guest);
    let mut text = "name = \"book\"\nmodes = [\"planned\"]\n[groups]\nweb = []\n".to_owned();
    for kind in KINDS {
        text.push_str(&format!(
            "[[steps]]\nname = \"before-{kind}\"\ndo = \"approve\"\nby = [\"*\"]\ntimeout = \"1h\"\n[[steps]]\nname = \"{kind}\"\ndo = \"{kind}\"\n"
        ));
    }
    let file = dir.path().join("book.toml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let told = pair.west.cli(&[
        "runbook", "run", file, "--mode", "planned", "--as", "anna", "--json",
    ]);
    let run: RunView = serde_json::from_str(&told.good().out).unwrap();
    let run = run.id;
    let mut last = 0;
    for kind in KINDS {
        let stop = format!("before-{kind}");
        let awaited = |view: &RunView| {
            let step = view.awaits.as_ref()?;
            (step.step == stop).then_some(())
        };
        until(&pair.west, &run, &stop, awaited);
        if kind == "promote" {
            last = guest.console.last_beat().unwrap().number;
        }
        pair.east.kill();
        pair.west.kill();
        pair.west.start();
        pair.east.start();
        pair.west
            .cli(&["approve", &run, &stop, "--as", "anna"])
            .good();
    }
    let outcome = until(&pair.west, &run, "its end", |view| view.outcome);
    assert_eq!(outcome, Outcome::Succeeded);
    let there = runs_at(&pair.west, "web");
    assert!(there.last_beat().unwrap().number > last);
    whole(&there);
    phase(&pair.east, "web", Phase::Moved);
    let stood = guest.console.last_beat().unwrap().number;
    assert_eq!(stood, last, "its copy at the source never ran again");
    let told = pair.west.cli(&["report", &run, "--json"]).good();
    let report: Report = serde_json::from_str(&told.out).unwrap();
    assert_eq!(report.rpo_ms, Some(0));
    assert!(report.guests[0].screen.is_some(), "{:?}", report.guests);
    let page = dir.path().join("report.html");
    pair.west
        .cli(&["report", &run, "--html", page.to_str().unwrap()])
        .good();
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("data:image/png;base64,"));
}
