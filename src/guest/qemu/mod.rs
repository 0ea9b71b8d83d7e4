//! QEMU guests, attached through their QMP socket.
//!
//! [`QemuGuest`] reads RAM from the shared RAM files by content (`scan`), disks
//! through QEMU's own NBD server by dirty bitmap (`disk`, `tracking`,
//! `nbd_client`), device state from a refused migration (`stream`), and joins
//! them to one instant (`cut`). What an earlier session left is cleared at the
//! attach (`attach`).

use std::path::PathBuf;
use std::time::Duration;

use farhaven_storage_sync::unit::{Digest, Volume, VolumeIndex};
use serde_json::json;

use super::gate::CutGate;
use super::hot::Hot;
use super::{After, Cut, Guest, GuestError, Sink};
pub(crate) use attach::keep_held;
use attach::{CUT_MARK, HELD_MARK};
pub use attach_options::AttachOptions;
use before::Before;
use disk::{Disk, View};
use qmp::Qmp;
use quiesce::Quiesce;
use scan::{Look, RamBlock};
use throttle::{THROTTLE_MARK, Throttle};
use tracking::Bits;

pub mod agent;
pub(crate) mod allocated;
mod attach;
mod attach_options;
mod before;
pub mod check;
mod cut;
pub mod definition;
mod disk;
pub mod facts;
mod fleece;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod instantiate;
mod isolate;
mod lost;
mod mapping;
pub mod nbd_client;
mod nbd_wire;
pub mod network;
pub mod options;
pub mod peer;
pub mod qmp;
mod quiesce;
mod scan;
mod shutdown;
mod sieve;
mod stop;
mod stream;
mod template;
mod throttle;
mod tracking;
mod unfit;
pub(super) mod units;

/// Most cuts whose RAM is remembered apart while they wait to be sealed.
const UNSEALED: usize = 32;

/// A running QEMU under protection. Dropping it leaves the dirty bitmaps, so
/// that the next attach knows what changed; [`Guest::detach`] removes them.
pub struct QemuGuest {
    options: AttachOptions,
    qmp: Qmp,
    /// QEMU's process and when it started: a process id alone may be used again.
    process: Option<(u32, String)>,
    work_dir: PathBuf,
    before: Before,
    volumes: Vec<Volume>,
    ram: Vec<(String, RamBlock)>,
    disks: Vec<Disk>,
    /// What a round leaves to the cut.
    hot: Hot,
    view: View,
    /// Units of each RAM block handed over since the last cut.
    recent: Vec<Bits>,
    /// Units handed over in the cut under way, or the last one.
    cut_handed: Vec<Bits>,
    /// Units that went with cuts which are not sealed yet.
    unsealed: Vec<(u64, Vec<Bits>)>,
    outstanding: Option<cut::Outstanding>,
    throttle: Option<Throttle>,
    quiesce: Quiesce,
    newest_sealed: Option<u64>,
    given_back: bool,
    must_sweep: bool,
    detached: bool,
}

impl QemuGuest {
    /// The control socket, for queries beside protection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Makes up for what could not be done earlier: the end of a cut, the
    /// bitmaps of sealed points, what was given back.
    fn settle(&mut self) -> Result<(), GuestError> {
        self.end_cut(false)?;
        if self.must_sweep {
            attach::sweep(&mut self.qmp, &self.work_dir)?;
            self.must_sweep = false;
        }
        if let Some(point) = self.newest_sealed.take() {
            for disk in &mut self.disks {
                if disk.chain.sealed(&mut self.qmp, point)? {
                    disk.establish();
                }
                disk.lost.sealed(point);
            }
        }
        if self.given_back {
            for disk in &mut self.disks {
                disk.chain.collapse(&mut self.qmp)?;
                disk.lost.give_back();
                if !disk.established {
                    disk.next = 0;
                }
            }
            self.given_back = false;
        }
        for disk in &mut self.disks {
            disk.chain.shorten(&mut self.qmp)?;
        }
        Ok(())
    }

    fn begin_tracking(&mut self) -> Result<(), GuestError> {
        fleece::begin_tracking(&mut self.qmp, &mut self.disks)
    }

    /// The RAM handed over since the last cut, and in it, is of this point.
    fn ram_went_with(&mut self, point: u64) {
        let mut gone = self.recent.clone();
        for ((all, recent), cut) in gone.iter_mut().zip(&mut self.recent).zip(&self.cut_handed) {
            all.add(cut);
            recent.clear();
        }
        self.unsealed.push((point, gone));
        if self.unsealed.len() > UNSEALED {
            let (_, oldest) = self.unsealed.remove(0);
            if let Some((_, next)) = self.unsealed.first_mut() {
                for (next, oldest) in next.iter_mut().zip(&oldest) {
                    next.add(oldest);
                }
            }
        }
    }

