//! A site's configuration as an operator meets it: sources, precedence, and the
//! exact words of mistakes.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use farhaven_policies::bandwidth::Window;
use farhaven_policies::load::{Checked, LARGEST_FILE, LoadError, load, load_from};
use farhaven_policies::shape::Shape;
use farhaven_policies::site::{ENV_PREFIX, LogFormat, SiteConfig};
use farhaven_policies::units::{ByteSize, Period, RateLimit};
use proptest::prelude::*;

const PATH: &str = "/etc/farhaven/site.toml";

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect()
}

fn read(
    text: &str,
    variables: &[(&str, &str)],
    flags: &[(&str, &str)],
) -> Result<SiteConfig, LoadError> {
    load_from(
        Some((Path::new(PATH), text)),
        ENV_PREFIX,
        pairs(variables),
        &pairs(flags),
    )
}

fn mistakes(text: &str, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> String {
    read(text, variables, flags).unwrap_err().to_string()
}

#[test]
fn flags_win_over_variables_over_the_file() {
    let file = "[site]\nname = \"a\"\n[protect]\nrpo = \"1m\"\nwarm = false\n[link]\nwindow = \"8MiB\"\n[log]\nformat='json'";
    let config = read(
        file,
        &[
            ("FARHAVEN__PROTECT__RPO", "40s"),
            ("FARHAVEN__LINK__WINDOW", "16MiB"),
            ("FARHAVEN_SOCKET", "x"),
            ("PATH", "y"),
        ],
        &[("protect.rpo", "20s"), ("link.rate_limit", "50mbit")],
    )
    .unwrap();
    assert_eq!(config.protect.rpo, Period::from_secs(20));
    assert_eq!(config.link.window, ByteSize::from_mib(16));
    assert_eq!(
        config.link.rate_limit,
        RateLimit::at("50mbit".parse().unwrap())
    );
    assert!(!config.protect.warm);
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(
        config.protect.retention,
        SiteConfig::default().protect.retention
    );
}

#[test]
fn every_kind_of_value_comes_from_a_variable() {
    let config = read(
        "[networks]\nLAN = 'user'\n'a.b-c' = 'bridge,br=br0'",
        &[
            ("FARHAVEN__SITE__NAME", "007"),
            (
                "FARHAVEN__LISTEN__ADVERTISE",
                "dr.example.com:4747, 10.0.0.1:4748",
            ),
            ("FARHAVEN__LINK__GSO", "false"),
            ("FARHAVEN__PROTECT__PRIORITY", "7"),
            ("FARHAVEN__PROTECT__RETENTION__NEWEST", "9"),
            ("FARHAVEN__LOG__FORMAT", "json"),
            ("FARHAVEN__NETWORKS__NET0", "tap,ifname=tap0"),
        ],
        &[],
    )
    .unwrap();
    assert_eq!(config.site.name, "007");
    assert_eq!(
        config.listen.advertise,
        ["dr.example.com:4747", "10.0.0.1:4748"]
    );
    assert!(!config.link.gso);
    assert_eq!(
        (config.protect.priority, config.protect.retention.newest),
        (7, 9)
    );
    let networks: Vec<_> = config
        .networks
        .iter()
        .map(|(id, netdev)| (id.as_str(), netdev.as_str()))
        .collect();
    assert_eq!(
        networks,
        [
            ("LAN", "user"),
            ("a.b-c", "bridge,br=br0"),
            ("net0", "tap,ifname=tap0")
        ]
    );
}

#[test]
fn all_mistakes_are_told_at_once_each_with_its_place() {
    let file = "[site]\nname = \"a\"\n\n[link]\nrate_lmit = \"none\"\ngso = \"maybe\"\n[protect]\nrpo = \"10 parsecs\"\n\
                priority = 999\n[lgo]\nlevel = 'x'\n";
    let told = mistakes(
        file,
        &[
            ("FARHAVEN__LINK__WINDW", "1"),
            ("FARHAVEN__STORE__MIN_FREE", "lots"),
        ],
        &[
            ("rate_limit", "1mbit"),
            ("log.format", "xml"),
            ("rpo", "1s"),
            ("qqqq", ""),
        ],
    );
    let expected = [
        "/etc/farhaven/site.toml:5: unknown key 'link.rate_lmit'; did you mean 'link.rate_limit'?",
        "/etc/farhaven/site.toml:6: 'link.gso' is \"maybe\"; expected true or false",
        "/etc/farhaven/site.toml:8: 'protect.rpo' is \"10 parsecs\"; expected a duration like 10s or 2m",
        "/etc/farhaven/site.toml:9: 'protect.priority' is 999; expected a whole number from 0 to 255",
        "/etc/farhaven/site.toml:10: unknown key 'lgo'; did you mean 'log'?",
        "environment variable FARHAVEN__LINK__WINDW: unknown key 'link.windw'; did you mean 'link.window'?",
        "environment variable FARHAVEN__STORE__MIN_FREE: 'store.min_free' is \"lots\"; expected a size like 64MiB or 2GB",
        "--set rate_limit: unknown key 'rate_limit'; did you mean 'link.rate_limit'?",
        "--set rpo: unknown key 'rpo'; did you mean 'protect.rpo'?",
        "--set qqqq: unknown key 'qqqq'; `farhaven site init` writes a file with every key",
        "--set log.format: 'log.format' is \"xml\"; expected one of text, json",
    ];
    assert_eq!(told.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_value_in_place_of_a_table_and_the_reverse_are_told() {
    let file = "site = 3\n[log.level]\ndeep = 1\n[listen]\nadvertise = 'x:1'\naddress = 'nowhere'\n[protect.retention]\nnewest = -1";
    let told = mistakes(file, &[], &[]);
    let expected = [
        "/etc/farhaven/site.toml:1: 'site' is 3; expected a table",
        "/etc/farhaven/site.toml:2: 'log.level' is [log.level]; expected a string",
        "/etc/farhaven/site.toml:5: 'listen.advertise' is 'x:1'; expected a list, like [\"one\", \"two\"]",
        "/etc/farhaven/site.toml:6: 'listen.address' is 'nowhere'; expected address:port, like 0.0.0.0:4747",
        "/etc/farhaven/site.toml:8: 'protect.retention.newest' is -1; expected a whole number, not negative",
    ];
    assert_eq!(told.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_is_not_toml_is_told_with_its_line() {
    let told = mistakes("[site]\nname = \"a\"\nstate_dir = /var\n", &[], &[]);
    assert!(
        told.starts_with("/etc/farhaven/site.toml:3: not TOML: "),
        "{told}"
    );
    let twice = mistakes("[log]\nlevel='a'\nlevel='b'\n", &[], &[]);
    assert!(
        twice.starts_with("/etc/farhaven/site.toml:3: not TOML: duplicate key"),
        "{twice}"
    );
}

#[test]
fn sound_types_with_unsound_values_are_told_where_they_were_set() {
    let file = "[site]\nname = \"-Berlin\"\nstate_dir = \"here\"\n[link]\nkeep_alive = '20s'\n[api]\nsocket='/{nme}.sock'\n\
                [listen]\nadvertise = ['dr']\n[networks]\nlan = 'tap,id=n0'";
    let told = mistakes(
        file,
        &[("FARHAVEN__PROTECT__RPO", "1ms")],
        &[("protect.retention.newest", "0")],
    );
    let expected = [
        "/etc/farhaven/site.toml:2: 'site.name' may have up to 63",
        "/etc/farhaven/site.toml:3: 'site.state_dir' must be an absolute path",
        "/etc/farhaven/site.toml:9: 'listen.advertise' has \"dr\"; expected host:port",
        "/etc/farhaven/site.toml:7: 'api.socket' has an unknown placeholder",
        "/etc/farhaven/site.toml: 'store.dir' must be an absolute path",
        "/etc/farhaven/site.toml: 'activate.run_dir' must be an absolute path",
        "/etc/farhaven/site.toml:4: 'link.idle_timeout' must be at least twice",
        "/etc/farhaven/site.toml:11: 'networks.lan' sets an id",
        "environment variable FARHAVEN__PROTECT__RPO: 'protect.rpo' is 1ms",
        "--set protect.retention.newest: 'protect.retention.newest' is 0",
    ];
    let told: Vec<_> = told.lines().collect();
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (line, start) in told.iter().zip(expected) {
        assert!(line.starts_with(start), "{line}\n{start}");
    }
    let nameless = load_from::<SiteConfig>(None, ENV_PREFIX, [], &[])
        .unwrap_err()
        .to_string();
    assert!(
        nameless.starts_with("no configuration given: 'site.name' is missing"),
        "{nameless}"
    );
}

#[test]
fn the_template_is_the_defaults_and_names_every_key() {
    let name = pairs(&[("site.name", "berlin")]);
    let as_it_is: SiteConfig = load_from(
        Some((Path::new(PATH), SiteConfig::default_toml())),
        ENV_PREFIX,
        [],
        &name,
    )
    .unwrap();
    let mut defaults = SiteConfig::default();
    defaults.site.name = "berlin".into();
    assert_eq!(as_it_is, defaults);

    // With every "# key = value" uncommented it says the same, and leaves no key out.
    let is_key = |line: &str| {
        let key = line.split(" = ").next().unwrap_or_default();
        line.contains(" = ")
            && key
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    };
    let uncommented: Vec<_> = SiteConfig::default_toml()
        .lines()
        .map(|line| {
            line.strip_prefix("# ")
                .filter(|rest| is_key(rest))
                .unwrap_or(line)
        })
        .filter(|line| !line.starts_with("lan = "))
        .collect();
    let uncommented = uncommented.join("\n");
    let spelled_out: SiteConfig =
        load_from(Some((Path::new(PATH), &uncommented)), ENV_PREFIX, [], &name).unwrap();
    assert_eq!(spelled_out, defaults);
    let mut table = String::new();
    let mut keys = vec!["networks.*".to_owned()];
    for line in uncommented.lines() {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            table = name.to_owned();
            keys.push(table.clone());
        } else if is_key(line) {
            keys.push(format!("{table}.{}", line.split(" = ").next().unwrap()));
        }
    }
    let mut valid = Shape::of::<SiteConfig>().keys();
    // Windows have names of the operator's choice; the file shows one in a comment.
    valid.retain(|key| !key.contains(".windows."));
    keys.sort();
    valid.sort();
    assert_eq!(keys, valid);
}

#[test]
fn a_new_sites_file_loads_with_its_name_and_directory() {
    let text = SiteConfig::template("berlin", Path::new("/srv/far \"haven\""));
    let config = read(&text, &[], &[]).unwrap();
    assert_eq!(config.site.name, "berlin");
    assert_eq!(
        config.api_socket(),
        Path::new("/srv/far \"haven\"/api.sock")
    );
    assert_eq!(config.ram_dir(), Path::new("/dev/shm/farhaven-berlin"));
    assert_eq!(config.store_dir(), Path::new("/srv/far \"haven\"/store"));
    assert_eq!(config.run_dir(), Path::new("/srv/far \"haven\"/run"));
}

#[test]
fn the_probe_agrees_with_what_serde_writes() {
    let mut config = SiteConfig::default();
    config.networks.insert("*".into(), "user".into());
    let window = Window::default;
    config.link.windows.insert("*".into(), window());
    config.protect.windows.insert("*".into(), window());
    fn walk(value: &toml::Value, prefix: &str, keys: &mut Vec<String>) {
        for (key, value) in value.as_table().into_iter().flatten() {
            let key = if prefix.is_empty() {
                key.clone()
            } else {
                format!("{prefix}.{key}")
            };
            keys.push(key.clone());
            walk(value, &key, keys);
        }
    }
    let (mut written, mut probed) = (Vec::new(), Shape::of::<SiteConfig>().keys());
    walk(&toml::Value::try_from(&config).unwrap(), "", &mut written);
    written.sort();
    probed.sort();
    assert_eq!(written, probed);
}

#[test]
fn windows_of_the_link_are_read_and_judged() {
    let text = "[site]\nname = \"a\"\n[link]\n\
                windows.office = { days = \"mon-fri\", from = \"08:00\", until = \"18:00\", bandwidth = \"20mbit\" }\n\
                [protect]\nwindows.night = { from = \"22:00\", until = \"04:00\" }\n";
    let config = read(text, &[], &[]).unwrap();
    let bandwidth = config.link.windows["office"].bandwidth;
    assert_eq!(bandwidth, RateLimit::at("20mbit".parse().unwrap()));
    assert_eq!(config.protect.link_terms().windows.len(), 1);
    let both = format!("{text}windows.late = {{ from = \"23:00\", until = \"23:30\" }}\n");
    let told = mistakes(&both, &[], &[]);
    assert!(
        told.contains("overlaps window 'late', both hold at mon 23:00"),
        "{told}"
    );
    let wrong = mistakes(&text.replace("08:00", "25:00"), &[], &[]);
    assert!(wrong.contains("office"), "{wrong}");
}

#[test]
fn files_that_are_absent_or_far_too_large_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let absent =
        load::<SiteConfig>(Some(&dir.path().join("none.toml")), ENV_PREFIX, &[]).unwrap_err();
    assert!(
        absent.to_string().contains("none.toml") && absent.to_string().contains("site init"),
        "{absent}"
    );
    let large = dir.path().join("large.toml");
    std::fs::File::create(&large)
        .unwrap()
        .set_len(LARGEST_FILE + 1)
        .unwrap();
    assert!(matches!(
        load::<SiteConfig>(Some(&large), ENV_PREFIX, &[]),
        Err(LoadError::TooLarge { .. })
    ));
    let sound = dir.path().join("site.toml");
    std::fs::write(&sound, SiteConfig::template("berlin", dir.path())).unwrap();
    let config = load::<SiteConfig>(Some(&sound), "FARHAVEN_TEST_THAT_SETS_NOTHING", &[]).unwrap();
    assert_eq!(config.problems(), []);
}

#[test]
fn the_example_files_load() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/policies");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let loaded = load::<SiteConfig>(Some(&path), "FARHAVEN_TEST_THAT_SETS_NOTHING", &[]);
        assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
        seen += 1;
    }
    assert!(seen >= 3, "only {seen} examples");
}

proptest! {
    #[test]
    fn no_text_panics(text in "(\\[[a-z.]{0,12}\\]\n|[a-z._\"']{1,9} ?= ?[-a-z0-9\"'\\[\\]{},.]{0,12}\n|\\PC{0,20}\n){0,6}",
                      key in "\\PC{0,24}", value in "\\PC{0,24}") {
        let _ = read(&text, &[(&format!("FARHAVEN__{key}"), &value)], &[(&key, &value)]);
    }
}
