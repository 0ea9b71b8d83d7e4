//! What a site's daemon holds of memory: what was allocated and not freed while it had
//! its turns. One piece of a run goes on at a time, so all of that is its own, but for what
//! its disk took, which is no memory of a daemon, and datagrams, which change hands.

use std::alloc::System;

use cap::Cap;
use farhaven_storage_sync::disk::simulated::SimulatedDisk;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// Of a daemon since its start.
pub struct Ledger {
    allocated: i64,
    /// What its disk had taken before.
    disk: i64,
}

impl Ledger {
    pub fn new(disk: &SimulatedDisk) -> Ledger {
        Ledger {
            allocated: 0,
            disk: disk.memory() as i64,
        }
    }

    /// The daemon does this.
    pub fn of<T>(&mut self, does: impl FnOnce() -> T) -> T {
        let before = MEMORY.allocated();
        let done = does();
        self.allocated += MEMORY.allocated() as i64 - before as i64;
        done
    }

    /// Bytes that it holds, with its datagrams that are on their way.
    pub fn held(&self, disk: &SimulatedDisk) -> i64 {
        self.allocated - (disk.memory() as i64 - self.disk)
    }
}
