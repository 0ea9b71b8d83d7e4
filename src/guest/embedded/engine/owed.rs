//! What is owed of one volume, what was handed over, and how that is taken back.
//!
//! A unit is owed (written, not handed over since), or was handed over for a
//! point that is not sealed yet, or is at the peer. `sealed` forgets what a
//! point holds, `give_back` makes all of the rest owed again.

use farhaven_storage_sync::unit::{Digest, VolumeIndex};

use super::hand_over;
use crate::guest::embedded::Bitmap;
use crate::guest::hot::Hot;
use crate::guest::{Sink, SinkError};

/// Most cuts remembered apart while they wait to be sealed.
const UNSEALED: usize = 32;

/// The accounts of one volume.
pub(super) struct Owed {
    owed: Bitmap,
    /// Handed over since the newest cut.
    recent: Bitmap,
    /// Handed over for points that are not sealed yet, oldest first.
    unsealed: Vec<(u64, Bitmap)>,
    /// Until the first round is done.
    held: Option<Held>,
}

/// What the peer held when protection began.
struct Held {
    /// `None`: zeros everywhere.
    digests: Option<Vec<Digest>>,
    /// Of these it holds that still, as nothing of them was handed over since.
    still: Bitmap,
}

impl Held {
    fn has(&self, unit: u64, digest: Digest) -> bool {
        let held = match &self.digests {
            None => Digest::ZERO_UNIT,
            Some(digests) => digests
                .get(unit as usize)
                .copied()
                .unwrap_or(Digest::UNKNOWN),
        };
        digest != Digest::UNKNOWN && digest == held && self.still.contains(unit)
    }
}

impl Owed {
    /// Every unit is owed; the peer holds zeros.
    pub(super) fn everything(units: u64) -> Self {
        Self {
            owed: Bitmap::all(units),
            recent: Bitmap::none(units),
            unsealed: Vec::new(),
            held: Some(Held {
                digests: None,
                still: Bitmap::all(units),
            }),
        }
    }

    /// What the peer holds at its newest sealed point.
    pub(super) fn know(&mut self, digests: Vec<Digest>) {
        let mut still = Bitmap::all(self.units());
        still.subtract(&self.recent);
        for (_, handed) in &self.unsealed {
            still.subtract(handed);
        }
        self.held = Some(Held {
            digests: Some(digests),
            still,
        });
    }

    /// The first round is done: from now on the sets alone tell.
    pub(super) fn compared(&mut self) {
        self.held = None;
    }

    pub(super) fn units(&self) -> u64 {
        self.owed.units()
    }

    pub(super) fn count(&self) -> u64 {
        self.owed.count()
    }

    pub(super) fn owed(&self) -> &Bitmap {
        &self.owed
    }

    /// The guest wrote these units since the last look.
    pub(super) fn wrote(&mut self, units: &Bitmap, hot: &mut Hot, volume: VolumeIndex) {
        for (first, count) in units.runs(u64::MAX) {
            hot.changed(volume, first, count);
        }
        self.owed.merge(units);
    }

    /// These units are owed, whoever wrote them when.
    pub(super) fn owe(&mut self, units: &Bitmap) {
        self.owed.merge(units);
    }

    /// These units are owed, and nothing is known of what the peer holds of them.
    pub(super) fn lost(&mut self, first: u64, count: u64) {
        self.owed.set_run(first, count);
        if let Some(held) = &mut self.held {
            held.still.clear_run(first, count);
        }
    }

    /// What a round hands over: what is owed, but for what waits for the cut.
    pub(super) fn due(&self, hot: &mut Hot, volume: VolumeIndex) -> Bitmap {
        let mut due = self.owed.clone();
        for (first, count) in self.owed.runs(u64::MAX) {
            for unit in first..first + count {
                if hot.waits(volume, unit) {
                    due.clear(unit);
                }
            }
        }
        due
    }

