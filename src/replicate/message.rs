//! What two paired sites say to each other beside the data itself.
//!
//! Every message is one CBOR item on the control stream, at most
//! [`MAX_MESSAGE`] bytes. A request carries an `id`, its answer the same id in
//! `answers`. Requests are idempotent: whoever loses the connection before the
//! answer came asks again. Unknown fields are ignored, an unknown message is
//! answered with [`Message::Refused`], so that a newer site can add both.

use std::time::Duration;

use bytes::Bytes;
use farhaven_policies::keep::Schedule;
use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::{GuestId, Volume, VolumeIndex, VolumeKind};
use serde::{Deserialize, Serialize};

pub use self::envelope::{Envelope, MessageError, Unknown};
pub use self::lost::{LOST_BATCHES, LOST_RUNS, LostContent};
pub use self::run::{HeldGuest, RunMessage, ToHold};
pub use self::sound::{MOST_DEVICE_STATE, sound_volume};
pub use self::turn::{CopyState, TurnMessage};

use crate::activate::fence::Term;
use crate::guest::Definition;
use crate::guest::qemu::peer::PeerFacts;
use crate::replicate::seed::{SeedId, SeedKey};
use crate::site::groups::PointGroup;
use crate::site::kept::PointChoice;
use crate::site::view::PointView;

pub use self::group::{GroupMessage, Handed, Taken};

mod envelope;
mod group;
mod lost;
mod run;
mod sound;
mod turn;

/// Longest message taken, under the session's own bound of 1 MiB.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Batches whose digests fit one [`Message::DigestPage`]: 512 × 64 × 16 bytes are 512 KiB.
pub const DIGEST_PAGE_BATCHES: usize = 512;

/// Units whose digests fit one [`Message::BaselinePage`].
pub const BASELINE_PAGE_UNITS: u64 = 32 * 1024;

/// Batches that one [`Message::Retire`] names, at most 9 bytes each.
pub const RETIRE_BATCHES: usize = 64 * 1024;

/// Points that one [`Message::PointList`] tells, about 250 bytes each.
pub const MOST_POINTS: usize = 3000;

/// Far more than any message nests; CBOR could nest a million.
pub(crate) const LEVELS: usize = 64;

/// What a source tells of the guest it wants to send.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opening {
    /// Who.
    pub guest: GuestId,
    /// Its name at the source.
    pub name: String,
    /// The site it runs at.
    pub source: String,
    /// How to launch it.
    pub definition: Definition,
    /// RAM, disks, device state.
    pub volumes: Vec<Volume>,
    /// The group's term at the source.
    pub term: Term,
    /// Keep the newest point's RAM ready to run.
    pub warm: bool,
    /// How long points are kept.
    pub retention: farhaven_policies::policy::Retention,
    /// How old the newest point is to be at most, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_ms: Option<u64>,
    /// The same as a schedule, which says it exactly; sites of before go by the above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// What holds after it was moved or taken over.
    #[serde(default)]
    pub commit: CommitTerms,
}

/// What holds of a guest that was moved or taken over, until that is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitTerms {
    /// How long it may be rolled back before somebody is reminded of it.
    pub window: Duration,
    /// Commit by itself when that is over.
    pub when_over: bool,
}

impl Default for CommitTerms {
    fn default() -> Self {
        Self::of(&farhaven_policies::policy::Policy::default())
    }
}

impl CommitTerms {
    /// By a policy.
    pub fn of(policy: &farhaven_policies::policy::Policy) -> Self {
        Self {
            window: policy.commit_window.duration(),
            when_over: policy.commit_when_over,
        }
    }
}

/// What the target holds of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opened {
    /// Newest sealed point, 0 for none.
    pub newest: u64,
    /// The cut time of that point, nanoseconds since 1970; 0 for none.
    pub newest_cut_at: u64,
    /// The smallest number that the next point may have.
    pub next_point: u64,
    /// The highest batch number in the log of this pair, 0 for none.
    pub last_seq: u64,
    /// The volumes of the newest point.
    pub volumes: Vec<Volume>,
}

/// A request to seal what was sent as a recovery point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SealRequest {
    /// Who.
    pub guest: GuestId,
    /// The point's number.
    pub point: u64,
    /// The point it builds on; 0 for none.
    pub parent: u64,
    /// When the guest was stopped, nanoseconds since 1970.
    pub cut_at: u64,
    /// RAM, disks, device state with its size.
    pub volumes: Vec<Volume>,
    /// How many batches belong to it.
    pub batches: u64,
    /// BLAKE3 over their sequence numbers and hashes, in order.
    pub chain: [u8; 32],
    /// What the source measured.
    pub context: PointContext,
    /// A planned move: run the guest from this point, under this term.
    pub activate: Option<Term>,
}

