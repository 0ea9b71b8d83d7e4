//! A site that lost its whole catalogue: what it knows again, and what it must not do.

use std::collections::BTreeMap;

use farhaven_storage_sync::store::{Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT};

use super::turns::{Both, hydrated};
use super::*;

async fn lose_catalogue(root: &Path, site: &str) {
    let catalogue = root.join(site).join("catalogue");
    until("its database is closed", || {
        let removed = std::fs::remove_dir_all(&catalogue);
        (removed.is_ok() || !catalogue.exists()).then_some(())
    })
    .await;
}

/// The hash of every byte of every point that west keeps of a guest.
async fn points_of_west(root: &Path, guest: GuestId) -> BTreeMap<u64, blake3::Hash> {
    let stores = std::fs::read_dir(root.join("west").join("store")).unwrap();
    let mut stores = stores.map(|entry| entry.unwrap().path());
    let path = stores.find(|path| path.join("segments").is_dir()).unwrap();
    let (store, report) = until("the store is let go of", || {
        Store::open(&path, StoreOptions::default()).ok()
    })
    .await;
    assert!(report.damaged.is_empty());
    let points = store.points(guest).into_iter().map(|header| {
        let replica = store.open_point(guest, header.point).unwrap();
        let mut hasher = blake3::Hasher::new();
        hasher.update(replica.context());
        for (volume, told) in (0..).zip(replica.volumes()) {
            let units = told.units();
            let mut bytes = vec![0; units as usize * UNIT];
            replica.read(volume, 0, units, &mut bytes).unwrap();
            hasher.update(&bytes);
        }
        (header.point, hasher.finalize())
    });
    points.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_point_is_what_it_was_when_both_catalogues_are_lost() {
    for while_it_runs in [false, true] {
        let stage = Stage::protected().await;
        let root = stage.dir.path();
        let id: GuestId = source(&stage.east, "web").id.parse().unwrap();
        stage.east.pause("web").await.unwrap();
        until("it is paused", || {
            (source(&stage.east, "web").phase == Phase::Paused).then_some(())
        })
        .await;
        let listed = stage.west.points("web").await.unwrap();
        if while_it_runs {
            lose_catalogue(root, "east").await;
            lose_catalogue(root, "west").await;
        }
        stage.east.shutdown().await;
        stage.west.shutdown().await;
        drop((stage.east, stage.west));
        let before = points_of_west(root, id).await;
        assert!(before.len() >= 3);
        for site in ["east", "west"] {
            lose_catalogue(root, site).await;
        }
        let west = site_again(root, "west", builders(&stage.at_west)).await;
        let east = site_again(root, "east", Builders::new()).await;
        assert_eq!(source(&east, "web").peer.as_deref(), Some("west"));
        assert_eq!(target(&west, "web").points, before.len());
        let again = west.points("web").await.unwrap();
        let told = |points: &[PointView]| -> Vec<_> {
            let told = points.iter();
            told.map(|p| (p.point, p.cut_at.clone(), p.sent_bytes))
                .collect()
        };
        assert_eq!(told(&again), told(&listed));
        west.test("web", Some(again[0].point)).await.unwrap();
        counts_on(&stage.at_west.newest()).await;
        west.end_test("web").await.unwrap();
        east.shutdown().await;
        west.shutdown().await;
        drop((east, west));
        // What was built reads from the store for as long as it is here.
        stage.at_west.built.lock().unwrap().clear();
        assert_eq!(points_of_west(root, id).await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reprotection_a_lost_catalogue_forgets_no_guest() {
    let both = Both::protected().await;
    let stage = both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    stage.west.commit("web", false).await.unwrap();
    hydrated(&stage.west).await;
    let rpo = "1s".parse().unwrap();
    stage.west.reprotect("web", Some(rpo)).await.unwrap();
    assert!(stage.west.view().standbys.is_empty());
    let built = stage.at_west.built.lock().unwrap().len();
    let root = stage.dir.path();
    stage.west.shutdown().await;
    drop(stage.west);
    lose_catalogue(root, "west").await;
    let west = site_again(root, "west", builders(&stage.at_west)).await;

    // It is west's own, and protected to where it was; old points of it here run nothing.
    assert_eq!(source(&west, "web").peer.as_deref(), Some("east"));
    assert!(
        west.view().standbys.is_empty(),
        "{:?}",
        west.view().standbys
    );
    let refused = west.fail_over("web", None, true).await.unwrap_err();
    assert!(refused.to_string().contains("runs here"), "{refused}");
    assert!(west.test("web", None).await.is_err());
    assert_eq!(stage.at_west.built.lock().unwrap().len(), built);

    // Not protected any more, it is its own all the same.
    west.unprotect("web", false).await.unwrap();
    west.shutdown().await;
    drop(west);
    lose_catalogue(root, "west").await;
    let west = site_again(root, "west", builders(&stage.at_west)).await;
    assert!(west.guest("web").is_ok() && west.view().standbys.is_empty());
    assert!(west.fail_over("web", None, true).await.is_err());
    assert_eq!(stage.at_west.built.lock().unwrap().len(), built);

    // Forgotten by an operator, it stays forgotten.
    west.remove_guest("web").unwrap();
    west.shutdown().await;
    drop(west);
    lose_catalogue(root, "west").await;
    let west = site_again(root, "west", builders(&stage.at_west)).await;
    assert!(west.guest("web").is_err());
    // And where it came from it is none of its own any more.
    stage.east.shutdown().await;
    drop(stage.east);
    lose_catalogue(root, "east").await;
    let east = site_again(root, "east", builders(&both.at_east)).await;
    assert!(east.guest("web").is_err());
    assert_eq!(target(&east, "web").from, "west");
    east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lost_its_catalogue_still_obeys_a_newer_term() {
    let stage = Stage::protected().await;
    let (root, newest) = (stage.dir.path(), source(&stage.east, "web").newest_point);
    stage.east.shutdown().await;
    drop(stage.east);
    lose_catalogue(root, "east").await;
    let east = site_again(root, "east", Builders::new()).await;
    until("the link", || east.view().peers[0].connected.then_some(())).await;
    // Its points go on, and it is the same guest to west.
    let vmm: SharedVmm = stage.guest.clone();
    east.embed("web", vmm, stage.definition.clone()).unwrap();
    until("more points", || {
        (source(&east, "web").newest_point > newest + 1).then_some(())
    })
    .await;
    assert_eq!(stage.west.view().standbys.len(), 1);
    counts_on(&stage.guest).await;
    stage.west.fail_over("web", None, true).await.unwrap();
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&stage.at_west.newest()).await;
    east.shutdown().await;
    stage.west.shutdown().await;
}
