//! Protection groups: guests cut at the same instant and moved together.
//!
//! A group is defined by policy files at the site where its guests run, and
//! told to the peer: what is needed at a failover must not be at the lost site
//! only. Its guests are fenced one by one; a promotion of the group takes the
//! terms of all of them at once. A guest in no group is a group of one, under
//! its own name.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use farhaven_policies::files::{Member, NamedPolicy, start_order};
use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{PeerRecord, SiteKey};
use serde::{Deserialize, Serialize};

use super::Site;
use super::operate::{OperateError, failed};
use super::records::{GuestRecord, StandbyRecord, is_meant};

pub use self::all::{GroupDone, MemberDone};
pub use self::cuts::PointGroup;
pub(super) use self::cuts::{GroupCut, Seat};
pub use self::failover::{FailOverGroup, GroupFailover, MemberFailover};
pub(super) use self::force::{InForce, keep};
pub use self::moving::{GroupMove, GroupOutlook, MemberMove};
pub use self::named::KeptGroupPoint;
pub(super) use self::party::{Party, Place};
pub use self::points::GroupPointView;
pub(super) use self::points::{Fates, fates, fates_of};
pub use self::rollback::GroupRollBack;
pub use self::trial::{GroupTest, MemberTest};
pub use self::view::{GroupView, MemberView, PolicyFilesView};

mod all;
mod cuts;
mod drive;
mod failover;
mod force;
pub(super) mod handed;
mod moving;
mod named;
mod party;
mod points;
mod rollback;
pub(super) mod together;
mod told;
mod trial;
mod turn;
mod view;
mod waves;

/// Most guests of one group: all of them are stopped for each other's cut.
pub const MAX_MEMBERS: usize = 64;

/// A protection group, as both sites keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// Which: given when the group is first put into force, and kept.
    pub id: GuestId,
    /// Its name, unique at the site that defined it.
    pub name: String,
    /// The site that defined it, where that is a peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The site that it is protected to.
    pub peer: String,
    /// The other site of the two, whatever it is called: the one that defined it, or
    /// where it is this site's own the one that it is protected to. Never told, nor
    /// believed; records of before have none until the site starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SiteKey>,
    /// The name of its policy.
    #[serde(default)]
    pub policy: String,
    /// What it is owed by that.
    #[serde(default)]
    pub owed: NamedPolicy,
    /// Its guests, by name.
    pub members: BTreeMap<String, GroupMember>,
}

/// A guest of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// Which guest.
    pub guest: GuestId,
    /// When it starts, how to tell that it is healthy, its networks at the peer.
    #[serde(default)]
    pub terms: Member,
}

/// A guest that a name stands for: the guest itself, or one of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedMember {
    /// Which guest.
    pub guest: GuestId,
    /// Its name here.
    pub name: String,
    /// Its group's name, if it is in one.
    pub group: Option<String>,
    /// The peer whose guest it is, protected to here; `None` for a guest of this site.
    pub from: Option<String>,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// When it starts, how to tell that it is healthy, its networks at the peer.
    pub terms: Member,
}

impl GroupRecord {
    /// Its members by waves: those of one wave start together, after those before.
    pub fn waves(&self) -> Vec<Vec<(&str, &GroupMember)>> {
        let terms: BTreeMap<String, Member> = self
            .members
            .iter()
            .map(|(name, member)| (name.clone(), member.terms.clone()))
            .collect();
        let named = |name: &&str| self.members.get_key_value(*name);
        start_order(&terms)
            .iter()
            .map(|wave| {
                let found = wave.iter().filter_map(named);
                found
                    .map(|(name, member)| (name.as_str(), member))
                    .collect()
            })
            .collect()
    }

    /// Did this peer define it?
    pub fn is_of(&self, peer: &PeerRecord) -> bool {
        let from = self.from.as_deref();
        from.is_some_and(|from| is_meant(self.key, from, peer))
    }

    /// Is it this site's own, and protected to this peer?
    pub fn goes_to(&self, peer: &PeerRecord) -> bool {
        self.from.is_none() && is_meant(self.key, &self.peer, peer)
    }

    /// As a peer is told of it.
    pub fn told(&self) -> Self {
        Self {
            key: None,
            ..self.clone()
        }
    }

    /// Is this guest in it?
    pub fn has(&self, guest: GuestId) -> bool {
        self.members.values().any(|member| member.guest == guest)
    }

    /// Do its guests go to that site as one: cut at one instant?
    pub fn goes_as_one(&self, to: &str) -> bool {
        self.from.is_none() && self.members.len() > 1 && self.peer == to
    }
}

impl Site {
    /// All groups that are known here: this site's own and those of its peers.
    pub fn groups(&self) -> Vec<GroupRecord> {
        match self.catalogue.list::<GroupRecord>(Table::Groups) {
            Ok(records) => records.into_iter().map(|(_, record)| record).collect(),
            Err(error) => {
                tracing::error!(%error, "the catalogue cannot be read");
                Vec::new()
            }
        }
    }

