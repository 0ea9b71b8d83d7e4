//! What is wrong in policy files with values that are each of the right type:
//! names that nothing has, guests in two groups, cycles, windows that overlap,
//! values that cannot be kept.

use std::collections::{BTreeMap, HashMap};

use crate::load::{Checked, Origins, Problem};
use crate::mistake::nearest_of;
use crate::shape::Shape;
use crate::site::SiteConfig;

use super::{Group, Mode, PolicyFiles};

mod values;

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
        let guests = self
            .groups
            .values()
            .map(|group| group.guests.len())
            .sum::<usize>();
        if self.policies.len().max(self.groups.len()).max(guests) > MOST_NAMES {
            found.add(
                "groups",
                format!(
                    "are more than can be checked; at most {MOST_NAMES} guests, groups and policies"
                ),
            );
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
                    let others = names
                        .iter()
                        .filter(|other| origins.in_file(&format!("{table}.{other}")));
                    found.unknown(
                        &key,
                        "is named by no file",
                        name,
                        others.map(|other| other.as_str()),
                    );
                }
            }
        }
        for (name, policy) in &self.policies {
            found.policy(&format!("policies.{name}"), policy, origins);
        }
        for (name, group) in &self.groups {
            self.group(&mut found, name, group, origins);
        }
        self.shared_guests(&mut found);
        for (name, site) in &self.sites {
            let key = format!("sites.{name}.addresses");
            site.addresses
                .iter()
                .for_each(|address| found.address(&key, address));
        }
        found.alerts(&self.alerts);
        found.0
    }
}

#[derive(Default)]
struct Found(Vec<Problem>);

impl PolicyFiles {
    fn group(&self, found: &mut Found, name: &str, group: &Group, origins: &Origins) {
        let key = format!("groups.{name}");
        if group.guests.is_empty() {
            found.add(
                &format!("{key}.guests"),
                "is empty; name its guests, like [groups.bank.guests.db1]",
            );
        }
        for (field, named, known) in [
            (
                "policy",
                &group.policy,
                self.policies.keys().collect::<Vec<_>>(),
            ),
            ("peer", &group.peer, self.sites.keys().collect()),
        ] {
            let (key, table) = (
                format!("{key}.{field}"),
                if field == "policy" {
                    "policies"
                } else {
                    "sites"
                },
            );
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
                found.health(&format!("{key}.health.{check}"), health, origins);
            }
            for (peer, networks) in &member.networks {
                let key = format!("{key}.networks.{peer}");
                if !self.sites.contains_key(peer) {
                    let known = self.sites.keys().map(String::as_str);
                    found.unknown(&key, "is for a site that is not in [sites]", peer, known);
                }
                for (network, mapped) in networks {
                    let key = format!("{key}.{network}");
                    found.network(&key, mapped);
                    let policy = self.policies.get(&group.policy);
                    found.require(
                        mapped.mac.is_empty()
                            || policy.is_none_or(|policy| policy.mode == Mode::DiskOnly),
                        &format!("{key}.mac"),
                        format!("cannot hold: a guest of policy '{}' goes on in the midst of its work there, and its network card with it; take it out, or have the guest boot there (mode = \"disk-only\")", group.policy),
                    );
                }
            }
        }
        if let Some(cycle) = cycle(group) {
            let last = cycle.last().copied().unwrap_or_default();
            found.add(
                &format!("{key}.guests.{last}.after"),
                format!(
                    "makes a circle: {} wait for each other; take one of them out",
                    cycle.join(", ")
                ),
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
    fn unknown<'a>(
        &mut self,
        key: &str,
        what: &str,
        word: &str,
        known: impl Iterator<Item = &'a str>,
    ) {
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
        let plain =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        let sound = (1..=LONGEST_NAME).contains(&name.len())
            && name.bytes().all(plain)
            && !name.starts_with('-');
        self.require(
            sound,
            &format!("{table}.{name}"),
            "has a name that cannot be used; up to 63 small letters, digits, - and _ can, no - first",
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
        after
            .iter()
            .for_each(|before| followers.entry(before).or_default().push(guest));
    }
    let mut counts: HashMap<&str, usize> = waits
        .iter()
        .map(|(guest, after)| (*guest, after.len()))
        .collect();
    let mut free: Vec<&str> = waits
        .keys()
        .copied()
        .filter(|guest| counts[guest] == 0)
        .collect();
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
        at = waits
            .get(at)?
            .iter()
            .copied()
            .find(|before| stuck(before))?;
    }
}
