//! The daemon of one site: every site is source and target at once.
//!
//! [`Site`] holds what its parts share: identity, catalogue, terms, the paired
//! sites ([`remote`]), one [`driver`] task per guest that is protected from
//! here, and one [`standby`] per guest that a peer sends here. The HTTP API
//! ([`api`]) and the peers' questions ([`answer`]) call into it.

pub mod alerts;
pub mod api;
pub mod checked;
pub mod evacuate;
pub mod events;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod groups;
pub mod health;
pub mod hosted;
pub mod images;
pub mod kept;
pub mod metrics;
pub mod peers;
pub mod records;
pub mod remote;
pub mod retention;
pub mod runs;
pub mod scrub;
pub mod seed;
pub mod turn;
pub mod view;
pub mod webhook;

mod adopt;
mod answer;
mod breach;
mod commands;
mod converge;
mod cut;
mod drill;
mod driver;
mod error;
mod fencing;
mod guests;
mod handover;
pub mod limits;
mod networks;
mod operate;
mod pairing;
mod promote;
mod protect;
mod quiesce;
mod rebuild;
mod rounds;
mod sealed;
mod sound;
mod standby;
mod start;
mod status;
mod steps;
mod surroundings;
mod takeover;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use farhaven_policies::site::SiteConfig;
use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::catalogue::{Catalogue, CatalogueError, Table};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::disk::Disk;
use farhaven_storage_sync::store::Store;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::rate::RateOptions;
use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, PeerRecord, SiteKey};

use crate::activate::fence::Fence;
use crate::activate::machine::Builders;
use crate::activate::nbd::NbdServer;
use crate::guest::embedded::SharedVmm;
use crate::replicate::message::PointContext;
use driver::DriverHandle;
pub use error::SiteError;
use events::EventKind;
pub use promote::ActivateError;
use records::{Activation, PointRecord, Protection, StandbyRecord};
use remote::Remote;
use sealed::SealedTimes;
use seed::announced::Announced;
use standby::Standby;
pub use surroundings::Surroundings;

/// A running site.
pub struct Site {
    /// What it was configured with.
    pub config: SiteConfig,
    /// Terms, durable.
    pub fence: Fence,
    identity: Identity,
    node: Arc<Node>,
    catalogue: Arc<Catalogue>,
    /// Key of every digest of this site's guests.
    tracking_key: DigestKey,
    remotes: RwLock<BTreeMap<String, Arc<Remote>>>,
    /// Stores of sites whose pairing ended since this process began: open still,
    /// as guests of theirs may run on them, and opened only once.
    removed: Mutex<BTreeMap<SiteKey, Store>>,
    drivers: RwLock<BTreeMap<GuestId, DriverHandle>>,
    standbys: RwLock<BTreeMap<GuestId, Arc<Standby>>>,
    sealed: SealedTimes,
    /// Seeds that peers announced.
    seeds: Announced,
    /// Guests whose seed is being written or taken here.
    seeding: Mutex<BTreeMap<GuestId, seed::Working>>,
    exports: Arc<NbdServer>,
    limits: limits::Limits,
    /// What policy files say.
    policies: groups::InForce,
    /// Who builds embedded guests here, by their kind.
    builders: Builders,
    /// What the stores are on.
    disk: Arc<dyn Disk>,
    /// Images that are being stored.
    adding: Mutex<Vec<images::Adding>>,
    /// Held while a new guest is put into the catalogue: names are given once.
    naming: Mutex<()>,
    /// What turns round, and what was left of it.
    turns: turn::Turns,
    /// Guests whose monitor lives in this process.
    hosted: RwLock<BTreeMap<GuestId, SharedVmm>>,
    alerts: alerts::Alerts,
    scrubs: scrub::Scrubs,
    /// Terms of other sites that were heard while something ran here, until it
    /// is stopped.
    unstopped: Mutex<fencing::Unstopped>,
    /// Runs of runbooks.
    runs: runs::Runs,
    /// The newest evacuation of this process.
    evacuation: Mutex<Option<evacuate::Handle>>,
}

impl Site {
    /// Opens everything and starts to serve; returns at once. Guests inside of
    /// the daemon are built by what this crate brings: see [`hosted::builders`].
    ///
    /// # Errors
    /// See [`SiteError`]; nothing runs then.
    pub async fn start(config: SiteConfig) -> Result<Arc<Self>, SiteError> {
        Self::start_with(config, hosted::builders()).await
    }

    /// As [`Site::start`], with who builds the embedded guests that peers send
    /// here, by their kind.
    ///
    /// # Errors
    /// See [`SiteError`]; nothing runs then.
    pub async fn start_with(
        config: SiteConfig,
        builders: Builders,
    ) -> Result<Arc<Self>, SiteError> {
        Self::start_in(config, Surroundings::of_system(builders)).await
    }

