//! What an honest peer tells of its guests and groups: names that are names, texts of one
//! line, no more of anything than two sites need. It is looked at before any of it is kept;
//! what a peer answers is made fit to be shown by [`super::breach::plain_answer`].

use farhaven_policies::files::{Health, Member, NamedPolicy, Network};
use farhaven_policies::files::{is_bridge_name, is_network_address, mac_bytes};
use farhaven_storage_sync::unit::{GuestId, Volume};
use farhaven_wan::peer::check_site_name;

use super::breach::hidden;
use super::groups::{GroupMember, GroupRecord, MAX_MEMBERS};
use super::protect::is_guest_name;
use super::records::MAX_VOLUMES;
use crate::replicate::message::{Opening, PointContext, SealRequest, sound_volume};

/// Most health checks, networks or guests to wait for of one member, and most windows of
/// a policy.
const MOST_TERMS: usize = 256;

/// Longest name of a guest's network, which is QEMU's.
const LONGEST_NETWORK: usize = 255;

/// Longest address or URL of a health check.
const LONGEST_PLACE: usize = 2048;

/// Longest argument of a health check's program, which is not run by a peer's word.
const LONGEST_ARGUMENT: usize = 64 << 10;

fn is_site_name(name: &str) -> bool {
    check_site_name(name).is_ok()
}

/// What is wrong with a guest that a peer opens, or turns round to here.
pub(super) fn unsound_opening(opening: &Opening) -> Option<&'static str> {
    if !is_guest_name(&opening.name) {
        return Some("that is no name for a guest");
    }
    if !is_site_name(&opening.source) {
        return Some("the site that the guest is said to run at has no name for a site");
    }
    let unsound = opening.definition.unsound();
    unsound.or_else(|| unsound_volumes(&opening.volumes))
}

/// What is wrong with a point that a peer wants sealed: its context is kept with it.
pub(super) fn unsound_seal(request: &SealRequest) -> Option<&'static str> {
    let context = &request.context;
    if !is_guest_name(&context.name) {
        return Some("the point is said to be of a guest with no name for one");
    }
    if !is_site_name(&context.source) {
        return Some("the point is said to be of a site with no name for one");
    }
    let unsound = |group: &super::groups::PointGroup| {
        !is_guest_name(&group.name) || group.members.len() > MAX_MEMBERS
    };
    if context.group.as_ref().is_some_and(unsound) {
        return Some("the point is said to be of a group that none can be");
    }
    let unsound = context.definition.unsound();
    unsound.or_else(|| unsound_volumes(&request.volumes))
}

fn unsound_volumes(volumes: &[Volume]) -> Option<&'static str> {
    let sound = volumes.len() <= MAX_VOLUMES && volumes.iter().all(sound_volume);
    (!sound).then_some("too many volumes, or volumes too large, or of no workable name")
}

/// The context of a point that was sealed before its names were looked at: one that cannot
/// be used is replaced.
pub(super) fn renamed(context: PointContext, guest: GuestId, site: &str) -> PointContext {
    let mut context = context;
    if !is_guest_name(&context.name) {
        context.name = format!("guest-{}", &guest.to_string()[..8]);
    }
    if !is_site_name(&context.source) {
        site.clone_into(&mut context.source);
    }
    context
}

/// What is wrong with a group that a peer tells of.
pub(super) fn unsound_group(group: &GroupRecord) -> Option<&'static str> {
    if !is_guest_name(&group.name) {
        return Some("that is no name for a group");
    }
    // A group of before may have none.
    if !group.policy.is_empty() && !is_guest_name(&group.policy) {
        return Some("the group's policy has no name for one");
    }
    if !is_site_name(&group.peer) {
        return Some("the site that the group goes to has no name for one");
    }
    if !is_sound_policy(&group.owed) {
        return Some("the windows of the group's policy are told unsoundly");
    }
    if group.members.is_empty() || group.members.len() > MAX_MEMBERS {
        return Some("a group has 1 to 64 guests");
    }
    let mut guests: Vec<_> = group.members.values().map(|m| m.guest).collect();
    guests.sort();
    guests.dedup();
    if guests.len() < group.members.len() {
        return Some("a guest is in the group twice");
    }
    let sound = |(name, member): (&String, &GroupMember)| {
        is_guest_name(name) && is_sound_member(&member.terms)
    };
    (!group.members.iter().all(sound)).then_some("a guest of the group is told unsoundly")
}

fn is_sound_policy(owed: &NamedPolicy) -> bool {
    owed.windows.len() <= MOST_TERMS && owed.windows.keys().all(|name| is_guest_name(name))
}

fn is_sound_member(terms: &Member) -> bool {
    let Member {
        after,
        health,
        networks,
    } = terms;
    let few = [after.len(), health.len(), networks.len()];
    few.iter().all(|count| *count <= MOST_TERMS)
        && after.iter().all(|name| is_guest_name(name))
        && health
            .iter()
            .all(|(name, check)| is_guest_name(name) && is_sound_check(check))
        && networks.iter().all(|(site, networks)| {
            is_site_name(site)
                && networks.len() <= MOST_TERMS
                && networks
                    .iter()
                    .all(|(name, network)| is_sound_network(name, network))
        })
}

