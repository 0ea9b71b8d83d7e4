//! A definition with its placeholders filled in: QEMU's command line at the peer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::definition::{Definition, Disk};
use super::options::{self, Argument, Keys};
use super::template::implied;

/// Seconds for which a disk waits for our NBD server to come back before the
/// guest sees an error: a restart of the daemon must not cost a guest its disk.
const RECONNECT_SECONDS: u32 = 24 * 3600;

/// Where a guest's parts are on this host.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// Directory for sockets, logs and the like.
    pub run: PathBuf,
    /// QMP socket that QEMU makes.
    pub qmp: PathBuf,
    /// RAM files by block id.
    pub ram: BTreeMap<String, PathBuf>,
    /// Disks by volume name.
    pub disks: BTreeMap<String, DiskPlacement>,
    /// `-netdev` values by id, without the id; others stay as they were.
    pub nets: BTreeMap<String, String>,
    /// MAC addresses by the id of the network that the card is on, for a guest that
    /// boots: one that goes on knows its own.
    pub macs: BTreeMap<String, String>,
    /// It boots from its disks: no state comes for it.
    pub boots: bool,
    /// Other places of files that QEMU only reads.
    pub files: BTreeMap<PathBuf, PathBuf>,
}

/// Where one disk is: a qcow2 overlay on something that is only read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlacement {
    /// The qcow2 file that takes the guest's writes.
    pub overlay: PathBuf,
    /// What the overlay does not hold.
    pub backing: Backing,
}

/// What is below an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// An NBD export on a unix socket.
    Nbd {
        /// The server's socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
    /// An image file.
    File {
        /// Its path.
        path: PathBuf,
        /// Its format, as `raw`.
        format: String,
    },
    /// Nothing: the overlay holds all (a disk that was hydrated before, or an empty one).
    Nothing,
}

/// A part of the guest that has no place here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InstantiateError {
    /// A RAM block or disk of the definition is not in the placement.
    #[error(
        "the placement names no {what} for {name}; this is an error of the caller, please report it"
    )]
    Unplaced {
        /// `RAM file` or `disk`.
        what: &'static str,
        /// Its id.
        name: String,
    },
    /// The disk did not come from the command line.
    #[error(
        "disk {0} was plugged in after QEMU was started, so that no command line makes it; restart the guest with it on the command line, then `farhaven guest add` again"
    )]
    Plugged(String),
    /// A path cannot be told to QEMU.
    #[error("{0} is no UTF-8; choose another directory")]
    Path(PathBuf),
}

impl Backing {
    /// The node's options as `-blockdev` JSON, below a qcow2 node.
    pub fn options(&self) -> Result<Option<Value>, InstantiateError> {
        Ok(Some(match self {
            Backing::Nbd { socket, export } => json!({
                "driver": "raw", "read-only": true,
                "file": {"driver": "nbd", "export": export, "reconnect-delay": RECONNECT_SECONDS,
                         "server": {"type": "unix", "path": utf8(socket)?}},
            }),
            Backing::File { path, format } => json!({
                "driver": format, "read-only": true,
                "file": {"driver": "file", "filename": utf8(path)?, "read-only": true},
            }),
            Backing::Nothing => return Ok(None),
        }))
    }
}

fn utf8(path: &Path) -> Result<&str, InstantiateError> {
    path.to_str()
        .ok_or_else(|| InstantiateError::Path(path.to_owned()))
}

impl Definition {
    /// QEMU's arguments (without the program) for this guest with these parts.
    /// It will wait for `migrate-incoming`, unless it boots, and then stay stopped until
    /// `cont`.
    ///
    /// # Errors
    /// When a part has no place.
    pub fn instantiate(&self, placement: &Placement) -> Result<Vec<String>, InstantiateError> {
        let mut options = Vec::with_capacity(self.arguments.len() + 2);
        for argument in &self.arguments {
            options.push(self.fill(argument, placement)?);
        }
        options.push(Argument {
            option: "S".to_owned(),
            value: None,
        });
        if !placement.boots {
            options.push(Argument::new("incoming", "defer"));
        }
        Ok(options::unparse(&options))
    }

