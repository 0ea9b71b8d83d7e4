//! Protection groups: guests cut at the same instant and moved together.
//!
//! A group is defined at the site where its guests run, by policy files or by
//! an operator, and told to the peer: what is needed at a failover must not be
//! at the lost site only. Its id is what it is fenced by. A guest in no group
//! is a group of one, under its own id and name.

use std::collections::BTreeMap;

use farhaven_policies::files::Member;
use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Site;
use super::operate::{OperateError, failed};

/// Most guests of one group: all of them are stopped for each other's cut.
pub const MAX_MEMBERS: usize = 64;

/// A protection group, as both sites keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// Which; also the id that it is fenced by.
    pub id: GuestId,
    /// Its name, unique at the site that defined it.
    pub name: String,
    /// The site that defined it, where that is a peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The site that it is protected to.
    pub peer: String,
    /// Its guests, by name.
    pub members: BTreeMap<String, Member>,
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

    /// The group that a guest of that name is in, at the site that defined it (`None`: this one).
    pub fn group_of(&self, guest: &str, from: Option<&str>) -> Option<GroupRecord> {
        let mut groups = self.groups().into_iter();
        groups.find(|group| group.from.as_deref() == from && group.members.contains_key(guest))
    }

    /// Writes a group down, durably.
    ///
    /// # Errors
    /// When it has no guest or too many, shares one with another group of the
    /// same site, or cannot be written.
    pub fn keep_group(&self, group: &GroupRecord) -> Result<(), OperateError> {
        let conflict = |why: String| Err(OperateError::Conflict(why));
        if group.members.is_empty() || group.members.len() > MAX_MEMBERS {
            return conflict(format!(
                "group '{}' has {} guests; 1 to {MAX_MEMBERS} can be cut at one instant",
                group.name,
                group.members.len()
            ));
        }
        let others = self.groups().into_iter();
        for other in others.filter(|other| other.id != group.id && other.from == group.from) {
            if other.name == group.name {
                return conflict(format!("group '{}' is known already", group.name));
            }
            if let Some(guest) = other
                .members
                .keys()
                .find(|g| group.members.contains_key(*g))
            {
                return conflict(format!(
                    "guest '{guest}' is in group '{}'; a guest is in one group",
                    other.name
                ));
            }
        }
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
