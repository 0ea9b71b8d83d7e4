//! Policy files: named policies, protection groups, peer sites, thresholds of alerts.
//!
//! Written by operators as one TOML file or a directory of them, laid over each
//! other in order of names, and over them `FARHAVEN__…` variables. [`PolicyFiles::read`]
//! loads and checks them; [`PolicyFiles::schema`] describes them to editors;
//! [`show`] says what is in force for a group and where each value came from.
//! Everything that has parts has names instead of places in a list, so that a
//! later file, a variable and a mistake can name exactly one of them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

use crate::keep::Schedule;
use crate::load::{Checked, LoadError, Loaded, files_of, load_files};
use crate::site::ENV_PREFIX;
use crate::units::{ByteSize, Period, RateLimit};

pub use crate::bandwidth::Window;

mod check;
mod force;
mod order;
pub mod show;

pub use self::order::start_order;

/// All that policy files say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyFiles {
    /// What groups are owed, by names that groups refer to.
    pub policies: BTreeMap<String, NamedPolicy>,
    /// Guests that are cut at the same instant and moved together.
    pub groups: BTreeMap<String, Group>,
    /// Sites that groups go to, by the names that they are paired under.
    pub sites: BTreeMap<String, PeerSite>,
    /// When to raise an alert.
    pub alerts: Alerts,
}

/// What a protection group is owed, and what it may cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NamedPolicy {
    /// Recovery point objective: the newest sealed point is to be no older than this.
    pub rpo: Period,
    /// What is copied.
    pub mode: Mode,
    /// Which points are kept: "all for 1h, hourly for 24h, daily for 7d".
    pub retention: Schedule,
    /// Most that the group puts on the link, outside of windows.
    pub bandwidth: RateLimit,
    /// Most of the link that the group may take, in percent.
    pub share: u8,
    /// Times of the week with a bandwidth of their own. They must not overlap.
    pub windows: BTreeMap<String, Window>,
    /// Longest pause of a guest in one cut that is worth no remark.
    pub max_pause: Period,
    /// Longest time in which a guest runs nowhere during a planned move.
    pub max_blackout: Period,
    /// Percent of its processor time that a guest may lose so that a move ends (0 to 95).
    pub max_throttle: u8,
    /// Whether filesystems are frozen for each cut.
    pub quiesce: Quiesce,
    /// A guest agent that has not frozen them by then is not waited for.
    pub quiesce_timeout: Period,
    /// Whether the newest point's memory is kept ready at the peer.
    pub standby: Standby,
    /// Memory for changes that are not yet sent; when it is full the RPO stretches.
    pub capture_buffer: ByteSize,
    /// Its share where groups want more of the link than there is: in proportion to this.
    /// 0 gets what the others leave.
    pub priority: u8,
    /// After a move or a failover: how long it can be rolled back before somebody
    /// is reminded to commit it.
    pub commit_window: Period,
    /// Commit by itself when that time is over.
    pub commit_when_over: bool,
    /// Where a guest is not healthy in time while its group is started: whether those
    /// that start after it are started all the same.
    pub on_error: OnError,
}

/// What is done about a guest that is not healthy while its group is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Those that start after it are not started; all others are.
    #[default]
    Stop,
    /// They are started all the same.
    Continue,
}

/// What is copied of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Memory, device state and disks: it goes on where it was.
    #[default]
    Memory,
    /// Disks: it boots.
    DiskOnly,
}

/// Whether filesystems are frozen for each cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Quiesce {
    /// They are not: points are crash-consistent.
    #[default]
    None,
    /// The guest agent freezes them: points are application-consistent.
    Agent,
}

/// Whether the newest point's memory is kept ready in RAM at the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Standby {
    /// Where memory is copied at all.
    #[default]
    Auto,
    /// It is: a faster failover for as much memory as the guest has.
    Warm,
    /// It is not.
    Cold,
}

/// Guests that are cut at the same instant and moved together.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Group {
    /// Its policy, by name.
    pub policy: String,
    /// Where it goes: the name of a site.
    pub peer: String,
    /// Its guests, by name.
    pub guests: BTreeMap<String, Member>,
}

/// A guest of a group.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Member {
    /// Guests of the same group that are healthy before it starts.
    pub after: Vec<String>,
    /// How to tell that it is healthy: all of these, by names of the operator's choice.
    pub health: BTreeMap<String, Health>,
    /// By peer, then by the network's name in the guest's definition: what it is there.
    pub networks: BTreeMap<String, BTreeMap<String, Network>>,
}

/// A health check: exactly one of tcp, http, agent and script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// `host:port` that accepts a connection.
    pub tcp: Option<String>,
    /// A URL that answers with a status from 200 to 399.
    pub http: Option<String>,
    /// The guest agent answers.
    pub agent: Option<bool>,
    /// A program of the site, with its arguments, that ends with status 0.
    pub script: Option<Vec<String>>,
    /// Time from one try to the next.
    pub every: Period,
    /// A guest that is not healthy by then has failed.
    pub timeout: Period,
}

