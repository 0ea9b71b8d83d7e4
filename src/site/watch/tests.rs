//! What is measured of a site, and since when.

use std::sync::atomic::Ordering;

use super::*;
use crate::site::surroundings::tests::{Stage, until};

#[test]
fn clocks_are_compared_by_the_middle_of_the_round_trip() {
    let millis = Duration::from_millis;
    let left: u64 = 1_000_000_000_000;
    let of = |told_ms: i64| {
        let told = left.saturating_add_signed(told_ms * 1_000_000);
        let skew = Skew::of(left, millis(80), told);
        (skew.by, skew.ahead, skew.error)
    };
    assert_eq!(of(40), (millis(0), false, millis(40)));
    assert_eq!(of(1040), (millis(1000), true, millis(40)));
    assert_eq!(of(-960), (millis(1000), false, millis(40)));
    let far = Skew::of(0, millis(0), u64::MAX);
    assert_eq!((far.by, far.ahead), (Duration::from_nanos(u64::MAX), true));
}

#[test]
fn a_last_cut_alarms_nobody_until_it_takes_long() {
    assert_eq!(stands_still(Duration::from_secs(4), "throttled"), None);
    let told = |trouble| stands_still(STANDS_STILL, trouble);
    assert_eq!(told("its word").as_deref(), Some("its word"));
    assert!(told("").is_some_and(|why| why.contains("last cut")));
}

#[test]
fn times_begin_anew() {
    let mut since = Since::default();
    assert_eq!(since.holds(&1, false), None);
    assert!(
        since
            .holds(&1, true)
            .is_some_and(|time| time < Duration::from_secs(60))
    );
    let first = since.0[&1];
    since.holds(&1, true);
    assert_eq!(since.0[&1], first);
    since.only(|key| *key != 1);
    assert!(since.0.is_empty());
}

/// Nobody else will run it, and nobody would know.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_this_site_s_and_runs_nowhere_is_told_of() {
    let stage = Stage::protected().await;
    let mut watch = Watch::default();
    let mut look = |site: &Site| {
        let mut facts = watch.standbys(site);
        assert_eq!(facts.len(), 1);
        facts.remove(0)
    };
    // It runs at its source.
    assert_eq!(look(&stage.west).runs_nowhere_for, None);

    // That one is lost, and what was taken over here does not start.
    stage.east.shutdown().await;
    until("the link is down", || !stage.standby().remote().connected()).await;
    stage.bad_builds.store(1, Ordering::SeqCst);
    let refused = stage.west.fail_over("web", None, false).await.unwrap_err();
    assert!(
        refused.to_string().contains("as the test asked"),
        "{refused}"
    );
    let ours = stage.west.fence.current(stage.web).unwrap();
    assert_eq!(ours.owner, stage.west.key());
    let first = look(&stage.west);
    assert!(first.trouble.contains("as the test asked"), "{first:?}");
    let since = first.runs_nowhere_for.unwrap();
    // From the first look on, however often it is looked.
    assert!(look(&stage.west).runs_nowhere_for.unwrap() >= since);

    // It runs here.
    stage.west.fail_over("web", None, false).await.unwrap();
    let runs = look(&stage.west);
    assert_eq!(runs.runs_nowhere_for, None);
    assert!(runs.unprotected_for.is_some(), "{runs:?}");
    stage.west.shutdown().await;
}

/// What runs as this site's own is no standby's to run, however it came here.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_turned_round_does_not_run_nowhere() {
    let stage = Stage::protected().await;
    stage.west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    standby.state.lock().await.active = None;
    standby.see(|seen| seen.active = None);
    let mut watch = Watch::default();
    assert!(watch.standbys(&stage.west)[0].runs_nowhere_for.is_some());
    standby.turn(true, standby.base());
    assert_eq!(watch.standbys(&stage.west)[0].runs_nowhere_for, None);
    stage.end().await;
}
