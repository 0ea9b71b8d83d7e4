//! A disk to export, and a server to export it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use farhaven::activate::nbd::{BlockSource, NbdServer};
use rand::{Rng, SeedableRng};

/// A disk in memory: 64 KiB parts, some of them zero.
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    pub(crate) part: usize,
    pub(crate) reads: AtomicU64,
    pub(crate) broken: AtomicBool,
}

impl Disk {
    pub(crate) fn new(seed: u64, size: usize) -> Arc<Disk> {
        let part = 64 << 10;
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; size];
        for part in bytes.chunks_mut(part) {
            if random.random_bool(0.5) {
                random.fill(part);
            }
        }
        Arc::new(Disk {
            bytes,
            part,
            reads: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        })
    }
}

impl BlockSource for Disk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("segment 7 fails its checksum"));
        }
        self.reads.fetch_add(buf.len() as u64, Ordering::SeqCst);
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)> {
        let (mut at, end) = (offset as usize, (offset + length) as usize);
        let mut found = Vec::new();
        while at < end {
            let next = end.min((at / self.part + 1) * self.part);
            found.push((
                (next - at) as u64,
                self.bytes[at..next].iter().all(|byte| *byte == 0),
            ));
            at = next;
        }
        found
    }
}

pub(crate) struct Served {
    pub(crate) server: NbdServer,
    pub(crate) socket: PathBuf,
    dir: tempfile::TempDir,
}

pub(crate) fn served() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    Served {
        server: NbdServer::bind(&socket).unwrap(),
        socket,
        dir,
    }
}

impl Served {
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}
