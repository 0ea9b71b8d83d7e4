//! A disk whose writes are known: an image file with the set of what changed,
//! readable as it was at a cut while the guest writes on, and at the peer
//! filled from a recovery point while the guest already runs on it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::activate::nbd::BlockSource;

/// A guest's disk, for its device model and for the engine.
pub struct TrackedDisk {}

impl TrackedDisk {
    /// Opens an image (raw, made sparse when missing) of `bytes`.
    ///
    /// # Errors
    /// When it cannot be opened, or has another size.
    pub fn open(name: &str, image: &Path, bytes: u64) -> io::Result<Arc<Self>> {
        let _ = (name, image, bytes);
        unimplemented!()
    }

    /// A new image above `below`: what was never written nor copied reads from there.
    ///
    /// # Errors
    /// When the image cannot be made.
    pub fn above(name: &str, image: &Path, below: Arc<dyn BlockSource>) -> io::Result<Arc<Self>> {
        let _ = (name, image, below);
        unimplemented!()
    }

    /// Its name; stays, at both sites.
    pub fn name(&self) -> &str {
        unimplemented!()
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Reads at any offset, for the device model.
    ///
    /// # Errors
    /// Past the end; when the image or what is below cannot be read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let _ = (offset, into);
        unimplemented!()
    }

    /// Writes at any offset, for the device model.
    ///
    /// # Errors
    /// Past the end; when the image cannot be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let _ = (offset, bytes);
        unimplemented!()
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn flush(&self) -> io::Result<()> {
        unimplemented!()
    }
}
