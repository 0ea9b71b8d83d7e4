//! The exact words of mistakes.

use super::*;

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
