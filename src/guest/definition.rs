//! How to build a guest elsewhere, whatever its hypervisor.
//!
//! A source tells it with the guest, every recovery point carries it, and a
//! peer builds the machine from it. Written externally tagged, by the
//! hypervisor's name: `{"qemu": {…}}` or `{"embedded": {…}}`. Points and
//! catalogues of before embedded guests hold QEMU's definition without a tag;
//! those are read, too.

use serde::{Deserialize, Serialize};

use super::{embedded, qemu};

/// Most blocks of memory, and most disks, of one guest.
const MOST_PARTS: usize = 254;

/// No block of memory or disk is larger.
const LARGEST: u64 = 1 << 50;

/// A guest as it is built anew, wherever.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", from = "Written")]
pub enum Definition {
    /// A QEMU: its command line.
    Qemu(qemu::definition::Definition),
    /// A monitor in the daemon's process: what its builder needs.
    Embedded(embedded::Definition),
}

/// What is read: also a definition of before there was a choice.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Written {
    Qemu(qemu::definition::Definition),
    Embedded(embedded::Definition),
    #[serde(untagged)]
    Bare(qemu::definition::Definition),
}

impl From<Written> for Definition {
    fn from(written: Written) -> Self {
        match written {
            Written::Qemu(definition) | Written::Bare(definition) => Self::Qemu(definition),
            Written::Embedded(definition) => Self::Embedded(definition),
        }
    }
}

impl From<qemu::definition::Definition> for Definition {
    fn from(definition: qemu::definition::Definition) -> Self {
        Self::Qemu(definition)
    }
}

impl From<embedded::Definition> for Definition {
    fn from(definition: embedded::Definition) -> Self {
        Self::Embedded(definition)
    }
}

impl Definition {
    /// Who builds it: `qemu`, or the embedded guest's kind.
    pub fn kind(&self) -> &str {
        match self {
            Self::Qemu(_) => "qemu",
            Self::Embedded(definition) => &definition.kind,
        }
    }

    /// Does its monitor live in a daemon's process, and end with it?
    pub fn is_embedded(&self) -> bool {
        matches!(self, Self::Embedded(_))
    }

    /// Blocks of memory: name and bytes.
    pub fn ram(&self) -> Vec<(&str, u64)> {
        match self {
            Self::Qemu(definition) => {
                let ram = definition.ram.iter();
                ram.map(|block| (block.id.as_str(), block.bytes)).collect()
            }
            Self::Embedded(definition) => pairs(&definition.ram),
        }
    }

    /// Disks: name and bytes.
    pub fn disks(&self) -> Vec<(&str, u64)> {
        match self {
            Self::Qemu(definition) => {
                let disks = definition.disks.iter();
                disks.map(|disk| (disk.name.as_str(), disk.bytes)).collect()
            }
            Self::Embedded(definition) => pairs(&definition.disks),
        }
    }

    /// Bytes of its disks that are there to be copied, as far as their images tell: at
    /// most the disks' own size. Reads the images, and may take as long as that does.
    pub(crate) fn disk_bytes_there(&self) -> u64 {
        let there = |name: &str, bytes: u64| match self {
            Self::Qemu(definition) => {
                let disk = definition.disks.iter().find(|disk| disk.name == name);
                let image = disk.and_then(|disk| Some((disk.path.as_deref()?, &disk.format)));
                let there = image.and_then(|(path, format)| {
                    // What a guest wrote to a raw disk names no image behind it.
                    qemu::allocated::allocated(path, format == "qcow2")
                });
                there.map_or(bytes, |there| there.min(bytes))
            }
            Self::Embedded(_) => bytes,
        };
        let disks = self.disks().into_iter();
        disks.fold(0, |sum: u64, (name, bytes)| {
            sum.saturating_add(there(name, bytes))
        })
    }

    /// Bytes of memory that the guest takes.
    pub fn ram_bytes(&self) -> u64 {
        let blocks = self.ram();
        let sum = blocks
            .iter()
            .fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        match self {
            Self::Qemu(definition) => sum.max(definition.ram_bytes),
            Self::Embedded(_) => sum,
        }
    }

    /// What it is, for people: a line each.
    pub fn summary(&self) -> Vec<String> {
        match self {
            Self::Qemu(definition) => definition.summary(),
            Self::Embedded(definition) => definition.summary(),
        }
    }

    /// What no honest peer tells: such a definition is not worked with. What
    /// its builder makes of [`embedded::Definition::config`] the builder checks.
    pub fn unsound(&self) -> Option<&'static str> {
        match self {
            // The rest is checked where it becomes a command line.
            Self::Qemu(definition) => definition.unsound(),
            Self::Embedded(definition) => definition.unsound(),
        }
    }
}