/// A seed that a source is about to write. What the target has written down of
/// it counts as used: its point, and every number of its range.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SeedAnnouncement {
    /// Of whom.
    pub guest: GuestId,
    /// The guest's name at the source.
    pub name: String,
    /// The seed's number.
    pub seed: SeedId,
    /// Its secret.
    pub key: SeedKey,
    /// The point that it will hold.
    pub point: u64,
    /// The first batch number that it may use.
    pub first: u64,
    /// The last.
    pub last: u64,
}

/// What goes into a point's manifest beside the data, so that a point can be
/// run from the store alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PointContext {
    /// The guest's name.
    pub name: String,
    /// The site it ran at.
    pub source: String,
    /// The term under which it was cut.
    pub term: u64,
    /// How to launch it.
    pub definition: Definition,
    /// How long the guest was stopped.
    pub pause: Duration,
    /// Of that: scanning RAM.
    pub ram_scan: Duration,
    /// Bytes of RAM looked at in that time.
    pub ram_scanned_bytes: u64,
    /// Bytes of guest data that changed since the point before.
    pub changed_bytes: u64,
    /// Bytes of the batches that carried them.
    pub sent_bytes: u64,
    /// Not a point that can be run: what was here of the guest when it turned round.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base: bool,
    /// The cut of its whole group that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<PointGroup>,
    /// Its filesystems were frozen at the cut by the guest's agent: whoever runs it
    /// thaws them. `false`: that was asked, and not done in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
}

impl PointContext {
    /// The context that a point holds.
    ///
    /// # Errors
    /// When it cannot be read, or tells of another guest than the point holds.
    pub fn of(replica: &Replica) -> Result<Self, String> {
        let context: Self =
            ciborium::de::from_reader_with_recursion_limit(replica.context(), LEVELS)
                // Its hash is right, so these are no damaged bytes.
                .map_err(|e: ciborium::de::Error<std::io::Error>| {
                    format!(
                        "{e}; a newer version sealed it: upgrade this site, or use another point"
                    )
                })?;
        if let Some(why) = context.definition.unsound() {
            return Err(why.to_owned());
        }
        if context.definition.is_embedded() {
            // Its RAM files are mapped into this very process, at these sizes.
            let of = |kind| {
                let volumes = replica.volumes().iter();
                let these = volumes.filter(move |v| v.kind == kind);
                these.map(|v| (v.name.as_str(), v.bytes)).collect()
            };
            let (ram, disks): (Vec<_>, Vec<_>) = (of(VolumeKind::Ram), of(VolumeKind::Disk));
            if ram != context.definition.ram() || disks != context.definition.disks() {
                return Err("its definition tells of other memory or disks than it holds".into());
            }
        }
        Ok(context)
    }
}

/// How a guest was brought to run, step by step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ActivationTimes {
    /// Making the term durable.
    pub term: Duration,
    /// Filling RAM from the store.
    pub ram: Duration,
    /// Bytes of RAM written for that.
    pub ram_bytes: u64,
    /// Building its machine until it answered (in parallel with filling RAM).
    pub launch: Duration,
    /// Loading the device state.
    pub restore: Duration,
    /// From the decision until the guest ran.
    pub total: Duration,
    /// The point holds disks alone: it boots, which takes its own time after that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub boots: bool,
}

