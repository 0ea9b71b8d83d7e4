//! What a source tells of its protection groups.

use farhaven_policies::keep::Schedule;
use farhaven_policies::policy::Retention;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use crate::site::groups::GroupRecord;

/// One message about groups; a site of before knows none of them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupMessage {
    /// A group of guests that are protected to you: keep what is needed to run it.
    Known(GroupRecord),
    /// These are all of my groups that are protected to you: forget the others.
    All {
        /// Their ids.
        ids: Vec<GuestId>,
    },
    /// What a guest is owed has changed. Its session goes on.
    Owed {
        /// Who.
        guest: GuestId,
        /// Keep the newest point's RAM ready to run.
        warm: bool,
        /// How long points are kept.
        retention: Retention,
        /// The same as a schedule, which says it exactly.
        #[serde(default)]
        schedule: Option<Schedule>,
    },
}
