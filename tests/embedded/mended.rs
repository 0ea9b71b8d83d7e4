//! Faults that a review found, each as it was: see docs/reliability.md.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use farhaven_storage_sync::catalogue::{Catalogue, Table};
use serde_json::{Value, json};

use super::*;

/// Every disk image below a site's run directory: path and inode.
fn images(stage: &Path, site: &str, id: &str) -> Vec<(PathBuf, u64)> {
    let runs = std::fs::read_dir(stage.join(site).join("run").join(id)).unwrap();
    let images = runs.map(|run| run.unwrap().path().join("disk.img"));
    let images = images.filter_map(|path| Some((path.clone(), path.metadata().ok()?.ino())));
    images.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_takeover_keeps_the_disks_of_the_first() {
    let stage = Stage::set_paired(true).await.protect().await;
    let id = source(&stage.east, "web").id;
    let root = stage.dir.path();
    stage.east.move_guest("web", true).await.unwrap();
    let first = stage.at_west.newest();
    counts_on(&first).await;
    let before = images(root, "west", &id);
    assert_eq!(before.len(), 1);

    // West's daemon begins anew, without its guest; east lives.
    stage.west.shutdown().await;
    assert_eq!(
        first.lock().unwrap().running(),
        None,
        "it ended with its site"
    );
    drop(stage.west);
    let west = site_again(root, "west", builders(&stage.at_west)).await;
    until("the link", || west.view().peers[0].connected.then_some(())).await;
    assert!(target(&west, "web").trouble.contains("ended with it"));
    west.fail_over("web", None, true).await.unwrap();
    let second = stage.at_west.newest();
    assert!(!Arc::ptr_eq(&first, &second));
    counts_on(&second).await;
    let after = images(root, "west", &id);
    assert_eq!(after.len(), 2, "{after:?}");
    let kept = after.iter().find(|(_, inode)| *inode == before[0].1);
    assert!(kept.is_some(), "{before:?} is gone: {after:?}");
    west.shutdown().await;
    stage.east.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_move_is_in_doubt_is_not_brought_back() {
    let stage = Stage::protected().await;
    let (id, root) = (source(&stage.east, "web").id, stage.dir.path());
    let west = serde_json::to_value(stage.west.key()).unwrap();
    stage.east.shutdown().await;
    stage.west.shutdown().await;
    drop((stage.east, stage.west));
    stage.guest.lock().unwrap().end();
    // As a daemon leaves it that is killed while it waits for the peer's word.
    let catalogue = until("the catalogue", || {
        Catalogue::open(&root.join("east").join("catalogue")).ok()
    });
    let (catalogue, _) = catalogue.await;
    let mut kept: Value = catalogue.find(Table::Protections, &id).unwrap().unwrap();
    kept["moving"] = json!({"group": id, "number": 2, "owner": west});
    catalogue.put(Table::Protections, &id, &kept).unwrap();
    catalogue.flush().unwrap();
    drop(catalogue);

    let east = site_again(root, "east", Builders::new()).await;
    let (again, definition) = Counter::start(&root.join("again"));
    let refused = east.embed("web", again.clone(), definition.clone());
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("take-back web --force"), "{refused}");
    // There is no guest to let go on; but the doubt is over.
    let gone = east.take_back("web", true).await.unwrap_err();
    assert!(gone.to_string().contains("ended with it"), "{gone}");
    east.embed("web", again, definition).unwrap();
    east.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_failed_is_tried_again_at_the_same_term() {
    let stage = Stage::set_paired(true).await.protect().await;
    stage.east.unprotect("web", false).await.unwrap();
    // However often it is tried meanwhile.
    stage.guest.lock().unwrap().fail(u32::MAX, 0);
    let refused = stage.west.fail_over("web", None, true).await.unwrap_err();
    assert!(
        refused.to_string().contains("did not say that it stopped"),
        "{refused}"
    );
    assert_eq!(stage.guest.lock().unwrap().running(), Some(true));
    // The next connection tells the same term again.
    stage.west.shutdown().await;
    stage.guest.lock().unwrap().fail(0, 0);
    // What was made ready there holds on to the store.
    stage.at_west.built.lock().unwrap().clear();
    drop(stage.west);
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    until("it is stopped", || {
        (stage.guest.lock().unwrap().running() == Some(false)).then_some(())
    })
    .await;
    west.shutdown().await;
    stage.east.shutdown().await;
}

/// It took the guest back by force, say, and protects it to nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_takes_an_older_term_hears_of_the_newer_one() {
    let stage = Stage::protected().await;
    let web = source(&stage.east, "web").id.parse().unwrap();
    stage.east.unprotect("web", false).await.unwrap();
    let own = stage.east.key();
    let newer = loop {
        let term = stage.east.fence.raise(web, own).unwrap();
        if term.number > 8 {
            break term;
        }
    };
    let refused = stage.west.fail_over("web", None, true).await.unwrap_err();
    assert!(
        refused.to_string().contains("did not say that it stopped"),
        "{refused}"
    );
    until("west heeds it", || {
        (stage.west.fence.current(web) == Some(newer)).then_some(())
    })
    .await;
    counts_on(&stage.guest).await;
    assert!(target(&stage.west, "web").active.is_none());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_a_cut_left_stopped_goes_on_when_it_can() {
    let stage = Stage::protected().await;
    // More often than a cut tries.
    stage.guest.lock().unwrap().fail(0, 25);
    let east = stage.east.clone();
    let told = until("it is told", || {
        Some(source(&east, "web").trouble).filter(|trouble| !trouble.is_empty())
    })
    .await;
    assert!(told.contains("as the test asked"), "{told}");
    counts_on(&stage.guest).await;
    until("protected again", || {
        let view = source(&east, "web");
        (view.trouble.is_empty() && view.phase == Phase::Protected).then_some(())
    })
    .await;

    // One that somebody else stopped stays so, and that is said.
    stage.guest.lock().unwrap().pause().unwrap();
    until("that is said", || {
        let view = source(&east, "web");
        view.trouble.contains("is stopped here").then_some(())
    })
    .await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    stage.guest.lock().unwrap().resume().unwrap();
    until("no more", || {
        source(&east, "web").trouble.is_empty().then_some(())
    })
    .await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_test_begins_while_its_points_are_dropped() {
    let stage = Stage::protected().await;
    let id = source(&stage.east, "web").id;
    stage.west.test("web", None).await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let (west, done) = (stage.west.clone(), over.clone());
    let tests = tokio::spawn(async move {
        while !done.load(Ordering::Relaxed) {
            let _ = west.test("web", None).await;
            tokio::task::yield_now().await;
        }
    });
    stage.east.unprotect("web", true).await.unwrap();
    over.store(true, Ordering::Relaxed);
    tests.await.unwrap();
    assert!(stage.west.view().standbys.is_empty());
    for built in stage.at_west.built.lock().unwrap().iter() {
        assert_eq!(
            built.lock().unwrap().running(),
            None,
            "a test nobody can end"
        );
    }
    let west = stage.dir.path().join("west");
    assert!(!west.join("ram").join(format!("{id}-test")).exists());
    assert!(!west.join("run").join(&id).join("test").exists());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_an_ended_guest_is_not_written_over() {
    let stage = Stage::protected().await;
    stage.east.move_guest("web", true).await.unwrap();
    // Its disks are being copied, which ends with it.
    stage.west.end_guest("web").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let view = target(&stage.west, "web");
    assert!(view.trouble.contains("by an operator"), "{}", view.trouble);
    stage.end().await;
}

/// Pairs them once more, over an invitation of east.
async fn paired_again(stage: &Stage) {
    // Whoever forgot the other accepts: who did not has that name taken.
    let invitation = stage.east.invite(Duration::from_secs(60)).unwrap();
    stage.west.pair(&invitation).await.unwrap();
    for site in [&stage.east, &stage.west] {
        until("the link", || {
            let peers = site.view().peers;
            peers.first().is_some_and(|p| p.connected).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_was_removed_is_paired_again_by_the_same_daemon() {
    let stage = Stage::protected().await;
    let rpo = "1s".parse().unwrap();
    // By both sides; then by one, of which the other does not know.
    for by_both in [true, false] {
        let newest = source(&stage.east, "web").newest_point;
        stage.east.unprotect("web", false).await.unwrap();
        stage.west.remove_peer("east").unwrap();
        if by_both {
            stage.east.remove_peer("west").unwrap();
        }
        assert!(stage.west.view().peers.is_empty());
        paired_again(&stage).await;
        // What was kept is there, and is built upon.
        assert!(target(&stage.west, "web").points > 0);
        stage.east.protect("web", "west", Some(rpo)).await.unwrap();
        let view = until("points go on", || {
            let view = source(&stage.east, "web");
            (view.points_sealed >= 2).then_some(view)
        })
        .await;
        assert!(view.newest_point > newest, "{view:?}");
    }
    // A guest that runs there goes by the new pairing, too.
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    stage.west.remove_peer("east").unwrap();
    let refused = stage.east.remove_peer("west").unwrap_err();
    assert!(refused.to_string().contains("is protected to"), "{refused}");
    let invitation = stage.east.invite(Duration::from_secs(60)).unwrap();
    stage.west.pair(&invitation).await.unwrap();
    until("the link", || {
        stage.west.view().peers[0].connected.then_some(())
    })
    .await;
    counts_on(&there).await;
    let back = farhaven::site::turn::RollBack::default();
    stage.west.rollback("web", back).await.unwrap();
    counts_on(&stage.guest).await;
    assert!(target(&stage.west, "web").active.is_none());
    stage.end().await;
}

/// Whoever stopped it before lets it go on, not a move that came to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_stood_before_its_move_stands_when_that_fails() {
    let stage = Stage::protected().await;
    let east = stage.east.clone();
    let running = || stage.guest.lock().unwrap().running();
    let stands = async || {
        until("its points go on", || {
            let view = source(&east, "web");
            let said = view.trouble.contains("is stopped here");
            (said && view.phase == Phase::Protected).then_some(())
        })
        .await;
    };
    let fails = async |words: &str| {
        let refused = east.move_guest("web", true).await.unwrap_err().to_string();
        assert!(refused.contains(words), "no '{words}' in: {refused}");
    };
    stage.guest.lock().unwrap().pause().unwrap();
    stands().await;
    // It is handed over, and the other site cannot start it.
    *stage.at_west.bad_starts.lock().unwrap() = u32::MAX;
    fails("the move failed").await;
    assert_eq!(running(), Some(false));
    stands().await;
    // Its last cut is given up.
    stage.guest.lock().unwrap().fail_once_moved(u32::MAX, 0);
    fails("was not moved").await;
    assert_eq!(running(), Some(false));
    stage.guest.lock().unwrap().fail(0, 0);
    stands().await;

    // It is let go on since: one that runs, runs on.
    stage.guest.lock().unwrap().resume().unwrap();
    until("that is seen", || {
        let view = source(&east, "web");
        (view.trouble.is_empty() && view.phase == Phase::Protected).then_some(())
    })
    .await;
    fails("the move failed").await;
    counts_on(&stage.guest).await;
    stage.end().await;
}
