//! The cut: one instant of memory, device state and disks.
//!
//! While the guest stands still nothing is done but to take the dirty log, copy
//! the changed pages into a buffer that is there already, save the device state
//! and fix the disks. Then the guest goes on, and only then are the copies
//! hashed and handed to the sink. The monitor stays locked from the stop until
//! the guest went on: nobody who stops it meanwhile finds it running again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{UNIT, VolumeIndex, VolumeKind};

use super::{
    Bitmap, EmbeddedGuest, Hasher, KEPT_BUFFER, PIECE, changed_shape, digests, explain, hand_over,
    lock, take_dirty,
};
use crate::guest::embedded::Vmm;
use crate::guest::embedded::disk::instant::View;
use crate::guest::gate::{CutGate, Stood};
use crate::guest::{After, Cut, CutTimes, DiskInstant, GuestError, Quiesced, Sink, SinkError};

/// Tries to let a guest go on before it is told to be left stopped.
const TRIES: u32 = 20;

/// A cut whose disks are being read.
pub(super) struct Outstanding {
    point: u64,
    disks: Vec<Reading>,
}

/// A disk of such a cut.
struct Reading {
    index: usize,
    set: Arc<Bitmap>,
    /// Everything of the set reached the sink.
    done: Arc<AtomicBool>,
}

/// Pages of a block in the buffer.
struct Run {
    block: usize,
    first: u64,
    count: u64,
    at: usize,
}

/// A guest stood still.
struct Stand {
    at: SystemTime,
    stopped: Instant,
    was_running: bool,
    fixed: Fixed,
}

/// What the stop gave.
struct Fixed {
    runs: Vec<Run>,
    device_state: Vec<u8>,
    views: Vec<View>,
}

impl EmbeddedGuest {
    pub(super) fn make_cut(
        &mut self,
        point: u64,
        after: After,
        gate: &dyn CutGate,
        sink: &mut dyn Sink,
    ) -> Result<Cut, GuestError> {
        self.end_cut(false);
        self.hot.begin();
        self.fits()?;
        let mut times = CutTimes::default();
        gate.gather()?;
        let stood = loop {
            gate.ready()?;
            if let Some(stood) = self.stand_still(after, gate, &mut times)? {
                break stood;
            }
        };
        let Stand {
            at,
            stopped,
            was_running,
            fixed,
        } = stood;
        let handed = self.hand_copies(&fixed.runs, sink);
        self.release_buffer();
        if let Err(error) = handed {
            self.cut_failed(fixed.views);
            if was_running && after == After::Hold {
                self.go_on()?;
            }
            return Err(error.into());
        }
        for (block, owed) in self.owed.iter_mut().enumerate() {
            if block < self.blocks {
                let units = owed.take();
                owed.cut(point, &units);
            } else {
                owed.cut(point, &Bitmap::none(owed.units()));
            }
        }
        if let Some(volume) = self
            .volumes
            .iter_mut()
            .find(|v| v.kind == VolumeKind::DeviceState)
        {
            volume.bytes = fixed.device_state.len() as u64;
        }
        let mut outstanding = Outstanding {
            point,
            disks: Vec::with_capacity(fixed.views.len()),
        };
        let mut disks: Vec<Box<dyn DiskInstant>> = Vec::with_capacity(fixed.views.len());
        for (index, view) in (self.blocks..).zip(fixed.views) {
            for (first, count) in view.set().runs(u64::MAX) {
                self.hot.changed(index as VolumeIndex, first, count);
            }
            let done = Arc::new(AtomicBool::new(false));
            outstanding.disks.push(Reading {
                index,
                set: view.set().clone(),
                done: done.clone(),
            });
            disks.push(Box::new(AtCut {
                volume: index as VolumeIndex,
                view,
                key: self.hasher.key.clone(),
                begun: false,
                done,
            }));
        }
        self.outstanding = Some(outstanding);
        self.hot.end();
        Ok(Cut {
            at,
            stopped,
            times,
            device_state: fixed.device_state,
            disks,
            quiesced: Quiesced::NotAsked,
        })
    }

