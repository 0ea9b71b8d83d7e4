//! The engine of embedded guests: a [`Guest`] made of any [`Vmm`].
//!
//! What changed comes from the monitor's dirty log and the disks' own sets and
//! is merged into what is owed ([`owed`]), always before it is read: a page
//! written meanwhile is told again. A round reads what is owed piece by piece
//! while the guest runs; a cut ([`cut`]) copies it while the guest stands
//! still. Only then is it hashed and handed to the sink. So a cut costs what
//! changed, not what exists.

use std::sync::MutexGuard;

use farhaven_storage_sync::digest::{DigestKey, is_zero};
use farhaven_storage_sync::unit::{Digest, UNIT, Volume, VolumeIndex, VolumeKind};

use super::{Bitmap, STOP_WITHIN, SharedVmm, Vmm, VmmError, stop};
use crate::guest::gate::CutGate;
use crate::guest::hot::Hot;
use crate::guest::qemu::units::hand_over;
use crate::guest::{After, Cut, Guest, GuestError, Sink};
use owed::Owed;

mod cut;
mod owed;
#[cfg(test)]
mod tests;

/// Units read and hashed at a time (256 KiB): fits a core's second-level cache.
const PIECE: u64 = 64;

/// The buffer that a cut copies into keeps this much between cuts, its pages in place.
const KEPT_BUFFER: usize = 8 << 20;

/// A guest whose monitor lives in this process, under protection. Dropping it
/// lets the guest run on freely.
pub struct EmbeddedGuest {
    vmm: SharedVmm,
    volumes: Vec<Volume>,
    /// Number of RAM blocks: the first volumes.
    blocks: usize,
    /// Of each RAM block, then of each disk.
    owed: Vec<Owed>,
    /// What a round leaves to the cut.
    hot: Hot,
    hasher: Hasher,
    /// What a cut copies while the guest is stopped, at most `buffer_bytes`.
    buffer: Vec<u8>,
    buffer_bytes: usize,
    outstanding: Option<cut::Outstanding>,
    throttled: bool,
}

impl EmbeddedGuest {
    /// Takes a guest under protection, which goes on. `key` is the session's.
    /// At most `buffer_bytes` of changed memory are copied in a cut, and as
    /// much is kept of all disks together while they are read as of a cut.
    ///
    /// # Errors
    /// When the guest has ended, or has volumes that cannot be protected.
    pub fn attach(vmm: SharedVmm, key: DigestKey, buffer_bytes: usize) -> Result<Self, GuestError> {
        let (volumes, blocks) = {
            let vmm = lock(&vmm);
            if vmm.running().is_none() {
                return Err(GuestError::Gone(vmm.ended_because()));
            }
            (volumes(&*vmm)?, vmm.ram().len())
        };
        let owed = volumes
            .iter()
            .filter(|volume| volume.kind != VolumeKind::DeviceState)
            .map(|volume| Owed::everything(volume.units()))
            .collect();
        let hot = Hot::new(&volumes, buffer_bytes as u64);
        Ok(Self {
            vmm,
            volumes,
            blocks,
            owed,
            hot,
            hasher: Hasher::new(key),
            // Written to, so that no cut waits for the kernel to give the pages.
            buffer: vec![1; KEPT_BUFFER.min(buffer_bytes)],
            buffer_bytes,
            outstanding: None,
            throttled: false,
        })
    }

    /// After how many looks in which it changed a unit waits for the cut; 0 has
    /// none wait. For measurements: [`Hot`] has a number that serves.
    pub fn waits_after(&mut self, looks: u8) {
        self.hot.after(looks);
    }

    /// Hands over what is owed of a disk, as it is now.
    fn disk_round(
        &mut self,
        index: usize,
        pass: &mut Pass,
        sink: &mut dyn Sink,
    ) -> Result<(), GuestError> {
        let disk = lock(&self.vmm).disks().get(index - self.blocks).cloned();
        let (Some(disk), Some(owed)) = (disk, self.owed.get_mut(index)) else {
            return Err(changed_shape());
        };
        let volume = index as VolumeIndex;
        owed.wrote(&disk.take_changed(), &mut self.hot, volume);
        let due = owed.due(&mut self.hot, volume);
        let failed = |source| GuestError::Io {
            what: format!("reading disk '{}'", disk.name()),
            source,
        };
        let mut at = 0;
        while let Some((first, run)) = due.run_from(at, u64::MAX) {
            let offset = first * UNIT as u64;
            let hole = disk.hole(offset);
            let empty = match offset + hole >= disk.bytes() {
                true => run,
                false => run.min(hole / UNIT as u64),
            };
            let count = if empty > 0 { empty } else { run.min(PIECE) };
            if empty > 0 {
                owed.hand_zeros(sink, volume, first, count)?;
            } else {
                let length = (count * UNIT as u64).min(disk.bytes() - offset);
                let piece = self.hasher.piece(count, length);
                disk.read(offset, piece).map_err(failed)?;
                let (bytes, digests) = self.hasher.digests();
                owed.hand(sink, volume, first, bytes, digests)?;
            }
            pass.did(count, sink);
            at = first + count;
        }
        Ok(())
    }

