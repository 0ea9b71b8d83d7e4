//! Guests whose monitor lives in the process, in two whole sites of one
//! process: protected, moved, taken over, fenced, ended.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod alerts;
mod api;
mod bad_peers;
mod counter;
mod drills;
mod evacuations;
mod group_moves;
mod group_verbs;
mod groups;
mod images;
mod limits;
mod mended;
mod overruled;
mod rebuilds;
mod scrubs;
mod seeds;
mod silence;
mod turns;

use std::net::UdpSocket;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use counter::{Counter, CounterBuilder, KIND};
use farhaven::activate::machine::{Builder, Builders};
use farhaven::guest::embedded::{Definition, SharedVmm, Vmm};
use farhaven::site::Site;
use farhaven::site::view::{Phase, PointView, SourceView, TargetView};
use farhaven_policies::site::SiteConfig;
use farhaven_policies::units::ByteSize;

const PATIENCE: Duration = Duration::from_secs(30);

/// A site of this process.
async fn site(directory: &Path, name: &str, builders: Builders) -> Arc<Site> {
    Site::start_with(config(directory, name), builders)
        .await
        .unwrap()
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

fn builders(builder: &CounterBuilder) -> Builders {
    let builder: Arc<dyn Builder> = Arc::new(builder.clone());
    Builders::from([(KIND.to_owned(), builder)])
}

async fn until<T>(what: &str, mut wanted: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = wanted() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn source(site: &Site, name: &str) -> SourceView {
    let view = site.view();
    view.guests.into_iter().find(|g| g.name == name).unwrap()
}

fn target(site: &Site, name: &str) -> TargetView {
    let view = site.view();
    view.standbys.into_iter().find(|g| g.name == name).unwrap()
}

/// East and west, paired; a counting guest at east.
struct Stage {
    east: Arc<Site>,
    west: Arc<Site>,
    /// What west builds.
    at_west: CounterBuilder,
    guest: Arc<Mutex<Counter>>,
    definition: Definition,
    dir: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Self {
        Self::set_paired(false).await
    }

    /// One that is started again has another address: it must be the one that dials.
    async fn set_paired(west_dials: bool) -> Self {
        Self::set_with(west_dials, CounterBuilder::default()).await
    }

    async fn set_with(west_dials: bool, at_west: CounterBuilder) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let east = site(dir.path(), "east", Builders::new()).await;
        let west = site(dir.path(), "west", builders(&at_west)).await;
        Self::pair(dir, east, west, at_west, west_dials).await
    }

    /// One with other bounds of what is kept of digests: west's, and east's in bytes.
    async fn set_sized(west_dials: bool, west_index: ByteSize, east_index: u64) -> Self {
        let (dir, at_west) = (tempfile::tempdir().unwrap(), CounterBuilder::default());
        let (mut of_east, mut of_west) = (config(dir.path(), "east"), config(dir.path(), "west"));
        of_east.store.index_bytes = ByteSize::from_bytes(east_index);
        of_west.store.index_bytes = west_index;
        let east = Site::start_with(of_east, Builders::new()).await.unwrap();
        let west = Site::start_with(of_west, builders(&at_west)).await.unwrap();
        Self::pair(dir, east, west, at_west, west_dials).await
    }

    async fn pair(
        dir: tempfile::TempDir,
        east: Arc<Site>,
        west: Arc<Site>,
        at_west: CounterBuilder,
        west_dials: bool,
    ) -> Self {
        let (host, dials) = match west_dials {
            true => (&east, &west),
            false => (&west, &east),
        };
        let invitation = host.invite(Duration::from_secs(60)).unwrap();
        dials.pair(&invitation).await.unwrap();
        until("the pairing", || {
            (!east.view().peers.is_empty()).then_some(())
        })
        .await;
        until("the link", || east.view().peers[0].connected.then_some(())).await;
        let (guest, definition) = Counter::start(dir.path());
        Self {
            east,
            west,
            at_west,
            guest,
            definition,
            dir,
        }
    }

    fn vmm(&self) -> SharedVmm {
        self.guest.clone()
    }

    /// Protected, with some points.
    async fn protected() -> Self {
        Self::set().await.protect().await
    }

    async fn protect(self) -> Self {
        let stage = self;
        let embedded = stage
            .east
            .embed("web", stage.vmm(), stage.definition.clone());
        embedded.unwrap();
        let rpo = "1s".parse().unwrap();
        stage.east.protect("web", "west", Some(rpo)).await.unwrap();
        let east = stage.east.clone();
        until("three points", || {
            (source(&east, "web").points_sealed >= 3).then_some(())
        })
        .await;
        stage
    }

    async fn end(self) {
        self.east.shutdown().await;
        self.west.shutdown().await;
    }
}

fn sound(counter: &Arc<Mutex<Counter>>) -> u64 {
    let counter = counter.lock().unwrap();
    assert_eq!(counter.fault(), None);
    counter.count()
}

async fn counts_on(counter: &Arc<Mutex<Counter>>) -> u64 {
    let before = sound(counter);
    until("it counts on", || {
        (sound(counter) > before + 60).then_some(())
    })
    .await;
    before
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_move_loses_nothing_and_keeps_the_source_stopped() {
    let stage = Stage::protected().await;
    let report = stage.east.move_guest("web", true).await.unwrap();
    let last = stage.guest.lock().unwrap().count();
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    let there = stage.at_west.newest();
    assert!(counts_on(&there).await >= last);
    let active = target(&stage.west, "web").active.unwrap();
    assert_eq!((active.pid, active.qmp), (None, None));
    assert_eq!(source(&stage.east, "web").phase, Phase::Moved);
    assert!(report.note.is_empty(), "{}", report.note);
    let west = stage.west.clone();
    until("hydrated", || {
        let active = target(&west, "web").active.unwrap();
        active.hydrated.then_some(())
    })
    .await;
    counts_on(&there).await;
    stage.west.commit("web", true).await.unwrap();
    assert_eq!(stage.guest.lock().unwrap().running(), None);
    // Nobody but the engine and this test held on to the guest.
    assert_eq!(Arc::strong_count(&stage.guest), 1);
    stage.west.end_guest("web").await.unwrap();
    assert_eq!(there.lock().unwrap().running(), None);
    assert!(target(&stage.west, "web").active.is_none());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_by_force_stops_the_source_and_keeps_it() {
    let stage = Stage::protected().await;
    let refused = stage.west.fail_over("web", None, false).await;
    assert!(refused.unwrap_err().to_string().contains("is alive"));
    let report = stage.west.fail_over("web", None, true).await.unwrap();
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    let stopped = sound(&stage.guest);
    let there = stage.at_west.newest();
    counts_on(&there).await;
    assert_eq!(report.pid, None);
    let east = stage.east.clone();
    let view = until("fenced", || {
        let view = source(&east, "web");
        (view.phase == Phase::Fenced).then_some(view)
    })
    .await;
    assert!(view.trouble.contains("was stopped"), "{}", view.trouble);
    assert_eq!(sound(&stage.guest), stopped);
    // A copy that is fenced is not given to another under its name.
    let (other, definition) = Counter::start(&stage.dir.path().join("other"));
    let taken = stage.east.embed("web", other, definition);
    assert!(taken.unwrap_err().to_string().contains("here already"));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_site_s_guest_runs_on_and_a_restart_says_what_became_of_it() {
    let stage = Stage::protected().await;
    stage.east.shutdown().await;
    drop(stage.east);
    stage.guest.lock().unwrap().end();
    let west = stage.west.clone();
    until("the link is down", || {
        (!west.view().peers[0].connected).then_some(())
    })
    .await;
    west.fail_over("web", None, false).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    west.shutdown().await;
    stage.at_west.newest().lock().unwrap().end();
    drop((west, stage.west));

    // Both daemons begin anew: neither has the guest.
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    let view = target(&west, "web");
    assert!(view.active.is_none());
    assert!(view.trouble.contains("ended with it"), "{}", view.trouble);
    west.fail_over("web", None, false).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    assert_eq!(stage.at_west.built.lock().unwrap().len(), 2);

    let east = site_again(stage.dir.path(), "east", Builders::new()).await;
    until("fenced or lost", || {
        let view = source(&east, "web");
        matches!(view.phase, Phase::Fenced | Phase::Lost).then_some(())
    })
    .await;
    east.shutdown().await;
    west.shutdown().await;
}

/// A site on a directory that was a site's before.
async fn site_again(directory: &Path, name: &str, builders: Builders) -> Arc<Site> {
    // Its database is closed when the last task of the one before has ended.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Site::start_with(config(directory, name), builders.clone()).await {
            Ok(site) => return site,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_peer_cannot_build_is_named_before() {
    let stage = Stage::set().await;
    let made = std::cell::Cell::new(0);
    let embed = |name: &str, definition: Definition| {
        made.set(made.get() + 1);
        let directory = stage.dir.path().join(format!("guest{}", made.get()));
        let (guest, _) = Counter::start(&directory);
        stage.east.embed(name, guest, definition)
    };
    let mut other = stage.definition.clone();
    other.kind = "abacus".to_owned();
    embed("other", other).unwrap();
    let findings = stage.east.check_guest("other", None).await.unwrap();
    let named = findings.iter().find(|f| f.code == "peer-kind").unwrap();
    assert!(named.what.contains("abacus") && named.what.contains(KIND));
    let refused = stage.east.protect("other", "west", None).await;
    assert!(refused.unwrap_err().to_string().contains("abacus"));

    let mut weak = stage.definition.clone();
    weak.config = b"cannot".to_vec();
    embed("weak", weak).unwrap();
    let refused = stage.east.protect("weak", "west", None).await;
    assert!(refused.unwrap_err().to_string().contains("teach it"));

    // What is told must be what is there.
    for spoil in [
        |d: &mut Definition| d.ram[0].1 *= 2,
        |d: &mut Definition| d.disks.clear(),
        |d: &mut Definition| d.ram.clear(),
        |d: &mut Definition| d.config = vec![0; 1 << 20],
    ] {
        let mut definition = stage.definition.clone();
        spoil(&mut definition);
        assert!(embed("spoilt", definition).is_err());
    }
    assert!(embed("-odd name", stage.definition.clone()).is_err());
    assert!(embed("weak", stage.definition.clone()).is_err());
    stage.east.end_guest("weak").await.unwrap();
    assert!(stage.east.guest("weak").is_err());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_leaves_a_lost_guest_that_its_program_may_bring_back() {
    let stage = Stage::protected().await;
    let points = source(&stage.east, "web").newest_point;
    stage.east.shutdown().await;
    drop(stage.east);
    stage.guest.lock().unwrap().end();
    let east = site_again(stage.dir.path(), "east", Builders::new()).await;
    let view = until("lost", || {
        let view = source(&east, "web");
        (view.phase == Phase::Lost).then_some(view)
    })
    .await;
    assert!(
        view.trouble.contains("inside this daemon"),
        "{}",
        view.trouble
    );
    let findings = east.check_guest("web", Some("west")).await.unwrap();
    assert!(findings.iter().any(|f| f.code == "guest-lost"));

    // The same machine begins anew under its record: its points go on.
    let (again, definition) = Counter::start(&stage.dir.path().join("again"));
    east.embed("web", again.clone(), definition).unwrap();
    until("more points", || {
        (source(&east, "web").newest_point > points + 1).then_some(())
    })
    .await;
    east.move_guest("web", true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    assert!(stage.at_west.newest().lock().unwrap().count() >= again.lock().unwrap().count());
    east.shutdown().await;
    stage.west.shutdown().await;
}
