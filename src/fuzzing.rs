//! What fuzzing feeds: every parser of bytes from peers, guests, files and API clients,
//! each as a function that takes any bytes and panics when a promise broke. `fuzz/` has the
//! targets; the tests below run the same functions. Only with the feature `fuzzing`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use farhaven_policies::policy::Retention;
use farhaven_storage_sync::codec::{DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::unit::{GuestId, Volume, VolumeKind};
use farhaven_wan::SiteKey;
use serde::Serialize;

use crate::activate::fence::Term;
use crate::activate::nbd::fuzzing as nbd;
#[cfg(target_arch = "x86_64")]
use crate::guest::kvm;
use crate::guest::qemu::fuzzing as qemu;
use crate::guest::{Definition, embedded, sim};
use crate::replicate::message::{
    CommitTerms, Envelope, LEVELS, Message, Opening, PointContext, SealRequest, Unknown,
};
use crate::replicate::seed::{SeedAbout, fuzzing as seed};
use crate::site::fuzzing as site;

mod messages;

/// A target: its name, what takes the bytes, and valid inputs to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// All of this crate.
pub const TARGETS: [Target; 10] = [
    ("messages", messages, messages::seeds),
    ("definitions", definitions, definition_seeds),
    ("device_states", device_states, state_seeds),
    ("command_lines", command_lines, qemu::command_line_seeds),
    ("nbd_requests", nbd_requests, nbd::seeds),
    ("nbd_replies", nbd_replies, qemu::nbd_seeds),
    ("qmp_replies", qmp_replies, qemu::qmp_seeds),
    ("seed_files", seed_files, seed_seeds),
    ("api_bodies", api_bodies, site::body_seeds),
    ("rows", rows, site::row_seeds),
];

fn cbor<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("plain data has a CBOR form");
    bytes
}

/// What a peer says on the control stream.
pub fn messages(bytes: &[u8]) {
    let Ok(envelope) = Envelope::decode(bytes) else {
        let _ = Unknown::of(bytes);
        return;
    };
    let place = Unknown::of(bytes).expect("what is known has a place");
    assert_eq!((place.id, place.answers), (envelope.id, envelope.answers));
    let written = envelope.encode().expect("what was read can be written");
    let again = Envelope::decode(&written).expect("what was written can be read");
    assert_eq!(again.encode().ok(), Some(written));
    if let Message::Opened(opened) = &envelope.body {
        let _ = opened.is_sound();
    }
}

/// How a peer says that a guest is built, with the context of a point.
pub fn definitions(bytes: &[u8]) {
    let context: Result<PointContext, _> =
        ciborium::de::from_reader_with_recursion_limit::<_, _>(bytes, LEVELS);
    let context = context.ok().map(|context: PointContext| context.definition);
    let json = serde_json::from_slice::<Definition>(bytes).ok();
    for definition in context.into_iter().chain(json) {
        let _ = (definition.summary(), definition.ram_bytes());
        if definition.unsound().is_some() {
            continue;
        }
        match &definition {
            Definition::Qemu(definition) => qemu::told(definition),
            Definition::Embedded(definition) => embedded_told(definition),
        }
    }
}

fn embedded_told(definition: &embedded::Definition) {
    sim::fuzzing(&[], Some(definition));
    #[cfg(target_arch = "x86_64")]
    kvm::fuzzing::config(definition);
}

/// What is not memory or disks, of each kind of guest.
pub fn device_states(bytes: &[u8]) {
    qemu::streams(bytes);
    sim::fuzzing(bytes, None);
    #[cfg(target_arch = "x86_64")]
    kvm::fuzzing::state(bytes);
}

/// A QEMU's command line.
pub fn command_lines(bytes: &[u8]) {
    qemu::command_lines(bytes);
}

/// A client of the disks that are served.
pub fn nbd_requests(bytes: &[u8]) {
    nbd::requests(bytes);
}

/// A server of disks that are read.
pub fn nbd_replies(bytes: &[u8]) {
    qemu::nbd_replies(bytes);
}

/// A QEMU's control socket.
pub fn qmp_replies(bytes: &[u8]) {
    qemu::qmp_replies(bytes);
}

