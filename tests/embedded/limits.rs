//! Monitors at their limits: slow to stop, not able to isolate, asking for more
//! of a host than at their start.

use farhaven::site::limits::SetLimit;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_slow_to_stop_is_cut_and_fenced() {
    let stage = Stage::protected().await;
    let east = stage.east.clone();
    let before = source(&east, "web").points_sealed;
    stage.guest.lock().unwrap().slow_to_stop(3);
    until("two more points", || {
        let view = source(&east, "web");
        // Protection is not interrupted for that.
        assert_eq!(view.trouble, "");
        (view.points_sealed > before + 1).then_some(())
    })
    .await;
    assert_eq!(stage.guest.lock().unwrap().slow_stops_left(), 0);
    sound(&stage.guest);

    stage.guest.lock().unwrap().slow_to_stop(5);
    stage.west.fail_over("web", None, true).await.unwrap();
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&stage.at_west.newest()).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_isolated_is_not_tested() {
    let reaches_out = CounterBuilder {
        reaches_out: true,
        ..CounterBuilder::default()
    };
    let stage = Stage::set_with(false, reaches_out).await.protect().await;
    let refused = stage.west.test("web", None).await.unwrap_err().to_string();
    assert!(refused.contains("cannot be run isolated"), "{refused}");
    assert!(refused.contains("can_isolate"), "{refused}");
    assert!(stage.at_west.built.lock().unwrap().is_empty());
    assert!(target(&stage.west, "web").test.is_none());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_asks_by_what_the_guest_is_by_now() {
    let stage = Stage::protected().await;
    let nothing = stage.east.check_guest("web", None).await.unwrap();
    let blocks = |code: &str, findings: &[farhaven::guest::qemu::check::Finding]| {
        findings.iter().any(|finding| finding.code == code)
    };
    assert!(!blocks("peer-counter", &nothing), "{nothing:?}");
    stage.guest.lock().unwrap().ask_for(b"flies");
    let found = stage.east.check_guest("web", None).await.unwrap();
    assert!(blocks("peer-counter", &found), "{found:?}");
    let refused = stage
        .east
        .move_guest("web", true)
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("runs on here"), "{refused}");
    assert!(refused.contains("it cannot count; teach it"), "{refused}");
    assert!(stage.at_west.built.lock().unwrap().is_empty());
    counts_on(&stage.guest).await;
    stage.guest.lock().unwrap().ask_for(b"counts");
    let east = stage.east.clone();
    until("protected again", || {
        let view = source(&east, "web");
        (view.trouble.is_empty() && view.phase == Phase::Protected).then_some(())
    })
    .await;
    stage.east.move_guest("web", true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    stage.end().await;
}

/// What a loopback carries is nothing to reckon with where the site's limit holds the
/// last cut back.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_reckons_with_the_limit_that_its_last_cut_heeds() {
    let stage = Stage::protected().await;
    let east = stage.east.clone();
    let free = east.move_outlook("web").unwrap();
    assert!(free.link_bytes_per_s > 125_000, "{free:?}");
    let limit = |limit: &str| SetLimit {
        limit: Some(limit.parse().unwrap()),
        ..SetLimit::default()
    };
    east.set_limit(&limit("1mbit")).unwrap();
    until("an outlook under the limit", || {
        let outlook = east.move_outlook("web").unwrap();
        (outlook.link_bytes_per_s <= 125_000).then_some(())
    })
    .await;
    east.set_limit(&limit("none")).unwrap();
    until("one without", || {
        let outlook = east.move_outlook("web").unwrap();
        (outlook.link_bytes_per_s > 125_000).then_some(())
    })
    .await;
    stage.end().await;
}

/// What a first copy sends in a second is what the link carries, not what the guest writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_right_after_the_first_copy_throttles_nobody() {
    let stage = Stage::set().await;
    let east = stage.east.clone();
    let (guest, definition) = Counter::start_with_library(&stage.dir.path().join("web"), 100);
    east.embed("web", guest, definition).unwrap();
    let limit = SetLimit {
        limit: Some("1mbit".parse().unwrap()),
        ..SetLimit::default()
    };
    east.set_limit(&limit).unwrap();
    let rpo = Some("1h".parse().unwrap());
    east.protect("web", "west", rpo).await.unwrap();
    until("the first point", || {
        (source(&east, "web").points_sealed == 1).then_some(())
    })
    .await;
    let report = east.move_guest("web", false).await.unwrap();
    assert!(!report.note.contains("throttled"), "{}", report.note);
    stage.end().await;
}
