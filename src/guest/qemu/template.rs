//! A running QEMU's command line, turned into a template argument by argument.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::definition::{Disk, Net};
use super::facts::{BlockFact, Facts};
use super::options::{Argument, Keys};

/// The command line while it is turned into a template.
pub(super) struct Reading<'a> {
    facts: &'a Facts,
    /// File names taken in the run directory.
    names: BTreeSet<String>,
    pub(super) nets: Vec<Net>,
    pub(super) files: Vec<(String, PathBuf)>,
    /// Whether our QMP socket was met.
    pub(super) qmp: bool,
}

/// Disks, each with the index of the argument that made it.
type Placed = Vec<(Disk, Option<usize>)>;

impl<'a> Reading<'a> {
    pub(super) fn new(facts: &'a Facts) -> Self {
        Reading {
            facts,
            names: BTreeSet::new(),
            nets: Vec::new(),
            files: Vec::new(),
            qmp: false,
        }
    }

    /// Each writable disk with the argument that made it, and the arguments of
    /// nodes that exist for such a disk only.
    pub(super) fn disks(&mut self) -> (Placed, BTreeSet<usize>) {
        let arguments = &self.facts.arguments;
        let parsed: Vec<Keys> = arguments
            .iter()
            .map(|a| a.keys(implied(&a.option)))
            .collect();
        let mut placed = Vec::new();
        for block in self.facts.blocks.iter().filter(|block| !block.read_only) {
            let place =
                (0..arguments.len()).find(|&at| self.made(&arguments[at], &parsed[at], block));
            let (option, keep) = match place {
                Some(at) => kept(&arguments[at], &parsed[at]),
                None => (String::new(), Vec::new()),
            };
            placed.push((
                Disk {
                    name: if block.device.is_empty() {
                        block.node.clone()
                    } else {
                        block.device.clone()
                    },
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
            for (key, value) in parsed[at]
                .pairs()
                .iter()
                .filter(|(key, _)| key != "node-name" && key != "driver")
            {
                let below = (0..arguments.len()).find(|&other| {
                    arguments[other].option == "blockdev"
                        && parsed[other].value("node-name") == Some(value)
                });
                let Some(below) = below.filter(|_| is_child(key)) else {
                    continue;
                };
                if !tops.contains(&below) && dropped.insert(below) {
                    open.push(below);
                }
            }
        }
        (placed, dropped)
    }

    /// Did this argument make this block device?
    fn made(&self, argument: &Argument, keys: &Keys, block: &BlockFact) -> bool {
        let same_file =
            |name: &str| block.file.is_some() && block.file == Some(self.facts.absolute(name));
        match argument.option.as_str() {
            "blockdev" => keys.value("node-name") == Some(&block.node),
            "drive" => match keys.value("id") {
                Some(id) => id == block.device,
                None => keys.value("file").is_some_and(same_file),
            },
            "hda" | "hdb" | "hdc" | "hdd" | "sd" | "mtdblock" | "pflash" | "" => {
                same_file(argument.text())
            }
            _ => false,
        }
    }

    /// One argument as it goes into the template; `None` if it does not.
    pub(super) fn argument(&mut self, argument: &Argument) -> Option<Argument> {
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
                let block = keys
                    .value("id")
                    .and_then(|id| self.facts.ram.iter().find(|block| block.id == id));
                if let (Some(block), Some(_)) = (block, keys.value("mem-path")) {
                    keys.set("mem-path", &format!("{{ram:{}}}", block.id));
                    return Some(Argument::new(option, keys.text("qom-type")));
                }
            }
            "netdev" => {
                if let Some(id) = keys.value("id") {
                    let (id, kind) = (
                        id.to_owned(),
                        keys.value("type").unwrap_or_default().to_owned(),
                    );
                    let template = format!("{{net:{id}}}");
                    self.nets.push(Net {
                        id,
                        kind,
                        value: argument.text().to_owned(),
                    });
                    return Some(Argument::new(option, template));
                }
            }
            "kernel" | "initrd" | "dtb" | "bios" | "shim" | "option-rom" | "pflash" | "cdrom"
            | "fda" | "fdb" => {
                let plain = option != "option-rom";
                let name = if plain {
                    argument.text()
                } else {
                    keys.value("romfile").unwrap_or_default()
                };
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
            "fw_cfg" | "acpitable" | "smbios" | "drive" | "blockdev" => {
                return Some(self.with_files(argument, keys));
            }
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
            let Some(name) = keys.value(key).filter(|name| !name.is_empty()) else {
                continue;
            };
            let path = self.facts.absolute(name);
            if path.is_file() {
                keys.set(key, &path.display().to_string());
                self.files.push((format!("-{}", argument.option), path));
            }
        }
        Argument::new(&argument.option, keys.text(implied(&argument.option)))
    }

    fn chardev(&mut self, mut keys: Keys) -> Argument {
        let device = matches!(
            keys.value("backend"),
            Some("serial" | "tty" | "parallel" | "parport")
        );
        let socket = keys.value("backend") == Some("socket");
        if let Some(path) = keys.value("path").filter(|_| !device).map(str::to_owned) {
            let place = if socket {
                self.socket(&path)
            } else {
                self.in_run(&path)
            };
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
        let (monitor, target) = to
            .strip_prefix("mon:")
            .map_or(("", to.as_str()), |rest| ("mon:", rest));
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
        let base = Path::new(path)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
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
    matches!(last, "file" | "backing" | "data-file" | "image" | "raw")
        || key.starts_with("children.")
}

/// What stays of the option that made a disk when its image is replaced.
fn kept(argument: &Argument, keys: &Keys) -> (String, Vec<(String, String)>) {
    let legacy = |keep: &[(&str, &str)]| {
        let keep = keep
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        ("drive".to_owned(), keep)
    };
    let ide = |index: &str| legacy(&[("if", "ide"), ("index", index), ("media", "disk")]);
    match argument.option.as_str() {
        "blockdev" => {
            let wanted = [
                "node-name",
                "discard",
                "detect-zeroes",
                "cache.direct",
                "cache.no-flush",
            ];
            let keep = keys
                .pairs()
                .iter()
                .filter(|(key, _)| wanted.contains(&key.as_str()));
            ("blockdev".to_owned(), keep.cloned().collect())
        }
        "drive" => {
            let image = |key: &str| {
                matches!(key, "file" | "format" | "driver" | "snapshot" | "backing")
                    || key.starts_with("file.")
                    || key.starts_with("backing.")
            };
            (
                "drive".to_owned(),
                keys.pairs()
                    .iter()
                    .filter(|(key, _)| !image(key))
                    .cloned()
                    .collect(),
            )
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