/// A first copy on a medium.
pub fn seed_files(bytes: &[u8]) {
    seed::seeds_of_guests(bytes);
}

/// What operators ask for.
pub fn api_bodies(bytes: &[u8]) {
    site::bodies(bytes);
}

/// What a site remembers.
pub fn rows(bytes: &[u8]) {
    site::rows(bytes);
}

const GUEST: GuestId = GuestId([7; 16]);

fn definition() -> Definition {
    Definition::Embedded(embedded::Definition {
        kind: "sim".to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), 1 << 20)],
        disks: vec![("disk".to_owned(), 1 << 20)],
        config: vec![1, 2, 3],
    })
}

fn opening() -> Opening {
    Opening {
        guest: GUEST,
        name: "web".to_owned(),
        source: "east".to_owned(),
        definition: definition(),
        volumes: vec![Volume {
            name: "ram".to_owned(),
            kind: VolumeKind::Ram,
            bytes: 1 << 20,
        }],
        term: term(),
        warm: true,
        rpo_ms: None,
        retention: Retention::default(),
        schedule: None,
        commit: CommitTerms::default(),
    }
}

fn term() -> Term {
    Term {
        group: GUEST,
        number: 3,
        owner: SiteKey::from_bytes([3; 32]),
    }
}

fn context(definition: Definition) -> PointContext {
    PointContext {
        name: "web".to_owned(),
        source: "east".to_owned(),
        term: 3,
        definition,
        pause: Duration::from_millis(8),
        ram_scan: Duration::from_millis(5),
        ram_scanned_bytes: 1 << 20,
        changed_bytes: 4096,
        sent_bytes: 300,
        base: false,
        group: None,
        quiesced: None,
    }
}

fn seal() -> SealRequest {
    SealRequest {
        guest: GUEST,
        point: 5,
        parent: 0,
        cut_at: 1,
        volumes: opening().volumes,
        batches: 1,
        chain: [4; 32],
        context: context(definition()),
        activate: None,
    }
}

fn definition_seeds() -> Vec<Vec<u8>> {
    let mut seeds = qemu::command_line_seeds();
    let line = seeds.remove(0);
    let qemu = serde_json::from_slice::<Definition>(&seeds[0]).expect("QEMU's definition");
    seeds.push(cbor(&context(qemu)));
    seeds.push(cbor(&context(definition())));
    seeds.push(serde_json::to_vec(&definition()).expect("plain data has a JSON form"));
    seeds.push(line);
    seeds
}

fn state_seeds() -> Vec<Vec<u8>> {
    let mut seeds = qemu::stream_seeds();
    #[cfg(target_arch = "x86_64")]
    seeds.extend(kvm::fuzzing::seeds());
    seeds
}

fn seed_seeds() -> Vec<Vec<u8>> {
    let about = SeedAbout {
        source: SiteKey::from_bytes([3; 32]),
        target: SiteKey::from_bytes([4; 32]),
        opening: opening(),
        point: 5,
        first: 100,
        last: 200,
    };
    let index = Arc::new(Mutex::new(DedupIndex::new(1 << 12)));
    let numbers = Arc::new(Sequence::starting_at(about.first));
    let mut encoder = Encoder::new(GUEST, about.point, numbers, index, 1);
    encoder.zeros(0, 0, 7).expect("within the limits");
    let batch = encoder.flush().expect("a batch of zeros").bytes;
    seed::seeds(&cbor(&about), &batch, &cbor(&seal()))
}

#[cfg(test)]
#[path = "../fuzz/tried.rs"]
mod tried;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_break_a_promise() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        tried::all(&TARGETS, &fuzz, 300);
    }

    /// What the targets begin with is what it is meant to be.
    #[test]
    fn seeds_are_sound() {
        for seed in messages::seeds() {
            assert!(Envelope::decode(&seed).is_ok());
        }
        let line = qemu::command_line_seeds().remove(1);
        let definition = serde_json::from_slice::<Definition>(&line);
        assert_eq!(definition.expect("QEMU's definition").unsound(), None);
    }
}
