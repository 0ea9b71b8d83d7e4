//! I/O errors at every call of the store to its disk, one by one.

use std::error::Error;

use farhaven_storage_sync::disk::simulated::{Fault, SimulatedDisk};
use farhaven_storage_sync::store::Store;

use super::check::{self, Wrong};
use super::cuts::{answered, perform};
use super::sites::Sites;
use super::trial::{DIR, Doing, Trial, open};

/// What was tried.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Calls that were made to fail.
    pub faults: u64,
    /// Of those, calls whose failure somebody was told of.
    pub told: u64,
    /// Of those told, failures after which the store went on without a restart.
    pub went_on: u64,
    /// Is it found out where calls come from?
    places: bool,
    /// Where calls come from, and from where some were made to fail.
    pub reached: Sites,
    pub failed: Sites,
}

const KINDS: [Fault; 3] = [Fault::Io, Fault::Full, Fault::Short];

/// Runs one trial over and over, and lets each of its calls fail once, in each
/// way; every `stride`th of them. To find out from where calls come takes long.
pub fn run(seed: u64, steps: usize, stride: usize, places: bool) -> Result<Faults, String> {
    let mut faults = Faults {
        places,
        ..Faults::default()
    };
    let calls = one(seed, steps, None, &mut faults)?;
    for nth in (1 + seed % stride as u64..=calls).step_by(stride) {
        for kind in KINDS {
            one(seed, steps, Some((nth, kind)), &mut faults)
                .map_err(|why| format!("seed {seed}, {kind:?} at call {nth}: {why}"))?;
        }
    }
    Ok(faults)
}

/// One trial, and the calls that it made.
fn one(
    seed: u64,
    steps: usize,
    fault: Option<(u64, Fault)>,
    faults: &mut Faults,
) -> Result<u64, String> {
    let disk = SimulatedDisk::new();
    let mut trial = Trial::new(seed);
    match fault {
        Some((nth, kind)) => {
            disk.fail(nth, kind);
            if faults.places {
                faults.failed.watch(&disk, true);
            }
        }
        None if faults.places => faults.reached.watch(&disk, false),
        None => {}
    }
    let mut run = Run {
        disk: &disk,
        told: 0,
        restarted: false,
        went_on: false,
        looked: false,
    };
    let mut store = run.opened()?;
    for step in 0..steps {
        if fault.is_some_and(|(nth, _)| disk.calls() > nth) && !disk.was_hit() {
            return Ok(disk.calls()); // No call of that kind can fail so.
        }
        trial.step(&mut store, &mut |trial, store| run.perform(trial, store))?;
        run.name(&mut store, &trial)?;
        run.read(&store, &trial)?;
        if step % 5 == 4 {
            drop(store);
            store = run.opened()?;
        }
    }
    // Somebody looks for damage in the end.
    let damage = store.check().damage;
    if let Some(damage) = damage.first() {
        run.told(&damage.why)?;
        if !damage.unreadable {
            return Err(format!("scrub: {damage:?}"));
        }
    }
    let calls = disk.calls();
    let hit = disk.heal();
    check::points(&store, &trial.expect)?;
    drop(store);
    check::recovered(&disk.power_cut(seed, 0.0), &trial.expect)?;
    check::recovered(&disk.power_cut(seed, 0.5), &trial.expect)?;
    check::recovered(&disk, &trial.expect)?;
    faults.faults += u64::from(hit.is_some());
    faults.told += u64::from(hit.is_some() && run.told > 0);
    faults.went_on += u64::from(run.went_on && !run.restarted);
    Ok(calls)
}

struct Run<'a> {
    disk: &'a SimulatedDisk,
    told: u32,
    restarted: bool,
    went_on: bool,
    looked: bool,
}

impl Run<'_> {
    /// An error must say where.
    fn told(&mut self, words: &str) -> Result<(), String> {
        self.told += 1;
        match words.contains(DIR) || words.contains("directory /") {
            true if self.told < 9 => Ok(()),
            true => Err(format!("one fault, and still refused: {words}")),
            false => Err(format!("the error does not say where: {words}")),
        }
    }

    /// Opens until it opens; once more when something could not be read.
    fn opened(&mut self) -> Result<Store, String> {
        loop {
            match open(self.disk) {
                Ok((store, report)) => {
                    let Some(damaged) = report.damaged.first() else {
                        if report.log.bad.iter().any(|bad| bad.unreadable) {
                            self.told(&report.log.bad[0].path.display().to_string())?;
                            continue;
                        }
                        return Ok(store);
                    };
                    self.told(&damaged.path.display().to_string())?;
                }
                Err(error) => self.told(&chain(&error))?,
            }
        }
    }

    /// Tries again where it failed; then with a store that was opened anew.
    fn perform(&mut self, trial: &mut Trial, store: &mut Store) -> Result<(), String> {
        for attempt in 0.. {
            let outcome = perform(trial, store);
            self.crash(trial)?;
            match outcome {
                Ok(()) => {
                    self.went_on |= attempt > 0;
                    break;
                }
                Err(error) => self.told(&error)?,
            }
            check::points(store, &trial.expect)
                .map_err(|why| format!("after it was refused: {why}"))?;
            if attempt > 0 {
                self.restarted = true;
                // The old one must have closed its files.
                *store = open(&SimulatedDisk::new()).map_err(|e| e.to_string())?.0;
                *store = self.opened()?;
            }
        }
        answered(trial);
        Ok(())
    }

    /// The newest point of a guest gets a name, and loses it.
    fn name(&mut self, store: &mut Store, trial: &Trial) -> Result<(), String> {
        // Hints are made beside everything else; what goes wrong costs bandwidth.
        store.hint_with(&trial.key);
        while store.fill_hints() {}
        let Some((guest, point)) = trial.expect.guests.iter().find_map(|guest| {
            let newest = store.newest(guest.id)?;
            Some((guest.id, newest.point))
        }) else {
            return Ok(());
        };
        loop {
            let named = store.keep_point(guest, point, "before upgrade");
            match named.and_then(|()| store.release_point(guest, point)) {
                Ok(()) => return Ok(()),
                Err(error) => self.told(&chain(&error))?,
            }
        }
    }

    /// What a power cut or a kill leaves right behind the fault.
    fn crash(&mut self, trial: &Trial) -> Result<(), String> {
        let copy = self.disk.copy();
        if self.looked || self.told == 0 && !matches!(trial.expect.doing, Doing::Prune(_)) {
            return Ok(());
        }
        self.looked = self.told > 0;
        for chance in [0.0, 0.5] {
            check::recovered(&copy.power_cut(self.told.into(), chance), &trial.expect)
                .map_err(|why| format!("power cut behind it: {why}"))?;
        }
        check::recovered(&copy, &trial.expect).map_err(|why| format!("kill behind it: {why}"))
    }

    /// Restores all points: an error now and then, and never other data.
    fn read(&mut self, store: &Store, trial: &Trial) -> Result<(), String> {
        for guest in &trial.expect.guests {
            for (&number, content) in &guest.sealed {
                loop {
                    match check::point(store, guest.id, number, content) {
                        Ok(()) => break,
                        Err(Wrong::Data(why)) => return Err(why),
                        Err(Wrong::Error(why)) => self.told(&why)?,
                    }
                }
            }
        }
        Ok(())
    }
}

fn chain(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    words
}
