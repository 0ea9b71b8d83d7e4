//! A site's configuration: what `farhaven site run --config FILE` reads.
//!
//! Loaded by [`crate::load`] from file, `FARHAVEN__TABLE__KEY` variables and
//! flags. [`SiteConfig::template`] is the commented file that `farhaven site
//! init` writes; it names every key with its default.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::alert::Severity;
use crate::bandwidth::Window;
use crate::policy::Policy;
use crate::units::{ByteSize, Period, Rate, RateLimit};

mod check;

/// Variables that configure a site begin with this and `__`.
pub const ENV_PREFIX: &str = "FARHAVEN";
/// Where sites listen unless told otherwise.
pub const DEFAULT_PORT: u16 = 4747;

/// A site: one daemon on one host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SiteConfig {
    /// Who this is.
    pub site: Site,
    /// Where peers reach it.
    pub listen: Listen,
    /// Where the command line and scripts reach it.
    pub api: Api,
    /// The WAN.
    pub link: Link,
    /// Points of peers' guests, at rest.
    pub store: Store,
    /// What guests are owed unless their own policy says otherwise.
    pub protect: Policy,
    /// Running peers' guests here.
    pub activate: Activate,
    /// A guest's network by its name, as a QEMU `-netdev` argument of this site.
    pub networks: BTreeMap<String, String>,
    /// Who is told of events.
    pub notify: Notify,
    /// What the daemon tells.
    pub log: Log,
}

/// Who a site is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Site {
    /// Its name, as peers and people call it.
    pub name: String,
    /// Keys, catalogue, terms; and the store unless that is put elsewhere.
    pub state_dir: PathBuf,
    /// Policy files: a TOML file, or a directory of them. Empty: none. `{state_dir}` and
    /// `{name}` are replaced.
    pub policy_files: PathBuf,
}

/// Where peers reach a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// UDP address for QUIC.
    pub address: SocketAddr,
    /// `host:port` under which peers reach this site, where it is behind NAT or
    /// has several addresses. Empty: the address above.
    pub advertise: Vec<String>,
}

/// Where the command line reaches a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// Unix socket. `{state_dir}` and `{name}` are replaced.
    pub socket: PathBuf,
    /// TCP address for TLS, beside the socket; empty: none.
    pub listen: String,
    /// PEM file of the certificate and what it was signed by; empty: the site
    /// makes one itself, with a key of its own.
    pub certificate: PathBuf,
    /// PEM file of the certificate's private key.
    pub key: PathBuf,
}

impl Api {
    /// Where it is served over TLS, if it is.
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

/// The WAN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// Most bits a second that this site puts on its links, all groups together, outside
    /// of windows.
    pub rate_limit: RateLimit,
    /// Times of the week with a limit of their own. They must not overlap.
    pub windows: BTreeMap<String, Window>,
    /// The time zone of all windows, like `Europe/Berlin`; empty: the host's own.
    pub time_zone: String,
    /// Most bytes on their way to one peer: at least twice rate times round-trip time.
    pub window: ByteSize,
    /// Kernel buffer of the UDP socket, each way.
    pub socket_buffer: ByteSize,
    /// Hand the kernel many packets at once; some network drivers fail at it.
    pub gso: bool,
    /// A peer that is silent for so long is away.
    pub idle_timeout: Period,
    /// Something is sent at least so often.
    pub keep_alive: Period,
}

/// Points at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// Segments and manifests. `{state_dir}` and `{name}` are replaced.
    pub dir: PathBuf,
    /// A segment is closed at this size.
    pub segment_bytes: ByteSize,
    /// Room that stays free on that filesystem: below it nothing more is taken from peers.
    pub min_free: ByteSize,
    /// Memory for the index of what a peer holds, and as much to answer it from; less costs bandwidth only.
    pub index_bytes: ByteSize,
    /// All that is stored is read and verified again after this time; 0s: only when asked.
    pub scrub_every: Period,
    /// Most that is read for that.
    pub scrub_rate: RateLimit,
}

/// Who is told of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Notify {
    /// Where events are posted, `https://HOST:PORT/PATH` or `http://`; empty: nowhere.
    pub webhook: String,
    /// Only events that are at least so bad.
    pub severity: Severity,
}

