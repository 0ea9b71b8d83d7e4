//! Test failovers of guests inside of the daemon.

use super::*;

/// Directories of a test that may lie at west.
fn places(stage: &Stage) -> [std::path::PathBuf; 2] {
    let id = source(&stage.east, "web").id;
    let west = stage.dir.path().join("west");
    [
        west.join("run").join(&id).join("test"),
        west.join("ram").join(format!("{id}-test")),
    ]
}

fn nothing_left(stage: &Stage) {
    assert!(places(stage).iter().all(|path| !path.exists()));
    assert!(target(&stage.west, "web").test.is_none());
}

async fn points_go_on(stage: &Stage) {
    let before = source(&stage.east, "web").points_sealed;
    let east = stage.east.clone();
    until("two more points", || {
        (source(&east, "web").points_sealed > before + 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_runs_beside_protection_and_leaves_nothing() {
    let stage = Stage::protected().await;
    let refused = stage.west.end_test("web").await.unwrap_err();
    assert!(refused.to_string().contains("no test of 'web'"));
    let refused = stage.west.test("web", Some(4711)).await.unwrap_err();
    assert!(refused.to_string().contains("no point 4711"), "{refused}");
    let refused = stage.east.test("web", None).await.unwrap_err();
    assert!(refused.to_string().contains("run this there"), "{refused}");
    nothing_left(&stage);

    let term = target(&stage.west, "web").term;
    let report = stage.west.test("web", None).await.unwrap();
    let tested = stage.at_west.newest();
    let seen = target(&stage.west, "web").test.unwrap();
    assert!(seen.running && seen.point == report.point);
    assert!(target(&stage.west, "web").active.is_none());
    assert!(places(&stage).iter().all(|path| path.exists()));
    counts_on(&tested).await;
    counts_on(&stage.guest).await;
    points_go_on(&stage).await;
    let refused = stage.west.test("web", None).await.unwrap_err();
    assert!(refused.to_string().contains("runs already"), "{refused}");
    assert_eq!(target(&stage.west, "web").term, term);
    // Warm RAM follows the newest point, not the tested one.
    let west = stage.west.clone();
    until("warm", || {
        let view = target(&west, "web");
        view.warm_point
            .is_some_and(|p| p > report.point)
            .then_some(())
    })
    .await;

    let ended = stage.west.end_test("web").await.unwrap();
    assert_eq!(ended.point, report.point);
    assert!(ended.ram_bytes > 0 && ended.removed.len() == 3, "{ended:?}");
    assert_eq!(tested.lock().unwrap().running(), None);
    nothing_left(&stage);

    // From an older point; then the source gives its points up.
    let oldest = stage.west.points("web").await.unwrap()[0].point;
    let report = stage.west.test("web", Some(oldest)).await.unwrap();
    assert_eq!(report.point, oldest);
    let tested = stage.at_west.newest();
    counts_on(&tested).await;
    stage.east.unprotect("web", true).await.unwrap();
    assert_eq!(tested.lock().unwrap().running(), None);
    sound(&stage.guest);
    assert!(stage.west.view().standbys.is_empty());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_tests_at_once_one_runs() {
    let stage = Stage::protected().await;
    let (west, guest) = (&stage.west, "web");
    for _ in 0..5 {
        let (one, two) = tokio::join!(west.test(guest, None), west.test(guest, None));
        let (ran, refused) = match (one, two) {
            (Ok(ran), Err(refused)) | (Err(refused), Ok(ran)) => (ran, refused),
            both => panic!("{both:?}"),
        };
        assert!(refused.to_string().contains("runs already"), "{refused}");
        let tested = stage.at_west.newest();
        counts_on(&tested).await;
        let ended = west.end_test(guest).await.unwrap();
        assert_eq!(ended.point, ran.point);
        for built in stage.at_west.built.lock().unwrap().iter() {
            assert_eq!(built.lock().unwrap().running(), None);
        }
        nothing_left(&stage);
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failovers_moves_and_restarts_beside_a_test() {
    let stage = Stage::protected().await;
    stage.west.test("web", None).await.unwrap();
    let tested = stage.at_west.newest();
    counts_on(&tested).await;
    let report = stage.west.fail_over("web", None, true).await.unwrap();
    assert_eq!(report.note, "", "there is room for both");
    let real = stage.at_west.newest();
    assert!(!Arc::ptr_eq(&tested, &real));
    counts_on(&real).await;
    counts_on(&tested).await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    stage.west.end_test("web").await.unwrap();
    assert_eq!(tested.lock().unwrap().running(), None);
    counts_on(&real).await;
    nothing_left(&stage);
    let refused = stage.west.test("web", None).await.unwrap_err();
    assert!(refused.to_string().contains("runs here"), "{refused}");
    stage.end().await;

    let stage = Stage::protected().await;
    stage.west.test("web", None).await.unwrap();
    let tested = stage.at_west.newest();
    stage.east.move_guest("web", true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    counts_on(&tested).await;
    // A daemon takes its test with it.
    stage.west.shutdown().await;
    assert_eq!(tested.lock().unwrap().running(), None);
    nothing_left(&stage);
    stage.east.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_daemon_left_of_a_test_is_removed() {
    let stage = Stage::protected().await;
    let places = places(&stage);
    stage.west.shutdown().await;
    drop(stage.west);
    for place in &places {
        std::fs::create_dir_all(place).unwrap();
        std::fs::write(place.join("left"), "by a test").unwrap();
    }
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    until("removed", || {
        places.iter().all(|path| !path.exists()).then_some(())
    })
    .await;
    west.test("web", None).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    stage.east.shutdown().await;
    west.shutdown().await;
}