    /// As [`Site::start_with`], on another disk and network than the system's.
    ///
    /// # Errors
    /// See [`SiteError`]; nothing runs then.
    pub async fn start_in(
        config: SiteConfig,
        surroundings: Surroundings,
    ) -> Result<Arc<Self>, SiteError> {
        let state = config.site.state_dir.clone();
        for (directory, key) in [
            (&state, "site.state_dir"),
            (&config.run_dir(), "site.state_dir"),
            (&config.ram_dir(), "activate.ram_dir"),
            (&config.store_dir(), "store.dir"),
        ] {
            files::usable_directory(directory).map_err(|source| SiteError::Directory {
                path: directory.clone(),
                key,
                source,
            })?;
        }
        // Whoever writes in them later may be in a hurry.
        for directory in [
            groups::handed::HAND_OVERS,
            rebuild::own::OWN_NOTES,
            evacuate::EVACUATIONS,
            scrub::SCRUBS,
        ] {
            let path = state.join(directory);
            files::private_directory(&path).map_err(|source| SiteError::Directory {
                path,
                key: "site.state_dir",
                source,
            })?;
        }
        start::clear_left_memory(&config.ram_dir());
        let identity = Identity::load_or_create(&state.join("identity"), &config.site.name)?;
        let tracking_key = files::digest_key(&state.join("identity").join("digest-key"));
        let (catalogue, report) = surroundings.catalogue(&state.join("catalogue"))?;
        if report.rebuilt || report.journal_rebuilt {
            tracing::warn!(set_aside = ?report.set_aside, "the catalogue was damaged or missing, and was rebuilt");
        }
        let fence = Fence::open(&state.join("terms"))?;
        let seeds = state.join("seeds");
        let seeds = Announced::open(&seeds).map_err(|source| SiteError::Directory {
            path: seeds,
            key: "site.state_dir",
            source,
        })?;
        let runs = runs::Runs::open(state.join("runs"))?;
        let alerts = alerts::Alerts::open(&state).map_err(|source| SiteError::Directory {
            path: state.join("events"),
            key: "site.state_dir",
            source,
        })?;
        let exports = Arc::new(NbdServer::bind(config.run_dir().join("nbd.sock"))?);
        let limits = limits::Limits::open(&config)?;
        let node = surroundings.node(&identity, node_options(&config, &limits))?;
        let site = Arc::new(Self {
            config,
            fence,
            identity,
            node: Arc::new(node),
            catalogue: Arc::new(catalogue),
            tracking_key,
            remotes: RwLock::default(),
            removed: Mutex::default(),
            drivers: RwLock::default(),
            standbys: RwLock::default(),
            sealed: SealedTimes::open(&state.join("sealed")),
            seeds,
            seeding: Mutex::default(),
            exports,
            limits,
            policies: groups::InForce::default(),
            builders: surroundings.builders,
            disk: surroundings.disk,
            adding: Mutex::default(),
            naming: Mutex::default(),
            turns: turn::Turns::default(),
            hosted: RwLock::default(),
            alerts,
            scrubs: scrub::Scrubs::default(),
            unstopped: Mutex::default(),
            runs,
            evacuation: Mutex::default(),
        });
        site.rebuild_peers()?;
        site.rebuild_own()?;
        let mut remotes = Vec::new();
        for (_, record) in site.catalogue.list::<PeerRecord>(Table::Peers)? {
            let remote = site.trust(record)?;
            site.rebuild_standbys(&remote)?;
            remotes.push(remote);
        }
        site.learn_keys()?;
        for (_, record) in site.catalogue.list::<StandbyRecord>(Table::Remote)? {
            site.restore_standby(record).await;
        }
        for (_, protection) in site.catalogue.list::<Protection>(Table::Protections)? {
            if let Err(error) = site.drive(protection) {
                tracing::error!("{error}");
            }
        }
        site.resume_runs().await;
        site.finish_hand_overs();
        // Questions are answered only from here on: a source that asks whether
        // its guest runs here must not be answered before that is known.
        for remote in remotes {
            tokio::spawn(remote.serve(Arc::downgrade(&site)));
        }
        site.resume_evacuation();
        tokio::spawn(operate::pairings(Arc::downgrade(&site)));
        tokio::spawn(turn::watch(Arc::downgrade(&site)));
        tokio::spawn(retention::prune(Arc::downgrade(&site)));
        tokio::spawn(limits::keep(Arc::downgrade(&site)));
        tokio::spawn(groups::keep(Arc::downgrade(&site)));
        tokio::spawn(watch::watch(Arc::downgrade(&site)));
        tokio::spawn(scrub::keep_scrubbing(Arc::downgrade(&site)));
        tokio::spawn(webhook::deliver(&site));
        let version = concat!("Farhaven ", env!("CARGO_PKG_VERSION"), " serves");
        site.note(EventKind::Started, &site.config.site.name, version);
        tracing::info!(
            site = %site.config.site.name,
            key = %site.key(),
            listen = %site.node.local_addr(),
            "serving"
        );
        Ok(site)
    }

