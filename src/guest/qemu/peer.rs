//! What the peer's host has, gathered there, and compared with what a guest needs.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::check::{Finding, OLDEST_QEMU};
use super::definition::{Definition, HostFile};

/// Files of one definition that are looked at.
const MOST_FILES: usize = 64;

/// What a host offers for one guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerFacts {
    /// Version of the QEMU there; none if it is not installed.
    pub qemu: Option<(u64, u64, u64)>,
    /// Machine types it knows.
    pub machines: Vec<String>,
    /// CPU models it knows.
    pub cpus: Vec<String>,
    /// Whether /dev/kvm can be opened.
    pub kvm: bool,
    /// Whether qemu-img is installed.
    pub qemu_img: bool,
    /// Directory for RAM files, and bytes free in it.
    pub ram_directory: (String, u64),
    /// Directory of the store, and bytes free in it.
    pub store_directory: (String, u64),
    /// Bytes of memory that programs may still take.
    pub memory_available: u64,
    /// The definition's files that exist there.
    pub files: Vec<HostFile>,
    /// The largest socket buffer that a program may ask for: receive, send.
    pub socket_buffers: (u64, u64),
    /// What stops an embedded guest there, by the word of the peer's own builder.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// What this host has, whatever the hypervisor. Nothing here fails: what
/// cannot be found out counts as absent.
pub fn host_facts(ram: &Path, store: &Path) -> PeerFacts {
    PeerFacts {
        ram_directory: (ram.display().to_string(), bytes_free(ram)),
        store_directory: (store.display().to_string(), bytes_free(store)),
        memory_available: memory_available(
            &std::fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        ),
        socket_buffers: socket_buffers(),
        ..PeerFacts::default()
    }
}

/// Gathers the facts of this host for a QEMU guest, as [`host_facts`]. `program` is this site's own QEMU; the
/// definition comes from the other site, which must not choose what runs here.
pub fn peer_facts(program: &Path, definition: &Definition, ram: &Path, store: &Path) -> PeerFacts {
    let version = output(program, &["--version"]);
    PeerFacts {
        qemu: parse_version(&version),
        machines: parse_machines(&output(program, &["-machine", "help"])),
        cpus: parse_cpus(&output(program, &["-cpu", "help"])),
        kvm: std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok(),
        qemu_img: !output(Path::new("qemu-img"), &["--version"]).is_empty(),
        files: compared(&definition.files),
        ..host_facts(ram, store)
    }
}

/// Those of these files that are here, each looked at once.
fn compared(files: &[HostFile]) -> Vec<HostFile> {
    let mut seen = BTreeSet::new();
    let once = files.iter().filter(|file| seen.insert(&file.path));
    let few = once.take(MOST_FILES);
    few.filter_map(HostFile::compared).collect()
}

