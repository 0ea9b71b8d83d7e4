//! A recovery point's machine, whatever the hypervisor: built over RAM files
//! and the point's disks, restored, run, and taken apart again.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farhaven_storage_sync::replica::Replica;
use farhaven_storage_sync::unit::{GuestId, VolumeIndex};

use super::hydrate::{Hydration, HydrationState};
use super::launch::Launched;
use super::machine::{BuildPlan, Builder, Builders, Machine, MachineError};
use super::nbd::NbdServer;
use super::point::{boots, device_state, disks, sources};
use super::qemu::QemuMachine;
use super::warm::{Warm, ram_file};
use crate::guest::Definition;
use crate::guest::embedded::{self, SharedVmm};
use crate::guest::qemu::peer::bytes_free;
use crate::site::ActivateError;
use crate::site::exists;
use crate::site::files::{private_directory, sync_directory};

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
    /// MAC addresses that it has here if it boots, by the same names.
    pub macs: &'a BTreeMap<String, String>,
    /// QEMU's binary.
    pub qemu: &'a Path,
    /// Who builds embedded guests here.
    pub builders: &'a Builders,
    /// An embedded guest is to reach nobody: [`BuildPlan::isolated`].
    pub isolated: bool,
}

/// A machine with a point's parts: waiting for its device state, or running.
pub struct Ready {
    machine: Mutex<Option<Box<dyn Machine>>>,
    /// Volume and size, in the definition's order.
    disks: Vec<(VolumeIndex, u64)>,
    definition: Definition,
    /// RAM files that this process maps, and their sizes.
    ram: Vec<(PathBuf, u64)>,
    run: PathBuf,
    qmp: Option<PathBuf>,
    /// The channel to its agent, where it has one.
    agent: Option<PathBuf>,
    pid: Option<u32>,
}

impl Ready {
    /// Builds the machine of a point. The RAM files must exist; what is in
    /// them counts only from [`Ready::restore_and_run`] on.
    ///
    /// # Errors
    /// When anything fails; nothing is left behind then.
    pub fn launch(
        ground: &Ground<'_>,
        replica: &Arc<Replica>,
        definition: &Definition,
    ) -> Result<Self, ActivateError> {
        // Left by a daemon that ended before it ran anything.
        Launched::end_left(&ground.run.join("qmp.sock"), &ground.run);
        set_aside(&ground.run).map_err(file(&ground.run))?;
        private_directory(&ground.run).map_err(file(&ground.run))?;
        let built = build(ground, replica, definition);
        // Its disks' names, before it writes to them.
        let built = built.and_then(|built| match sync_directory(&ground.run) {
            Ok(()) => Ok(built),
            Err(error) => {
                built.end();
                Err(file(&ground.run)(error))
            }
        });
        if built.is_err() {
            let _ = std::fs::remove_dir_all(&ground.run);
        }
        built
    }

    /// Finds a machine again that was launched before a restart of this
    /// daemon; `None` when it has ended, as every embedded guest has.
    ///
    /// # Errors
    /// When it is there and does not answer.
    pub fn adopt(
        ground: &Ground<'_>,
        replica: &Arc<Replica>,
        definition: &Definition,
        hydrated: bool,
    ) -> Result<Option<Self>, ActivateError> {
        let Definition::Qemu(qemu) = definition else {
            return Ok(None);
        };
        let disks = disks(replica, &definition.disks())?;
        let served = (!hydrated).then(|| sources(replica, &disks));
        let found = QemuMachine::adopt(ground, qemu, served.as_deref())?;
        Ok(found.map(|machine| Self::of_qemu(machine, disks, ground, definition)))
    }

    fn of_qemu(
        machine: QemuMachine,
        disks: Vec<(VolumeIndex, u64)>,
        ground: &Ground<'_>,
        definition: &Definition,
    ) -> Self {
        Self {
            qmp: Some(machine.qmp.clone()),
            agent: match definition {
                Definition::Qemu(definition) => definition.agent(&ground.run),
                Definition::Embedded(_) => None,
            },
            pid: Some(machine.pid()),
            machine: Mutex::new(Some(Box::new(machine))),
            disks,
            definition: definition.clone(),
            ram: Vec::new(),
            run: ground.run.clone(),
        }
    }

    /// Is the guest running?
    ///
    /// # Errors
    /// When its machine does not answer.
    pub fn runs(&self) -> Result<bool, ActivateError> {
        self.with(|machine| machine.is_running())
    }

    /// Was it built by this definition?
    pub fn is_of(&self, definition: &Definition) -> bool {
        self.definition == *definition
    }