    /// Ends the sessions and leaves every guest as it is, but for those that were
    /// taken over and run inside of this process: they end here. Its own end
    /// when it does.
    pub async fn shutdown(&self) {
        let guests = self.hosted_count();
        if guests > 0 {
            tracing::warn!(guests, "guests that live in this daemon end with it");
        }
        self.runs.stop().await;
        self.stop_seeding();
        // Before the drivers: their end must not look like failed moves.
        self.evacuation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Drivers let go of their guests when their command queues close.
        self.drivers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let standbys: Vec<_> = self
            .standbys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        for standby in &standbys {
            standby.stop_test().await;
        }
        self.node.shutdown().await;
        // No source is told any more how its move ended.
        for standby in &standbys {
            // A seal that waits for data would hold the store for ever.
            standby.begin_anew();
            standby.end_with_daemon().await;
        }
        let catalogue = self.catalogue.clone();
        let _ = crate::work::spawn_blocking(move || catalogue.flush()).await;
    }

    /// This site's key.
    pub fn key(&self) -> SiteKey {
        self.identity.key()
    }

    /// The UDP address that peers reach.
    pub fn local_addr(&self) -> std::net::SocketAddr {
        self.node.local_addr()
    }

    /// A site's name, by its key.
    pub fn name_of(&self, key: &SiteKey) -> String {
        if *key == self.key() {
            return self.config.site.name.clone();
        }
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        remotes
            .values()
            .find(|r| r.record.key == *key)
            .map_or_else(|| key.to_string(), |r| r.record.site.clone())
    }

    fn remote(&self, name: &str) -> Option<Arc<Remote>> {
        self.remotes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    fn store_directory(&self, key: &SiteKey) -> PathBuf {
        self.config.store_dir().join(hex(key.as_bytes()))
    }

    fn note_sealed(&self, guest: GuestId, cut_at: SystemTime) {
        self.sealed.note(guest, cut_at);
    }

    fn keep_protection(&self, protection: &Protection) -> Result<(), CatalogueError> {
        self.note_protection(protection);
        self.catalogue.put(
            Table::Protections,
            &protection.guest.to_string(),
            protection,
        )?;
        self.catalogue.flush()
    }

    fn activation(&self, guest: GuestId) -> Result<Option<Activation>, CatalogueError> {
        let known = self
            .catalogue
            .find(Table::Activations, &guest.to_string())?;
        Ok(known.or_else(|| self.noted_activation(guest)))
    }

    fn keep_activation(&self, activation: &Activation) -> Result<(), CatalogueError> {
        rebuild::note_activation(activation);
        self.catalogue.put(
            Table::Activations,
            &activation.guest.to_string(),
            activation,
        )?;
        self.catalogue.flush()
    }

    /// A point is sealed: the catalogue knows it before the peer does.
    async fn record_point(
        &self,
        header: &PointHeader,
        context: &PointContext,
    ) -> Result<(), CatalogueError> {
        let key = point_key(header.guest, header.point);
        let record = PointRecord {
            cut_at: header.cut_at_unix_ns,
            pause: context.pause,
            ram_scan: context.ram_scan,
            ram_scanned_bytes: context.ram_scanned_bytes,
            group: context.group.clone(),
            quiesced: context.quiesced,
        };
        let catalogue = self.catalogue.clone();
        crate::work::spawn_blocking(move || {
            catalogue.put(Table::Points, &key, &record)?;
            catalogue.flush()
        })
        .await
        .unwrap_or(Ok(()))
    }

    /// Sockets and copy-before-write images of a guest that runs here.
    fn run_directory(&self, guest: GuestId) -> PathBuf {
        self.config.run_dir().join(guest.to_string()).join("source")
    }
}

fn node_options(config: &SiteConfig, limits: &limits::Limits) -> NodeOptions {
    let link = &config.link;
    NodeOptions {
        listen: config.listen.address,
        link: LinkOptions {
            window_bytes: link.window.bytes() / 2,
            send_window_bytes: link.window.bytes(),
            receive_queue_bytes: usize::try_from(link.window.bytes()).unwrap_or(usize::MAX),
            keep_alive: link.keep_alive.duration(),
            idle_timeout: link.idle_timeout.duration(),
            segmentation_offload: link.gso,
            socket_buffer_bytes: usize::try_from(link.socket_buffer.bytes()).unwrap_or(usize::MAX),
            rate: RateOptions {
                cap: Some(limits.controllers()),
                initial: None,
            },
            ..LinkOptions::default()
        },
    }
}

fn point_key(guest: GuestId, point: u64) -> String {
    format!("{guest}/{point:016x}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Nanoseconds since 1970.
pub(crate) fn unix_ns(at: SystemTime) -> u64 {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// How long ago that was; zero for the future.
pub(crate) fn age(unix_ns: u64) -> Duration {
    let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(unix_ns);
    SystemTime::now().duration_since(at).unwrap_or_default()
}

/// Is anything there?
pub(crate) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
