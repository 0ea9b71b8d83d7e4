//! Runbooks as an operator meets them: the examples, the exact words of
//! mistakes, orders that cannot be right, export, plans, the schema.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use farhaven_policies::files::PolicyFiles;
use farhaven_policies::load::LoadError;
use farhaven_policies::runbook::check::{Known, check};
use farhaven_policies::runbook::plan::{Facts, GroupFacts, plan};
use farhaven_policies::runbook::{Kind, Mode, Runbook, builtin, read, write};

mod made;
mod refusals;
mod written;

fn told(text: &str, known: Option<&Known>) -> Vec<String> {
    match read::text(Path::new("r.toml"), text, known) {
        Ok(runbook) => panic!("no mistake in {runbook:#?}"),
        Err(error) => error.to_string().lines().map(str::to_owned).collect(),
    }
}

fn bank() -> BTreeMap<String, Vec<String>> {
    [("bank".to_owned(), vec!["db".to_owned(), "app".to_owned()])].into()
}

/// A sound runbook of one mode, made of `steps` between its head and its end.
fn with(mode: &str, steps: &str) -> String {
    format!("name = 'r'\nmodes = ['{mode}']\ngroups.bank = ['db', 'app']\n{steps}")
}

/// Steps of these kinds, each named like its kind.
fn of_kinds(kinds: &str) -> String {
    let mut text = String::new();
    for kind in kinds.split_whitespace() {
        let (name, kind) = kind.split_once('=').unwrap_or((kind, kind));
        text.push_str(&format!("[[steps]]\nname = '{name}'\ndo = '{kind}'\n"));
        if kind == "fence" {
            text.push_str("modes = ['planned', 'unplanned']\n");
        }
    }
    text
}

#[test]
fn the_examples_have_no_mistakes_and_a_plan() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/runbooks");
    let mut modes = BTreeSet::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let runbook = read::file(&path, None).unwrap_or_else(|error| panic!("{error}"));
        for mode in &runbook.modes {
            let plan = plan(&runbook, *mode, &Facts::default()).unwrap();
            assert_eq!(plan.steps.len(), runbook.steps.len());
            assert!(plan.text().contains("unknown"), "{}", plan.text());
            modes.insert(*mode);
        }
        let text = write(&runbook);
        assert_eq!(read::text(&path, &text, None).unwrap(), runbook, "{text}");
    }
    assert_eq!(modes, Mode::ALL.into());
}

#[test]
fn the_built_in_runbooks_are_sound_and_export_as_themselves() {
    let mut all = vec![builtin::of_all(bank())];
    all.extend(Mode::ALL.map(|mode| builtin::of_mode(mode, bank())));
    for runbook in &all {
        assert_eq!(check(runbook, None), [], "{}", runbook.name);
        let text = write(runbook);
        assert_eq!(
            &read::text(Path::new("r"), &text, None).unwrap(),
            runbook,
            "{text}"
        );
        assert!(text.lines().filter(|line| line.starts_with("# ")).count() > runbook.steps.len());
    }
    // The one for all modes does in each what that mode's own does.
    for mode in Mode::ALL {
        let (own, whole) = (builtin::of_mode(mode, bank()), &all[0]);
        let steps = |runbook: &Runbook| -> Vec<_> {
            let steps = runbook.steps.iter().filter(|step| step.runs_in(mode));
            steps
                .map(|step| (step.action.clone(), step.on_error, step.limit()))
                .collect()
        };
        assert_eq!(steps(&own), steps(whole), "{mode}");
    }
}

#[test]
fn plans_say_what_is_measured_and_what_is_not() {
    let runbook = builtin::of_mode(Mode::Unplanned, [("bank".to_owned(), vec![])].into());
    let mut facts = Facts::default();
    let unknown = plan(&runbook, Mode::Unplanned, &facts).unwrap();
    assert_eq!(unknown.known_time(), (0, 6));
    assert_eq!(
        unknown.warnings,
        ["nothing is known of group 'bank' here: all of its times are unknown"]
    );
    let group = GroupFacts {
        guests: ["db".to_owned(), "app".to_owned()].into(),
        newest_point: Some(41),
        rpo_ms: Some(3_200),
        last_rto_ms: Some(900),
        last_healthy_ms: Some(12_000),
        ..GroupFacts::default()
    };
    facts.groups.insert("bank".to_owned(), group);
    let known = plan(&runbook, Mode::Unplanned, &facts).unwrap();
    assert_eq!(known.groups["bank"], ["app", "db"]);
    assert_eq!(known.known_time(), (12_900, 3));
    assert_eq!(
        known.warnings,
        ["what group 'bank' wrote in the last 3s200ms would be lost"]
    );
    let text = known.text();
    let promote =
        "900ms (as in the last failover or test, with the start), at most 5m; on error stop";
    assert!(text.contains(promote), "{text}");

    // What is left to send goes at what the link carries beyond new changes.
    let moved = builtin::of_mode(Mode::Planned, [("bank".to_owned(), vec![])].into());
    let bank = facts.groups.get_mut("bank").unwrap();
    (bank.dirty_bytes_per_second, bank.rpo_ms, bank.last_pause_ms) =
        (Some(1_000_000), Some(10_000), Some(20));
    facts.link_bytes_per_second = Some(6_000_000);
    let of = |facts: &Facts| {
        let plan = plan(&moved, Mode::Planned, facts).unwrap();
        let step = plan
            .steps
            .into_iter()
            .find(|planned| planned.step.action.kind() == Kind::FinalSync);
        step.unwrap().expected
    };
    assert_eq!(of(&facts).millis, Some(2_020));
    facts.link_bytes_per_second = Some(1_000_000);
    assert!(of(&facts).millis.is_none() && of(&facts).basis.contains("throttled"));

    // Steps that are skipped say why; a mode that the runbook is not for is refused.
    let whole = builtin::of_all(bank_only());
    let plan_of = plan(&whole, Mode::Test, &facts).unwrap();
    let skipped = |name: &str| {
        let step = plan_of
            .steps
            .iter()
            .find(|planned| planned.step.name == name);
        step.unwrap().skipped.clone().unwrap()
    };
    assert_eq!(skipped("fence"), "a test takes no term: the source goes on");
    assert_eq!(skipped("promote-unplanned"), "it is for unplanned mode");
    let refused = plan(&moved, Mode::Test, &facts).unwrap_err().to_string();
    assert_eq!(
        refused,
        "runbook 'move' is not for test mode; it is for planned"
    );
}

fn bank_only() -> BTreeMap<String, Vec<String>> {
    [("bank".to_owned(), Vec::new())].into()
}

#[test]
fn the_schema_knows_every_key_that_the_reader_knows() {
    let schema = serde_json::to_value(Runbook::schema()).unwrap();
    let step = serde_json::to_string(&schema["$defs"]["Step"]).unwrap();
    for kind in Kind::ALL {
        assert!(
            step.contains(&format!("\"const\":\"{}\"", kind.word())),
            "{}",
            kind.word()
        );
        for key in kind.keys() {
            assert!(
                step.contains(&format!("\"{key}\":")),
                "{} {key}",
                kind.word()
            );
        }
    }
    for key in [
        "name",
        "description",
        "group",
        "guests",
        "modes",
        "timeout",
        "on-error",
    ] {
        assert!(step.contains(&format!("\"{key}\":")), "{key}");
    }
}