/// One message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// First on every connection, both ways, and whenever a term was raised:
    /// every term this site knows. The higher one wins on both sides.
    Terms {
        /// All of them.
        terms: Vec<Term>,
    },
    /// Source: what would stop this guest from running at your place?
    Facts {
        /// How it would be launched.
        definition: Definition,
    },
    /// Target: this is what is here.
    FactsKnown {
        /// The peer's part of `guest check`.
        facts: PeerFacts,
    },
    /// Source: a guest is to be protected.
    Open(Box<Opening>),
    /// Target: what is here of it.
    Opened(Opened),
    /// Source, after a restart: the digests of batches from `from_seq` on. It
    /// learns the newest so, and asks for the rest when it needs it.
    Digests {
        /// Where to begin.
        from_seq: u64,
        /// The pair's digest key.
        key: [u8; 32],
    },
    /// Target: some of them; the last page has no `next`.
    DigestPage {
        /// Batch numbers and 16 bytes of digest per literal.
        batches: Vec<(u64, Bytes)>,
        /// Where to go on.
        next: Option<u64>,
    },
    /// Source: which of these do you hold? At most `ASKED` digests; none at all
    /// only tells the key, so that the target can keep hints under it.
    Find {
        /// The pair's digest key.
        key: [u8; 32],
        /// The first six bytes of each digest.
        prefixes: Bytes,
    },
    /// Target: these. What is asked for and not found is not here, or not now.
    Found {
        /// Batch number, a bit for each slot that is told, 16 bytes of digest for each.
        batches: Vec<(u64, u64, Bytes)>,
        /// Only digests whose sixth byte ends in so many zero bits are worth asking for.
        sampling: u8,
    },
    /// Target, whenever it changes and on every connection: stored images.
    Holds {
        /// Bytes of all of them.
        images: u64,
    },
    /// Source, after a restart: digests of a point's units from `unit` on.
    Baseline {
        /// Who.
        guest: GuestId,
        /// The point.
        point: u64,
        /// Which volume.
        volume: VolumeIndex,
        /// Where to begin.
        unit: u64,
        /// The pair's digest key.
        key: [u8; 32],
    },
    /// Target: stored runs (first unit, digests of 16 bytes each); all between them is zero.
    BaselinePage {
        /// The runs, ascending.
        runs: Vec<(u64, Bytes)>,
        /// Where to go on; `None` when the volume is done.
        next: Option<u64>,
    },
    /// Source: seal a point, and for a planned move run it.
    Seal(Box<SealRequest>),
    /// Target: every byte of it is durable.
    Sealed {
        /// The point.
        point: u64,
    },
    /// Target, to a seal: a batch refers to this one, which is not here. The
    /// source must forget it and begin the point anew.
    Dangling {
        /// Its number.
        missing: u64,
    },
    /// Target, to a seal with `activate`: the guest runs here now.
    Running {
        /// What it took.
        times: ActivationTimes,
        /// The term it runs under.
        term: Term,
    },
    /// Source: get ready to take this guest over (build its machine, fill its RAM).
    Prepare {
        /// Who.
        guest: GuestId,
    },
    /// Target: ready.
    Prepared,
    /// Source: give up the move of this guest. Answered with `GivenUp`, or
    /// with `Running` when it runs already.
    GiveUp {
        /// Who.
        guest: GuestId,
    },
    /// Target: it does not run here, and will not under the term of that move.
    GivenUp,
    /// Of a guest that a run at the target has.
    Run(RunMessage),
    /// Source: protection ends; forget the guest's points when `discard`.
    Close {
        /// Who.
        guest: GuestId,
        /// Drop its points too.
        discard: bool,
    },
    /// Source: which points of this guest are there?
    Points {
        /// Who.
        guest: GuestId,
    },
    /// Target: these, oldest first; the newest [`MOST_POINTS`].
    PointList {
        /// The points.
        points: Vec<PointView>,
    },
    /// Target: these batches are no longer kept for deduplication; refer to none of them.
    Retire {
        /// Their numbers; at most [`RETIRE_BATCHES`] a message.
        seqs: Vec<u64>,
    },
    /// Target: this content of your guest is damaged here; send it anew. Answered
    /// with `Done` when the next point will hold it.
    Lost(Box<LostContent>),
    /// Source: a first copy of this guest is to go by another way. What is here of it?
    SeedAsk {
        /// Who.
        guest: GuestId,
    },
    /// Target: this, what was announced of seeds included.
    SeedMay {
        /// Newest sealed point, 0 for none.
        newest: u64,
        /// The smallest number that the seed's point may have.
        next_point: u64,
        /// The highest batch number that is used, 0 for none.
        last_seq: u64,
    },
    /// Source: this seed is about to be written. Answered with `Done` when its
    /// key and numbers are durable.
    SeedAnnounce(Box<SeedAnnouncement>),
    /// Source: of protection groups, and of what their guests are owed.
    /// Answered with `Done` when it is durable.
    Group(Box<GroupMessage>),
    /// Target: something here hinders replication (a full store); for the source's status.
    Trouble {
        /// One sentence; empty when it is over.
        what: String,
    },
    /// Of a guest that runs at the other site than before.
    Turn(Box<TurnMessage>),
    /// Source: this point of its guest, the newest if none is named, has this
    /// name from now on: no prune drops it.
    KeepPoint {
        /// Who.
        guest: GuestId,
        /// Which point.
        point: Option<PointChoice>,
        /// Its name.
        name: String,
    },
    /// Source: this point of its guest has no name any more.
    ReleasePoint {
        /// Who.
        guest: GuestId,
        /// Which point.
        point: PointChoice,
    },
    /// Target: it is this point, and that is durable.
    KeptPoint {
        /// Its number.
        point: u64,
    },
    /// What time is it at your place?
    Clock,
    /// So late.
    ClockTold {
        /// Nanoseconds since 1970.
        at: u64,
    },
    /// Done, nothing to add.
    Done,
    /// The request is refused.
    Refused {
        /// For programs.
        code: Refusal,
        /// For people: what to do next.
        why: String,
    },
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The message is not known here: the sites run different versions.
    Unknown,
    /// A newer term is known here.
    Fenced,
    /// The data does not fit what is here; open the guest again.
    OutOfStep,
    /// The store or the machine cannot do it now.
    Unable,
}
