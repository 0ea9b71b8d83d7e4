//! Which paired site is meant: by its key. Its name is for people: a site that is paired
//! under the name of one that was removed is another, and nothing that came from that one,
//! or goes to it, is its. So that people need not tell the two apart, a name is not given
//! to another site while something here carries it.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use farhaven_storage_sync::catalogue::{CatalogueError, Table};
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use serde::{Deserialize, Serialize};

use super::Site;
use super::driver::Driver;
use super::groups::GroupRecord;
use super::operate::{OperateError, failed};
use super::records::{GuestRecord, Protection, StandbyRecord};
use super::remote::Remote;
use crate::activate::fence::Term;

/// What was forgotten of a site that is paired no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forgotten {
    /// Its guests that were kept here.
    pub guests: Vec<String>,
    /// Its groups.
    pub groups: Vec<String>,
    /// Where its recovery points are still.
    pub stores: Vec<PathBuf>,
}

impl Site {
    /// The paired site of this key.
    pub(super) fn remote_of_key(&self, key: &SiteKey) -> Option<Arc<Remote>> {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let mut all = remotes.values();
        all.find(|remote| remote.record.key == *key).cloned()
    }

    /// The paired site that a record means; one of before has its name only.
    pub(super) fn remote_meant(&self, key: Option<SiteKey>, name: &str) -> Option<Arc<Remote>> {
        match key {
            Some(key) => self.remote_of_key(&key),
            None => self.remote(name),
        }
    }

    /// Starts the driver of a protected guest.
    pub(super) fn drive(self: &Arc<Self>, mut protection: Protection) -> Result<(), String> {
        let guest = protection.guest;
        let record: GuestRecord = self
            .catalogue
            .find(Table::Guests, &guest.to_string())
            .map_err(|e| e.to_string())?
            .ok_or_else(|| {
                format!("protected guest {guest} is not in the catalogue; add it again")
            })?;
        let remote = self.remote_meant(protection.key, &protection.to);
        let remote = remote.ok_or_else(|| {
            format!(
                "guest '{}' is protected to '{}', which is not paired any more",
                record.name, protection.to
            )
        })?;
        if protection.key.is_none() || protection.to != remote.record.site {
            protection.key = Some(remote.record.key);
            protection.to.clone_from(&remote.record.site);
            self.keep_protection(&protection)
                .map_err(|e| e.to_string())?;
        }
        let handle = Driver::start(self.clone(), record, protection, remote);
        self.drivers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(guest, handle);
        Ok(())
    }

    /// At start: groups of before get the keys of their sites. Guests get theirs when
    /// they are restored, and protections when they are driven.
    pub(super) fn learn_keys(&self) -> Result<(), CatalogueError> {
        for group in self.groups().into_iter().filter(|g| g.key.is_none()) {
            let name = group.from.as_ref().unwrap_or(&group.peer);
            let Some(remote) = self.remote(name) else {
                continue;
            };
            let key = Some(remote.record.key);
            let id = group.id.to_string();
            let group = GroupRecord { key, ..group };
            self.catalogue.put(Table::Groups, &id, &group)?;
        }
        self.catalogue.flush()
    }

    /// The terms of all groups shared with a peer, while it is paired.
    pub(super) fn terms_with(&self, remote: &Remote) -> Vec<Term> {
        if self.remote_of_key(&remote.record.key).is_none() {
            return Vec::new();
        }
        let mut terms = self.fence.all();
        terms.retain(|term| self.shares(remote, term.group));
        terms
    }

    /// Does this group concern that peer?
    pub(super) fn shares(&self, remote: &Remote, group: GuestId) -> bool {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(standby) = standbys.get(&group) {
            return standby.is_from(&remote.record.key);
        }
        drop(standbys);
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let driver = drivers.get(&group);
        driver.is_some_and(|driver| driver.to == remote.record.key)
    }

    /// Why a peer may not send this guest here, whatever term it offers. `None`:
    /// nobody else has it here, or the peer owns it by a term that is known.
    pub(super) fn not_theirs(&self, remote: &Remote, guest: GuestId) -> Option<String> {
        let key = remote.record.key;
        if self.fence.current(guest).map(|term| term.owner) == Some(key) {
            return None;
        }
        let here = {
            let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
            let standby = standbys.get(&guest);
            standby.map(|s| (s.remote().record.key, s.from()))
        };
        match here.or_else(|| self.left_by(guest)) {
            Some((other, _)) if other == key => None,
            Some((_, other)) => Some(format!("this guest is protected to here from '{other}'")),
            // After a failover there, its term is heard before it is sent back.
            None if self.was_shared(guest) => Some(
                "this guest is one of that site's own, and no term known there says otherwise"
                    .to_owned(),
            ),
            None => None,
        }
    }

    /// The site that sent a guest here, where only the catalogue knows of it any more: a
    /// site that was removed before this daemon began.
    fn left_by(&self, guest: GuestId) -> Option<(SiteKey, String)> {
        let found = self
            .catalogue
            .find::<StandbyRecord>(Table::Remote, &guest.to_string());
        let record = found.ok().flatten()?;
        Some((record.source(), record.from))
    }

