//! What a run at the target and the source say to each other of a guest.

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use crate::activate::fence::Term;

/// One message about a guest that a run has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunMessage {
    /// Target: a run moves this guest. Converge, stop it, seal its last point
    /// and hold it. Asked again while it is held, the answer is the same.
    Hold {
        /// Who.
        guest: GuestId,
        /// Its agent freezes filesystems for its last point.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        quiesce: bool,
    },
    /// Target: does this guest's agent answer? Answered with
    /// [`Done`](super::Message::Done), or refused with the reason.
    Quiesce {
        /// Who.
        guest: GuestId,
        /// And it is to freeze filesystems for the guest's next points.
        next_points: bool,
    },
    /// Target: a run has this guest shut down where it is, cleanly, before its
    /// last changes are taken; it stays down until [`StartAgain`](Self::StartAgain).
    /// Answered with [`Done`](super::Message::Done) when it is down, or refused with
    /// the reason. Asked again, the answer is the same.
    ShutDown {
        /// Who.
        guest: GuestId,
        /// Longest that it has for that, in milliseconds. `None`: could it be done?
        /// Then nothing is changed.
        within_ms: Option<u64>,
    },
    /// Target: what a run had shut down is to boot again where it is. Answered with
    /// [`Done`](super::Message::Done) when it runs, also if it ran already.
    StartAgain {
        /// Who.
        guest: GuestId,
    },
    /// Source: it is stopped, and its last point is sealed at your place.
    Held(HeldGuest),
    /// Target, to [`GiveUp`](super::Message::GiveUp): a run has the guest and
    /// has not ended. The source holds it on, and asks again.
    Undecided,
    /// Target: the run has ended, or gave the guest back: ask now what became
    /// of it, and act on it. Answered with [`Done`](super::Message::Done) at once.
    Release {
        /// Who.
        guest: GuestId,
    },
    /// Target: do you hold it still, so that it could go on? Changes nothing.
    /// Answered with `Held`, or refused.
    StillHeld {
        /// Who.
        guest: GuestId,
    },
    /// Target: a run moves these guests, which are all of a group. As
    /// [`Hold`](Self::Hold) for each of them, but they stop at one instant, and
    /// either all of them are held or none is. Refused as out of step when some
    /// were held before, and not all at one instant, or one is about to be copied
    /// on after a restart: ask again.
    HoldGroup {
        /// Which group.
        group: GuestId,
        /// All of its guests.
        guests: Vec<ToHold>,
    },
    /// Source: all of them are held, and what each has to tell.
    GroupHeld {
        /// From the first guest's stop to the last one's, nanoseconds.
        skew_ns: u64,
        /// Each guest.
        guests: Vec<(GuestId, HeldGuest)>,
    },
}

/// A guest that is to be held with all of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToHold {
    /// Who.
    pub guest: GuestId,
    /// Its agent freezes filesystems for its last point.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiesce: bool,
}

/// A guest that stands still for a run, its last point sealed at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldGuest {
    /// That point.
    pub point: u64,
    /// Bytes sent while it stood still.
    pub bytes: u64,
    /// When it was stopped, nanoseconds since 1970.
    pub stopped_at: u64,
    /// The term of the hand-over, which the target may take now.
    pub term: Term,
    /// Whether its filesystems were frozen, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
}
