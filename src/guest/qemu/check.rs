//! What would stop a guest's protection or its activation, and how to mend it.
//!
//! [`check`] looks at a definition, [`check_live`] asks the running QEMU, and
//! [`check_peer`](super::peer::check_peer) compares with the host it is to run on.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::agent;
use super::definition::{Definition, RamBlock};
use super::qmp::{Qmp, QmpError};
use super::unfit::option;

/// The oldest QEMU whose QMP has all that is needed, and that was tried.
pub const OLDEST_QEMU: (u64, u64, u64) = (7, 2, 0);

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Protection or activation would fail.
    Blocks,
    /// It works, but not as one may expect.
    Warns,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A stable name, as `ram-not-shared`.
    pub code: String,
    /// What was found, and what follows from it.
    pub what: String,
    /// How to mend it, with the exact option.
    pub mend: String,
}

impl Finding {
    /// A finding that stops protection or activation.
    pub fn blocks(code: &str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Finding {
            severity: Severity::Blocks,
            code: code.to_owned(),
            what: what.into(),
            mend: mend.into(),
        }
    }

    /// A finding to know of.
    pub fn warns(code: &str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Finding {
            severity: Severity::Warns,
            ..Self::blocks(code, what, mend)
        }
    }
}

/// Everything that a definition alone tells, the worst first.
pub fn check(definition: &Definition) -> Vec<Finding> {
    let mut found = Vec::new();
    if definition.qemu < OLDEST_QEMU {
        let (major, minor, micro) = definition.qemu;
        found.push(Finding::blocks(
            "qemu-too-old",
            format!(
                "the guest runs on QEMU {major}.{minor}.{micro}, whose QMP lacks what a cut needs"
            ),
            "restart it on QEMU 7.2 or later",
        ));
    }
    machine_and_cpu(definition, &mut found);
    if definition.ram.is_empty() {
        found.push(ram(
            definition,
            &RamBlock {
                id: "ram0".into(),
                bytes: definition.ram_bytes,
                backend: String::new(),
                path: None,
                shared: false,
            },
        ));
    }
    found.extend(
        definition
            .ram
            .iter()
            .filter(|b| !(b.shared && b.path.is_some() && b.backend == FILE))
            .map(|b| ram(definition, b)),
    );
    disks(definition, &mut found);
    for argument in &definition.arguments {
        found.extend(option(argument));
    }
    if agent::port(&definition.arguments).is_none() {
        found.push(Finding::warns(
            "no-guest-agent",
            "QEMU has no channel to a guest agent, so every point is crash-consistent, none application-consistent (quiesce = \"agent\" of a policy does nothing for it)",
            "-device virtio-serial -chardev socket,id=agent,path=/run/NAME.agent,server=on,wait=off -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ));
    }
    found.sort_by_key(|finding| finding.severity);
    found.dedup();
    found
}

const FILE: &str = "memory-backend-file";

fn machine_and_cpu(definition: &Definition, found: &mut Vec<Finding>) {
    let machine = &definition.machine;
    if !machine.chars().any(|letter| letter.is_ascii_digit()) || !machine.contains('.') {
        found.push(Finding::blocks(
            "machine-unversioned",
            format!(
                "machine type {machine} has no versions, so another QEMU may not take its state"
            ),
            "use a versioned one, as -machine pc-q35-7.2",
        ));
    } else if let Some(alias) = &definition.machine_alias {
        found.push(Finding::warns(
            "machine-alias",
            format!("machine type {alias} stands for {machine} here; the peer will use {machine}, but a restart after an upgrade may not"),
            format!("-machine {machine} in place of -machine {alias}"),
        ));
    }
    let model = definition
        .cpu
        .as_deref()
        .unwrap_or_default()
        .split(',')
        .next()
        .unwrap_or_default();
    if model == "host" || (model == "max" && definition.kvm) {
        found.push(Finding::blocks(
            "cpu-host",
            format!("-cpu {model} gives the guest whatever this host's processor has, and the peer's may lack it"),
            "name a model that both hosts have, as -cpu EPYC-Rome or -cpu Cascadelake-Server (qemu-system-x86_64 -cpu help lists them)",
        ));
    } else if model == "max" {
        found.push(Finding::warns(
            "cpu-max",
            "-cpu max differs between versions of QEMU",
            "name a model, as -cpu qemu64, or keep the same QEMU at the peer",
        ));
    }
}

fn ram(definition: &Definition, block: &RamBlock) -> Finding {
    let (id, bytes, machine) = (&block.id, block.bytes, &definition.machine);
    let id = if block.backend.is_empty() { "ram0" } else { id };
    let file = block
        .path
        .as_ref()
        .map_or(format!("/dev/shm/NAME.{id}"), |path| {
            path.display().to_string()
        });
    let mend = format!(
        "-machine {machine},memory-backend={id} -object memory-backend-file,id={id},size={bytes},mem-path={file},share=on, and restart the guest"
    );
    match block.backend.as_str() {
        FILE => Finding::blocks(
            "ram-not-shared",
            format!("the file of RAM block {id} is private to QEMU, so its changes cannot be read"),
            mend,
        ),
        "memory-backend-memfd" => Finding::blocks(
            "ram-memfd",
            format!("RAM block {id} is a memfd; newer QEMUs send it with the device state in full"),
            mend,
        ),
        _ => Finding::blocks(
            "ram-anonymous",
            format!(
                "{bytes} bytes of guest memory are anonymous memory of QEMU, which cannot be read from outside"
            ),
            mend,
        ),
    }
}

fn disks(definition: &Definition, found: &mut Vec<Finding>) {
    for disk in &definition.disks {
        let (name, node, path) = (
            &disk.name,
            &disk.node,
            disk.path.as_deref().unwrap_or("IMAGE".as_ref()).display(),
        );
        if disk.option.is_empty() {
            found.push(Finding::blocks(
                "disk-plugged",
                format!("disk {name} is not on QEMU's command line (it was plugged in later, or its medium was changed), so the peer could not be given it"),
                format!("restart the guest with -blockdev driver={},node-name={name},file.driver=file,file.filename={path} and a -device with drive={name}, then add it again", disk.format),
            ));
        } else if node.starts_with('#') {
            found.push(Finding::warns(
                "disk-node-name",
                format!("disk {name} has no node name of its own; QEMU calls it {node}, and otherwise after a restart"),
                format!("-blockdev driver={},node-name=NAME,file.driver=file,file.filename={path} with -device …,drive=NAME, or node-name=NAME in its -drive", disk.format),
            ));
        }
        if [
            "throttle",
            "copy-on-read",
            "blkdebug",
            "blkverify",
            "quorum",
            "replication",
        ]
        .contains(&disk.format.as_str())
        {
            found.push(Finding::warns(
                "disk-filter",
                format!("disk {name} goes through a {} node, which it will not have at the peer", disk.format),
                "put limits on the device's own side, or set them at the peer after activation (block_set_io_throttle)",
            ));
        }
        if disk.format == "vvfat" {
            found.push(Finding::blocks(
                "disk-vvfat",
                format!("disk {name} is a directory shown as a FAT disk; it cannot be migrated"),
                "make an image of it",
            ));
        }
    }
}

/// What only the running QEMU knows.
///
/// # Errors
/// When it does not answer.
pub fn check_live(qmp: &mut Qmp) -> Result<Vec<Finding>, QmpError> {
    let mut found = Vec::new();
    let migration = qmp.execute("query-migrate", json!({}))?;
    for reason in migration["blocked-reasons"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let reason = reason.as_str().unwrap_or_default();
        found.push(Finding::blocks(
            "migration-blocked",
            format!("QEMU refuses to save this guest's state: {reason}"),
            "remove or unmount what QEMU names",
        ));
    }
    let status = qmp.execute("query-status", json!({}))?;
    if status["running"] != true {
        let status = status["status"].as_str().unwrap_or("unknown").to_owned();
        found.push(Finding::warns(
            "not-running",
            format!("the guest does not run (its status is {status}); it would be protected as it is and stay so at the peer"),
            "`cont` in its monitor lets it go on",
        ));
    }
    let jobs = qmp.execute("query-block-jobs", json!({}))?;
    for job in jobs.as_array().into_iter().flatten() {
        let (id, kind) = (
            job["device"].as_str().unwrap_or_default(),
            job["type"].as_str().unwrap_or_default(),
        );
        if !id.starts_with("farhaven") {
            found.push(Finding::warns(
                "block-job",
                format!("a {kind} job runs on {id}; cuts fail while it does"),
                format!("wait for it, or `block_job_cancel {id}` in the monitor"),
            ));
        }
    }
    Ok(found)
}
