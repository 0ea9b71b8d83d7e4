//! Every message of version 1 is pinned, and there is one of every kind.

use std::collections::BTreeSet;
use std::mem::discriminant;
use std::path::Path;

use super::*;

/// What sites said to each other when this was version 1. `FARHAVEN_GOLDEN=write` makes
/// the file anew, for a change of version that is meant.
#[test]
fn messages_of_version_1_are_pinned() {
    let seeds = seeds();
    let now: Vec<u8> = seeds
        .iter()
        .flat_map(|seed| [&(seed.len() as u32).to_le_bytes()[..], seed].concat())
        .collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path = path.join("messages-1.bin");
    if std::env::var_os("FARHAVEN_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        std::fs::write(&path, &now).expect("a file");
    }
    let kept = std::fs::read(path).expect("the golden file");
    assert_eq!(kept.len(), now.len());
    let mut rest = &kept[..];
    let mut count = 0;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (message, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        assert_eq!(
            seeds[count], message,
            "message {count} is said otherwise now"
        );
        let envelope = Envelope::decode(message).expect("a message of version 1");
        let again = envelope.encode().expect("a short message");
        assert_eq!(&again[..], message, "message {count} is said otherwise now");
        (rest, count) = (after, count + 1);
    }
    assert_eq!(count, seeds.len());
}

/// How a message is named on the wire: its own name, and of those with kinds of their
/// own the kind's.
fn name(message: &Message) -> String {
    let value = serde_json::to_value(message).expect("plain data");
    let named = |value: &serde_json::Value| match value {
        serde_json::Value::String(name) => (name.clone(), serde_json::Value::Null),
        serde_json::Value::Object(fields) if fields.len() == 1 => {
            let (name, inner) = fields.iter().next().expect("one field");
            (name.clone(), inner.clone())
        }
        other => panic!("no enum: {other}"),
    };
    let (outer, inner) = named(&value);
    match message {
        Message::Group(_) | Message::Turn(_) | Message::Run(_) => {
            format!("{outer}.{}", named(&inner).0)
        }
        _ => outer,
    }
}

/// Every kind, once: this has to be told of a new one.
#[test]
fn every_kind_of_message_is_there_once() {
    let all = all();
    let kinds: std::collections::HashSet<_> = all.iter().map(discriminant).collect();
    assert_eq!(kinds.len(), KINDS, "a kind of message has no seed");
    let names: BTreeSet<String> = all.iter().map(name).collect();
    assert_eq!(names.len(), all.len(), "{names:?}");
    assert_eq!(names.len(), KINDS - 3 + 5 + 7 + 10);
}

/// Kinds of messages: the compiler asks for a number when there is one more.
const KINDS: usize = 39;

#[allow(dead_code, reason = "for the compiler")]
fn counted(message: &Message) {
    match message {
        Message::Terms { .. }
        | Message::Facts { .. }
        | Message::FactsKnown { .. }
        | Message::Open(_)
        | Message::Opened(_)
        | Message::Digests { .. }
        | Message::DigestPage { .. }
        | Message::Find { .. }
        | Message::Found { .. }
        | Message::Holds { .. }
        | Message::Baseline { .. }
        | Message::BaselinePage { .. }
        | Message::Seal(_)
        | Message::Sealed { .. }
        | Message::Dangling { .. }
        | Message::Running { .. }
        | Message::Prepare { .. }
        | Message::Prepared
        | Message::GiveUp { .. }
        | Message::GivenUp
        | Message::Run(
            RunMessage::Hold { .. }
            | RunMessage::Quiesce { .. }
            | RunMessage::ShutDown { .. }
            | RunMessage::StartAgain { .. }
            | RunMessage::Held(_)
            | RunMessage::Undecided
            | RunMessage::Release { .. }
            | RunMessage::StillHeld { .. }
            | RunMessage::HoldGroup { .. }
            | RunMessage::GroupHeld { .. },
        )
        | Message::Close { .. }
        | Message::Points { .. }
        | Message::PointList { .. }
        | Message::Retire { .. }
        | Message::Lost(_)
        | Message::SeedAsk { .. }
        | Message::SeedMay { .. }
        | Message::SeedAnnounce(_)
        | Message::Trouble { .. }
        | Message::KeepPoint { .. }
        | Message::ReleasePoint { .. }
        | Message::KeptPoint { .. }
        | Message::Clock
        | Message::ClockTold { .. }
        | Message::Done
        | Message::Refused { .. } => {}
        Message::Group(group) => match **group {
            GroupMessage::Known(_)
            | GroupMessage::All { .. }
            | GroupMessage::Owed { .. }
            | GroupMessage::TakeOver { .. }
            | GroupMessage::TakenOver { .. } => {}
        },
        Message::Turn(turn) => match **turn {
            TurnMessage::Look { .. }
            | TurnMessage::Seen(_)
            | TurnMessage::GoBack { .. }
            | TurnMessage::Commit { .. }
            | TurnMessage::Turn(_)
            | TurnMessage::Turning { .. }
            | TurnMessage::Turned { .. } => {}
        },
    }
}
