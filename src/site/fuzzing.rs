//! What operators ask for and what a site keeps, as fuzz targets: JSON of many kinds, the
//! first byte of an input says of which.

use axum::extract::Query;
use axum::http::Uri;
use farhaven_policies::policy::Policy;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{PeerRecord, SiteKey};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::api::{self, StartGuest};
use super::groups::{self, GroupRecord};
use super::records::{
    Activation, EvidenceRecord, GuestRecord, PointRecord, Protection, StandbyRecord,
};
use super::{checked, evacuate, events, limits, runs, seed, turn, view};
use crate::activate::fence::{self, Term};
use crate::guest::{Definition, embedded};
use crate::runbook;

/// What is read is the same when it is written and read again.
fn json<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else {
        return;
    };
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(serde_json::to_vec(&again).ok(), Some(written));
}

/// With fractions, which may come back in another last digit.
fn told<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        let written = serde_json::to_vec(&value).expect("what was read can be written");
        assert!(serde_json::from_slice::<T>(&written).is_ok());
    }
}

fn query<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(uri) = format!("/v1/x?{text}").parse::<Uri>() {
        let _ = Query::<T>::try_from_uri(&uri);
    }
    json::<T>(bytes);
}

type Reader = fn(&[u8]);

const BODIES: [Reader; 36] = [
    json::<api::Invite>,
    json::<api::Pair>,
    json::<api::AddGuest>,
    query::<api::Check>,
    json::<api::Protect>,
    json::<api::ExportSeed>,
    json::<api::ImportSeed>,
    json::<api::Unprotect>,
    json::<api::Failover>,
    json::<groups::FailOverGroup>,
    json::<api::TestFailover>,
    json::<api::Move>,
    json::<api::TakeBack>,
    json::<api::AddImage>,
    query::<api::OfPeer>,
    json::<api::KeepPoint>,
    json::<api::ReleasePoint>,
    json::<api::Commit>,
    json::<api::Reprotect>,
    json::<api::ExportEvidence>,
    json::<api::DiscardEvidence>,
    json::<turn::RollBack>,
    json::<api::Acknowledge>,
    query::<api::AfterEvents>,
    json::<api::AddToken>,
    json::<evacuate::Order>,
    json::<limits::SetLimit>,
    json::<StartGuest>,
    // What the command line reads of a daemon.
    told::<view::SiteView>,
    told::<api::Events>,
    json::<api::TestGroup>,
    json::<api::MoveGroup>,
    json::<api::StartScrub>,
    json::<runs::api::Start>,
    json::<runs::api::Say>,
    json::<groups::GroupRollBack>,
];

const ROWS: [Reader; 18] = [
    json::<PeerRecord>,
    json::<GuestRecord>,
    json::<GroupRecord>,
    json::<Protection>,
    json::<PointRecord>,
    json::<Activation>,
    json::<StandbyRecord>,
    json::<EvidenceRecord>,
    told::<evacuate::Evacuation>,
    json::<events::Event>,
    json::<farhaven_policies::alert::Board>,
    json::<farhaven_policies::bandwidth::LinkTerms>,
    seed::announced::fuzzing,
    fence::fuzzing,
    runbook::record::fuzzing,
    json::<runs::facts::RunFacts>,
    json::<groups::handed::HandOver>,
    json::<limits::Set>,
];

fn by_first(readers: &[Reader], bytes: &[u8]) {
    if let Some((first, rest)) = bytes.split_first() {
        readers[usize::from(*first) % readers.len()](rest);
    }
}

/// Bodies and queries of requests to the API.
pub(crate) fn bodies(bytes: &[u8]) {
    by_first(&BODIES, bytes);
    api::fuzzing(bytes);
}

/// Rows of the catalogue, and small files of a site.
pub(crate) fn rows(bytes: &[u8]) {
    by_first(&ROWS, bytes);
}

fn numbered(values: Vec<serde_json::Value>) -> Vec<Vec<u8>> {
    later(0, values)
}

/// For the readers from that number on.
fn later(first: u8, values: Vec<serde_json::Value>) -> Vec<Vec<u8>> {
    let value = |(number, value): (u8, serde_json::Value)| {
        [&[number][..], value.to_string().as_bytes()].concat()
    };
    (first..).zip(values).map(value).collect()
}

pub(crate) fn body_seeds() -> Vec<Vec<u8>> {
    numbered(vec![
        json!({"valid_s": 60}),
        json!({"invitation": "fh1-abc"}),
        json!({"name": "web", "qmp": "/q", "start": {"kind": "sim", "ram": "64MiB", "workload": "noise:8"}}),
        json!({"to": "west"}),
        json!({"to": "west", "rpo": "10s", "seeded": true}),
        json!({"to": "west", "path": "/a"}),
        json!({"path": "/a"}),
        json!({"discard": true}),
        json!({"point": 7, "force": true}),
        json!({"cut": 7, "force": false}),
        json!({"point": "before upgrade"}),
        json!({"accept_pause": true}),
        json!({"force": true}),
        json!({"path": "/a", "name": "debian", "peer": "east"}),
        json!({"peer": "east"}),
        json!({"point": null, "name": "golden"}),
        json!({"point": 3}),
        json!({"discard": true}),
        json!({"rpo": "5s"}),
        json!({"directory": "/d", "copy": "1"}),
        json!({"copy": "1", "force": true}),
        json!({"point": 3, "accept_loss": true}),
        json!({"by": "somebody"}),
        json!({"after": 3, "limit": 10, "wait_s": 5}),
        json!({"name": "ci", "role": "operator", "may": ["test", "failover"], "expires_s": 60}),
        json!({"to": "west", "deadline": "1h", "guests": ["web"], "link_rate": "20mbit"}),
        json!({"guest": "web", "limit": "20mbit", "priority": 50}),
        json!({"kind": "kvm", "ram": "1GiB", "disk": "64MiB", "vcpus": 2, "seed": 7}),
    ])
    .into_iter()
    .chain(later(
        32,
        vec![
            json!({"peer": "west", "rate": "20mbit"}),
            json!({"runbook": "[[steps]]", "mode": "planned", "point": 7, "by": "ada"}),
            json!({"by": "ada", "step": "go", "refuse": true, "why": "not now"}),
            json!({"cut": 1796025713429_u64, "accept_loss": true}),
        ],
    ))
    .chain([
        [&[23][..], b"after=3&limit=10&wait_s=5"].concat(),
        [&[3][..], b"to=west"].concat(),
    ])
    .collect()
}