fn is_sound_check(check: &Health) -> bool {
    let is_place = |text: &String| {
        text.len() <= LONGEST_PLACE && !text.contains(|c: char| hidden(c) || c.is_whitespace())
    };
    let is_program = |run: &Vec<String>| {
        run.len() <= MOST_TERMS && run.iter().all(|part| part.len() <= LONGEST_ARGUMENT)
    };
    check.tcp.as_ref().is_none_or(is_place)
        && check.http.as_ref().is_none_or(is_place)
        && check.script.as_ref().is_none_or(is_program)
}

fn is_sound_network(name: &str, network: &Network) -> bool {
    let Network {
        bridge,
        mac,
        addresses,
    } = network;
    name.len() <= LONGEST_NETWORK
        && !name.contains(hidden)
        // It goes into QEMU's command line here.
        && is_bridge_name(bridge)
        && (mac.is_empty() || mac_bytes(mac).is_some())
        && addresses.len() <= MOST_TERMS
        && addresses.iter().all(|address| is_network_address(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steers a terminal.
    const STEERS: &str = "a\x1b[2J";

    fn group() -> GroupRecord {
        let member = GroupMember {
            guest: GuestId::random(),
            terms: Default::default(),
        };
        GroupRecord {
            id: GuestId::random(),
            name: "bank".to_owned(),
            from: None,
            peer: "west".to_owned(),
            key: None,
            policy: "gold".to_owned(),
            owed: Default::default(),
            members: [("db".to_owned(), member)].into(),
        }
    }

    fn changed(change: impl Fn(&mut GroupRecord)) -> Option<&'static str> {
        let mut group = group();
        change(&mut group);
        unsound_group(&group)
    }

    fn with_terms(change: impl Fn(&mut Member)) -> Option<&'static str> {
        changed(|group| {
            for member in group.members.values_mut() {
                change(&mut member.terms);
            }
        })
    }

    fn with_network(change: impl Fn(&mut Network)) -> Option<&'static str> {
        with_terms(|terms| {
            let mut network = Network {
                bridge: "br0".to_owned(),
                ..Default::default()
            };
            change(&mut network);
            let of_west = [("lan".to_owned(), network)].into();
            terms.networks = [("west".to_owned(), of_west)].into();
        })
    }

    #[test]
    fn what_no_honest_site_tells_is_refused() {
        assert_eq!(unsound_group(&group()), None);
        assert!(changed(|g| g.name = "../etc".to_owned()).is_some());
        assert!(changed(|g| g.members.clear()).is_some());
        assert_eq!(with_network(|_| ()), None);
        // QEMU would run it as root, here.
        let bridge = "tap,script=/tmp/evil";
        assert!(with_network(|network| network.bridge = bridge.to_owned()).is_some());
        let twice = |g: &mut GroupRecord| {
            let member = g.members["db"].clone();
            g.members.insert("web".to_owned(), member);
        };
        assert!(changed(twice).is_some());
        let many = |g: &mut GroupRecord| {
            for n in 0..=MAX_MEMBERS {
                let guest = GuestId::random();
                let terms = Default::default();
                g.members
                    .insert(n.to_string(), GroupMember { guest, terms });
            }
        };
        assert!(changed(many).is_some());
    }

    #[test]
    fn every_text_of_a_group_is_looked_at() {
        let steers = || STEERS.to_owned();
        let long = || "x".repeat(100_000);
        assert_eq!(changed(|g| g.policy.clear()), None);
        for text in [steers(), long()] {
            assert!(changed(|g| g.policy.clone_from(&text)).is_some());
            assert!(changed(|g| g.peer.clone_from(&text)).is_some());
            let window = |g: &mut GroupRecord| {
                let window = Default::default();
                g.owed.windows.insert(text.clone(), window);
            };
            assert!(changed(window).is_some());
            assert!(with_terms(|terms| terms.after = vec![text.clone()]).is_some());
            let named = |terms: &mut Member| {
                terms.health = [(text.clone(), Health::default())].into();
            };
            assert!(with_terms(named).is_some());
            let place = |terms: &mut Member| {
                let check = Health {
                    tcp: Some(text.clone()),
                    ..Health::default()
                };
                terms.health = [("up".to_owned(), check)].into();
            };
            assert!(with_terms(place).is_some());
            let at = |terms: &mut Member| {
                terms.networks = [(text.clone(), Default::default())].into();
            };
            assert!(with_terms(at).is_some());
            assert!(with_network(|network| network.mac.clone_from(&text)).is_some());
            assert!(with_network(|network| network.addresses = vec![text.clone()]).is_some());
        }
    }

    #[test]
    fn a_point_with_names_of_before_gets_others() {
        let guest = GuestId([7; 16]);
        let context = |name: &str, source: &str| PointContext {
            name: name.to_owned(),
            source: source.to_owned(),
            term: 1,
            definition: crate::guest::qemu::definition::Definition::sample().into(),
            pause: Default::default(),
            ram_scan: Default::default(),
            ram_scanned_bytes: 0,
            changed_bytes: 0,
            sent_bytes: 0,
            base: false,
            group: None,
            quiesced: None,
        };
        let names = |name: &str, source: &str| {
            let context = renamed(context(name, source), guest, "east");
            (context.name, context.source)
        };
        let both = |name: &str, source: &str| (name.to_owned(), source.to_owned());
        assert_eq!(names("web", "north"), both("web", "north"));
        assert_eq!(names(STEERS, STEERS), both("guest-07070707", "east"));
    }
}
