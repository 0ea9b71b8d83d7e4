//! Data at rest, and its encoding.
//!
//! On the source, changed 4 KiB units go through [`codec::Encoder`] and become
//! batches. On the peer, the same bytes are appended to the [`store::Store`],
//! sealed as recovery points, and read back as [`replica::Replica`]s.
//! `FORMAT.md` beside this crate draws every byte. Nothing here knows a
//! network, a hypervisor or a policy.
pub mod catalogue;
pub mod codec;
pub mod digest;
pub mod disk;
mod files;
pub mod floor;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod limits;
mod log;
mod manifest;
mod map;
pub mod prune;
pub mod replica;
pub mod store;
pub mod unit;

pub use files::{FileError, LockError};
pub use log::{BadRange, LogError, ScanReport};
pub use manifest::{ManifestError, PointHeader, PointStats};
pub use map::Run;
