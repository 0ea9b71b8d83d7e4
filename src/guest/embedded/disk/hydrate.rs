//! The copy of what lies below a disk, in the background, while its guest
//! already runs on it: piece by piece, the disk's lock held only while a piece
//! is put into the image, and only where nothing was written meanwhile.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use farhaven_storage_sync::digest::is_zero;
use farhaven_storage_sync::unit::UNIT;

use super::{TrackedDisk, parts};
use crate::activate::hydrate::{Hydration, HydrationState};

/// Bytes copied at a time.
const PIECE: u64 = 256 << 10;
/// Longest wait without a look at the rate.
const NAP: Duration = Duration::from_millis(200);

/// How far the copy is.
#[derive(Default)]
pub(super) struct Copying {
    state: Option<HydrationState>,
    done: u64,
    bytes_per_second: u64,
}

impl Copying {
    pub(super) fn begun(&self) -> bool {
        self.state.is_some()
    }
}

impl TrackedDisk {
    /// Starts to copy what lies below, at most `bytes_per_second` (0: as fast
    /// as it goes). A copy under way goes on at that rate, one that failed
    /// begins anew. It stops when the disk ends or is dropped.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn hydrate(self: &Arc<Self>, bytes_per_second: u64) -> io::Result<()> {
        let mut state = self.state();
        state.copying.bytes_per_second = bytes_per_second;
        if state.below.is_none() {
            state.copying.state = Some(HydrationState::Done);
            state.copying.done = self.bytes;
            return Ok(());
        }
        if state.copying.state == Some(HydrationState::Running) {
            return Ok(());
        }
        let disk = Arc::downgrade(self);
        crate::work::spawn_beside("hydrate", move || copy(&disk))?;
        state.copying.state = Some(HydrationState::Running);
        state.copying.done = 0;
        Ok(())
    }

    /// How far the copy is: done where nothing lies below.
    pub fn hydration(&self) -> Hydration {
        let state = self.state();
        let (done, how) = match (&state.below, &state.copying.state) {
            (None, _) => (self.bytes, HydrationState::Done),
            (Some(_), None) => (0, HydrationState::Running),
            (Some(_), Some(how)) => (state.copying.done, how.clone()),
        };
        Hydration {
            disk: self.name.clone(),
            done,
            total: self.bytes,
            state: how,
        }
    }

    /// Copies one piece from `at`; how much there was to copy.
    fn copy_piece(&self, at: u64, buffer: &mut Vec<u8>) -> io::Result<u64> {
        let end = (at + PIECE).min(self.bytes);
        let range = at..end;
        let (source, missing) = match &self.state().below {
            None => return Ok(0),
            Some(below) => (
                below.source.clone(),
                parts(&range, |unit| !below.filled.contains(unit)),
            ),
        };
        let mut copied = 0;
        for (part, wanted) in missing {
            if !wanted {
                continue;
            }
            let length = part.end - part.start;
            buffer.resize(length as usize, 0);
            let hole = matches!(source.extents(part.start, length).as_slice(),
                [(told, true), ..] if *told >= length);
            if hole {
                buffer.fill(0);
            } else {
                source.read(part.start, buffer)?;
                copied += length;
            }
            self.fill(part.start, buffer)?;
        }
        Ok(copied)
    }

    /// Puts what was read from below where nothing was written meanwhile.
    fn fill(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let soiled = state.soiled;
        let Some(below) = &mut state.below else {
            return Ok(());
        };
        for (index, content) in content.chunks(UNIT).enumerate() {
            let unit = offset / UNIT as u64 + index as u64;
            if below.filled.contains(unit) {
                continue;
            }
            // A new image is a hole everywhere.
            if soiled || !is_zero(content) {
                self.image.write_all_at(content, unit * UNIT as u64)?;
            }
            below.filled.set(unit);
        }
        Ok(())
    }
}

fn copy(disk: &Weak<TrackedDisk>) {
    let mut at = 0;
    let mut buffer = Vec::new();
    loop {
        let Some(held) = disk.upgrade() else {
            return;
        };
        let copied = held.copy_piece(at, &mut buffer);
        let mut state = held.state();
        if state.ended {
            return;
        }
        let bytes = match copied {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(disk = held.name, %error, "the copy of a disk from the store stopped; the guest goes on reading there");
                state.copying.state = Some(HydrationState::Failed(error.to_string()));
                return;
            }
        };
        at = (at + PIECE).min(held.bytes);
        state.copying.done = at;
        if at == held.bytes {
            state.copying.state = Some(HydrationState::Done);
            state.below = None;
            held.layered.store(false, Ordering::Release);
            return;
        }
        drop(state);
        drop(held);
        pace(disk, bytes);
    }
}

/// Waits as long as `bytes` take, in naps, so that a new rate is heeded soon
/// and nobody waits for a disk that is gone.
fn pace(disk: &Weak<TrackedDisk>, bytes: u64) {
    let mut left = bytes as f64;
    loop {
        let rate = match disk.upgrade() {
            Some(disk) => disk.state().copying.bytes_per_second,
            None => return,
        };
        if rate == 0 || left <= 0.0 {
            return;
        }
        let nap = Duration::from_secs_f64((left / rate as f64).min(NAP.as_secs_f64()));
        let begun = Instant::now();
        crate::work::sleep(nap);
        left -= begun.elapsed().as_secs_f64() * rate as f64;
    }
}
