//! Groups as `status` and `group` show them.

use std::path::PathBuf;

use farhaven_policies::files::show::{self, Shown};
use serde::{Deserialize, Serialize};

use super::GroupRecord;
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::view::Phase;

/// A protection group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The peer whose group it is; none for this site's own.
    pub from: Option<String>,
    /// The site that it is protected to.
    pub peer: String,
    /// The policy's name.
    pub policy: String,
    /// The policy, as policy files say it.
    pub owed: farhaven_policies::files::NamedPolicy,
    /// How old its newest whole point is, as far as that is known here.
    #[serde(default)]
    pub rpo_ms: Option<u64>,
    /// Its guests, in the order in which they start.
    pub members: Vec<MemberView>,
    /// What hinders it, and what to do. Empty when nothing does.
    pub trouble: String,
}

/// A guest of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberView {
    /// Its name here, or at the site that told of it where it is not known here.
    pub name: String,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// Guests that are healthy before it starts.
    pub after: Vec<String>,
    /// How many health checks it has.
    pub checks: usize,
    /// Where it stands, for people: a phase, `standby`, `runs here`, `unknown`.
    pub state: String,
    /// Its newest sealed point, 0 for none.
    pub newest_point: u64,
    /// The age of that.
    pub rpo_ms: Option<u64>,
}

/// The policy files of a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyFilesView {
    /// A file, or a directory of them.
    pub path: PathBuf,
    /// Groups of the files in force.
    pub groups: usize,
    /// When those were read, nanoseconds since 1970; none when none ever were.
    pub read_at: Option<u64>,
    /// Why the newest are not in force; empty when they are.
    pub trouble: String,
    /// Groups that are not in force as a whole, with the reason and what to do.
    pub waiting: Vec<(String, String)>,
}

impl Site {
    /// All groups, for `status`.
    pub(in crate::site) fn group_views(&self) -> Vec<GroupView> {
        let mut groups = self.groups();
        groups.sort_by(|a, b| (&a.from, &a.name).cmp(&(&b.from, &b.name)));
        groups.iter().map(|group| self.group_view(group)).collect()
    }

    /// The policy files, for `status`.
    pub(in crate::site) fn policy_files_view(&self) -> Option<PolicyFilesView> {
        Some(self.policies.view(&self.config.policy_files()?))
    }

    /// A group, for people and programs.
    pub fn group_view(&self, group: &GroupRecord) -> GroupView {
        let known = self.members_here(group);
        let mut members = Vec::new();
        let mut troubled = Vec::new();
        for (wave, of_wave) in group.waves().into_iter().enumerate() {
            for (name, member) in of_wave {
                let here = known.iter().find(|m| m.guest == member.guest);
                let mut view = MemberView {
                    name: here.map_or(name, |m| &m.name).to_owned(),
                    wave,
                    after: member.terms.after.clone(),
                    checks: member.terms.health.len(),
                    state: "unknown".to_owned(),
                    newest_point: 0,
                    rpo_ms: None,
                };
                self.see_member(member.guest, &mut view, &mut troubled);
                members.push(view);
            }
        }
        let mut trouble = self.policies.trouble_of(&group.name);
        if group.from.is_some() {
            trouble.clear();
        } else if trouble.is_empty() && !troubled.is_empty() {
            let others = match troubled.len() < group.members.len() {
                true => "; the others are protected on",
                false => "",
            };
            trouble = format!("degraded: {}{others}", troubled.join("; "));
        } else if trouble.is_empty() && self.is_orphan(group) {
            trouble = format!(
                "no policy file names it any more; it goes on as it was. To end that: farhaven unprotect {}",
                group.name
            );
        }
        GroupView {
            name: group.name.clone(),
            id: group.id.to_string(),
            from: group.from.clone(),
            peer: group.peer.clone(),
            policy: group.policy.clone(),
            owed: group.owed.clone(),
            rpo_ms: self.group_age(group).map(|age| age.as_millis() as u64),
            members,
            trouble,
        }
    }

    fn see_member(
        &self,
        guest: farhaven_storage_sync::unit::GuestId,
        view: &mut MemberView,
        troubled: &mut Vec<String>,
    ) {
        let standby = {
            let standbys = self.standbys.read();
            let standbys = standbys.unwrap_or_else(std::sync::PoisonError::into_inner);
            standbys.get(&guest).cloned()
        };
        if let Some(standby) = standby.filter(|standby| !standby.is_turned()) {
            let seen = standby.view();
            view.state = match seen.active {
                Some(_) => "runs here".to_owned(),
                None => "standby".to_owned(),
            };
            (view.newest_point, view.rpo_ms) = (seen.newest_point, seen.rpo_ms);
            return;
        }
        let records = self.guest_records();
        let Some(record) = records.iter().find(|record| record.id == guest) else {
            return;
        };
        let seen = self.guest_view(record);
        view.state = seen.phase.words().to_owned();
        (view.newest_point, view.rpo_ms) = (seen.newest_point, seen.rpo_ms);
        if matches!(
            seen.phase,
            Phase::Lost | Phase::Fenced | Phase::Held | Phase::Unprotected
        ) {
            troubled.push(format!("'{}' is {}", view.name, seen.phase.words()));
        }
    }

    /// What the files that are in force say of a group, value by value.
    ///
    /// # Errors
    /// When there are none, or none of them names it.
    pub fn group_policy(&self, name: &str) -> Result<Vec<Shown>, OperateError> {
        let Some(loaded) = self.policies.files() else {
            return Err(OperateError::Unknown(
                "no policy files are in force at this site: site.policy_files names where they are. To look into others: --policies FILE|DIR".to_owned(),
            ));
        };
        show::show(&loaded, name).map_err(|error| {
            OperateError::Unknown(format!(
                "{error} (of a peer's group: farhaven group show NAME)"
            ))
        })
    }

    /// Is this a group of ours that the policy files in force do not name?
    pub(in crate::site) fn is_orphan(&self, group: &GroupRecord) -> bool {
        let files = self.policies.files();
        group.from.is_none()
            && files.is_some_and(|files| !files.value.groups.contains_key(&group.name))
    }
}
