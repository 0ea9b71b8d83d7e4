//! The cut: one instant of memory, device state and disks.
//!
//! While the guest runs: empty fleece images are made, a mark is left in the work
//! directory, and its agent freezes its filesystems if that is asked (`quiesce`). A
//! guest that is throttled stays so until all that can be made ready is.
//! Then, with the guest stopped, two things at once:
//!
//! - this thread scans RAM and hands changed pages to the sink;
//! - another drives QEMU: device state through a migration that is refused at
//!   its end, then one transaction that begins the next dirty bitmap of every
//!   disk, ends the last, and starts copy-before-write to the fleece.
//!
//! The scan may begin as soon as `stop` has returned: by then vCPUs stand still
//! and all block requests are drained. Saving device state does not write guest
//! memory; QEMU's own migration too sends its last RAM *before* the device
//! state, so a device that did would be lost by every migration.
//!
//! Then the guest goes on, and the disks are read from the fleeces. Whatever
//! fails after the stop, the guest is resumed first; then bitmaps and RAM table
//! are put back, so that the next cut is exact.

use std::path::Path;
use std::time::{Duration, Instant};

use farhaven_storage_sync::unit::VolumeKind;
use serde_json::json;

use super::super::gate::CutGate;
use super::super::{After, Cut, CutTimes, DiskInstant, GuestError, Quiesced, Sink};
use super::QemuGuest;
use super::attach::{CUT_MARK, HELD_MARK, idle, same_ram, status, sweep};
use super::disk::{self, Disk};
use super::fleece::{prepare_fleece, written_through};
use super::qmp::{Qmp, QmpError};
use super::scan::Look;
use super::stop::Stop;
use super::stream::Inlet;
use super::throttle::lives;
use super::tracking::transaction;

/// A cut whose disks are being read.
pub(super) struct Outstanding {
    point: u64,
}

/// What the QEMU side of the pause gave.
struct Fixed {
    device_state: Vec<u8>,
    state_took: Duration,
    disks_took: Duration,
}

