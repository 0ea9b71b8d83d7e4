//! A newer term that comes in the midst of something, or is lost when a daemon begins
//! anew: what it forbids does not run all the same.

use std::sync::mpsc;

use farhaven::activate::fence::Term;
use farhaven::site::turn::RollBack;
use farhaven_storage_sync::catalogue::{Catalogue, Table};
use farhaven_storage_sync::unit::GuestId;
use serde_json::Value;

use super::turns::Both;
use super::*;

fn web(site: &Site) -> GuestId {
    source(site, "web").id.parse().unwrap()
}

/// The file in which a site keeps the term of a guest.
fn term_file(root: &Path, site: &str, guest: GuestId) -> std::path::PathBuf {
    root.join(site).join("terms").join(format!("{guest}.term"))
}

/// What a site that has ended has written down of a guest is another from here on.
async fn written_anew(
    root: &Path,
    site: &str,
    table: Table,
    guest: GuestId,
    change: impl Fn(&mut Value),
) {
    let opened = until("the catalogue", || {
        Catalogue::open(&root.join(site).join("catalogue")).ok()
    });
    let (catalogue, _) = opened.await;
    let key = guest.to_string();
    let mut row: Value = catalogue.find(table, &key).unwrap().unwrap();
    change(&mut row);
    catalogue.put(table, &key, &row).unwrap();
    catalogue.flush().unwrap();
}

/// Protected from east, and then west's: moved, or taken over by force. Both sites have
/// ended since; their directory, the guest, and west's term.
async fn at_west(moved: bool) -> (tempfile::TempDir, GuestId, Term, Vec<u8>) {
    let stage = Stage::protected().await;
    let guest = web(&stage.east);
    // As a backup of it has it.
    let before = std::fs::read(term_file(stage.dir.path(), "east", guest)).unwrap();
    match moved {
        true => drop(stage.east.move_guest("web", true).await.unwrap()),
        false => drop(stage.west.fail_over("web", None, true).await.unwrap()),
    }
    let taken = stage.west.fence.current(guest).unwrap();
    assert_eq!(taken.owner, stage.west.key());
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    stage.east.shutdown().await;
    stage.west.shutdown().await;
    stage.guest.lock().unwrap().end();
    (stage.dir, guest, taken, before)
}

/// The file with its term is lost, or is one of before. Nobody tells the site anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_stopped_for_another_site_is_that_one_s_though_its_term_is_lost() {
    for (moved, older, phase) in [
        (true, false, Phase::Moved),
        (false, false, Phase::Fenced),
        (false, true, Phase::Fenced),
    ] {
        let (dir, guest, taken, before) = at_west(moved).await;
        let file = term_file(dir.path(), "east", guest);
        std::fs::remove_file(&file).unwrap();
        if older {
            std::fs::write(&file, before).unwrap();
        }
        let east = site_again(dir.path(), "east", Builders::new()).await;
        until("it is said", || {
            (source(&east, "web").phase == phase).then_some(())
        })
        .await;
        assert_eq!(east.fence.current(guest), Some(taken), "{moved} {older}");
        // Nor does its program bring it back.
        let (again, definition) = Counter::start(&dir.path().join("again"));
        let refused = east.embed("web", again, definition).unwrap_err();
        assert!(refused.to_string().contains("fenced"), "{refused}");
        east.shutdown().await;
    }
}

/// As it was written down before that was kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_stopped_for_a_term_that_nobody_knows_any_more_stays_stopped() {
    let (dir, guest, ..) = at_west(false).await;
    std::fs::remove_file(term_file(dir.path(), "east", guest)).unwrap();
    let forget = |row: &mut Value| {
        assert_eq!(row["stopped"], true);
        assert!(row.as_object_mut().unwrap().remove("stopped_by").is_some());
    };
    written_anew(dir.path(), "east", Table::Protections, guest, forget).await;
    let east = site_again(dir.path(), "east", Builders::new()).await;
    let view = until("fenced", || {
        let view = source(&east, "web");
        (view.phase == Phase::Fenced).then_some(view)
    })
    .await;
    assert!(
        view.trouble.contains("not known here any more"),
        "{}",
        view.trouble
    );
    assert_eq!(east.fence.current(guest), None);
    east.shutdown().await;
}

