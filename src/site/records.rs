//! What a site remembers in its catalogue, as JSON values.

use std::path::{Path, PathBuf};
use std::time::Duration;

use farhaven_policies::keep::Schedule;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{PeerRecord, SiteKey};
use serde::{Deserialize, Serialize};

use crate::activate::fence::Term;
use crate::guest::Definition;
use crate::replicate::message::{ActivationTimes, Opening};
use crate::site::groups::PointGroup;
use crate::site::view::ConsolePaths;

/// Most volumes of one guest.
pub const MAX_VOLUMES: usize = 256;

/// A guest that runs here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestRecord {
    /// Who.
    pub id: GuestId,
    /// Its name, unique at this site.
    pub name: String,
    /// QEMU's control socket; absent for a guest whose monitor lives in the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// Its serial console, where the daemon has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsolePaths>,
    /// The directory that a takeover made for it here, before it turned round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<PathBuf>,
    /// How it was launched.
    pub definition: Definition,
}

/// What a guest is owed, and by whose word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owed {
    /// RPO, limits, what a move may cost.
    pub policy: farhaven_policies::policy::Policy,
    /// Which points are kept, where that is said by a schedule.
    pub schedule: Option<Schedule>,
    /// The group whose policy it is; `None` for the site's own, or an operator's.
    pub group: Option<String>,
    /// Its part of what that group may take of the link.
    pub share: Option<GroupShare>,
}

/// A guest's part of what its group may take of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupShare {
    /// Percent of the link that all guests of the group may take together.
    pub percent: u8,
    /// So many guests, in equal parts.
    pub among: u16,
    /// What the policy files say that the link to the peer carries for groups.
    #[serde(default)]
    pub link: farhaven_policies::units::RateLimit,
}

/// A guest's protection: where to, by which policy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Protection {
    /// Who.
    pub guest: GuestId,
    /// The peer's name, for people.
    pub to: String,
    /// The peer: a site of that name with another key is another. Records of before
    /// have none until the site starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SiteKey>,
    /// What it is owed.
    pub policy: farhaven_policies::policy::Policy,
    /// Which points are kept, where that is said by a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// The group whose policy it is; `None` for the site's own, or an operator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Its part of what that group may take of the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<GroupShare>,
    /// The operator paused it.
    pub paused: bool,
    /// Its first copy comes by a seed: the link waits until that is imported.
    #[serde(default)]
    pub seeded: bool,
    /// A planned move is being handed over under this term: until the peer's
    /// word is known, the guest stays stopped here.
    pub moving: Option<Term>,
    /// It stands still for a run at the peer, and this point is sealed there.
    #[serde(default)]
    pub held: Option<super::runs::hold::HeldPoint>,
    /// A run at the peer has it shut down here, and nothing but that run or an
    /// operator starts it again.
    #[serde(default)]
    pub shut_down: bool,
    /// It was moved: it runs at the peer under this term. Its copy here is kept
    /// stopped, as it was at its last instruction.
    #[serde(default)]
    pub moved: Option<Term>,
    /// A newer term of the peer stopped its copy here, which may know more than
    /// the point that runs there.
    #[serde(default)]
    pub stopped: bool,
    /// Which one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_by: Option<Term>,
    /// The peer committed: it is not rolled back to here any more.
    #[serde(default)]
    pub committed: bool,
}

/// Does a record mean this peer? By its key; one of before, that has none, by its name.
pub(super) fn is_meant(key: Option<SiteKey>, name: &str, peer: &PeerRecord) -> bool {
    key.map_or_else(|| name == peer.site, |key| key == peer.key)
}

impl Protection {
    /// Does it go to this peer?
    pub fn goes_to(&self, peer: &PeerRecord) -> bool {
        is_meant(self.key, &self.to, peer)
    }

    /// What it is owed.
    pub fn owed(&self) -> Owed {
        Owed {
            policy: self.policy.clone(),
            schedule: self.schedule.clone(),
            group: self.group.clone(),
            share: self.share,
        }
    }
}

/// A guest that a peer sends here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StandbyRecord {
    /// The peer's name, for people.
    pub from: String,
    /// The peer: a site of that name with another key is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SiteKey>,
    /// What the peer told of it.
    pub opening: Opening,
    /// The point made of what was here when it turned round; 0 for none.
    #[serde(default)]
    pub base: u64,
    /// It turned round: it runs here now and is protected to that peer. Its old
    /// points stay until their time is over.
    #[serde(default)]
    pub turned: bool,
}

impl StandbyRecord {
    /// The peer. Records of before tell it by the term that it opened the guest under,
    /// which had to be its own.
    pub fn source(&self) -> SiteKey {
        self.key.unwrap_or(self.opening.term.owner)
    }
}

/// A copy of a guest that ran here, stopped for good, after the guest turned round.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EvidenceRecord {
    /// Its record as a guest of this site.
    pub record: GuestRecord,
    /// The term of the peer that it was stopped for.
    pub term: u64,
    /// It was moved, so that it holds nothing that the peer has not.
    pub unchanged: bool,
    /// Its sockets, consoles and images, as far as they are this site's.
    pub directory: PathBuf,
    /// When, nanoseconds since 1970.
    pub at: u64,
}

