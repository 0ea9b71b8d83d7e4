//! What a source tells of its protection groups.

use farhaven_policies::keep::Schedule;
use farhaven_policies::policy::Retention;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::ActivationTimes;
use crate::activate::fence::Term;
use crate::site::groups::GroupRecord;

/// One message about groups; a site of before knows none of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(
    clippy::large_enum_variant,
    reason = "a message holds it by a pointer, whichever it is"
)]
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
    /// All guests of a group are held, and their last points sealed: they are
    /// yours, all of them or none.
    TakeOver {
        /// Which group.
        group: GuestId,
        /// All of its guests.
        members: Vec<Handed>,
    },
    /// Target: they are, and were started.
    TakenOver {
        /// All of them.
        members: Vec<Taken>,
    },
}

/// A guest that is handed over with all of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    /// Who.
    pub guest: GuestId,
    /// Its last point, sealed.
    pub point: u64,
    /// The term of the hand-over.
    pub term: Term,
}

fn as_usual() -> bool {
    true
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Taken {
    /// Who.
    pub guest: GuestId,
    /// Does it run there? Told where it does not: sites of before tell nothing.
    #[serde(default = "as_usual", skip_serializing_if = "Clone::clone")]
    pub runs: bool,
    /// From the question until it ran; nothing of one that does not run yet.
    pub times: ActivationTimes,
    /// Why it does not run, or is not healthy; empty when all is well.
    pub note: String,
}
