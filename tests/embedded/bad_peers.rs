//! A paired site that lies, floods and breaks the rules, made of the wan
//! crate's own parts: what it does is refused, the session ends where nobody
//! does that by accident, and the honest site's guest is protected on.

mod answers;
mod batches;
mod hostile;
mod names;
mod overruling;
mod target;
mod turned;

use farhaven::activate::fence::Term;
use farhaven::replicate::message::{Message, Refusal};
use farhaven_storage_sync::unit::GuestId;
use hostile::Hostile;

use super::*;

/// East protects to west; mallory is paired with west, too.
async fn besieged() -> (Stage, Hostile) {
    let stage = Stage::protected().await;
    let mallory = Hostile::pair(&stage, "mallory").await;
    (stage, mallory)
}

fn id(stage: &Stage) -> GuestId {
    source(&stage.east, "web").id.parse().unwrap()
}

/// A guest that west took over from east, which comes back as one that took it back
/// by force, with all it has; the guest at west, and its term there.
async fn taken_over() -> (Stage, Hostile, Arc<Mutex<Counter>>, Term) {
    let stage = Stage::protected().await;
    let web = id(&stage);
    let west_at = stage.east.view().peers[0].addresses.clone();
    stage.east.shutdown().await;
    stage.guest.lock().unwrap().end();
    let west = stage.west.clone();
    until("the link is down", || {
        (!west.view().peers[0].connected).then_some(())
    })
    .await;
    stage.west.fail_over("web", None, false).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    let taken = stage.west.fence.current(web).unwrap();
    let east = Hostile::instead_of_east(&stage, west_at).await;
    (stage, east, there, taken)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_stop_for_a_newer_term_is_tried_until_it_does() {
    let (stage, mut east, there, taken) = taken_over().await;
    there.lock().unwrap().fail(u32::MAX, 0);
    let newer = Term {
        number: taken.number + 1,
        owner: east.key(),
        ..taken
    };
    let told = east.ask(Message::Terms { terms: vec![newer] }).await;
    refused(told, "COULD NOT BE STOPPED");
    assert_eq!(there.lock().unwrap().running(), Some(true));
    // Nobody tells anything any more.
    there.lock().unwrap().fail(0, 0);
    until("stopped", || {
        (there.lock().unwrap().running() == Some(false)).then_some(())
    })
    .await;
    until("that is told", || {
        target(&stage.west, "web").active.is_none().then_some(())
    })
    .await;
    stage.west.shutdown().await;
}

/// A source's newer term may come with its opening, before it is told as a term.
#[tokio::test(flavor = "multi_thread")]
async fn a_term_that_comes_with_an_opening_stops_what_runs_here() {
    let (stage, mut east, there, taken) = taken_over().await;
    let told = east.opening(taken.group, "web", taken.number + 1);
    let answer = east.ask(Message::Open(Box::new(told))).await;
    assert!(matches!(answer, Ok(Message::Opened(_))), "{answer:?}");
    assert_eq!(there.lock().unwrap().running(), Some(false));
    let view = target(&stage.west, "web");
    assert!(view.active.is_none(), "{view:?}");
    assert!(view.trouble.contains("fenced"), "{view:?}");
    stage.west.shutdown().await;
}

/// It has gone by before an answer to the question would be waited for no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_term_interrupts_an_opening_that_nobody_answers() {
    const SOON: Duration = Duration::from_secs(15);
    let (stage, mut mallory) = besieged().await;
    let (own, definition) = Counter::start(&stage.dir.path().join("own"));
    stage.west.embed("own", own.clone(), definition).unwrap();
    let west = stage.west.clone();
    let protected = tokio::spawn(async move { west.protect("own", "mallory", None).await });
    let Message::Open(opening) = mallory.asked(|m| matches!(m, Message::Open(_))).await else {
        panic!("another question");
    };
    protected.await.unwrap().unwrap();
    let newer = Term {
        group: opening.guest,
        number: opening.term.number + 2,
        owner: mallory.key(),
    };
    let told = mallory.ask(Message::Terms { terms: vec![newer] });
    let told = tokio::time::timeout(SOON, told).await.expect("heeded soon");
    assert!(matches!(told, Ok(Message::Done)), "{told:?}");
    assert_eq!(own.lock().unwrap().running(), Some(false));
    assert_eq!(source(&stage.west, "own").phase, Phase::Fenced);
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

/// Points go on to be sealed, by the honest site.
async fn protected_on(stage: &Stage) {
    let before = source(&stage.east, "web").points_sealed;
    let east = stage.east.clone();
    until("two more points", || {
        let view = source(&east, "web");
        let goes_on = matches!(view.phase, Phase::Protected | Phase::Shipping);
        assert!(goes_on, "{:?}: {}", view.phase, view.trouble);
        (view.points_sealed > before + 1).then_some(())
    })
    .await;
    assert_eq!(target(&stage.west, "web").from, "east");
}

#[track_caller]
fn refused(answer: Result<Message, String>, words: &str) -> Refusal {
    match answer {
        Ok(Message::Refused { code, why }) => {
            assert!(why.contains(words), "no {words:?} in: {why}");
            code
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_not_its_own_is_not_touched() {
    let (stage, mut mallory) = besieged().await;
    let (web, term) = (id(&stage), stage.west.fence.current(id(&stage)).unwrap());

    // As if it were its own, under a term of its own that is far newer.
    let mut opening = mallory.opening(web, "web", term.number + 1000);
    refused(
        mallory.ask(Message::Open(Box::new(opening.clone()))).await,
        "from 'east'",
    );
    opening.name = "another".to_owned();
    refused(
        mallory.ask(Message::Open(Box::new(opening))).await,
        "from 'east'",
    );
    assert_eq!(
        stage.west.fence.current(web),
        Some(term),
        "its word counts for nothing"
    );
    // Terms of it that are not refused count for nothing either.
    for owner in [mallory.key(), stage.west.key(), stage.east.key()] {
        let newer = Term {
            group: web,
            number: term.number + 5,
            owner,
        };
        let _ = mallory.ask(Message::Terms { terms: vec![newer] }).await;
    }
    assert_eq!(stage.west.fence.current(web), Some(term));

    let points = target(&stage.west, "web").points;
    for question in [
        Message::Points { guest: web },
        Message::Prepare { guest: web },
    ] {
        refused(mallory.ask(question).await, "has not been opened");
    }
    let baseline = Message::Baseline {
        guest: web,
        point: target(&stage.west, "web").newest_point,
        volume: 0,
        unit: 0,
        key: [0; 32],
    };
    refused(mallory.ask(baseline).await, "");
    let seal = mallory.seal(web, "web", 1, term.number, 0);
    refused(mallory.ask(seal).await, "has not been opened");
    for question in [
        Message::Close {
            guest: web,
            discard: true,
        },
        Message::GiveUp { guest: web },
    ] {
        let told = mallory.ask(question).await;
        assert!(
            matches!(told, Ok(Message::Done | Message::GivenUp)),
            "{told:?}"
        );
    }
    assert!(target(&stage.west, "web").points >= points.min(3));

    // A guest that runs at west itself.
    let (own, definition) = Counter::start(&stage.dir.path().join("own"));
    let record = stage.west.embed("own", own.clone(), definition).unwrap();
    let opening = mallory.opening(record.id, "own", 7);
    refused(
        mallory.ask(Message::Open(Box::new(opening))).await,
        "site's own",
    );
    assert_eq!(stage.west.fence.current(record.id), None);
    counts_on(&own).await;
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_gives_no_term_of_another_group() {
    let (stage, mut mallory) = besieged().await;
    let (web, own) = (id(&stage), GuestId::random());
    let term = stage.west.fence.current(web).unwrap();
    mallory.open(own, "own", 1).await;
    let mut seal = mallory.seal(own, "own", 1, 1, 0);
    let Message::Seal(request) = &mut seal else {
        panic!()
    };
    request.activate = Some(Term {
        group: web,
        number: term.number + 1,
        owner: stage.west.key(),
    });
    assert!(mallory.ask(seal).await.is_err(), "the session is ended");
    assert_eq!(stage.west.fence.current(web), Some(term));
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absurd_term_is_not_believed_and_ends_the_session() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 3).await;
    let before = stage.west.fence.current(own).unwrap();
    for number in [u64::MAX, 1 << 60, 1 << 40, (1 << 20) + 4] {
        for owner in [mallory.key(), stage.west.key()] {
            let term = Term {
                group: own,
                number,
                owner,
            };
            let told = mallory.ask(Message::Terms { terms: vec![term] }).await;
            assert!(told.is_err(), "{number}: {told:?}");
            mallory.connected().await;
            assert_eq!(stage.west.fence.current(own), Some(before), "{number}");
        }
    }
    let flood = vec![before; 5000];
    assert!(mallory.ask(Message::Terms { terms: flood }).await.is_err());
    mallory.connected().await;
    let opening = mallory.opening(own, "own", 1 << 50);
    assert!(mallory.ask(Message::Open(Box::new(opening))).await.is_err());
    mallory.connected().await;
    // What promotions bring about is heard as ever.
    let next = Term {
        number: before.number + 2,
        ..before
    };
    let told = mallory.ask(Message::Terms { terms: vec![next] }).await;
    assert!(matches!(told, Ok(Message::Done)), "{told:?}");
    assert_eq!(stage.west.fence.current(own), Some(next));
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_ends_the_session_and_answers_nobody_asked_for_are_dropped() {
    let (stage, mut mallory) = besieged().await;
    let mut deep = vec![0xa1, 0x64];
    deep.extend(b"body");
    deep.extend(vec![0x81; 500_000]);
    for garbage in [
        vec![0xff; 1000],
        b"GET / HTTP/1.1\r\n".to_vec(),
        Vec::new(),
        deep,
    ] {
        mallory.say(garbage).await;
        let why = mallory.disconnected().await;
        assert!(why.contains("no message of any version"), "{why}");
        mallory.connected().await;
    }
    for answers in (0..20_000).chain([u64::MAX]) {
        mallory.answer(answers, Message::Done).await;
    }
    let told = mallory.ask(Message::Points { guest: id(&stage) }).await;
    refused(told, "has not been opened");
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_questions_is_bounded_and_ends_the_session() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    // Seals of batches that never come fill every place for questions; what
    // comes then is dropped, and at last the session is ended.
    let mut why = None;
    'flood: for _ in 0..50 {
        for _ in 0..256 {
            let seal = mallory.seal(own, "own", 1, 1, 3);
            if mallory.question(seal).await.is_err() {
                why = Some(mallory.disconnected().await);
                break 'flood;
            }
        }
    }
    let why = match why {
        Some(why) => why,
        None => mallory.disconnected().await,
    };
    assert!(why.contains("floods"), "{why}");
    mallory.connected().await;
    // The places are taken still, by that peer alone.
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

/// It may be honest: its store hangs, and it was told of a failover.
#[tokio::test(flavor = "multi_thread")]
async fn terms_are_heard_whatever_questions_wait() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    for _ in 0..300 {
        let seal = mallory.seal(own, "own", 1, 1, 3);
        mallory.question(seal).await.unwrap();
    }
    let newer = Term {
        group: own,
        number: 7,
        owner: mallory.key(),
    };
    let terms = vec![newer];
    mallory.question(Message::Terms { terms }).await.unwrap();
    until("it is heard", || {
        (stage.west.fence.current(own) == Some(newer)).then_some(())
    })
    .await;
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_of_what_was_never_sent_waits_for_itself_only() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    let seal = mallory.seal(own, "own", 1, 1, 3);
    let asked = mallory.question(seal).await.unwrap();
    protected_on(&stage).await;
    // It begins anew: what it asked for before is void.
    mallory.open(own, "own", 1).await;
    refused(mallory.answer_to(asked).await, "began anew");
    // Bytes that are no batch are not kept, not acknowledged, and end the session.
    mallory
        .peer
        .send_data(1, vec![7; 5000].into())
        .await
        .unwrap();
    let why = mallory.disconnected().await;
    assert!(why.contains("does not verify"), "{why}");
    let west = stage.west.clone();
    let standby = target(&west, "own");
    assert_eq!((standby.points, standby.newest_point), (0, 0));
    assert_eq!(mallory.peer.status().unacknowledged_batches, 1);
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_peer_cannot_have_more_guests_than_its_share() {
    let (stage, mut mallory) = besieged().await;
    let mut opened = 0;
    let why = loop {
        let asked: Vec<u64> = {
            let mut asked = Vec::new();
            for n in 0..64 {
                let name = format!("g{}", opened + n);
                let opening = mallory.opening(GuestId::random(), &name, 1);
                asked.push(
                    mallory
                        .question(Message::Open(Box::new(opening)))
                        .await
                        .unwrap(),
                );
            }
            asked
        };
        let mut why = None;
        for id in asked {
            match mallory.answer_to(id).await.unwrap() {
                Message::Opened(_) => opened += 1,
                Message::Refused { why: told, .. } => why = Some(told),
                other => panic!("{other:?}"),
            }
        }
        if let Some(why) = why {
            break why;
        }
        assert!(opened < 2000, "no end of guests");
    };
    assert_eq!(opened, 1024, "{why}");
    assert!(why.contains("already"), "{why}");
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pairing_again_is_the_same_peer_or_none() {
    let (stage, mut mallory) = besieged().await;
    // The same site by the same name: it had lost its side.
    mallory.accept(&stage, "mallory").await;
    // By another name: its store would be opened twice, and west not start again.
    mallory.accept(&stage, "mallet").await;
    mallory.accept(&stage, "west").await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    let peers: Vec<_> = stage
        .west
        .view()
        .peers
        .iter()
        .map(|p| p.site.clone())
        .collect();
    assert_eq!(peers, ["east", "mallory"]);
    protected_on(&stage).await;

    // Revoked, it is out, and stays out after a restart.
    stage.west.remove_peer("mallory").unwrap();
    let why = mallory.disconnected().await;
    assert!(why.contains("ended the trust"), "{why}");
    stage.west.shutdown().await;
    stage.east.shutdown().await;
    drop(stage.west);
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    let peers: Vec<_> = west.view().peers.iter().map(|p| p.site.clone()).collect();
    assert_eq!(peers, ["east"]);
    assert!(!mallory.peer.status().connected);
    west.shutdown().await;
    mallory.node.shutdown().await;
}
