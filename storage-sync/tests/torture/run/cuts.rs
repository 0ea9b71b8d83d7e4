//! Power cuts and kills at every change of the disk.

use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::store::Store;

use super::check;
use super::trial::{Doing, Expectation, Trial, open};

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cuts {
    pub power_cuts: u64,
    pub kills: u64,
    /// Cuts in the middle of what opens the store after a cut.
    pub in_recovery: u64,
    pub appends: u64,
    pub seals: u64,
    pub prunes: u64,
    pub opens: u64,
}

/// How likely it is that something that was not synced is there all the same.
const CHANCES: [f64; 5] = [0.5, 0.0, 0.9, 1.0, 0.1];

/// Runs one trial of `steps` steps, and cuts the power before every change of
/// the disk in it. Stops after `most` cuts.
pub fn run(seed: u64, steps: usize, most: u64) -> Result<Cuts, String> {
    let mut cuts = Cuts::default();
    let mut trial = Trial::new(seed);
    let disk = SimulatedDisk::new();
    disk.watch();
    let (mut store, _) = open(&disk).map_err(|error| error.to_string())?;
    moments(&disk, &trial.expect, seed, &mut cuts)?;
    for step in 0..steps {
        if cuts.power_cuts >= most {
            break;
        }
        trial.step(&mut store, &mut |trial, store| {
            disk.watch();
            perform(trial, store)?;
            let before = trial.expect.clone();
            moments(&disk, &before, seed, &mut cuts)?;
            match &before.doing {
                Doing::Append(_) => cuts.appends += 1,
                Doing::Seal(..) => cuts.seals += 1,
                Doing::Prune(_) => cuts.prunes += 1,
                Doing::Nothing => {}
            }
            answered(trial);
            Ok::<(), String>(())
        })?;
        check::points(&store, &trial.expect)?;
        if step % 7 == 6 {
            drop(store);
            disk.watch();
            store = open(&disk).map_err(|error| error.to_string())?.0;
            cuts.opens += 1;
            moments(&disk, &trial.expect, seed, &mut cuts)?;
        }
    }
    Ok(cuts)
}

/// Does what is to be done; what it changes counts when it is answered.
pub fn perform(trial: &mut Trial, store: &mut Store) -> Result<(), String> {
    match trial.expect.doing.clone() {
        Doing::Nothing => {}
        Doing::Append(batches) => {
            store.append(&batches).map_err(|error| error.to_string())?;
        }
        Doing::Seal(guest, _, seal, content) => {
            let guest = &mut trial.expect.guests[guest];
            guest.may_be.insert(seal.point, content);
            store.seal(*seal).map_err(|error| error.to_string())?;
        }
        Doing::Prune(keep) => {
            let plan = store.plan_prune(&keep).map_err(|error| error.to_string())?;
            trial.forget(&plan.retire.iter().copied().collect());
            trial.letting_go(&keep);
            store
                .perform_prune(&plan)
                .map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// The answer arrived: from now on it must hold.
pub fn answered(trial: &mut Trial) {
    match std::mem::replace(&mut trial.expect.doing, Doing::Nothing) {
        Doing::Nothing => {}
        Doing::Append(batches) => {
            let seq = |bytes: &bytes::Bytes| {
                let header = farhaven_storage_sync::codec::BatchHeader::parse(bytes);
                header.unwrap().seq
            };
            let seqs: Vec<u64> = batches.iter().map(seq).collect();
            trial.acknowledge(&seqs);
        }
        Doing::Seal(guest, _, seal, content) => {
            let guest = &mut trial.expect.guests[guest];
            guest.may_be.remove(&seal.point);
            guest.sealed.insert(seal.point, content);
        }
        Doing::Prune(_) => trial.let_go(),
    }
}

fn moments(
    disk: &SimulatedDisk,
    expect: &Expectation,
    seed: u64,
    cuts: &mut Cuts,
) -> Result<(), String> {
    for moment in disk.moments() {
        let number = cuts.power_cuts;
        let cut_seed = seed ^ moment.call << 20;
        let chance = CHANCES[number as usize % CHANCES.len()];
        let words = |how: &str, error: String| {
            format!(
                "seed {seed}, {how} before call {}, {}: {error}",
                moment.call, moment.what
            )
        };
        let after = moment.disk.power_cut(cut_seed, chance);
        let again = after.copy();
        check::recovered(&after, expect).map_err(|e| words("power cut", e))?;
        cuts.power_cuts += 1;
        if number.is_multiple_of(4) {
            // The daemon dies and is started again, and then the power goes.
            let killed = moment.disk.copy();
            let store = open(&killed).map_err(|e| words("kill", e.to_string()))?;
            let mut seen = expect.clone();
            seen.acknowledged.extend(shown(&store.0, expect));
            if let Doing::Seal(guest, _, seal, content) = &expect.doing {
                let guest = &mut seen.guests[*guest];
                let points = store.0.points(guest.id);
                if points.iter().any(|header| header.point == seal.point) {
                    guest.sealed.insert(seal.point, content.clone());
                }
            }
            check::points(&store.0, &seen).map_err(|e| words("kill", e))?;
            drop(store);
            let after = killed.power_cut(cut_seed, chance);
            check::recovered(&after, &seen).map_err(|e| words("kill and power cut", e))?;
            cuts.kills += 1;
        }
        if number % 8 == 1 {
            again.watch();
            let opened = open(&again).map_err(|e| words("power cut", e.to_string()))?;
            drop(opened);
            for inner in again.moments() {
                let after = inner.disk.power_cut(cut_seed ^ inner.call, chance);
                check::recovered(&after, expect).map_err(|e| {
                    words(&format!("power cut, and another before {}", inner.what), e)
                })?;
                cuts.in_recovery += 1;
            }
        }
    }
    Ok(())
}

/// Batches of what was being done that a restarted daemon says it has: from
/// then on they count as acknowledged.
fn shown(store: &Store, expect: &Expectation) -> Vec<u64> {
    let batches = match &expect.doing {
        Doing::Append(batches) | Doing::Seal(_, batches, ..) => batches.clone(),
        _ => Vec::new(),
    };
    let seqs = batches.iter().map(|bytes| {
        let header = farhaven_storage_sync::codec::BatchHeader::parse(bytes);
        header.unwrap().seq
    });
    seqs.filter(|&seq| store.contains(seq)).collect()
}
