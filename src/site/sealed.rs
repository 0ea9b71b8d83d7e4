//! When each guest's newest point was cut: what the RPO is counted from, also
//! by a daemon that has restarted and does not reach the peer yet.
//!
//! One small file a guest, replaced at each seal. It is not synced: after a
//! power failure an older time may be in it, which tells a longer RPO than is
//! true until the peer is reached, never a shorter one. The peer's word counts.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use farhaven_storage_sync::unit::GuestId;

use super::checked;

/// Bytes of a file: a time and its checksum, far below.
const LONGEST: u64 = 256;

/// Times of the newest sealed cuts.
pub(super) struct SealedTimes {
    directory: PathBuf,
    times: RwLock<BTreeMap<GuestId, SystemTime>>,
}

impl SealedTimes {
    /// Reads what is there; what cannot be read is not known.
    pub(super) fn open(directory: &Path) -> Self {
        if let Err(error) = super::files::private_directory(directory) {
            tracing::warn!(path = %directory.display(), %error, "times of points are not kept over a restart");
        }
        let mut times = BTreeMap::new();
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let guest = entry.file_name().to_str().and_then(|n| n.parse().ok());
            if let (Some(guest), Some(at)) = (guest, read(&entry.path())) {
                times.insert(guest, at);
            }
        }
        Self {
            directory: directory.to_owned(),
            times: RwLock::new(times),
        }
    }

    /// A guest's newest sealed cut, if one is known.
    pub(super) fn of(&self, guest: GuestId) -> Option<SystemTime> {
        let times = self.times.read().unwrap_or_else(PoisonError::into_inner);
        times.get(&guest).copied()
    }

    /// A point cut then is sealed.
    pub(super) fn note(&self, guest: GuestId, cut_at: SystemTime) {
        let mut times = self.times.write().unwrap_or_else(PoisonError::into_inner);
        if times.insert(guest, cut_at) == Some(cut_at) {
            return;
        }
        if let Err(error) = self.keep(guest, cut_at) {
            // Only a restart without the peer would miss it.
            tracing::debug!(%guest, %error, "the time of the newest point is not kept");
        }
    }

    /// As [`SealedTimes::note`], durable when it returns; blocks for that long.
    ///
    /// # Errors
    /// When it cannot be written: it holds until a restart then.
    pub(super) fn note_durably(&self, guest: GuestId, at: SystemTime) -> io::Result<()> {
        let mut times = self.times.write().unwrap_or_else(PoisonError::into_inner);
        times.insert(guest, at);
        checked::write(&self.directory.join(guest.to_string()), &millis(at))
    }

    /// Nothing of this guest is sealed any more.
    pub(super) fn forget(&self, guest: GuestId) {
        let mut times = self.times.write().unwrap_or_else(PoisonError::into_inner);
        times.remove(&guest);
        let _ = fs::remove_file(self.directory.join(guest.to_string()));
    }

    fn keep(&self, guest: GuestId, cut_at: SystemTime) -> io::Result<()> {
        let path = self.directory.join(guest.to_string());
        let fresh = path.with_extension("new");
        fs::write(&fresh, checked::text(&millis(cut_at))?)?;
        fs::rename(fresh, path)
    }
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn read(path: &Path) -> Option<SystemTime> {
    let millis = checked::read(path, LONGEST).ok()?;
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis))?;
    // A clock that was set back would tell of a point in the future.
    (at <= SystemTime::now()).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_outlive_a_restart_and_damage_is_not_believed() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = dir.path().join("sealed");
        let guests: Vec<GuestId> = (0..4).map(|_| GuestId::random()).collect();
        let cut = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let sealed = SealedTimes::open(&at);
        for guest in &guests {
            sealed.note(*guest, cut);
        }
        sealed.forget(guests[1]);
        fs::write(at.join(guests[2].to_string()), "170000").expect("written");
        let future = checked::text(&99_999_999_999_999_u64).expect("plain data");
        fs::write(at.join(guests[3].to_string()), future).expect("written");
        let again = SealedTimes::open(&at);
        assert_eq!(again.of(guests[0]), Some(cut));
        for guest in &guests[1..] {
            assert_eq!(again.of(*guest), None);
        }
    }
}
