//! The sim guest: memory and two disks that it changes by itself.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use farhaven::guest::sim::{SimBuilder, SimGuest, SimOptions, Workload};

use crate::embedded::{Embedded, console};
use crate::subject::{PATIENCE, Work};

fn start() -> Option<Embedded> {
    let dir = tempfile::Builder::new().prefix("fh").tempdir().unwrap();
    let run = dir.path().join("run");
    let (vmm, definition) = SimGuest::start(SimOptions {
        seed: 20_261_123,
        ram_bytes: 32 << 20,
        // The last unit of the second is no whole one.
        disks: vec![
            ("root".to_owned(), 16 << 20),
            ("data".to_owned(), (12 << 20) + 512),
        ],
        workload: Workload::Database(500),
        run: run.clone(),
        ram: dir.path().join("sim.ram"),
    })
    .expect("starts");
    let console = console(&run);
    console.await_beat(2, PATIENCE);
    Some(Embedded {
        vmm,
        definition,
        builder: Arc::new(SimBuilder),
        console,
        _dir: dir,
        some: Work {
            memory: 60,
            disk: 20,
        },
        calls: Arc::new(AtomicI64::new(i64::MAX)),
        stuck: Arc::default(),
        // Only the guest knows, when it checks itself elsewhere.
        judge: |_| {},
    })
}

conforms!(start);
