//! A recovery point's QEMU: RAM files, overlays on NBD exports of the point's
//! disks, and the process, put together and taken apart again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::{GuestId, UNIT, VolumeIndex, VolumeKind};

use super::failure::LaunchError;
use super::hydrate::{Hydration, HydrationState};
use super::launch::{LaunchPlan, Launched};
use super::nbd::{BlockSource, NbdServer};
use super::warm::ram_file;
use crate::guest::qemu::definition::Definition;
use crate::guest::qemu::instantiate::{Backing, DiskPlacement, Placement};
use crate::site::ActivateError;
use crate::site::files::private_directory;

/// How often the copying of disks is looked at.
const WATCH: Duration = Duration::from_millis(500);

/// Where on this host a guest is put, and by what.
pub struct Ground<'a> {
    /// The guest.
    pub guest: GuestId,
    /// Directory of this activation: overlays, sockets, logs. Not shared with another.
    pub run: PathBuf,
    /// Directory of its RAM files.
    pub ram: PathBuf,
    /// Exports of points.
    pub exports: &'a Arc<NbdServer>,
    /// Networks of this site by the guest's own name for them.
    pub networks: &'a BTreeMap<String, String>,
    /// QEMU's binary.
    pub qemu: &'a Path,
}

/// A disk of a point, as a block device.
struct PointDisk {
    replica: Arc<Replica>,
    volume: VolumeIndex,
    bytes: u64,
    /// What is not zero, ascending: (first unit, count).
    stored: Vec<(u64, u64)>,
}

impl PointDisk {
    fn new(replica: &Arc<Replica>, volume: VolumeIndex, bytes: u64) -> Self {
        let stored = replica.nonzero_runs(volume).collect();
        Self {
            replica: replica.clone(),
            volume,
            bytes,
            stored,
        }
    }
}

impl BlockSource for PointDisk {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let unit = UNIT as u64;
        let first = offset / unit;
        let count = (offset + buf.len() as u64).div_ceil(unit) - first;
        let failed =
            |e: farhaven_storage_sync::replica::ReplicaError| io::Error::other(e.to_string());
        if offset.is_multiple_of(unit) && buf.len().is_multiple_of(UNIT) {
            return self
                .replica
                .read(self.volume, first, count, buf)
                .map_err(failed);
        }
        let mut whole = vec![0; count as usize * UNIT];
        self.replica
            .read(self.volume, first, count, &mut whole)
            .map_err(failed)?;
        let skip = (offset - first * unit) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let unit = UNIT as u64;
        let end = offset + length;
        let mut found = Vec::new();
        let mut at = offset;
        let from = self
            .stored
            .partition_point(|(first, count)| (first + count) * unit <= offset);
        for (first, count) in &self.stored[from..] {
            let (start, stop) = ((first * unit).min(end), ((first + count) * unit).min(end));
            if start >= end {
                break;
            }
            if start > at {
                found.push((start - at, true));
                at = start;
            }
            found.push((stop - at, false));
            at = stop;
        }
        if at < end {
            found.push((end - at, true));
        }
        found
    }
}

/// A QEMU with a point's parts: waiting for its device state, or running.
pub struct Ready {
    launched: Mutex<Option<Launched>>,
    exports: Arc<NbdServer>,
    /// Export name, volume.
    disks: Vec<(String, VolumeIndex, u64)>,
    run: PathBuf,
    qmp: PathBuf,
    pid: u32,
}

