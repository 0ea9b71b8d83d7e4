//! What must hold of a store, whatever happened to it.

use std::collections::BTreeSet;

use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::store::Store;
use farhaven_storage_sync::unit::{GuestId, UNIT};

use super::trial::{Content, Doing, Expectation, open, unit};

/// Reads a point in both ways and compares it with what it was at its cut.
pub fn point(store: &Store, guest: GuestId, point: u64, content: &Content) -> Result<(), Wrong> {
    let unreadable =
        |error: &dyn std::fmt::Display| Wrong::Error(format!("point {point} of {guest}: {error}"));
    let replica = store.open_point(guest, point).map_err(|e| unreadable(&e))?;
    if replica.context() != format!("definition {point}").as_bytes() {
        return Err(Wrong::Data(format!("point {point}: another context")));
    }
    for (volume, units) in content.iter().enumerate() {
        let mut read = vec![1; units.len() * UNIT];
        let outcome = replica.read(volume as u16, 0, units.len() as u64, &mut read);
        outcome.map_err(|e| unreadable(&e))?;
        let mut filled = vec![0; units.len() * UNIT];
        let outcome = replica.fill(volume as u16, |at, bytes| {
            filled[at as usize * UNIT..][..UNIT].copy_from_slice(bytes);
        });
        outcome.map_err(|e| unreadable(&e))?;
        for (at, &of) in units.iter().enumerate() {
            let expected = unit(of);
            for bytes in [&read, &filled] {
                if bytes[at * UNIT..][..UNIT] != expected[..] {
                    let what = format!("point {point} of {guest}, volume {volume}, unit {at}");
                    return Err(Wrong::Data(format!("{what} reads differently")));
                }
            }
        }
    }
    Ok(())
}

/// How a point is not what it was.
#[derive(Debug)]
pub enum Wrong {
    /// It is refused.
    Error(String),
    /// It reads, and is something else.
    Data(String),
}

impl Wrong {
    pub fn words(self) -> String {
        match self {
            Wrong::Error(words) | Wrong::Data(words) => words,
        }
    }
}

/// All points that are there are whole, and all that were answered are there.
pub fn points(store: &Store, expect: &Expectation) -> Result<(), String> {
    for guest in &expect.guests {
        let there: BTreeSet<u64> = (store.points(guest.id).iter())
            .map(|header| header.point)
            .collect();
        if let Some(lost) = guest.sealed.keys().find(|&point| !there.contains(point)) {
            return Err(format!("point {lost} of {} is lost", guest.id));
        }
        for number in there {
            let sealed = guest.sealed.get(&number);
            match sealed.or_else(|| guest.may_be.get(&number)) {
                Some(content) => {
                    point(store, guest.id, number, content).map_err(Wrong::words)?;
                }
                None => return Err(format!("point {number} of {} came from nowhere", guest.id)),
            }
        }
    }
    let mut acknowledged = expect.acknowledged.iter();
    match acknowledged.find(|&&seq| !store.contains(seq)) {
        Some(lost) => Err(format!("batch {lost} was acknowledged and is lost")),
        None => Ok(()),
    }
}

/// Opens what a crash left, checks all that must hold, does again what was not
/// answered, and checks that too. The disk is changed by it.
pub fn recovered(disk: &SimulatedDisk, expect: &Expectation) -> Result<(), String> {
    let (store, report) = open(disk).map_err(|error| format!("it does not open: {error}"))?;
    if let Some(damaged) = report.damaged.first() {
        return Err(format!(
            "{} is damaged: {}",
            damaged.path.display(),
            damaged.why
        ));
    }
    points(&store, expect)?;
    scrubbed(&store)?;
    let mut expect = expect.clone();
    let again = |what: &str, error: &dyn std::fmt::Display| format!("{what} again: {error}");
    match std::mem::replace(&mut expect.doing, Doing::Nothing) {
        Doing::Nothing => {}
        Doing::Append(batches) => {
            store.append(&batches).map_err(|e| again("append", &e))?;
        }
        Doing::Seal(guest, batches, seal, content) => {
            store.append(&batches).map_err(|e| again("append", &e))?;
            let number = seal.point;
            store.seal(*seal).map_err(|e| again("seal", &e))?;
            expect.guests[guest].sealed.insert(number, content);
        }
        Doing::Prune(keep) => {
            let plan = store.plan_prune(&keep).map_err(|e| again("plan", &e))?;
            for guest in &mut expect.guests {
                guest.may_be.clear();
                if let Some(keep) = keep.get(&guest.id) {
                    guest.sealed.retain(|point, _| keep.contains(point));
                }
            }
            expect.acknowledged.retain(|seq| !plan.retire.contains(seq));
            store.perform_prune(&plan).map_err(|e| again("prune", &e))?;
        }
    }
    points(&store, &expect)?;
    drop(store);
    let (store, _) = open(disk).map_err(|error| format!("it does not open again: {error}"))?;
    points(&store, &expect)?;
    scrubbed(&store)
}

/// A store to which nothing bad was done has nothing damaged.
pub fn scrubbed(store: &Store) -> Result<(), String> {
    match store.check().damage.first() {
        Some(damage) => Err(format!("scrub: {damage:?}")),
        None => Ok(()),
    }
}
