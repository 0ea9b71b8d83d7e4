//! What would stop a guest's protection or its activation, and how to mend it.
//!
//! [`check`] looks at a definition, [`check_live`] asks the running QEMU, and
//! [`check_peer`](super::peer::check_peer) compares with the host it is to run on.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::definition::{Definition, RamBlock};
use super::options::Argument;
use super::qmp::{Qmp, QmpError};
use super::template::implied;

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
        Finding { severity: Severity::Blocks, code: code.to_owned(), what: what.into(), mend: mend.into() }
    }

    /// A finding to know of.
    pub fn warns(code: &str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Finding { severity: Severity::Warns, ..Self::blocks(code, what, mend) }
    }
}

/// Everything that a definition alone tells, the worst first.
pub fn check(definition: &Definition) -> Vec<Finding> {
    let mut found = Vec::new();
    if definition.qemu < OLDEST_QEMU {
        let (major, minor, micro) = definition.qemu;
        found.push(Finding::blocks(
            "qemu-too-old",
            format!("the guest runs on QEMU {major}.{minor}.{micro}, whose QMP lacks what a cut needs"),
            "restart it on QEMU 7.2 or later",
        ));
    }
    machine_and_cpu(definition, &mut found);
    if definition.ram.is_empty() {
        found.push(ram(definition, &RamBlock { id: "ram0".into(), bytes: definition.ram_bytes, backend: String::new(), path: None, shared: false }));
    }
    found.extend(definition.ram.iter().filter(|b| !(b.shared && b.path.is_some() && b.backend == FILE)).map(|b| ram(definition, b)));
    disks(definition, &mut found);
    for argument in &definition.arguments {
        found.extend(option(argument));
    }
    let agent = |argument: &Argument| argument.keys("driver").value("name") == Some("org.qemu.guest_agent.0");
    if !definition.arguments.iter().any(agent) {
        found.push(Finding::warns(
            "no-guest-agent",
            "QEMU has no channel to a guest agent, so every point is crash-consistent, none application-consistent",
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
            format!("machine type {machine} has no versions, so another QEMU may not take its state"),
            "use a versioned one, as -machine pc-q35-7.2",
        ));
    } else if let Some(alias) = &definition.machine_alias {
        found.push(Finding::warns(
            "machine-alias",
            format!("machine type {alias} stands for {machine} here; the peer will use {machine}, but a restart after an upgrade may not"),
            format!("-machine {machine} in place of -machine {alias}"),
        ));
    }
    let model = definition.cpu.as_deref().unwrap_or_default().split(',').next().unwrap_or_default();
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
    let file = block.path.as_ref().map_or(format!("/dev/shm/NAME.{id}"), |path| path.display().to_string());
    let mend = format!(
        "-machine {machine},memory-backend={id} -object memory-backend-file,id={id},size={bytes},mem-path={file},share=on, and restart the guest"
    );
    match block.backend.as_str() {
        FILE => Finding::blocks("ram-not-shared", format!("the file of RAM block {id} is private to QEMU, so its changes cannot be read"), mend),
        "memory-backend-memfd" => Finding::blocks("ram-memfd", format!("RAM block {id} is a memfd; newer QEMUs send it with the device state in full"), mend),
        _ => Finding::blocks("ram-anonymous", format!("{bytes} bytes of guest memory are anonymous memory of QEMU, which cannot be read from outside"), mend),
    }
}

fn disks(definition: &Definition, found: &mut Vec<Finding>) {
    for disk in &definition.disks {
        let (name, node, path) = (&disk.name, &disk.node, disk.path.as_deref().unwrap_or("IMAGE".as_ref()).display());
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
        if ["throttle", "copy-on-read", "blkdebug", "blkverify", "quorum", "replication"].contains(&disk.format.as_str()) {
            found.push(Finding::warns(
                "disk-filter",
                format!("disk {name} goes through a {} node, which it will not have at the peer", disk.format),
                "put limits on the device's own side, or set them at the peer after activation (block_set_io_throttle)",
            ));
        }
        if disk.format == "vvfat" {
            found.push(Finding::blocks("disk-vvfat", format!("disk {name} is a directory shown as a FAT disk; it cannot be migrated"), "make an image of it"));
        }
    }
}

