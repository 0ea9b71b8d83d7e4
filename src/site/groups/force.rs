//! Policy files in force: read at start, again whenever they change, and at
//! SIGHUP. A broken file leaves in force what was before, and says so.
//!
//! Every few seconds what they say is compared with what is: groups are
//! written down, their guests protected, running drivers told what changed.
//! Nothing here ever ends a protection: a guest or a group that the files name
//! no more goes on as it was, until an operator ends that.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::alert::{Finding, Kind, Severity};
use farhaven_policies::files::{Group, NamedPolicy, PolicyFiles, Quiesce};
use farhaven_policies::load::{Loaded, files_of};
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use tokio::sync::Notify;

use super::cuts::Cuts;
use super::handed::HandedOver;
use super::{GroupMember, GroupRecord, MAX_MEMBERS, PolicyFilesView};
use crate::guest::Definition;
use crate::guest::qemu::agent;
use crate::site::Site;
use crate::site::operate::OperateError;
use crate::site::records::{GuestRecord, Owed};
use crate::site::unix_ns;

mod members;

/// How often the files are looked at.
const EVERY: Duration = Duration::from_secs(3);

/// A guest whose protection could not begin is left alone for so long.
const AGAIN: Duration = Duration::from_secs(30);

/// What policy files say, and how far that is in force.
#[derive(Default)]
pub(in crate::site) struct InForce {
    state: Mutex<State>,
    wake: Arc<Notify>,
    /// Who is cut together.
    pub(in crate::site) cuts: Cuts,
    /// Who was handed over with all of a group, and does not run yet.
    pub(super) handed: HandedOver,
}

#[derive(Default)]
struct State {
    files: Option<Arc<Loaded<PolicyFiles>>>,
    /// Of the texts that were read last, sound or not.
    seen: Option<blake3::Hash>,
    /// When the sound ones were read.
    read_at: Option<SystemTime>,
    /// Why the newest are not in force; empty when they are.
    trouble: String,
    /// Groups that are not in force as a whole, and why.
    waiting: BTreeMap<String, String>,
    /// What drivers were told last.
    sent: BTreeMap<GuestId, Owed>,
    /// Protections that could not begin: when that was, and why.
    refused: BTreeMap<GuestId, (Instant, String)>,
    /// What peers were told last, while they are connected.
    told: BTreeMap<SiteKey, Vec<GroupRecord>>,
}

impl InForce {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files are read anew now.
    pub(in crate::site) fn look_again(&self) {
        self.wake.notify_one();
    }

    /// What the newest sound files say, and where.
    pub(in crate::site) fn files(&self) -> Option<Arc<Loaded<PolicyFiles>>> {
        self.state().files.clone()
    }

    /// Why a group of the files is not in force as a whole; empty when it is.
    pub(super) fn trouble_of(&self, group: &str) -> String {
        self.state().waiting.get(group).cloned().unwrap_or_default()
    }

    pub(super) fn told(&self, peer: &SiteKey) -> Option<Vec<GroupRecord>> {
        self.state().told.get(peer).cloned()
    }

    pub(super) fn set_told(&self, peer: SiteKey, groups: Option<Vec<GroupRecord>>) {
        let mut state = self.state();
        match groups {
            Some(groups) => state.told.insert(peer, groups),
            None => state.told.remove(&peer),
        };
    }

    /// For `status`.
    pub(super) fn view(&self, path: &Path) -> PolicyFilesView {
        let state = self.state();
        let waiting = state.waiting.iter();
        PolicyFilesView {
            path: path.to_owned(),
            groups: state
                .files
                .as_ref()
                .map_or(0, |files| files.value.groups.len()),
            read_at: state.read_at.map(unix_ns),
            trouble: state.trouble.clone(),
            waiting: waiting.map(|(g, why)| (g.clone(), why.clone())).collect(),
        }
    }
}