impl QemuGuest {
    pub(super) fn make_cut(
        &mut self,
        point: u64,
        after: After,
        gate: &dyn CutGate,
        sink: &mut dyn Sink,
    ) -> Result<Cut, GuestError> {
        let inlet = self.get_ready(after)?;
        gate.gather()?;
        // A throttled guest runs freely from here to its stop, and writes as fast: the
        // less is between, the less is left to a move's last cut.
        if let Some(throttle) = &self.throttle {
            throttle.rest()?;
        }
        let was_running = match status(&mut self.qmp)?.as_str() {
            "running" => true,
            // Not "suspended": QEMU before 9.0 does not stop such a guest, and wakes it for
            // its device state; from then on, no more than `cont` brings it back.
            "paused" | "prelaunch" => false,
            // It has no state beside its disks, which are as it left them.
            "shutdown" if self.options.disk_only => false,
            other => {
                return Err(GuestError::State(format!(
                    "the guest is in state '{other}', of which no point can be taken; bring it back to running, or restart it"
                )));
            }
        };
        let quiesced = match was_running {
            true => {
                // A mark of an earlier hold would keep the next attach from resuming the guest.
                let _ = std::fs::remove_file(self.work_dir.join(HELD_MARK));
                self.mark(CUT_MARK, point, false)?;
                self.quiesce.freeze()
            }
            // Whether that was asked is known where it is told.
            false => Quiesced::NotAsked,
        };
        let mut times = CutTimes::default();
        let Stop { at, begun, stood } = self.stop_at(point, was_running, gate, &mut times)?;
        let fixed = stood
            .and_then(|()| self.fix(point, after, &inlet, sink, &mut times))
            .and_then(|fixed| self.stood_still().map(|()| fixed));
        drop(inlet);
        if was_running && (after == After::Continue || fixed.is_err()) {
            let went_on = self.go_on();
            times.pause += begun.elapsed();
            self.quiesce.thaw();
            if let Err(error) = went_on {
                self.undo(point);
                return Err(match fixed {
                    Err(first) => {
                        tracing::error!(error = %first, "the cut had failed before");
                        error
                    }
                    Ok(_) => error,
                });
            }
        } else {
            times.pause += begun.elapsed();
        }
        let opened = fixed.and_then(|fixed| {
            if after == After::Hold {
                self.mark(HELD_MARK, point, true)?;
                let _ = std::fs::remove_file(self.work_dir.join(CUT_MARK));
            }
            let disks = self.open_instants(after)?;
            Ok((fixed, disks))
        });
        let (fixed, disks) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                if was_running
                    && after == After::Hold
                    && !matches!(status(&mut self.qmp).as_deref(), Ok("running"))
                {
                    let _ = std::fs::remove_file(self.work_dir.join(HELD_MARK));
                    let went_on = self.go_on();
                    self.undo(point);
                    went_on?;
                } else {
                    self.undo(point);
                }
                return Err(self.explain(error));
            }
        };
        times.device_state = fixed.state_took;
        times.disks = fixed.disks_took;
        self.hot.end();
        self.ram_went_with(point);
        if let Some(volume) = self
            .volumes
            .iter_mut()
            .find(|v| v.kind == VolumeKind::DeviceState)
        {
            volume.bytes = fixed.device_state.len() as u64;
        }
        self.outstanding = Some(Outstanding { point });
        Ok(Cut {
            at,
            stopped: begun,
            times,
            device_state: fixed.device_state,
            disks,
            quiesced,
        })
    }

    /// All that a cut needs and that can be done beside a guest that runs, throttled
    /// or not. What it leaves behind is swept away with the cut, or before the next.
    fn get_ready(&mut self, after: After) -> Result<Inlet, GuestError> {
        self.settle()?;
        // A cut that is given up before it looks for any has none to take back.
        self.cut_handed.iter_mut().for_each(|bits| bits.clear());
        if !self.options.disk_only {
            idle(&mut self.qmp)?;
            // Memory may have been plugged in since the last point.
            same_ram(&mut self.qmp, &self.ram)?;
        }
        self.begin_tracking()?;
        self.must_sweep = true;
        if after == After::Continue && !self.disks.is_empty() {
            self.view.room()?;
            for disk in &self.disks {
                prepare_fleece(&mut self.qmp, disk, &self.work_dir)?;
            }
        }
        Inlet::open(&self.work_dir.join("state.sock"))
    }

    /// Everything of the instant, the guest being stopped.
    fn fix(
        &mut self,
        point: u64,
        after: After,
        inlet: &Inlet,
        sink: &mut dyn Sink,
        times: &mut CutTimes,
    ) -> Result<Fixed, GuestError> {
        while self.qmp.take_event("MIGRATION").is_some() {}
        let (qmp, disks, options) = (&mut self.qmp, &mut self.disks, &self.options);
        let (ram, handed) = (&mut self.ram, &mut self.cut_handed);
        let hot = &mut self.hot;
        hot.begin();
        let hasher = &self.view.hasher;
        std::thread::scope(|scope| {
            let qemu_side = scope.spawn(move || {
                let begun = Instant::now();
                let device_state = match options.disk_only {
                    true => Vec::new(),
                    false => save_state(qmp, inlet, options.state_limit, options.state_timeout)?,
                };
                let state_took = begun.elapsed();
                fix_disks(qmp, disks, point, after)?;
                let disks_took = begun.elapsed().saturating_sub(state_took);
                Ok::<_, GuestError>(Fixed {
                    device_state,
                    state_took,
                    disks_took,
                })
            });
            let begun = Instant::now();
            let mut scanned = Ok(());
            for ((_, block), handed) in ram.iter_mut().zip(handed) {
                let look = (Look::Cut, &mut *hot);
                let looked = block.scan(hasher, options.scan_threads, look, sink);
                handed.add(&block.handed);
                match looked {
                    Ok(bytes) => times.ram_scanned_bytes += bytes,
                    Err(error) => {
                        scanned = Err(error);
                        break;
                    }
                }
            }
            times.ram_scan = begun.elapsed();
            let fixed = qemu_side.join().unwrap_or_else(|_| {
                Err(GuestError::State(
                    "the thread that drives QEMU in a cut panicked".to_owned(),
                ))
            });
            scanned.and(fixed)
        })
    }

    /// The disks, readable as they were at the cut.
    fn open_instants(&mut self, after: After) -> Result<Vec<Box<dyn DiskInstant>>, GuestError> {
        // Looked at again: nobody holds other tools off between.
        written_through(&mut self.qmp, &self.disks, |disk| match after {
            After::Continue => disk.filter(),
            After::Hold => disk.node.clone(),
        })?;
        let mut instants: Vec<Box<dyn DiskInstant>> = Vec::with_capacity(self.disks.len());
        for disk in &self.disks {
            let node = match after {
                After::Continue => disk.fleece(),
                After::Hold => disk.node.clone(),
            };
            let bitmap = disk.chain.changed().unwrap_or_default().to_owned();
            let reader = disk.open(&mut self.qmp, &node, Some(&bitmap), &self.view)?;
            let (next, compare) = (disk.next, disk.compare.clone());
            instants.push(Box::new(disk::Instant {
                reader,
                bitmap,
                next,
                compare,
                lost: disk.lost.owed(),
            }));
        }
        Ok(instants)
    }

    pub(super) fn end_cut(&mut self, shipped: bool) -> Result<(), GuestError> {
        let Some(Outstanding { point }) = self.outstanding.take() else {
            return Ok(());
        };
        self.must_sweep = true;
        sweep(&mut self.qmp, &self.work_dir)?;
        self.must_sweep = false;
        for disk in &mut self.disks {
            if !shipped {
                if disk.chain.ends_with(point) {
                    disk.chain.undo(&mut self.qmp)?;
                }
                continue;
            }
            disk.next = disk.units();
            disk.lost.went_with(point);
        }
        Ok(())
    }

    /// A cut failed: nothing of it counts as handed over. What cannot be undone
    /// now is tried again before the next cut.
    fn undo(&mut self, point: u64) {
        for ((_, block), handed) in self.ram.iter_mut().zip(&self.cut_handed) {
            block.forget(handed);
        }
        self.outstanding = Some(Outstanding { point });
        if let Err(error) = self.end_cut(false) {
            tracing::warn!(%error, point, "a failed cut could not be cleared away yet");
            self.outstanding = Some(Outstanding { point });
        }
    }

    /// `cont`, and proof that it worked.
    pub(super) fn go_on(&mut self) -> Result<(), GuestError> {
        let process = self.process.as_ref();
        go_on(&mut self.qmp, &self.work_dir, || lives(process))
    }

    /// Leaves a mark for whoever attaches next, before the guest is stopped.
    pub(super) fn mark(&self, name: &str, point: u64, durable: bool) -> Result<(), GuestError> {
        let path = self.work_dir.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&path)?;
            std::io::Write::write_all(&mut file, format!("point {point}\n").as_bytes())?;
            if durable {
                file.sync_all()?;
                std::fs::File::open(&self.work_dir)?.sync_all()?;
            }
            Ok(())
        };
        write().map_err(|source| GuestError::Io {
            what: format!("writing {}", path.display()),
            source,
        })
    }

    /// A closed socket of a dead QEMU is told as the guest's end.
    pub(super) fn explain(&self, error: GuestError) -> GuestError {
        match error {
            GuestError::Qmp(closed @ QmpError::Closed { .. }) if !self.process_lives() => {
                GuestError::Gone(closed.to_string())
            }
            other => other,
        }
    }
}

