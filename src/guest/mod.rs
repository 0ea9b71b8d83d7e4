//! Guests: what an engine needs from any hypervisor.
//!
//! Data goes one way: a [`Guest`] hands changed units to a [`Sink`], first in
//! rounds while it runs, then in a [`Cut`] that fixes one instant of memory,
//! device state and disks. Everything here blocks and is driven from one
//! capture thread per guest; nothing here knows the network.
//!
//! Whatever a guest has handed over it remembers as being at the peer. What
//! did not get there is returned with [`Guest::give_back`] and will be handed
//! over again.

use std::time::{Duration, Instant, SystemTime};

use farhaven_storage_sync::unit::{Digest, Volume, VolumeIndex};

pub mod definition;
pub mod embedded;
pub mod gate;
pub mod hot;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod qemu;
pub mod sim;

pub use definition::Definition;

/// Receives changed units. Volumes are indices into [`Guest::volumes`].
pub trait Sink {
    /// `bytes` is a whole number of 4 KiB units, stable (a private copy), the
    /// first at index `unit`; `digests` has one digest of each under the
    /// session's key. Units may be all zero.
    ///
    /// # Errors
    /// When the change cannot be taken (capture buffer full, session ended);
    /// the guest must then treat these units as not handed over.
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError>;

    /// `count` units from `unit` on read as zeros.
    ///
    /// # Errors
    /// As for [`Sink::units`].
    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError>;

    /// Called now and then in a long pass: `done` of `total` bytes looked at.
    fn progress(&mut self, done: u64, total: u64) {
        let _ = (done, total);
    }
}

/// Why a sink took no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// The bounded capture buffer is full. The cut is given up, the guest goes on.
    #[error("the capture buffer is full")]
    Full,
    /// The link took no data for too long. The cut is given up.
    #[error("the link takes no data; the RPO stretches until it does")]
    Stalled,
    /// Nobody wants the data any more (link closed, protection ended).
    #[error("the session that takes the data has ended")]
    Closed,
}

/// How a cut ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The guest goes on at once: continuous protection.
    Continue,
    /// The guest stays stopped: a planned move. Ended by
    /// [`Guest::resume`] or [`Guest::let_go`].
    Hold,
}

/// What a cut measured.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub struct CutTimes {
    /// From the stop until the guest went on, or until everything was fixed for a held cut.
    pub pause: Duration,
    /// Of that: taking the device state.
    pub device_state: Duration,
    /// Of that: fixing the disks.
    pub disks: Duration,
    /// Of that: looking for changed RAM and copying it.
    pub ram_scan: Duration,
    /// Bytes of RAM looked at in that time (holes of the RAM file not counted).
    pub ram_scanned_bytes: u64,
}

/// Whether a guest's filesystems were frozen at a cut.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Quiesced {
    /// Nobody asked for it.
    #[default]
    NotAsked,
    /// Its agent had flushed and frozen so many: the point is application-consistent.
    Frozen {
        /// How many.
        filesystems: u64,
    },
    /// It was asked for and not done in time, for this reason: the point is
    /// crash-consistent, as any other.
    Failed(String),
}

impl Quiesced {
    /// As points tell it: `None` where nobody asked.
    pub fn told(&self) -> Option<bool> {
        match self {
            Self::NotAsked => None,
            Self::Frozen { .. } => Some(true),
            Self::Failed(_) => Some(false),
        }
    }
}

/// One instant of a guest. Changed RAM went to the sink while the guest was
/// stopped; device state is here; disks are read from [`Cut::disks`] while the
/// guest already runs.
pub struct Cut {
    /// When the guest was stopped.
    pub at: SystemTime,
    /// The same, on the clock that nobody sets: others of its group were waited for
    /// before that.
    pub stopped: Instant,
    /// What it cost.
    pub times: CutTimes,
    /// Opaque device state.
    pub device_state: Vec<u8>,
    /// A readable instant of each disk volume. Every one must be ended by
    /// [`Guest::finish_cut`].
    pub disks: Vec<Box<dyn DiskInstant>>,
    /// Whether its filesystems were frozen.
    pub quiesced: Quiesced,
}

/// A disk as it was at the cut, with what changed since the cut before.
pub trait DiskInstant: Send {
    /// Index into [`Guest::volumes`].
    fn volume(&self) -> VolumeIndex;
    /// Hands over everything that changed since the last sealed cut.
    ///
    /// # Errors
    /// When the instant cannot be read any more, or the sink refuses.
    fn changed(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError>;
}

/// A running virtual machine under protection.
pub trait Guest: Send {
    /// RAM blocks, then disks, then one [`VolumeKind::DeviceState`] volume,
    /// whose size is that of the last cut (0 before the first). Order and
    /// names stay as long as the guest is attached.
    ///
    /// [`VolumeKind::DeviceState`]: farhaven_storage_sync::unit::VolumeKind::DeviceState
    fn volumes(&self) -> &[Volume];

    /// Tells what the peer holds already: the digest of each unit of a volume
    /// at its newest sealed point (`Digest::ZERO_UNIT` for zeros, `Digest::UNKNOWN` where it is not known), and
    /// that point's number so that change tracking left from before a restart
    /// can be used. Called once per volume before the first round; not called
    /// for a new replica, whose every unit reads as zero.
    ///
    /// # Errors
    /// When the table has another size than the volume.
    fn baseline(
        &mut self,
        point: u64,
        volume: VolumeIndex,
        digests: Vec<Digest>,
    ) -> Result<(), GuestError>;