    /// Directory of its overlays, consoles and logs.
    pub fn run_directory(&self) -> &Path {
        &self.run
    }

    /// QEMU's control socket, where it is a QEMU.
    pub fn qmp(&self) -> Option<PathBuf> {
        self.qmp.clone()
    }

    /// The channel to its guest agent, where it has one.
    pub fn agent(&self) -> Option<PathBuf> {
        self.agent.clone()
    }

    /// Its own process; `None` for a guest inside of this one.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The guest, where its monitor lives in this process.
    pub fn vmm(&self) -> Option<SharedVmm> {
        self.lock().as_ref().and_then(|machine| machine.vmm())
    }

    /// Swaps the disks to another point, before the guest runs.
    ///
    /// # Errors
    /// When a disk has another size there.
    pub fn serve(&self, replica: &Arc<Replica>) -> Result<(), ActivateError> {
        let disks = sources(replica, &self.disks);
        self.with(|machine| machine.serve(disks))
    }

    /// Loads the point's device state and lets the guest go; from a point that holds
    /// disks alone, it boots.
    ///
    /// # Errors
    /// When the machine refuses; the guest does not run then.
    pub fn restore_and_run(&self, replica: &Replica) -> Result<(), ActivateError> {
        // Filling them may have made holes of what was reserved for them.
        reserve_all(&self.ram)?;
        if boots(replica.volumes()) {
            return self.with(|machine| {
                machine.boot()?;
                machine.run()
            });
        }
        let state = device_state(replica)?;
        self.with(|machine| {
            machine.restore(&state)?;
            machine.run()
        })
    }

    /// Tells the networks where the guest is now.
    pub fn announce(&self) {
        if let Err(error) = self.with(|machine| machine.announce()) {
            tracing::warn!(%error, "the guest could not announce itself on its networks");
        }
    }

    /// Copies the disks out of the store, `rate` bytes a second at most (0:
    /// as fast as it goes), until that is done.
    ///
    /// # Errors
    /// When a copy fails; the guest goes on reading through the store.
    pub fn hydrate(&self, rate: u64, tell: impl Fn(u64, u64)) -> Result<(), ActivateError> {
        self.with(|machine| machine.hydrate(rate))?;
        loop {
            let disks: Vec<Hydration> = self.with(|machine| machine.hydration())?;
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
                    "the machine does not know of the copying of every disk".to_owned(),
                ));
            }
            if disks.iter().all(|d| d.state == HydrationState::Done) {
                return Ok(());
            }
            crate::work::sleep(WATCH);
        }
    }

    /// Draws what the guest's screen shows into a new PNG file.
    ///
    /// # Errors
    /// When it has no screen, or its machine does not answer.
    pub fn draw(&self, file: &Path) -> Result<(), ActivateError> {
        self.with(|machine| machine.draw(file))
    }

    /// Stops the guest; its machine and disks stay, as evidence.
    ///
    /// # Errors
    /// When the machine does not answer.
    pub fn stop(&self) -> Result<(), ActivateError> {
        self.with(|machine| machine.stop())
    }

    /// Lets a guest that was stopped go on.
    ///
    /// # Errors
    /// When the machine does not answer; it is stopped then.
    pub fn go_on(&self) -> Result<(), ActivateError> {
        self.with(|machine| machine.run())
    }

    /// Lets go of a machine that goes on without this: its control is for another.
    pub fn release(&self) {
        let machine = self.lock().take();
        if let Some(machine) = machine {
            machine.release();
        }
    }

    /// Ends the machine; what it wrote stays where it is.
    pub fn end(&self) {
        let machine = self.lock().take();
        if let Some(machine) = machine {
            machine.kill();
        }
    }

    /// Was its machine ended, or let go of?
    pub fn is_ended(&self) -> bool {
        self.lock().is_none()
    }

    /// Ends a machine that never ran, and removes what was made for it.
    pub fn discard(self) {
        self.end();
        if let Err(error) = std::fs::remove_dir_all(&self.run) {
            tracing::warn!(%error, directory = %self.run.display(), "stays behind");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn Machine>>> {
        crate::work::lock(&self.machine)
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&mut dyn Machine) -> Result<T, MachineError>,
    ) -> Result<T, ActivateError> {
        match self.lock().as_mut() {
            Some(machine) => Ok(work(machine.as_mut())?),
            None => Err(ActivateError::Step("its machine was ended".to_owned())),
        }
    }
}