/// `cont`, and proof that it worked.
pub(super) fn go_on(
    qmp: &mut Qmp,
    work_dir: &Path,
    lives: impl Fn() -> bool,
) -> Result<(), GuestError> {
    let mut last = match qmp.execute("cont", json!({})) {
        Ok(_) => {
            let _ = std::fs::remove_file(work_dir.join(CUT_MARK));
            return Ok(());
        }
        Err(error) => error,
    };
    // A migration that was not refused properly ends when its socket does;
    // a connection that broke is made anew.
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if !lives() {
            return Err(GuestError::Gone(format!(
                "{last}. If the guest should run, restart it, or fail it over at the peer"
            )));
        }
        if matches!(last, QmpError::Closed { .. } | QmpError::Protocol { .. })
            && let Err(error) = qmp.reconnect(Duration::from_secs(2))
        {
            tracing::warn!(%error, "no new connection to QEMU yet, with the guest stopped");
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        match qmp.execute("cont", json!({})) {
            Ok(_) => {
                let _ = std::fs::remove_file(work_dir.join(CUT_MARK));
                return Ok(());
            }
            Err(error) => last = error,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(left_stopped(qmp, &last.into()))
}

/// What to tell when a guest stays stopped.
pub(super) fn left_stopped(qmp: &Qmp, why: &GuestError) -> GuestError {
    GuestError::LeftStopped {
        why: why.to_string(),
        how: format!(
            r#"printf '{{"execute":"qmp_capabilities"}}{{"execute":"cont"}}' | socat -t2 - UNIX-CONNECT:{}"#,
            qmp.path().display()
        ),
    }
}

/// Takes the device state of the stopped guest, which stays stopped with its disks active.
fn save_state(
    qmp: &mut Qmp,
    inlet: &Inlet,
    limit: usize,
    timeout: Duration,
) -> Result<Vec<u8>, GuestError> {
    qmp.execute("migrate", json!({"uri": inlet.uri()}))?;
    let taken = inlet.receive(limit, timeout);
    // On an error the socket is closed by now, which fails the migration too.
    let ended = qmp.wait_event("MIGRATION", timeout, |data| {
        matches!(
            data["status"].as_str(),
            Some("failed" | "completed" | "cancelled")
        )
    });
    let taken = taken?;
    match ended?["data"]["status"].as_str() {
        Some("failed") => taken.finish(),
        other => Err(GuestError::State(format!(
            "QEMU ended the saving of device state with status {}; is another tool driving this guest?",
            other.unwrap_or("unknown")
        ))),
    }
}

/// One transaction over all disks: the next bitmap begins, the last ends, and
/// from here on the fleece keeps what is overwritten.
fn fix_disks(
    qmp: &mut Qmp,
    disks: &mut [Disk],
    point: u64,
    after: After,
) -> Result<(), GuestError> {
    let mut actions = Vec::new();
    for disk in disks.iter() {
        actions.extend(disk.chain.cut_actions(point));
        if after == After::Continue {
            actions.push(json!({"type": "blockdev-backup", "data": {
                "job-id": disk.job(), "device": disk.node, "target": disk.fleece(),
                "filter-node-name": disk.filter(), "sync": "none"}}));
        }
    }
    transaction(qmp, actions)?;
    for disk in disks {
        disk.chain.cut(point);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests;
