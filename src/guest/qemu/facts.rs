//! What a running QEMU says about itself by QMP, and the kernel about its process.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::definition::RamBlock;
use super::options::{self, Argument, MAX_COMMAND_LINE};
use super::qmp::{Qmp, QmpError};

/// What a definition is made of.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// QEMU's file name.
    pub program: String,
    /// Its command line.
    pub arguments: Vec<Argument>,
    /// Its working directory: relative paths start there.
    pub directory: PathBuf,
    /// The QMP socket we came by.
    pub qmp: PathBuf,
    /// Its version.
    pub version: (u64, u64, u64),
    /// The machine type in force, versioned.
    pub machine: String,
    /// Whether KVM is in use.
    pub kvm: bool,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub ram_bytes: u64,
    /// Memory back ends.
    pub ram: Vec<RamBlock>,
    /// Block devices that hold a medium.
    pub blocks: Vec<BlockFact>,
}

/// A block device with its medium.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockFact {
    /// The drive's id, if it has one.
    pub device: String,
    /// The node that the device uses.
    pub node: String,
    /// Virtual size.
    pub bytes: u64,
    /// The node's driver.
    pub format: String,
    /// Whether the guest may not write it.
    pub read_only: bool,
    /// Its image.
    pub file: Option<PathBuf>,
}

/// Why QEMU's facts are not known.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// The QMP socket.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process behind the socket cannot be looked at.
    #[error(
        "cannot read {path} of the guest's QEMU: {source}. Run farhaven on the guest's own host, as root or as QEMU's user"
    )]
    Process {
        /// A file in /proc.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// An answer lacks something.
    #[error("QEMU's answer to {command} lacks {what}; is it a QEMU of version 7.2 or later?")]
    Answer {
        /// The command.
        command: &'static str,
        /// What is missing.
        what: &'static str,
    },
}

impl Facts {
    /// Asks QEMU and the kernel.
    ///
    /// # Errors
    /// When QEMU does not answer or its process may not be read.
    pub fn gather(qmp: &mut Qmp) -> Result<Self, FactsError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| FactsError::Process { path, source }
        };
        let pid = qmp.pid().map_err(failed(qmp.path()))?;
        let process = PathBuf::from(format!("/proc/{pid}"));
        let path = process.join("cmdline");
        let line = std::fs::read(&path).map_err(failed(&path))?;
        let mut words = options::split_command_line(&line[..line.len().min(MAX_COMMAND_LINE)]);
        let program = if words.is_empty() {
            String::new()
        } else {
            words.remove(0)
        };
        let path = process.join("cwd");
        let directory = std::fs::read_link(&path).map_err(failed(&path))?;

        let mut facts = Facts {
            program: Path::new(&program)
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            arguments: options::parse(&words),
            directory,
            qmp: std::path::absolute(qmp.path()).unwrap_or_else(|_| qmp.path().to_owned()),
            version: qmp.version(),
            ..Facts::default()
        };
        let machine = qmp.execute("qom-get", json!({"path": "/machine", "property": "type"}))?;
        let machine = machine
            .as_str()
            .ok_or(lacks("qom-get /machine type", "a name"))?;
        machine
            .strip_suffix("-machine")
            .unwrap_or(machine)
            .clone_into(&mut facts.machine);
        facts.kvm = qmp.execute("query-kvm", json!({}))?["enabled"]
            .as_bool()
            .unwrap_or(false);
        let cpus = qmp.execute("query-cpus-fast", json!({}))?;
        facts.vcpus = u32::try_from(list(&cpus).len()).unwrap_or(u32::MAX);
        let memory = qmp.execute("query-memory-size-summary", json!({}))?;
        let part = |name: &str| memory[name].as_u64().unwrap_or(0);
        facts.ram_bytes = part("base-memory").saturating_add(part("plugged-memory"));
        let backends = qmp.execute("query-memdev", json!({}))?;
        for backend in list(&backends) {
            facts.ram.push(ram_block(qmp, backend)?);
        }
        let blocks = qmp.execute("query-block", json!({}))?;
        facts.blocks = list(&blocks)
            .iter()
            .filter_map(|block| block_fact(block, &facts.directory))
            .collect();
        Ok(facts)
    }

    /// A path of the command line, as QEMU finds it.
    pub fn absolute(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn lacks(command: &'static str, what: &'static str) -> FactsError {
    FactsError::Answer { command, what }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn ram_block(qmp: &mut Qmp, backend: &Value) -> Result<RamBlock, FactsError> {
    let id = text(backend, "id").to_owned();
    let mut ask = |property: &str| {
        let path = format!("/objects/{id}");
        match qmp.execute("qom-get", json!({"path": path, "property": property})) {
            Ok(value) => Ok(value),
            // QEMU's own block, made by -m alone, is no such object; a backend
            // without a file has no mem-path.
            Err(QmpError::Refused { .. }) => Ok(Value::Null),
            Err(other) => Err(other),
        }
    };
    let path = ask("mem-path")?;
    let backend_type = ask("type")?;
    let shared = ask("share")?;
    Ok(RamBlock {
        bytes: backend["size"]
            .as_u64()
            .ok_or(lacks("query-memdev", "a size"))?,
        backend: backend_type.as_str().unwrap_or_default().to_owned(),
        path: path
            .as_str()
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        shared: shared
            .as_bool()
            .or(backend["share"].as_bool())
            .unwrap_or(false),
        id,
    })
}

fn block_fact(block: &Value, directory: &Path) -> Option<BlockFact> {
    let inserted = block.get("inserted")?;
    let node = text(inserted, "node-name").to_owned();
    Some(BlockFact {
        device: text(block, "device").to_owned(),
        node,
        bytes: inserted["image"]["virtual-size"].as_u64().unwrap_or(0),
        format: text(inserted, "drv").to_owned(),
        read_only: inserted["ro"].as_bool().unwrap_or(false),
        file: inserted["image"]["filename"]
            .as_str()
            .filter(|name| !name.is_empty() && !name.starts_with("json:"))
            .map(|name| directory.join(name)),
    })
}