    fn fill(
        &self,
        argument: &Argument,
        placement: &Placement,
    ) -> Result<Argument, InstantiateError> {
        let option = argument.option.as_str();
        let text = argument.text();
        if matches!(option, "blockdev" | "drive")
            && let Some(disk) = self
                .disks
                .iter()
                .find(|disk| text == format!("{{disk:{}}}", disk.name))
        {
            return place_disk(disk, placement);
        }
        if option == "netdev"
            && let Some(net) = self
                .nets
                .iter()
                .find(|net| text == format!("{{net:{}}}", net.id))
        {
            let value = placement.nets.get(&net.id);
            return Ok(Argument::new(
                option,
                value.map_or(net.value.clone(), |value| format!("{value},id={}", net.id)),
            ));
        }
        if option == "device"
            && placement.boots
            && let mut keys = argument.keys(implied(option))
            && let Some(mac) = keys.value("netdev").and_then(|id| placement.macs.get(id))
        {
            keys.set("mac", mac);
            return Ok(Argument::new(option, keys.text(implied(option))));
        }
        if let Some(place) = placement.files.get(Path::new(text)) {
            return Ok(Argument::new(option, utf8(place)?));
        }
        if !text.contains('{') && placement.files.is_empty() {
            return Ok(argument.clone());
        }
        // Only options that the definition rewrote are taken apart; the rest is kept verbatim.
        let first = match option {
            "object" | "chardev" | "fw_cfg" | "option-rom" | "drive" | "blockdev" | "acpitable"
            | "smbios" => implied(option),
            "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" | "debugcon" | "vnc" => "to",
            "pidfile" | "D" => {
                let place = text
                    .strip_prefix("{run}/")
                    .map(|name| placement.run.join(name));
                return place.map_or(Ok(argument.clone()), |place| {
                    Ok(Argument::new(option, utf8(&place)?))
                });
            }
            _ => return Ok(argument.clone()),
        };
        let mut keys = argument.keys(first);
        let mut changed = false;
        for (key, value) in keys.clone().pairs() {
            if let Some(place) = self.place(value, placement)? {
                keys.set(key, &place);
                changed = true;
            }
        }
        Ok(if changed {
            Argument::new(option, keys.text(first))
        } else {
            argument.clone()
        })
    }

    /// What stands for one value with a placeholder in it.
    fn place(
        &self,
        value: &str,
        placement: &Placement,
    ) -> Result<Option<String>, InstantiateError> {
        if let Some(place) = placement.files.get(Path::new(value)) {
            return Ok(Some(utf8(place)?.to_owned()));
        }
        let Some(start) = value.find('{') else {
            return Ok(None);
        };
        let (before, rest) = value.split_at(start);
        if !matches!(
            before,
            "" | "unix:" | "file:" | "pipe:" | "mon:unix:" | "mon:file:" | "mon:pipe:"
        ) {
            return Ok(None);
        }
        let place = if rest == "{qmp}" {
            placement.qmp.clone()
        } else if let Some(name) = rest.strip_prefix("{run}/") {
            placement.run.join(name)
        } else if let Some(block) = self
            .ram
            .iter()
            .find(|block| rest == format!("{{ram:{}}}", block.id))
        {
            let unplaced = || InstantiateError::Unplaced {
                what: "RAM file",
                name: block.id.clone(),
            };
            placement.ram.get(&block.id).ok_or_else(unplaced)?.clone()
        } else {
            return Ok(None);
        };
        Ok(Some(format!("{before}{}", utf8(&place)?)))
    }
}

