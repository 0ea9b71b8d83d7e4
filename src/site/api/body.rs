//! What requests to a site's API carry.

use std::path::PathBuf;

use farhaven_policies::units::Period;
use serde::{Deserialize, Serialize};

use super::StartGuest;
use crate::site::kept::PointChoice;

/// Body of `POST /v1/invitations`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invite {
    /// How long it may be accepted, in seconds.
    pub valid_s: u64,
}

/// Answer to it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Invited {
    /// To be given to the other site, by a way that only its operator reads.
    pub invitation: String,
    /// How long it may be accepted, in seconds.
    pub valid_s: u64,
}

/// Body of `POST /v1/peers`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// What the other site's operator gave.
    pub invitation: String,
}

/// Body of `POST /v1/guests`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddGuest {
    /// How it shall be called.
    pub name: String,
    /// QEMU's control socket, for one that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// A guest that the daemon is to start and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartGuest>,
}

/// Query of `GET /v1/guests/{name}/check`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// The peer whose fitness is checked too.
    pub to: Option<String>,
}

/// Body of `POST /v1/guests/{name}/protect`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protect {
    /// The peer.
    pub to: String,
    /// Like `10s`; by the site's policy when absent.
    pub rpo: Option<Period>,
    /// The first copy comes by a seed: nothing is sent before it is imported.
    #[serde(default)]
    pub seeded: bool,
}

/// Body of `POST /v1/guests/{name}/seed`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportSeed {
    /// The peer that will import it.
    pub to: String,
    /// An absolute path on this host: a file that is not there, or a directory.
    pub path: PathBuf,
}

/// Body of `POST /v1/seeds`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportSeed {
    /// An absolute path on this host.
    pub path: PathBuf,
}

/// Body of `POST /v1/guests/{name}/unprotect`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unprotect {
    /// Drop its points at the peer.
    pub discard: bool,
}

/// Body of `POST /v1/guests/{name}/failover`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failover {
    /// Its number or its name; the newest when absent.
    pub point: Option<PointChoice>,
    /// Even if the source is alive.
    pub force: bool,
    /// Who asks, for the audit record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Body of `POST /v1/guests/{name}/test`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestFailover {
    /// Its number or its name; the newest when absent.
    pub point: Option<PointChoice>,
    /// Who asks, for the audit record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Body of `POST /v1/guests/{name}/move`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Move {
    /// Even if the guest stands longer than its policy allows.
    pub accept_pause: bool,
    /// Who asks, for the audit record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Body of `POST /v1/guests/{name}/take-back`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TakeBack {
    /// An operator made sure that it does not run at the peer.
    pub force: bool,
}

/// Body of `POST /v1/images`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddImage {
    /// A raw image that the daemon may read.
    pub path: PathBuf,
    /// How it shall be called.
    pub name: String,
    /// For the guests of this site; of every paired one when absent.
    #[serde(default)]
    pub peer: Option<String>,
}

/// Query of `DELETE /v1/images/{name}`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfPeer {
    /// That for the guests of this site; of every paired one when absent.
    pub peer: Option<String>,
}
