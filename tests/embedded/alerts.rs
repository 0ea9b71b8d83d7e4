//! Alerts that stand and end, events, points with a name, what a prune would do.

use farhaven::client::Client;
use farhaven::site::alerts::{Alert, AlertView, Kind};
use farhaven::site::events::{Event, EventKind};
use farhaven::site::kept::PointChoice;
use farhaven_policies::alert::Severity;
use farhaven_policies::files::Alerts as Thresholds;
use farhaven_policies::units::Period;

use super::*;

fn standing(site: &Site, kind: Kind, subject: &str) -> Option<AlertView> {
    let mut alerts = site.alerts().into_iter();
    alerts.find(|alert| alert.kind == kind && alert.subject == subject)
}

async fn all_events(site: &Site) -> Vec<Event> {
    site.events(0, 10_000, Duration::ZERO).await
}

fn count(events: &[Event], kind: EventKind, of: Kind) -> usize {
    let of = |event: &&Event| event.alert.as_ref().is_some_and(|alert| alert.kind == of);
    events.iter().filter(|e| e.kind == kind).filter(of).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_rpo_over_target_is_told_once_and_ends_when_points_come_again() {
    let stage = Stage::protected().await;
    let east = stage.east.clone();
    east.pause("web").await.unwrap();
    let alert = until("critical", || {
        let alert = standing(&east, Kind::RpoOverTarget, "web")?;
        (alert.severity == Severity::Critical).then_some(alert)
    })
    .await;
    assert!(
        alert.advice.contains("farhaven resume web"),
        "{}",
        alert.advice
    );
    assert_eq!(alert.acknowledged_by, None);
    assert!(east.acknowledge(alert.id, " \n").is_err());
    assert!(east.acknowledge(alert.id + 100, "ada").is_err());
    let acknowledged = east.acknowledge(alert.id, "ada").unwrap();
    assert_eq!(acknowledged.acknowledged_by.as_deref(), Some("ada"));
    assert_eq!(east.view().alerts, east.alerts());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let seen = standing(&east, Kind::RpoOverTarget, "web").unwrap();
    assert_eq!(
        (seen.id, seen.acknowledged_by.as_deref()),
        (alert.id, Some("ada"))
    );
    east.resume("web").await.unwrap();
    until("over", || {
        standing(&east, Kind::RpoOverTarget, "web")
            .is_none()
            .then_some(())
    })
    .await;
    let events = all_events(&east).await;
    let told = |kind| count(&events, kind, Kind::RpoOverTarget);
    // Raised as a warning, then worse; or at once as what it came to.
    assert_eq!(told(EventKind::AlertRaised), 1);
    assert!(told(EventKind::AlertWorsened) <= 1);
    assert_eq!(told(EventKind::AlertAcknowledged), 1);
    assert_eq!(told(EventKind::AlertCleared), 1);
    assert!(events.is_sorted_by(|one, next| one.number < next.number));
    assert!(
        events
            .iter()
            .any(|event| event.kind == EventKind::PeerConnected)
    );
    // Whoever asks for what is to come is told as soon as it comes.
    let last = events.last().unwrap().number;
    let next = tokio::spawn({
        let east = east.clone();
        async move { east.events(last, 10, PATIENCE).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    east.raise(Alert::new(
        Kind::PolicyBroken,
        "a.toml",
        Severity::Warning,
        "broken",
        "mend it",
    ));
    let next = next.await.unwrap();
    assert_eq!(next[0].alert.as_ref().unwrap().kind, Kind::PolicyBroken);
    drop(east);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_events_outlive_a_restart_and_thresholds_are_heeded() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    let broken = || {
        Alert::new(
            Kind::PolicyBroken,
            "a.toml",
            Severity::Warning,
            "broken",
            "mend it",
        )
    };
    west.raise(broken());
    west.raise(broken());
    let id = standing(&west, Kind::PolicyBroken, "a.toml").unwrap().id;
    west.acknowledge(id, "ada").unwrap();
    assert_eq!(standing(&west, Kind::TestOverdue, "web"), None);
    west.heed_thresholds(Thresholds {
        test_overdue: Period::from_secs(1),
        ..Thresholds::default()
    });
    until("overdue", || standing(&west, Kind::TestOverdue, "web")).await;
    west.heed_thresholds(Thresholds {
        test_overdue: Period::from_secs(3600),
        ..Thresholds::default()
    });
    west.test("web", None).await.unwrap();
    west.end_test("web").await.unwrap();
    until("tested", || {
        standing(&west, Kind::TestOverdue, "web")
            .is_none()
            .then_some(())
    })
    .await;
    let before = all_events(&west).await;
    west.shutdown().await;
    drop((west, stage.west));
    // The guest of the test reads from the store, and holds it open.
    stage.at_west.built.lock().unwrap().clear();
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    let seen = standing(&west, Kind::PolicyBroken, "a.toml").unwrap();
    assert_eq!(
        (seen.id, seen.acknowledged_by.as_deref()),
        (id, Some("ada"))
    );
    let after = all_events(&west).await;
    assert_eq!(after[..before.len()], before[..]);
    assert_eq!(after[before.len()].kind, EventKind::Started);
    west.raise(broken());
    west.clear(Kind::PolicyBroken, "a.toml");
    west.clear(Kind::PolicyBroken, "a.toml");
    assert_eq!(standing(&west, Kind::PolicyBroken, "a.toml"), None);
    let events = all_events(&west).await;
    assert_eq!(
        count(&events, EventKind::AlertRaised, Kind::PolicyBroken),
        1
    );
    assert_eq!(
        count(&events, EventKind::AlertCleared, Kind::PolicyBroken),
        1
    );
    stage.east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_with_a_name_outlives_prunes_restarts_and_a_lost_catalogue() {
    let stage = Stage::protected().await;
    // Asked for where the guest runs; kept where its points are.
    let first = stage.west.points("web").await.unwrap()[0].point;
    let choice = Some(PointChoice::Number(first));
    let kept = stage
        .east
        .keep_point("web", choice, "before upgrade")
        .await
        .unwrap();
    assert_eq!(
        (kept.point, kept.name.as_deref()),
        (first, Some("before upgrade"))
    );
    let newest = stage.west.keep_point("web", None, "x").await.unwrap().point;
    let taken = stage
        .west
        .keep_point("web", Some(PointChoice::Number(newest)), "before upgrade")
        .await;
    assert!(taken.unwrap_err().to_string().contains("under that name"));
    assert!(stage.east.keep_point("web", None, "4711").await.is_err());
    assert!(
        stage
            .west
            .keep_point("web", Some(PointChoice::Number(1 << 40)), "y")
            .await
            .is_err()
    );
    let by_name = |name: &str| PointChoice::Name(name.to_owned());
    let released = stage.east.release_point("web", by_name("x")).await.unwrap();
    assert_eq!(released.point, newest);
    assert!(stage.west.release_point("web", by_name("x")).await.is_err());

    let refused = stage.east.unprotect("web", true).await.unwrap_err();
    assert!(refused.to_string().contains("point release"), "{refused}");
    stage.west.shutdown().await;
    drop(stage.west);
    let state = stage.dir.path().join("west").join("catalogue");
    let deadline = Instant::now() + PATIENCE;
    while std::fs::remove_dir_all(&state).is_err() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    let points = west.points("web").await.unwrap();
    assert_eq!(points[0].point, first);
    assert_eq!(points[0].name.as_deref(), Some("before upgrade"));
    let number = west
        .point_number("web", Some(&by_name("before upgrade")))
        .unwrap();
    assert_eq!(number, Some(first));
    assert!(west.point_number("web", Some(&by_name("x"))).is_err());

    // Whatever the policy says, it stays; the plan says why, and does nothing.
    let plan = west.plan_prune("web").await.unwrap();
    let fate = plan.points.iter().find(|fate| fate.point == first).unwrap();
    assert!(
        fate.keep && fate.reason.contains("before upgrade"),
        "{fate:?}"
    );
    assert!(plan.points.last().unwrap().keep);
    assert_eq!(
        plan.points.iter().filter(|fate| !fate.keep).count(),
        plan.dropped
    );
    assert!(west.plan_prune("web").await.unwrap().points.len() >= plan.points.len());
    west.run_prune("web").await.unwrap();
    let points = west.points("web").await.unwrap();
    assert_eq!(points[0].point, first);
    let report = west.test("web", number).await.unwrap();
    assert_eq!(report.point, first);
    counts_on(&stage.at_west.newest()).await;
    west.end_test("web").await.unwrap();
    stage.east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_tells_of_alerts_events_and_prunes() {
    let stage = Stage::protected().await;
    let socket = stage.dir.path().join("api.sock");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn({
        let (west, socket) = (stage.west.clone(), socket.clone());
        async move {
            let stop = async move {
                let _ = stopped.await;
            };
            farhaven::site::api::serve(west, &socket, stop).await
        }
    });
    until("served", || socket.exists().then_some(())).await;
    let client = Client::new(&socket);
    stage.west.raise(Alert::new(
        Kind::PolicyBroken,
        "a.toml",
        Severity::Warning,
        "broken",
        "mend it",
    ));
    let alerts: Vec<AlertView> = client.get("/v1/alerts").await.unwrap();
    let id = alerts
        .iter()
        .find(|a| a.kind == Kind::PolicyBroken)
        .unwrap()
        .id;
    let body = serde_json::json!({"by": "ada"});
    let path = format!("/v1/alerts/{id}/acknowledge");
    let alert: AlertView = client.post(&path, &body).await.unwrap();
    assert_eq!(alert.acknowledged_by.as_deref(), Some("ada"));
    let events: farhaven::site::api::Events = client.get("/v1/events?limit=1").await.unwrap();
    assert_eq!((events.events.len(), events.next), (1, 1));
    let path = format!("/v1/events?after={}&wait_s=1", 1_u64 << 40);
    let again: farhaven::site::api::Events = client.get(&path).await.unwrap();
    assert!(
        again.events.len() > 1,
        "a number that never was begins anew"
    );
    for bad in [
        "/v1/events?after=x",
        "/v1/events?sort=up",
        "/v1/alerts/x/acknowledge",
    ] {
        let refused = client.get::<serde_json::Value>(bad).await;
        assert!(refused.is_err(), "{bad}");
    }
    let plan: farhaven::site::retention::PruneView =
        client.get("/v1/guests/web/prune").await.unwrap();
    assert_eq!((plan.guest.as_str(), plan.from.as_str()), ("web", "east"));
    let body = serde_json::json!({"name": "before upgrade"});
    let kept: farhaven::site::kept::KeptPoint = client
        .post("/v1/guests/web/points/keep", &body)
        .await
        .unwrap();
    let body = serde_json::json!({"point": "before upgrade"});
    let report: farhaven::site::view::TestReport =
        client.post("/v1/guests/web/test", &body).await.unwrap();
    assert_eq!(report.point, kept.point);
    let _: serde_json::Value = client.delete("/v1/guests/web/test").await.unwrap();
    drop(stop);
    served.await.unwrap().unwrap();
    stage.end().await;
}
