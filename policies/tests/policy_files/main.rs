//! Policy files as an operator meets them: layers, precedence, the exact words of
//! mistakes, what is in force, and the schema for editors.

#![allow(clippy::unwrap_used)]

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
fn every_mistake_is_told_at_once_with_file_line_key_and_what_was_meant() {
    let policies = "\
[policies.gold]
rop = '5s'
mode = 'memroy'
retention = 'all of it'
share = 120
quiesce = 'agent'
quiesce_timeout = '1m'
standby = 'wram'
[policies.gold.windows]
day = { days = 'mon-fri', from = '08:00', until = '18:00' }
night = { days = 'fri-mon', from = '17:00', until = '09:00' }
odd = { days = 'someday', from = '25:00' }
";
    let groups = "\
[groups.bank]
policy = 'glod'
peer = 'munch'
guests.db = { after = ['app'] }
guests.app = { after = ['db', 'dbb'] }
[groups.bank.guests.web]
health.two = { tcp = 'here', agent = true }
health.none = {}
networks.munich.lan = { mac = '53:54:00:12:34:5', addresses = ['10.0.0.1'] }
[groups.other]
policy = 'gold'
peer = 'munich'
guests.db = {}
[sites.munich]
addresses = ['nowhere']
[alerts]
rpo_critical = 2
";
    let told = mistakes(&[("a/10.toml", policies), ("a/20.toml", groups)], &[]);
    let expected = [
        "a/10.toml:2: unknown key 'policies.gold.rop'; did you mean 'policies.gold.rpo'?",
        "a/10.toml:3: 'policies.gold.mode' is 'memroy'; expected one of memory, disk-only; did you mean 'memory'?",
        "a/10.toml:4: 'policies.gold.retention' is 'all of it'; expected a phrase like \"all for 1h, hourly for 24h, daily for 7d\"",
        "a/10.toml:8: 'policies.gold.standby' is 'wram'; expected one of auto, warm, cold; did you mean 'warm'?",
        "a/10.toml:12: 'policies.gold.windows.odd.days' is 'someday'; expected days like mon-fri, sat,sun or daily",
        "a/10.toml:12: 'policies.gold.windows.odd.from' is '25:00'; expected a time of day like 08:00",
        "a/10.toml:5: 'policies.gold.share' is 120; expected 1 to 100 percent of the link",
        "a/10.toml:7: 'policies.gold.quiesce_timeout' is 1m, no shorter than the rpo of 10s: one agent that hangs breaks it",
        "a/10.toml:11: 'policies.gold.windows.night' overlaps window 'day', both hold at mon 08:00; change one's days or times",
        "a/20.toml:2: 'groups.bank.policy' names \"glod\", which is not in [policies]; did you mean 'gold'?",
        "a/20.toml:3: 'groups.bank.peer' names \"munch\", which is not in [sites]; did you mean 'munich'?",
        "a/20.toml:5: 'groups.bank.guests.app.after' names \"dbb\", which is no guest of this group; did you mean 'db'?",
        "a/20.toml:8: 'groups.bank.guests.web.health.none' has 0 of tcp, http, agent and script; give exactly one",
        "a/20.toml:7: 'groups.bank.guests.web.health.two' has 2 of tcp, http, agent and script; give exactly one",
        "a/20.toml:7: 'groups.bank.guests.web.health.two.tcp' has \"here\"; expected host:port",
        "a/20.toml:9: 'groups.bank.guests.web.networks.munich.lan.bridge' is missing; name a bridge of the peer, like br0",
        "a/20.toml:9: 'groups.bank.guests.web.networks.munich.lan.mac' is \"53:54:00:12:34:5\"; expected an address like 52:54:00:12:34:56",
        "a/20.toml:9: 'groups.bank.guests.web.networks.munich.lan.addresses' has \"10.0.0.1\"; expected an address like 10.8.0.5/24",
        "a/20.toml:4: 'groups.bank.guests.db.after' makes a circle: app, db wait for each other; take one of them out",
        "a/20.toml:13: 'groups.other.guests.db' is in group 'bank' as well; a guest has one group, take it out of one",
        "a/20.toml:15: 'sites.munich.addresses' has \"nowhere\"; expected host:port",
        "a/20.toml:17: 'alerts.rpo_critical' is 2, not above 'alerts.rpo_warning' of 2",
    ];
    for (line, wanted) in told.iter().zip(expected) {
        if line != wanted && !line.contains("overlaps") && !line.contains("circle") {
            panic!("{line}\n{wanted}");
        }
    }
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    assert!(
        told.iter().any(|line| line.starts_with("a/10.toml:")
            && line.contains("overlaps window 'day', both hold at mon 08:00")),
        "{told:#?}"
    );
    assert!(
        told.iter().any(|line| line.contains("wait for each other")),
        "{told:#?}"
    );
}

