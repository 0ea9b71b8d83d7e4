//! A target that lies: what it is trusted with are its own copies, and nothing else.

use farhaven::replicate::message::{ActivationTimes, Opened};
use farhaven_wan::SiteKey;

use super::*;

/// What west is told instead of the truth, by what it asks. `None`: it is refused.
type Lie = fn(&Message) -> Option<Message>;

fn opened(newest: u64, next_point: u64, last_seq: u64) -> Option<Message> {
    Some(Message::Opened(Opened {
        newest,
        newest_cut_at: newest,
        next_point,
        last_seq,
        volumes: Vec::new(),
    }))
}

fn running(term: Term) -> Option<Message> {
    Some(Message::Running {
        times: ActivationTimes::default(),
        term,
    })
}

const LIES: [(&str, Lie); 8] = [
    ("numbers that no site can have", |asked| match asked {
        Message::Open(_) => opened(1 << 60, 1 << 60, 1 << 60),
        _ => None,
    }),
    ("a point that it does not have", |asked| match asked {
        Message::Open(_) => opened(7, 3, 1),
        _ => None,
    }),
    ("that the guest runs there", |asked| match asked {
        Message::Open(opening) => running(Term {
            number: opening.term.number + 1,
            ..opening.term
        }),
        _ => None,
    }),
    ("digests without an end", |asked| match asked {
        Message::Open(_) => opened(0, 1, 9),
        Message::Digests { from_seq, .. } => Some(Message::DigestPage {
            batches: Vec::new(),
            next: Some(*from_seq),
        }),
        _ => None,
    }),
    ("content that it does not have", |asked| match asked {
        Message::Open(_) => opened(0, 1, 0),
        Message::Find { .. } => Some(Message::Found {
            batches: vec![(7, u64::MAX, vec![9; 64 * 16].into()); 100],
            sampling: 255,
        }),
        _ => None,
    }),
    ("that another point is sealed", |asked| match asked {
        Message::Open(_) => opened(0, 1, 0),
        Message::Seal(seal) => Some(Message::Sealed {
            point: seal.point + 1,
        }),
        _ => None,
    }),
    ("that what was never sent is gone", |asked| match asked {
        Message::Open(_) => opened(0, 1, 0),
        Message::Seal(_) => Some(Message::Dangling { missing: u64::MAX }),
        _ => None,
    }),
    ("that a seal moved the guest", |asked| match asked {
        Message::Open(_) => opened(0, 1, 0),
        Message::Seal(seal) => running(Term {
            group: seal.guest,
            number: seal.context.term + 1,
            owner: SiteKey::from_bytes([7; 32]),
        }),
        _ => None,
    }),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_lies_harms_its_own_copies_only() {
    const LIES_FOR: Duration = Duration::from_secs(2);
    const SOON: Duration = Duration::from_secs(30);
    let (stage, mut mallory) = besieged().await;
    let (own, definition) = Counter::start(&stage.dir.path().join("own"));
    let record = stage.west.embed("own", own.clone(), definition).unwrap();
    for (what, lie) in LIES {
        let west = stage.west.clone();
        let protected = tokio::spawn(async move { west.protect("own", "mallory", None).await });
        let told = mallory.serve(lie, LIES_FOR).await;
        assert!(told > 0, "{what}: nothing was asked");
        protected.await.unwrap().unwrap();
        // It runs on where it ran, by the term that it had.
        counts_on(&own).await;
        let view = source(&stage.west, "own");
        assert_eq!(view.points_sealed, 0, "{what}");
        let term = stage.west.fence.current(record.id);
        assert!(
            term.is_none_or(|term| term.owner == stage.west.key()),
            "{what}"
        );
        // And whoever sees that can end it, whatever is asked just then.
        let west = stage.west.clone();
        let ended = tokio::spawn(async move { west.unprotect("own", false).await });
        mallory.serve(lie, Duration::from_millis(300)).await;
        let ended = tokio::time::timeout(SOON, ended).await;
        ended.expect(what).unwrap().unwrap();
    }
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}