    /// Hands over what is owed of a block of memory, as it is now.
    fn ram_round(
        &mut self,
        index: usize,
        pass: &mut Pass,
        sink: &mut dyn Sink,
    ) -> Result<(), GuestError> {
        let Some(owed) = self.owed.get_mut(index) else {
            return Err(changed_shape());
        };
        let volume = index as VolumeIndex;
        take_dirty(&mut *lock(&self.vmm), index, owed, &mut self.hot)?;
        let due = owed.due(&mut self.hot, volume);
        let mut at = 0;
        while let Some((first, count)) = due.run_from(at, PIECE) {
            let piece = self.hasher.piece(count, count * UNIT as u64);
            lock(&self.vmm)
                .read_ram(index, first * UNIT as u64, piece)
                .map_err(explain)?;
            let (bytes, digests) = self.hasher.digests();
            owed.hand(sink, volume, first, bytes, digests)?;
            pass.did(count, sink);
            at = first + count;
        }
        Ok(())
    }
}

impl Guest for EmbeddedGuest {
    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn baseline(
        &mut self,
        _point: u64,
        volume: VolumeIndex,
        digests: Vec<Digest>,
    ) -> Result<(), GuestError> {
        let index = usize::from(volume);
        let (Some(owed), Some(volume)) = (self.owed.get_mut(index), self.volumes.get(index)) else {
            return Ok(());
        };
        if digests.len() as u64 != volume.units() {
            return Err(GuestError::State(format!(
                "the peer knows {} units of '{}', but it has {}; protect the guest anew",
                digests.len(),
                volume.name,
                volume.units()
            )));
        }
        owed.know(digests);
        Ok(())
    }

