//! What comes after the move or failover of a group: it stays (commit), and is
//! protected the other way round (reprotect), with which the group itself
//! becomes one of this site. Back to where it came from: [`super::rollback`].

use std::sync::{Arc, PoisonError};

use farhaven_policies::units::Period;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;

use super::all::{GroupDone, MemberDone};
use super::{GroupRecord, NamedMember};
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::turn::view::{CommitReport, ReprotectReport};

/// Where a guest of a group is, seen from here.
enum Place {
    /// It was taken over and runs here.
    Here,
    /// It is a guest of this site that came from the peer, and is protected to there.
    Turned,
    /// Anything else.
    Elsewhere,
}

impl Site {
    fn place_of(&self, member: &NamedMember) -> Place {
        if let Some(standby) = self.standby_named(&member.name) {
            return match standby.active() {
                Some(_) => Place::Here,
                None => Place::Elsewhere,
            };
        }
        match self.is_turned(member.guest) {
            true => Place::Turned,
            false => Place::Elsewhere,
        }
    }

    /// Did this guest come from a peer, to which it is protected by now?
    fn is_turned(&self, guest: GuestId) -> bool {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys.get(&guest).is_some_and(|s| s.is_turned())
    }

    /// As [`Site::commit`], of all guests of a group, in the order in which they
    /// start. Done again, it goes on with those that remain.
    ///
    /// # Errors
    /// When there is no such group, or none of its guests was taken over here.
    pub async fn commit_group(
        self: &Arc<Self>,
        name: &str,
        discard: bool,
    ) -> Result<GroupDone<CommitReport>, OperateError> {
        let group = self.group(name)?;
        let members = self.members_here(&group);
        self.one_is_here(&group, &members)?;
        let mut done = Vec::new();
        for member in &members {
            done.push(match self.place_of(member) {
                Place::Turned => MemberDone::left(
                    member,
                    "it is protected the other way round by now: there is nothing to commit",
                ),
                _ => MemberDone::of(member, self.commit(&member.name, discard).await),
            });
        }
        let again = format!("Go on: farhaven commit {name}");
        Ok(GroupDone::of(name, done, &again))
    }

    /// A group of which no guest was taken over here is nothing to turn.
    pub(super) fn one_is_here(
        &self,
        group: &GroupRecord,
        members: &[NamedMember],
    ) -> Result<(), OperateError> {
        let elsewhere = |member: &NamedMember| matches!(self.place_of(member), Place::Elsewhere);
        if !members.iter().all(elsewhere) {
            return Ok(());
        }
        let other = group.from.as_ref().unwrap_or(&group.peer);
        Err(OperateError::Conflict(format!(
            "none of the guests of group '{0}' was moved or taken over to here; run this where they run now, which may be '{other}' (farhaven group show {0})",
            group.name
        )))
    }

    /// As [`Site::reprotect`], of all guests of a group, in the order in which
    /// they start: by the group's policy, with this RPO where one is given. Then
    /// the group is this site's own, and its guests are cut at one instant again.
    /// Done again, it goes on with those that remain.
    ///
    /// # Errors
    /// When there is no such group, or one of its guests does not run here or is
    /// not committed: nothing was done.
    pub async fn reprotect_group(
        self: &Arc<Self>,
        name: &str,
        rpo: Option<Period>,
    ) -> Result<GroupDone<ReprotectReport>, OperateError> {
        let mut group = self.group(name)?;
        let members = self.members_here(&group);
        self.one_is_here(&group, &members)?;
        self.may_reprotect(&group, &members)?;
        group.owed.rpo = rpo.unwrap_or(group.owed.rpo);
        let mut done = Vec::new();
        for member in &members {
            let turned = self.reprotect_of(&group, &member.name).await;
            done.push(MemberDone::of(member, turned));
        }
        let again = format!("Go on: farhaven reprotect {name}");
        let mut done = GroupDone::of(name, done, &again);
        if done.remains.is_empty()
            && let Err(error) = self.turn_group(group).await
        {
            done.remains = format!(
                "Its guests are protected, and not as a group yet: {error}. Go on: farhaven reprotect {name}"
            );
        }
        Ok(done)
    }

    /// One of its guests, by the group's policy.
    pub(in crate::site) async fn reprotect_of(
        self: &Arc<Self>,
        group: &GroupRecord,
        name: &str,
    ) -> Result<ReprotectReport, OperateError> {
        self.reprotect_owed(name, self.owed_by_group(group)).await
    }

    /// The protection group of which these are all guests.
    pub(in crate::site) fn whole_group(
        &self,
        name: &str,
        guests: &[String],
    ) -> Option<GroupRecord> {
        let group = self.group(name).ok()?;
        let members = self.members_here(&group);
        let all = members.len() == group.members.len()
            && members.iter().all(|member| guests.contains(&member.name));
        all.then_some(group)
    }

    /// All of them run here and are committed, or turned before.
    fn may_reprotect(
        &self,
        group: &GroupRecord,
        members: &[NamedMember],
    ) -> Result<(), OperateError> {
        let name = &group.name;
        let mut open = Vec::new();
        let mut away = Vec::new();
        for member in members {
            let active = self
                .standby_named(&member.name)
                .and_then(|standby| standby.active());
            match (self.place_of(member), active) {
                (Place::Here, Some(active)) if active.committed_at.is_none() => {
                    open.push(member.name.as_str());
                }
                (Place::Here | Place::Turned, _) => {}
                (Place::Elsewhere, _) => away.push(member.name.as_str()),
            }
        }
        if !away.is_empty() {
            return Err(OperateError::Conflict(format!(
                "not all guests of group '{name}' run here, and a group is protected from one site: bring {} here first, or reprotect the others one by one",
                away.join(", ")
            )));
        }
        if !open.is_empty() {
            return Err(OperateError::Conflict(format!(
                "{} of group '{name}' not committed ({}), and this uses up what a rollback returns to. Run first: farhaven commit {name}",
                match open.len() {
                    1 => "a guest is".to_owned(),
                    several => format!("{several} guests are"),
                },
                open.join(", ")
            )));
        }
        Ok(())
    }

    /// The group is this site's own now: its guests are, all of them. The other
    /// site hears of it within seconds.
    pub(in crate::site) async fn turn_group(
        self: &Arc<Self>,
        group: GroupRecord,
    ) -> Result<(), OperateError> {
        let turned = match &group.from {
            Some(from) => GroupRecord {
                peer: from.clone(),
                from: None,
                ..group
            },
            None => group,
        };
        self.put_group(&turned)?;
        if let Some(remote) = self.remote_meant(turned.key, &turned.peer) {
            self.note_groups(&remote);
        }
        for name in turned.members.keys() {
            // Those that were turned one by one go by the group's policy, too.
            let told = self.protect_member(&turned, name).await;
            told.map_err(OperateError::Failed)?;
        }
        tracing::warn!(
            group = turned.name,
            to = turned.peer,
            "a group turned round: it is protected to where it came from"
        );
        self.policies.look_again();
        Ok(())
    }

    /// A group of this site's whose guests are all sent here by that peer by now:
    /// it turned round, and is that peer's.
    pub(super) fn group_turned_to(&self, group: &GroupRecord, peer: &SiteKey) -> bool {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        group.from.is_none()
            && group.members.values().all(|member| {
                let standby = standbys.get(&member.guest);
                standby.is_some_and(|s| s.is_from(peer) && !s.is_turned())
                    && !self.was_shared(member.guest)
            })
    }
}