/// Makes a path free for a new directory. What ran from the one that is there
/// wrote its disks into it, and nobody else may have that data: it is kept.
fn set_aside(run: &Path) -> io::Result<()> {
    match std::fs::remove_dir(run) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => return Ok(()),
    }
    let aside = |n: u32| {
        let mut name = run.as_os_str().to_owned();
        name.push(format!(".before{n}"));
        PathBuf::from(name)
    };
    let free = (1..=u32::MAX).map(aside).find(|path| !exists(path));
    let free = free.ok_or_else(|| io::Error::other("too many directories were set aside"))?;
    tracing::warn!(directory = %run.display(), aside = %free.display(), "what an earlier machine left is kept");
    std::fs::rename(run, free)
}

/// Nobody at this site builds guests of that kind.
#[derive(Debug, thiserror::Error)]
#[error("{what}; {mend}")]
pub struct NoBuilder {
    /// Which kind, and which are built.
    pub what: String,
    /// What to do.
    pub mend: String,
}

impl From<NoBuilder> for MachineError {
    fn from(error: NoBuilder) -> Self {
        Self::Other(error.to_string())
    }
}

/// Who builds guests of this kind here.
///
/// # Errors
/// When nobody does.
pub fn builder<'a>(builders: &'a Builders, kind: &str) -> Result<&'a Arc<dyn Builder>, NoBuilder> {
    builders.get(kind).ok_or_else(|| {
        let known = builders.keys().map(String::as_str);
        let known: Vec<_> = std::iter::once("qemu").chain(known).collect();
        NoBuilder {
            what: format!(
                "no guest of kind '{}' can be built there, only: {}",
                kind.escape_default(),
                known.join(", ")
            ),
            mend: "run the same program at both sites: a monitor's author gives its builder to Site::start_with".to_owned(),
        }
    })
}

fn build(
    ground: &Ground<'_>,
    replica: &Arc<Replica>,
    definition: &Definition,
) -> Result<Ready, ActivateError> {
    let disks = disks(replica, &definition.disks())?;
    let served = sources(replica, &disks);
    match definition {
        Definition::Qemu(qemu) => {
            let boots = boots(replica.volumes());
            if boots {
                Warm::make_empty(&ground.ram, definition).map_err(file(&ground.ram))?;
            }
            let machine = QemuMachine::launch(ground, qemu, &served, boots)?;
            Ok(Ready::of_qemu(machine, disks, ground, definition))
        }
        Definition::Embedded(embedded) => {
            let builder = builder(ground.builders, &embedded.kind).map_err(MachineError::from)?;
            let ram = ram_files(ground, embedded)?;
            let machine = builder.build(BuildPlan {
                definition: embedded,
                run: ground.run.clone(),
                ram: ram.iter().map(|(path, _)| path.clone()).collect(),
                disks: served,
                isolated: ground.isolated,
            })?;
            Ok(Ready {
                machine: Mutex::new(Some(machine)),
                disks,
                definition: definition.clone(),
                ram,
                run: ground.run.clone(),
                qmp: None,
                agent: None,
                pid: None,
            })
        }
    }
}

/// The RAM files of a guest that will run in this process. A page that the
/// file's filesystem has no room for ends whoever touches it: rather say so now.
fn ram_files(
    ground: &Ground<'_>,
    definition: &embedded::Definition,
) -> Result<Vec<(PathBuf, u64)>, ActivateError> {
    let (mut files, mut missing) = (Vec::new(), 0u64);
    for (name, bytes) in &definition.ram {
        let path = ram_file(&ground.ram, name);
        let held = std::fs::metadata(&path).map_err(file(&path))?.blocks() * 512;
        missing = missing.saturating_add(bytes.saturating_sub(held));
        files.push((path, *bytes));
    }
    let free = bytes_free(&ground.ram);
    if free < missing {
        return Err(ActivateError::Step(format!(
            "{} has {free} bytes free, and the guest's memory takes {missing} more; free memory there, or set another activate.ram_dir",
            ground.ram.display()
        )));
    }
    // It was asked and not taken so far, and whoever else asks is told the same.
    reserve_all(&files)?;
    Ok(files)
}

fn reserve_all(files: &[(PathBuf, u64)]) -> Result<(), ActivateError> {
    for (path, bytes) in files {
        let opened = std::fs::File::options().write(true).open(path);
        let reserved = opened.and_then(|ram| embedded::reserve(&ram, *bytes));
        reserved.map_err(file(path))?;
    }
    Ok(())
}

fn file(path: &Path) -> impl Fn(io::Error) -> ActivateError {
    move |source| ActivateError::Io {
        what: format!("making {}", path.display()),
        source,
    }
}