/// Keeps what policy files say in force, for as long as the site runs.
pub(in crate::site) async fn keep(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        strong.look_at_policy_files().await;
        strong.put_in_force().await;
        strong.tell_groups().await;
        let wake = strong.policies.wake.clone();
        drop(strong);
        let _ = tokio::time::timeout(EVERY, wake.notified()).await;
    }
}

/// The texts' sum, and what they say when that is not the sum of before.
fn read(
    path: &Path,
    before: Option<blake3::Hash>,
) -> (blake3::Hash, Option<Result<Loaded<PolicyFiles>, String>>) {
    let mut sum = blake3::Hasher::new();
    match files_of(path, "site.policy_files names where policy files are") {
        Ok(files) => {
            for file in files {
                sum.update(file.as_os_str().as_encoded_bytes());
                let size = file.metadata().map_or(0, |about| about.len());
                sum.update(&size.to_le_bytes());
                if size <= farhaven_policies::load::LARGEST_FILE {
                    match std::fs::read(&file) {
                        Ok(text) => sum.update(&text),
                        Err(error) => sum.update(error.to_string().as_bytes()),
                    };
                }
            }
        }
        Err(error) => {
            sum.update(error.to_string().as_bytes());
        }
    }
    let sum = sum.finalize();
    if Some(sum) == before {
        return (sum, None);
    }
    let files = PolicyFiles::read(path);
    (sum, Some(files.map_err(|e| e.to_string())))
}

impl Site {
    async fn look_at_policy_files(self: &Arc<Self>) {
        let Some(path) = self.config.policy_files() else {
            return;
        };
        let before = self.policies.state().seen;
        let looked = crate::work::spawn_blocking({
            let path = path.clone();
            move || read(&path, before)
        });
        let Ok((sum, Some(files))) = looked.await else {
            return;
        };
        let mut state = self.policies.state();
        state.seen = Some(sum);
        match files {
            Ok(files) => {
                tracing::info!(path = %path.display(), groups = files.value.groups.len(), "policy files are in force");
                self.heed_thresholds(files.value.alerts.clone());
                state.files = Some(Arc::new(files));
                state.read_at = Some(SystemTime::now());
                state.trouble.clear();
                state.refused.clear();
            }
            Err(why) => {
                let kept = match state.files {
                    Some(_) => "what they said before stays in force",
                    None => "groups of before go on as they were",
                };
                tracing::error!(path = %path.display(), why, "policy files are broken; {kept}");
                state.trouble = format!(
                    "policy files are broken; {kept}. Find all mistakes: farhaven policy check {}. {why}",
                    path.display()
                );
            }
        }
        let trouble = state.trouble.clone();
        drop(state);
        self.policy_files_alert(&path, &trouble);
    }

    /// Brings what is to what the files say.
    async fn put_in_force(self: &Arc<Self>) {
        let Some(loaded) = self.policies.files() else {
            return;
        };
        let files = &loaded.value;
        let records = self.guest_records();
        let by_name: BTreeMap<&str, &GuestRecord> =
            records.iter().map(|r| (r.name.as_str(), r)).collect();
        let before: Vec<GroupRecord> = self
            .groups()
            .into_iter()
            .filter(|group| group.from.is_none())
            .collect();
        let mut waiting = BTreeMap::new();
        let mut wanted = Vec::new();
        for (name, group) in &files.groups {
            // Files of another site, whose group runs here now: it goes on as it
            // was told, or as it turned round.
            if group.peer == self.config.site.name {
                continue;
            }
            // The same files may be at all sites: those guests run elsewhere.
            if !group
                .guests
                .keys()
                .any(|g| by_name.contains_key(g.as_str()))
            {
                continue;
            }
            let policy = files.policies.get(&group.policy).cloned();
            match self.wanted(name, group, policy.unwrap_or_default(), &by_name) {
                Ok(record) => wanted.push(record),
                Err(why) => {
                    waiting.insert(name.clone(), why);
                }
            }
        }
        if let Err(error) = self.write_groups(&before, &wanted) {
            waiting.insert(String::new(), error.to_string());
        }
        for group in &wanted {
            for name in group.members.keys() {
                if let Err(why) = self.protect_member(group, name).await {
                    waiting.entry(group.name.clone()).or_insert(why);
                }
            }
        }
        for group in &wanted {
            let lack_agents = without_agent(group, &records);
            if let Some(why) = not_acted_on(&group.owed, &lack_agents) {
                waiting.entry(group.name.clone()).or_insert(why);
            }
        }
        let mut state = self.policies.state();
        for (group, why) in &waiting {
            if state.waiting.get(group) != Some(why) {
                tracing::warn!(group, why, "a group is not in force as a whole");
            }
        }
        state.waiting = waiting;
    }

