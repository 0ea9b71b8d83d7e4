//! A guest's definition: how to launch the same machine elsewhere.
//!
//! [`Definition::read`] asks a running QEMU by QMP and `/proc` for [`Facts`];
//! [`Definition::new`] makes of them a command line whose host paths are
//! placeholders: `{ram:ID}` for RAM files, `{disk:NAME}` for disks, `{net:ID}`
//! for network back ends, `{qmp}`, and `{run}/NAME` for sockets and logs.
//! [`instantiate`](super::instantiate) fills them in at the peer.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::facts::{Facts, FactsError};
use super::options::{Argument, is_workable};
use super::qmp::Qmp;
use super::template::Reading;

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
    #[error(
        "cannot read {path}, which QEMU's {option} names: {source}. Start farhaven as a user that may read it"
    )]
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
            definition
                .files
                .push(
                    HostFile::read(&path).map_err(|source| DefinitionError::File {
                        path,
                        option,
                        source,
                    })?,
                );
        }
        Ok(definition)
    }

    /// Makes a definition of facts; also names the files whose digests it still lacks.
    pub fn new(facts: &Facts) -> (Self, Vec<(String, PathBuf)>) {
        let mut reading = Reading::new(facts);
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
        let last = |option: &str| {
            facts
                .arguments
                .iter()
                .rev()
                .find(|argument| argument.option == option)
        };
        let asked =
            facts
                .arguments
                .iter()
                .rev()
                .find_map(|argument| match argument.option.as_str() {
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
    /// What no honest peer tells, and what it would take endless time or memory to work with.
    pub(in crate::guest) fn unsound(&self) -> Option<&'static str> {
        const MOST_PARTS: usize = 1024;
        let parts = [self.ram.len(), self.disks.len(), self.nets.len()];
        if parts.iter().any(|count| *count > MOST_PARTS) || self.arguments.len() > 1 << 16 {
            return Some("the guest has too many blocks of memory, disks, networks or options");
        }
        let nets = self.nets.iter().map(|net| net.value.as_str());
        let texts = self.arguments.iter().map(Argument::text).chain(nets);
        (!texts.into_iter().all(is_workable))
            .then_some("an option of the guest's command line has absurdly many keys")
    }

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
            let path = block
                .path
                .as_ref()
                .map_or("no file".to_owned(), |p| p.display().to_string());
            let shared = if block.shared { "shared" } else { "NOT shared" };
            lines.push(format!("RAM   {}: {path}, {shared}", block.id));
        }
        for disk in &self.disks {
            let path = disk
                .path
                .as_ref()
                .map_or(String::new(), |p| format!(", {}", p.display()));
            lines.push(format!(
                "disk  {}: {}, {}{path}",
                disk.name,
                disk.format,
                gib(disk.bytes)
            ));
        }
        for net in &self.nets {
            lines.push(format!("net   {}: {}", net.id, net.value));
        }
        for file in &self.files {
            lines.push(format!(
                "file  {}: {} bytes, must be at the peer too",
                file.path.display(),
                file.bytes
            ));
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
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "it is no plain file",
            ));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file)?;
        Ok(HostFile {
            path: path.to_owned(),
            bytes: hasher.count(),
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }

    /// The file of that name here, for a peer: itself where it is the same, else only
    /// that it is another. Nothing else of this host's files is told.
    pub fn compared(&self) -> Option<Self> {
        let about = std::fs::metadata(&self.path).ok()?;
        let other = HostFile {
            path: self.path.clone(),
            bytes: 0,
            blake3: String::new(),
        };
        if !about.is_file() {
            return None;
        }
        if about.len() != self.bytes {
            return Some(other);
        }
        let here = Self::read(&self.path).ok()?;
        Some(if here == *self { here } else { other })
    }
}

#[cfg(test)]
impl Definition {
    /// The least of one.
    pub(crate) fn sample() -> Self {
        Self {
            program: "qemu-system-x86_64".to_owned(),
            qemu: (7, 2, 0),
            machine: "pc-q35-7.2".to_owned(),
            machine_alias: None,
            kvm: false,
            cpu: None,
            vcpus: 1,
            ram_bytes: 1 << 20,
            ram: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            files: Vec::new(),
            arguments: Vec::new(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use super::*;

    #[test]
    fn a_peer_hears_of_a_file_here_only_whether_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bios.bin");
        std::fs::write(&path, b"here").unwrap();
        let of = |path: &Path, bytes, blake3: &str| HostFile {
            path: path.to_owned(),
            bytes,
            blake3: blake3.to_owned(),
        };
        let here = HostFile::read(&path).unwrap();
        assert_eq!(here.compared(), Some(here.clone()));
        // That there is another, and neither its length nor what is in it.
        let another = Some(of(&path, 0, ""));
        let theirs = blake3::hash(b"else").to_hex().to_string();
        assert_eq!(of(&path, 4, &theirs).compared(), another);
        assert_eq!(of(&path, 5, &here.blake3).compared(), another);
        let gone = dir.path().join("gone");
        assert_eq!(of(&gone, 4, &here.blake3).compared(), None);
        let bytes = std::fs::metadata(dir.path()).unwrap().len();
        assert_eq!(of(dir.path(), bytes, "").compared(), None);
    }

    #[test]
    fn a_file_of_another_length_is_not_read_for_a_peer() {
        // Its length is told as 0, and nothing of it can be read from its begin on.
        let memory = Path::new("/proc/self/mem");
        assert!(HostFile::read(memory).is_err());
        let theirs = HostFile {
            path: memory.to_owned(),
            bytes: 1,
            blake3: String::new(),
        };
        let told = theirs.compared().unwrap();
        assert_eq!((told.path.as_path(), told.bytes), (memory, 0));
    }
}
