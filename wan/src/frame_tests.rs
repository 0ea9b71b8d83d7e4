use proptest::prelude::*;

use super::*;

fn ranges() -> impl Strategy<Value = Ranges> {
    prop::collection::vec((1u64..1 << 40, 0u64..1 << 20), 0..40).prop_map(|steps| {
        let mut next = 0;
        steps
            .into_iter()
            .map(|(gap, length)| {
                let first = next + gap;
                next = first + length;
                (first, next)
            })
            .collect()
    })
}

fn introduction() -> impl Strategy<Value = Introduction> {
    (
        "[a-z0-9][a-z0-9-]{0,63}",
        prop::collection::vec("[a-z0-9.]{1,200}:[1-9][0-9]{0,3}", 0..16),
    )
        .prop_map(|(site, addresses)| Introduction::new(site, addresses).expect("a valid one"))
}

fn frame() -> impl Strategy<Value = Frame> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..2000).prop_map(Bytes::from);
    let pair = || {
        (any::<[u8; 32]>(), introduction()).prop_map(|(proof, introduction)| PairProof {
            proof,
            introduction,
        })
    };
    prop_oneof![
        (
            prop::collection::vec(any::<u16>(), 1..16),
            any::<(u64, u32, u32)>(),
            "[a-z0-9][a-z0-9-]{0,30}"
        )
            .prop_map(|(versions, numbers, site)| Frame::Hello(Hello {
                versions,
                incarnation: numbers.0,
                max_batch_bytes: numbers.1,
                max_message_bytes: numbers.2,
                site,
            })),
        (ranges(), ranges()).prop_map(|(durable, held)| Frame::Resume(Resume { durable, held })),
        bytes().prop_map(Frame::Message),
        ranges().prop_map(Frame::Acknowledge),
        (any::<u64>(), bytes()).prop_map(|(seq, bytes)| Frame::Batch { seq, bytes }),
        pair().prop_map(Frame::PairRequest),
        pair().prop_map(Frame::PairAccept),
    ]
}

fn decode(bytes: &Bytes) -> Result<Frame, FrameError> {
    let header = Header::decode(*bytes.first_chunk().expect("a header"))?;
    Frame::decode(header, bytes.slice(HEADER_BYTES..))
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(frame in frame()) {
        prop_assert_eq!(decode(&frame.encode()), Ok(frame));
    }

    #[test]
    fn arbitrary_bytes_never_panic(kind in 0u8..9, body in prop::collection::vec(any::<u8>(), 0..600)) {
        let [a, b, c, d] = (body.len() as u32).to_le_bytes();
        if let Ok(header) = Header::decode([kind, a, b, c, d])
            && let Ok(frame) = Frame::decode(header, Bytes::from(body.clone()))
        {
            // Each frame has one encoding only.
            prop_assert_eq!(&frame.encode()[HEADER_BYTES..], &body[..]);
        }
    }

    #[test]
    fn a_damaged_frame_never_panics(frame in frame(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = frame.encode().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(decoded) = decode(&Bytes::from(bytes.clone())) {
            prop_assert_eq!(decoded.encode(), bytes);
        }
    }
}

#[test]
fn limits_hold_before_anything_is_read() {
    for kind in 0..=u8::MAX {
        let [a, b, c, d] = u32::MAX.to_le_bytes();
        assert!(Header::decode([kind, a, b, c, d]).is_err(), "kind {kind}");
    }
    let [a, b, c, d] = ((limits::MAX_BATCH_BYTES + BATCH_NUMBER_BYTES) as u32).to_le_bytes();
    assert!(Header::decode([5, a, b, c, d]).is_ok());
    let [a, b, c, d] = ((limits::MAX_BATCH_BYTES + BATCH_NUMBER_BYTES + 1) as u32).to_le_bytes();
    assert!(matches!(
        Header::decode([5, a, b, c, d]),
        Err(FrameError::TooLong {
            kind: Kind::Batch,
            ..
        })
    ));
}

#[test]
fn ranges_must_rise() {
    for ranges in [vec![(5, 4)], vec![(1, 3), (3, 4)], vec![(9, 9), (1, 2)]] {
        let bytes = Frame::Acknowledge(ranges).encode();
        assert!(matches!(decode(&bytes), Err(FrameError::Malformed { .. })));
    }
}

#[test]
fn the_bytes_of_a_batch_are_pinned() {
    let frame = Frame::Batch {
        seq: 0x0102,
        bytes: Bytes::from_static(b"abc"),
    };
    assert_eq!(
        frame.encode(),
        &b"\x05\x0b\0\0\0\x02\x01\0\0\0\0\0\0abc"[..]
    );
    assert_eq!(batch_head(0x0102, 3), frame.encode()[..13]);
}

proptest! {
    #[test]
    fn a_copy_is_what_it_was_or_refused(
        number in any::<u64>(),
        message in prop::collection::vec(any::<u8>(), 0..2 * limits::MAX_COPIED_MESSAGE_BYTES),
    ) {
        let decoded = decode_copy(encode_copy(number, &message));
        match message.len() <= limits::MAX_COPIED_MESSAGE_BYTES {
            true => prop_assert_eq!(decoded.expect("valid"), (number, Bytes::from(message))),
            false => prop_assert!(decoded.is_err()),
        }
    }

    #[test]
    fn bytes_that_are_no_copy_are_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        prop_assert!(decode_copy(Bytes::from(bytes)).is_err());
    }
}

/// A file of `tests/golden/`; made anew with `FARHAVEN_GOLDEN=write`, for a change of
/// version that is meant.
fn golden(name: &str, now: &[u8]) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        std::fs::write(&path, now).expect("a file");
    }
    std::fs::read(path).expect("the golden file")
}

#[test]
fn the_frames_of_version_1_are_pinned() {
    let frames = crate::fuzzing::every_frame();
    let now: Vec<u8> = frames.iter().flat_map(|frame| frame.encode()).collect();
    let kept = golden("frames-1.bin", &now);
    assert!(
        kept == now,
        "this version says other bytes than the golden file has"
    );
    let mut rest = Bytes::from(kept);
    for frame in frames {
        let header = Header::decode(*rest.first_chunk().expect("a header")).expect("valid");
        let whole = rest.split_to(HEADER_BYTES + header.body_bytes());
        assert_eq!(decode(&whole), Ok(frame));
    }
    assert!(rest.is_empty());
}

#[test]
fn an_invitation_of_version_1_is_pinned() {
    use crate::peer::{Invitation, SiteKey};
    let invitation = Invitation {
        introduction: Introduction::new("west", vec!["dr.example.org:7443".to_owned()])
            .expect("valid"),
        key: SiteKey::from_bytes([7; 32]),
        secret: [9; 32],
        expires_unix: 1_800_000_000,
    };
    let now = invitation.to_string();
    let kept = golden("invitation-1.txt", now.as_bytes());
    let kept = String::from_utf8(kept).expect("text");
    assert_eq!(kept, now);
    assert_eq!(kept.parse(), Ok(invitation));
    // The next version's begins otherwise, and is told apart.
    let next = kept.replacen("fh1-", "fh2-", 1).parse::<Invitation>();
    let why = next.expect_err("another version").to_string();
    assert!(
        why.contains("another version") && why.contains("upgrade"),
        "{why}"
    );
}
