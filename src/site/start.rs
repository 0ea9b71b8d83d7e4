//! `farhaven guest start`: a guest that proves itself, hosted by the daemon,
//! for trying links, policies and runbooks without a hypervisor.
//!
//! What is asked for is checked as a whole ([`StartGuest::plan`]) before
//! anything is made; what is made is taken away again when a later step fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farhaven_policies::units::ByteSize;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Site;
use super::files::private_directory;
use super::hosted::lock;
use super::operate::{OperateError, failed};
use super::records::GuestRecord;
use crate::guest::embedded::{Definition, SharedVmm};
use crate::guest::qemu::peer::{PeerFacts, host_facts};
use crate::guest::sim::{self, SimGuest, SimOptions, Workload, WorkloadError};

/// Kinds that can be started.
const KINDS: [&str; 2] = ["kvm", "sim"];

/// What they can do.
const WORKLOADS: [&str; 4] = ["database", "files", "idle", "noise"];

/// The name of its one disk.
const DISK: &str = "disk";

/// Pages that a kvm guest works on, and half as many blocks: all are checked in seconds.
const WORKING_SET: u64 = 2048;

/// Pages of a MB.
const MB_PAGES: u32 = 244;

/// Sizes are whole numbers of this.
const PAGE: u64 = 4096;

/// What runs in a guest needs this much memory and disk.
const LEAST_RAM: u64 = 16 << 20;
const LEAST_DISK: u64 = 1 << 20;

/// How the name of a started guest's memory ends, until it is mapped.
const SOURCE_RAM: &str = "-source.ram";

/// Most vCPUs.
const MOST_VCPUS: u32 = 64;

/// A guest that the daemon is to host; the `start` of `POST /v1/guests`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartGuest {
    /// `kvm` or `sim`.
    pub kind: String,
    /// Bytes of memory.
    #[serde(default = "default_ram")]
    pub ram: ByteSize,
    /// Bytes of its disk.
    #[serde(default = "default_disk")]
    pub disk: ByteSize,
    /// Virtual CPUs.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// What it does: `database`, `idle`, `files` or `noise`, with a rate as `noise:8`.
    #[serde(default = "default_workload")]
    pub workload: String,
    /// What its content and its work are made from.
    #[serde(default)]
    pub seed: u64,
}

fn default_ram() -> ByteSize {
    ByteSize::from_mib(256)
}

fn default_disk() -> ByteSize {
    ByteSize::from_mib(64)
}

fn default_vcpus() -> u32 {
    1
}

fn default_workload() -> String {
    "database".to_owned()
}

/// Where a guest's parts are put.
struct Place {
    /// Consoles and its disk's image.
    run: PathBuf,
    /// Its memory.
    ram: PathBuf,
}

impl StartGuest {
    /// What is wrong with it, before anything is made.
    fn mistake(&self, room: &PeerFacts) -> Option<String> {
        if !KINDS.contains(&self.kind.as_str()) {
            return Some(format!(
                "there is no kind '{}' of guest to start, only: {}{}",
                self.kind.escape_default(),
                KINDS.join(", "),
                suggest(&self.kind, &KINDS)
            ));
        }
        if self.vcpus == 0 || self.vcpus > MOST_VCPUS {
            return Some(format!(
                "{} vCPUs cannot be given; 1 to {MOST_VCPUS} can",
                self.vcpus
            ));
        }
        if self.kind == sim::KIND && self.vcpus > 1 {
            return Some("a sim guest has one vCPU; --kind kvm takes more".to_owned());
        }
        let sizes = [
            ("ram", self.ram.bytes(), LEAST_RAM),
            ("disk", self.disk.bytes(), LEAST_DISK),
        ];
        for (what, bytes, least) in sizes {
            if bytes < least || !bytes.is_multiple_of(PAGE) {
                return Some(format!(
                    "{what} of {bytes} bytes: at least {} MiB are needed, in whole pages of 4 KiB",
                    least >> 20
                ));
            }
        }
        let (directory, free) = &room.ram_directory;
        let free = (*free).min(room.memory_available);
        if self.ram.bytes() > free {
            return Some(format!(
                "ram of {}: {directory} and this host's memory have {} MiB free; ask for less, or free some",
                self.ram,
                free >> 20
            ));
        }
        let (directory, free) = &room.store_directory;
        if self.disk.bytes() > *free {
            return Some(format!(
                "disk of {}: {directory} has {} MiB free; ask for less, or free some",
                self.disk,
                free >> 20
            ));
        }
        None
    }
}

