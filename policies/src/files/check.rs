//! What is wrong in policy files with values that are each of the right type:
//! names that nothing has, guests in two groups, cycles, windows that overlap,
//! values that cannot be kept.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::load::{Checked, Origins, Problem};
use crate::mistake::nearest_of;
use crate::policy::{SHORTEST_RPO, SMALLEST_CAPTURE_BUFFER, STRONGEST_THROTTLE};
use crate::shape::Shape;
use crate::site::SiteConfig;
use crate::units::Period;
use crate::week::{minute_of_week, overlap, spans};

use super::{Alerts, Group, Health, Mode, NamedPolicy, Network, PolicyFiles, Quiesce, Standby};

/// Longest name of a policy, group, site, guest or anything else.
const LONGEST_NAME: usize = 63;
/// Guests, groups, policies that are judged; more is a file gone wrong.
const MOST_NAMES: usize = 10_000;

impl Checked for PolicyFiles {
    const HELP: &'static str = "`farhaven policy schema` describes every key";

    fn neighbour(key: &str) -> bool {
        Shape::of::<SiteConfig>().child(key).is_some()
    }

    fn problems(&self) -> Vec<Problem> {
        self.problems_with(&Origins::default())
    }

    fn problems_with(&self, origins: &Origins) -> Vec<Problem> {
        let mut found = Found::default();
        let guests = self.groups.values().map(|group| group.guests.len()).sum::<usize>();
        if self.policies.len().max(self.groups.len()).max(guests) > MOST_NAMES {
            found.add("groups", format!("are more than can be checked; at most {MOST_NAMES} guests, groups and policies"));
            return found.0;
        }
        for (table, names) in [
            ("policies", self.policies.keys().collect::<Vec<_>>()),
            ("groups", self.groups.keys().collect()),
            ("sites", self.sites.keys().collect()),
        ] {
            for name in &names {
                found.name(table, name);
                let key = format!("{table}.{name}");
                // A variable overrides what a file names; else a slip of the pen makes a new one.
                if origins.any_file() && !origins.in_file(&key) {
                    let others = names.iter().filter(|other| origins.in_file(&format!("{table}.{other}")));
                    found.unknown(&key, "is named by no file", name, others.map(|other| other.as_str()));
                }
            }
        }
        for (name, policy) in &self.policies {
            found.policy(&format!("policies.{name}"), policy, origins);
        }
        for (name, group) in &self.groups {
            self.group(&mut found, name, group);
        }
        self.shared_guests(&mut found);
        for (name, site) in &self.sites {
            let key = format!("sites.{name}.addresses");
            site.addresses.iter().for_each(|address| found.address(&key, address));
        }
        found.alerts(&self.alerts);
        found.0
    }
}

#[derive(Default)]
struct Found(Vec<Problem>);

impl PolicyFiles {
    fn group(&self, found: &mut Found, name: &str, group: &Group) {
        let key = format!("groups.{name}");
        if group.guests.is_empty() {
            found.add(&format!("{key}.guests"), "is empty; name its guests, like [groups.bank.guests.db1]");
        }
        for (field, named, known) in [
            ("policy", &group.policy, self.policies.keys().collect::<Vec<_>>()),
            ("peer", &group.peer, self.sites.keys().collect()),
        ] {
            let (key, table) = (format!("{key}.{field}"), if field == "policy" { "policies" } else { "sites" });
            if named.is_empty() {
                found.add(&key, format!("is missing; name one of [{table}]"));
            } else if !known.contains(&named) {
                let what = format!("names {named:?}, which is not in [{table}]");
                found.unknown(&key, &what, named, known.iter().map(|name| name.as_str()));
            }
        }
        for (guest, member) in &group.guests {
            let key = format!("{key}.guests.{guest}");
            found.name(&format!("groups.{name}.guests"), guest);
            for after in &member.after {
                let key = format!("{key}.after");
                if after == guest {
                    found.add(&key, "names the guest itself; take it out");
                } else if !group.guests.contains_key(after) {
                    let what = format!("names {after:?}, which is no guest of this group");
                    found.unknown(&key, &what, after, group.guests.keys().map(String::as_str));
                }
            }
            for (check, health) in &member.health {
                found.name(&format!("{key}.health"), check);
                found.health(&format!("{key}.health.{check}"), health);
            }
            for (peer, networks) in &member.networks {
                let key = format!("{key}.networks.{peer}");
                if !self.sites.contains_key(peer) {
                    let known = self.sites.keys().map(String::as_str);
                    found.unknown(&key, "is for a site that is not in [sites]", peer, known);
                }
                for (network, mapped) in networks {
                    found.network(&format!("{key}.{network}"), mapped);
                }
            }
        }
        if let Some(cycle) = cycle(group) {
            let last = cycle.last().copied().unwrap_or_default();
            found.add(
                &format!("{key}.guests.{last}.after"),
                format!("makes a circle: {} wait for each other; take one of them out", cycle.join(", ")),
            );
        }
    }