    /// A group as the files say it, of guests that are all known here.
    fn wanted(
        &self,
        name: &str,
        group: &Group,
        owed: NamedPolicy,
        known: &BTreeMap<&str, &GuestRecord>,
    ) -> Result<GroupRecord, String> {
        let lacking: Vec<_> = group
            .guests
            .keys()
            .filter(|guest| !known.contains_key(guest.as_str()))
            .map(String::as_str)
            .collect();
        if !lacking.is_empty() {
            return Err(format!(
                "no guest '{}' is known here; the group is in force when all of its guests are (farhaven guest add NAME --qmp PATH)",
                lacking.join("', '")
            ));
        }
        if group.guests.len() > MAX_MEMBERS {
            return Err(format!(
                "it has {} guests; at most {MAX_MEMBERS} can be cut at one instant: make two groups of them",
                group.guests.len()
            ));
        }
        if known.contains_key(name) && !group.guests.contains_key(name) {
            return Err(format!(
                "it is called like guest '{name}', which is not in it; give the group another name"
            ));
        }
        let Some(remote) = self.remote(&group.peer) else {
            return Err(self.no_peer(&group.peer).to_string());
        };
        let members: BTreeMap<String, GroupMember> = group
            .guests
            .iter()
            .filter_map(|(guest, terms)| {
                let guest_id = known.get(guest.as_str())?.id;
                let member = GroupMember {
                    guest: guest_id,
                    terms: terms.clone(),
                };
                Some((guest.clone(), member))
            })
            .collect();
        for other in self.groups().iter().filter(|group| group.from.is_some()) {
            let shared = members.iter().find(|(_, m)| other.has(m.guest));
            if let Some((guest, _)) = shared {
                return Err(format!(
                    "guest '{guest}' is in group '{}' of site '{}'; a guest is in one group",
                    other.name,
                    other.from.as_deref().unwrap_or_default()
                ));
            }
        }
        Ok(GroupRecord {
            id: self.group_id(name),
            name: name.to_owned(),
            from: None,
            peer: group.peer.clone(),
            key: Some(remote.record.key),
            policy: group.policy.clone(),
            owed,
            members,
        })
    }

    /// The same for the same name at the same site, also with a lost catalogue:
    /// points of before are still the group's.
    fn group_id(&self, name: &str) -> GuestId {
        let mut sum = blake3::Hasher::new_derive_key("farhaven 2026 protection group id");
        sum.update(self.key().as_bytes());
        sum.update(name.as_bytes());
        let mut id = [0; 16];
        sum.finalize_xof().fill(&mut id);
        // As a version 8 UUID: it is no guest's, and no image's.
        id[6] = id[6] & 0x0f | 0x80;
        id[8] = id[8] & 0x3f | 0x80;
        GuestId(id)
    }

