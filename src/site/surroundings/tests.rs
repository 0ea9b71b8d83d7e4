//! Two whole sites in one process, for tests that look inside of one of them.

use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use farhaven_policies::site::SiteConfig;
use farhaven_policies::units::ByteSize;
use farhaven_storage_sync::unit::GuestId;

use crate::activate::fence::Term;
use crate::activate::machine::{BuildPlan, Builder, Builders, Machine, MachineError};
use crate::guest::embedded::{self, SharedVmm};
use crate::guest::qemu::check::Finding;
use crate::guest::sim::{KIND, SimBuilder, SimGuest, SimOptions, Workload};
use crate::site::Site;
use crate::site::standby::Standby;

/// Waits long: machines are busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// East and west, paired. The guest 'web' is protected from east; west has points of it.
pub(in crate::site) struct Stage {
    pub(in crate::site) east: Arc<Site>,
    pub(in crate::site) west: Arc<Site>,
    pub(in crate::site) web: GuestId,
    /// Its monitor at east.
    pub(in crate::site) guest: SharedVmm,
    /// So many machines from here on cannot be built at west.
    pub(in crate::site) bad_builds: Arc<AtomicU32>,
    _dir: tempfile::TempDir,
}

impl Stage {
    pub(in crate::site) async fn protected() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bad_builds = Arc::new(AtomicU32::new(0));
        let builder: Arc<dyn Builder> = Arc::new(At(bad_builds.clone()));
        let builders = Builders::from([(KIND.to_owned(), builder)]);
        let east = config(dir.path(), "east");
        let east = Site::start_with(east, Builders::new()).await.unwrap();
        let west = config(dir.path(), "west");
        let west = Site::start_with(west, builders).await.unwrap();
        let invitation = west.invite(Duration::from_secs(60)).unwrap();
        east.pair(&invitation).await.unwrap();
        let (guest, definition) = SimGuest::start(SimOptions {
            seed: 7,
            ram_bytes: 1 << 20,
            disks: vec![("disk".to_owned(), 1 << 20)],
            workload: Workload::Idle,
            run: dir.path().join("guest"),
            ram: dir.path().join("guest-ram"),
        })
        .unwrap();
        let record = east.embed("web", guest.clone(), definition).unwrap();
        let rpo = "1s".parse().unwrap();
        let linked = || {
            let remote = east.remote("west");
            remote.is_some_and(|remote| remote.connected())
        };
        until("the link", linked).await;
        east.protect("web", "west", Some(rpo)).await.unwrap();
        until("three points", || {
            east.source_view(&record).points_sealed >= 3
        })
        .await;
        Self {
            east,
            west,
            web: record.id,
            guest,
            bad_builds,
            _dir: dir,
        }
    }

    /// What west has of it.
    pub(in crate::site) fn standby(&self) -> Arc<Standby> {
        self.west.standby_named("web").unwrap()
    }

    /// A term by which it is east's, after the one that west knows.
    pub(in crate::site) fn newer(&self) -> Term {
        let known = self.west.fence.current(self.web).unwrap();
        Term {
            number: known.number + 1,
            owner: self.east.key(),
            ..known
        }
    }

    pub(in crate::site) async fn end(self) {
        self.east.shutdown().await;
        self.west.shutdown().await;
    }
}

pub(in crate::site) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn config(directory: &Path, name: &str) -> SiteConfig {
    let mut config = SiteConfig::default();
    config.site.name = name.to_owned();
    config.site.state_dir = directory.join(name);
    config.activate.ram_dir = directory.join(name).join("ram");
    config.store.min_free = ByteSize::from_mib(1);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    config.listen.address = socket.local_addr().unwrap();
    config.listen.advertise = vec![config.listen.address.to_string()];
    config
}

/// Who builds sim guests, and cannot so many times.
struct At(Arc<AtomicU32>);

impl Builder for At {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let one_less = |left: u32| left.checked_sub(1);
        let order = Ordering::SeqCst;
        match self.0.fetch_update(order, order, one_less) {
            Ok(_) => Err(MachineError::Other("as the test asked".to_owned())),
            Err(_) => SimBuilder.build(plan),
        }
    }

    fn check(&self, definition: &embedded::Definition) -> Vec<Finding> {
        SimBuilder.check(definition)
    }
}