impl Ready {
    /// Exports a point's disks and launches QEMU on them. The RAM files must
    /// exist; what is in them counts only from [`Ready::restore_and_run`] on.
    ///
    /// # Errors
    /// When anything fails; nothing is left behind then.
    pub fn launch(
        ground: &Ground<'_>,
        replica: &Arc<Replica>,
        definition: &Definition,
    ) -> Result<Self, ActivateError> {
        // Left by an attempt under the same term that came to nothing, or by a
        // daemon that ended before it ran anything.
        Launched::end_left(&ground.run.join("qmp.sock"), &ground.run);
        match std::fs::remove_dir_all(&ground.run) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file(&ground.run)(error));
            }
            _ => {}
        }
        private_directory(&ground.run).map_err(file(&ground.run))?;
        let (placement, disks) = place(ground, replica, definition, true)?;
        let plan = LaunchPlan {
            definition,
            placement: &placement,
            program: Some(ground.qemu),
        };
        match Launched::start(&plan) {
            Ok(launched) => Ok(Self {
                pid: launched.pid(),
                launched: Mutex::new(Some(launched)),
                exports: ground.exports.clone(),
                disks,
                run: ground.run.clone(),
                qmp: placement.qmp,
            }),
            Err(error) => {
                withdraw(ground.exports, &disks);
                let _ = std::fs::remove_dir_all(&ground.run);
                Err(error.into())
            }
        }
    }

    /// Finds a QEMU again that was launched before a restart of this daemon;
    /// `None` when it has ended.
    ///
    /// # Errors
    /// When it is there and does not answer.
    pub fn adopt(
        ground: &Ground<'_>,
        replica: &Arc<Replica>,
        definition: &Definition,
        hydrated: bool,
    ) -> Result<Option<Self>, ActivateError> {
        let (placement, disks) = place(ground, replica, definition, !hydrated)?;
        match Launched::adopt(definition, &placement) {
            Ok(Some(launched)) => Ok(Some(Self {
                pid: launched.pid(),
                launched: Mutex::new(Some(launched)),
                exports: ground.exports.clone(),
                disks,
                run: ground.run.clone(),
                qmp: placement.qmp,
            })),
            Ok(None) => {
                withdraw(ground.exports, &disks);
                Ok(None)
            }
            // Its disks are served on: it may run.
            Err(error) => Err(error.into()),
        }
    }

    /// Is the guest running?
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn runs(&self) -> Result<bool, ActivateError> {
        self.with(Launched::is_running)
    }

    /// QEMU's control socket.
    pub fn qmp(&self) -> PathBuf {
        self.qmp.clone()
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Swaps the disks to another point, before the guest runs.
    ///
    /// # Errors
    /// When a disk has another size there.
    pub fn serve(&self, replica: &Arc<Replica>) -> Result<(), ActivateError> {
        for (name, volume, bytes) in &self.disks {
            let disk = PointDisk::new(replica, *volume, *bytes);
            self.exports
                .replace(name, Arc::new(disk))
                .map_err(|e| ActivateError::Step(e.to_string()))?;
        }
        Ok(())
    }

    /// Loads the point's device state and lets the guest go.
    ///
    /// # Errors
    /// When QEMU refuses; the guest does not run then.
    pub fn restore_and_run(&self, replica: &Replica) -> Result<(), ActivateError> {
        let state = device_state(replica)?;
        self.with(|launched| {
            launched.restore(&state)?;
            launched.run()
        })
    }

    /// Tells the networks where the guest is now.
    pub fn announce(&self) {
        if let Err(error) = self.with(Launched::announce) {
            tracing::warn!(%error, "the guest could not announce itself on its networks");
        }
    }

    /// Copies the disks out of the store, `rate` bytes a second at most (0:
    /// as fast as it goes), until that is done.
    ///
    /// # Errors
    /// When a copy fails; the guest goes on reading through the store.
    pub fn hydrate(&self, rate: u64, tell: impl Fn(u64, u64)) -> Result<(), ActivateError> {
        self.with(|launched| launched.hydrate(rate))?;
        loop {
            let disks: Vec<Hydration> = self.with(Launched::hydration)?;
            let (done, total) = disks
                .iter()
                .fold((0, 0), |(done, total), d| (done + d.done, total + d.total));
            tell(done, total);
            let failed = disks.iter().find_map(|d| match &d.state {
                HydrationState::Failed(why) => Some(format!("disk {}: {why}", d.disk)),
                _ => None,
            });
            if let Some(why) = failed {
                return Err(ActivateError::Step(why));
            }
            if disks.len() < self.disks.len() {
                return Err(ActivateError::Step(
                    "QEMU does not know of the copying of every disk".to_owned(),
                ));
            }
            if disks.iter().all(|d| d.state == HydrationState::Done) {
                return Ok(());
            }
            std::thread::sleep(WATCH);
        }
    }

    /// The disks need the store no longer.
    pub fn stop_serving(&self) {
        withdraw(&self.exports, &self.disks);
    }

    /// Stops the guest; QEMU and its overlays stay, as evidence.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn stop(&self) -> Result<(), ActivateError> {
        self.with(Launched::stop)
    }

    /// Ends a QEMU that never ran, and removes what was made for it.
    pub fn discard(self) {
        if let Some(launched) = self
            .launched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            launched.kill();
        }
        withdraw(&self.exports, &self.disks);
        if let Err(error) = std::fs::remove_dir_all(&self.run) {
            tracing::warn!(%error, directory = %self.run.display(), "stays behind");
        }
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&mut Launched) -> Result<T, LaunchError>,
    ) -> Result<T, ActivateError> {
        let mut launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        match launched.as_mut() {
            Some(launched) => Ok(work(launched)?),
            None => Err(ActivateError::Step("its QEMU was ended".to_owned())),
        }
    }
}