/// Running peers' guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Activate {
    /// RAM files of guests that run here, or are kept warm: a tmpfs. `{name}` is replaced.
    pub ram_dir: PathBuf,
    /// Overlays, sockets and definitions of guests that run here.
    pub run_dir: PathBuf,
    /// The emulator's binary, by path or by name.
    pub qemu: PathBuf,
    /// Most bits a second read from the store to hydrate disks in the background.
    pub hydrate_rate: RateLimit,
    /// Allow warm points here; false overrides every policy.
    pub warm: bool,
}

/// What the daemon tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`, or per module: `info,farhaven_wan=debug`.
    pub level: String,
    /// For people or for machines.
    pub format: LogFormat,
}

/// For whom the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One line of text each.
    #[default]
    Text,
    /// One JSON object each.
    Json,
}

impl Default for Site {
    fn default() -> Site {
        Site {
            name: String::new(),
            state_dir: "/var/lib/farhaven".into(),
            policy_files: PathBuf::new(),
        }
    }
}

impl Default for Listen {
    fn default() -> Listen {
        Listen {
            address: (Ipv4Addr::UNSPECIFIED, DEFAULT_PORT).into(),
            advertise: Vec::new(),
        }
    }
}

impl Default for Api {
    fn default() -> Api {
        Api {
            socket: "{state_dir}/api.sock".into(),
            listen: String::new(),
            certificate: PathBuf::new(),
            key: PathBuf::new(),
        }
    }
}

impl Default for Link {
    fn default() -> Link {
        Link {
            rate_limit: RateLimit::NONE,
            windows: BTreeMap::new(),
            time_zone: String::new(),
            window: ByteSize::from_mib(32),
            socket_buffer: ByteSize::from_mib(4),
            gso: true,
            idle_timeout: Period::from_secs(10),
            keep_alive: Period::from_secs(1),
        }
    }
}

impl Default for Store {
    fn default() -> Store {
        Store {
            dir: "{state_dir}/store".into(),
            segment_bytes: ByteSize::from_mib(64),
            min_free: ByteSize::from_mib(1024),
            index_bytes: ByteSize::from_mib(256),
            scrub_every: Period::from_secs(7 * 86_400),
            scrub_rate: RateLimit::at(Rate::from_bits(200_000_000)),
        }
    }
}

impl Default for Notify {
    fn default() -> Notify {
        Notify {
            webhook: String::new(),
            severity: Severity::Info,
        }
    }
}

impl Default for Activate {
    fn default() -> Activate {
        Activate {
            ram_dir: "/dev/shm/farhaven-{name}".into(),
            run_dir: "{state_dir}/run".into(),
            qemu: "qemu-system-x86_64".into(),
            hydrate_rate: RateLimit::NONE,
            warm: true,
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// The file that `farhaven site init` writes, but for name and directory.
const TEMPLATE: &str = include_str!("site.toml");

impl SiteConfig {
    /// The commented template; its keys have their default values.
    pub fn default_toml() -> &'static str {
        TEMPLATE
    }

    /// The template for a site of this name that keeps its state there. It
    /// loads if name and path are sound.
    pub fn template(name: &str, state_dir: &Path) -> String {
        let site = format!(
            "name = {}\nstate_dir = {}\n",
            toml::Value::from(name),
            toml::Value::from(state_dir.to_string_lossy().as_ref())
        );
        TEMPLATE.replacen(
            "# name = \"\"\n# state_dir = \"/var/lib/farhaven\"\n",
            &site,
            1,
        )
    }

    /// Where policy files are, if there are any.
    pub fn policy_files(&self) -> Option<PathBuf> {
        let path = self.expand(&self.site.policy_files);
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// The unix socket of the API.
    pub fn api_socket(&self) -> PathBuf {
        self.expand(&self.api.socket)
    }

    /// Where segments and manifests lie.
    pub fn store_dir(&self) -> PathBuf {
        self.expand(&self.store.dir)
    }

    /// Where RAM files lie.
    pub fn ram_dir(&self) -> PathBuf {
        self.expand(&self.activate.ram_dir)
    }

    /// Where overlays and sockets of running guests lie.
    pub fn run_dir(&self) -> PathBuf {
        self.expand(&self.activate.run_dir)
    }

    fn expand(&self, path: &Path) -> PathBuf {
        let Some(text) = path.to_str() else {
            return path.to_owned();
        };
        text.replace("{state_dir}", &self.site.state_dir.to_string_lossy())
            .replace("{name}", &self.site.name)
            .into()
    }
}