/// The source may have been told to go on.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_rolled_back_is_its_source_s_though_its_term_is_lost() {
    let (dir, guest, taken, _) = at_west(true).await;
    let east = dir.path().join("east").join("identity");
    let east = farhaven_wan::Identity::load_or_create(&east, "east").unwrap();
    let returning = Term {
        number: taken.number + 1,
        owner: east.key(),
        ..taken
    };
    // As a daemon leaves it that is killed before its source's answer comes.
    let goes_back = |row: &mut Value| {
        row["returning"] = serde_json::to_value(returning).unwrap();
    };
    written_anew(dir.path(), "west", Table::Activations, guest, goes_back).await;
    std::fs::remove_file(term_file(dir.path(), "west", guest)).unwrap();
    let builder = CounterBuilder::default();
    let west = site_again(dir.path(), "west", builders(&builder)).await;
    assert_eq!(west.fence.current(guest), Some(returning));
    let view = target(&west, "web");
    assert!(
        view.active.is_none() && view.trouble.contains("fenced"),
        "{}",
        view.trouble
    );
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_ends_with_the_newer_term_that_comes_while_the_guest_is_built() {
    let stage = Stage::protected().await;
    let (guest, owner) = (web(&stage.east), stage.east.key());
    stage.east.shutdown().await;
    stage.guest.lock().unwrap().end();
    let west = stage.west.clone();
    until("the link is down", || {
        (!west.view().peers[0].connected).then_some(())
    })
    .await;
    let newer = newer_than(&stage.west, guest, owner);
    stage.at_west.when_built(move || {
        assert_eq!(west.fence.adopt(newer).unwrap(), newer);
    });
    let refused = stage.west.fail_over("web", None, false).await.unwrap_err();
    assert!(refused.to_string().contains("a newer term"), "{refused}");
    assert_eq!(stage.at_west.newest().lock().unwrap().running(), None);
    assert!(target(&stage.west, "web").active.is_none());
    stage.west.shutdown().await;
}

/// Above whatever is taken next here.
fn newer_than(site: &Site, guest: GuestId, owner: farhaven_wan::SiteKey) -> Term {
    let known = site.fence.current(guest).unwrap();
    Term {
        number: known.number + 20,
        owner,
        ..known
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_to_a_point_says_whose_the_guest_is_when_a_newer_term_comes_meanwhile() {
    let stage = Stage::protected().await;
    let (guest, owner) = (web(&stage.east), stage.east.key());
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    let first = west.points("web").await.unwrap()[0].point;
    let newer = newer_than(&west, guest, owner);
    let hears = west.clone();
    stage.at_west.when_built(move || {
        assert_eq!(hears.fence.adopt(newer).unwrap(), newer);
    });
    let to = RollBack {
        point: Some(first),
        accept_loss: false,
    };
    let refused = west.rollback("web", to).await.unwrap_err().to_string();
    assert!(
        refused.contains("is another site's by a newer term that came meanwhile"),
        "{refused}"
    );
    for built in stage.at_west.built.lock().unwrap().iter() {
        assert_eq!(built.lock().unwrap().running(), None);
    }
    assert!(target(&west, "web").active.is_none());
    drop(west);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_cut_left_stopped_does_not_go_on_against_a_newer_term() {
    let stage = Stage::protected().await;
    let newer = newer_than(&stage.east, web(&stage.east), stage.west.key());
    let (told, stood) = mpsc::channel();
    let east = stage.east.clone();
    stage.guest.lock().unwrap().when_attached(move |count| {
        assert_eq!(east.fence.adopt(newer).unwrap(), newer);
        told.send(count).unwrap();
    });
    // More often than a cut tries.
    stage.guest.lock().unwrap().fail(0, 25);
    let stood = until("it is attached to anew", || stood.try_recv().ok()).await;
    until("fenced", || {
        (source(&stage.east, "web").phase == Phase::Fenced).then_some(())
    })
    .await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    assert_eq!(sound(&stage.guest), stood, "it ran in between");
    stage.end().await;
}

/// What a monitor tells of it is not what it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_goes_on_although_it_could_not_is_stopped_before_the_other_site_s_goes_on() {
    let both = Both::protected().await;
    let stage = &both.stage;
    stage.east.move_guest("web", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    {
        let guest = stage.guest.lock().unwrap();
        guest.goes_on_all_the_same();
        guest.fail(0, 1000);
    }
    let back = RollBack::default();
    let refused = stage.west.rollback("web", back).await.unwrap_err();
    assert!(refused.to_string().contains("runs on here"), "{refused}");
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&there).await;
    let stopped = stage.guest.lock().unwrap().count();
    counts_on(&there).await;
    assert_eq!(stage.guest.lock().unwrap().count(), stopped);
    both.stage.end().await;
}
