//! After a move or a failover: committed, rolled back, protected the other way
//! round, brought home; and what is left of old copies.

use farhaven::site::turn::RollBack;

use super::*;

/// East and west that both build counters, with the guest protected from east.
pub(super) struct Both {
    pub(super) stage: Stage,
    pub(super) at_east: CounterBuilder,
}

impl Both {
    pub(super) async fn protected() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (at_east, at_west) = (CounterBuilder::default(), CounterBuilder::default());
        let east = site(dir.path(), "east", builders(&at_east)).await;
        let west = site(dir.path(), "west", builders(&at_west)).await;
        let stage = Stage::pair(dir, east, west, at_west, false).await;
        let stage = stage.protect().await;
        Self { stage, at_east }
    }
}

pub(super) async fn hydrated(site: &Arc<Site>) {
    until("hydrated", || {
        let active = target(site, "web").active.unwrap();
        active.hydrated.then_some(())
    })
    .await;
}

fn back() -> RollBack {
    RollBack::default()
}

async fn told(site: &Arc<Site>) {
    until("the source knows of the commit", || {
        let kept = site.evidence();
        kept.iter().any(|one| !one.needed).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_circle_loses_nothing_and_sends_what_differs() {
    let both = Both::protected().await;
    let stage = &both.stage;
    let mut last = 0;
    let mut home = stage.guest.clone();
    for turn in 0..2 {
        // There.
        stage.east.move_guest("web", true).await.unwrap();
        let there = stage.at_west.newest();
        assert_eq!(home.lock().unwrap().running(), Some(false));
        assert!(sound(&home) >= last, "turn {turn}");
        last = counts_on(&there).await.max(sound(&home));
        // Not before it is committed.
        let refused = stage.west.reprotect("web", None).await.unwrap_err();
        assert!(
            refused.to_string().contains("farhaven commit web"),
            "{refused}"
        );
        assert!(stage.west.commit("web", false).await.unwrap().told);
        let rpo = "1s".parse().unwrap();
        let turned = stage.west.reprotect("web", Some(rpo)).await.unwrap();
        assert_eq!((turned.to.as_str(), turned.note.as_str()), ("east", ""));
        assert!(turned.base_bytes > 0 && turned.sent_bytes > 0);
        last = counts_on(&there).await.max(last);
        // It is a guest of west now, and east only keeps points of it.
        assert!(stage.east.guest("web").is_err());
        assert!(stage.west.view().standbys.is_empty());
        assert_eq!(target(&stage.east, "web").from, "west");
        until("its old copy is ended", || {
            (home.lock().unwrap().running().is_none() && stage.east.evidence().is_empty())
                .then_some(())
        })
        .await;
        // Called again it tells the same.
        let again = stage.west.reprotect("web", None).await.unwrap();
        assert_eq!(again.to, "east");

        // And home.
        stage.west.move_guest("web", true).await.unwrap();
        home = both.at_east.newest();
        last = counts_on(&home).await.max(last);
        assert!(sound(&there) <= last);
        stage.east.commit("web", false).await.unwrap();
        let turned = stage.east.reprotect("web", Some(rpo)).await.unwrap();
        assert_eq!(turned.to, "west");
        last = counts_on(&home).await.max(last);
        let east = stage.east.clone();
        until("points from home", || {
            (source(&east, "web").points_sealed >= 2).then_some(())
        })
        .await;
    }
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_rolled_back_to_the_guest_as_it_was() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    let stopped = sound(&stage.guest);
    counts_on(&there).await;
    let view = target(&stage.west, "web").active.unwrap();
    let commit = view.commit.unwrap();
    assert!(!commit.committed && commit.left_ms > 0);
    let kept = stage.east.evidence();
    assert!(kept.len() == 1 && kept[0].needed && kept[0].alive && kept[0].unchanged);
    let refused = stage.east.discard_evidence("web", None, false).await;
    assert!(refused.unwrap_err().to_string().contains("--force"));
    // Not while nobody can say that the copy is stopped there; and not from there.
    let refused = stage.east.rollback("web", back()).await.unwrap_err();
    assert!(refused.to_string().contains("run this there"), "{refused}");

    let report = stage.west.rollback("web", back()).await.unwrap();
    assert_eq!((report.at.as_str(), report.point), ("east", None));
    assert_eq!(there.lock().unwrap().running(), None);
    assert!(sound(&stage.guest) >= stopped);
    counts_on(&stage.guest).await;
    assert!(target(&stage.west, "web").active.is_none());
    let again = stage.west.rollback("web", back()).await.unwrap();
    assert_eq!(again.at, "east");
    let east = stage.east.clone();
    let sealed = source(&east, "web").points_sealed;
    until("points go on", || {
        (source(&east, "web").points_sealed > sealed + 1).then_some(())
    })
    .await;
    // And it can be moved again.
    stage.east.move_guest("web", true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    assert!(sound(&stage.at_west.newest()) >= sound(&stage.guest));
    both.stage.end().await;
}

/// What it wrote since its move is nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn a_moved_copy_that_somebody_let_go_on_by_hand_is_kept() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    stage.west.commit("web", false).await.unwrap();
    told(&stage.east).await;
    stage.guest.lock().unwrap().resume().unwrap();
    counts_on(&stage.guest).await;
    hydrated(&stage.west).await;
    stage.west.reprotect("web", None).await.unwrap();
    let west = stage.west.clone();
    until("points of the other way round", || {
        (source(&west, "web").points_sealed >= 2).then_some(())
    })
    .await;
    let kept = stage.east.evidence();
    assert!(kept.len() == 1 && !kept[0].unchanged, "{kept:?}");
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&there).await;
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_commit_there_is_no_rollback() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    let first = stage.west.commit("web", false).await.unwrap();
    let again = stage.west.commit("web", false).await.unwrap();
    assert_eq!(first.committed_at, again.committed_at);
    told(&stage.east).await;
    for to in [
        back(),
        RollBack {
            point: Some(1),
            accept_loss: true,
        },
    ] {
        let refused = stage.west.rollback("web", to).await.unwrap_err();
        assert!(refused.to_string().contains("was committed"), "{refused}");
    }
    counts_on(&stage.at_west.newest()).await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    let gone = stage
        .east
        .discard_evidence("web", None, false)
        .await
        .unwrap();
    assert_eq!(gone.removed.len(), 1);
    assert_eq!(stage.guest.lock().unwrap().running(), None);
    assert!(stage.east.evidence().is_empty() && stage.east.guest("web").is_err());
    // Nothing to build upon: everything is sent, and it is right all the same.
    hydrated(&stage.west).await;
    let turned = stage.west.reprotect("web", None).await.unwrap();
    assert_eq!(turned.base_bytes, 0);
    stage.west.move_guest("web", true).await.unwrap();
    counts_on(&both.at_east.newest()).await;
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_a_rollback_says_what_it_costs() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.west.fail_over("web", None, true).await.unwrap();
    let stopped = sound(&stage.guest);
    counts_on(&stage.at_west.newest()).await;
    let refused = stage.west.rollback("web", back()).await.unwrap_err();
    assert!(refused.to_string().contains("--accept-loss"), "{refused}");
    counts_on(&stage.at_west.newest()).await;
    let accepted = RollBack {
        point: None,
        accept_loss: true,
    };
    stage.west.rollback("web", accepted).await.unwrap();
    assert!(sound(&stage.guest) >= stopped);
    counts_on(&stage.guest).await;
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_to_another_point_stays_here() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.west.fail_over("web", None, true).await.unwrap();
    let first = stage.at_west.newest();
    counts_on(&first).await;
    let points = stage.west.points("web").await.unwrap();
    let to = |point| RollBack {
        point: Some(point),
        accept_loss: false,
    };
    let refused = stage.west.rollback("web", to(4711)).await.unwrap_err();
    assert!(refused.to_string().contains("no point 4711"), "{refused}");
    let report = stage
        .west
        .rollback("web", to(points[0].point))
        .await
        .unwrap();
    assert_eq!(
        (report.at.as_str(), report.point),
        ("west", Some(points[0].point))
    );
    let second = stage.at_west.newest();
    assert!(!Arc::ptr_eq(&first, &second));
    assert_eq!(first.lock().unwrap().running(), None);
    counts_on(&second).await;
    let left = stage.west.evidence();
    assert!(left.len() == 1 && !left[0].alive, "{left:?}");
    stage
        .west
        .discard_evidence("web", None, false)
        .await
        .unwrap();
    assert!(stage.west.evidence().is_empty());
    counts_on(&second).await;
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_diverged_is_kept_until_somebody_discards_it() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.west.fail_over("web", None, true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    stage.west.commit("web", false).await.unwrap();
    hydrated(&stage.west).await;
    let turned = stage.west.reprotect("web", None).await.unwrap();
    assert!(turned.base_bytes > 0);
    let kept = stage.east.evidence();
    assert!(
        kept.len() == 1 && kept[0].alive && !kept[0].unchanged,
        "{kept:?}"
    );
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    // It can be looked at as plain files.
    let out = tempfile::tempdir().unwrap();
    let manifests = stage
        .east
        .export_evidence("web", None, out.path())
        .await
        .unwrap();
    let files = &manifests[0].files;
    assert!(
        files.iter().any(|file| file.what == "memory"),
        "{manifests:?}"
    );
    for file in files {
        let at = out
            .path()
            .join(format!("web-{}", kept[0].copy))
            .join(&file.file);
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(std::fs::File::open(at).unwrap())
            .unwrap();
        assert_eq!(hasher.finalize().to_hex().to_string(), file.blake3);
    }
    let refused = stage.east.export_evidence("web", None, out.path()).await;
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("is there already")
    );
    // Home, with the evidence still there.
    stage.west.move_guest("web", true).await.unwrap();
    counts_on(&both.at_east.newest()).await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    let copy = kept[0].copy.clone();
    stage
        .east
        .discard_evidence("web", Some(&copy), false)
        .await
        .unwrap();
    assert_eq!(stage.guest.lock().unwrap().running(), None);
    counts_on(&both.at_east.newest()).await;
    both.stage.end().await;
}

/// A guest that came home runs in the directory of that takeover: its copy is there when
/// it is taken over once more.
#[tokio::test(flavor = "multi_thread")]
async fn what_diverged_after_coming_home_is_listed_exported_and_discarded_whole() {
    let both = Both::protected().await;
    let stage = &both.stage;
    let homes = [
        (&stage.east, &stage.west, &both.stage.at_west),
        (&stage.west, &stage.east, &both.at_east),
    ];
    for (from, to, at) in homes {
        from.move_guest("web", true).await.unwrap();
        counts_on(&at.newest()).await;
        to.commit("web", false).await.unwrap();
        hydrated(to).await;
        to.reprotect("web", None).await.unwrap();
        counts_on(&at.newest()).await;
    }
    until("points from home", || {
        (source(&stage.east, "web").points_sealed >= 2).then_some(())
    })
    .await;
    stage.west.fail_over("web", None, true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    let kept = stage.east.evidence();
    assert!(
        kept.len() == 1 && kept[0].copy == "source" && !kept[0].unchanged,
        "{kept:?}"
    );
    assert!(
        kept[0].directory.join("disk.img").exists() && kept[0].bytes > 0,
        "{kept:?}"
    );
    let out = tempfile::tempdir().unwrap();
    let exported = stage
        .east
        .export_evidence("web", None, out.path())
        .await
        .unwrap();
    for what in ["memory", "disk"] {
        let files = &exported[0].files;
        assert!(files.iter().any(|file| file.what == what), "{exported:?}");
    }
    // Turned round it is evidence of its own, and as whole.
    stage.west.commit("web", false).await.unwrap();
    hydrated(&stage.west).await;
    stage.west.reprotect("web", None).await.unwrap();
    let aside = stage.east.evidence();
    assert!(
        aside.len() == 1 && aside[0].directory == kept[0].directory,
        "{aside:?}"
    );
    let out = tempfile::tempdir().unwrap();
    let exported = stage
        .east
        .export_evidence("web", None, out.path())
        .await
        .unwrap();
    assert!(
        exported[0].files.iter().any(|file| file.what == "disk"),
        "{exported:?}"
    );
    stage
        .east
        .discard_evidence("web", None, false)
        .await
        .unwrap();
    assert!(stage.east.evidence().is_empty() && !aside[0].directory.exists());
    both.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_cannot_go_on_leaves_the_guest_where_it_runs() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    // Once more than it is tried.
    stage.guest.lock().unwrap().fail(0, 1000);
    let refused = stage.west.rollback("web", back()).await.unwrap_err();
    assert!(refused.to_string().contains("runs on here"), "{refused}");
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&there).await;
    // Gone there, it is not even stopped here.
    stage.guest.lock().unwrap().end();
    let refused = stage.west.rollback("web", back()).await.unwrap_err();
    assert!(refused.to_string().contains("no copy"), "{refused}");
    counts_on(&there).await;
    both.stage.end().await;
}
