//! A guest's definition: how to launch the same machine elsewhere.
//!
//! [`Definition::read`] asks a running QEMU by QMP and `/proc` for [`Facts`];
//! [`Definition::new`] makes of them a command line whose host paths are
//! placeholders: `{ram:ID}` for RAM files, `{disk:NAME}` for disks, `{net:ID}`
//! for network back ends, `{qmp}`, and `{run}/NAME` for sockets and logs.
//! [`instantiate`](super::instantiate) fills them in at the peer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::facts::{BlockFact, Facts, FactsError};
use super::options::{Argument, Keys};
use super::qmp::Qmp;

/// How to launch a guest, wherever.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// QEMU's file name, as `qemu-system-x86_64`.
    pub program: String,
    /// QEMU's version where the guest was found: major, minor, micro.
    pub qemu: (u64, u64, u64),
    /// The versioned machine type, as `pc-q35-7.2`; an alias is resolved.
    pub machine: String,
    /// The machine type as it was asked for, when it was an alias.
    pub machine_alias: Option<String>,
    /// Whether the guest runs by KVM rather than by software emulation.
    pub kvm: bool,
    /// The CPU model with its features, if one was named.
    pub cpu: Option<String>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of guest memory.
    pub ram_bytes: u64,
    /// Blocks of guest memory.
    pub ram: Vec<RamBlock>,
    /// Writable disks.
    pub disks: Vec<Disk>,
    /// Network back ends.
    pub nets: Vec<Net>,
    /// Files that are only read, and must be the same at the peer.
    pub files: Vec<HostFile>,
    /// The command line, with placeholders.
    pub arguments: Vec<Argument>,
}

/// One block of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// The memory back end's id.
    pub id: String,
    /// Its size.
    pub bytes: u64,
    /// Its QOM type, as `memory-backend-file`; empty if QEMU made it by itself.
    pub backend: String,
    /// The file that holds it here.
    pub path: Option<PathBuf>,
    /// Whether QEMU shares it with other processes.
    pub shared: bool,
}

/// A disk that the guest may write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The volume's name: the drive's id, or else the node's name.
    pub name: String,
    /// The block node that the device uses.
    pub node: String,
    /// Virtual size.
    pub bytes: u64,
    /// The node's driver, as `qcow2`, `raw`, `throttle`.
    pub format: String,
    /// The image here.
    pub path: Option<PathBuf>,
    /// The option that made it: `blockdev`, `drive`; empty if it was plugged in later.
    pub option: String,
    /// What is kept of that option: names, caching, position.
    pub keep: Vec<(String, String)>,
}

/// A network back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Its id.
    pub id: String,
    /// Its kind, as `tap`, `user`, `bridge`.
    pub kind: String,
    /// The whole `-netdev` value, used when the peer names no other.
    pub value: String,
}

/// A file that the command line names and QEMU only reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content, in hexadecimal.
    pub blake3: String,
}

/// Why a definition could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// QEMU could not be asked.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// A file that the command line names cannot be read.
    #[error("cannot read {path}, which QEMU's {option} names: {source}. Start farhaven as a user that may read it")]
    File {
        /// The file.
        path: PathBuf,
        /// The option.
        option: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
}

impl Definition {
    /// Reads the definition of the guest behind a QMP socket.
    ///
    /// # Errors
    /// When QEMU does not answer, or its process or a file it names cannot be read.
    pub fn read(qmp: &mut Qmp) -> Result<Self, DefinitionError> {
        let facts = Facts::gather(qmp)?;
        let (mut definition, files) = Self::new(&facts);
        for (option, path) in files {
            definition.files.push(
                HostFile::read(&path).map_err(|source| DefinitionError::File { path, option, source })?,
            );
        }
        Ok(definition)
    }