    fn round(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError> {
        self.end_cut(false);
        self.hot.begin();
        let mut pass = Pass {
            done: 0,
            total: self.owed.iter().map(Owed::count).sum(),
        };
        // Disks first: they take longer, and memory changes faster.
        for index in self.blocks..self.owed.len() {
            self.disk_round(index, &mut pass, sink)?;
        }
        for index in 0..self.blocks {
            self.ram_round(index, &mut pass, sink)?;
        }
        for owed in &mut self.owed {
            owed.compared();
        }
        self.hot.end();
        Ok(())
    }

    fn leave_to_the_cut(&mut self, leave: bool) {
        self.hot.leave(leave);
    }

    fn rounds_read_disks(&self) -> bool {
        true
    }

    fn waiting(&self) -> u64 {
        self.hot.waiting()
    }

    fn cut_at(
        &mut self,
        point: u64,
        after: After,
        gate: &dyn CutGate,
        sink: &mut dyn Sink,
    ) -> Result<Cut, GuestError> {
        self.make_cut(point, after, gate, sink)
    }

    fn finish_cut(&mut self, cut: Cut, shipped: bool) -> Result<(), GuestError> {
        drop(cut);
        self.end_cut(shipped);
        Ok(())
    }

    fn sealed(&mut self, point: u64) {
        for owed in &mut self.owed {
            owed.sealed(point);
        }
    }

    fn give_back(&mut self) {
        self.end_cut(false);
        for owed in &mut self.owed {
            owed.give_back();
        }
    }

    fn lost_at_peer(&mut self, volume: VolumeIndex, unit: u64, count: u64) {
        if let Some(owed) = self.owed.get_mut(usize::from(volume)) {
            owed.lost(unit, count);
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.go_on()
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        Ok(stop(&mut *lock(&self.vmm), STOP_WITHIN)?)
    }

    fn let_go(&mut self) -> Result<(), GuestError> {
        self.outstanding = None;
        self.throttled = false;
        lock(&self.vmm).end();
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        let percent = percent.min(99);
        // Also when it fails half-way: `detach` lets it run freely.
        self.throttled |= percent > 0;
        lock(&self.vmm).throttle(percent).map_err(explain)?;
        self.throttled = percent > 0;
        Ok(())
    }

    fn running(&mut self) -> Option<bool> {
        lock(&self.vmm).running()
    }

    fn detach(&mut self) {
        self.end_cut(false);
        if std::mem::take(&mut self.throttled)
            && let Err(error) = lock(&self.vmm).throttle(0)
        {
            tracing::warn!(%error, "a guest is still held back; its monitor can let it run freely, or a restart of it");
        }
    }
}

impl Drop for EmbeddedGuest {
    fn drop(&mut self) {
        self.detach();
    }
}

/// How far a round is.
struct Pass {
    done: u64,
    total: u64,
}

impl Pass {
    fn did(&mut self, units: u64, sink: &mut dyn Sink) {
        self.done += units;
        let unit = UNIT as u64;
        sink.progress(self.done * unit, self.total.max(self.done) * unit);
    }
}

/// Bytes of a piece and their digests.
struct Hasher {
    key: DigestKey,
    bytes: Vec<u8>,
    used: usize,
    digests: Vec<Digest>,
}

impl Hasher {
    fn new(key: DigestKey) -> Self {
        Self {
            key,
            bytes: vec![0; PIECE as usize * UNIT],
            used: 0,
            digests: Vec::with_capacity(PIECE as usize),
        }
    }

    /// Room for `count` (at most [`PIECE`]) units, of which `length` bytes are
    /// there to be filled; the rest are zeros.
    fn piece(&mut self, count: u64, length: u64) -> &mut [u8] {
        self.used = (count.min(PIECE) as usize) * UNIT;
        let (there, rest) = self.bytes.split_at_mut((length as usize).min(self.used));
        let past = self.used - there.len();
        if let Some(past) = rest.get_mut(..past) {
            past.fill(0);
        }
        there
    }

    /// The piece, and the digest of each unit of it.
    fn digests(&mut self) -> (&[u8], &[Digest]) {
        let bytes = self.bytes.get(..self.used).unwrap_or_default();
        digests(&self.key, bytes, &mut self.digests);
        (bytes, &self.digests)
    }
}

/// Digests of units, many at once; zeros are seen without hashing.
fn digests(key: &DigestKey, bytes: &[u8], out: &mut Vec<Digest>) {
    out.clear();
    let (units, _) = bytes.as_chunks::<UNIT>();
    for run in units.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
        if run.first().is_some_and(|unit| is_zero(unit)) {
            out.resize(out.len() + run.len(), Digest::ZERO_UNIT);
        } else {
            key.digests(run.as_flattened(), out);
        }
    }
}

/// Merges the dirty log of a block into what is owed of it, and is hot.
fn take_dirty(
    vmm: &mut dyn Vmm,
    block: usize,
    owed: &mut Owed,
    hot: &mut Hot,
) -> Result<(), GuestError> {
    let failed = match vmm.dirty(block) {
        Ok(dirty) if dirty.units() == owed.units() => {
            owed.wrote(&dirty, hot, block as VolumeIndex);
            return Ok(());
        }
        Ok(_) => changed_shape(),
        Err(error) => explain(error),
    };
    // Which pages changed is lost with the log; how hot they are is not known.
    owed.owe(&Bitmap::all(owed.units()));
    Err(failed)
}

fn volumes(vmm: &dyn Vmm) -> Result<Vec<Volume>, GuestError> {
    let ram = vmm.ram().iter().map(|block| Volume {
        name: block.name.clone(),
        kind: VolumeKind::Ram,
        bytes: block.bytes,
    });
    let disks = vmm.disks().iter().map(|disk| Volume {
        name: disk.name().to_owned(),
        kind: VolumeKind::Disk,
        bytes: disk.bytes(),
    });
    let state = Volume {
        name: "device-state".to_owned(),
        kind: VolumeKind::DeviceState,
        bytes: 0,
    };
    let volumes: Vec<_> = ram.chain(disks).chain([state]).collect();
    if volumes.len() > usize::from(VolumeIndex::MAX) {
        return Err(GuestError::State(format!(
            "a guest of {} blocks of memory and disks cannot be protected; {} are the most",
            volumes.len() - 1,
            VolumeIndex::MAX - 1
        )));
    }
    for (index, volume) in volumes.iter().enumerate() {
        let unfit = |why: &str| {
            Err(GuestError::State(format!(
                "'{}' {why}; mend what its monitor tells of it",
                volume.name
            )))
        };
        if volume.kind == VolumeKind::Ram && volume.bytes % UNIT as u64 != 0 {
            return unfit("is no whole number of 4 KiB pages");
        }
        if volumes.iter().take(index).any(|v| v.name == volume.name) {
            return unfit("is the name of two volumes");
        }
    }
    Ok(volumes)
}

fn lock(vmm: &SharedVmm) -> MutexGuard<'_, dyn Vmm + 'static> {
    crate::work::lock(vmm)
}

fn explain(error: VmmError) -> GuestError {
    match error {
        VmmError::Ended(why) => GuestError::Gone(why),
        other => other.into(),
    }
}

fn changed_shape() -> GuestError {
    GuestError::State(
        "the guest's monitor tells of other memory or disks than when protection began; protect the guest anew"
            .to_owned(),
    )
}
