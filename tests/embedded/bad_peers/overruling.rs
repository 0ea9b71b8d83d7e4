//! What a source says, or does not say, of a guest that was taken over from it.

use farhaven::replicate::message::{GroupMessage, TurnMessage};
use farhaven::site::groups::GroupRollBack;
use farhaven::site::turn::RollBack;
use farhaven_policies::policy::Policy;

use super::*;
use crate::group_verbs::running;
use crate::groups::{Bank, GOLD, PLAIN, force};

/// It has gone by before an answer to what was asked would be waited for no more.
const SOON: Duration = Duration::from_secs(15);

/// The guest of a question about its copy at the source.
fn looked_for(asked: &Message) -> Option<GuestId> {
    let Message::Turn(turn) = asked else {
        return None;
    };
    match **turn {
        TurnMessage::Look { guest } => Some(guest),
        _ => None,
    }
}

/// West hears of it, too: else it would not ask.
async fn reached(west: &Arc<Site>) {
    until("west is reached", || {
        west.view().peers[0].connected.then_some(())
    })
    .await;
}

/// The guest is east's by a term after this one, and west says that it is stopped there.
async fn obeyed_soon(east: &mut Hostile, known: Term) {
    let newer = Term {
        number: known.number + 1,
        owner: east.key(),
        ..known
    };
    let told = east.ask(Message::Terms { terms: vec![newer] });
    let told = tokio::time::timeout(SOON, told).await.expect("heeded soon");
    assert!(matches!(told, Ok(Message::Done)), "{told:?}");
}

fn nothing_was_done(refused: &str, guest: &str) {
    let words = format!(
        "'{guest}' is another site's by a newer term that came meanwhile, and nothing was done"
    );
    assert!(refused.contains(&words), "no {words:?} in: {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_term_ends_a_rollback_that_waits_for_its_source() {
    let (stage, mut east, there, taken) = taken_over().await;
    let west = stage.west.clone();
    reached(&west).await;
    let back = tokio::spawn(async move { west.rollback("web", RollBack::default()).await });
    east.asked(|m| looked_for(m).is_some()).await;
    obeyed_soon(&mut east, taken).await;
    assert_eq!(there.lock().unwrap().running(), Some(false));
    assert!(target(&stage.west, "web").active.is_none());
    let refused = back.await.unwrap().unwrap_err();
    nothing_was_done(&refused.to_string(), "web");
    east.node.shutdown().await;
    stage.west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_term_ends_a_rollback_to_a_point_that_waits_for_the_source() {
    let (stage, mut east, there, taken) = taken_over().await;
    let first = stage.west.points("web").await.unwrap()[0].point;
    let west = stage.west.clone();
    reached(&west).await;
    let to = RollBack {
        point: Some(first),
        accept_loss: false,
    };
    let back = tokio::spawn(async move { west.rollback("web", to).await });
    let announced = |asked: &Message| match asked {
        Message::Terms { terms } => terms.iter().find(|t| t.number > taken.number).copied(),
        _ => None,
    };
    let asked = east.asked(|m| announced(m).is_some()).await;
    obeyed_soon(&mut east, announced(&asked).unwrap()).await;
    assert_eq!(there.lock().unwrap().running(), Some(false));
    assert!(target(&stage.west, "web").active.is_none());
    let refused = back.await.unwrap().unwrap_err();
    nothing_was_done(&refused.to_string(), "web");
    east.node.shutdown().await;
    stage.west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_term_of_one_guest_ends_a_rollback_of_its_group() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let west = bank.stage.west.clone();
    let west_at = bank.stage.east.view().peers[0].addresses.clone();
    bank.stage.east.shutdown().await;
    for guest in [&bank.stage.guest, &bank.web] {
        guest.lock().unwrap().end();
    }
    until("the link is down", || {
        (!west.view().peers[0].connected).then_some(())
    })
    .await;
    west.fail_over_group("bank", force(false)).await.unwrap();
    assert_eq!(running(&bank.stage.at_west).len(), 2);
    let mut east = Hostile::instead_of_east(&bank.stage, west_at).await;
    reached(&west).await;
    let to = GroupRollBack {
        accept_loss: true,
        ..GroupRollBack::default()
    };
    let asks = west.clone();
    let back = tokio::spawn(async move { asks.rollback_group("bank", to).await });
    let asked = east.asked(|m| looked_for(m).is_some()).await;
    let guest = looked_for(&asked).unwrap();
    obeyed_soon(&mut east, west.fence.current(guest).unwrap()).await;
    let refused = back.await.unwrap().unwrap_err();
    let members = west.members_of("bank").unwrap();
    let name = members.iter().find(|m| m.guest == guest).unwrap();
    nothing_was_done(&refused.to_string(), &name.name);
    // The other one runs on.
    for member in &members {
        let runs = target(&west, &member.name).active.is_some();
        assert_eq!(runs, member.guest != guest, "{}", member.name);
    }
    assert_eq!(running(&bank.stage.at_west).len(), 1);
    east.node.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_guest_was_taken_over_has_no_say_in_it_when_that_has_ended() {
    let (stage, mut east, _, taken) = taken_over().await;
    stage.west.end_guest("web").await.unwrap();
    let kept = stage.west.plan_prune("web").await.unwrap().retention;
    let owed = GroupMessage::Owed {
        guest: taken.group,
        warm: false,
        retention: Policy::default().retention,
        schedule: Some("daily for 3d".parse().unwrap()),
    };
    for question in [
        Message::Prepare { guest: taken.group },
        Message::Group(Box::new(owed)),
    ] {
        refused(east.ask(question).await, "not that site's");
    }
    assert_eq!(stage.west.plan_prune("web").await.unwrap().retention, kept);
    assert_eq!(stage.at_west.built.lock().unwrap().len(), 1);
    assert_eq!(stage.west.fence.current(taken.group), Some(taken));
    east.node.shutdown().await;
    stage.west.shutdown().await;
}
