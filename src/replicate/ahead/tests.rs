//! Whatever the peer answers, in any order, late or never: everything comes
//! out, once, in its order; and what waits stays within its room.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::Place;
use farhaven_wan::{Identity, LinkOptions, Node, NodeOptions, Peer, PeerRecord};
use proptest::prelude::*;

use super::*;
use crate::replicate::asking::{Answer, HELD_BYTES, Questions};
use crate::replicate::message::Message;

/// How the peer answers a question.
#[derive(Debug, Clone, Copy)]
enum Way {
    Rightly,
    Late(u64),
    Not,
    Never,
    Lying(u64),
}

struct Scripted {
    ways: Vec<Way>,
    asked: AtomicUsize,
    held: HashMap<[u8; 6], Digest>,
}

impl Questions for Scripted {
    fn find(&self, prefixes: Bytes) -> Answer {
        let at = self.asked.fetch_add(1, Ordering::Relaxed);
        let way = self.ways[at % self.ways.len()];
        let found = prefixes.as_chunks::<6>().0.iter();
        let found: Vec<Digest> = found.filter_map(|p| self.held.get(p).copied()).collect();
        let batches = found.chunks(64).enumerate().map(|(n, digests)| {
            let slots = u64::MAX >> (64 - digests.len());
            let bytes = digests.iter().flat_map(|digest| digest.0).collect();
            (1 + n as u64, slots, bytes)
        });
        let batches: Vec<_> = batches.collect();
        let answer = move || Message::Found {
            batches,
            sampling: 0,
        };
        Box::pin(async move {
            match way {
                Way::Rightly => Some(answer()),
                Way::Late(ms) => {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    Some(answer())
                }
                Way::Not => None,
                Way::Never => std::future::pending().await,
                Way::Lying(what) => Some(Message::Found {
                    batches: vec![(what, what.rotate_left(7), prefixes), (0, 1, Bytes::new())],
                    sampling: 255,
                }),
            }
        })
    }
}

fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    })
}

/// A peer that is never there.
fn peer() -> Peer {
    static NODE: OnceLock<(Node, Peer, tempfile::TempDir)> = OnceLock::new();
    let (_, peer, _) = NODE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let identity = |name: &str| Identity::load_or_create(&dir.path().join(name), name).unwrap();
        let _inside = runtime().enter();
        let options = NodeOptions {
            listen: "127.0.0.1:0".parse().unwrap(),
            link: LinkOptions::default(),
        };
        let node = Node::start(&identity("here"), options).unwrap();
        let peer = node.trust(PeerRecord {
            site: "there".to_owned(),
            key: identity("there").key(),
            addresses: Vec::new(),
            dial: false,
        });
        (node, peer, dir)
    });
    peer.clone()
}

fn digest(of: u64) -> Digest {
    Digest(
        *blake3::hash(&of.to_le_bytes())
            .as_bytes()
            .first_chunk()
            .unwrap(),
    )
}

/// What came in and what came out: unit and content, or zeros.
type Told = (u64, Option<u64>);

fn content(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let units = bytes.as_chunks::<UNIT>().0.iter();
    units.map(|unit| u64::from_le_bytes(*unit.first_chunk().unwrap()))
}

fn drain(ahead: &mut Ahead, all: bool, out: &mut Vec<Told>) {
    loop {
        match ahead.next(all) {
            Next::Nothing => return,
            Next::Wait(mut answered) => {
                let patience = Duration::from_millis(10);
                let came = runtime().block_on(async {
                    let came = answered.wait_for(Option::is_some);
                    tokio::time::timeout(patience, came).await.is_ok()
                });
                if !came {
                    ahead.give_up();
                }
            }
            Next::Piece(piece) => match &piece.what {
                What::Units(bytes, digests) => {
                    assert_eq!(bytes.len(), digests.len() * UNIT);
                    let units = (piece.unit..).zip(content(bytes));
                    out.extend(units.map(|(unit, of)| (unit, Some(of))));
                }
                What::Zeros(count) => {
                    out.extend((piece.unit..piece.unit + count).map(|unit| (unit, None)));
                }
            },
        }
    }
}

