//! Guests whose monitor lives in this process: what any Rust VMM gives to be
//! protected, and the engine that makes a [`Guest`](super::Guest) of it.
//!
//! A monitor implements [`Vmm`]: it stops and goes on, tells exactly which
//! pages its guest wrote, reads its RAM, and saves what is not RAM or disk as
//! opaque bytes. Its disks are [`TrackedDisk`](disk::TrackedDisk)s, which know
//! what was written and can be read as they were at a cut while the guest
//! writes on. Changes come from the monitor's own tracking, never from a scan.
//! At the peer a [`Builder`](crate::activate::machine::Builder) makes the same
//! machine from a recovery point.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

pub mod bitmap;
pub mod console;
pub mod disk;
pub mod engine;
pub mod vmm;

pub use bitmap::Bitmap;
pub use engine::EmbeddedGuest;
pub use vmm::{RamBlock, Vmm, VmmError};

/// A monitor's guest, shared by its own threads, the engine and the daemon.
/// Held only for one call: the guest's threads never wait for it.
pub type SharedVmm = Arc<Mutex<dyn Vmm>>;

/// How to build a guest whose monitor lives in the process, wherever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Which builder makes it, as `kvm`, `sim`, or a name of the VMM's own.
    pub kind: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Blocks of guest memory: name and bytes.
    pub ram: Vec<(String, u64)>,
    /// Disks: name and bytes.
    pub disks: Vec<(String, u64)>,
    /// What the builder needs beside that, in the builder's own words, at most
    /// [`MOST_CONFIG`] bytes: the machine's layout, what its state asks of the
    /// host's KVM. Bytes of a peer: checked by the builder before use.
    #[serde(with = "serde_bytes")]
    pub config: Vec<u8>,
}

/// Longest [`Definition::config`].
pub const MOST_CONFIG: usize = 256 << 10;