    fn process_lives(&self) -> bool {
        throttle::lives(self.process.as_ref())
    }
}

impl Guest for QemuGuest {
    fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    fn baseline(
        &mut self,
        point: u64,
        volume: VolumeIndex,
        digests: Vec<Digest>,
    ) -> Result<(), GuestError> {
        let index = usize::from(volume);
        if let Some((_, block)) = self.ram.get_mut(index) {
            return block.know(digests);
        }
        let Some(disk) = self.disks.iter_mut().find(|d| d.volume == volume) else {
            return Ok(());
        };
        if digests.len() as u64 != disk.units() {
            return Err(GuestError::State(format!(
                "the peer knows {} units of disk '{}', but it has {}; protect the guest anew",
                digests.len(),
                disk.node,
                disk.units()
            )));
        }
        let nodes = tracking::nodes(&mut self.qmp)?;
        let present = nodes
            .iter()
            .find(|n| n.name == disk.node)
            .map(|n| n.bitmaps.as_slice());
        if disk
            .chain
            .adopt(&mut self.qmp, present.unwrap_or_default(), point)?
        {
            disk.establish();
        } else {
            disk.next = 0;
            disk.compare = Some(std::sync::Arc::new(digests));
        }
        Ok(())
    }

    /// The first time, whole disks, then RAM; later RAM alone: what changes on
    /// disks is in the bitmaps, and is read once, from the instant of a cut.
    fn round(&mut self, sink: &mut dyn Sink) -> Result<(), GuestError> {
        self.settle().map_err(|e| self.explain(e))?;
        self.begin_tracking().map_err(|e| self.explain(e))?;
        for disk in &mut self.disks {
            if disk.next == disk.units() {
                continue;
            }
            let mut reader = disk.open(&mut self.qmp, &disk.node.clone(), None, &self.view)?;
            self.must_sweep = true;
            let compare = disk.compare.clone();
            let copied = reader.copy(&mut disk.next, compare.as_ref().map(|c| c.as_slice()), sink);
            let swept = attach::sweep(&mut self.qmp, &self.work_dir);
            copied?;
            swept?;
            self.must_sweep = false;
        }
        self.hot.begin();
        for ((_, block), recent) in self.ram.iter_mut().zip(&mut self.recent) {
            let look = (Look::Round, &mut self.hot);
            let scanned = block.scan(&self.view.hasher, self.options.scan_threads, look, sink);
            recent.add(&block.handed);
            scanned?;
        }
        self.hot.end();
        Ok(())
    }

    fn leave_to_the_cut(&mut self, leave: bool) {
        self.hot.leave(leave);
    }

    fn rounds_read_disks(&self) -> bool {
        false
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
        let made = self.make_cut(point, after, gate, sink);
        if after == After::Continue || made.is_err() {
            // However it ended, it ended: nothing stays frozen for it.
            self.quiesce.thaw();
        }
        if let Some(throttle) = &self.throttle
            && (after == After::Continue || made.is_err())
        {
            throttle.go_on();
        }
        made.map_err(|e| self.explain(e))
    }

    fn quiesce_cuts(&mut self, within: Option<Duration>) {
        self.quiesce.within = within;
    }

