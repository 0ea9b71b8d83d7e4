//! Which guests here a step is about.

use std::sync::Arc;

use farhaven_policies::files::Member;

use crate::runbook::perform::{Ended, Failure, Scope};
use crate::site::Site;
use crate::site::standby::Standby;

/// A guest of a peer that a run is about.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) name: String,
    /// The runbook's name for its group.
    pub(super) group: String,
    /// The protection group that it is in, by the policy files of its source.
    pub(super) of: Option<String>,
    /// Those of wave 0 start first.
    pub(super) wave: usize,
    /// Start order, health checks, networks.
    pub(super) terms: Member,
    pub(super) standby: Arc<Standby>,
}

impl Target {
    /// Its newest point.
    pub(super) fn newest(&self) -> Ended<u64> {
        match self.standby.newest() {
            0 => Err(Failure::clean(format!(
                "there is no recovery point of '{}' here",
                self.name
            ))),
            newest => Ok(newest),
        }
    }
}

/// The guests of a scope, those that start first at the front.
pub(super) fn targets(site: &Arc<Site>, scope: &Scope) -> Ended<Vec<Target>> {
    let mut found = Vec::new();
    for (group, guests) in &scope.groups {
        found.extend(of_group(site, group, guests)?);
    }
    found.sort_by_key(|target: &Target| target.wave);
    Ok(found)
}

/// The guests of a runbook's group, or those of them that are named.
pub(super) fn of_group(site: &Arc<Site>, group: &str, guests: &[String]) -> Ended<Vec<Target>> {
    let clean = |error: &dyn ToString| Failure::clean(error.to_string());
    let mut members = match (site.members_of(group), guests) {
        (Ok(members), _) => members,
        (Err(error), []) => return Err(clean(&error)),
        // A runbook may call guests a group that no policy file knows.
        (Err(_), guests) => {
            let mut members = Vec::new();
            for guest in guests {
                members.extend(site.members_of(guest).map_err(|e| clean(&e))?);
            }
            members
        }
    };
    if !guests.is_empty() {
        for guest in guests {
            if !members.iter().any(|member| member.name == *guest) {
                members.extend(site.members_of(guest).map_err(|e| clean(&e))?);
            }
        }
        members.retain(|member| guests.contains(&member.name));
    }
    if members.is_empty() {
        return Err(Failure::clean(format!(
            "none of the guests of group '{group}' is known here"
        )));
    }
    let here = members.into_iter().map(|member| {
        let standby = site.standby_here(&member.name).map_err(|e| clean(&e))?;
        Ok(Target {
            name: member.name,
            group: group.to_owned(),
            of: member.group,
            wave: member.wave,
            terms: member.terms,
            standby,
        })
    });
    here.collect()
}
