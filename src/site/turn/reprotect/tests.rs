//! What is left of a reprotection that failed midway.

use super::*;
use crate::site::surroundings::tests::Stage;

/// What a site has written down of a guest.
fn written(site: &Site, standby: &Standby) -> [Option<serde_json::Value>; 4] {
    let tables = [
        Table::Guests,
        Table::Protections,
        Table::Remote,
        Table::Activations,
    ];
    let key = standby.guest.to_string();
    tables.map(|table| site.catalogue.find(table, &key).unwrap())
}

/// It came as far as that all of it was written down, and then something failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_did_not_become_this_site_s_own_is_its_source_s_as_before() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    west.commit("web", false).await.unwrap();
    west.hydrated(&standby).await.unwrap();
    // Its own record, if there was one, stays what it was.
    let earlier = GuestRecord {
        id: stage.web,
        name: "web".to_owned(),
        qmp: None,
        console: None,
        run: Some("/as/it/was".into()),
        definition: standby.opening().definition,
    };
    for before in [None, Some(earlier)] {
        if let Some(before) = &before {
            west.keep_guest(before).unwrap();
        }
        let known = written(&west, &standby);
        assert!(known[1].is_none() && known[2].is_some() && known[3].is_some());
        let mut state = standby.state.lock().await;
        let (active, ready) = state.active.clone().unwrap();
        let activation = active.clone();
        let protection = protection(&standby);
        let own = west.as_own(&standby, &mut state, &active, &ready, &protection);
        assert_eq!(own.await.unwrap().id, stage.web);
        assert!(standby.is_turned() && west.standby_named("web").is_none());
        // As `adopt_in` has it, of what was let go of and is found again.
        west.not_own(&standby, before);
        west.keep_activation(&activation).unwrap();
        standby.see(|seen| seen.active = Some(activation));
        state.active = Some((active, ready));
        drop(state);
        assert_eq!(written(&west, &standby), known);
        assert!(!standby.is_turned() && west.standby_named("web").is_some());
        assert!(west.driver_of(stage.web).is_none());
    }
    drop(west);
    stage.end().await;
}

/// With the catalogue lost, notes beside it count.
#[tokio::test(flavor = "multi_thread")]
async fn no_note_says_that_a_guest_is_this_site_s_that_did_not_become_its_own() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    west.hydrated(&standby).await.unwrap();
    let notes = west.config.site.state_dir.join("guests");
    let noted = || std::fs::read_dir(&notes).unwrap().count();
    assert_eq!(noted(), 0);
    let mut state = standby.state.lock().await;
    let (active, ready) = state.active.clone().unwrap();
    let protection = protection(&standby);
    let own = west.as_own(&standby, &mut state, &active, &ready, &protection);
    own.await.unwrap();
    assert_eq!(noted(), 2);
    west.not_own(&standby, None);
    assert_eq!(noted(), 0);
    state.active = Some((active, ready));
    drop(state);
    drop(west);
    stage.end().await;
}

fn protection(standby: &Standby) -> Protection {
    Protection {
        guest: standby.guest,
        to: standby.from(),
        key: Some(standby.remote().record.key),
        policy: Default::default(),
        schedule: None,
        group: None,
        share: None,
        paused: false,
        seeded: false,
        moving: None,
        shut_down: false,
        held: None,
        moved: None,
        stopped: false,
        stopped_by: None,
        committed: false,
    }
}
