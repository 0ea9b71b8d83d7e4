//! What fuzzing feeds: every reader of what operators write, each as a function that takes
//! any bytes and panics when a promise broke. `fuzz/` has the targets; the tests below run
//! the same functions. Only with the feature `fuzzing`.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::path::Path;
use std::str::FromStr;

use crate::files::{PolicyFiles, start_order};
use crate::keep::Schedule;
use crate::load::{Checked, load_from};
use crate::runbook::plan::{Facts, plan};
use crate::runbook::{builtin, read, write};
use crate::site::{ENV_PREFIX, SiteConfig};
use crate::units::{ByteSize, Period, Rate, RateLimit};
use crate::week::{Days, TimeOfDay};

/// A target: its name, what takes the bytes, and valid inputs to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate.
pub const TARGETS: [Target; 4] = [
    ("policy_files", policy_files, policy_seeds),
    ("site_configs", site_configs, site_seeds),
    ("runbooks", runbooks, runbook_seeds),
    ("units", units, unit_seeds),
];

/// A configuration as a file, then each line as a variable of the environment.
fn load<T: Checked>(bytes: &[u8]) -> Option<T> {
    let text = String::from_utf8_lossy(bytes);
    let path = Path::new("given.toml");
    let none: [(String, String); 0] = [];
    let given = load_from::<T>(Some((path, &text)), ENV_PREFIX, none, &[]);
    let lines = text.lines().take(8).filter_map(|line| line.split_once('='));
    let variables: Vec<_> = lines
        .map(|(key, value)| {
            let key = key.trim().replace('.', "__").to_uppercase();
            (format!("{ENV_PREFIX}__{key}"), value.trim().to_owned())
        })
        .collect();
    let by_variables = load_from::<T>(None, ENV_PREFIX, variables, &[]);
    for error in [given.as_ref().err(), by_variables.as_ref().err()]
        .into_iter()
        .flatten()
    {
        // Every mistake is a sentence.
        assert!(!error.to_string().is_empty());
    }
    given.ok()
}

/// Policy files. One that is sound says in what order each group starts.
pub fn policy_files(bytes: &[u8]) {
    let Some(files) = load::<PolicyFiles>(bytes) else {
        return;
    };
    assert!(files.problems().is_empty());
    for group in files.groups.values() {
        let waves = start_order(&group.guests);
        assert_eq!(waves.concat().len(), group.guests.len());
        for (at, wave) in waves.iter().enumerate() {
            let earlier = waves[..at].concat();
            let mut after = wave.iter().flat_map(|guest| &group.guests[*guest].after);
            assert!(after.all(|other| earlier.contains(&other.as_str())));
        }
    }
}

/// A site's configuration.
pub fn site_configs(bytes: &[u8]) {
    if let Some(config) = load::<SiteConfig>(bytes) {
        assert!(config.problems().is_empty());
    }
}

/// A runbook: one that is sound has a plan, and is the same when it is written and read.
pub fn runbooks(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let path = Path::new("given.toml");
    let runbook = match read::text(path, &text, None) {
        Ok(runbook) => runbook,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    for mode in &runbook.modes {
        let plan = plan(&runbook, *mode, &Facts::default()).expect("one of its modes");
        assert!(!plan.text().is_empty());
    }
    let again = read::text(path, &write(&runbook), None);
    assert_eq!(again.expect("what is written can be read"), runbook);
}

/// What reads as a `T` is the same when it is written and read.
fn unit<T: FromStr + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let again = value.to_string().parse::<T>().ok();
        assert_eq!(again.as_ref(), Some(&value), "{text:?} is {value}");
    }
}

/// Durations, sizes, rates, schedules, days, times of day.
pub fn units(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    unit::<Period>(&text);
    unit::<ByteSize>(&text);
    unit::<Rate>(&text);
    unit::<RateLimit>(&text);
    unit::<Schedule>(&text);
    unit::<Days>(&text);
    unit::<TimeOfDay>(&text);
}

fn policy_seeds() -> Vec<Vec<u8>> {
    [
        "[policies.gold]\nrpo='5s'\nretention='all for 2h, newest 7'\nwindows.office={days='mon-fri',from='08:00',until='18:00',bandwidth='20mbit'}\n[sites.munich]\naddresses=['dr:1']\n[groups.bank]\npolicy='gold'\npeer='munich'\n[groups.bank.guests.db]\nhealth.up={tcp='db:1',every='1s'}\n[groups.bank.guests.app]\nafter=['db']\nnetworks.munich.lan={bridge='br0'}\n[alerts]\nrpo_warning=2\n",
        "policies.gold.rpo = 1s\npolicies.gold.mode = disk-only\ngroups.bank.peer = x\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn site_seeds() -> Vec<Vec<u8>> {
    [
        "[site]\nname='east'\n[listen]\naddress='0.0.0.0:4747'\nadvertise=['dr:1']\n[link]\nrate_limit='50mbit'\nwindow='32MiB'\nwindows.office={days='mon-fri',from='08:00',until='18:00',bandwidth='20mbit'}\n[protect]\nrpo='1m'\nwarm=false\n[log]\nformat='json'\n",
        "site.name = east\nlink.window = 8MiB\nlisten.advertise = a:1,b:2\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn runbook_seeds() -> Vec<Vec<u8>> {
    let guests = vec!["db".to_owned(), "app".to_owned()];
    let groups = BTreeMap::from([("bank".to_owned(), guests)]);
    let all = write(&builtin::of_all(groups.clone()));
    let modes = [crate::runbook::Mode::Planned, crate::runbook::Mode::Test];
    let mut seeds: Vec<_> = modes
        .map(|mode| write(&builtin::of_mode(mode, groups.clone())))
        .to_vec();
    seeds.push(all);
    seeds.into_iter().map(String::into_bytes).collect()
}

fn unit_seeds() -> Vec<Vec<u8>> {
    [
        "10s",
        "1h30m",
        "250ms",
        "64MiB",
        "2GB",
        "2.5gbit",
        "none",
        "mon-fri",
        "sat,sun",
        "08:00",
        "all for 1h, hourly for 24h, daily for 7d",
        "newest 7",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

#[cfg(test)]
#[path = "../../fuzz/tried.rs"]
mod tried;

#[cfg(test)]
mod tests {
    #[test]
    fn no_bytes_break_a_promise() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        super::tried::all(&super::TARGETS, &fuzz, 200);
    }

    /// What the targets begin with is what it is meant to be.
    #[test]
    fn seeds_are_sound() {
        use super::*;
        let text = |seed: Vec<u8>| String::from_utf8(seed).expect("text");
        assert!(load::<PolicyFiles>(&policy_seeds()[0]).is_some());
        assert!(load::<SiteConfig>(&site_seeds()[0]).is_some());
        for seed in runbook_seeds() {
            read::text(Path::new("r.toml"), &text(seed), None).expect("a sound runbook");
        }
    }
}