    /// Makes a definition of facts; also names the files whose digests it still lacks.
    pub fn new(facts: &Facts) -> (Self, Vec<(String, PathBuf)>) {
        let mut reading = Reading { facts, names: BTreeSet::new(), nets: Vec::new(), files: Vec::new(), qmp: false };
        let (mut disks, dropped) = reading.disks();
        let mut arguments = Vec::new();
        for (at, argument) in facts.arguments.iter().enumerate() {
            if let Some(disk) = disks.iter_mut().find(|(_, place)| *place == Some(at)) {
                let option = disk.0.option.clone();
                arguments.push(Argument::new(&option, format!("{{disk:{}}}", disk.0.name)));
            } else if !dropped.contains(&at)
                && let Some(argument) = reading.argument(argument)
            {
                arguments.push(argument);
            }
        }
        if !reading.qmp {
            arguments.push(Argument::new("qmp", "unix:{qmp},server=on,wait=off"));
        }
        let last = |option: &str| facts.arguments.iter().rev().find(|argument| argument.option == option);
        let asked = facts.arguments.iter().rev().find_map(|argument| match argument.option.as_str() {
            "machine" | "M" => argument.keys("type").value("type").map(str::to_owned),
            _ => None,
        });
        if asked.is_none() {
            arguments.push(Argument::new("machine", facts.machine.clone()));
        }
        let definition = Definition {
            program: facts.program.clone(),
            qemu: facts.version,
            machine: facts.machine.clone(),
            machine_alias: asked.filter(|asked| *asked != facts.machine),
            kvm: facts.kvm,
            cpu: last("cpu").map(|argument| argument.text().to_owned()),
            vcpus: facts.vcpus,
            ram_bytes: facts.ram_bytes,
            ram: facts.ram.clone(),
            disks: disks.into_iter().map(|(disk, _)| disk).collect(),
            nets: reading.nets,
            files: Vec::new(),
            arguments,
        };
        let mut files = reading.files;
        files.sort_by(|a, b| a.1.cmp(&b.1));
        files.dedup_by(|a, b| a.1 == b.1);
        (definition, files)
    }
}

impl Definition {
    /// What it is, for people: a line each.
    pub fn summary(&self) -> Vec<String> {
        let (major, minor, micro) = self.qemu;
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let mut lines = vec![format!(
            "QEMU {major}.{minor}.{micro}, {}, {} vCPU, {} of RAM{}",
            self.machine,
            self.vcpus,
            gib(self.ram_bytes),
            if self.kvm { ", KVM" } else { "" },
        )];
        for block in &self.ram {
            let path = block.path.as_ref().map_or("no file".to_owned(), |p| p.display().to_string());
            let shared = if block.shared { "shared" } else { "NOT shared" };
            lines.push(format!("RAM   {}: {path}, {shared}", block.id));
        }
        for disk in &self.disks {
            let path = disk.path.as_ref().map_or(String::new(), |p| format!(", {}", p.display()));
            lines.push(format!("disk  {}: {}, {}{path}", disk.name, disk.format, gib(disk.bytes)));
        }
        for net in &self.nets {
            lines.push(format!("net   {}: {}", net.id, net.value));
        }
        for file in &self.files {
            lines.push(format!("file  {}: {} bytes, must be at the peer too", file.path.display(), file.bytes));
        }
        lines
    }
}

