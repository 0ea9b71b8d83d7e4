//! Prunes against sessions in flight: what one guest retires, another may be
//! about to refer to.

use std::collections::{BTreeSet, VecDeque};

use farhaven_storage_sync::codec::Batch;
use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use farhaven_storage_sync::prune::PrunePlan;
use farhaven_storage_sync::store::{Seal, SealError, Store};
use rand::Rng;

use super::check;
use super::trial::{Content, Trial, open};

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Races {
    pub interleavings: u64,
    pub seals: u64,
    /// Seals that were refused, because a batch they refer to had gone: the
    /// source forgot it and told the units anew.
    pub dangling: u64,
    pub prunes: u64,
    /// Batches that a plan would have retired and that were needed again.
    pub revived: u64,
    pub reopened: u64,
}

/// An attempt of a guest at a point, as far as it got.
struct Attempt {
    point: u64,
    parent: u64,
    batches: Vec<Batch>,
    unsent: VecDeque<Batch>,
    content: Content,
}

struct Planned {
    plan: PrunePlan,
    told: bool,
    keep: farhaven_storage_sync::prune::Keep,
}

/// One interleaving by this seed.
pub fn run(seed: u64, races: &mut Races) -> Result<(), String> {
    let disk = SimulatedDisk::new();
    let mut trial = Trial::new(seed);
    let mut store = open(&disk).map_err(|error| error.to_string())?.0;
    let mut attempts: [Option<Attempt>; 2] = [None, None];
    let mut planned: Option<Planned> = None;
    let words = |why: String| format!("seed {seed}: {why}");
    for _ in 0..60 {
        let guest = trial.random.random_range(0..2);
        match trial.random.random_range(0..12) {
            0..3 if attempts[guest].is_none() => {
                trial.write(guest);
                attempts[guest] = Some(begin(&mut trial, &store, guest));
            }
            0..7 => {
                if let Some(attempt) = &mut attempts[guest]
                    && let Some(batch) = attempt.unsent.pop_front()
                {
                    let seqs = store
                        .append(&[batch.bytes])
                        .map_err(|e| words(e.to_string()))?;
                    trial.acknowledge(&seqs);
                }
            }
            7 => {
                // Cut link, or a guest that was given time: it begins anew.
                if attempts[guest].take().is_some() {
                    store.abandon(trial.expect.guests[guest].id);
                }
            }
            8 | 9 => match planned.take() {
                None => {
                    let keep = trial.keep_some();
                    let plan = store.plan_prune(&keep).map_err(|e| words(e.to_string()))?;
                    planned = Some(Planned {
                        plan,
                        told: false,
                        keep,
                    });
                }
                Some(mut prune) if !prune.told => {
                    let retire: BTreeSet<u64> = prune.plan.retire.iter().copied().collect();
                    trial.forget(&retire);
                    prune.told = true;
                    planned = Some(prune);
                }
                Some(prune) if trial.random.random_range(0..5) == 0 => {
                    store.give_up_prune(&prune.plan);
                }
                Some(prune) => {
                    trial.letting_go(&prune.keep);
                    let newer = restore_newer(&mut trial, &prune);
                    let report = store
                        .perform_prune(&prune.plan)
                        .map_err(|e| words(e.to_string()))?;
                    trial.let_go();
                    debug_assert!(newer);
                    races.prunes += 1;
                    races.revived += report.revived as u64;
                }
            },
            10 if trial.random.random_range(0..3) == 0 => {
                drop(store);
                store = open(&disk).map_err(|error| words(error.to_string()))?.0;
                planned = None;
                races.reopened += 1;
            }
            _ => {
                if attempts[guest]
                    .as_ref()
                    .is_some_and(|attempt| attempt.unsent.is_empty())
                    && let Some(attempt) = attempts[guest].take()
                {
                    seal(&mut trial, &store, guest, attempt, races).map_err(words)?;
                }
            }
        }
    }
    // Batches of a prune that was told are not acknowledged to anybody now, and
    // those of attempts that were given up may have gone.
    trial.expect.acknowledged.clear();
    check::points(&store, &trial.expect).map_err(words)?;
    check::scrubbed(&store).map_err(words)?;
    drop(store);
    let (store, report) = open(&disk).map_err(|error| words(error.to_string()))?;
    if !report.damaged.is_empty() {
        return Err(words(format!("{:?}", report.damaged)));
    }
    check::points(&store, &trial.expect).map_err(words)?;
    check::scrubbed(&store).map_err(words)?;
    races.interleavings += 1;
    Ok(())
}

/// Points sealed since the plan are not in its list, and stay.
fn restore_newer(trial: &mut Trial, prune: &Planned) -> bool {
    for guest in &mut trial.expect.guests {
        let dropped = |point: u64| prune.plan.dropped.contains(&(guest.id, point));
        let stay: Vec<u64> = guest
            .may_be
            .keys()
            .copied()
            .filter(|&p| !dropped(p))
            .collect();
        for point in stay {
            if let Some(content) = guest.may_be.remove(&point) {
                guest.sealed.insert(point, content);
            }
        }
    }
    true
}

fn begin(trial: &mut Trial, store: &Store, guest: usize) -> Attempt {
    let id = trial.expect.guests[guest].id;
    let point = store.next_point(id) + trial.random.random_range(0..2);
    let parent = store.newest(id).map_or(0, |newest| newest.point);
    let batches = trial.encode(guest, point);
    Attempt {
        point,
        parent,
        unsent: batches.iter().cloned().collect(),
        batches,
        content: trial.now[guest].clone(),
    }
}

fn seal(
    trial: &mut Trial,
    store: &Store,
    guest: usize,
    attempt: Attempt,
    races: &mut Races,
) -> Result<(), String> {
    let seal: Seal = trial.seal_of(guest, attempt.point, attempt.parent, &attempt.batches);
    match store.seal(seal) {
        Ok(_) => {
            let expected = &mut trial.expect.guests[guest];
            expected.sealed.insert(attempt.point, attempt.content);
            trial.dirty[guest].clear();
            races.seals += 1;
            Ok(())
        }
        Err(SealError::Dangling { missing, .. }) => {
            // What the peer's answer tells the source to do.
            trial.forget(&BTreeSet::from([missing]));
            store.abandon(trial.expect.guests[guest].id);
            races.dangling += 1;
            Ok(())
        }
        Err(error) => Err(format!("seal of point {}: {error}", attempt.point)),
    }
}
