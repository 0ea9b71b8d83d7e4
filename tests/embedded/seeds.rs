//! A first copy by parcel, between two whole sites: what the link carries
//! after it, and every way in which a parcel can be of no use.

use std::path::PathBuf;

use farhaven::guest::sim::{SimBuilder, SimGuest, SimOptions, Workload};
use farhaven::site::seed::SeedState;

use super::*;

const RAM: u64 = 32 << 20;

/// A site that builds sim guests, too.
fn sims() -> Builders {
    let sim: Arc<dyn Builder> = Arc::new(SimBuilder);
    Builders::from([("sim".to_owned(), sim)])
}

/// East with a guest full of noise, and west, paired.
struct Sites {
    east: Arc<Site>,
    west: Arc<Site>,
    dir: tempfile::TempDir,
}

impl Sites {
    async fn set() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let east = site(dir.path(), "east", sims()).await;
        let west = site(dir.path(), "west", sims()).await;
        pair(&east, &west).await;
        let sites = Self { east, west, dir };
        sites.start("web", 1, "database:20");
        sites
    }

    fn start(&self, name: &str, seed: u64, workload: &str) {
        let (guest, definition) = SimGuest::start(SimOptions {
            seed,
            ram_bytes: RAM,
            disks: vec![("disk".to_owned(), 4 << 20)],
            workload: workload.parse::<Workload>().unwrap(),
            run: self.dir.path().join(name),
            ram: self.dir.path().join(format!("{name}.ram")),
        })
        .unwrap();
        self.east.embed(name, guest, definition).unwrap();
    }

    fn medium(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn export(&self, guest: &str, file: &str) -> PathBuf {
        let path = self.medium(file);
        let exported = self.east.export_seed(guest, "west", &path).await.unwrap();
        assert_eq!(exported.file, path);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), exported.file_bytes);
        path
    }

    async fn refused(&self, path: &Path, words: &str) {
        let why = self.west.import_seed(path).await.unwrap_err().to_string();
        assert!(why.contains(words), "no '{words}' in: {why}");
    }

    async fn protected(&self, guest: &str, points: u64) -> SourceView {
        until("points", || {
            let view = source(&self.east, guest);
            (view.points_sealed >= points).then_some(view)
        })
        .await
    }

    async fn end(self) {
        self.east.shutdown().await;
        self.west.shutdown().await;
    }
}