impl HostFile {
    /// Reads a file's size and digest.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let file = std::fs::File::open(path)?;
        // A pipe or a terminal would never end.
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is no plain file"));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file)?;
        Ok(HostFile { path: path.to_owned(), bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// The command line while it is turned into a template.
struct Reading<'a> {
    facts: &'a Facts,
    /// File names taken in the run directory.
    names: BTreeSet<String>,
    nets: Vec<Net>,
    files: Vec<(String, PathBuf)>,
    /// Whether our QMP socket was met.
    qmp: bool,
}

type Placed = Vec<(Disk, Option<usize>)>;

impl Reading<'_> {
    /// Each writable disk with the argument that made it, and the arguments of
    /// nodes that exist for such a disk only.
    fn disks(&mut self) -> (Placed, BTreeSet<usize>) {
        let arguments = &self.facts.arguments;
        let parsed: Vec<Keys> = arguments.iter().map(|a| a.keys(implied(&a.option))).collect();
        let mut placed = Vec::new();
        for block in self.facts.blocks.iter().filter(|block| !block.read_only) {
            let place = (0..arguments.len()).find(|&at| self.made(&arguments[at], &parsed[at], block));
            let (option, keep) = match place {
                Some(at) => kept(&arguments[at], &parsed[at]),
                None => (String::new(), Vec::new()),
            };
            placed.push((
                Disk {
                    name: if block.device.is_empty() { block.node.clone() } else { block.device.clone() },
                    node: block.node.clone(),
                    bytes: block.bytes,
                    format: block.format.clone(),
                    path: block.file.clone(),
                    option,
                    keep,
                },
                place,
            ));
        }
        let mut dropped = BTreeSet::new();
        let mut open: Vec<usize> = placed.iter().filter_map(|(_, at)| *at).collect();
        let tops = open.clone();
        while let Some(at) = open.pop() {
            for (key, value) in parsed[at].pairs().iter().filter(|(key, _)| key != "node-name" && key != "driver") {
                let below = (0..arguments.len()).find(|&other| {
                    arguments[other].option == "blockdev" && parsed[other].value("node-name") == Some(value)
                });
                let Some(below) = below.filter(|_| is_child(key)) else { continue };
                if !tops.contains(&below) && dropped.insert(below) {
                    open.push(below);
                }
            }
        }
        (placed, dropped)
    }

    /// Did this argument make this block device?
    fn made(&self, argument: &Argument, keys: &Keys, block: &BlockFact) -> bool {
        let same_file = |name: &str| block.file.is_some() && block.file == Some(self.facts.absolute(name));
        match argument.option.as_str() {
            "blockdev" => keys.value("node-name") == Some(&block.node),
            "drive" => match keys.value("id") {
                Some(id) => id == block.device,
                None => keys.value("file").is_some_and(same_file),
            },
            "hda" | "hdb" | "hdc" | "hdd" | "sd" | "mtdblock" | "pflash" | "" => same_file(argument.text()),
            _ => false,
        }
    }

    /// One argument as it goes into the template; `None` if it does not.
    fn argument(&mut self, argument: &Argument) -> Option<Argument> {
        let option = argument.option.as_str();
        let mut keys = argument.keys(implied(option));
        match option {
            "S" | "daemonize" | "incoming" => return None,
            "machine" | "M" => {
                if keys.value("type").is_some() {
                    keys.set("type", &self.facts.machine);
                }
                return Some(Argument::new("machine", keys.text("type")));
            }
            "object" => {
                let block = keys.value("id").and_then(|id| self.facts.ram.iter().find(|block| block.id == id));
                if let (Some(block), Some(_)) = (block, keys.value("mem-path")) {
                    keys.set("mem-path", &format!("{{ram:{}}}", block.id));
                    return Some(Argument::new(option, keys.text("qom-type")));
                }
            }
            "netdev" => {
                if let Some(id) = keys.value("id") {
                    let (id, kind) = (id.to_owned(), keys.value("type").unwrap_or_default().to_owned());
                    let template = format!("{{net:{id}}}");
                    self.nets.push(Net { id, kind, value: argument.text().to_owned() });
                    return Some(Argument::new(option, template));
                }
            }
            "kernel" | "initrd" | "dtb" | "bios" | "shim" | "option-rom" | "pflash" | "cdrom" | "fda" | "fdb" => {
                let plain = option != "option-rom";
                let name = if plain { argument.text() } else { keys.value("romfile").unwrap_or_default() };
                let path = self.facts.absolute(name);
                // QEMU looks for firmware by bare name in its own data folder.
                if name.contains('/') || path.exists() {
                    self.files.push((format!("-{option}"), path.clone()));
                    let path = path.display().to_string();
                    return Some(match plain {
                        true => Argument::new(option, path),
                        false => {
                            keys.set("romfile", &path);
                            Argument::new(option, keys.text("romfile"))
                        }
                    });
                }
            }
            "fw_cfg" | "acpitable" | "smbios" | "drive" | "blockdev" => return Some(self.with_files(argument, keys)),
            "pidfile" | "D" => return Some(Argument::new(option, self.in_run(argument.text()))),
            "chardev" => return Some(self.chardev(keys)),
            "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" | "debugcon" | "vnc" => {
                return Some(self.stream(argument));
            }
            _ => {}
        }
        Some(argument.clone())
    }

    /// Notes the files that an option with keys reads, by absolute path.
    fn with_files(&mut self, argument: &Argument, mut keys: Keys) -> Argument {
        for key in ["file", "filename", "file.filename", "data"] {
            let Some(name) = keys.value(key).filter(|name| !name.is_empty()) else { continue };
            let path = self.facts.absolute(name);
            if path.is_file() {
                keys.set(key, &path.display().to_string());
                self.files.push((format!("-{}", argument.option), path));
            }
        }
        Argument::new(&argument.option, keys.text(implied(&argument.option)))
    }

    fn chardev(&mut self, mut keys: Keys) -> Argument {
        let device = matches!(keys.value("backend"), Some("serial" | "tty" | "parallel" | "parport"));
        let socket = keys.value("backend") == Some("socket");
        if let Some(path) = keys.value("path").filter(|_| !device).map(str::to_owned) {
            let place = if socket { self.socket(&path) } else { self.in_run(&path) };
            keys.set("path", &place);
        }
        if let Some(path) = keys.value("logfile").map(str::to_owned) {
            keys.set("logfile", &self.in_run(&path));
        }
        // QEMU would not start before somebody connects.
        if socket && keys.on("server") {
            keys.set("wait", "off");
        }
        Argument::new("chardev", keys.text("backend"))
    }

    /// `unix:PATH,server=on,…`, `file:PATH` and the like.
    fn stream(&mut self, argument: &Argument) -> Argument {
        let mut keys = argument.keys("to");
        let to = keys.value("to").unwrap_or_default().to_owned();
        let (monitor, target) = to.strip_prefix("mon:").map_or(("", to.as_str()), |rest| ("mon:", rest));
        if let Some(path) = target.strip_prefix("unix:") {
            let place = self.socket(path);
            keys.set("to", &format!("{monitor}unix:{place}"));
            if keys.on("server") && argument.option != "vnc" {
                keys.set("wait", "off");
            }
        } else if let Some((kind @ ("file" | "pipe"), path)) = target.split_once(':') {
            let place = self.in_run(path);
            keys.set("to", &format!("{monitor}{kind}:{place}"));
        } else {
            return argument.clone();
        }
        Argument::new(&argument.option, keys.text("to"))
    }

    fn socket(&mut self, path: &str) -> String {
        if !self.qmp && self.facts.absolute(path) == self.facts.qmp {
            self.qmp = true;
            return "{qmp}".to_owned();
        }
        self.in_run(path)
    }

    /// A name in the run directory that nothing else has.
    fn in_run(&mut self, path: &str) -> String {
        let base = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut name = base.clone();
        let mut number = 1;
        while !self.names.insert(name.clone()) {
            number += 1;
            name = format!("{number}-{base}");
        }
        format!("{{run}}/{name}")
    }
}

/// The key that an option's first word belongs to.
pub(super) fn implied(option: &str) -> &'static str {
    match option {
        "machine" | "M" | "netdev" | "nic" => "type",
        "accel" => "accel",
        "object" => "qom-type",
        "chardev" => "backend",
        "device" | "blockdev" => "driver",
        "cpu" => "model",
        "fw_cfg" => "name",
        "option-rom" => "romfile",
        _ => "",
    }
}