/// The largest socket buffer that a program may ask for here: receive, send.
pub fn socket_buffers() -> (u64, u64) {
    let setting = |name: &str| {
        let path = format!("/proc/sys/net/core/{name}");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    (setting("rmem_max"), setting("wmem_max"))
}

/// Bytes that this user may still write below a directory.
pub fn bytes_free(directory: &Path) -> u64 {
    let existing = directory
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(directory);
    rustix::fs::statvfs(existing).map_or(0, |facts| facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// What a command prints; nothing if it fails.
fn output(program: &Path, arguments: &[&str]) -> String {
    let result = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    result.map_or(String::new(), |output| match output.status.success() {
        true => String::from_utf8_lossy(&output.stdout).into_owned(),
        false => String::new(),
    })
}

/// Is this the bare name of one of QEMU's programs?
pub fn is_qemu(program: &str) -> bool {
    program.starts_with("qemu-")
        && program
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        || matches!(program, "kvm" | "qemu-kvm")
}

fn parse_version(text: &str) -> Option<(u64, u64, u64)> {
    let word = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)?;
    let mut parts = word.split('.').map(|part| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    Some((
        parts.next()??,
        parts.next()??,
        parts.next().flatten().unwrap_or(0),
    ))
}

fn parse_machines(text: &str) -> Vec<String> {
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn parse_cpus(text: &str) -> Vec<String> {
    let lines = text
        .lines()
        .take_while(|line| !line.starts_with("Recognized"))
        .filter(|line| !line.ends_with(':'));
    let model = |line: &str| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "x86" | "PowerPC" | "s390" | "s390x" => words.next().map(str::to_owned),
            word => Some(word.to_owned()),
        }
    };
    lines.filter_map(model).collect()
}

pub(crate) fn memory_available(text: &str) -> u64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// What would stop this guest's activation at that host. `stored` is how many
/// bytes of the guest its store holds already.
pub fn check_peer(definition: &Definition, peer: &PeerFacts, stored: u64) -> Vec<Finding> {
    let mut found = Vec::new();
    let program = &definition.program;
    let Some(version) = peer.qemu else {
        found.push(Finding::blocks(
            "peer-qemu-missing",
            format!("the peer has no {program}"),
            "at the peer: apt-get install -y qemu-system-x86 qemu-utils",
        ));
        return found;
    };
    let shown = |(major, minor, micro): (u64, u64, u64)| format!("{major}.{minor}.{micro}");
    if version < OLDEST_QEMU {
        found.push(Finding::blocks(
            "peer-qemu-too-old",
            format!("the peer has QEMU {}", shown(version)),
            "install QEMU 7.2 or later there",
        ));
    } else if (version.0, version.1) < (definition.qemu.0, definition.qemu.1) {
        let (there, here) = (shown(version), shown(definition.qemu));
        found.push(Finding::warns("peer-qemu-older", format!("the peer has QEMU {there}, the guest runs on {here}; QEMU promises migration to newer versions only"), format!("install QEMU {here} or later there, and run a test failover")));
    }
    if !peer.qemu_img {
        found.push(Finding::blocks(
            "peer-qemu-img-missing",
            "the peer has no qemu-img, which makes the disks' overlays",
            "at the peer: apt-get install -y qemu-utils",
        ));
    }
    if !peer.machines.contains(&definition.machine) {
        let known: Vec<&str> = peer
            .machines
            .iter()
            .map(String::as_str)
            .filter(|name| name.contains('.'))
            .collect();
        let same = |name: &&&str| name.split('-').nth(1) == definition.machine.split('-').nth(1);
        let nearest = known
            .iter()
            .find(same)
            .map_or("a machine type that both know", |name| name);
        found.push(Finding::blocks(
            "peer-machine",
            format!(
                "the peer's QEMU does not know machine type {}",
                definition.machine
            ),
            format!(
                "restart the guest with -machine {nearest}, or install the same QEMU at the peer"
            ),
        ));
    }
    if let Some(model) = definition
        .cpu
        .as_deref()
        .and_then(|cpu| cpu.split(',').next())
        && !["host", "max", "base"].contains(&model)
        && !peer.cpus.iter().any(|known| known == model)
    {
        found.push(Finding::blocks(
            "peer-cpu",
            format!("the peer's QEMU does not know CPU model {model}"),
            "use a model that both list (qemu-system-x86_64 -cpu help)",
        ));
    }
    if definition.kvm && !peer.kvm {
        found.push(Finding::blocks("peer-kvm", "the guest runs by KVM, and /dev/kvm cannot be opened at the peer", "at the peer: switch on virtualisation in the firmware, modprobe kvm_intel or kvm_amd, and run farhaven as root or in group kvm"));
    }
    let ram = (definition.ram.iter()).fold(0, |sum: u64, block| sum.saturating_add(block.bytes));
    let disks = (definition.disks.iter()).fold(0, |sum: u64, disk| sum.saturating_add(disk.bytes));
    found.extend(check_room(
        ram.max(definition.ram_bytes),
        disks,
        peer,
        stored,
    ));
    for file in &definition.files {
        let path = file.path.display();
        match peer.files.iter().find(|there| there.path == file.path) {
            None => found.push(Finding::blocks(
                "peer-file-missing",
                format!("{path}, which QEMU's command line names, cannot be read at the peer"),
                format!(
                    "copy it there, to the same place ({} bytes, BLAKE3 {})",
                    file.bytes, file.blake3
                ),
            )),
            Some(there) if there.blake3 != file.blake3 => found.push(Finding::blocks(
                "peer-file-differs",
                format!("{path} at the peer is another file than here"),
                format!(
                    "copy this side's there ({} bytes, BLAKE3 {})",
                    file.bytes, file.blake3
                ),
            )),
            Some(_) => {}
        }
    }
    for net in definition.nets.iter().filter(|net| {
        !matches!(
            net.kind.as_str(),
            "user" | "socket" | "stream" | "dgram" | "hubport"
        )
    }) {
        found.push(Finding::warns("peer-net", format!("network {} is {}: the peer must have the like", net.id, net.value), format!("if it is another there, say so in the peer's configuration: {} = \"tap,ifname=…,script=no\" under [networks]; or in its group's policy, networks.SITE.{0}.bridge", net.id)));
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

/// Has the peer room for a guest of so many bytes of RAM and disks? `stored`
/// is how many bytes of it its store holds already.
pub fn check_room(ram: u64, disks: u64, peer: &PeerFacts, stored: u64) -> Vec<Finding> {
    let mut found = Vec::new();
    let (directory, free) = &peer.ram_directory;
    if *free < ram {
        found.push(Finding::blocks("peer-ram-room", format!("the guest's RAM file takes {ram} bytes, and {directory} at the peer has {free} free"), format!("free memory there, enlarge it (mount -o remount,size={} /dev/shm), or set another RAM directory", ram.saturating_mul(2))));
    }
    if peer.memory_available < ram {
        found.push(Finding::blocks(
            "peer-memory",
            format!(
                "the guest needs {ram} bytes of memory, and the peer has {} available",
                peer.memory_available
            ),
            "free memory there, or choose another peer",
        ));
    }
    let (directory, free) = &peer.store_directory;
    let needed = disks.saturating_add(ram).saturating_sub(stored);
    if *free < needed / 10 {
        found.push(Finding::blocks("peer-store-room", format!("the guest has {disks} bytes of disks and {ram} of RAM, and {directory} at the peer has {free} free"), format!("free at least {} bytes there, or set another store directory", needed / 10)));
    } else if *free < needed {
        found.push(Finding::warns("peer-store-tight", format!("the guest has up to {needed} bytes to store, and {directory} at the peer has {free} free; it suffices only if the guest's disks are mostly empty or compress well"), "give the store more room"));
    }
    found
}

/// Are a host's socket buffers large enough? `wanted` is twice the link's
/// bandwidth-delay product, or the most that a session asks for.
pub fn check_socket_buffers(site: &str, buffers: (u64, u64), wanted: u64) -> Option<Finding> {
    let (receive, send) = buffers;
    (receive.min(send) < wanted).then(|| {
        Finding::warns(
            "socket-buffers",
            format!("{site}: sockets get at most {receive} bytes to receive and {send} to send, the link wants {wanted}; packets dropped there look like a bad line"),
            format!("sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}, and the same in /etc/sysctl.d/farhaven.conf"),
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use super::*;

    #[test]
    fn help_texts_are_understood() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"),
            Some((7, 2, 22))
        );
        assert_eq!(
            parse_version("QEMU emulator version 10.0-rc1"),
            Some((10, 0, 0))
        );
        assert_eq!(parse_version("nonsense"), None);
        assert_eq!(
            parse_machines(
                "Supported machines are:\npc-q35-7.2   Standard PC\nq35  x (alias of pc-q35-7.2)\n"
            ),
            ["pc-q35-7.2", "q35"]
        );
        let cpus = "Available CPUs:\nx86 486                   (alias configured by machine type)\nx86 EPYC-v4  AMD\n\nRecognized CPUID flags:\n  3dnow";
        assert_eq!(parse_cpus(cpus), ["486", "EPYC-v4"]);
        assert_eq!(
            memory_available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"),
            12 * 1024
        );
    }

    #[test]
    fn only_programs_of_qemu_are_run() {
        assert!(is_qemu("qemu-system-x86_64") && is_qemu("kvm"));
        for bad in [
            "/tmp/qemu-system-x86_64",
            "sh",
            "qemu-x;reboot",
            "",
            "../qemu-img",
            "qemu-\0",
        ] {
            assert!(!is_qemu(bad), "{bad}");
        }
    }

    #[test]
    fn small_socket_buffers_are_told() {
        assert!(check_socket_buffers("here", (212_992, 212_992), 2 << 20).is_some());
        assert!(check_socket_buffers("here", (4 << 20, 4 << 20), 2 << 20).is_none());
    }

    #[test]
    fn a_file_is_looked_at_once_however_often_a_peer_lists_it() {
        let dir = tempfile::tempdir().unwrap();
        let here = file_in(dir.path(), "bios.bin");
        let listed = vec![here.clone(); 1000];
        assert_eq!(compared(&listed), std::slice::from_ref(&here));
        // Guesses at it are not compared one by one.
        let guess = HostFile {
            blake3: "0".repeat(64),
            ..here.clone()
        };
        let told = compared(&[guess, here]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!((told[0].bytes, told[0].blake3.as_str()), (0, ""));
    }

    #[test]
    fn no_more_files_are_looked_at_than_a_definition_may_need() {
        let dir = tempfile::tempdir().unwrap();
        let names = (0..=MOST_FILES).map(|n| format!("{n}.bin"));
        let listed: Vec<HostFile> = names.map(|name| file_in(dir.path(), &name)).collect();
        assert_eq!(compared(&listed), listed[..MOST_FILES]);
        // Those that are not here count, too.
        let gone = (0..MOST_FILES).map(|n| HostFile {
            path: dir.path().join(format!("gone{n}")),
            ..listed[0].clone()
        });
        let listed: Vec<HostFile> = gone.chain([listed[0].clone()]).collect();
        assert_eq!(compared(&listed), []);
    }

    fn file_in(directory: &Path, name: &str) -> HostFile {
        let path = directory.join(name);
        std::fs::write(&path, name).unwrap();
        HostFile::read(&path).unwrap()
    }
}
