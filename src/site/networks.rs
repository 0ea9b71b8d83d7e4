//! What a guest's networks are at this site: in every verb and every run the same.
//!
//! What goes first: what a run's step says, the network map of the guest's group
//! for this site, `[networks]` of this site's configuration, what it is at the
//! source. A bridge that is not here is found before anything is stopped.

use std::collections::BTreeMap;

use farhaven_policies::files::{
    Member, Network, is_bridge_name, is_card_address, is_network_address, mac_bytes,
};
use farhaven_storage_sync::unit::GuestId;

use super::Site;
use super::promote::ActivateError;
use super::standby::{Standby, ground, step};
use crate::activate::launch::Launched;
use crate::activate::place::Ready;
use crate::activate::point::boots;
use crate::guest::Definition;
use crate::guest::qemu::network::missing;

/// What a group's policy says of a guest's networks at a site.
fn mapped<'a>(terms: &'a Member, site: &str) -> impl Iterator<Item = (&'a String, &'a Network)> {
    terms.networks.get(site).into_iter().flatten()
}

/// Networks that a group's policy gives a guest at a site, as netdevs. The map
/// may come from a peer: it names bridges, and nothing else.
pub(super) fn of_policy(terms: &Member, site: &str) -> BTreeMap<String, String> {
    mapped(terms, site)
        .filter(|(_, network)| is_bridge_name(&network.bridge))
        .map(|(name, network)| (name.clone(), netdev(&network.bridge)))
        .collect()
}

/// MAC addresses that a group's policy gives a guest at a site.
fn macs_of_policy(terms: &Member, site: &str) -> BTreeMap<String, String> {
    mapped(terms, site)
        .filter(|(_, network)| mac_bytes(&network.mac).is_some_and(is_card_address))
        .map(|(name, network)| (name.clone(), network.mac.clone()))
        .collect()
}

/// A guest's addresses at a site, of all its networks there, by the policy of its group:
/// as programs are told them, with a space between two.
pub(super) fn addresses(terms: &Member, site: &str) -> String {
    let addresses = mapped(terms, site).flat_map(|(_, network)| &network.addresses);
    let sound = addresses.filter(|address| is_network_address(address));
    sound.cloned().collect::<Vec<_>>().join(" ")
}

/// A bridge's name as a netdev; a whole netdev stays what it is.
pub(super) fn netdev(value: &str) -> String {
    match value.contains(',') {
        true => value.to_owned(),
        false => format!("bridge,br={value}"),
    }
}

/// The networks of one guest here, and where each is said.
pub(super) struct Networks {
    /// As netdevs, by the guest's own names for them.
    pub(super) all: BTreeMap<String, String>,
    /// MAC addresses of its cards, if it boots, by the same names.
    macs: BTreeMap<String, String>,
    of_policy: BTreeMap<String, String>,
    of_run: BTreeMap<String, String>,
    /// The group whose policy it is.
    group: Option<String>,
    site: String,
}

impl Networks {
    /// What stands against them on this host, with what to do next. A guest that
    /// `boots` brings no state of its devices.
    pub(super) fn lack(&self, guest: &str, definition: &Definition, boots: bool) -> Option<String> {
        let Definition::Qemu(definition) = definition else {
            return None;
        };
        let wrong: Vec<String> = definition
            .nets
            .iter()
            .filter_map(|net| {
                let value = self.all.get(&net.id).unwrap_or(&net.value);
                let of_user = net.kind == "user" && !boots && !value.starts_with("user");
                let lack = match of_user {
                    // QEMU's own network stack is part of the device state.
                    true => Some(format!("at its source it is a network of kind user, whose state cannot go on in another kind: restart the guest there with -netdev bridge,id={}", net.id)),
                    false => missing(value),
                }?;
                let (id, site) = (&net.id, &self.site);
                let where_said = if self.of_run.contains_key(id) {
                    format!("name another for {id} in the run's remap step")
                } else if self.of_policy.contains_key(id) {
                    let group = self.group.as_deref().unwrap_or("GROUP");
                    format!("name another under [groups.{group}.guests.{guest}.networks.{site}.{id}] in the policy file at its source")
                } else {
                    format!("name another for {id} under [networks] in the configuration of site '{site}', or in the policy of its group")
                };
                Some(format!("its network {id} is {value}, and {lack}, or {where_said}"))
            })
            .collect();
        (!wrong.is_empty()).then(|| wrong.join("; "))
    }
}

impl Site {
    /// The networks of a guest here; `of_run` goes before all else.
    pub(super) fn networks_of(&self, guest: GuestId, of_run: BTreeMap<String, String>) -> Networks {
        let site = self.config.site.name.clone();
        let group = self.group_of(guest);
        let member = group
            .as_ref()
            .and_then(|group| group.members.values().find(|m| m.guest == guest));
        let of_policy = member
            .map(|m| of_policy(&m.terms, &site))
            .unwrap_or_default();
        let macs = member
            .map(|m| macs_of_policy(&m.terms, &site))
            .unwrap_or_default();
        let mut all = self.config.networks.clone();
        all.extend(of_policy.clone());
        all.extend(of_run.clone());
        Networks {
            all,
            macs,
            of_policy,
            of_run,
            group: group.map(|group| group.name),
            site,
        }
    }
}

impl Standby {
    /// As [`Standby::launch`], with networks that a run's step names.
    pub(super) async fn launch_on(
        &self,
        point: u64,
        number: u64,
        networks: BTreeMap<String, String>,
    ) -> Result<Ready, ActivateError> {
        let site = self.site()?;
        let (replica, context) = self.open(point)?;
        let (guest, name) = (self.guest, self.name());
        step(move || {
            let networks = site.networks_of(guest, networks);
            if let Some(lack) = networks.lack(&name, &context.definition, boots(replica.volumes()))
            {
                return Err(ActivateError::Networks(name, lack));
            }
            // Made ready for a hand-over, by a daemon that ended before it.
            let before = ground(&site, guest, number.saturating_sub(1)).run;
            Launched::end_left(&before.join("qmp.sock"), &before);
            let mut ground = ground(&site, guest, number);
            ground.networks = &networks.all;
            ground.macs = &networks.macs;
            Ready::launch(&ground, &replica, &context.definition)
        })
        .await?
    }

    /// What it runs on is here: for before a term is taken, when there is no
    /// living source to make it ready ahead of.
    ///
    /// # Errors
    /// When a bridge is not here.
    pub(super) async fn refuse_missing_networks(&self) -> Result<(), ActivateError> {
        let site = self.site()?;
        let (guest, name) = (self.guest, self.name());
        let opening = self.opening();
        step(move || {
            let networks = site.networks_of(guest, BTreeMap::new());
            match networks.lack(&name, &opening.definition, boots(&opening.volumes)) {
                Some(lack) => Err(ActivateError::Networks(name, lack)),
                None => Ok(()),
            }
        })
        .await?
    }
}
