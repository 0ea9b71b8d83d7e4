//! Evacuations: everything goes, in order and against its plan; what cannot go
//! stays and is said; pauses, aborts and restarts lose nothing.

use std::collections::BTreeMap;

use farhaven::site::evacuate::{Evacuation, EvacuationState, GuestState, Order};
use farhaven::site::groups::{GroupMember, GroupRecord};
use farhaven_policies::evacuate::Verdict;
use farhaven_policies::files::{Member, NamedPolicy};
use farhaven_storage_sync::unit::GuestId;

use super::*;

const LONG: Duration = Duration::from_secs(90);

type Guests = BTreeMap<String, Arc<Mutex<Counter>>>;

/// Counting guests at east, of which some are protected and have points.
async fn several(stage: &Stage, all: &[&str], protected: &[&str]) -> Guests {
    let guests = embedded(&stage.east, stage.dir.path(), all);
    for name in protected {
        let rpo = "1s".parse().unwrap();
        stage.east.protect(name, "west", Some(rpo)).await.unwrap();
    }
    for name in protected {
        let east = stage.east.clone();
        until("a point", || {
            (source(&east, name).points_sealed >= 1).then_some(())
        })
        .await;
    }
    guests
}

fn embedded(east: &Arc<Site>, directory: &Path, names: &[&str]) -> Guests {
    let mut guests = Guests::new();
    for name in names {
        let (guest, definition) = Counter::start(&directory.join(name));
        east.embed(name, guest.clone(), definition).unwrap();
        guests.insert((*name).to_owned(), guest);
    }
    guests
}

fn order(deadline: &str) -> Order {
    Order {
        to: "west".to_owned(),
        deadline: Some(deadline.parse().unwrap()),
        accept_pause: true,
        ..Order::default()
    }
}

async fn ended(east: &Arc<Site>) -> Evacuation {
    reached(east, "the end", |record| record.state.is_over()).await
}