fn term_of(group: GuestId, owner: SiteKey) -> Term {
    Term {
        group,
        number: 3,
        owner,
    }
}

pub(crate) fn row_seeds() -> Vec<Vec<u8>> {
    let guest = GuestId([7; 16]);
    let key = SiteKey::from_bytes([3; 32]);
    let definition = Definition::Embedded(embedded::Definition {
        kind: "sim".to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), 1 << 20)],
        disks: Vec::new(),
        config: vec![1, 2],
    });
    let term = term_of(guest, key);
    let record = GuestRecord {
        id: guest,
        name: "web".to_owned(),
        qmp: Some("/q".into()),
        console: None,
        run: None,
        definition,
    };
    let protection = Protection {
        guest,
        to: "west".to_owned(),
        key: Some(key),
        policy: Policy::default(),
        schedule: "all for 2h, newest 7".parse().ok(),
        group: Some("bank".to_owned()),
        share: None,
        paused: false,
        seeded: false,
        moving: Some(term),
        shut_down: false,
        held: None,
        moved: None,
        stopped: false,
        stopped_by: None,
        committed: false,
    };
    let group = json!({"id": guest, "name": "bank", "peer": "west", "key": key, "members": {"db": {"guest": guest}}});
    // Before rows had the keys of their sites.
    let of_before = [group.clone(), json!(protection)].map(|mut row| {
        row.as_object_mut().map(|fields| fields.remove("key"));
        row
    });
    let peer = json!({"site": "west", "key": key, "addresses": ["dr:1"], "dial": true});
    let point = json!({"cut_at": 1, "pause": {"secs": 0, "nanos": 7}, "ram_scan": {"secs": 0, "nanos": 1}, "ram_scanned_bytes": 3});
    let mut seeds = numbered(vec![
        peer,
        json!(record),
        group,
        json!(protection),
        point,
        json!({"guest": guest, "point": 4, "term": term, "running": true, "hydrated": false, "times": {}, "at": 5}),
        json!({"from": "west", "key": key, "opening": {"guest": guest, "name": "web", "definition": record.definition, "term": term}}),
        json!({"record": record, "term": 4, "moved": true}),
        json!({"id": 1, "order": {"to": "west"}, "state": "running"}),
        json!({"number": 1, "at": "2026-11-28T18:00:00Z", "kind": "alert_raised", "subject": "web", "what": "x"}),
        json!(farhaven_policies::alert::Board::default()),
        json!(farhaven_policies::bandwidth::LinkTerms::default()),
        json!({"from": key, "announced": {}}),
    ]);
    let term = checked::written(&json!(term).to_string());
    seeds.push([&[13][..], term.as_bytes()].concat());
    seeds.push(
        [
            &[14][..],
            br#"{"v":1,"number":1,"at":"2026-11-28T18:00:00Z","event":"paused""#,
        ]
        .concat(),
    );
    seeds.extend(later(2, of_before.to_vec()));
    let number = term_of(guest, key);
    seeds.extend(later(
        15,
        vec![
            json!({"quick": true, "guests": {"web": {"point": 7, "term": number}}}),
            json!({"group": guest, "members": [{"guest": guest, "point": 7, "term": number}]}),
            json!({"site": "20mbit", "guests": {"web": {"bandwidth": "1mbit", "priority": 100}}}),
        ],
    ));
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the targets begin with is read by whom it is for.
    #[test]
    fn seeds_are_sound() {
        fn read<T: DeserializeOwned>(seeds: &[Vec<u8>], at: usize) {
            let read = serde_json::from_slice::<T>(&seeds[at][1..]);
            assert!(read.is_ok(), "seed {at}: {:?}", read.err());
        }
        let bodies = body_seeds();
        read::<api::AddGuest>(&bodies, 2);
        read::<api::Protect>(&bodies, 4);
        read::<api::Failover>(&bodies, 8);
        read::<turn::RollBack>(&bodies, 21);
        read::<api::AddToken>(&bodies, 24);
        read::<evacuate::Order>(&bodies, 25);
        read::<limits::SetLimit>(&bodies, 26);
        read::<StartGuest>(&bodies, 27);
        // And before the two queries that they end with.
        let last = bodies.len() - 6;
        read::<api::StartScrub>(&bodies, last);
        read::<runs::api::Start>(&bodies, last + 1);
        read::<runs::api::Say>(&bodies, last + 2);
        read::<groups::GroupRollBack>(&bodies, last + 3);
        let rows = row_seeds();
        read::<PeerRecord>(&rows, 0);
        read::<GuestRecord>(&rows, 1);
        read::<GroupRecord>(&rows, 2);
        read::<Protection>(&rows, 3);
        read::<PointRecord>(&rows, 4);
        let last = rows.len() - 3;
        read::<GroupRecord>(&rows, last - 2);
        read::<Protection>(&rows, last - 1);
        read::<runs::facts::RunFacts>(&rows, last);
        read::<groups::handed::HandOver>(&rows, last + 1);
        read::<limits::Set>(&rows, last + 2);
    }
}
