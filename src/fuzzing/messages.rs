//! One message of each kind that sites say to each other: what the fuzz target begins
//! with, and what is pinned.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{GUEST, definition, opening, seal, term};
use crate::replicate::message::{
    ActivationTimes, CopyState, Envelope, GroupMessage, Handed, HeldGuest, LostContent, Message,
    Opened, Refusal, RunMessage, SeedAnnouncement, Taken, ToHold, TurnMessage,
};
use crate::site::kept::PointChoice;

/// What has fields of its own only where it is made.
fn of<T: DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).expect("plain data")
}

/// What version 1 was first pinned with.
fn first() -> Vec<Message> {
    vec![
        Message::Terms {
            terms: vec![term()],
        },
        Message::Open(Box::new(opening())),
        Message::Opened(Opened {
            newest: 4,
            newest_cut_at: 1,
            next_point: 5,
            last_seq: 9,
            volumes: opening().volumes,
        }),
        Message::DigestPage {
            batches: vec![(7, Bytes::from_static(&[1; 32]))],
            next: Some(8),
        },
        Message::Found {
            batches: vec![(7, 1, Bytes::from_static(&[1; 16]))],
            sampling: 2,
        },
        Message::BaselinePage {
            runs: vec![(3, Bytes::from_static(&[1; 16]))],
            next: None,
        },
        Message::Seal(Box::new(seal())),
        Message::Retire {
            seqs: vec![1, 2, 300],
        },
        Message::Done,
    ]
}

/// Of data, points and the store.
fn data() -> Vec<Message> {
    vec![
        Message::Facts {
            definition: definition(),
        },
        Message::FactsKnown {
            facts: of(json!({
                "qemu": [7, 2, 22], "machines": ["q35"], "cpus": ["max"], "kvm": true,
                "qemu_img": true, "ram_directory": ["/dev/shm", 1 << 30],
                "store_directory": ["/var/lib/farhaven", 1_u64 << 40],
                "memory_available": 1 << 30, "files": [], "socket_buffers": [1 << 20, 1 << 20],
                "findings": [],
            })),
        },
        Message::Digests {
            from_seq: 7,
            key: [5; 32],
        },
        Message::Find {
            key: [5; 32],
            prefixes: Bytes::from_static(&[1; 12]),
        },
        Message::Holds { images: 1 << 20 },
        Message::Baseline {
            guest: GUEST,
            point: 5,
            volume: 1,
            unit: 64,
            key: [5; 32],
        },
        Message::Sealed { point: 5 },
        Message::Dangling { missing: 8 },
        Message::Close {
            guest: GUEST,
            discard: true,
        },
        Message::Points { guest: GUEST },
        Message::PointList {
            points: vec![of(json!({
                "point": 5, "cut_at": "2026-11-28T18:00:00Z", "age_ms": 12, "pause_ms": 8.5,
                "ram_scan_ms": 5.25, "ram_scanned_bytes": 1 << 20, "changed_bytes": 4096,
                "sent_bytes": 300, "quiesced": true, "damaged": "batch 7", "name": "golden",
                "group": {"id": GUEST, "name": "bank", "cut": 1_796_025_713_429_u64,
                    "skew_ns": 280_000, "members": [GUEST]},
            }))],
        },
        Message::Lost(Box::new(LostContent {
            guest: GUEST,
            units: vec![(1, 64, 2)],
            batches: vec![7, 9],
        })),
        Message::SeedAsk { guest: GUEST },
        Message::SeedMay {
            newest: 4,
            next_point: 5,
            last_seq: 9,
        },
        Message::SeedAnnounce(Box::new(SeedAnnouncement {
            guest: GUEST,
            name: "web".to_owned(),
            seed: [6; 16],
            key: of(json!(vec![8; 32])),
            point: 5,
            first: 100,
            last: 200,
        })),
        Message::Trouble {
            what: "the store is full".to_owned(),
        },
        Message::KeepPoint {
            guest: GUEST,
            point: Some(PointChoice::Name("newest".to_owned())),
            name: "before upgrade".to_owned(),
        },
        Message::ReleasePoint {
            guest: GUEST,
            point: PointChoice::Number(5),
        },
        Message::KeptPoint { point: 5 },
    ]
}

