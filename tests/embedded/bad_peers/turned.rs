//! A site that asks for what it may no more: the term of the guest is another's by now.

use farhaven::replicate::message::GroupMessage;
use farhaven::site::records::StandbyRecord;
use farhaven_storage_sync::catalogue::{Catalogue, Table};

use super::*;
use crate::turns::{Both, hydrated};

/// That so many of its newest points are kept, and its memory is kept warm.
fn owed(guest: GuestId, newest: u32) -> Message {
    let mut retention = farhaven_policies::policy::Policy::default().retention;
    retention.newest = newest;
    Message::Group(Box::new(GroupMessage::Owed {
        guest,
        warm: true,
        retention,
        schedule: None,
    }))
}

async fn fenced(east: &mut Hostile, question: Message) {
    let asked = format!("{question:?}");
    let code = refused(east.ask(question).await, "not that site's");
    assert_eq!(code, Refusal::Fenced, "{asked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_over_here_is_not_prepared_changed_or_handed_over_by_its_source() {
    let (stage, mut east, there, taken) = taken_over().await;
    let (west, web) = (&stage.west, taken.group);
    let before = west.plan_prune("web").await.unwrap().retention;
    assert!(!before.contains("4711"), "{before}");
    let runs_from = target(west, "web").active.unwrap().point;
    // As a hand-over whose answer was lost, of another point than runs here.
    let mut seal = east.seal(web, "web", runs_from + 1000, taken.number, 0);
    let Message::Seal(request) = &mut seal else {
        panic!()
    };
    request.activate = Some(taken);
    for question in [Message::Prepare { guest: web }, owed(web, 4711), seal] {
        fenced(&mut east, question).await;
    }
    let close = |discard| Message::Close {
        guest: web,
        discard,
    };
    fenced(&mut east, close(true)).await;
    refused(east.ask(close(false)).await, "runs here");
    counts_on(&there).await;
    let view = target(west, "web");
    assert_eq!(
        (view.from.as_str(), view.term),
        ("east", Some(taken.number))
    );
    assert_eq!(view.active.unwrap().point, runs_from);
    assert_eq!(west.plan_prune("web").await.unwrap().retention, before);
    // Nor once it has ended here: no other is made ready in its place.
    west.end_guest("web").await.unwrap();
    fenced(&mut east, Message::Prepare { guest: web }).await;
    // And what it ran from is all that is left.
    let points = west.points("web").await.unwrap().len();
    fenced(&mut east, close(true)).await;
    assert_eq!(west.points("web").await.unwrap().len(), points);
    assert_eq!(stage.at_west.built.lock().unwrap().len(), 1);
    assert_eq!(west.fence.current(web), Some(taken));
    west.shutdown().await;
    east.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_turned_round_is_not_ended_by_the_site_that_it_came_from() {
    let Both { stage, .. } = Both::protected().await;
    let web = id(&stage);
    let west_at = stage.east.view().peers[0].addresses.clone();
    stage.west.fail_over("web", None, true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    stage.west.commit("web", false).await.unwrap();
    hydrated(&stage.west).await;
    stage.west.reprotect("web", None).await.unwrap();
    stage.east.shutdown().await;
    let mut east = Hostile::instead_of_east(&stage, west_at).await;
    for question in [
        Message::Prepare { guest: web },
        owed(web, 4711),
        Message::Close {
            guest: web,
            discard: false,
        },
        Message::Close {
            guest: web,
            discard: true,
        },
    ] {
        fenced(&mut east, question).await;
    }
    counts_on(&there).await;
    assert_eq!(source(&stage.west, "web").id, web.to_string());

    // And that it came from there is known on.
    let Stage { west, dir, .. } = stage;
    west.shutdown().await;
    drop(west);
    let catalogue = dir.path().join("west").join("catalogue");
    let (catalogue, _) = until("the catalogue", || Catalogue::open(&catalogue).ok()).await;
    let kept = catalogue.find::<StandbyRecord>(Table::Remote, &web.to_string());
    let kept = kept.unwrap().unwrap();
    assert_eq!((kept.from.as_str(), kept.turned), ("east", true));
    assert_ne!(kept.opening.retention.newest, 4711);
    east.node.shutdown().await;
}
