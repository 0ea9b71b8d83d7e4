//! Policy files as an operator meets them: layers, precedence, the exact words of
//! mistakes, what is in force, and the schema for editors.

#![allow(clippy::unwrap_used)]

mod mistakes;
mod schema;

use std::path::{Path, PathBuf};

use farhaven_policies::files::show::{show, text};
use farhaven_policies::files::{Mode, PolicyFiles, Standby};
use farhaven_policies::load::{LARGEST_FILE, LoadError, Loaded, load_from, load_layers};
use farhaven_policies::shape::Shape;
use farhaven_policies::site::{ENV_PREFIX, SiteConfig};
use farhaven_policies::units::Period;
use farhaven_policies::week::{Days, TimeOfDay, overlap, spans};
use proptest::prelude::*;
use serde_json::Value;

const SOUND: &str = "[policies.gold]\nrpo = '5s'\n[sites.munich]\n[groups.bank]\npolicy = 'gold'\npeer = 'munich'\nguests.db = {}\n";

fn read(
    files: &[(&str, &str)],
    variables: &[(&str, &str)],
) -> Result<Loaded<PolicyFiles>, LoadError> {
    let files: Vec<_> = files
        .iter()
        .map(|(path, text)| (Path::new(*path), *text))
        .collect();
    let variables = variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()));
    load_layers(&files, ENV_PREFIX, variables, &[])
}

fn mistakes(files: &[(&str, &str)], variables: &[(&str, &str)]) -> Vec<String> {
    let error = read(files, variables).unwrap_err().to_string();
    error.lines().map(str::to_owned).collect()
}

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let files = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
        .collect();
    files.sort();
    assert!(files.len() >= 3);
    files
}

#[test]
fn later_files_win_and_variables_over_them() {
    let over = "[policies.gold]\nrpo = '20s'\nmode = 'disk-only'\n[groups.bank.guests.app]\nafter = ['db']\n";
    let loaded = read(
        &[("10.toml", SOUND), ("20.toml", over)],
        &[
            (
                "FARHAVEN__POLICIES__GOLD__RETENTION",
                "all for 2h, newest 7",
            ),
            ("FARHAVEN__GROUPS__BANK__GUESTS__APP__AFTER", ""),
            // A site's own, which is none of ours.
            ("FARHAVEN__LINK__RATE_LIMIT", "50mbit"),
        ],
    )
    .unwrap();
    let gold = &loaded.value.policies["gold"];
    assert_eq!(
        (gold.rpo, gold.mode, gold.standby),
        (Period::from_secs(20), Mode::DiskOnly, Standby::Auto)
    );
    assert_eq!(gold.retention.to_string(), "all for 2h, newest 7");
    assert_eq!(loaded.value.groups["bank"].guests.len(), 2);
    assert_eq!(
        loaded.value.groups["bank"].guests["app"].after,
        [] as [&str; 0]
    );

    let shown = show(&loaded, "bank").unwrap();
    let of = |key: &str| {
        let found = shown.iter().find(|shown| shown.key == key).unwrap();
        (found.value.as_str(), found.from.as_str())
    };
    assert_eq!(of("policies.gold.rpo"), ("\"20s\"", "20.toml:2"));
    assert_eq!(
        of("policies.gold.retention").1,
        "FARHAVEN__POLICIES__GOLD__RETENTION"
    );
    assert_eq!(of("policies.gold.priority"), ("100", "default"));
    assert_eq!(of("groups.bank.peer"), ("\"munich\"", "10.toml:6"));
    assert_eq!(of("alerts.rpo_critical"), ("3", "default"));
    assert!(
        text(&shown)
            .lines()
            .any(|line| line.ends_with("# 20.toml:2"))
    );
    let unknown = show(&loaded, "bnak").unwrap_err().to_string();
    assert_eq!(unknown, "no group is called 'bnak'; did you mean 'bank'?");
}