    fn shared_guests(&self, found: &mut Found) {
        let mut homes: HashMap<&str, &str> = HashMap::new();
        for (name, group) in &self.groups {
            for guest in group.guests.keys() {
                if let Some(other) = homes.insert(guest, name) {
                    found.add(
                        &format!("groups.{name}.guests.{guest}"),
                        format!("is in group '{other}' as well; a guest has one group, take it out of one"),
                    );
                }
            }
        }
    }
}

impl Found {
    fn add(&mut self, key: &str, what: impl Into<String>) {
        self.0.push(Problem::new(key, what));
    }

    fn require(&mut self, holds: bool, key: &str, what: impl Into<String>) {
        if !holds {
            self.add(key, what);
        }
    }

    /// Something that is not known, with what is most like it.
    fn unknown<'a>(&mut self, key: &str, what: &str, word: &str, known: impl Iterator<Item = &'a str>) {
        let known: Vec<&str> = known.collect();
        let hint = match nearest_of(known.iter().copied(), word) {
            Some(near) => format!("did you mean '{near}'?"),
            None if known.is_empty() => "there is none yet, add it".to_owned(),
            None => {
                let some: Vec<_> = known.iter().take(5).copied().collect();
                format!("known are {}", some.join(", "))
            }
        };
        self.add(key, format!("{what}; {hint}"));
    }

    fn name(&mut self, table: &str, name: &str) {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        let sound = (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-');
        self.require(
            sound,
            &format!("{table}.{name}"),
            "has a name that cannot be used; up to 63 small letters, digits, - and _ can, no - first",
        );
    }

    fn policy(&mut self, key: &str, policy: &NamedPolicy, origins: &Origins) {
        let field = |name: &str| format!("{key}.{name}");
        self.require(policy.rpo >= SHORTEST_RPO, &field("rpo"), format!("is {}; the shortest that can be kept is {SHORTEST_RPO}", policy.rpo));
        if let Some(problem) = policy.retention.problem() {
            self.add(&field("retention"), problem);
        }
        self.require((1..=100).contains(&policy.share), &field("share"), format!("is {}; expected 1 to 100 percent of the link", policy.share));
        self.require(policy.max_pause > Period::ZERO, &field("max_pause"), "is 0s; no cut is free, try 100ms");
        self.require(policy.max_pause < policy.rpo, &field("max_pause"), format!("is {}, no shorter than the rpo of {}", policy.max_pause, policy.rpo));
        self.require(policy.max_blackout > Period::ZERO, &field("max_blackout"), "is 0s; no move is free, try 500ms");
        self.require(
            policy.max_throttle <= STRONGEST_THROTTLE,
            &field("max_throttle"),
            format!("is {}; at most {STRONGEST_THROTTLE} percent can be taken, 0 means never throttle", policy.max_throttle),
        );
        self.require(
            policy.capture_buffer >= SMALLEST_CAPTURE_BUFFER,
            &field("capture_buffer"),
            format!("is {}; at least {SMALLEST_CAPTURE_BUFFER} is needed", policy.capture_buffer),
        );
        self.require(
            policy.mode == Mode::Memory || policy.standby != Standby::Warm,
            &field("standby"),
            "is warm, but the mode disk-only copies no memory to keep ready; use cold or auto",
        );
        if policy.quiesce == Quiesce::Agent {
            let timeout = policy.quiesce_timeout;
            self.require(timeout > Period::ZERO, &field("quiesce_timeout"), "is 0s; an agent needs time to answer, try 2s");
            self.require(timeout < policy.rpo, &field("quiesce_timeout"), format!("is {timeout}, no shorter than the rpo of {}: one agent that hangs breaks it", policy.rpo));
        }
        self.windows(key, policy, origins);
    }

    fn windows(&mut self, key: &str, policy: &NamedPolicy, origins: &Origins) {
        let windows: Vec<_> = policy
            .windows
            .iter()
            .map(|(name, window)| (name, spans(window.days, window.from, window.until)))
            .collect();
        for (index, (name, covered)) in windows.iter().enumerate() {
            self.name(&format!("{key}.windows"), name);
            let given = |field: &str| origins.of_key(&format!("{key}.windows.{name}.{field}")).is_some();
            let asked = ["days", "from", "until"].into_iter().any(given);
            self.require(
                asked || !origins.any_file(),
                &format!("{key}.windows.{name}"),
                "says neither days nor times; give days, from or until",
            );
            // Windows are few; a file of thousands is told of the first ones it compares.
            for (other, before) in windows[..index].iter().take(100) {
                if let Some(minute) = overlap(before, covered) {
                    self.add(
                        &format!("{key}.windows.{name}"),
                        format!("overlaps window '{other}', both hold at {}; change one's days or times", minute_of_week(minute)),
                    );
                }
            }
        }
    }

    fn health(&mut self, key: &str, health: &Health) {
        let kinds = [
            health.tcp.is_some(),
            health.http.is_some(),
            health.agent.is_some(),
            health.script.is_some(),
        ];
        let count = kinds.iter().filter(|given| **given).count();
        self.require(count == 1, key, format!("has {count} of tcp, http, agent and script; give exactly one"));
        if let Some(address) = &health.tcp {
            self.address(&format!("{key}.tcp"), address);
        }
        if let Some(url) = &health.http {
            let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
            let host = rest.map(|rest| rest.split('/').next().unwrap_or_default());
            let sound = host.is_some_and(|host| !host.is_empty()) && !url.contains(char::is_whitespace);
            self.require(sound, &format!("{key}.http"), format!("is {url:?}; expected a URL like http://10.8.0.5:8080/health"));
        }
        self.require(health.agent != Some(false), &format!("{key}.agent"), "is false, which checks nothing; take it out");
        if let Some(script) = &health.script {
            let absolute = script.first().is_some_and(|program| program.starts_with('/'));
            self.require(absolute, &format!("{key}.script"), "must begin with the absolute path of a program");
        }
        self.require(health.every > Period::ZERO, &format!("{key}.every"), "is 0s; try 2s");
        self.require(health.timeout >= health.every, &format!("{key}.timeout"), format!("is {}, shorter than the {} from one try to the next", health.timeout, health.every));
    }

    fn network(&mut self, key: &str, network: &Network) {
        let bridge = &network.bridge;
        let plain = bridge.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        self.require(!bridge.is_empty(), &format!("{key}.bridge"), "is missing; name a bridge of the peer, like br0");
        self.require(plain && bridge.len() <= 15, &format!("{key}.bridge"), format!("is {bridge:?}; Linux takes up to 15 letters without blanks and slashes"));
        if !network.mac.is_empty() {
            let pairs: Vec<_> = network.mac.split(':').map(|pair| (pair.len() == 2).then(|| u8::from_str_radix(pair, 16).ok()).flatten()).collect();
            let first = pairs.first().copied().flatten();
            let whole = pairs.len() == 6 && pairs.iter().all(Option::is_some);
            self.require(whole, &format!("{key}.mac"), format!("is {:?}; expected an address like 52:54:00:12:34:56", network.mac));
            self.require(!whole || first.is_some_and(|first| first & 1 == 0), &format!("{key}.mac"), "is a multicast address; make the second digit even");
        }
        for address in &network.addresses {
            let sound = address.split_once('/').is_some_and(|(ip, bits)| {
                let most = ip.parse::<IpAddr>().map(|ip| if ip.is_ipv4() { 32 } else { 128 });
                most.is_ok_and(|most| bits.parse::<u8>().is_ok_and(|bits| bits <= most))
            });
            self.require(sound, &format!("{key}.addresses"), format!("has {address:?}; expected an address like 10.8.0.5/24"));
        }
    }

    fn address(&mut self, key: &str, address: &str) {
        let sound = address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && !host.contains(char::is_whitespace) && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        self.require(sound, key, format!("has {address:?}; expected host:port"));
    }

    fn alerts(&mut self, alerts: &Alerts) {
        self.require(alerts.rpo_warning >= 1, "alerts.rpo_warning", "is 0, which always warns; try 2");
        self.require(
            alerts.rpo_critical > alerts.rpo_warning,
            "alerts.rpo_critical",
            format!("is {}, not above 'alerts.rpo_warning' of {}", alerts.rpo_critical, alerts.rpo_warning),
        );
        self.require(alerts.test_overdue > Period::ZERO, "alerts.test_overdue", "is 0s, which is always over; try 30d");
        self.require(alerts.clock_skew > Period::ZERO, "alerts.clock_skew", "is 0s; no two clocks are the same, try 1s");
        self.require((1..=100).contains(&alerts.store_critical), "alerts.store_critical", format!("is {}; expected 1 to 100 percent", alerts.store_critical));
        self.require(
            alerts.store_warning < alerts.store_critical,
            "alerts.store_warning",
            format!("is {}, not below 'alerts.store_critical' of {}", alerts.store_warning, alerts.store_critical),
        );
    }
}