async fn pair(east: &Arc<Site>, host: &Arc<Site>) {
    let invitation = host.invite(Duration::from_secs(60)).unwrap();
    let peer = east.pair(&invitation).await.unwrap().site;
    until("the link", || {
        let peers = east.view().peers;
        peers.into_iter().find(|p| p.site == peer && p.connected)
    })
    .await;
    until("the pairing", || {
        (!host.view().peers.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_seed_the_link_carries_what_changed_since() {
    let sites = Sites::set().await;
    let (east, west) = (&sites.east, &sites.west);
    // Another guest is protected all the while: its numbers go on meanwhile.
    sites.start("other", 2, "noise:1");
    let rpo = Some("1s".parse().unwrap());
    east.protect("other", "west", rpo).await.unwrap();
    sites.protected("other", 1).await;

    let path = sites.export("web", "parcel").await;
    let written = std::fs::metadata(&path).unwrap().len();
    assert!(
        written > 1 << 20,
        "{written} bytes: too little to tell anything"
    );
    let awaited = west.seeds();
    assert!(
        awaited.len() == 1 && awaited[0].state == SeedState::Awaited,
        "{awaited:?}"
    );
    assert!(east.seeds().is_empty() && !sites.medium("parcel.part").exists());

    east.protect_seeded("web", "west", rpo).await.unwrap();
    until("it waits", || {
        (source(east, "web").phase == Phase::AwaitingSeed).then_some(())
    })
    .await;
    let sealed = source(east, "other").points_sealed;
    sites.protected("other", sealed + 2).await;
    assert_eq!(source(east, "web").wan_bytes, 0, "it waits for its seed");
    let again = east
        .export_seed("web", "west", &sites.medium("again"))
        .await;
    let again = again.unwrap_err().to_string();
    assert!(again.contains("waits for a seed that was"), "{again}");

    let imported = west.import_seed(&path).await.unwrap();
    assert_eq!((imported.point, imported.guest.as_str()), (1, "web"));
    assert!(target(west, "web").newest_point >= 1);
    let view = sites.protected("web", 1).await;
    assert!(view.newest_point > 1);
    assert!(
        view.wan_bytes < written / 2,
        "{} bytes over the link, {written} by parcel",
        view.wan_bytes
    );
    // The other guest's points never knew of it.
    let sealed = source(east, "other").points_sealed;
    let other = sites.protected("other", sealed + 2).await;
    assert_eq!(other.trouble, "");

    // What is sealed on top of it is what the guest is: it runs on from there.
    east.move_guest("web", true).await.unwrap();
    let active = target(west, "web").active.unwrap();
    let log = active.console.unwrap().log;
    until("it is sound", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().any(|l| l.starts_with("HB ")).then_some(())
    })
    .await;
    sites.refused(&path, "imported already, as point 1").await;
    west.end_guest("web").await.unwrap();
    sites.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_a_seed_are_never_used_again() {
    let sites = Sites::set().await;
    let path = sites.export("web", "parcel").await;
    // Both daemons begin anew while it travels; nothing else was ever sent.
    sites.east.shutdown().await;
    sites.west.shutdown().await;
    let Sites { east, west, dir } = sites;
    drop((east, west));
    let west = site_again(dir.path(), "west", sims()).await;
    let east = site_again(dir.path(), "east", sims()).await;
    let sites = Sites { east, west, dir };
    // Each has another address by now: it is told anew.
    sites.east.remove_peer("west").unwrap();
    sites.west.remove_peer("east").unwrap();
    pair(&sites.east, &sites.west).await;
    sites.start("other", 2, "noise:1");
    let rpo = Some("1s".parse().unwrap());
    sites.east.protect("other", "west", rpo).await.unwrap();
    sites.protected("other", 2).await;
    let imported = sites.west.import_seed(&path).await.unwrap();
    assert_eq!(imported.guest, "web");
    let sealed = source(&sites.east, "other").points_sealed;
    let other = sites.protected("other", sealed + 2).await;
    assert_eq!(other.trouble, "");
    sites.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parcel_that_is_of_no_use_is_named_and_leaves_nothing() {
    let sites = Sites::set().await;
    let (east, west) = (&sites.east, &sites.west);
    let path = sites.export("web", "parcel").await;
    let whole = std::fs::read(&path).unwrap();
    let damaged = sites.medium("damaged");
    let put = |bytes: &[u8]| std::fs::write(&damaged, bytes).unwrap();

    put(b"an invoice");
    sites.refused(&damaged, "not a seed").await;
    put(&whole[..whole.len() - 1]);
    sites
        .refused(&damaged, "damaged or cut short at byte")
        .await;
    let mut changed = whole.clone();
    let end = changed.len() - 40;
    changed[end] ^= 1;
    put(&changed);
    sites.refused(&damaged, "Nothing of it was sealed").await;
    assert!(
        west.view().standbys.is_empty(),
        "a failed seed left a guest"
    );
    changed = whole.clone();
    changed[6] = 9;
    put(&changed);
    sites.refused(&damaged, "upgrade this site").await;
    sites
        .refused(&sites.medium("nothing"), "is not there; name the file")
        .await;

    // At the wrong site.
    let south = site(sites.dir.path(), "south", sims()).await;
    let why = south.import_seed(&path).await.unwrap_err().to_string();
    assert!(why.contains("for another site"), "{why}");
    south.shutdown().await;

    // An older one of the same guest.
    let newer = sites.export("web", "newer").await;
    sites.refused(&path, "exported again since").await;
    // Where a file is already, nothing is written over it.
    let over = east.export_seed("web", "west", &newer).await.unwrap_err();
    assert!(over.to_string().contains("is there already"), "{over}");
    let nowhere = sites.medium("no/such/directory");
    let over = east.export_seed("web", "west", &nowhere).await.unwrap_err();
    assert!(over.to_string().contains("mounted"), "{over}");

    // Damage to it leaves it importable; and once imported, it is spent.
    let mut bytes = std::fs::read(&newer).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    put(&bytes);
    sites.refused(&damaged, "damaged").await;
    west.import_seed(&newer).await.unwrap();
    sites.refused(&newer, "imported already").await;
    // Its source hears that there is nothing to seed any more.
    let late = east.export_seed("web", "west", &sites.medium("late")).await;
    let late = late.unwrap_err().to_string();
    assert!(late.contains("holds point 2"), "{late}");
    sites.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_that_began_meanwhile_goes_on() {
    let sites = Sites::set().await;
    let path = sites.export("web", "parcel").await;
    let rpo = Some("1s".parse().unwrap());
    sites.east.protect("web", "west", rpo).await.unwrap();
    let view = sites.protected("web", 2).await;
    assert!(view.newest_point > 2, "the seed's point is not used twice");
    sites.refused(&path, "beyond this seed already").await;
    sites.protected("web", view.points_sealed + 2).await;
    assert_eq!(source(&sites.east, "web").trouble, "");
    sites.end().await;
}

/// Ctrl-C where it was begun, or a medium that is too small.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_ends_early_leaves_nothing_and_begins_anew() {
    let sites = Sites::set().await;
    let files = |sites: &Sites| {
        let all = std::fs::read_dir(sites.dir.path()).unwrap();
        let names = all.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.contains("parcel")).collect::<Vec<_>>()
    };
    let (east, path) = (sites.east.clone(), sites.medium("parcel"));
    let at = path.clone();
    let export = tokio::spawn(async move { east.export_seed("web", "west", &at).await });
    until("it is under way", || {
        (!sites.east.seeds().is_empty() || export.is_finished()).then_some(())
    })
    .await;
    export.abort();
    let _ = export.await;
    until("it has ended", || {
        sites.east.seeds().is_empty().then_some(())
    })
    .await;
    let left = files(&sites);
    // It may have been whole before it was stopped.
    assert!(left.is_empty() || left == ["parcel"], "{left:?}");
    let _ = std::fs::remove_file(&path);

    // A full medium: /dev/full takes nothing.
    std::os::unix::fs::symlink("/dev/full", sites.medium("parcel.part")).unwrap();
    let full = sites
        .east
        .export_seed("web", "west", &path)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        full.contains("too small") && full.contains("it needs about"),
        "{full}"
    );
    assert_eq!(files(&sites), Vec::<String>::new());
    assert_eq!(source(&sites.east, "web").phase, Phase::Unprotected);

    // And then it is written, and of use.
    let path = sites.export("web", "parcel").await;
    sites.west.import_seed(&path).await.unwrap();
    sites.end().await;
}