    /// May a site of this key have this name here? Not while something here carries it that
    /// is of another, which is paired no more: of those that are, each has its own name.
    ///
    /// # Errors
    /// With what carries it, and what to do.
    pub(super) fn may_be_called(&self, name: &str, key: &SiteKey) -> Result<(), OperateError> {
        let left = |of: SiteKey| of != *key && self.remote_of_key(&of).is_none();
        let kept = self.catalogue.list::<StandbyRecord>(Table::Remote);
        let mut kept = kept.map_err(failed)?.into_iter().map(|(_, record)| record);
        let sent = kept.find(|record| record.from == name && left(record.source()));
        let mut groups = self.groups().into_iter();
        let told = groups.find(|g| g.from.as_deref() == Some(name) && g.key.is_some_and(left));
        let what = sent.map(|record| format!("guest '{}'", record.opening.name));
        if let Some(what) = what.or_else(|| told.map(|group| format!("group '{}'", group.name))) {
            return Err(OperateError::Conflict(format!(
                "{what} here is of another site that was called '{name}'. Give the new one another name (site.name in its configuration); or, if nothing that the other one sent is needed any more: farhaven peer forget {name}"
            )));
        }
        let protections = self.catalogue.list::<Protection>(Table::Protections);
        let mut protections = protections.map_err(failed)?.into_iter().map(|(_, p)| p);
        let Some(protected) = protections.find(|p| p.to == name && p.key.is_some_and(left)) else {
            return Ok(());
        };
        let records = self.guest_records();
        let known = records.iter().find(|record| record.id == protected.guest);
        let Some(GuestRecord { name: guest, .. }) = known else {
            // Nobody can be protected by it any more.
            return Ok(());
        };
        Err(OperateError::Conflict(format!(
            "'{guest}' is protected to another site that was called '{name}'; run: farhaven unprotect {guest}, or give the new site another name (site.name in its configuration)"
        )))
    }

    /// Ends the protection of a guest to a site that is paired no more, which nobody sees
    /// to; `false`: it is none of these.
    ///
    /// # Errors
    /// When it was being moved there, or the catalogue cannot be written.
    pub(super) fn unprotect_left(&self, record: &GuestRecord) -> Result<bool, OperateError> {
        let key = record.id.to_string();
        let found = self.catalogue.find::<Protection>(Table::Protections, &key);
        let left = found.map_err(failed)?;
        let left = left.filter(|p| self.remote_meant(p.key, &p.to).is_none());
        let Some(left) = left.filter(|_| self.driver_of(record.id).is_none()) else {
            return Ok(false);
        };
        if left.moving.is_some() || left.shut_down {
            return Err(OperateError::Conflict(format!(
                "'{}' was held for a move to '{}', which is paired no more: how that ended is not known. Pair that site again and start this daemon anew, then see farhaven status",
                record.name, left.to
            )));
        }
        self.drop_protection_note(record.id);
        self.catalogue
            .remove(Table::Protections, &key)
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        self.sealed.forget(record.id);
        Ok(true)
    }

    /// Forgets the guests and groups that a site sent here which is paired no more: another
    /// may have its name then. Its recovery points stay where they are, and are known again
    /// when this daemon starts with that very site paired again.
    ///
    /// # Errors
    /// When it is paired, nothing of it is here, or one of its guests runs here.
    pub async fn forget_peer(self: &Arc<Self>, name: &str) -> Result<Forgotten, OperateError> {
        let kept = self.catalogue.list::<StandbyRecord>(Table::Remote);
        let mut kept: Vec<StandbyRecord> = kept.map_err(failed)?.into_iter().map(|k| k.1).collect();
        kept.retain(|k| k.from == name && self.remote_of_key(&k.source()).is_none());
        let mut groups = self.groups();
        groups.retain(|group| {
            let its = group.from.as_deref() == Some(name);
            its && self.remote_meant(group.key, name).is_none()
        });
        if kept.is_empty() && groups.is_empty() {
            return Err(match self.remote(name) {
                Some(_) => OperateError::Conflict(format!(
                    "site '{name}' is paired; run first: farhaven peer remove {name}"
                )),
                None => OperateError::Unknown(format!(
                    "nothing here is of a site that is called '{name}'; see farhaven status"
                )),
            });
        }
        for record in &kept {
            let guest = record.opening.guest;
            let taken_over = self.activation(guest).map_err(failed)?.is_some();
            if taken_over && !record.turned {
                return Err(OperateError::Conflict(format!(
                    "'{}' of that site runs here, by a point of its: nothing is forgotten. Pair the new site under another name (site.name in its configuration)",
                    record.opening.name
                )));
            }
        }
        let mut stores: Vec<PathBuf> = Vec::new();
        for record in &kept {
            let guest = record.opening.guest;
            let standby = {
                let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
                standbys.get(&guest).cloned()
            };
            // One that turned round is this site's own: there is nothing to end.
            if let Some(standby) = standby.filter(|standby| !standby.is_turned()) {
                standby.stop_test().await;
                standby.close(false).await.map_err(failed)?;
            }
            self.forget_standby(guest).map_err(failed)?;
            let store = self.store_directory(&record.source());
            if super::exists(&store) && !stores.contains(&store) {
                stores.push(store);
            }
        }
        for group in &groups {
            self.forget_group(group.id)?;
        }
        tracing::warn!(
            peer = name,
            guests = kept.len(),
            "what a site sent that is paired no more was forgotten"
        );
        Ok(Forgotten {
            guests: kept.into_iter().map(|k| k.opening.name).collect(),
            groups: groups.into_iter().map(|group| group.name).collect(),
            stores,
        })
    }
}
