//! What fuzzing feeds: every parser of bytes from peers and operators, each as a function
//! that takes any bytes and panics when a promise broke. `fuzz/` has the targets; the tests
//! below run the same functions. Only with the feature `fuzzing`.

use bytes::Bytes;

use crate::frame::{
    Frame, HEADER_BYTES, Header, Hello, PairProof, Resume, batch_head, decode_copy, encode_copy,
};
use crate::limits;
use crate::peer::{Introduction, Invitation, SiteKey, check_address, check_site_name, token_of};
use crate::session::{Inbox, Receiver, Sender};

/// A target: its name, what takes the bytes, and valid inputs to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate.
pub const TARGETS: [Target; 4] = [
    ("frames", frames, frame_seeds),
    ("sessions", sessions, session_seeds),
    ("invitations", invitations, invitation_seeds),
    ("certificates", certificates, certificate_seeds),
];

/// The frame in front of `rest`, which is taken off; `None` where there is none.
fn take(rest: &mut Bytes) -> Option<(Frame, Bytes)> {
    let header = Header::decode(*rest.first_chunk::<HEADER_BYTES>()?).ok()?;
    assert!(header.body_bytes() <= header.kind().limit());
    let whole = HEADER_BYTES + header.body_bytes();
    if rest.len() < whole {
        assert!(Frame::decode(header, rest.slice(HEADER_BYTES..)).is_err());
        return None;
    }
    let bytes = rest.split_to(whole);
    let frame = Frame::decode(header, bytes.slice(HEADER_BYTES..)).ok()?;
    Some((frame, bytes))
}

/// A stream of frames: each that is one has one encoding only.
pub fn frames(bytes: &[u8]) {
    let mut rest = Bytes::copy_from_slice(bytes);
    while let Some((frame, read)) = take(&mut rest) {
        assert_eq!(frame.encode(), read);
    }
    let copy = Bytes::copy_from_slice(bytes);
    if let Ok((number, message)) = decode_copy(copy.clone()) {
        assert!(message.len() <= limits::MAX_COPIED_MESSAGE_BYTES);
        assert_eq!(encode_copy(number, &message), copy);
    }
}

/// Both halves of a session, told what a stream of frames says.
pub fn sessions(bytes: &[u8]) {
    const SENT: u64 = 40;
    let mut sender = Sender::new(1 << 20);
    for seq in 1..=SENT {
        let taken = sender.submit(seq * 3, Bytes::from_static(&[7; 100]));
        assert_eq!(taken, Ok(()));
        if seq % 4 != 0 {
            assert!(sender.next().is_some());
        }
    }
    let (mut receiver, mut inbox) = (Receiver::default(), Inbox::default());
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut messages = 0;
    while let Some((frame, _)) = take(&mut rest) {
        match frame {
            Frame::Hello(hello) => {
                sender.disconnected();
                receiver.begin(hello.incarnation);
            }
            // What a peer must not say changes nothing.
            Frame::Resume(resume) => {
                let before = sender.acknowledgements();
                if sender.resume(&resume).is_err() {
                    assert_eq!(sender.acknowledgements(), before);
                }
            }
            Frame::Acknowledge(ranges) => {
                let before = sender.acknowledgements();
                match sender.acknowledged(&ranges) {
                    Ok(count) => assert!(count as u64 <= SENT),
                    Err(_) => assert_eq!(sender.acknowledgements(), before),
                }
            }
            Frame::Batch { seq, bytes } => {
                if receiver.arrived(seq, bytes.len()).is_ok() && bytes.first() == Some(&1) {
                    receiver.durable(&[seq]);
                }
            }
            Frame::Message(bytes) => match decode_copy(bytes.clone()) {
                Ok((number, copy)) if number < 1 << 32 => {
                    messages += inbox.copied(number, copy).len();
                }
                _ => messages += inbox.streamed(bytes).len(),
            },
            Frame::PairRequest(_) | Frame::PairAccept(_) => receiver.give_back(),
        }
        sender.next();
    }
    assert!(messages <= bytes.len());
    assert!(receiver.in_hand() <= limits::MAX_IN_HAND_BATCHES);
    let resume = receiver.resume();
    assert!(resume.durable.len() <= limits::MAX_RANGES && resume.held.len() <= limits::MAX_RANGES);
    let told = Frame::Resume(resume).encode();
    assert!(
        take(&mut told.clone()).is_some(),
        "what is told can be read"
    );
    while receiver.next_acknowledgement().is_some() {}
}

