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

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod bitmap;
pub mod console;
pub mod disk;
pub mod engine;
pub mod vmm;

pub use bitmap::Bitmap;
pub use engine::EmbeddedGuest;
pub use vmm::{RamBlock, Vmm, VmmError, stop};

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

/// How long a guest that is to stop for good, because it runs elsewhere now, is
/// tried to be stopped. Shorter than whoever asks for it waits.
pub const STOP_WITHIN: Duration = Duration::from_secs(20);

/// Gives a file of guest memory all of its room, whatever is in it. A page that
/// its filesystem has no room for, or the host no memory, would end the process
/// that touches its mapping (SIGBUS), with every guest in it.
///
/// # Errors
/// When there is not so much; the message says what to do.
pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    if bytes == 0 || file.metadata()?.blocks().saturating_mul(512) >= bytes {
        return Ok(());
    }
    let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, 0, bytes) {
        // A filesystem that cannot reserve; a tmpfs can.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        Err(error) => {
            let error = io::Error::from(error);
            let why = format!(
                "{} MiB of guest memory cannot be reserved ({error}); free memory there, or keep it elsewhere (activate.ram_dir)",
                bytes >> 20
            );
            Err(io::Error::new(error.kind(), why))
        }
    }
}

/// Longest [`Definition::config`].
pub const MOST_CONFIG: usize = 256 << 10;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn memory_is_reserved_or_refused_and_never_half() {
        let directory = ["/dev/shm", "/tmp"].map(std::path::Path::new);
        let directory = directory.into_iter().find(|path| path.is_dir()).unwrap();
        let file = tempfile::tempfile_in(directory).unwrap();
        let bytes = 1 << 20;
        file.set_len(bytes).unwrap();
        reserve(&file, bytes).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 >= bytes);
        reserve(&file, bytes).unwrap();
        // More than any host has.
        let error = reserve(&file, 1 << 60).unwrap_err();
        assert!(error.to_string().contains("cannot be reserved"), "{error}");
        assert_eq!(file.metadata().unwrap().len(), bytes);
    }
}