    /// One pass while the guest runs: everything (first time) or what changed
    /// (later). May over-report, may be torn; a later cut makes it exact. What
    /// changes all the time ([`hot`]) may be left to that cut.
    ///
    /// # Errors
    /// When the guest cannot be read, or the sink refuses. What was handed
    /// over stays handed over.
    fn round(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError>;

    /// Do rounds leave to the cut what changes all the time ([`hot`])? As at
    /// first they do; before the last cut of a move nothing is worth waiting.
    fn leave_to_the_cut(&mut self, leave: bool);

    /// Does a round read what changed on disks? If not, a cut alone does.
    fn rounds_read_disks(&self) -> bool;

    /// Units that changed, and that the last round left to the cut.
    fn waiting(&self) -> u64 {
        0
    }

    /// Fixes one instant as recovery point number `point`. On any error the
    /// guest is running again, or the error says that it is not; and nothing of
    /// this cut counts as handed over, so the sink's content may be dropped.
    ///
    /// # Errors
    /// See [`GuestError`].
    fn cut(&mut self, point: u64, after: After, sink: &mut dyn Sink) -> Result<Cut, GuestError> {
        self.cut_at(point, after, &gate::Alone, sink)
    }

    /// As [`Guest::cut`], at one instant with the others of the gate: it is
    /// passed right before the stop, right after it, and before the guest goes on.
    ///
    /// # Errors
    /// As of [`Guest::cut`], and when the gate gives the cut up.
    fn cut_at(
        &mut self,
        point: u64,
        after: After,
        gate: &dyn gate::CutGate,
        sink: &mut dyn Sink,
    ) -> Result<Cut, GuestError>;

    /// Has the guest's agent freeze its filesystems for each of the next cuts, if
    /// it does so within this time: a guest never waits longer for that. They are
    /// thawed as soon as it runs on; of a held one, once it is resumed. `None`: as
    /// they are. The cut tells what came of it ([`Cut::quiesced`]); a guest without
    /// any agent says nothing there.
    fn quiesce_cuts(&mut self, within: Option<Duration>) {
        let _ = within;
    }

    /// Has the guest shut itself down, by its agent or its power button, as its
    /// operator would; false when it had not within this time: it is stopped as it is
    /// then if `hard`, else it runs on. `wanted` is asked now and then: once it says no,
    /// nothing is waited for any more, and the answer is false of a guest that runs on.
    /// One that is shut down stands still, its disks whole; [`Guest::resume`] boots it
    /// again.
    ///
    /// # Errors
    /// When it cannot be asked, or its hypervisor does not answer.
    fn shut_down(
        &mut self,
        within: Duration,
        hard: bool,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, GuestError> {
        let _ = (within, hard, wanted);
        Err(GuestError::State(
            "a guest inside of the daemon is not shut down from outside".to_owned(),
        ))
    }

    /// Does the guest's agent answer within this time?
    ///
    /// # Errors
    /// When it does not, or the guest can have none; a sentence for people.
    fn ask_agent(&mut self, within: Duration) -> Result<(), String> {
        let _ = within;
        Err("a guest inside of the daemon has no guest agent".to_owned())
    }

    /// Ends the disk instants of a cut. `shipped` says whether every changed
    /// unit of the disks reached the sink; if not, they count as changed in
    /// the next cut.
    ///
    /// # Errors
    /// When change tracking was lost: the next round must read everything.
    fn finish_cut(&mut self, cut: Cut, shipped: bool) -> Result<(), GuestError>;

    /// The peer has sealed this point: nothing of it, or of earlier ones, is
    /// ever given back.
    fn sealed(&mut self, point: u64);

    /// Everything handed over since the newest sealed point counts as changed again.
    fn give_back(&mut self);

    /// What the peer had of these units is damaged there: they count as changed,
    /// until a point that they went with is sealed. Those past the volume's end
    /// are left out, and so is the device state.
    fn lost_at_peer(&mut self, volume: VolumeIndex, unit: u64, count: u64);

    /// Lets a held guest run on here.
    ///
    /// # Errors
    /// When the guest could not be resumed; the message says how to do it by hand.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Stops the guest and keeps it stopped (fence): evidence, not discarded.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    fn stop(&mut self) -> Result<(), GuestError>;

    /// After a move: the guest runs at the peer, this copy is ended.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    fn let_go(&mut self) -> Result<(), GuestError>;

    /// Holds the guest back, so that a move converges: it runs `100 - percent`
    /// of the time until told otherwise. 0 lets it run freely, 99 is the most.
    /// A guest that is detached or dropped runs freely.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;

    /// Is the guest running (`Some(true)`), stopped (`Some(false)`), or gone (`None`)?
    fn running(&mut self) -> Option<bool>;

    /// Removes what protection put into the hypervisor; the guest runs on.
    fn detach(&mut self);
}

/// What can go wrong with a guest. Every message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The sink refused.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// Another guest that was to be cut at the same instant.
    #[error(transparent)]
    Gate(#[from] gate::GateError),
    /// The hypervisor's control socket.
    #[error(transparent)]
    Qmp(#[from] qemu::qmp::QmpError),
    /// A monitor in this process.
    #[error(transparent)]
    Vmm(#[from] embedded::VmmError),
    /// Reading disks through the hypervisor.
    #[error(transparent)]
    Nbd(#[from] qemu::nbd_client::NbdError),
    /// Reading the guest's memory or disks.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, to which file.
        what: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The guest is not in a state that allows this.
    #[error("{0}")]
    State(String),
    /// The hypervisor is gone.
    #[error("the guest's hypervisor ended: {0}")]
    Gone(String),
    /// The guest is stopped and could not be resumed.
    #[error("the guest is STOPPED and could not be resumed ({why}); resume it by hand: {how}")]
    LeftStopped {
        /// Why resuming failed.
        why: String,
        /// A command line.
        how: String,
    },
}