/// What is pasted: invitations, keys, names, addresses.
pub fn invitations(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(invitation) = text.parse::<Invitation>() {
        assert_eq!(invitation.to_string().parse(), Ok(invitation));
    }
    // The body alone, under a right checksum.
    let token = token_of(bytes);
    if let Ok(invitation) = token.parse::<Invitation>() {
        assert_eq!(invitation.to_string(), token);
    }
    if let Ok(key) = text.parse::<SiteKey>() {
        assert_eq!(key.to_string().parse(), Ok(key));
    }
    if check_site_name(&text).is_ok() {
        assert!(text.len() <= limits::MAX_SITE_NAME_BYTES);
        assert!(!text.contains('/') && !text.starts_with('.'));
    }
    if check_address(&text).is_ok() {
        assert!(text.len() <= limits::MAX_ADDRESS_BYTES && text.contains(':'));
    }
}

/// What a stranger shows in its handshake.
pub fn certificates(bytes: &[u8]) {
    if let Some(key) = SiteKey::of_certificate(bytes) {
        assert_eq!(SiteKey::of_certificate(bytes), Some(key));
    }
}

fn introduction() -> Introduction {
    let addresses = vec!["dr.example.org:7443".to_owned(), "[::1]:7443".to_owned()];
    Introduction::new("west", addresses).expect("a valid one")
}

fn hello(incarnation: u64) -> Frame {
    Frame::Hello(Hello {
        versions: vec![1],
        incarnation,
        max_batch_bytes: limits::MAX_BATCH_BYTES as u32,
        max_message_bytes: limits::MAX_MESSAGE_BYTES as u32,
        site: "east".to_owned(),
    })
}

/// One frame of each kind, always the same.
pub(crate) fn every_frame() -> Vec<Frame> {
    let pair = || PairProof {
        proof: [5; 32],
        introduction: introduction(),
    };
    vec![
        hello(1),
        Frame::Resume(Resume {
            durable: vec![(3, 3), (9, 12)],
            held: vec![(15, 15), (21, 24)],
        }),
        Frame::Message(encode_copy(0, b"what two sites say")),
        Frame::Message(Bytes::from_static(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff")),
        Frame::Acknowledge(vec![(1, 2), (27, 30)]),
        Frame::Batch {
            seq: 7,
            bytes: Bytes::from_static(b"\x01a batch"),
        },
        Frame::PairRequest(pair()),
        Frame::PairAccept(pair()),
    ]
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = every_frame()
        .iter()
        .map(|frame| frame.encode().to_vec())
        .collect();
    seeds.push(seeds.concat());
    seeds.push([&batch_head(9, 4)[..], b"abcd"].concat());
    seeds
}

fn session_seeds() -> Vec<Vec<u8>> {
    let all = frame_seeds();
    let again = [hello(2), hello(2)].map(|frame| frame.encode().to_vec());
    vec![
        all.concat(),
        [&all.concat()[..], &again.concat(), &all.concat()].concat(),
    ]
}

fn invitation_seeds() -> Vec<Vec<u8>> {
    let key = SiteKey::from_bytes([7; 32]);
    let addresses = introduction().addresses().to_vec();
    let invitation = Invitation::new("west", key, addresses, 1_800_000_000).expect("a valid one");
    let texts = [
        invitation.to_string(),
        invitation.to_string().to_uppercase(),
        key.to_string(),
        "dr.example.org:7443".to_owned(),
        "[2001:db8::1]:7443".to_owned(),
    ];
    let mut seeds = texts.map(String::into_bytes).to_vec();
    seeds.push(invitation.body().to_vec());
    seeds
}

fn certificate_seeds() -> Vec<Vec<u8>> {
    let made = rcgen::generate_simple_self_signed([crate::SERVER_NAME.to_owned()]);
    vec![made.expect("a certificate").cert.der().to_vec()]
}

#[cfg(test)]
#[path = "../../fuzz/tried.rs"]
mod tried;

#[cfg(test)]
mod tests {
    #[test]
    fn no_bytes_break_a_promise() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        super::tried::all(&super::TARGETS, &fuzz, 2000);
    }
}