    /// From the stop until the guest goes on, or for a held cut until
    /// everything is fixed. After an error it is as it was before. `None`: it goes
    /// on, and is to be stopped again.
    fn stand_still(
        &mut self,
        after: After,
        gate: &dyn CutGate,
        times: &mut CutTimes,
    ) -> Result<Option<Stand>, GuestError> {
        let shared = self.vmm.clone();
        let mut vmm = lock(&shared);
        let was_running = match vmm.running() {
            Some(running) => running,
            None => return Err(GuestError::Gone(vmm.ended_because())),
        };
        let (at, stopped) = (SystemTime::now(), Instant::now());
        vmm.pause().map_err(explain)?;
        let fixed = match gate.stopped(Instant::now()) {
            Ok(Stood::Together) => self.fix(&mut *vmm, times).map(Some),
            Ok(Stood::Apart) => Ok(None),
            Err(given_up) => Err(given_up.into()),
        };
        let stays = after == After::Hold && matches!(fixed, Ok(Some(_)));
        let went_on = match was_running && !stays {
            true => go_on(&mut *vmm),
            false => Ok(()),
        };
        times.pause += stopped.elapsed();
        drop(vmm);
        match (fixed, went_on) {
            (Ok(fixed), Ok(())) => Ok(fixed.map(|fixed| Stand {
                at,
                stopped,
                was_running,
                fixed,
            })),
            (Err(error), Ok(())) => Err(error),
            (Ok(fixed), Err(stays)) => {
                if let Some(fixed) = fixed {
                    self.cut_failed(fixed.views);
                }
                Err(stays)
            }
            (Err(first), Err(stays)) => {
                tracing::error!(error = %first, "the cut had failed before");
                Err(stays)
            }
        }
    }

    /// Everything of the instant, the guest being stopped.
    fn fix(&mut self, vmm: &mut dyn Vmm, times: &mut CutTimes) -> Result<Fixed, GuestError> {
        let begun = Instant::now();
        for (block, owed) in self.owed.iter_mut().take(self.blocks).enumerate() {
            take_dirty(vmm, block, owed, &mut self.hot)?;
        }
        self.fits()?;
        let mut runs = Vec::new();
        let mut used = 0;
        for (block, owed) in self.owed.iter().take(self.blocks).enumerate() {
            for (first, count) in owed.owed().runs(PIECE) {
                let end = used + count as usize * UNIT;
                if self.buffer.len() < end {
                    let more = end.saturating_mul(2).min(self.buffer_bytes).max(end);
                    self.buffer.resize(more, 0);
                }
                let room = self.buffer.get_mut(used..end).unwrap_or_default();
                vmm.read_ram(block, first * UNIT as u64, room)
                    .map_err(explain)?;
                runs.push(Run {
                    block,
                    first,
                    count,
                    at: used,
                });
                used = end;
            }
        }
        times.ram_scan = begun.elapsed();
        times.ram_scanned_bytes = used as u64;
        let device_state = vmm.save().map_err(explain)?;
        let saved = begun.elapsed();
        times.device_state = saved.saturating_sub(times.ram_scan);
        let disks = vmm.disks();
        if disks.len() != self.owed.len() - self.blocks {
            return Err(changed_shape());
        }
        let limit = self.buffer_bytes / disks.len().max(1);
        let views = disks
            .iter()
            .zip(self.owed.iter_mut().skip(self.blocks))
            .map(|(disk, owed)| disk.freeze(owed.take(), limit))
            .collect();
        times.disks = begun.elapsed().saturating_sub(saved);
        Ok(Fixed {
            runs,
            device_state,
            views,
        })
    }

    /// A guest that changed more than the buffer holds is not even stopped.
    fn fits(&self) -> Result<(), GuestError> {
        let owed: u64 = self.owed.iter().take(self.blocks).map(|o| o.count()).sum();
        match owed.saturating_mul(UNIT as u64) <= self.buffer_bytes as u64 {
            true => Ok(()),
            false => Err(SinkError::Full.into()),
        }
    }

