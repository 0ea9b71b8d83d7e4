//! The guests of a group: protected by its policy, told what changed, let go
//! by an operator where no file asks for them any more.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use farhaven_policies::files::Mode;
use farhaven_policies::units::RateLimit;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;

use super::AGAIN;
use crate::site::Site;
use crate::site::driver::Command;
use crate::site::groups::GroupRecord;
use crate::site::operate::OperateError;
use crate::site::records::{GroupShare, GuestRecord, Owed, Protection};

/// By what mode a guest is protected, if it is.
fn protection_mode(site: &Site, guest: GuestId) -> Option<Mode> {
    let key = guest.to_string();
    let found = site.catalogue.find::<Protection>(Table::Protections, &key);
    found
        .ok()
        .flatten()
        .map(|protection| protection.policy.mode)
}

impl Site {
    /// Protects a member by its group's policy, or tells its driver what changed.
    pub(in crate::site::groups) async fn protect_member(
        self: &Arc<Self>,
        group: &GroupRecord,
        name: &str,
    ) -> Result<(), String> {
        let Some(member) = group.members.get(name) else {
            return Ok(());
        };
        let guest = member.guest;
        let owed = self.owed_by_group(group);
        let protection = self
            .catalogue
            .find::<Protection>(Table::Protections, &guest.to_string())
            .map_err(|e| e.to_string())?;
        let Some(protection) = protection else {
            return self.begin_by_group(group, name, guest, owed).await;
        };
        if protection.to != group.peer {
            return Err(format!(
                "'{name}' is protected to '{}', and the group goes to '{}'; run: farhaven unprotect {name}, and it is protected there",
                protection.to, group.peer
            ));
        }
        if protection.policy.mode != owed.policy.mode {
            return Err(format!(
                "'{name}' is protected {}, and the policy asks for mode {} now: its points would be of another kind. Run: farhaven unprotect {name} --discard, and it is protected so from its first copy on",
                match protection.policy.mode {
                    Mode::Memory => "with its memory",
                    Mode::DiskOnly => "by its disks alone",
                },
                match owed.policy.mode {
                    Mode::Memory => "memory",
                    Mode::DiskOnly => "disk-only",
                }
            ));
        }
        if protection.owed() == owed {
            return Ok(());
        }
        let driver = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.get(&guest).cloned()
        };
        if self.policies.state().sent.get(&guest) == Some(&owed) {
            // On its way: a driver in a long step looks at it afterwards.
            return Ok(());
        }
        match driver {
            Some(driver) => {
                let told = driver
                    .commands
                    .try_send(Command::Owe(Box::new(owed.clone())));
                if told.is_ok() {
                    tracing::info!(guest = name, group = group.name, "its policy has changed");
                    self.policies.state().sent.insert(guest, owed);
                }
                Ok(())
            }
            None => {
                let changed = Protection {
                    policy: owed.policy,
                    schedule: owed.schedule,
                    group: owed.group,
                    share: owed.share,
                    ..protection
                };
                self.keep_protection(&changed).map_err(|e| e.to_string())
            }
        }
    }

    /// What each guest of a group is owed.
    pub(in crate::site::groups) fn owed_by_group(&self, group: &GroupRecord) -> Owed {
        let files = self.policies.files();
        let site = files
            .as_ref()
            .and_then(|files| files.value.sites.get(&group.peer));
        Owed {
            policy: group.owed.in_force(group.members.len()),
            schedule: Some(group.owed.retention.clone()),
            group: Some(group.name.clone()),
            share: Some(GroupShare {
                percent: group.owed.share,
                among: u16::try_from(group.members.len()).unwrap_or(u16::MAX),
                link: site.map_or(RateLimit::NONE, |site| site.bandwidth),
            }),
        }
    }

    async fn begin_by_group(
        self: &Arc<Self>,
        group: &GroupRecord,
        name: &str,
        guest: GuestId,
        owed: Owed,
    ) -> Result<(), String> {
        if let Some((at, why)) = self.policies.state().refused.get(&guest)
            && at.elapsed() < AGAIN
        {
            return Err(why.clone());
        }
        self.policies.state().sent.insert(guest, owed.clone());
        let begun = self
            .begin_protection(name, &group.peer, owed, false)
            .await
            .map_err(|error| error.to_string());
        let mut state = self.policies.state();
        match begun {
            Ok(()) => {
                state.refused.remove(&guest);
                tracing::info!(
                    guest = name,
                    group = group.name,
                    "is protected by its group's policy"
                );
                Ok(())
            }
            Err(why) => {
                state.sent.remove(&guest);
                state.refused.insert(guest, (Instant::now(), why.clone()));
                Err(why)
            }
        }
    }

    /// May an operator end this guest's protection? Not while policy files ask
    /// for it: it would begin anew.
    pub(in crate::site) fn in_no_file(&self, record: &GuestRecord) -> Result<(), OperateError> {
        let Some(files) = self.policies.files() else {
            return Ok(());
        };
        let Some(group) = self.group_of(record.id).filter(|g| g.from.is_none()) else {
            return Ok(());
        };
        let named = files.value.groups.get(&group.name);
        let other = protection_mode(self, record.id).is_some_and(|mode| mode != group.owed.mode);
        let asks =
            named.is_some_and(|g| g.guests.contains_key(&record.name) && g.peer == group.peer);
        let asks = asks && !other;
        if !asks {
            return Ok(());
        }
        let path = self.config.policy_files().unwrap_or_default();
        Err(OperateError::Conflict(format!(
            "policy files ask for the protection of '{}', in group '{}'; take it out of {} first, or leave it protected and paused: farhaven pause {0}",
            record.name,
            group.name,
            path.display()
        )))
    }

    /// Ends the protection of a guest, or of all guests of a group, which is
    /// forgotten then.
    ///
    /// # Errors
    /// When policy files still ask for it, or as of [`Site::unprotect`].
    pub async fn unprotect_named(&self, name: &str, discard: bool) -> Result<(), OperateError> {
        let Ok(group) = self.group(name) else {
            return self.unprotect(name, discard).await;
        };
        if let Some(from) = &group.from {
            return Err(OperateError::Conflict(format!(
                "'{name}' is a group of site '{from}': run this there"
            )));
        }
        let protected = |guest: GuestId| {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.contains_key(&guest)
        };
        for member in self.members_here(&group) {
            if protected(member.guest) {
                self.unprotect(&member.name, discard).await?;
            }
        }
        self.forget_group(group.id)
    }
}