    /// A group by its name; this site's own before those of peers.
    ///
    /// # Errors
    /// When there is none.
    pub fn group(&self, name: &str) -> Result<GroupRecord, OperateError> {
        let mut groups = self.groups();
        groups.sort_by_key(|group| group.from.is_some());
        if let Some(group) = groups.iter().find(|group| group.name == name) {
            return Ok(group.clone());
        }
        let known: Vec<_> = groups.iter().map(|group| group.name.as_str()).collect();
        Err(OperateError::Unknown(match known.as_slice() {
            [] => format!("no group '{name}'; groups are defined in policy files"),
            known => format!("no group '{name}' here; known: {}", known.join(", ")),
        }))
    }

    /// The group that a guest is in.
    pub fn group_of(&self, guest: GuestId) -> Option<GroupRecord> {
        self.groups().into_iter().find(|group| group.has(guest))
    }

    /// The guests that a name stands for, in the order in which they start: all
    /// of a group, or the one guest. Members that are not known here are left
    /// out; a group's name is taken before a guest's.
    ///
    /// # Errors
    /// When there is neither such a group nor such a guest.
    pub fn members_of(&self, name: &str) -> Result<Vec<NamedMember>, OperateError> {
        if let Ok(group) = self.group(name) {
            return Ok(self.members_here(&group));
        }
        let (guest, from) = match self.standby_named(name) {
            Some(standby) => (standby.guest, Some(standby.from())),
            None => (self.guest(name)?.id, None),
        };
        let group = self.group_of(guest);
        let member = group
            .as_ref()
            .and_then(|group| group.members.values().find(|m| m.guest == guest));
        Ok(vec![NamedMember {
            guest,
            name: name.to_owned(),
            from,
            wave: 0,
            terms: member.map(|m| m.terms.clone()).unwrap_or_default(),
            group: group.map(|group| group.name),
        }])
    }

    /// The members of a group that are known here, in the order in which they start.
    pub(super) fn members_here(&self, group: &GroupRecord) -> Vec<NamedMember> {
        let mut found = Vec::new();
        for (wave, members) in group.waves().into_iter().enumerate() {
            for (_, member) in members {
                let Some((name, from)) = self.known_as(member.guest) else {
                    continue;
                };
                found.push(NamedMember {
                    guest: member.guest,
                    name,
                    group: Some(group.name.clone()),
                    from,
                    wave,
                    terms: member.terms.clone(),
                });
            }
        }
        found
    }

    /// A guest's name here, and the peer whose it is.
    fn known_as(&self, guest: GuestId) -> Option<(String, Option<String>)> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        // One that turned round is this site's own again.
        if let Some(standby) = standbys.get(&guest).filter(|s| !s.is_turned()) {
            return Some((standby.name(), Some(standby.from())));
        }
        drop(standbys);
        let key = guest.to_string();
        let here = self.catalogue.find::<GuestRecord>(Table::Guests, &key);
        if let Ok(Some(record)) = here {
            return Some((record.name, None));
        }
        // Before a peer is trusted at start, only the catalogue knows its guests.
        let kept = self.catalogue.find::<StandbyRecord>(Table::Remote, &key);
        let record = kept.ok().flatten()?;
        Some((record.opening.name, Some(record.from)))
    }

    /// Writes a group down, durably.
    ///
    /// # Errors
    /// When it has no guest or too many, is called like a guest, shares a guest
    /// with another group, or cannot be written.
    pub fn keep_group(&self, group: &GroupRecord) -> Result<(), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if group.members.is_empty() || group.members.len() > MAX_MEMBERS {
            return conflict(format!(
                "group '{}' has {} guests; 1 to {MAX_MEMBERS} can be cut at one instant",
                group.name,
                group.members.len()
            ));
        }
        let known = self.guest_records();
        let guests = known.iter().map(|record| (record.id, &record.name));
        if let Some((guest, name)) = guests.into_iter().find(|(_, name)| **name == group.name)
            && !group.has(guest)
        {
            return conflict(format!(
                "group '{name}' is called like a guest that is not in it; give one of them another name"
            ));
        }
        let others = self.groups().into_iter();
        for other in others.filter(|other| other.id != group.id) {
            if other.from == group.from && other.name == group.name {
                return conflict(format!("group '{}' is known already", group.name));
            }
            let shared = group.members.iter().find(|(_, m)| other.has(m.guest));
            if let Some((guest, _)) = shared {
                return conflict(format!(
                    "guest '{guest}' is in group '{}'; a guest is in one group",
                    other.name
                ));
            }
        }
        self.put_group(group)
    }

    /// As [`Site::keep_group`], of what was judged before.
    fn put_group(&self, group: &GroupRecord) -> Result<(), OperateError> {
        let kept = (|| -> Result<(), CatalogueError> {
            self.catalogue
                .put(Table::Groups, &group.id.to_string(), group)?;
            self.catalogue.flush()
        })();
        kept.map_err(failed)
    }

    /// Forgets a group; its guests stay as they are.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn forget_group(&self, id: GuestId) -> Result<(), OperateError> {
        let forgotten = self.catalogue.remove(Table::Groups, &id.to_string());
        forgotten.map_err(failed)?;
        self.catalogue.flush().map_err(failed)
    }
}