/// Keys by which one block node names another.
fn is_child(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    matches!(last, "file" | "backing" | "data-file" | "image" | "raw") || key.starts_with("children.")
}

/// What stays of the option that made a disk when its image is replaced.
fn kept(argument: &Argument, keys: &Keys) -> (String, Vec<(String, String)>) {
    let legacy = |keep: &[(&str, &str)]| {
        let keep = keep.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        ("drive".to_owned(), keep)
    };
    let ide = |index: &str| legacy(&[("if", "ide"), ("index", index), ("media", "disk")]);
    match argument.option.as_str() {
        "blockdev" => {
            let wanted = ["node-name", "discard", "detect-zeroes", "cache.direct", "cache.no-flush"];
            let keep = keys.pairs().iter().filter(|(key, _)| wanted.contains(&key.as_str()));
            ("blockdev".to_owned(), keep.cloned().collect())
        }
        "drive" => {
            let image = |key: &str| {
                matches!(key, "file" | "format" | "driver" | "snapshot" | "backing")
                    || key.starts_with("file.")
                    || key.starts_with("backing.")
            };
            ("drive".to_owned(), keys.pairs().iter().filter(|(key, _)| !image(key)).cloned().collect())
        }
        "hdb" => ide("1"),
        "hdc" => ide("2"),
        "hdd" => ide("3"),
        "sd" => legacy(&[("if", "sd")]),
        "mtdblock" => legacy(&[("if", "mtd")]),
        "pflash" => legacy(&[("if", "pflash")]),
        _ => ide("0"),
    }
}
