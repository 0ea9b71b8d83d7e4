//! Names: of sites, which are told apart by their keys, and those that a peer tells.

use std::collections::BTreeSet;

use farhaven::replicate::message::{GroupMessage, PointContext};
use farhaven::site::groups::{GroupRecord, PointGroup};
use farhaven_storage_sync::catalogue::{Catalogue, Table};
use farhaven_wan::{Identity, PeerRecord, SiteKey};
use serde_json::{Value, json};

use super::*;

/// Steers a terminal.
const STEERS: &str = "east\x1b[2J";

/// East burned down, and was made anew: its key is another.
#[tokio::test(flavor = "multi_thread")]
async fn a_site_made_anew_is_not_taken_for_the_one_that_had_its_name() {
    let stage = Stage::protected().await;
    stage.east.shutdown().await;
    stage.guest.lock().unwrap().end();
    let root = stage.dir.path().join("anew");
    let anew = site(&root, "east", Builders::new()).await;
    let west = &stage.west;
    west.remove_peer("east").unwrap();

    let minute = Duration::from_secs(60);
    let refused = west.pair(&anew.invite(minute).unwrap()).await.unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("guest 'web' here is of another site"));
    assert!(refused.contains("peer forget east"), "{refused}");
    assert!(anew.view().peers.is_empty(), "it was not even asked");
    // Nor is it where west does not ask.
    anew.pair(&west.invite(minute).unwrap()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(west.view().peers.is_empty());
    assert_eq!(target(west, "web").from, "east");
    anew.remove_peer("west").unwrap();

    // Once nothing of the one that burned down is needed any more.
    let forgotten = west.forget_peer("east").await.unwrap();
    assert_eq!(forgotten.guests, ["web"]);
    assert!(forgotten.stores.iter().all(|store| store.is_dir()));
    assert!(west.view().standbys.is_empty());
    let nothing = west.forget_peer("east").await.unwrap_err().to_string();
    assert!(nothing.contains("nothing here is of"), "{nothing}");
    west.pair(&anew.invite(minute).unwrap()).await.unwrap();
    until("the link", || {
        let peers = anew.view().peers;
        peers.first().is_some_and(|p| p.connected).then_some(())
    })
    .await;
    let (guest, definition) = Counter::start(&root.join("guest"));
    anew.embed("web", guest.clone(), definition).unwrap();
    anew.protect("web", "west", None).await.unwrap();
    until("a point", || {
        (source(&anew, "web").points_sealed > 0).then_some(())
    })
    .await;
    assert_eq!(target(west, "web").id, source(&anew, "web").id);
    let refused = west.forget_peer("east").await.unwrap_err().to_string();
    assert!(refused.contains("is paired"), "{refused}");
    anew.shutdown().await;
    stage.west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_forgotten_of_a_site_whose_guest_runs_here() {
    let stage = Stage::protected().await;
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    stage.west.remove_peer("east").unwrap();
    let refused = stage.west.forget_peer("east").await.unwrap_err();
    assert!(refused.to_string().contains("runs here"), "{refused}");
    counts_on(&there).await;
    assert!(target(&stage.west, "web").active.is_some());
    stage.end().await;
}

/// The catalogue of a stopped site, where a peer has another key from now on.
async fn replaced(site: &Path, peer: &str, key: SiteKey) -> Catalogue {
    let opened = || Catalogue::open(&site.join("catalogue")).ok();
    let (catalogue, _) = until("the catalogue", opened).await;
    let mut row: Value = catalogue.find(Table::Peers, peer).unwrap().unwrap();
    row["key"] = json!(key);
    catalogue.put(Table::Peers, peer, &row).unwrap();
    catalogue.flush().unwrap();
    catalogue
}

/// As a version of before left it: the site that is paired has the name of another, whose
/// guest is kept here, and no row says by which key.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_another_site_of_the_same_name_is_not_its_own() {
    let stage = Stage::protected().await;
    let (web, east) = (id(&stage), stage.east.key());
    let root = stage.dir.path();
    let identity = root.join("other");
    let other = Identity::load_or_create(&identity, "east").unwrap().key();
    stage.east.shutdown().await;
    stage.west.shutdown().await;
    drop((stage.east, stage.west));
    let catalogue = replaced(&root.join("west"), "east", other).await;
    let row = web.to_string();
    let mut kept: Value = catalogue.find(Table::Remote, &row).unwrap().unwrap();
    assert_eq!(kept["key"], json!(east));
    kept.as_object_mut().unwrap().remove("key");
    catalogue.put(Table::Remote, &row, &kept).unwrap();
    catalogue.flush().unwrap();
    drop(catalogue);

    let west = site_again(root, "west", builders(&stage.at_west)).await;
    let at = PeerRecord {
        site: "west".to_owned(),
        key: west.key(),
        addresses: vec![west.local_addr().to_string()],
        dial: true,
    };
    let mut mallory = Hostile::trusted(&identity, "east", &stage.definition, at).await;
    let term = west.fence.current(web).unwrap();
    assert_eq!(term.owner, east);
    refused(
        mallory.ask(Message::Points { guest: web }).await,
        "has not been opened",
    );
    let opening = mallory.opening(web, "web", term.number + 5);
    refused(
        mallory.ask(Message::Open(Box::new(opening))).await,
        "from 'east'",
    );
    let newer = Term {
        number: term.number + 5,
        owner: other,
        ..term
    };
    let _ = mallory.ask(Message::Terms { terms: vec![newer] }).await;
    assert_eq!(west.fence.current(web), Some(term), "it counts for nothing");
    mallory.node.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_goes_to_a_site_that_is_paired_no_more_can_be_unprotected() {
    let stage = Stage::protected().await;
    let root = stage.dir.path();
    stage.east.shutdown().await;
    stage.west.shutdown().await;
    drop((stage.east, stage.west));
    drop(replaced(&root.join("east"), "west", SiteKey::from_bytes([7; 32])).await);
    let east = site_again(root, "east", Builders::new()).await;
    // It is not protected to the one that has that name now.
    assert_eq!(source(&east, "web").peer, None);
    east.remove_peer("west").unwrap();
    east.unprotect("web", false).await.unwrap();
    let again = east.unprotect("web", false).await.unwrap_err().to_string();
    assert!(again.contains("is not protected"), "{again}");
    east.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_name_is_refused_before_it_is_kept() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    for bad in [STEERS.to_owned(), "../west".to_owned(), "x".repeat(70_000)] {
        let mut opening = mallory.opening(own, "own", 1);
        opening.source = bad;
        let told = mallory.ask(Message::Open(Box::new(opening))).await;
        refused(told, "no name for a site");
    }
    assert!(stage.west.view().standbys.iter().all(|s| s.from == "east"));
    assert_eq!(stage.west.fence.current(own), None);

    mallory.open(own, "own", 1).await;
    type Change = fn(&mut PointContext);
    let changes: [(Change, &str); 3] = [
        (
            |context| context.name = STEERS.to_owned(),
            "no name for one",
        ),
        (
            |context| context.source = STEERS.to_owned(),
            "no name for one",
        ),
        (
            |context| {
                context.group = Some(PointGroup {
                    id: GuestId::random(),
                    name: STEERS.to_owned(),
                    cut: 1,
                    skew_ns: 0,
                    members: BTreeSet::new(),
                });
            },
            "of a group that none can be",
        ),
    ];
    for (change, words) in changes {
        let mut seal = mallory.seal(own, "own", 1, 1, 0);
        let Message::Seal(request) = &mut seal else {
            panic!()
        };
        change(&mut request.context);
        refused(mallory.ask(seal).await, words);
    }
    assert_eq!(target(&stage.west, "own").points, 0);

    let group = |guest: GuestId, policy: &str, peer: &str, after: &str| {
        let group = json!({
            "id": GuestId([7; 16]), "name": "bank", "policy": policy, "peer": peer,
            "members": {"own": {"guest": guest, "terms": {"after": [after]}}},
        });
        let group: GroupRecord = serde_json::from_value(group).unwrap();
        Message::Group(Box::new(GroupMessage::Known(group)))
    };
    for (told, words) in [
        (group(own, STEERS, "west", "db"), "policy"),
        (group(own, "gold", STEERS, "db"), "goes to"),
        (group(own, "gold", "west", STEERS), "told unsoundly"),
        (group(id(&stage), "gold", "west", "db"), "another site"),
    ] {
        refused(mallory.ask(told).await, words);
    }
    assert!(stage.west.groups().is_empty());
    let told = mallory.ask(group(own, "gold", "west", "db")).await;
    assert!(matches!(told, Ok(Message::Done)), "{told:?}");
    let known = stage.west.groups();
    assert_eq!(known[0].key, Some(mallory.key()), "which was not told");
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}
