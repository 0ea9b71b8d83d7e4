//! Groups told to the peer that they are protected to, and heard there: kept in
//! the catalogue, and beside that peer's store for a catalogue that is lost.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use farhaven_storage_sync::catalogue::CatalogueError;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{PeerRecord, SiteKey};

use super::GroupRecord;
use crate::replicate::message::{GroupMessage, Message, Opening, Refusal};
use crate::site::answer::{not_theirs, refused, unknown_guest};
use crate::site::operate::OperateError;
use crate::site::remote::{AskError, Remote};
use crate::site::{Site, hex, rebuild, sound};

/// Most groups that one peer may have here.
const MOST_GROUPS: usize = 4096;

impl Site {
    /// Tells every peer that is connected what it does not know yet.
    pub(super) async fn tell_groups(self: &Arc<Self>) {
        let own: Vec<GroupRecord> = self
            .groups()
            .into_iter()
            .filter(|group| group.from.is_none())
            .collect();
        let remotes: Vec<_> = {
            let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
            remotes.values().cloned().collect()
        };
        for remote in remotes {
            let peer = &remote.record.site;
            let key = remote.record.key;
            if !remote.connected() {
                self.policies.set_told(key, None);
                continue;
            }
            let theirs = own.iter().filter(|group| group.goes_to(&remote.record));
            let theirs: Vec<_> = theirs.map(GroupRecord::told).collect();
            let before = self.policies.told(&key);
            if before.as_ref() == Some(&theirs) {
                continue;
            }
            match tell(&remote, before.unwrap_or_default(), &theirs).await {
                Ok(()) => self.policies.set_told(key, Some(theirs)),
                Err(AskError::Refused {
                    code: Refusal::Unknown,
                    ..
                }) => {
                    if !theirs.is_empty() {
                        tracing::warn!(
                            peer,
                            "this peer's version of Farhaven knows no groups: there, guests are run one by one"
                        );
                    }
                    self.policies.set_told(key, Some(theirs));
                }
                Err(error) => tracing::warn!(peer, %error, "groups could not be told yet"),
            }
        }
    }

    /// A peer tells of its groups.
    pub(in crate::site) async fn hear_of_groups(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        told: GroupMessage,
    ) -> Message {
        let heard = match told {
            GroupMessage::TakeOver { group, members } => {
                return self.take_over_group(remote, group, members).await;
            }
            GroupMessage::TakenOver { .. } => {
                return refused(Refusal::Unknown, "that is no question");
            }
            GroupMessage::Known(group) => self.hear_group(remote, group),
            GroupMessage::All { ids } => self.hear_all(remote, &ids),
            GroupMessage::Owed {
                guest,
                warm,
                retention,
                schedule,
            } => {
                let Some(standby) = self.standby_of(remote, guest) else {
                    return unknown_guest();
                };
                if !self.is_theirs(remote, &standby) {
                    return not_theirs();
                }
                let opening = Opening {
                    warm,
                    retention,
                    schedule,
                    ..standby.opening()
                };
                self.standby(remote, opening)
                    .map(|_| ())
                    .map_err(OperateError::Failed)
            }
        };
        match heard {
            Ok(()) => Message::Done,
            Err(error) => refused(Refusal::Unable, error),
        }
    }