/// Removes the memory of guests that a daemon was starting when it was killed.
pub(super) fn clear_left_memory(directory: &Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(SOURCE_RAM));
        if id.is_some_and(|id| id.parse::<GuestId>().is_ok()) {
            let path = entry.path();
            let removed = std::fs::remove_file(&path);
            tracing::warn!(path = %path.display(), ?removed, "memory of a guest that was being started when a daemon was killed");
        }
    }
}

impl Site {
    /// Starts a guest and hosts it. It is known from then on, and not protected.
    ///
    /// # Errors
    /// When it cannot be made as it is asked for; the sentence says what can.
    pub async fn start_guest(
        self: &Arc<Self>,
        name: &str,
        start: &StartGuest,
    ) -> Result<GuestRecord, OperateError> {
        self.free_name(name)?;
        let (site, name, start) = (self.clone(), name.to_owned(), start.clone());
        let started = crate::work::spawn_blocking(move || site.start_here(&name, &start)).await;
        started.map_err(failed)?
    }

    fn start_here(&self, name: &str, start: &StartGuest) -> Result<GuestRecord, OperateError> {
        let id = GuestId::random();
        let place = Place {
            run: self.run_directory(id),
            ram: self.config.ram_dir().join(format!("{id}{SOURCE_RAM}")),
        };
        let room = host_facts(&self.config.ram_dir(), &self.config.run_dir());
        if let Some(mistake) = start.mistake(&room) {
            return Err(OperateError::Conflict(mistake));
        }
        private_directory(&place.run).map_err(failed)?;
        let launched = launch(start, &place);
        // It is mapped, and shall not outlive the guest, however that ends.
        let _ = std::fs::remove_file(&place.ram);
        let known = launched
            .map_err(OperateError::Conflict)
            .and_then(|(vmm, definition)| {
                let known = self.embed_as(id, name, vmm.clone(), definition);
                known.inspect_err(|_| lock(&vmm).end())
            });
        known.inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&place.run);
            // The guest's own directory, empty by now.
            let _ = place.run.parent().map(std::fs::remove_dir);
        })
    }
}

/// `; did you mean 'x'?`, when one is near.
fn suggest(typed: &str, known: &[&str]) -> String {
    let near = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(typed, k), k));
    match near.min() {
        Some((distance, name)) if distance <= 2 => format!("; did you mean '{name}'?"),
        _ => String::new(),
    }
}
/// Makes it, running.
fn launch(start: &StartGuest, place: &Place) -> Result<(SharedVmm, Definition), String> {
    let workload = start.workload.parse().map_err(|error: WorkloadError| {
        let name = start.workload.split(':').next().unwrap_or_default();
        format!("{error}{}", suggest(name, &WORKLOADS))
    })?;
    match start.kind.as_str() {
        sim::KIND => {
            let options = SimOptions {
                seed: start.seed,
                ram_bytes: start.ram.bytes(),
                disks: vec![(DISK.to_owned(), start.disk.bytes())],
                workload,
                run: place.run.clone(),
                ram: place.ram.clone(),
            };
            SimGuest::start(options).map_err(|e| e.to_string())
        }
        _ => launch_kvm(start, place, workload),
    }
}