fn ways() -> impl Strategy<Value = Vec<Way>> {
    let way = prop_oneof![
        3 => Just(Way::Rightly),
        2 => (0u64..8).prop_map(Way::Late),
        1 => Just(Way::Not),
        1 => Just(Way::Never),
        1 => any::<u64>().prop_map(Way::Lying),
    ];
    prop::collection::vec(way, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn everything_comes_out_in_its_order(
        ways in ways(),
        steps in prop::collection::vec((0u64..2000, 1usize..600, 0u8..10), 1..40),
        flushes in prop::collection::btree_set(0usize..40, 0..4),
    ) {
        let outgoing = Outgoing::new(peer(), 1000, 1 << 20, DigestKey::new([1; 32]));
        outgoing.asking.peer_holds(1);
        let held = (0..4000).step_by(2).map(|of| (*digest(of).0.first_chunk().unwrap(), digest(of)));
        let scripted = Scripted { ways, asked: AtomicUsize::new(0), held: held.collect() };
        outgoing.asking.by(Arc::new(scripted));
        let outgoing = Arc::new(outgoing);
        let mut ahead = Ahead::new(&outgoing, GuestId([1; 16]), runtime().handle().clone());
        let (mut told, mut out): (Vec<Told>, Vec<Told>) = (Vec::new(), Vec::new());
        for (step, (unit, count, kind)) in steps.into_iter().enumerate() {
            if kind == 0 {
                if !ahead.takes_zeros(0, unit, count as u64) {
                    out.extend((unit..unit + count as u64).map(|unit| (unit, None)));
                }
                told.extend((unit..unit + count as u64).map(|unit| (unit, None)));
            }
            let mut at = 0;
            while kind != 0 && at < count {
                let piece = ahead.piece(count - at);
                let units = unit + at as u64..unit + (at + piece) as u64;
                // The content of a unit is another one each time that it is told.
                let these: Vec<u64> = units.clone().map(|unit| unit + 2000 * u64::from(kind % 3)).collect();
                let bytes: Vec<u8> = these.iter().flat_map(|of| {
                    let mut unit = vec![0; UNIT];
                    unit[..8].copy_from_slice(&of.to_le_bytes());
                    unit
                }).collect();
                let digests: Vec<Digest> = these.iter().map(|of| digest(*of)).collect();
                let these = units.clone().zip(these.iter().map(|of| Some(*of)));
                told.extend(these.clone());
                if !ahead.takes(kind.into(), units.start, &bytes, &digests) {
                    out.extend(these);
                }
                drain(&mut ahead, false, &mut out);
                prop_assert!(outgoing.asking.held() <= HELD_BYTES + 2 * PIECE * UNIT);
                at += piece;
            }
            if flushes.contains(&step) {
                drain(&mut ahead, true, &mut out);
                prop_assert_eq!(&out, &told);
            }
        }
        drain(&mut ahead, true, &mut out);
        prop_assert!(out == told);
        prop_assert_eq!(outgoing.asking.held(), 0);
        // A liar's places are none that a batch of ours could refer to wrongly.
        let index = outgoing.index();
        for of in (1..4000).step_by(2) {
            prop_assert_eq!(index.get(digest(of)), None::<Place>);
        }
    }
}

#[test]
fn where_the_peer_can_hold_nothing_unknown_nothing_is_asked_nor_held() {
    let outgoing = Arc::new(Outgoing::new(peer(), 1, 1 << 20, DigestKey::new([1; 32])));
    let scripted = Scripted {
        ways: vec![Way::Rightly],
        asked: AtomicUsize::new(0),
        held: HashMap::new(),
    };
    outgoing.asking.by(Arc::new(scripted));
    let mut ahead = Ahead::new(&outgoing, GuestId([1; 16]), runtime().handle().clone());
    let units = vec![7; 1000 * UNIT];
    assert_eq!(ahead.piece(1000), 1000);
    assert!(!ahead.takes(0, 0, &units, &vec![digest(1); 1000]));
    assert!(!ahead.takes_zeros(0, 0, 5));
    assert!(matches!(ahead.next(true), Next::Nothing));
    assert_eq!(outgoing.asking.counts(), (0, 0));
}

/// An answer that was on its way when the peer retired what it names.
#[test]
fn a_retired_batch_is_not_learned_from_an_answer_that_crossed() {
    let outgoing = Outgoing::new(peer(), 1000, 1 << 20, DigestKey::new([1; 32]));
    let question = outgoing.asking.answers().begin();
    let retired = std::collections::BTreeSet::from([7]);
    runtime().block_on(outgoing.retire(&retired));
    let told = |seq: u64, of: u64| (seq, 1, Bytes::copy_from_slice(&digest(of).0));
    let answer = Message::Found {
        batches: vec![told(7, 1), told(8, 2)],
        sampling: 0,
    };
    let asked = [digest(1), digest(2)];
    let found = outgoing.take_answer(question, (GuestId([1; 16]), 0), &asked, Some(answer));
    assert_eq!(found, HashMap::from([(digest(2), Place::new(8, 0))]));
    outgoing.asking.answers().end(question);
    let index = outgoing.index();
    assert_eq!(index.get(digest(1)), None);
    assert_eq!(index.get(digest(2)), Some(Place::new(8, 0)));
    drop(index);
    assert_eq!(outgoing.asking.counts(), (2, 1));
}