    fn hear_group(&self, remote: &Remote, group: GroupRecord) -> Result<(), OperateError> {
        if let Some(why) = sound::unsound_group(&group) {
            return Err(OperateError::Conflict(why.to_owned()));
        }
        let PeerRecord {
            site: peer, key, ..
        } = &remote.record;
        let group = GroupRecord {
            from: Some(peer.clone()),
            key: Some(*key),
            ..group
        };
        if self.has_guest_of_another(&group, key) {
            return Err(OperateError::Conflict(
                "a guest of the group is sent there by another site".to_owned(),
            ));
        }
        let known = self.groups();
        let same = known.iter().find(|other| other.id == group.id);
        if let Some(other) = same.filter(|other| !other.is_of(&remote.record))
            && !self.group_turned_to(other, key)
        {
            return Err(OperateError::Conflict(
                "another site has a group of that id".to_owned(),
            ));
        }
        if same == Some(&group) {
            return Ok(());
        }
        let of_peer = known.iter().filter(|other| other.is_of(&remote.record));
        if same.is_none() && of_peer.count() >= MOST_GROUPS {
            return Err(OperateError::Conflict(format!(
                "more than {MOST_GROUPS} groups of one site are not taken"
            )));
        }
        // A guest that the peer has put into this group has left the other.
        for other in known
            .iter()
            .filter(|o| o.id != group.id && o.is_of(&remote.record))
        {
            let mut left = other.clone();
            left.members.retain(|_, m| !group.has(m.guest));
            if left.members.is_empty() {
                self.forget_group(other.id)?;
            } else if left != *other {
                self.put_group(&left)?;
            }
        }
        self.keep_group(&group)?;
        tracing::info!(
            peer,
            group = group.name,
            guests = group.members.len(),
            "a peer's group is known"
        );
        self.note_groups(remote);
        Ok(())
    }

    /// Is a guest of it kept here for another site?
    fn has_guest_of_another(&self, group: &GroupRecord, peer: &SiteKey) -> bool {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let mut kept = group.members.values().map(|m| standbys.get(&m.guest));
        kept.any(|standby| standby.is_some_and(|s| !s.is_from(peer) && !s.is_turned()))
    }

    fn hear_all(&self, remote: &Remote, ids: &[GuestId]) -> Result<(), OperateError> {
        let mut gone = self.groups();
        gone.retain(|group| group.is_of(&remote.record) && !ids.contains(&group.id));
        for group in &gone {
            tracing::info!(
                peer = remote.record.site,
                group = group.name,
                "a peer's group is no more"
            );
            self.forget_group(group.id)?;
        }
        if !gone.is_empty() {
            self.note_groups(remote);
        }
        Ok(())
    }

    fn groups_note(&self, remote: &Remote) -> PathBuf {
        let name = format!("{}.groups", hex(remote.record.key.as_bytes()));
        self.config.store_dir().join(name)
    }

    /// Notes a peer's groups beside its store.
    pub(super) fn note_groups(&self, remote: &Remote) {
        let mut groups = self.groups();
        groups.retain(|group| group.is_of(&remote.record));
        rebuild::keep(&self.groups_note(remote), &groups);
    }

    /// Groups of a peer that only their note knows of; they are put into the catalogue.
    pub(in crate::site) fn rebuild_groups(&self, remote: &Remote) -> Result<(), CatalogueError> {
        let peer = &remote.record;
        if self.groups().iter().any(|group| group.is_of(peer)) {
            return Ok(());
        }
        let noted = rebuild::note::<Vec<GroupRecord>>(&self.groups_note(remote));
        for group in noted.into_iter().flatten().take(MOST_GROUPS) {
            if !group.is_of(peer) || sound::unsound_group(&group).is_some() {
                continue;
            }
            let group = GroupRecord {
                from: Some(peer.site.clone()),
                key: Some(peer.key),
                ..group
            };
            tracing::warn!(
                group = group.name,
                peer = peer.site,
                "the catalogue had lost this group; found beside its store"
            );
            if let Err(error) = self.put_group(&group) {
                tracing::error!(group = group.name, %error, "it cannot be kept");
            }
        }
        Ok(())
    }
}

async fn tell(
    remote: &Remote,
    before: Vec<GroupRecord>,
    groups: &[GroupRecord],
) -> Result<(), AskError> {
    let ids = groups.iter().map(|group| group.id).collect();
    let ask = async |told| remote.ask(Message::Group(Box::new(told))).await;
    // First: what is no more stands in nobody's way.
    ask(GroupMessage::All { ids }).await?;
    for group in groups.iter().filter(|group| !before.contains(group)) {
        ask(GroupMessage::Known(group.clone())).await?;
    }
    Ok(())
}
