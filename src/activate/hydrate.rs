//! The disks of a launched guest: overlays on the point, filled in the background.
//!
//! Each disk starts as an empty qcow2 overlay on a read-only export of the
//! point. `block-stream` copies what the overlay lacks while the guest runs;
//! then the store is not needed any more.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::failure::LaunchError;
use super::launch::Launched;
use crate::guest::qemu::definition::Definition;
use crate::guest::qemu::instantiate::{Backing, Placement};
use crate::guest::qemu::qmp::QmpError;

/// How far a disk's copy from the store is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Hydration {
    /// The volume.
    pub disk: String,
    /// Bytes looked at.
    pub done: u64,
    /// Bytes to look at; it may grow.
    pub total: u64,
    /// Whether it goes on.
    pub state: HydrationState,
}

/// Whether a disk's copy goes on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HydrationState {
    /// It is being copied.
    Running,
    /// The overlay holds all; the store is not needed.
    Done,
    /// It stopped; the guest still reads through the store.
    Failed(String),
}

impl Launched {
    /// Starts to copy what the overlays lack, at most `bytes_per_second` each
    /// (0: as fast as it goes). Copies under way since before a restart of ours
    /// go on at that rate; those that failed begin anew.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), LaunchError> {
        for (index, (_, device)) in self.disks.clone().iter().enumerate() {
            let job = job(index);
            let failed = |(id, known): &(String, Value)| {
                *id == job && known["status"] == "concluded" && !known["error"].is_null()
            };
            if self.jobs()?.iter().any(failed) {
                self.qmp.execute("job-dismiss", json!({"id": job}))?;
            }
            let started = self.qmp.execute(
                "block-stream",
                json!({"job-id": job, "device": device, "speed": bytes_per_second,
                       "on-error": "report", "auto-dismiss": false}),
            );
            match started {
                Ok(_) => {}
                Err(QmpError::Refused { .. }) if self.jobs()?.iter().any(|(id, _)| *id == job) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.set_hydration_speed(bytes_per_second)
    }

    /// Changes how fast disks are copied.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn set_hydration_speed(&mut self, bytes_per_second: u64) -> Result<(), LaunchError> {
        for (id, job) in self.jobs()? {
            if job["status"] != "running" {
                continue;
            }
            let set = json!({"device": id, "speed": bytes_per_second});
            match self.qmp.execute("block-job-set-speed", set) {
                // It may have come to its end just now.
                Ok(_) | Err(QmpError::Refused { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// How far each disk's copy is; after [`Launched::hydrate`].
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn hydration(&mut self) -> Result<Vec<Hydration>, LaunchError> {
        let jobs = self.jobs()?;
        let progress = |index: usize, disk: &str| {
            let id = job(index);
            let (_, job) = jobs.iter().find(|(name, _)| *name == id)?;
            let state = match (job["status"].as_str(), job["error"].as_str()) {
                (_, Some(error)) => HydrationState::Failed(error.to_owned()),
                (Some("concluded"), None) => HydrationState::Done,
                _ => HydrationState::Running,
            };
            let number = |key: &str| job[key].as_u64().unwrap_or(0);
            let (done, total) = (number("current-progress"), number("total-progress"));
            Some(Hydration {
                disk: disk.to_owned(),
                done,
                total,
                state,
            })
        };
        Ok(self
            .disks
            .iter()
            .enumerate()
            .filter_map(|(index, (disk, _))| progress(index, disk))
            .collect())
    }

    /// Our copying jobs.
    fn jobs(&mut self) -> Result<Vec<(String, Value)>, LaunchError> {
        let jobs = self.qmp.execute("query-jobs", json!({}))?;
        let ours = |job: &Value| {
            let id = job["id"].as_str().filter(|id| id.starts_with(JOB))?;
            Some((id.to_owned(), job.clone()))
        };
        Ok(jobs
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(ours)
            .collect())
    }
}

const JOB: &str = "farhaven-hydrate-";

fn job(index: usize) -> String {
    format!("{JOB}{index}")
}

/// The disks that have something below, and their names for `block-stream`.
pub(super) fn streams(definition: &Definition, placement: &Placement) -> Vec<(String, String)> {
    let below = |name: &str| {
        placement
            .disks
            .get(name)
            .is_some_and(|place| place.backing != Backing::Nothing)
    };
    let disks = definition.disks.iter().filter(|disk| below(&disk.name));
    let device = |node: &str, name: &str| {
        if node.starts_with('#') {
            name.to_owned()
        } else {
            node.to_owned()
        }
    };
    disks
        .map(|disk| (disk.name.clone(), device(&disk.node, &disk.name)))
        .collect()
}

pub(super) fn make_overlays(
    definition: &Definition,
    placement: &Placement,
) -> Result<(), LaunchError> {
    for disk in &definition.disks {
        let Some(place) = placement
            .disks
            .get(&disk.name)
            .filter(|place| !place.overlay.exists())
        else {
            continue;
        };
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        if let Some(below) = place.backing.options()? {
            // In the header too, so that nobody takes a half copied overlay for
            // a whole disk; unchecked (-u), so that nothing is waited for.
            let format = below["driver"].as_str().unwrap_or("raw").to_owned();
            command
                .args(["-u", "-F", &format, "-b"])
                .arg(format!("json:{below}"));
        }
        let output = command
            .arg(&place.overlay)
            .arg(disk.bytes.to_string())
            .stdin(Stdio::null())
            .output()
            .map_err(|source| LaunchError::Program {
                program: "qemu-img".to_owned(),
                source,
            })?;
        if !output.status.success() {
            let _ = fs::remove_file(&place.overlay);
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(LaunchError::Overlay {
                path: place.overlay.clone(),
                words,
            });
        }
    }
    Ok(())
}