#[cfg(target_arch = "x86_64")]
fn launch_kvm(
    start: &StartGuest,
    place: &Place,
    workload: Workload,
) -> Result<(SharedVmm, Definition), String> {
    use std::os::unix::fs::OpenOptionsExt;

    use crate::guest::embedded::console::Console;
    use crate::guest::embedded::disk::TrackedDisk;
    use crate::guest::kvm::{KvmMachine, KvmOptions, Pace, proof};

    let failed = |what: &Path| {
        let what = what.display().to_string();
        move |e: std::io::Error| format!("{what}: {e}")
    };
    let image = place.run.join("disk.img");
    let disk = TrackedDisk::open(DISK, &image, start.disk.bytes()).map_err(failed(&image))?;
    let ram_file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&place.ram)
        .map_err(failed(&place.ram))?;
    // It is open, and that is enough: a daemon that dies now leaves nothing.
    std::fs::remove_file(&place.ram).map_err(failed(&place.ram))?;
    let terminal = Console::open(&place.run).map_err(failed(&place.run))?;
    // The program knows no kinds of work, only how much of it.
    let changes = match workload {
        Workload::Idle => 10,
        Workload::Database(changes) => changes,
        Workload::Files(rate) | Workload::Noise(rate) => rate.saturating_mul(MB_PAGES),
    };
    let within = |bytes: u64, most: u64| (bytes / PAGE / 2).min(most) as u32;
    let options = KvmOptions {
        vcpus: start.vcpus,
        ram: start.ram.bytes(),
        ram_file,
        program: proof::program(),
        disk: Some(disk),
        terminal: Arc::new(terminal),
        pace: Pace {
            changes,
            pages: within(start.ram.bytes(), WORKING_SET),
            blocks: within(start.disk.bytes(), WORKING_SET / 2),
        },
        irqchip: false,
    };
    KvmMachine::start(options).map_err(|e| format!("{e}. A guest of --kind sim needs no KVM"))
}

#[cfg(not(target_arch = "x86_64"))]
fn launch_kvm(_: &StartGuest, _: &Place, _: Workload) -> Result<(SharedVmm, Definition), String> {
    Err("a kvm guest runs on x86-64 only, and this host is another; --kind sim runs on any".into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn room() -> PeerFacts {
        PeerFacts {
            ram_directory: ("/dev/shm".to_owned(), 1 << 30),
            store_directory: ("/run".to_owned(), 1 << 30),
            memory_available: 512 << 20,
            ..PeerFacts::default()
        }
    }

    fn asked(json: &str) -> StartGuest {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let start = asked("{\"kind\": \"sim\"}");
        assert_eq!(start.ram, ByteSize::from_mib(256));
        assert_eq!((start.vcpus, start.workload.as_str()), (1, "database"));
        assert_eq!(start.mistake(&room()), None);
        assert!(serde_json::from_str::<StartGuest>("{\"kind\": \"sim\", \"cpus\": 2}").is_err());
    }

    #[test]
    fn memory_left_by_a_killed_daemon_goes_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let left = path(&format!("{}{SOURCE_RAM}", GuestId::random()));
        let others = [
            path("mine-source.ram"),
            path(&GuestId::random().to_string()),
        ];
        for file in others.iter().chain([&left]) {
            std::fs::write(file, "x").unwrap();
        }
        clear_left_memory(directory.path());
        clear_left_memory(&path("missing"));
        assert!(!left.exists() && others.iter().all(|file| file.exists()));
    }

    #[test]
    fn what_cannot_be_is_said_before_anything_is_made() {
        for (json, words) in [
            ("{\"kind\": \"kwm\"}", "did you mean 'kvm'?"),
            ("{\"kind\": \"\"}", "only: kvm, sim"),
            ("{\"kind\": \"kvm\", \"vcpus\": 0}", "1 to"),
            ("{\"kind\": \"kvm\", \"vcpus\": 4000000000}", "1 to"),
            ("{\"kind\": \"sim\", \"vcpus\": 2}", "one vCPU"),
            ("{\"kind\": \"sim\", \"ram\": \"0MiB\"}", "at least 16 MiB"),
            ("{\"kind\": \"sim\", \"disk\": \"0MiB\"}", "at least 1 MiB"),
            ("{\"kind\": \"sim\", \"ram\": \"600MiB\"}", "512 MiB free"),
            (
                "{\"kind\": \"sim\", \"ram\": \"9000000TiB\"}",
                "512 MiB free",
            ),
            ("{\"kind\": \"sim\", \"disk\": \"2GiB\"}", "1024 MiB free"),
        ] {
            let mistake = asked(json).mistake(&room()).unwrap_or_default();
            assert!(mistake.contains(words), "{json}: {mistake}");
        }
    }
}
