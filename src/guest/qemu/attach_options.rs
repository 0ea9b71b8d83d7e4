//! What an attach is told, and whether the QEMU found is the one meant.

use std::path::PathBuf;
use std::time::Duration;

use farhaven_storage_sync::unit::{Volume, VolumeIndex, VolumeKind};

use super::super::GuestError;
use super::super::hot::Hot;
use super::before::Before;
use super::disk::{Disk, View};
use super::qmp::Qmp;
use super::quiesce::Quiesce;
use super::scan::RamBlock;
use super::tracking::Bits;
use super::units::Hasher;
use super::{QemuGuest, agent, attach, tracking};

/// What an attach needs to know.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// The guest's name, for messages.
    pub name: String,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// RAM blocks: id of the memory backend, path of its shared file. Order is volume order.
    pub ram: Vec<(String, PathBuf)>,
    /// Its memory is not copied: no block of RAM is named, and its device state stays
    /// where it is.
    pub disk_only: bool,
    /// QEMU was started so that it stays when the guest shuts down.
    pub stays: bool,
    /// Disks: volume name, block node name (the node that the device uses).
    pub disks: Vec<(String, String)>,
    /// The character device behind the port of its guest agent, if it has one.
    pub agent: Option<String>,
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
    /// Bytes of changed RAM that a cut can take: what rounds leave to it is bounded by that.
    pub capture_buffer: u64,
    /// Bytes that must stay free in `work_dir` during a cut.
    pub reserve: u64,
}

impl AttachOptions {
    /// Options with the usual limits: 2 scan threads, 30 s for an answer of QEMU's, 10 s and
    /// 256 MiB for device state, 64 MiB for changed RAM, 128 MiB of reserve.
    pub fn new(name: &str, qmp: PathBuf, work_dir: PathBuf, replica: &str, key: [u8; 32]) -> Self {
        Self {
            name: name.to_owned(),
            qmp,
            ram: Vec::new(),
            disk_only: false,
            stays: false,
            disks: Vec::new(),
            agent: None,
            work_dir,
            replica: replica.to_owned(),
            key,
            scan_threads: 2,
            qmp_timeout: Duration::from_secs(30),
            state_timeout: Duration::from_secs(10),
            state_limit: 256 << 20,
            capture_buffer: 64 << 20,
            reserve: 128 << 20,
        }
    }
}

impl QemuGuest {
    /// Attaches to a running QEMU. A guest that a dead daemon of ours left
    /// stopped in a cut is resumed; one that is held for a move is not.
    ///
    /// # Errors
    /// When QEMU cannot be reached, or is not the guest that the options describe.
    pub fn attach(options: AttachOptions) -> Result<Self, GuestError> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if options.replica.is_empty()
            || options.replica.len() > 64
            || !options.replica.chars().all(fits)
        {
            return Err(GuestError::State(format!(
                "'{}' cannot name a replica: letters, digits and -, at most 64",
                options.replica
            )));
        }
        if options.ram.is_empty() != options.disk_only
            || options.ram.len() + options.disks.len() > 1024
        {
            return Err(GuestError::State(
                "a guest has at least one RAM block, unless its disks alone are copied, and at most 1024 volumes".to_owned(),
            ));
        }
        let work_dir = options.work_dir.clone();
        attach::make_private(&work_dir)?;
        let mut qmp = Qmp::connect(&options.qmp, options.qmp_timeout)?;
        attach::recover(&mut qmp, &work_dir)?;
        let mut volumes = Vec::new();
        let mut ram = Vec::new();
        for (id, path) in &options.ram {
            let block = RamBlock::open(path, volumes.len() as VolumeIndex)?;
            volumes.push(Volume {
                name: id.clone(),
                kind: VolumeKind::Ram,
                bytes: block.bytes(),
            });
            ram.push((id.clone(), block));
        }
        if !options.disk_only {
            attach::same_ram(&mut qmp, &ram)?;
        }
        let nodes = tracking::nodes(&mut qmp)?;
        let mut disks = Vec::new();
        for (name, node) in &options.disks {
            let found = nodes.iter().find(|n| n.name == *node).ok_or_else(|| {
                GuestError::State(format!(
                    "QEMU has no block node '{node}' for disk '{name}'; give the disk a node-name (query-named-block-nodes lists them) and run farhaven guest add again"
                ))
            })?;
            if found.bytes == 0 {
                return Err(GuestError::State(format!(
                    "disk '{name}' is empty; leave it out"
                )));
            }
            disks.push(Disk::new(
                volumes.len() as VolumeIndex,
                node,
                &options.replica,
                found.bytes,
            ));
            volumes.push(Volume {
                name: name.clone(),
                kind: VolumeKind::Disk,
                bytes: found.bytes,
            });
        }
        volumes.push(Volume {
            name: "device-state".to_owned(),
            kind: VolumeKind::DeviceState,
            bytes: 0,
        });
        let process = qmp
            .pid()
            .ok()
            .and_then(|pid| Some((pid, attach::started(pid)?)));
        let before = Before::of(process.as_ref(), &work_dir);
        let before = match options.disk_only {
            true => before,
            false => attach::prepare_migration(&mut qmp, before, &work_dir)?,
        };
        let socket = if disks.is_empty() {
            work_dir.join("nbd.sock")
        } else {
            attach::serve_nbd(&mut qmp, &work_dir)?
        };
        let channel = match &options.agent {
            Some(port) => agent::at_qemu(&mut qmp, port)?,
            None => None,
        };
        let mut quiesce = Quiesce::new(&options.name, &work_dir, channel, process.clone());
        if !work_dir.join(attach::HELD_MARK).exists() {
            // Of a daemon that died in a cut.
            quiesce.thaw();
        }
        let bits: Vec<Bits> = volumes
            .iter()
            .filter(|v| v.kind == VolumeKind::Ram)
            .map(|v| Bits::new(v.units() as usize))
            .collect();
        let view = View {
            socket,
            work_dir: work_dir.clone(),
            hasher: Hasher::new(options.key),
            reserve: options.reserve,
        };
        Ok(Self {
            hot: Hot::new(&volumes, options.capture_buffer),
            options,
            qmp,
            process,
            work_dir,
            before,
            volumes,
            ram,
            disks,
            view,
            recent: bits.clone(),
            cut_handed: bits,
            unsealed: Vec::new(),
            outstanding: None,
            throttle: None,
            quiesce,
            newest_sealed: None,
            given_back: false,
            must_sweep: false,
            detached: false,
        })
    }
}