fn pairs(parts: &[(String, u64)]) -> Vec<(&str, u64)> {
    parts
        .iter()
        .map(|(name, bytes)| (name.as_str(), *bytes))
        .collect()
}

impl embedded::Definition {
    /// What it is, for people: a line each.
    pub fn summary(&self) -> Vec<String> {
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        let ram = self
            .ram
            .iter()
            .fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        let mut lines = vec![format!(
            "{} guest inside of a daemon, {} vCPU, {} of RAM",
            self.kind,
            self.vcpus,
            mib(ram)
        )];
        let parts = |what: &'static str, parts: &[(String, u64)]| {
            let told = |(name, bytes): &(String, u64)| format!("{what}  {name}: {}", mib(*bytes));
            parts.iter().map(told).collect::<Vec<_>>()
        };
        lines.extend(parts("RAM ", &self.ram));
        lines.extend(parts("disk", &self.disks));
        lines
    }

    fn unsound(&self) -> Option<&'static str> {
        const UNIT: u64 = 4096;
        let twice = |parts: &[(String, u64)]| {
            let mut names: Vec<_> = parts.iter().map(|(name, _)| name).collect();
            names.sort();
            names.windows(2).any(|pair| pair[0] == pair[1])
        };
        let all = || self.ram.iter().chain(&self.disks);
        if self.config.len() > embedded::MOST_CONFIG {
            return Some("the guest's machine configuration is over the limit");
        }
        let bad_kind = self.kind.contains(char::is_control);
        if self.kind.is_empty() || self.kind.len() > 63 || bad_kind {
            return Some("that is no name for a kind of guest");
        }
        if self.ram.len() + self.disks.len() > MOST_PARTS {
            return Some("the guest has too many blocks of memory and disks");
        }
        let named = |name: &str| name.len() <= 255 && !name.contains(char::is_control);
        if all().any(|(name, bytes)| !named(name) || *bytes == 0 || *bytes > LARGEST) {
            return Some("a block of memory or a disk has no workable name or size");
        }
        if self
            .ram
            .iter()
            .any(|(_, bytes)| !bytes.is_multiple_of(UNIT))
        {
            return Some("a block of memory is no whole number of 4 KiB pages");
        }
        if self.ram.is_empty() || twice(&self.ram) || twice(&self.disks) {
            return Some("the guest has no memory, or two parts of one name");
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn embedded() -> embedded::Definition {
        embedded::Definition {
            kind: "sim".to_owned(),
            vcpus: 1,
            ram: vec![("ram".to_owned(), 1 << 20)],
            disks: vec![("disk".to_owned(), 4096)],
            config: vec![1, 2, 3],
        }
    }

    #[test]
    fn both_kinds_come_back_from_json_and_cbor() {
        for definition in [
            Definition::from(embedded()),
            Definition::from(qemu::definition::Definition::sample()),
        ] {
            let json = serde_json::to_string(&definition).unwrap();
            let back: Definition = serde_json::from_str(&json).unwrap();
            assert_eq!(back, definition);
            let mut cbor = Vec::new();
            ciborium::into_writer(&definition, &mut cbor).unwrap();
            let back: Definition = ciborium::from_reader(cbor.as_slice()).unwrap();
            assert_eq!(back, definition);
        }
    }

    #[test]
    fn what_was_written_without_a_tag_is_qemu_s() {
        let mut cbor = Vec::new();
        ciborium::into_writer(&qemu::definition::Definition::sample(), &mut cbor).unwrap();
        let back: Definition = ciborium::from_reader(cbor.as_slice()).unwrap();
        assert_eq!(
            back,
            Definition::from(qemu::definition::Definition::sample())
        );
        let back: Definition = serde_json::from_str(
            &serde_json::to_string(&qemu::definition::Definition::sample()).unwrap(),
        )
        .unwrap();
        assert_eq!(back.kind(), "qemu");
        assert!(serde_json::from_str::<Definition>("{\"xen\": {}}").is_err());
    }

    #[test]
    fn a_peer_s_nonsense_is_named() {
        assert_eq!(embedded().unsound(), None);
        let spoilt: [fn(&mut embedded::Definition); 8] = [
            |d| d.kind.clear(),
            |d| d.ram.clear(),
            |d| d.ram[0].1 = 4097,
            |d| d.ram[0].1 = 0,
            |d| d.disks[0].1 = u64::MAX,
            |d| d.ram.push(("ram".to_owned(), 4096)),
            |d| d.config = vec![0; embedded::MOST_CONFIG + 1],
            |d| d.disks = vec![("x".to_owned(), 1); 300],
        ];
        for spoil in spoilt {
            let mut definition = embedded();
            spoil(&mut definition);
            assert!(Definition::from(definition).unsound().is_some());
        }
    }
}
