//! Batches of a paired site that lie, each well formed as far as it goes.

use bytes::Bytes;
use farhaven_storage_sync::codec::{Bases, Batch, Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::limits::{BATCH_HEADER, IMAGE_SEQ};
use farhaven_storage_sync::unit::{UNIT, Volume, VolumeKind};

use super::*;

/// Units of the guest that mallory tells of.
const UNITS: u64 = 8;

/// It encodes as an honest source does.
struct Encodes {
    key: DigestKey,
    seqs: Arc<Sequence>,
    index: Arc<Mutex<DedupIndex>>,
    bases: Arc<Mutex<Bases>>,
}

impl Encodes {
    fn starting_at(seq: u64) -> Self {
        Self {
            key: DigestKey::new([9; 32]),
            seqs: Arc::new(Sequence::starting_at(seq)),
            index: Arc::new(Mutex::new(DedupIndex::new(1 << 16))),
            bases: Arc::new(Mutex::new(Bases::new(1 << 20))),
        }
    }

    /// One batch with this in the first unit of the first volume.
    fn batch(&self, guest: GuestId, point: u64, bytes: &[u8; UNIT]) -> Batch {
        let (seqs, index) = (self.seqs.clone(), self.index.clone());
        let mut encoder = Encoder::new(guest, point, seqs, index, 1).with_bases(self.bases.clone());
        let digest = self.key.of(bytes);
        assert!(encoder.unit(0, 0, bytes, digest).unwrap().is_none());
        encoder.flush().unwrap()
    }

    fn acknowledged(&self, seq: u64) {
        self.index.lock().unwrap().acknowledge(seq);
        self.bases.lock().unwrap().acknowledge(seq);
    }
}

/// Bytes that do not compress, other ones for each number.
fn noise(of: u8) -> [u8; UNIT] {
    let mut unit = [0; UNIT];
    blake3::Hasher::new_keyed(&[of; 32])
        .finalize_xof()
        .fill(&mut unit);
    unit
}

fn seal_of(mallory: &Hostile, guest: GuestId, point: u64, parent: u64, of: &[&Batch]) -> Message {
    let mut seal = mallory.seal(guest, "own", point, 1, 0);
    let Message::Seal(request) = &mut seal else {
        panic!()
    };
    let mut chain = Chain::new();
    for batch in of {
        chain.push(batch.seq, &batch.hash);
    }
    (request.parent, request.batches) = (parent, chain.count());
    request.chain = chain.finish();
    request.volumes = vec![Volume {
        name: "ram".to_owned(),
        kind: VolumeKind::Ram,
        bytes: UNITS * UNIT as u64,
    }];
    seal
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_lies_is_not_kept_and_ends_the_session() {
    let (stage, mut mallory) = besieged().await;
    let (own, web) = (GuestId::random(), id(&stage));
    mallory.open(own, "own", 1).await;
    let whole = Encodes::starting_at(1).batch(own, 1, &noise(1));
    let flipped = |at: usize| {
        let mut bytes = whole.bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    let last = whole.bytes.len() - 1;
    let image = Encodes::starting_at(IMAGE_SEQ).batch(own, 1, &noise(1));
    let stored_by_itself = Encodes::starting_at(1).batch(GuestId::random_image(), 1, &noise(1));
    let lies = [
        ("a header that is whole, over another body", flipped(last)),
        ("another number of entries", flipped(BATCH_HEADER)),
        ("a header that was changed", flipped(16)),
        ("its end is missing", whole.bytes[..last].to_vec()),
        ("something behind it", [&whole.bytes[..], &[0]].concat()),
        ("a number of the site's own", image.bytes.to_vec()),
        (
            "of an image of the site's own",
            stored_by_itself.bytes.to_vec(),
        ),
    ];
    for (number, (what, bytes)) in (1..).zip(lies) {
        let sent = mallory.peer.send_data(number, Bytes::from(bytes));
        sent.await.unwrap();
        let why = mallory.disconnected().await;
        assert!(why.contains("does not verify"), "{what}: {why}");
        mallory.peer.reset_data();
        mallory.connected().await;
        let own = target(&stage.west, "own");
        assert_eq!((own.points, own.newest_point), (0, 0), "{what}");
    }
    // Of a guest that is another's: it goes where all of mallory's goes, and is no part of
    // that guest's points.
    let newest = target(&stage.west, "web").newest_point;
    let theirs = Encodes::starting_at(100).batch(web, newest + 1, &noise(1));
    let sent = mallory.peer.send_data(theirs.seq, theirs.bytes.clone());
    sent.await.unwrap();
    mallory.peer.all_acknowledged(theirs.seq).await.unwrap();
    let seal = seal_of(&mallory, web, newest + 1, newest, &[&theirs]);
    refused(mallory.ask(seal).await, "has not been opened");
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_over_other_batches_or_wrong_differences_is_refused() {
    let (stage, mut mallory) = besieged().await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    // It tells a difference from what it never sent: its first batch, but with other bytes
    // in it under the same number.
    let told = Encodes::starting_at(1);
    let (first, mut bytes) = (told.batch(own, 1, &noise(1)), noise(1));
    told.acknowledged(first.seq);
    let sent = Encodes::starting_at(1).batch(own, 1, &noise(2));
    assert_eq!((sent.seq, sent.hash == first.hash), (first.seq, false));
    let data = mallory.peer.send_data(sent.seq, sent.bytes.clone());
    data.await.unwrap();
    mallory.peer.all_acknowledged(sent.seq).await.unwrap();

    // The chain of what it did not send.
    let other = seal_of(&mallory, own, 1, 0, &[&first]);
    let code = refused(mallory.ask(other).await, "not the ones its source sent");
    assert_eq!(code, Refusal::OutOfStep);
    let honest = seal_of(&mallory, own, 1, 0, &[&sent]);
    let sealed = mallory.ask(honest).await;
    assert!(
        matches!(sealed, Ok(Message::Sealed { point: 1 })),
        "{sealed:?}"
    );

    bytes[77] ^= 1;
    let second = told.batch(own, 2, &bytes);
    assert_eq!((second.seq, second.deltas), (2, 1));
    let data = mallory.peer.send_data(second.seq, second.bytes.clone());
    data.await.unwrap();
    mallory.peer.all_acknowledged(second.seq).await.unwrap();
    let seal = seal_of(&mallory, own, 2, 1, &[&second]);
    let answer = mallory.ask(seal).await;
    assert!(
        matches!(answer, Ok(Message::Dangling { missing: 1 })),
        "{answer:?}"
    );
    assert_eq!(target(&stage.west, "own").newest_point, 1);

    // In full it is taken, as a point that begins anew.
    let honest = Encodes::starting_at(3).batch(own, 3, &bytes);
    let data = mallory.peer.send_data(honest.seq, honest.bytes.clone());
    data.await.unwrap();
    let seal = seal_of(&mallory, own, 3, 1, &[&honest]);
    let sealed = mallory.ask(seal).await;
    assert!(
        matches!(sealed, Ok(Message::Sealed { point: 3 })),
        "{sealed:?}"
    );
    protected_on(&stage).await;
    mallory.node.shutdown().await;
    stage.end().await;
}

/// It is asked to forget what goes from west's store.
#[tokio::test(flavor = "multi_thread")]
async fn points_stay_until_their_source_says_that_it_has_forgotten_them() {
    let (dir, at_west) = (tempfile::tempdir().unwrap(), CounterBuilder::default());
    let mut of_west = config(dir.path(), "west");
    of_west.store.segment_bytes = ByteSize::from_mib(1);
    let east = site(dir.path(), "east", Builders::new()).await;
    let west = Site::start_with(of_west, builders(&at_west)).await.unwrap();
    let stage = Stage::pair(dir, east, west, at_west, false).await;
    let mut mallory = Hostile::pair(&stage, "mallory").await;
    let own = GuestId::random();
    mallory.open(own, "own", 1).await;
    let told = Encodes::starting_at(1);
    let first = told.batch(own, 1, &noise(0));
    let sent = mallory.peer.send_data(first.seq, first.bytes.clone());
    sent.await.unwrap();
    let seal = seal_of(&mallory, own, 1, 0, &[&first]);
    let sealed = mallory.ask(seal).await;
    assert!(
        matches!(sealed, Ok(Message::Sealed { point: 1 })),
        "{sealed:?}"
    );
    // More than fits a segment: of the one that is written to nothing goes.
    let mut last = first.seq;
    for n in 1..=u8::MAX {
        let batch = told.batch(own, 2, &noise(n));
        last = batch.seq;
        let sent = mallory.peer.send_data(batch.seq, batch.bytes.clone());
        sent.await.unwrap();
    }
    mallory.peer.all_acknowledged(last).await.unwrap();

    let close = || Message::Close {
        guest: own,
        discard: true,
    };
    let retired = |answer: fn() -> Message| {
        move |asked: &Message| matches!(asked, Message::Retire { .. }).then(answer)
    };
    let unfit = retired(|| Message::GivenUp);
    let answer = mallory.ask_and_lie(close(), unfit).await;
    refused(answer, "does not fit");
    assert_eq!(target(&stage.west, "own").points, 1);
    let honest = retired(|| Message::Done);
    let answer = mallory.ask_and_lie(close(), honest).await;
    assert!(matches!(answer, Ok(Message::Done)), "{answer:?}");
    assert!(stage.west.view().standbys.is_empty());
    mallory.node.shutdown().await;
    stage.end().await;
}