async fn reached(east: &Arc<Site>, what: &str, wanted: impl Fn(&Evacuation) -> bool) -> Evacuation {
    let deadline = Instant::now() + LONG;
    loop {
        let record = east.evacuation(None).unwrap();
        if wanted(&record) {
            return record;
        }
        assert!(Instant::now() < deadline, "not {what}: {record:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn state(record: &Evacuation, name: &str) -> (GuestState, String) {
    let guest = record.guests.iter().find(|g| g.guest == name).unwrap();
    (guest.state, guest.why.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_goes_in_order_and_is_reported_against_the_plan() {
    let stage = Stage::set().await;
    let names = ["app", "db", "mail", "web"];
    let guests = several(&stage, &names, &["app", "db"]).await;
    let member = |name: &str, after: &[&str]| GroupMember {
        guest: stage.east.guest(name).unwrap().id,
        terms: Member {
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            ..Member::default()
        },
    };
    let group = GroupRecord {
        id: GuestId::random(),
        name: "shop".to_owned(),
        from: None,
        peer: "west".to_owned(),
        key: None,
        policy: String::new(),
        owed: NamedPolicy::default(),
        members: BTreeMap::from([
            ("app".to_owned(), member("app", &["db"])),
            ("db".to_owned(), member("db", &[])),
        ]),
    };
    stage.east.keep_group(&group).unwrap();

    let preview = stage.east.plan_evacuation(&order("10m")).await.unwrap();
    assert_eq!(preview.plan.verdict, Verdict::Fits);
    assert_eq!(preview.basis.guests.len(), 4);
    assert!(preview.excluded.is_empty());
    let measured = |name: &str| {
        let basis = preview.basis.guests.iter().find(|g| g.guest == name);
        basis.unwrap().measured
    };
    assert!(measured("db") && !measured("web"));
    // Who goes as one is cut at one instant.
    let waves = preview.plan.waves.iter();
    let passages: Vec<_> = waves.flat_map(|wave| &wave.groups).collect();
    let mut shop = passages
        .iter()
        .find(|of| of.group == "shop")
        .unwrap()
        .guests
        .clone();
    shop.sort();
    assert_eq!(shop, ["app", "db"]);
    assert_eq!(passages.len(), 3, "{passages:#?}");
    assert!(stage.east.evacuations().is_empty(), "a plan does nothing");

    let begun = stage.east.begin_evacuation(&order("10m")).await.unwrap();
    assert_eq!(begun.guests.len(), 4);
    let twice = stage
        .east
        .begin_evacuation(&order("10m"))
        .await
        .unwrap_err();
    assert!(twice.to_string().contains("is under way"), "{twice}");
    let record = ended(&stage.east).await;
    assert_eq!(record.state, EvacuationState::Done, "{record:#?}");
    let at = |name: &str| {
        let guest = record.guests.iter().find(|g| g.guest == name).unwrap();
        assert_eq!(guest.state, GuestState::Moved);
        let report = guest.report.as_ref().unwrap();
        assert!(report.blackout_ms > 0.0 && guest.bytes > 0 && guest.planned.is_some());
        guest.moved_ms.unwrap()
    };
    // As one instant: what waits for the other is not moved before it.
    assert!(at("db") <= at("app"), "{record:#?}");
    let mut cuts = Vec::new();
    for name in ["db", "app"] {
        let point = target(&stage.west, name).active.unwrap().point;
        let mut points = stage.west.points(name).await.unwrap().into_iter();
        let point = points.find(|p| p.point == point).unwrap();
        cuts.push(point.group.unwrap().cut);
    }
    assert_eq!(cuts[0], cuts[1]);
    for name in names {
        at(name);
        // Kept as it was, stopped, until somebody commits or it is rolled back.
        assert_eq!(guests[name].lock().unwrap().running(), Some(false));
        assert!(target(&stage.west, name).active.is_some());
        assert_eq!(source(&stage.east, name).phase, Phase::Moved);
    }
    // Nothing is left to go, and the report is kept.
    let again = stage.east.plan_evacuation(&order("10m")).await.unwrap_err();
    assert!(again.to_string().contains("no guest runs here"), "{again}");
    assert_eq!(stage.east.evacuations().len(), 1);
    assert_eq!(stage.east.evacuation(Some(1)).unwrap().guests.len(), 4);
    assert!(stage.east.abort_evacuation().await.is_err());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_or_left() {
    let stage = Stage::set().await;
    let mut guests = several(&stage, &["small"], &["small"]).await;
    // Its first copy alone takes minutes over such a link.
    let (big, definition) = Counter::start_on(&stage.dir.path().join("big"), 200_000);
    stage.east.embed("big", big.clone(), definition).unwrap();
    guests.insert("big".to_owned(), big);
    let mut wanted = order("20s");
    wanted.link_rate = Some("8mbit".parse().unwrap());
    let preview = stage.east.plan_evacuation(&wanted).await.unwrap();
    assert_eq!(preview.plan.verdict, Verdict::DoesNotFit);
    let refused = stage.east.begin_evacuation(&wanted).await.unwrap_err();
    let told = refused.to_string();
    for words in ["'big' would be left", "--deadline", "--partial"] {
        assert!(told.contains(words), "no '{words}' in: {told}");
    }
    assert!(stage.east.evacuations().is_empty());
    assert_eq!(source(&stage.east, "big").phase, Phase::Unprotected);

    wanted.partial = true;
    stage.east.begin_evacuation(&wanted).await.unwrap();
    let record = ended(&stage.east).await;
    assert_eq!(state(&record, "small").0, GuestState::Moved);
    assert!(
        record
            .guests
            .iter()
            .all(|g| (g.guest == "big") == g.planned.is_none())
    );
    // The link was better than was said: it is moved all the same, or left.
    let (state, why) = state(&record, "big");
    match state {
        GuestState::Moved => {}
        _ => assert!(sound(&guests["big"]) > 0, "{state:?} {why}"),
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_leaves_what_has_not_moved_here_and_protected() {
    let stage = Stage::set().await;
    let names = ["a", "b", "c", "d", "e"];
    let guests = several(&stage, &names, &names).await;
    stage.east.begin_evacuation(&order("10m")).await.unwrap();
    stage.east.pause_evacuation().await.unwrap();
    let twice = stage.east.pause_evacuation().await.unwrap_err();
    assert!(twice.to_string().contains("paused already"), "{twice}");
    // What was under way ends, and nothing more begins.
    let under_way = |record: &Evacuation| record.count(GuestState::Moving);
    reached(&stage.east, "quiet", |record| under_way(record) == 0).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let record = stage.east.evacuation(None).unwrap();
    assert_eq!(
        (record.state, under_way(&record)),
        (EvacuationState::Paused, 0)
    );
    let moved = record.count(GuestState::Moved);
    assert!(moved <= 2, "{record:#?}");
    stage.east.abort_evacuation().await.unwrap();
    let record = ended(&stage.east).await;
    assert_eq!(record.state, EvacuationState::Aborted);
    assert_eq!(record.count(GuestState::Left), names.len() - moved);
    for guest in record.guests.iter().filter(|g| g.state == GuestState::Left) {
        assert!(
            guest.why.contains("runs on here, protected"),
            "{}",
            guest.why
        );
        counts_on(&guests[&guest.guest]).await;
        let (east, name) = (stage.east.clone(), guest.guest.clone());
        let before = source(&east, &name).points_sealed;
        until("it is protected on", || {
            (source(&east, &name).points_sealed > before).then_some(())
        })
        .await;
    }
    // Another one may begin, and takes the rest.
    stage.east.begin_evacuation(&order("10m")).await.unwrap();
    let record = ended(&stage.east).await;
    assert_eq!((record.id, record.state), (2, EvacuationState::Done));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_go_stops_no_other_and_is_reported() {
    let stage = Stage::set().await;
    let guests = several(&stage, &["bad", "good"], &["bad", "good"]).await;
    guests["bad"].lock().unwrap().ask_for(b"cannot");
    stage.east.begin_evacuation(&order("12s")).await.unwrap();
    let record = ended(&stage.east).await;
    assert_eq!(record.state, EvacuationState::PartlyDone);
    assert_eq!(state(&record, "good").0, GuestState::Moved);
    let (state, why) = state(&record, "bad");
    assert_eq!(state, GuestState::Failed);
    assert!(
        why.contains("teach it") && why.contains("was not moved"),
        "{why}"
    );
    let bad = record.guests.iter().find(|g| g.guest == "bad").unwrap();
    assert!(bad.tries >= 2, "tried again: {record:#?}");
    assert!(
        record
            .changes
            .iter()
            .any(|c| c.what.contains("is tried again"))
    );
    counts_on(&guests["bad"]).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_goes_on_after_a_restart_of_the_daemon() {
    let stage = Stage::set().await;
    let names = ["a", "b", "c", "d"];
    let guests = several(&stage, &names, &names).await;
    stage.east.begin_evacuation(&order("10m")).await.unwrap();
    reached(&stage.east, "begun", |r| r.count(GuestState::Moved) >= 1).await;
    stage.east.shutdown().await;
    let Stage {
        east, west, dir, ..
    } = stage;
    drop(east);
    // These end with their daemon, and their program brings them back.
    for guest in guests.values() {
        guest.lock().unwrap().end();
    }
    let east = site_again(dir.path(), "east", Builders::new()).await;
    let record = east.evacuation(None).unwrap();
    assert_eq!(record.state, EvacuationState::Running);
    for name in names {
        let (guest, definition) = Counter::start(&dir.path().join(format!("again-{name}")));
        // What was being handed over is asked about first.
        until("it is back, or was moved", || {
            let moved = source(&east, name).phase == Phase::Moved;
            let back = || east.embed(name, guest.clone(), definition.clone()).is_ok();
            (moved || back()).then_some(())
        })
        .await;
    }
    let record = ended(&east).await;
    assert!(
        record.changes.iter().any(|c| c.what.contains("restarted")),
        "{record:#?}"
    );
    for name in names {
        let (state, why) = state(&record, name);
        assert_eq!(state, GuestState::Moved, "{name}: {why}");
        assert!(target(&west, name).active.is_some());
    }
    east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_make_no_sense_are_refused_with_their_reason() {
    let stage = Stage::set().await;
    let guests = several(&stage, &["a", "b", "lost"], &["a", "lost"]).await;
    let refused = async |order: Order, words: &str| {
        for told in [
            stage.east.plan_evacuation(&order).await.map(drop),
            stage.east.begin_evacuation(&order).await.map(drop),
        ] {
            let told = told.unwrap_err().to_string();
            assert!(told.contains(words), "no '{words}' in: {told}");
        }
    };
    let to = |to: &str| Order {
        to: to.to_owned(),
        ..order("10m")
    };
    let of = |guests: &[&str]| Order {
        guests: guests.iter().map(|g| (*g).to_owned()).collect(),
        ..order("10m")
    };
    refused(to("north"), "no site 'north' is paired").await;
    refused(of(&["a", "nobody"]), "no guest 'nobody'").await;
    let group = Order {
        groups: vec!["nobody".to_owned()],
        ..order("10m")
    };
    refused(group, "no group 'nobody'").await;
    refused(order("0s"), "has passed").await;

    guests["lost"].lock().unwrap().end();
    let east = stage.east.clone();
    until("lost", || {
        (source(&east, "lost").phase == Phase::Lost).then_some(())
    })
    .await;
    refused(of(&["lost"]), "it is LOST").await;
    let preview = stage.east.plan_evacuation(&order("10m")).await.unwrap();
    let excluded: Vec<_> = preview.excluded.iter().map(|e| e.guest.as_str()).collect();
    assert_eq!(excluded, ["lost"]);

    stage.east.move_guest("a", true).await.unwrap();
    refused(of(&["a"]), "runs at 'west' already").await;
    // Without a peer there is no plan, and none is made up.
    stage.west.shutdown().await;
    until("the link is down", || {
        (!east.view().peers[0].connected).then_some(())
    })
    .await;
    refused(order("10m"), "cannot be reached").await;
    assert!(stage.east.evacuations().is_empty());
    stage.east.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_damaged_keeps_no_daemon_from_starting() {
    let stage = Stage::set().await;
    let at = stage.dir.path().join("east").join("evacuations");
    std::fs::create_dir_all(&at).unwrap();
    for (number, text) in [("1", "{"), ("7", "[1, 2]"), ("x", "{}")] {
        std::fs::write(at.join(format!("{number}.json")), text).unwrap();
    }
    stage.east.shutdown().await;
    let Stage {
        east, west, dir, ..
    } = stage;
    drop(east);
    let east = site_again(dir.path(), "east", Builders::new()).await;
    let told = east.evacuation(None).unwrap_err().to_string();
    assert!(told.contains("7.json"), "{told}");
    assert!(east.evacuations().is_empty());
    assert!(east.pause_evacuation().await.is_err());
    east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_peer_is_waited_for_and_an_abort_leaves_everything_here() {
    let stage = Stage::set().await;
    let names = ["a", "b", "c"];
    let guests = several(&stage, &names, &names).await;
    stage.east.begin_evacuation(&order("10m")).await.unwrap();
    stage.east.pause_evacuation().await.unwrap();
    let quiet = |record: &Evacuation| record.count(GuestState::Moving) == 0;
    let moved = reached(&stage.east, "quiet", quiet).await;
    let moved = moved.count(GuestState::Moved);
    stage.west.shutdown().await;
    let down = |record: &Evacuation| {
        record
            .trouble
            .contains("is down; moves go on when it is back")
    };
    reached(&stage.east, "noticed", down).await;
    stage.east.resume_paused_evacuation().await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let record = stage.east.evacuation(None).unwrap();
    assert_eq!(record.state, EvacuationState::Running);
    assert_eq!(record.count(GuestState::Moved), moved);
    assert_eq!(record.count(GuestState::Moving), 0, "{record:#?}");
    stage.east.abort_evacuation().await.unwrap();
    let record = ended(&stage.east).await;
    assert_eq!(record.state, EvacuationState::Aborted);
    for guest in record.guests.iter().filter(|g| g.state == GuestState::Left) {
        counts_on(&guests[&guest.guest]).await;
    }
    assert_eq!(record.count(GuestState::Left), names.len() - moved);
    stage.east.shutdown().await;
}
