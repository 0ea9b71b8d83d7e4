//! A guest's serial console as files beside it: `console.log` holds all it
//! wrote, whoever connects to `console.sock` sees what it writes from then on
//! and types into it.

use std::io;
use std::path::Path;

/// A console; ends, and removes its socket, when dropped. The log stays.
pub struct Console {}

impl Console {
    /// Makes both in a directory.
    ///
    /// # Errors
    /// When they cannot be made; a socket's path has at most 107 bytes.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let _ = directory;
        unimplemented!()
    }

    /// The guest wrote this. Never waits: a reader that does not read loses it.
    pub fn write(&self, bytes: &[u8]) {
        let _ = bytes;
        unimplemented!()
    }

    /// The next byte typed, if there is one.
    pub fn typed(&self) -> Option<u8> {
        unimplemented!()
    }
}