    fn hand_copies(&mut self, runs: &[Run], sink: &mut dyn Sink) -> Result<(), SinkError> {
        let mut sums = std::mem::take(&mut self.hasher.digests);
        let handed = runs.iter().try_for_each(|run| {
            let end = run.at + run.count as usize * UNIT;
            let bytes = self.buffer.get(run.at..end).unwrap_or_default();
            digests(&self.hasher.key, bytes, &mut sums);
            let volume = run.block as VolumeIndex;
            hand_over(sink, volume, run.first, bytes, &sums, |_, _| true)
        });
        self.hasher.digests = sums;
        handed
    }

    fn release_buffer(&mut self) {
        if self.buffer.len() > KEPT_BUFFER {
            self.buffer.truncate(KEPT_BUFFER);
            self.buffer.shrink_to_fit();
        }
    }

    /// Nothing of the cut counts as handed over.
    fn cut_failed(&mut self, views: Vec<View>) {
        for (index, owed) in self.owed.iter_mut().enumerate() {
            if index < self.blocks {
                let units = owed.take();
                owed.cut_failed(&units);
            } else if let Some(view) = views.get(index - self.blocks) {
                owed.cut_failed(view.set());
            }
        }
    }

    /// Ends the disk instants of the newest cut.
    pub(super) fn end_cut(&mut self, shipped: bool) {
        let Some(Outstanding { point, disks }) = self.outstanding.take() else {
            return;
        };
        for disk in disks {
            let Some(owed) = self.owed.get_mut(disk.index) else {
                continue;
            };
            if shipped && disk.done.load(Ordering::Acquire) {
                owed.shipped(point, &disk.set);
            } else {
                owed.cut_failed(&disk.set);
            }
        }
    }

    pub(super) fn go_on(&mut self) -> Result<(), GuestError> {
        go_on(&mut *lock(&self.vmm))
    }
}

/// Lets the guest run, and tries again when that fails.
fn go_on(vmm: &mut dyn Vmm) -> Result<(), GuestError> {
    let mut tries = 0;
    loop {
        let error = match vmm.resume() {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if vmm.running().is_none() {
            return Err(GuestError::Gone(format!(
                "{}. If the guest should run, start it again, or fail it over at the peer",
                vmm.ended_because()
            )));
        }
        tries += 1;
        if tries == TRIES {
            return Err(GuestError::LeftStopped {
                why: error.to_string(),
                how: "its monitor's own resume, or a restart of the program that holds it, or a failover at the peer".to_owned(),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A disk as it was at a cut.
struct AtCut {
    volume: VolumeIndex,
    view: View,
    key: DigestKey,
    begun: bool,
    done: Arc<AtomicBool>,
}

impl DiskInstant for AtCut {
    fn volume(&self) -> VolumeIndex {
        self.volume
    }

    fn changed(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError> {
        if std::mem::replace(&mut self.begun, true) {
            return Err(GuestError::State(format!(
                "disk '{}' was read as of this point already; it comes with the next",
                self.view.name()
            )));
        }
        let mut hasher = Hasher::new(self.key.clone());
        let (set, bytes) = (self.view.set().clone(), self.view.bytes());
        for (first, count) in set.runs(PIECE) {
            let piece = hasher.piece(count, count * UNIT as u64);
            self.view
                .read(first, piece)
                .map_err(|source| GuestError::Io {
                    what: format!("reading disk '{}' as it was at the cut", self.view.name()),
                    source,
                })?;
            let (units, sums) = hasher.digests();
            hand_over(sink, self.volume, first, units, sums, |_, _| true)?;
            self.view.read_until(first + count);
            sink.progress(((first + count) * UNIT as u64).min(bytes), bytes);
        }
        self.done.store(true, Ordering::Release);
        Ok(())
    }
}
