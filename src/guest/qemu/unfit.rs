//! Options of QEMU that do not fit a guest which is to run elsewhere.

use super::check::Finding;
use super::options::{Argument, Keys};
use super::template::implied;

/// What is wrong with one option.
pub(super) fn option(argument: &Argument) -> Vec<Finding> {
    let keys = argument.keys(implied(&argument.option));
    let text = argument.text();
    let shown = format!("-{} {text}", argument.option);
    let driver = keys.value("driver").unwrap_or_default();
    let mut found = Vec::new();
    let mut blocks = |code: &str, what: &str, mend: &str| {
        found.push(Finding::blocks(code, format!("{shown}: {what}"), mend))
    };
    match argument.option.as_str() {
        "device" => match driver {
            "usb-host" | "pci-assign" | "vhost-vdpa" | "scsi-generic" | "scsi-block" => {
                blocks(
                    "passthrough",
                    "a device of this host cannot go to another",
                    "use an emulated or virtio device",
                );
            }
            _ if driver.starts_with("vfio-") => {
                blocks(
                    "passthrough",
                    "a device of this host cannot go to another",
                    "use a virtio device in its place (virtio-net-pci, virtio-blk-pci)",
                );
            }
            "vhost-user-fs-pci" | "vhost-user-fs-device" => {
                blocks(
                    "shared-folder",
                    "virtio-fs folders live outside QEMU, on this host",
                    "put the files on a disk of the guest or on a network share",
                );
            }
            _ if driver.starts_with("vhost-user-") || driver.starts_with("vhost-scsi") => {
                blocks(
                    "passthrough",
                    "its back end is another process of this host, whose state would be lost",
                    "use QEMU's own device of that kind",
                );
            }
            _ if driver.starts_with("virtio-9p") => {
                blocks(
                    "shared-folder",
                    "9p folders are files of this host, and QEMU refuses to migrate while one is mounted",
                    "put the files on a disk of the guest or on a network share",
                );
            }
            _ if driver.starts_with("ivshmem") => {
                blocks(
                    "shared-memory",
                    "memory shared with other guests cannot be of one instant with this one",
                    "remove the device",
                );
            }
            "nvdimm" | "virtio-pmem-pci" => {
                blocks(
                    "pmem",
                    "persistent memory is written around the disks and the RAM file",
                    "use a disk",
                );
            }
            _ => {}
        },
        "virtfs" | "fsdev" => blocks(
            "shared-folder",
            "9p folders are files of this host, and QEMU refuses to migrate while one is mounted",
            "put the files on a disk of the guest or on a network share",
        ),
        "tpmdev" => blocks(
            "tpm",
            "a TPM's state is outside QEMU and would be lost",
            "remove the TPM, or re-seal what depends on it after activation",
        ),
        "usbdevice" if text.starts_with("host:") => blocks(
            "passthrough",
            "a device of this host cannot go to another",
            "remove it",
        ),
        "snapshot" => blocks(
            "snapshot",
            "disks are thrown away when QEMU ends",
            "start the guest without -snapshot",
        ),
        "drive" | "blockdev" if keys.on("snapshot") => blocks(
            "snapshot",
            "this disk is thrown away when QEMU ends",
            "snapshot=off",
        ),
        "object" if keys.on("pmem") => blocks(
            "pmem",
            "persistent memory is written around the disks and the RAM file",
            "pmem=off",
        ),
        "object"
            if matches!(
                keys.value("qom-type"),
                Some("sev-guest" | "sev-snp-guest" | "tdx-guest" | "s390-pv-guest")
            ) =>
        {
            blocks(
                "confidential",
                "the memory of a confidential guest is encrypted for this processor",
                "run it without, or protect it from inside",
            );
        }
        "add-fd" => blocks(
            "inherited-fd",
            "QEMU inherited a descriptor that the peer cannot have",
            "name files by path (libvirt: attach through a QEMU started from its own command line)",
        ),
        "netdev" => {}
        _ if keys.value("fd").is_some()
            || keys
                .pairs()
                .iter()
                .any(|(_, value)| value.starts_with("/dev/fdset/")) =>
        {
            blocks(
                "inherited-fd",
                "QEMU inherited a descriptor that the peer cannot have",
                "name the file or socket by its path",
            );
        }
        _ => {}
    }
    found.extend(softer(argument, &keys, &shown));
    found
}

/// Findings that only warn.
fn softer(argument: &Argument, keys: &Keys, shown: &str) -> Option<Finding> {
    match argument.option.as_str() {
        "device"
            if keys
                .value("driver")
                .is_some_and(|driver| driver.starts_with("vhost-vsock")) =>
        {
            Some(Finding::warns(
                "vsock",
                format!(
                    "{shown}: open vsock connections end when the guest goes to the peer, where its CID must be free"
                ),
                "let the programs connect again",
            ))
        }
        "chardev" if keys.value("backend") == Some("socket") && !keys.on("server") => {
            Some(Finding::warns(
                "client-socket",
                format!("{shown}: QEMU connects to a program of this host"),
                "server=on,wait=off, so that the program connects to QEMU",
            ))
        }
        "chardev"
            if matches!(
                keys.value("backend"),
                Some("serial" | "tty" | "parallel" | "parport")
            ) =>
        {
            Some(Finding::warns(
                "host-port",
                format!("{shown}: the peer must have this port"),
                "use a socket: -chardev socket,id=…,path=…,server=on,wait=off",
            ))
        }
        "nic" => Some(Finding::warns(
            "net-unnamed",
            format!(
                "{shown}: this network back end cannot be named, so the peer cannot give it another network"
            ),
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