    fn shut_down(
        &mut self,
        within: Duration,
        hard: bool,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, GuestError> {
        self.shut_down_within(within, hard, wanted)
            .map_err(|e| self.explain(e))
    }

    fn ask_agent(&mut self, within: Duration) -> Result<(), String> {
        self.quiesce.ask(within)
    }

    fn finish_cut(&mut self, cut: Cut, shipped: bool) -> Result<(), GuestError> {
        drop(cut);
        self.end_cut(shipped).map_err(|e| self.explain(e))
    }

    fn sealed(&mut self, point: u64) {
        self.unsealed.retain(|(p, _)| *p > point);
        self.newest_sealed = self.newest_sealed.max(Some(point));
        if self.outstanding.is_none()
            && let Err(error) = self.settle()
        {
            tracing::warn!(%error, guest = %self.options.name, "clearing up after a sealed point is put off");
        }
    }

    fn give_back(&mut self) {
        for (index, (_, block)) in self.ram.iter_mut().enumerate() {
            let unsealed = self.unsealed.iter().filter_map(|(_, bits)| bits.get(index));
            for bits in unsealed.chain(self.recent.get(index)) {
                block.forget(bits);
            }
        }
        self.unsealed.clear();
        for bits in &mut self.recent {
            bits.clear();
        }
        self.given_back = true;
    }

    fn lost_at_peer(&mut self, volume: VolumeIndex, unit: u64, count: u64) {
        let units = unit..unit.saturating_add(count);
        if let Some((_, block)) = self.ram.get_mut(usize::from(volume)) {
            block.lost(units);
        } else if let Some(disk) = self.disks.iter_mut().find(|d| d.volume == volume) {
            let end = units.end.min(disk.units());
            disk.lost.add(units.start..end);
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // A connection that broke meanwhile must not keep the guest stopped.
        if !matches!(attach::status(&mut self.qmp).as_deref(), Ok("running")) {
            // A guest with its memory goes on where it stood, and by any connection.
            if self.options.disk_only {
                self.boot_again()?;
            }
            self.go_on()?;
        }
        for mark in [HELD_MARK, CUT_MARK] {
            let _ = std::fs::remove_file(self.work_dir.join(mark));
        }
        self.quiesce.thaw();
        if let Some(throttle) = &self.throttle {
            throttle.go_on();
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        self.throttle = None;
        self.mark(HELD_MARK, 0, true)?;
        self.qmp
            .execute("stop", json!({}))
            .map_err(|e| self.explain(e.into()))?;
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), GuestError> {
        self.outstanding = None;
        self.throttle = None;
        match self.qmp.execute("quit", json!({})) {
            Ok(_) | Err(qmp::QmpError::Closed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while self.process.is_some() && self.process_lives() && std::time::Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.detached = true;
        for name in [
            "nbd.sock",
            "state.sock",
            CUT_MARK,
            HELD_MARK,
            THROTTLE_MARK,
            before::FILE,
        ] {
            let _ = std::fs::remove_file(self.work_dir.join(name));
        }
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        if percent == 0 {
            self.throttle = None;
            return Ok(());
        }
        attach::status(&mut self.qmp).map_err(|e| self.explain(e))?;
        match &self.throttle {
            Some(throttle) => throttle.set(percent),
            None => {
                let (qmp, process) = (self.qmp.clone(), self.process.clone());
                let throttle = Throttle::begin(percent, qmp, &self.work_dir, process)?;
                self.throttle = Some(throttle);
            }
        }
        Ok(())
    }

    fn running(&mut self) -> Option<bool> {
        let mut qmp = self.qmp.clone();
        let mut runs = move |stands: bool| {
            attach::status(&mut qmp).map(|status| status == "running" || stands)
        };
        let mut ask = || match &self.throttle {
            // A guest that stands for its throttle runs, slowly.
            Some(throttle) => throttle.look(&mut runs),
            None => runs(false),
        };
        match ask() {
            Ok(runs) => Some(runs),
            Err(_) if !self.process_lives() => None,
            // The socket broke, the process lives: ask over a new one.
            Err(_) => {
                let mut qmp = self.qmp.clone();
                qmp.reconnect(self.options.qmp_timeout).ok()?;
                ask().ok()
            }
        }
    }

    fn detach(&mut self) {
        self.outstanding = None;
        self.throttle = None;
        let swept = attach::sweep(&mut self.qmp, &self.work_dir);
        let removed = (|| {
            for disk in &mut self.disks {
                let nodes = tracking::nodes(&mut self.qmp)?;
                let node = nodes.iter().find(|n| n.name == disk.node);
                let present = node.map(|n| n.bitmaps.as_slice()).unwrap_or_default();
                disk.chain.adopt(&mut self.qmp, present, u64::MAX)?;
                disk.chain.remove(&mut self.qmp)?;
            }
            Ok::<(), GuestError>(())
        })();
        if let Err(error) = swept.and(removed) {
            tracing::warn!(%error, guest = %self.options.name, "some of what protection put into QEMU stays there until the guest ends");
        }
        attach::restore(&mut self.qmp, &self.before, &self.work_dir);
        self.detached = true;
    }
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        self.throttle = None;
        if self.detached {
            return;
        }
        if !self.process_lives() {
            attach::remove_fleeces(&self.work_dir);
            for name in [
                "nbd.sock",
                "state.sock",
                CUT_MARK,
                THROTTLE_MARK,
                before::FILE,
            ] {
                let _ = std::fs::remove_file(self.work_dir.join(name));
            }
        } else if let Err(error) = self.end_cut(false).and_then(|()| match self.must_sweep {
            true => attach::sweep(&mut self.qmp, &self.work_dir),
            false => Ok(()),
        }) {
            tracing::warn!(%error, guest = %self.options.name, "a cut could not be cleared away; the next attach does it");
        }
    }
}
