//! Points that somebody gave a name: no prune drops them.
//!
//! The name lies beside the point's manifest, in a small file of its own, so
//! that it outlives every catalogue. A file that is damaged keeps its point,
//! too: nobody knows its name then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Inner, Store, held};
use crate::disk::Disk;
use crate::files::{FileError, Unplaced, put_whole, read_front, sync_dir};
use crate::limits::{KEPT_NAME, KEPT_POINTS};
use crate::manifest;
use crate::unit::GuestId;

const MAGIC: [u8; 4] = *b"FHkp";
const VERSION: u16 = 1;
const FIXED: usize = 8;
const SUM: usize = 16;

/// What a kept point is called whose name is damaged.
pub const NAME_LOST: &str = "(its name is damaged)";

/// Why a point was not kept or released.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// A name that cannot be used.
    #[error(
        "a point's name has 1 to {KEPT_NAME} bytes, no control characters and no blanks at its ends, and is no number"
    )]
    Name,
    /// Another point has it.
    #[error("point {0} is kept under that name; release it first, or choose another name")]
    Taken(u64),
    /// Too many.
    #[error("{KEPT_POINTS} points of this guest are kept already; release some first")]
    TooMany,
    /// No such point, or none that is kept.
    #[error("there is no such point")]
    NoPoint,
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<Unplaced> for KeepError {
    fn from(unplaced: Unplaced) -> KeepError {
        KeepError::File(unplaced.into())
    }
}

fn path_of(manifests: &Path, guest: GuestId, point: u64) -> PathBuf {
    manifest::path_of(manifests, guest, point).with_extension("kept")
}

fn encode(name: &str) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
    bytes.extend_from_slice(name.as_bytes());
    let sum = *blake3::hash(&bytes).as_bytes();
    bytes.extend_from_slice(&sum[..SUM]);
    bytes
}

fn decode(bytes: &[u8]) -> Option<String> {
    let (rest, sum) = bytes.split_at_checked(bytes.len().checked_sub(SUM)?)?;
    let name = rest.get(FIXED..)?;
    let fits = rest[..4] == MAGIC
        && rest[4..6] == VERSION.to_le_bytes()
        && usize::from(u16::from_le_bytes([rest[6], rest[7]])) == name.len()
        && blake3::hash(rest).as_bytes()[..SUM] == *sum;
    let name = std::str::from_utf8(name).ok().filter(|_| fits)?;
    is_name(name).then(|| name.to_owned())
}

fn is_name(name: &str) -> bool {
    (1..=KEPT_NAME).contains(&name.len())
        && name.trim() == name
        && !name.contains(char::is_control)
        // A point is told by name or by number.
        && name.parse::<u64>().is_err()
}

/// The name in a file that keeps a point; else why it is not known.
fn look_at(disk: &dyn Disk, path: &Path) -> Result<String, String> {
    let most = (FIXED + KEPT_NAME + SUM + 1) as u64;
    let bytes = read_front(disk, path, most).map_err(|error| error.to_string())?;
    decode(&bytes).ok_or_else(|| "it is damaged".to_owned())
}

/// The name in a file that keeps a point.
pub(super) fn read(disk: &dyn Disk, path: &Path) -> String {
    look_at(disk, path).unwrap_or_else(|why| {
        tracing::error!(path = %path.display(), why, "the name of a kept point cannot be read; the point stays kept");
        NAME_LOST.to_owned()
    })
}

impl Store {
    /// Gives a point a name, durably: no prune drops it until it is released.
    /// A kept point gets the new name.
    ///
    /// # Errors
    /// See [`KeepError`].
    pub fn keep_point(&self, guest: GuestId, point: u64, name: &str) -> Result<(), KeepError> {
        let inner = &self.0;
        if !is_name(name) {
            return Err(KeepError::Name);
        }
        // A prune that is under way must not drop it between the two.
        let _writing = held(&inner.writing);
        {
            let state = held(&inner.state);
            let known = state.guests.get(&guest);
            let known = known.filter(|known| known.points.contains_key(&point));
            let kept = &known.ok_or(KeepError::NoPoint)?.kept;
            let other = kept
                .iter()
                .find(|(other, of)| **other != point && *of == name);
            if let Some((other, _)) = other {
                return Err(KeepError::Taken(*other));
            }
            if kept.len() >= KEPT_POINTS && !kept.contains_key(&point) {
                return Err(KeepError::TooMany);
            }
        }
        let path = path_of(&inner.manifests, guest, point);
        put_whole(&*inner.disk, &path, &[&encode(name)])?;
        if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
            state.kept.insert(point, name.to_owned());
        }
        Ok(())
    }

    /// A kept point has no name any more, and stays as long as any other.
    ///
    /// # Errors
    /// When it is not kept, or a file operation fails: then it may be kept still.
    pub fn release_point(&self, guest: GuestId, point: u64) -> Result<(), KeepError> {
        let inner = &self.0;
        let _writing = held(&inner.writing);
        if !inner.is_kept(guest, point) {
            return Err(KeepError::NoPoint);
        }
        let path = path_of(&inner.manifests, guest, point);
        let directory = inner.manifests.join(guest.to_string());
        match inner.disk.remove(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(FileError::at("remove", &path)(error).into());
            }
            _ => {}
        }
        sync_dir(&*inner.disk, &directory)?;
        if let Some(state) = held(&inner.state).guests.get_mut(&guest) {
            state.kept.remove(&point);
        }
        Ok(())
    }

    /// The kept points of a guest, with their names.
    pub fn kept(&self, guest: GuestId) -> BTreeMap<u64, String> {
        let state = held(&self.0.state);
        let known = state.guests.get(&guest);
        known.map(|known| known.kept.clone()).unwrap_or_default()
    }
}

impl Inner {
    /// Reads the name of a point that is kept; where it is not as it was, in which file
    /// and why.
    pub(super) fn look_at_name(
        &self,
        guest: GuestId,
        point: u64,
    ) -> Option<Result<(), (PathBuf, String)>> {
        let known = {
            let state = held(&self.state);
            state.guests.get(&guest)?.kept.get(&point)?.clone()
        };
        let path = path_of(&self.manifests, guest, point);
        let why = match look_at(&*self.disk, &path) {
            Ok(name) if name == known => return Some(Ok(())),
            Ok(_) => "it is not the name that was read when the store was opened".to_owned(),
            Err(why) => why,
        };
        Some(Err((
            path,
            format!(
                "the name of kept point {point} is lost ({why}); the point stays kept, give it a name again: farhaven point keep"
            ),
        )))
    }

    fn is_kept(&self, guest: GuestId, point: u64) -> bool {
        let state = held(&self.state);
        let known = state.guests.get(&guest);
        known.is_some_and(|known| known.kept.contains_key(&point))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_page() {
        let bytes = encode("golden");
        assert_eq!(bytes[..14], *b"FHkp\x01\0\x06\0golden");
        assert_eq!(bytes.len(), 30);
        assert_eq!(decode(&bytes).as_deref(), Some("golden"));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x20;
            assert_eq!(decode(&flipped), None, "byte {at}");
            assert_eq!(decode(&bytes[..at]), None);
        }
        for name in ["", " x", "x ", "a\nb", "4711", &"x".repeat(KEPT_NAME + 1)] {
            assert!(!is_name(name), "{name:?}");
        }
        assert!(is_name("before upgrade to 7.2"));
    }
}