#[test]
fn a_sites_variables_and_these_do_not_disturb_each_other() {
    let variables = [("FARHAVEN__POLICIES__GOLD__RPO".to_owned(), "1s".to_owned())];
    let name = [("site.name".to_owned(), "berlin".to_owned())];
    assert!(load_from::<SiteConfig>(None, ENV_PREFIX, variables, &name).is_ok());
    let told = mistakes(
        &[("a.toml", SOUND)],
        &[("FARHAVEN__POLICES__GOLD__RPO", "1s")],
    );
    assert_eq!(
        told,
        [
            "environment variable FARHAVEN__POLICES__GOLD__RPO: unknown key 'polices.gold.rpo'; did you mean 'policies.gold.rpo'?"
        ]
    );
    let told = mistakes(
        &[("a.toml", SOUND)],
        &[("FARHAVEN__POLICIES__GLOD__RPO", "5s")],
    );
    assert_eq!(
        told,
        [
            "environment variable FARHAVEN__POLICIES__GLOD__RPO: 'policies.glod' is named by no file; did you mean 'gold'?"
        ]
    );
}

#[test]
fn directories_are_read_in_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    assert!(matches!(
        PolicyFiles::read(dir.path()),
        Err(LoadError::Files { files: 0, .. })
    ));
    put("20-local.toml", "[policies.gold]\nrpo = '30s'\n");
    put("10-base.toml", SOUND);
    put("notes.txt", "no policy");
    put(".hidden.toml", "broken [");
    let loaded = PolicyFiles::read(dir.path()).unwrap();
    assert_eq!(loaded.value.policies["gold"].rpo, Period::from_secs(30));
    let absent = PolicyFiles::read(&dir.path().join("none.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("none.toml") && absent.contains("policy schema"),
        "{absent}"
    );
    std::fs::File::create(dir.path().join("30.toml"))
        .unwrap()
        .set_len(LARGEST_FILE + 1)
        .unwrap();
    assert!(matches!(
        PolicyFiles::read(dir.path()),
        Err(LoadError::TooLarge { .. })
    ));
}

#[test]
fn windows_cover_what_they_say() {
    let days = |text: &str| text.parse::<Days>().unwrap();
    let time = |text: &str| text.parse::<TimeOfDay>().unwrap();
    for text in ["daily", "mon-fri", "mon,wed,fri-sun", "sun"] {
        assert_eq!(days(text).to_string(), text);
    }
    assert_eq!(days("fri-mon").to_string(), "mon,fri-sun");
    assert_eq!(time("8:05").to_string(), "08:05");
    for bad in ["", "24:01", "8", "08:5", "-1:00", "08:60"] {
        assert!(bad.parse::<TimeOfDay>().is_err(), "{bad}");
    }
    let night = spans(days("sun"), time("22:00"), time("06:00"));
    let monday = spans(days("mon"), time("05:00"), time("07:00"));
    assert_eq!(overlap(&night, &monday), Some(300));
    let later = spans(days("mon"), time("06:00"), time("07:00"));
    assert_eq!(overlap(&night, &later), None);
    let whole: u32 = spans(Days::DAILY, time("00:00"), time("24:00"))
        .iter()
        .map(|(from, until)| until - from)
        .sum();
    assert_eq!(whole, 7 * 1440);
}

proptest! {
    #[test]
    fn no_text_panics(text in "(\\[(policies|groups|sites|alerts)(\\.[a-z*\"]{0,5}){0,4}\\]\n|(rpo|guests|after|windows|health|retention)(\\.[a-z]{1,3}){0,3} ?= ?[-a-z0-9\"'\\[\\]{}=,.]{0,14}\n|\\PC{0,20}\n){0,8}",
                      key in "\\PC{0,24}", value in "\\PC{0,24}") {
        let _ = read(&[("a.toml", &text), ("b.toml", SOUND)], &[(&format!("FARHAVEN__{key}"), &value), ("FARHAVEN__POLICIES__GOLD__RETENTION", &value)]);
    }
}