    /// Writes down what differs. A guest that is in another group now has left
    /// the one it was in; a group that the files name no more goes on.
    fn write_groups(
        &self,
        before: &[GroupRecord],
        wanted: &[GroupRecord],
    ) -> Result<(), OperateError> {
        for old in before {
            if wanted.iter().any(|group| group.id == old.id) {
                continue;
            }
            let mut left = old.clone();
            left.members
                .retain(|_, m| !wanted.iter().any(|group| group.has(m.guest)));
            if left.members.is_empty() {
                self.forget_group(old.id)?;
                tracing::info!(group = old.name, "its guests are in other groups now");
            } else if left != *old {
                self.put_group(&left)?;
            }
        }
        for group in wanted.iter().filter(|group| !before.contains(group)) {
            self.put_group(group)?;
            tracing::info!(
                group = group.name,
                guests = group.members.len(),
                peer = group.peer,
                "a group is in force"
            );
        }
        Ok(())
    }

    /// Tells of broken policy files, or that they are sound again.
    fn policy_files_alert(&self, path: &Path, trouble: &str) {
        let subject = path.display().to_string();
        if trouble.is_empty() {
            self.clear(Kind::PolicyBroken, &subject);
            return;
        }
        let advice = format!("run: farhaven policy check {subject}");
        let (kind, severity) = (Kind::PolicyBroken, Severity::Warning);
        self.raise(Finding::new(kind, subject, severity, trouble, advice));
    }
}

/// Guests of a group whose policy has filesystems frozen, and that have no channel
/// to an agent.
fn without_agent(group: &GroupRecord, records: &[GuestRecord]) -> Vec<String> {
    let lacks = |definition: &Definition| match definition {
        Definition::Qemu(definition) => agent::port(&definition.arguments).is_none(),
        Definition::Embedded(_) => true,
    };
    let members = group.members.iter().filter(|(_, member)| {
        let mut records = records.iter();
        let record = records.find(|record| record.id == member.guest);
        record.is_some_and(|record| lacks(&record.definition))
    });
    members.map(|(name, _)| name.clone()).collect()
}

/// What a policy asks for that is not done: the group is protected without it, and
/// that is said.
fn not_acted_on(policy: &NamedPolicy, lack_agents: &[String]) -> Option<String> {
    let mut lacks = Vec::new();
    if policy.quiesce == Quiesce::Agent && !lack_agents.is_empty() {
        lacks.push(format!(
            "quiesce = \"agent\", and QEMU has no channel to a guest agent in '{0}' (its points are crash-consistent; farhaven guest check {1} tells how to give it one)",
            lack_agents.join("', '"),
            lack_agents[0],
        ));
    }
    (!lacks.is_empty()).then(|| {
        format!(
            "its policy asks for {}; all else of it is in force",
            lacks.join(", and for ")
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_done_is_said() {
        let nobody = ["db".to_owned()];
        assert_eq!(not_acted_on(&NamedPolicy::default(), &nobody), None);
        let asks = NamedPolicy {
            quiesce: Quiesce::Agent,
            ..NamedPolicy::default()
        };
        let said = not_acted_on(&asks, &nobody).unwrap();
        assert!(said.contains("guest check db"), "{said}");
        assert_eq!(not_acted_on(&asks, &[]), None);
    }

    #[test]
    fn files_are_read_only_when_they_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("policies.toml");
        let (missing, told) = read(&file, None);
        assert!(told.unwrap().is_err());
        std::fs::write(&file, "[policies.gold]\nrpo = \"2s\"\n").unwrap();
        let (sound, told) = read(&file, Some(missing));
        let rpo = told.unwrap().unwrap().value.policies["gold"].rpo;
        assert_eq!(rpo, farhaven_policies::units::Period::from_secs(2));
        assert!(read(&file, Some(sound)).1.is_none());
        std::fs::write(&file, "[policies.gold]\nrpo = \"2x\"\n").unwrap();
        let (broken, told) = read(&file, Some(sound));
        assert!(told.unwrap().unwrap_err().contains("rpo"));
        assert!(read(&file, Some(broken)).1.is_none());
    }
}