fn file(path: &Path) -> impl Fn(io::Error) -> ActivateError {
    move |source| ActivateError::Io {
        what: format!("making {}", path.display()),
        source,
    }
}

fn withdraw(exports: &NbdServer, disks: &[(String, VolumeIndex, u64)]) {
    for (name, ..) in disks {
        // Withdrawn before when hydration ended.
        let _ = exports.remove(name);
    }
}

type Disks = Vec<(String, VolumeIndex, u64)>;

/// Exports the disks, and says where everything is.
fn place(
    ground: &Ground<'_>,
    replica: &Arc<Replica>,
    definition: &Definition,
    serve: bool,
) -> Result<(Placement, Disks), ActivateError> {
    let mut placement = Placement {
        run: ground.run.clone(),
        qmp: ground.run.join("qmp.sock"),
        nets: ground.networks.clone(),
        ..Placement::default()
    };
    for block in &definition.ram {
        placement
            .ram
            .insert(block.id.clone(), ram_file(&ground.ram, &block.id));
    }
    let mut disks: Disks = Vec::new();
    for (index, disk) in definition.disks.iter().enumerate() {
        let volume = replica
            .volumes()
            .iter()
            .position(|v| v.kind == VolumeKind::Disk && v.name == disk.name)
            .and_then(|at| VolumeIndex::try_from(at).ok());
        let Some(volume) = volume else {
            withdraw(ground.exports, &disks);
            let point = replica.header().point;
            return Err(ActivateError::Context(
                point,
                format!("it has no disk {}", disk.name),
            ));
        };
        // Of this activation: what an earlier one left reads on from its own.
        let term = ground.run.file_name().unwrap_or_default().to_string_lossy();
        let export = format!("{}-{term}-{index}", ground.guest);
        if serve {
            let source = PointDisk::new(replica, volume, disk.bytes);
            if let Err(error) = ground.exports.export(&export, Arc::new(source)) {
                withdraw(ground.exports, &disks);
                return Err(ActivateError::Step(error.to_string()));
            }
        }
        disks.push((export.clone(), volume, disk.bytes));
        let socket = ground.exports.path().to_owned();
        let backing = if serve {
            Backing::Nbd { socket, export }
        } else {
            Backing::Nothing
        };
        let overlay = ground.run.join(format!("disk{index}.qcow2"));
        placement
            .disks
            .insert(disk.name.clone(), DiskPlacement { overlay, backing });
    }
    Ok((placement, disks))
}

fn device_state(replica: &Replica) -> Result<Vec<u8>, ActivateError> {
    let found = (0..)
        .zip(replica.volumes())
        .find(|(_, volume)| volume.kind == VolumeKind::DeviceState);
    let Some((index, volume)) = found else {
        let point = replica.header().point;
        return Err(ActivateError::Context(
            point,
            "it holds no device state".to_owned(),
        ));
    };
    let mut state = vec![0; volume.units() as usize * UNIT];
    replica.read(index, 0, volume.units(), &mut state)?;
    state.truncate(volume.bytes as usize);
    Ok(state)
}