/// A guest's network at a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// The peer's bridge.
    pub bridge: String,
    /// Another MAC address there, for a guest that boots there (mode `disk-only`); one
    /// that goes on in the midst of its work keeps the one that it knows. Empty: the
    /// same as here.
    pub mac: String,
    /// Its addresses there, like 10.8.0.5/24: told to the programs of its health checks.
    pub addresses: Vec<String>,
}

/// Most bytes of an interface's name in Linux.
const LONGEST_INTERFACE: usize = 15;

/// May this be the name of a bridge, and nothing but that? What is put into a
/// netdev's value must not bring options of its own.
pub fn is_bridge_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    (1..=LONGEST_INTERFACE).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with(['-', '.'])
}

/// The bytes of a MAC address like 52:54:00:12:34:56.
pub fn mac_bytes(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut bytes {
        let pair = pairs.next()?;
        let hexadecimal = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = hexadecimal
            .then(|| u8::from_str_radix(pair, 16).ok())
            .flatten()?;
    }
    pairs.next().is_none().then_some(bytes)
}

/// May a network card have this MAC address? Not one of many.
pub fn is_card_address(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0
}

/// Is this an address with the bits of its network, like 10.8.0.5/24?
pub fn is_network_address(text: &str) -> bool {
    text.split_once('/').is_some_and(|(ip, bits)| {
        let most = ip
            .parse::<IpAddr>()
            .map(|ip| if ip.is_ipv4() { 32 } else { 128 });
        let plain = bits.bytes().all(|digit| digit.is_ascii_digit());
        most.is_ok_and(|most| plain && bits.parse::<u8>().is_ok_and(|bits| bits <= most))
    })
}

/// A site that groups go to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PeerSite {
    /// For people.
    pub description: String,
    /// `host:port` under which it is reached.
    pub addresses: Vec<String>,
    /// Most that all groups together put on the link to it.
    pub bandwidth: RateLimit,
}

/// When to raise an alert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Alerts {
    /// A warning when the newest point is older than so many times the RPO.
    pub rpo_warning: u8,
    /// Critical when it is older than so many times.
    pub rpo_critical: u8,
    /// A group without any sealed point for so long.
    pub unprotected_after: Period,
    /// The last good test is older than this.
    pub test_overdue: Period,
    /// A warning when so many percent of the store's filesystem are used.
    pub store_warning: u8,
    /// Critical at so many percent.
    pub store_critical: u8,
    /// Clocks of two sites differ by more than this.
    pub clock_skew: Period,
}

impl Default for NamedPolicy {
    fn default() -> NamedPolicy {
        NamedPolicy {
            rpo: Period::from_secs(10),
            mode: Mode::Memory,
            retention: Schedule::default(),
            bandwidth: RateLimit::NONE,
            share: 100,
            windows: BTreeMap::new(),
            max_pause: Period::from_millis(100),
            max_blackout: Period::from_millis(500),
            max_throttle: 80,
            quiesce: Quiesce::None,
            quiesce_timeout: crate::policy::QUIESCE_TIMEOUT,
            standby: Standby::Auto,
            capture_buffer: ByteSize::from_mib(64),
            priority: 100,
            commit_window: crate::policy::COMMIT_WINDOW,
            commit_when_over: false,
            on_error: OnError::Stop,
        }
    }
}

impl Default for Health {
    fn default() -> Health {
        Health {
            tcp: None,
            http: None,
            agent: None,
            script: None,
            every: Period::from_secs(2),
            timeout: Period::from_secs(60),
        }
    }
}

impl Default for Alerts {
    fn default() -> Alerts {
        Alerts {
            rpo_warning: 2,
            rpo_critical: 3,
            unprotected_after: Period::from_secs(300),
            test_overdue: Period::from_secs(30 * 86_400),
            store_warning: 80,
            store_critical: 95,
            clock_skew: Period::from_secs(1),
        }
    }
}

impl PolicyFiles {
    /// Loads and checks a file, or the `.toml` files of a directory in order of
    /// names, with `FARHAVEN__…` variables over them.
    ///
    /// # Errors
    /// See [`LoadError`]; mistakes are all reported at once.
    pub fn read(path: &Path) -> Result<Loaded<PolicyFiles>, LoadError> {
        load_files(&files_of(path, PolicyFiles::HELP)?, ENV_PREFIX, &[])
    }

    /// What may be in the files, for editors: a JSON Schema.
    pub fn schema() -> Schema {
        let mut schema = schema_for!(PolicyFiles);
        schema.insert("title".into(), "Farhaven policy files".into());
        schema
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_name_brings_no_options() {
        for good in ["br0", "vlan.12", "lan-a_b"] {
            assert!(is_bridge_name(good), "{good}");
        }
        for bad in [
            "",
            "br0,helper=/x",
            "a/b",
            "-br",
            "..",
            "sixteen-letters-",
            "a b",
            "a=b",
        ] {
            assert!(!is_bridge_name(bad), "{bad}");
        }
    }
}
