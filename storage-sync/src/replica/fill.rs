//! Reading a whole volume at the speed of the log: each batch is expanded once.
//! Units told as differences wait, a bounded many, and are rebuilt sorted by
//! their bases, so that batches with bases are expanded once for all of them.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Replica, ReplicaError};
use crate::codec::{Body, Slot};
use crate::store::{Reader, Waiting};
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
        let mut body = Body::new();
        let mut waiting = Waiting::new();
        self.windows(volume, |units| {
            for group in units.chunk_by(|(a, _), (b, _)| a.seq() == b.seq()) {
                self.group(group, &mut body, &mut waiting, &mut take)?;
            }
            self.rebuild(&mut waiting, &mut take)
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
                let mut body = Body::new();
                let mut waiting = Waiting::new();
                let mut take = |unit, bytes: &[u8]| take(unit, bytes);
                while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = self.group(group, &mut body, &mut waiting, &mut take) {
                        next.store(groups.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
                self.rebuild(&mut waiting, &mut take)
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
        body: &mut Body,
        waiting: &mut Waiting<u64>,
        take: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), ReplicaError> {
        let Some((first, _)) = group.first() else {
            return Ok(());
        };
        self.expand(first.seq(), body)?;
        for &(place, unit) in group {
            match body.slot(place.index()) {
                Some(Slot::Whole(bytes)) => take(unit, bytes),
                Some(Slot::Difference(delta, bytes)) => waiting.add(&delta, bytes, unit),
                None => return Err(self.lost(place)),
            }
        }
        match waiting.is_full() {
            true => self.rebuild(waiting, take),
            false => Ok(()),
        }
    }

    fn rebuild(
        &self,
        waiting: &mut Waiting<u64>,
        take: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<(), ReplicaError> {
        let mut outcome = Ok(());
        waiting.rebuild(
            &self.store.0,
            &mut Reader::default(),
            &mut |unit, bytes| take(unit, bytes),
            &mut |_, unbuilt| {
                outcome = Err(self.unbuilt(unbuilt));
                false
            },
        );
        outcome
    }
}