fn place_disk(disk: &Disk, placement: &Placement) -> Result<Argument, InstantiateError> {
    if disk.option.is_empty() {
        return Err(InstantiateError::Plugged(disk.name.clone()));
    }
    let unplaced = || InstantiateError::Unplaced {
        what: "disk",
        name: disk.name.clone(),
    };
    let place = placement.disks.get(&disk.name).ok_or_else(unplaced)?;
    let mut node =
        json!({"driver": "qcow2", "file": {"driver": "file", "filename": utf8(&place.overlay)?}});
    if let Some(below) = place.backing.options()? {
        node["backing"] = below;
    }
    if disk.option == "blockdev" {
        let mut cache = serde_json::Map::new();
        for (key, value) in &disk.keep {
            let value = match value.as_str() {
                "on" if key.starts_with("cache.") => json!(true),
                "off" if key.starts_with("cache.") => json!(false),
                text => json!(text),
            };
            match key.strip_prefix("cache.") {
                Some(part) => drop(cache.insert(part.to_owned(), value)),
                None => node[key] = value,
            }
        }
        // Put in whole: a peer may have told a `cache` that is a text.
        if !cache.is_empty() {
            node["cache"] = cache.into();
        }
        return Ok(Argument::new("blockdev", node.to_string()));
    }
    let mut keys = Keys::default();
    disk.keep
        .iter()
        .for_each(|(key, value)| keys.set(key, value));
    // `-drive` wants dotted names.
    let flat = Keys::parse(&node.to_string(), "");
    flat.pairs()
        .iter()
        .for_each(|(key, value)| keys.set(key, value));
    Ok(Argument::new("drive", keys.text("")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::guest::qemu::definition::Net;

    fn disk(keep: &[(&str, &str)]) -> Disk {
        let keep = keep
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()));
        Disk {
            name: "root".to_owned(),
            node: "root".to_owned(),
            bytes: 1 << 30,
            format: "qcow2".to_owned(),
            path: None,
            option: "blockdev".to_owned(),
            keep: keep.collect(),
        }
    }

    #[test]
    fn a_card_has_another_address_only_where_the_guest_boots() {
        let net = |id: &str| Net {
            id: id.to_owned(),
            kind: "bridge".to_owned(),
            value: format!("bridge,br=br0,id={id}"),
        };
        let definition = Definition {
            nets: vec![net("lan"), net("dmz")],
            arguments: vec![
                Argument::new("netdev", "{net:lan}"),
                Argument::new("device", "virtio-net-pci,netdev=lan,mac=52:54:00:00:00:01"),
                Argument::new("device", r#"{"driver":"e1000","netdev":"dmz"}"#),
                Argument::new("device", "virtio-balloon"),
            ],
            ..Definition::sample()
        };
        let mac = |id: &str| (id.to_owned(), format!("52:54:00:00:00:{}", id.len()));
        let mut placement = Placement {
            macs: [
                ("lan".to_owned(), "52:54:00:aa:00:01".to_owned()),
                mac("dmz"),
            ]
            .into(),
            boots: true,
            ..Placement::default()
        };
        let line = definition.instantiate(&placement).unwrap().join(" ");
        assert!(line.contains("netdev=lan,mac=52:54:00:aa:00:01"), "{line}");
        assert!(line.contains(r#""mac":"52:54:00:00:00:3""#), "{line}");
        assert!(line.contains("virtio-balloon -S"), "{line}");
        placement.boots = false;
        let line = definition.instantiate(&placement).unwrap().join(" ");
        assert!(line.contains("mac=52:54:00:00:00:01"), "{line}");
        assert!(!line.contains("52:54:00:00:00:3"), "{line}");
    }

    /// A peer tells what is kept of a disk's option: it may be any nonsense.
    #[test]
    fn caching_is_told_as_a_whole_whatever_a_peer_says_of_it() {
        let place = DiskPlacement {
            overlay: "/run/root.qcow2".into(),
            backing: Backing::Nothing,
        };
        let placement = Placement {
            disks: [("root".to_owned(), place)].into(),
            ..Placement::default()
        };
        for keep in [
            &[("cache.direct", "on"), ("node-name", "root")][..],
            &[
                ("cache", "a text"),
                ("cache.direct", "on"),
                ("node-name", "root"),
            ],
        ] {
            let placed = place_disk(&disk(keep), &placement).unwrap();
            let node: Value = serde_json::from_str(placed.text()).unwrap();
            assert_eq!(node["cache"], json!({"direct": true}));
            assert_eq!(node["node-name"], "root");
        }
    }
}