fn option(argument: &Argument) -> Vec<Finding> {
    let keys = argument.keys(implied(&argument.option));
    let text = argument.text();
    let shown = format!("-{} {text}", argument.option);
    let driver = keys.value("driver").unwrap_or_default();
    let mut found = Vec::new();
    let mut blocks = |code: &str, what: &str, mend: &str| found.push(Finding::blocks(code, format!("{shown}: {what}"), mend));
    match argument.option.as_str() {
        "device" => match driver {
            "usb-host" | "pci-assign" | "vhost-vdpa" | "scsi-generic" | "scsi-block" => {
                blocks("passthrough", "a device of this host cannot go to another", "use an emulated or virtio device");
            }
            _ if driver.starts_with("vfio-") => {
                blocks("passthrough", "a device of this host cannot go to another", "use a virtio device in its place (virtio-net-pci, virtio-blk-pci)");
            }
            "vhost-user-fs-pci" | "vhost-user-fs-device" => {
                blocks("shared-folder", "virtio-fs folders live outside QEMU, on this host", "put the files on a disk of the guest or on a network share");
            }
            _ if driver.starts_with("vhost-user-") || driver.starts_with("vhost-scsi") => {
                blocks("passthrough", "its back end is another process of this host, whose state would be lost", "use QEMU's own device of that kind");
            }
            _ if driver.starts_with("virtio-9p") => {
                blocks("shared-folder", "9p folders are files of this host, and QEMU refuses to migrate while one is mounted", "put the files on a disk of the guest or on a network share");
            }
            _ if driver.starts_with("ivshmem") => {
                blocks("shared-memory", "memory shared with other guests cannot be of one instant with this one", "remove the device");
            }
            "nvdimm" | "virtio-pmem-pci" => {
                blocks("pmem", "persistent memory is written around the disks and the RAM file", "use a disk");
            }
            _ => {}
        },
        "virtfs" | "fsdev" => blocks("shared-folder", "9p folders are files of this host, and QEMU refuses to migrate while one is mounted", "put the files on a disk of the guest or on a network share"),
        "tpmdev" => blocks("tpm", "a TPM's state is outside QEMU and would be lost", "remove the TPM, or re-seal what depends on it after activation"),
        "usbdevice" if text.starts_with("host:") => blocks("passthrough", "a device of this host cannot go to another", "remove it"),
        "snapshot" => blocks("snapshot", "disks are thrown away when QEMU ends", "start the guest without -snapshot"),
        "drive" | "blockdev" if keys.on("snapshot") => blocks("snapshot", "this disk is thrown away when QEMU ends", "snapshot=off"),
        "object" if keys.on("pmem") => blocks("pmem", "persistent memory is written around the disks and the RAM file", "pmem=off"),
        "object" if matches!(keys.value("qom-type"), Some("sev-guest" | "sev-snp-guest" | "tdx-guest" | "s390-pv-guest")) => {
            blocks("confidential", "the memory of a confidential guest is encrypted for this processor", "run it without, or protect it from inside");
        }
        "add-fd" => blocks("inherited-fd", "QEMU inherited a descriptor that the peer cannot have", "name files by path (libvirt: attach through a QEMU started from its own command line)"),
        "netdev" => {}
        _ if keys.value("fd").is_some() || keys.pairs().iter().any(|(_, value)| value.starts_with("/dev/fdset/")) => {
            blocks("inherited-fd", "QEMU inherited a descriptor that the peer cannot have", "name the file or socket by its path");
        }
        _ => {}
    }
    found.extend(softer(argument, &keys, &shown));
    found
}

/// Findings that only warn.
fn softer(argument: &Argument, keys: &super::options::Keys, shown: &str) -> Option<Finding> {
    match argument.option.as_str() {
        "device" if keys.value("driver").is_some_and(|driver| driver.starts_with("vhost-vsock")) => Some(Finding::warns(
            "vsock",
            format!("{shown}: open vsock connections end when the guest goes to the peer, where its CID must be free"),
            "let the programs connect again",
        )),
        "chardev" if keys.value("backend") == Some("socket") && !keys.on("server") => Some(Finding::warns(
            "client-socket",
            format!("{shown}: QEMU connects to a program of this host"),
            "server=on,wait=off, so that the program connects to QEMU",
        )),
        "chardev" if matches!(keys.value("backend"), Some("serial" | "tty" | "parallel" | "parport")) => Some(Finding::warns(
            "host-port",
            format!("{shown}: the peer must have this port"),
            "use a socket: -chardev socket,id=…,path=…,server=on,wait=off",
        )),
        "nic" => Some(Finding::warns(
            "net-unnamed",
            format!("{shown}: this network back end cannot be named, so the peer cannot give it another network"),
            "-netdev …,id=net0 -device virtio-net-pci,netdev=net0",
        )),
        "object" | "device" | "audiodev" | "chroot" | "readconfig" | "L" => {
            let random = |value: &str| value.starts_with("/dev/") && value.ends_with("random");
            let mut values = keys.pairs().iter().map(|(_, value)| value.as_str());
            let path = values.find(|value| value.starts_with('/') && !random(value))?;
            Some(Finding::warns(
                "host-path",
                format!("{shown}: {path} is kept as it is, and must exist at the peer"),
                format!("copy {path} to the peer, to the same place"),
            ))
        }
        _ => None,
    }
}

/// What only the running QEMU knows.
///
/// # Errors
/// When it does not answer.
pub fn check_live(qmp: &mut Qmp) -> Result<Vec<Finding>, QmpError> {
    let mut found = Vec::new();
    let migration = qmp.execute("query-migrate", json!({}))?;
    for reason in migration["blocked-reasons"].as_array().into_iter().flatten() {
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
        let (id, kind) = (job["device"].as_str().unwrap_or_default(), job["type"].as_str().unwrap_or_default());
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
