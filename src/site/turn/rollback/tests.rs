//! Back to another point, here: what is made sure of while the guest still runs.

use std::collections::BTreeSet;
use std::sync::mpsc;

use farhaven_storage_sync::prune::Keep;

use super::*;
use crate::guest::Definition;
use crate::guest::qemu;
use crate::replicate::message::Opening;
use crate::site::surroundings::tests::{Stage, until};

/// To west's first point of it.
fn to_the_first(standby: &Standby) -> (u64, RollBack) {
    let first = standby.points()[0].point;
    let to = RollBack {
        point: Some(first),
        accept_loss: false,
    };
    (first, to)
}

/// Does its machine here run?
async fn runs(standby: &Standby) -> bool {
    let active = standby.state.lock().await.active.clone();
    active.is_some_and(|(_, ready)| ready.runs().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_network_is_not_here_runs_on_where_it_is_and_is_not_rolled_back() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    let (_, to) = to_the_first(&standby);
    let before = west.fence.current(stage.web);
    // As a QEMU on a bridge that this host does not have.
    let told = standby.opening();
    let mut on_a_bridge = qemu::definition::Definition::sample();
    on_a_bridge.nets.push(qemu::definition::Net {
        id: "lan".to_owned(),
        kind: "bridge".to_owned(),
        value: "bridge,br=fh-none-here".to_owned(),
    });
    standby.update(Opening {
        definition: Definition::from(on_a_bridge),
        ..told.clone()
    });
    let refused = west.rollback("web", to.clone()).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("fh-none-here"), "{refused}");
    assert!(refused.contains("Nothing was stopped for it"), "{refused}");
    assert_eq!(west.fence.current(stage.web), before);
    assert!(runs(&standby).await);
    standby.update(told);
    west.rollback("web", to).await.unwrap();
    assert!(runs(&standby).await);
    drop(west);
    stage.end().await;
}

/// The source is asked first, and may take long; meanwhile points are dropped.
#[tokio::test(flavor = "multi_thread")]
async fn the_point_of_a_rollback_stays_while_its_source_is_asked() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    let (first, to) = to_the_first(&standby);
    let before = west.fence.current(stage.web);
    // What it stopped is asked there again, and does not answer.
    let (answer, waits) = mpsc::channel::<()>();
    let (busy, is_busy) = mpsc::channel();
    let guest = stage.guest.clone();
    let silent = std::thread::spawn(move || {
        let _monitor = guest.lock().unwrap();
        busy.send(()).unwrap();
        let _ = waits.recv();
    });
    is_busy.recv().unwrap();
    let rolls = west.clone();
    let rolled = tokio::spawn(async move { rolls.rollback("web", to).await });
    until("its term is taken", || {
        west.fence.current(stage.web) != before
    })
    .await;
    let store = standby.remote().incoming.store.clone();
    let keep = Keep::from([(stage.web, BTreeSet::from([standby.newest()]))]);
    let plan = store.plan_prune(&keep).unwrap();
    store.give_up_prune(&plan);
    assert!(plan.pinned.contains(&(stage.web, first)), "{plan:?}");
    assert!(!plan.dropped.contains(&(stage.web, first)), "{plan:?}");
    assert!(!rolled.is_finished());
    drop(answer);
    silent.join().unwrap();
    let report = rolled.await.unwrap().unwrap();
    assert_eq!(report.point, Some(first));
    drop(west);
    stage.end().await;
}