/// What was measured of a point, for listings. Rebuilt without the scan's
/// figures from the point's own manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PointRecord {
    /// Nanoseconds since 1970.
    pub cut_at: u64,
    /// How long the guest was stopped.
    pub pause: Duration,
    /// Of that: scanning RAM.
    pub ram_scan: Duration,
    /// Bytes of RAM looked at in that time.
    pub ram_scanned_bytes: u64,
    /// The cut of its whole group that it is part of, as the point itself tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<PointGroup>,
    /// Whether its filesystems were frozen, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
}

/// A guest that was taken over and runs here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Activation {
    /// Who.
    pub guest: GuestId,
    /// From which point.
    pub point: u64,
    /// Under which term.
    pub term: Term,
    /// Directory of its overlays, consoles and logs.
    #[serde(default)]
    pub run: PathBuf,
    /// Its QEMU's control socket; absent for a guest inside of the daemon.
    #[serde(default)]
    pub qmp: Option<PathBuf>,
    /// Its QEMU's process.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Written before the guest is let go; `true` once it ran.
    pub running: bool,
    /// Its filesystems were frozen at the point's cut, and its agent has not said
    /// that they are thawed.
    #[serde(default)]
    pub frozen: bool,
    /// Its disks need the store no longer.
    pub hydrated: bool,
    /// What it took.
    pub times: ActivationTimes,
    /// When, nanoseconds since 1970.
    pub at: u64,
    /// When it was committed, nanoseconds since 1970; until then it can be rolled back.
    #[serde(default)]
    pub committed_at: Option<u64>,
    /// Its source knows of the commit.
    #[serde(default)]
    pub commit_told: bool,
    /// It is being rolled back to its source, under this term of that site.
    #[serde(default)]
    pub returning: Option<Term>,
}

impl Activation {
    /// Where its overlays, consoles and logs are. Records of before guests
    /// inside of the daemon tell only of the socket in it.
    pub fn directory(&self) -> &Path {
        let of_qmp = || self.qmp.as_deref().and_then(Path::parent);
        match self.run.as_os_str().is_empty() {
            true => of_qmp().unwrap_or(&self.run),
            false => &self.run,
        }
    }

    /// For people: ` (process 42)`.
    pub(super) fn process(&self) -> String {
        self.pid
            .map_or_else(String::new, |pid| format!(" (process {pid})"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn peer(site: &str, key: u8) -> PeerRecord {
        PeerRecord {
            site: site.to_owned(),
            key: SiteKey::from_bytes([key; 32]),
            addresses: Vec::new(),
            dial: false,
        }
    }

    fn without_key(record: &impl Serialize) -> Value {
        let mut row = json!(record);
        let had = row.as_object_mut().unwrap().remove("key");
        assert!(had.is_some(), "{row}");
        row
    }

    #[test]
    fn a_site_of_the_same_name_with_another_key_is_not_meant() {
        let (west, other) = (peer("west", 1), peer("west", 2));
        let protection = Protection {
            guest: GuestId([7; 16]),
            to: "west".to_owned(),
            key: Some(west.key),
            policy: Default::default(),
            schedule: None,
            group: None,
            share: None,
            paused: false,
            seeded: false,
            moving: None,
            held: None,
            shut_down: false,
            moved: None,
            stopped: false,
            stopped_by: None,
            committed: false,
        };
        assert!(protection.goes_to(&west) && !protection.goes_to(&other));
        assert!(protection.goes_to(&peer("munich", 1)), "whatever its name");
        // As a version of before wrote it down.
        let before: Protection = serde_json::from_value(without_key(&protection)).unwrap();
        assert_eq!(before.key, None);
        assert!(before.goes_to(&west) && !before.goes_to(&peer("munich", 1)));

        let row = json!({"id": GuestId([7; 16]), "name": "bank", "from": "west", "peer": "east", "members": {}});
        let before: super::super::groups::GroupRecord = serde_json::from_value(row).unwrap();
        assert!(before.is_of(&west) && !before.goes_to(&peer("east", 3)));
        let known = super::super::groups::GroupRecord {
            key: Some(west.key),
            ..before
        };
        assert!(known.is_of(&west) && !known.is_of(&other));
        assert_eq!(known.told().key, None);
    }

    #[test]
    fn a_guest_of_before_is_of_the_site_that_it_was_opened_by() {
        let (east, other) = (peer("east", 1), peer("east", 2));
        let guest = GuestId([7; 16]);
        let record = StandbyRecord {
            from: "east".to_owned(),
            key: Some(east.key),
            opening: Opening {
                guest,
                name: "web".to_owned(),
                source: "east".to_owned(),
                definition: crate::guest::qemu::definition::Definition::sample().into(),
                volumes: Vec::new(),
                term: Term {
                    group: guest,
                    number: 3,
                    owner: east.key,
                },
                warm: false,
                retention: Default::default(),
                rpo_ms: None,
                schedule: None,
                commit: Default::default(),
            },
            base: 0,
            turned: false,
        };
        let before: StandbyRecord = serde_json::from_value(without_key(&record)).unwrap();
        assert_eq!((before.key, before.source()), (None, east.key));
        assert_ne!(before.source(), other.key);
        let again: StandbyRecord = serde_json::from_value(json!(record)).unwrap();
        assert_eq!(again.key, Some(east.key));
    }
}
