//! What sites say of a guest that changed sides: committed, rolled back, or
//! protected the other way round. All questions come from where it runs.

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Opening;
use crate::activate::fence::Term;

/// What a site has of a guest that ran there before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyState {
    /// Running (`Some(true)`), stopped (`Some(false)`), or gone.
    pub runs: Option<bool>,
    /// It was moved away: its copy is as it was at its last instruction.
    pub unchanged: bool,
    /// A commit was heard of: it does not go on any more.
    pub committed: bool,
}

/// One message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TurnMessage {
    /// What is there of this guest?
    Look {
        /// Who.
        guest: GuestId,
    },
    /// This.
    Seen(CopyState),
    /// Let your stopped copy go on, under this term of yours. Mine is stopped,
    /// and does not run again. Answered with [`super::Message::Running`], or
    /// refused when it does not run there, nor will.
    GoBack {
        /// The term; its group is the guest.
        term: Term,
    },
    /// It stays here: your copy is not needed for a rollback any more.
    Commit {
        /// Who.
        guest: GuestId,
        /// End the copy now, rather than keep it for what turns round.
        discard: bool,
    },
    /// I am about to protect this guest to your place: make what you have of it
    /// what I build upon. Asked again and again until the answer is
    /// [`TurnMessage::Turned`].
    Turn(Box<Opening>),
    /// It is being read.
    Turning {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Done.
    Turned {
        /// The point that holds it; 0 when nothing was there.
        base: u64,
        /// Bytes that it takes there.
        bytes: u64,
    },
}