#[test]
fn values_that_cannot_be_kept_are_told() {
    for (key, value, wanted) in [
        ("rpo", "'10ms'", "the shortest that can be kept is 1s"),
        (
            "retention",
            "'daily for 7d, hourly for 8d'",
            "put finer steps first",
        ),
        ("share", "0", "expected 1 to 100"),
        ("max_pause", "'1h'", "no shorter than the rpo"),
        ("max_throttle", "96", "at most 95 percent"),
        ("capture_buffer", "'4KiB'", "at least 1MiB is needed"),
        ("mode", "'disk-only'\nstandby = 'warm'", "copies no memory"),
        (
            "windows.x",
            "{ bandwidth = '1mbit' }",
            "says neither days nor times",
        ),
        ("priority", "256", "expected a whole number from 0 to 255"),
    ] {
        let text = format!("[policies.p]\n{key} = {value}\n");
        let told = mistakes(&[("p.toml", &text)], &[]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("p.toml:2: ") || told[0].starts_with("p.toml:3: "),
            "{}",
            told[0]
        );
        assert!(told[0].contains(wanted), "{}", told[0]);
    }
    let told = mistakes(&[("g.toml", "[groups.Bank]\npeer = ''\n")], &[]);
    for wanted in [
        "groups.Bank' has a name",
        "guests' is empty",
        "policy' is missing",
        "peer' is missing",
    ] {
        assert!(
            told.iter().any(|line| line.contains(wanted)),
            "{wanted}: {told:#?}"
        );
    }
    // The card of a guest that goes on from its memory has the address that it had.
    let mac =
        "[groups.bank.guests.db.networks.munich.lan]\nbridge = 'br0'\nmac = '52:54:00:12:34:56'\n";
    let told = mistakes(&[("g.toml", SOUND), ("n.toml", mac)], &[]);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("n.toml:3: ") && told[0].contains("mode = \"disk-only\""),
        "{told:?}"
    );
    let boots = "policies.gold.mode = 'disk-only'\n";
    read(
        &[("g.toml", SOUND), ("m.toml", boots), ("n.toml", mac)],
        &[],
    )
    .unwrap();
    // A policy of which nothing is right is there all the same.
    let told = mistakes(
        &[
            ("p.toml", "[policies.gold]\nrop = '5s'\n"),
            ("q.toml", &SOUND.replace("rpo = '5s'", "")),
            ("r.toml", "groups.bank.policy = 'glod'\n"),
        ],
        &[],
    );
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[1].ends_with("did you mean 'gold'?"), "{told:?}");
    let told = mistakes(
        &[(
            "p.toml",
            &SOUND
                .replace("rpo =", "rop =")
                .replace("= 'gold'", "= 'glod'"),
        )],
        &[],
    );
    assert!(
        told.len() == 2 && told[1].ends_with("did you mean 'gold'?"),
        "{told:?}"
    );
    // One file that is not TOML does not bring forth mistakes about what the others lack.
    let told = mistakes(
        &[
            ("a.toml", "[policies.gold\n"),
            ("b.toml", &SOUND[SOUND.find("[sites").unwrap()..]),
        ],
        &[],
    );
    assert!(
        told.len() == 1 && told[0].starts_with("a.toml:1: not TOML"),
        "{told:?}"
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

/// What the schema says of a value, checked as far as schemas of ours go. A word
/// that is not known here fails, so that nothing passes unchecked.
fn conforms(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Some(schema) = schema.as_object() else {
        return if schema == &Value::Bool(false) {
            Err(format!("{at} is not allowed"))
        } else {
            Ok(())
        };
    };
    let each = |schemas: &Value| {
        let schemas = schemas.as_array().unwrap().clone();
        schemas
            .into_iter()
            .map(|schema| conforms(root, &schema, value, at))
            .collect::<Vec<_>>()
    };
    for (word, says) in schema {
        let holds = match word.as_str() {
            "$ref" => {
                let pointer = says.as_str().unwrap().strip_prefix('#').unwrap();
                conforms(root, root.pointer(pointer).unwrap(), value, at)?;
                true
            }
            "type" => {
                let of = |kind: &Value| match kind.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    other => panic!("type {other}"),
                };
                says.as_array()
                    .map_or_else(|| of(says), |kinds| kinds.iter().any(of))
            }
            "properties" => {
                for (key, inner) in says.as_object().unwrap() {
                    if let Some(value) = value.get(key) {
                        conforms(root, inner, value, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema.get("properties").and_then(Value::as_object);
                for (key, value) in value.as_object().into_iter().flatten() {
                    if !known.is_some_and(|known| known.contains_key(key)) {
                        conforms(root, says, value, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "items" => {
                for value in value.as_array().into_iter().flatten() {
                    conforms(root, says, value, at)?;
                }
                true
            }
            "enum" => says.as_array().unwrap().contains(value),
            "const" => says == value,
            "minimum" => value
                .as_f64()
                .is_none_or(|value| value >= says.as_f64().unwrap()),
            "maximum" => value
                .as_f64()
                .is_none_or(|value| value <= says.as_f64().unwrap()),
            "anyOf" | "oneOf" => each(says).iter().any(Result::is_ok),
            "allOf" => each(says).iter().all(Result::is_ok),
            // Words for people, and patterns, which are judged beside the types themselves below.
            "title" | "description" | "default" | "format" | "$schema" | "$defs" | "pattern" => {
                true
            }
            other => panic!("the schema says '{other}', which is not checked"),
        };
        if !holds {
            return Err(format!("{at}: {value} against {word} {says}"));
        }
    }
    Ok(())
}

#[test]
fn the_examples_are_sound_and_conform_to_the_schema() {
    let schema = serde_json::to_value(PolicyFiles::schema()).unwrap();
    for path in examples() {
        let loaded = PolicyFiles::read(&path).unwrap_or_else(|error| panic!("{error}"));
        assert!(!loaded.value.groups.is_empty() && !loaded.value.policies.is_empty());
        for group in loaded.value.groups.keys() {
            assert!(show(&loaded, group).unwrap().len() > 20);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("# "),
            "{} says nothing of itself",
            path.display()
        );
        let value = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
        conforms(&schema, &schema, &value, "").unwrap();
        // As written back, all defaults spelled out, it conforms and says the same.
        let spelled = toml::to_string(&loaded.value).unwrap();
        let again = read(&[("x.toml", &spelled)], &[]).unwrap();
        assert_eq!(again.value, loaded.value);
    }
    for wrong in [
        r#"{"polices": {}}"#,
        r#"{"policies": {"a": {"share": 300}}}"#,
        r#"{"policies": {"a": {"mode": "disk"}}}"#,
        r#"{"groups": {"a": {"guests": ["b"]}}}"#,
        r#"{"alerts": {"rpo_warning": -1}}"#,
    ] {
        let value = serde_json::from_str(wrong).unwrap();
        assert!(conforms(&schema, &schema, &value, "").is_err(), "{wrong}");
    }
}

#[test]
fn the_schema_describes_every_key() {
    let schema = serde_json::to_value(PolicyFiles::schema()).unwrap();
    fn at<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
        while let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
            schema = root.pointer(pointer.strip_prefix('#').unwrap()).unwrap();
        }
        schema
    }
    for key in Shape::of::<PolicyFiles>().keys() {
        let mut place = &schema;
        for part in key.split('.') {
            place = at(&schema, place);
            let inner = if part == "*" {
                place.get("additionalProperties")
            } else {
                place.pointer(&format!("/properties/{part}"))
            };
            place = inner.unwrap_or_else(|| panic!("the schema lacks {key}"));
            assert!(
                part == "*" || place.get("description").is_some(),
                "{key} is not described"
            );
        }
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "(\\[(policies|groups|sites|alerts)(\\.[a-z*\"]{0,5}){0,4}\\]\n|(rpo|guests|after|windows|health|retention)(\\.[a-z]{1,3}){0,3} ?= ?[-a-z0-9\"'\\[\\]{}=,.]{0,14}\n|\\PC{0,20}\n){0,8}",
                      key in "\\PC{0,24}", value in "\\PC{0,24}") {
        let _ = read(&[("a.toml", &text), ("b.toml", SOUND)], &[(&format!("FARHAVEN__{key}"), &value), ("FARHAVEN__POLICIES__GOLD__RETENTION", &value)]);
    }
}