/// Of who runs where.
fn moves() -> Vec<Message> {
    vec![
        Message::Running {
            times: ActivationTimes::default(),
            term: term(),
        },
        Message::Prepare { guest: GUEST },
        Message::Prepared,
        Message::GiveUp { guest: GUEST },
        Message::GivenUp,
        Message::Clock,
        Message::ClockTold {
            at: 1_796_025_713_429_000_000,
        },
        Message::Refused {
            code: Refusal::OutOfStep,
            why: "open it again".to_owned(),
        },
    ]
}

fn groups() -> Vec<Message> {
    let record = json!({
        "id": GUEST, "name": "bank", "peer": "west",
        "members": {"db": {"guest": GUEST}},
    });
    let all = [
        GroupMessage::Known(of(record)),
        GroupMessage::All { ids: vec![GUEST] },
        GroupMessage::Owed {
            guest: GUEST,
            warm: true,
            retention: Default::default(),
            schedule: "all for 2h, newest 7".parse().ok(),
        },
        GroupMessage::TakeOver {
            group: GUEST,
            members: vec![Handed {
                guest: GUEST,
                point: 5,
                term: term(),
            }],
        },
        GroupMessage::TakenOver {
            members: vec![Taken {
                runs: true,
                guest: GUEST,
                times: ActivationTimes::default(),
                note: "not healthy".to_owned(),
            }],
        },
    ];
    all.into_iter()
        .map(|message| Message::Group(Box::new(message)))
        .collect()
}

fn turns() -> Vec<Message> {
    let all = [
        TurnMessage::Look { guest: GUEST },
        TurnMessage::Seen(CopyState {
            runs: Some(false),
            unchanged: true,
            committed: false,
        }),
        TurnMessage::GoBack { term: term() },
        TurnMessage::Commit {
            guest: GUEST,
            discard: true,
        },
        TurnMessage::Turn(Box::new(opening())),
        TurnMessage::Turning { done: 1, total: 2 },
        TurnMessage::Turned { base: 5, bytes: 7 },
    ];
    all.into_iter()
        .map(|message| Message::Turn(Box::new(message)))
        .collect()
}

fn runs() -> Vec<Message> {
    let held = HeldGuest {
        point: 5,
        bytes: 4096,
        stopped_at: 1_796_025_713_429_000_000,
        term: term(),
        quiesced: Some(true),
    };
    let all = [
        RunMessage::Hold {
            guest: GUEST,
            quiesce: true,
        },
        RunMessage::Quiesce {
            guest: GUEST,
            next_points: true,
        },
        RunMessage::ShutDown {
            guest: GUEST,
            within_ms: Some(60_000),
        },
        RunMessage::StartAgain { guest: GUEST },
        RunMessage::Held(held),
        RunMessage::Undecided,
        RunMessage::Release { guest: GUEST },
        RunMessage::StillHeld { guest: GUEST },
        RunMessage::HoldGroup {
            group: GUEST,
            guests: vec![ToHold {
                guest: GUEST,
                quiesce: true,
            }],
        },
        RunMessage::GroupHeld {
            skew_ns: 280_000,
            guests: vec![(GUEST, held)],
        },
    ];
    all.into_iter().map(Message::Run).collect()
}

fn all() -> Vec<Message> {
    let rest = [data(), moves(), groups(), turns(), runs()];
    first()
        .into_iter()
        .chain(rest.into_iter().flatten())
        .collect()
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let encoded = all().into_iter().enumerate().map(|(at, body)| {
        let envelope = Envelope {
            id: at.is_multiple_of(2).then_some(at as u64),
            answers: (!at.is_multiple_of(2)).then_some(7),
            body,
        };
        envelope.encode().expect("a short message").to_vec()
    });
    encoded.collect()
}

#[cfg(test)]
mod tests;
