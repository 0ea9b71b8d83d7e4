//! What the API tells of limits, and takes.

use farhaven_policies::units::RateLimit;
use serde::{Deserialize, Serialize};

/// `GET /v1/link`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkView {
    /// What holds now for all guests together.
    pub limit: RateLimit,
    /// By whose word: `configuration`, a window's name, or `operator`.
    pub by: String,
    /// The time zone of windows.
    pub time_zone: String,
    /// The guests that are protected from here.
    pub guests: Vec<GuestLink>,
}

/// A guest's part of the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestLink {
    /// Its name.
    pub name: String,
    /// What holds now for it.
    pub limit: RateLimit,
    /// By whose word: `configuration`, a window's name, `policy` (of its group), `share`
    /// (of its group, of the link), or `operator`.
    pub by: String,
    /// Its share beside others; that of its group, which its guests divide.
    pub priority: u8,
}

/// Body of `POST /v1/link/limit`. What is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SetLimit {
    /// One guest; all together when absent.
    pub guest: Option<String>,
    /// The limit, all week.
    pub limit: Option<RateLimit>,
    /// The guest's share.
    pub priority: Option<u8>,
    /// Back to what the configuration says.
    pub configured: bool,
}