/// Guests that wait for each other in a circle, each for the one before it.
fn cycle(group: &Group) -> Option<Vec<&str>> {
    let mut waits: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (guest, member) in &group.guests {
        let known = member.after.iter().map(String::as_str);
        let others = known.filter(|after| after != guest && group.guests.contains_key(*after));
        waits.insert(guest, others.collect());
    }
    // Whoever waits for nobody starts; what is left when nobody starts any more is stuck.
    let mut followers: HashMap<&str, Vec<&str>> = HashMap::new();
    for (guest, after) in &waits {
        after.iter().for_each(|before| followers.entry(before).or_default().push(guest));
    }
    let mut counts: HashMap<&str, usize> = waits.iter().map(|(guest, after)| (*guest, after.len())).collect();
    let mut free: Vec<&str> = waits.keys().copied().filter(|guest| counts[guest] == 0).collect();
    while let Some(guest) = free.pop() {
        for follower in followers.get(guest).into_iter().flatten() {
            if let Some(count) = counts.get_mut(follower) {
                *count -= 1;
                if *count == 0 {
                    free.push(follower);
                }
            }
        }
    }
    let stuck = |guest: &&str| counts.get(guest).is_some_and(|count| *count > 0);
    let (mut walk, mut seen) = (Vec::new(), HashMap::new());
    let mut at = waits.keys().copied().find(|guest| stuck(guest))?;
    loop {
        if let Some(first) = seen.insert(at, walk.len()) {
            walk.drain(..first);
            walk.reverse();
            return Some(walk);
        }
        walk.push(at);
        at = waits.get(at)?.iter().copied().find(|before| stuck(before))?;
    }
}
