//! Answers that fit no question: nothing counts as done by them, and an answer reaches
//! nobody but who asked.

use farhaven::replicate::message::{CopyState, GroupMessage, Handed, TurnMessage};
use farhaven::site::groups::{GroupMember, GroupRecord};
use farhaven::site::turn::RollBack;

use super::*;

/// In the place of east, whose guest, as west knows it, runs there.
async fn instead_of_east() -> (Stage, Hostile, GuestId) {
    let stage = Stage::protected().await;
    let web = id(&stage);
    let west_at = stage.east.view().peers[0].addresses.clone();
    stage.east.shutdown().await;
    stage.guest.lock().unwrap().end();
    let mut east = Hostile::instead_of_east(&stage, west_at).await;
    heard(&mut east, web).await;
    (stage, east, web)
}

/// West knows of its connection, and of all that it asked before.
async fn heard(peer: &mut Hostile, guest: GuestId) {
    let told = peer.ask(Message::Points { guest }).await;
    assert!(matches!(told, Ok(Message::PointList { .. })), "{told:?}");
}

/// A group of that guest alone, as east tells it.
fn bank(web: GuestId) -> GroupRecord {
    let member = GroupMember {
        guest: web,
        terms: Default::default(),
    };
    GroupRecord {
        id: GuestId::random(),
        name: "bank".to_owned(),
        from: None,
        key: None,
        peer: "west".to_owned(),
        policy: String::new(),
        owed: Default::default(),
        members: [("web".to_owned(), member)].into(),
    }
}

/// Not that it has stopped.
fn unfit(asked: &Message) -> Option<Message> {
    matches!(asked, Message::Terms { .. }).then_some(Message::GivenUp)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_does_not_say_that_it_stopped_is_not_taken_over_nor_hands_over_later() {
    let (stage, mut east, web) = instead_of_east().await;
    let tells = |told| Message::Group(Box::new(told));
    let group = bank(web);
    let told = east.ask(tells(GroupMessage::Known(group.clone()))).await;
    assert!(matches!(told, Ok(Message::Done)), "{told:?}");
    let told = east.ask(Message::Prepare { guest: web }).await;
    assert!(matches!(told, Ok(Message::Prepared)), "{told:?}");
    let ready = stage.at_west.newest();

    let taking = stage.west.fail_over("web", None, true);
    let refused_here = east.lie_until(unfit, taking).await.unwrap_err();
    assert!(
        refused_here.to_string().contains("does not fit"),
        "{refused_here}"
    );
    assert_eq!(ready.lock().unwrap().running(), Some(false));

    // What was made ready is there still, and the term is west's.
    let now = stage.west.fence.current(web).unwrap();
    assert_eq!(now.owner, stage.west.key());
    let handed = Handed {
        guest: web,
        point: target(&stage.west, "web").newest_point,
        term: Term {
            number: now.number + 1,
            ..now
        },
    };
    let over = GroupMessage::TakeOver {
        group: group.id,
        members: vec![handed],
    };
    refused(east.ask(tells(over)).await, "a newer term of 'web'");
    let told = east.ask(Message::Prepare { guest: web }).await;
    assert_eq!(refused(told, "not that site's"), Refusal::Fenced);
    assert_eq!(stage.west.fence.current(web), Some(now));
    assert_eq!(ready.lock().unwrap().running(), Some(false));
    assert_eq!(stage.at_west.built.lock().unwrap().len(), 1);
    assert!(target(&stage.west, "web").active.is_none());
    stage.west.shutdown().await;
    east.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_source_does_not_confirm_does_not_go_on_here_after_a_rollback() {
    let (stage, mut east, there, taken) = taken_over().await;
    heard(&mut east, taken.group).await;
    // Its copy stands there, and does not go on.
    let copy = |asked: &Message| match asked {
        Message::Turn(turn) => match **turn {
            TurnMessage::Look { .. } => {
                let copy = CopyState {
                    runs: Some(false),
                    unchanged: true,
                    committed: false,
                };
                Some(Message::Turn(Box::new(TurnMessage::Seen(copy))))
            }
            _ => None,
        },
        _ => None,
    };
    let lie = |asked: &Message| copy(asked).or_else(|| unfit(asked));
    let back = stage.west.rollback("web", RollBack::default());
    let why = east.lie_until(lie, back).await.unwrap_err().to_string();
    assert!(why.contains("did not confirm"), "{why}");
    assert!(why.contains("does not fit"), "{why}");
    assert_eq!(there.lock().unwrap().running(), Some(false));
    let now = stage.west.fence.current(taken.group).unwrap();
    assert_eq!(now.owner, east.key());

    // It goes on once that is confirmed.
    let honest = |asked: &Message| {
        let done = matches!(asked, Message::Terms { .. }).then_some(Message::Done);
        copy(asked).or(done)
    };
    let back = stage.west.rollback("web", RollBack::default());
    let why = east.lie_until(honest, back).await.unwrap_err().to_string();
    assert!(why.contains("runs on here"), "{why}");
    counts_on(&there).await;
    stage.west.shutdown().await;
    east.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_by_no_other_connection_than_its_question_came_by() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    // They wait for data that does not come.
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let seal = mallory.seal(own, "own", 1, 1, 3);
        waiting.push(mallory.question(seal).await.unwrap());
    }
    heard(&mut mallory, own).await;
    mallory.say(vec![0xff; 1000]).await;
    mallory.disconnected().await;
    mallory.connected().await;
    // What it asked for before is void, and all of it is answered now.
    mallory.open(own, "own", 1).await;
    for _ in 0..50 {
        heard(&mut mallory, own).await;
    }
    let answered = waiting.iter().filter(|id| mallory.has_answer(**id));
    assert_eq!(answered.count(), 0);
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}
