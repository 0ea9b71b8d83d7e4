//! Reading a whole volume at the speed of the log: each batch is expanded once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Replica, ReplicaError};
use crate::unit::{Place, VolumeIndex};

/// Units sorted at a time by [`Replica::fill_parallel`]: 16 MiB of memory.
const WINDOW: usize = 1 << 20;

impl Replica {
    /// Hands every unit of `volume` that is not zeros to `take` once, in the
    /// order that reads the log best.
    ///
    /// # Errors
    /// See [`ReplicaError`]; some units were handed over then.
    pub fn fill(
        &self,
        volume: VolumeIndex,
        mut take: impl FnMut(u64, &[u8]),
    ) -> Result<(), ReplicaError> {
        let mut literals = Vec::new();
        self.windows(volume, |units| {
            for group in units.chunk_by(|(a, _), (b, _)| a.seq() == b.seq()) {
                self.group(group, &mut literals, &mut take)?;
            }
            Ok(())
        })
    }

    /// [`Replica::fill`] on `threads` threads.
    ///
    /// # Errors
    /// As for [`Replica::fill`]: the first error of any thread.
    pub fn fill_parallel(
        &self,
        volume: VolumeIndex,
        threads: usize,
        take: &(dyn Fn(u64, &[u8]) + Sync),
    ) -> Result<(), ReplicaError> {
        self.windows(volume, |units| {
            let groups: Vec<&[(Place, u64)]> = units
                .chunk_by(|(a, _), (b, _)| a.seq() == b.seq())
                .collect();
            let next = AtomicUsize::new(0);
            let work = || {
                let mut literals = Vec::new();
                while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = self.group(group, &mut literals, &mut |unit, bytes| {
                        take(unit, bytes);
                    }) {
                        next.store(groups.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
                Ok(())
            };
            std::thread::scope(|scope| {
                let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
                let mut outcome = work();
                for other in others {
                    match other.join() {
                        Ok(done) => outcome = outcome.and(done),
                        Err(panic) => std::panic::resume_unwind(panic),
                    }
                }
                outcome
            })
        })
    }

    /// The volume's placed units, a window at a time, each sorted by place.
    fn windows(
        &self,
        volume: VolumeIndex,
        mut each: impl FnMut(&[(Place, u64)]) -> Result<(), ReplicaError>,
    ) -> Result<(), ReplicaError> {
        let mut units: Vec<(Place, u64)> = Vec::new();
        let mut flush = |units: &mut Vec<(Place, u64)>| {
            units.sort_unstable();
            let outcome = each(units);
            units.clear();
            outcome
        };
        for run in self.map.runs(volume) {
            for at in 0..run.count {
                units.push((Place(run.place.0 + at), run.unit + at));
                if units.len() == WINDOW {
                    flush(&mut units)?;
                }
            }
        }
        flush(&mut units)
    }

    fn group(
        &self,
        group: &[(Place, u64)],
        literals: &mut Vec<u8>,
        take: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), ReplicaError> {
        let Some((first, _)) = group.first() else {
            return Ok(());
        };
        self.expand(first.seq(), literals)?;
        let outcome = group.iter().try_for_each(|&(place, unit)| {
            match self.literal(literals, place) {
                Ok(bytes) => take(unit, bytes),
                Err(error) => return ControlFlow::Break(error),
            }
            ControlFlow::Continue(())
        });
        match outcome {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(error) => Err(error),
        }
    }
}
