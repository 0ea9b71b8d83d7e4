//! What is put into a site's directory before a run, and what it loses in one.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use base64::Engine;
use farhaven_storage_sync::disk::Disk;
use farhaven_storage_sync::disk::simulated::SimulatedDisk;
use rand::Rng;
use rand::rngs::StdRng;

/// A site's key, of the run's seed: ring draws the one that a site would make by
/// a call of the system that is not answered here, and which of two keys is
/// greater decides things. What else ring draws has the same length always.
pub fn place_identity(directory: &Path, random: &mut StdRng) {
    // PKCS#8 of an Ed25519 key: RFC 8410, section 7.
    let mut key = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
    key.extend_from_slice(&random.random::<[u8; 32]>());
    let text = base64::engine::general_purpose::STANDARD.encode(key);
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n");
    let mut private = std::fs::DirBuilder::new();
    private
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .unwrap();
    let mut options = std::fs::File::options();
    let file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(directory.join("site-key.pem"));
    file.unwrap().write_all(pem.as_bytes()).unwrap();
}

/// A deliberate fault: a disk that had said that terms were durable loses them.
pub fn forget_terms(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
}

/// The catalogue is gone, for good: its rows are in no other place in a simulation.
pub fn lose_catalogue(disk: &SimulatedDisk, directory: &Path) {
    let directory = directory.join("catalogue");
    disk.remove(&directory.join("catalogue.journal")).unwrap();
    disk.sync_dir(&directory).unwrap();
}
