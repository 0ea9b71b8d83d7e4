//! What an attach is told: which QEMU, what of it, and within which limits.

use std::path::PathBuf;
use std::time::Duration;

/// What an attach needs to know.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// The guest's name, for messages.
    pub name: String,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// RAM blocks: id of the memory backend, path of its shared file. Order is volume order.
    pub ram: Vec<(String, PathBuf)>,
    /// Disks: volume name, block node name (the node that the device uses).
    pub disks: Vec<(String, String)>,
    /// A private directory (0700) on a local filesystem that QEMU can reach too: sockets, and
    /// the images that take overwritten disk content during a cut.
    pub work_dir: PathBuf,
    /// Which copy of this guest the dirty bitmaps belong to (letters, digits and `-`, at most
    /// 64): same guest, same peer, same replica there. Another replica never takes them up.
    pub replica: String,
    /// The session's digest key.
    pub key: [u8; 32],
    /// Threads that scan RAM.
    pub scan_threads: usize,
    /// Longest wait for an answer of QEMU's.
    pub qmp_timeout: Duration,
    /// Longest wait for the device state, with the guest stopped.
    pub state_timeout: Duration,
    /// Most bytes of device state.
    pub state_limit: usize,
    /// Bytes that must stay free in `work_dir` during a cut.
    pub reserve: u64,
}

impl AttachOptions {
    /// Options with the usual limits: 2 scan threads, 30 s for an answer of QEMU's, 10 s and
    /// 256 MiB for device state, 128 MiB of reserve.
    pub fn new(name: &str, qmp: PathBuf, work_dir: PathBuf, replica: &str, key: [u8; 32]) -> Self {
        Self {
            name: name.to_owned(),
            qmp,
            ram: Vec::new(),
            disks: Vec::new(),
            work_dir,
            replica: replica.to_owned(),
            key,
            scan_threads: 2,
            qmp_timeout: Duration::from_secs(30),
            state_timeout: Duration::from_secs(10),
            state_limit: 256 << 20,
            reserve: 128 << 20,
        }
    }
}