    /// What is owed, to be handed over by a cut; [`Owed::owe`] gives it back.
    pub(super) fn take(&mut self) -> Bitmap {
        self.owed.take()
    }

    /// Hands over units from `first` on, those that the peer does not hold.
    pub(super) fn hand(
        &mut self,
        sink: &mut dyn Sink,
        volume: VolumeIndex,
        first: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        let held = self.held.as_ref();
        let wanted = |unit: u64, digest| !held.is_some_and(|held| held.has(unit, digest));
        let handed = hand_over(sink, volume, first, bytes, digests, wanted);
        if handed.is_ok() {
            for (unit, digest) in (first..).zip(digests) {
                if wanted(unit, *digest) {
                    self.recent.set(unit);
                }
            }
            self.owed.clear_run(first, digests.len() as u64);
        }
        self.went(first, digests.len() as u64, handed)
    }

    /// Hands over `count` units of zeros from `first` on, those that the peer does not hold.
    pub(super) fn hand_zeros(
        &mut self,
        sink: &mut dyn Sink,
        volume: VolumeIndex,
        first: u64,
        count: u64,
    ) -> Result<(), SinkError> {
        let (mut at, end) = (first, first + count);
        let mut handed = Ok(());
        while at < end && handed.is_ok() {
            let held = self.held.as_ref();
            let wanted = |unit: &u64| !held.is_some_and(|held| held.has(*unit, Digest::ZERO_UNIT));
            let run = (at..end).take_while(wanted).count() as u64;
            if run > 0 {
                handed = sink.zeros(volume, at, run);
                if handed.is_ok() {
                    self.recent.set_run(at, run);
                }
            }
            at += run.max(1);
        }
        if handed.is_ok() {
            self.owed.clear_run(first, count);
        }
        self.went(first, count, handed)
    }

    /// Of what went to a sink, even if it refused later on, the peer may hold
    /// something else than before: there is nothing to compare with any more.
    fn went(
        &mut self,
        first: u64,
        count: u64,
        handed: Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        if let Some(held) = &mut self.held {
            if handed.is_err() {
                held.still.clear_run(first, count);
            } else {
                for unit in first..first + count {
                    if self.recent.contains(unit) {
                        held.still.clear(unit);
                    }
                }
            }
        }
        handed
    }

    /// A cut failed: of what it may have handed over nothing counts.
    pub(super) fn cut_failed(&mut self, units: &Bitmap) {
        self.owed.merge(units);
        if let Some(held) = &mut self.held {
            held.still.subtract(units);
        }
    }

    /// A cut handed over `units`; they and what went since the cut before are of this point.
    pub(super) fn cut(&mut self, point: u64, units: &Bitmap) {
        let mut handed = self.recent.take();
        handed.merge(units);
        if let Some(held) = &mut self.held {
            held.still.subtract(units);
        }
        self.unsealed.push((point, handed));
        if self.unsealed.len() > UNSEALED {
            let (_, oldest) = self.unsealed.remove(0);
            if let Some((_, next)) = self.unsealed.first_mut() {
                next.merge(&oldest);
            }
        }
    }

    /// Units of this point's cut that were handed over after it: its disks.
    pub(super) fn shipped(&mut self, point: u64, units: &Bitmap) {
        if let Some(held) = &mut self.held {
            held.still.subtract(units);
        }
        match self.unsealed.iter_mut().find(|(p, _)| *p == point) {
            Some((_, handed)) => handed.merge(units),
            // Given back meanwhile: not at the peer for sure.
            None => self.owed.merge(units),
        }
    }

    pub(super) fn sealed(&mut self, point: u64) {
        self.unsealed.retain(|(p, _)| *p > point);
    }

    pub(super) fn give_back(&mut self) {
        self.owed.merge(&self.recent.take());
        for (_, handed) in self.unsealed.drain(..) {
            self.owed.merge(&handed);
        }
    }
}
