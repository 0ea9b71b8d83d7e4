//! Who builds counting guests at the peer.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use farhaven::activate::hydrate::Hydration;
use farhaven::activate::machine::{BuildPlan, Builder, Machine, MachineError};
use farhaven::activate::nbd::BlockSource;
use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::embedded::{Definition, SharedVmm, Vmm};
use farhaven::guest::qemu::check::Finding;

use super::Counter;

/// Builds it at the peer, and keeps hold of what it built.
#[derive(Default, Clone)]
pub struct CounterBuilder {
    pub built: Arc<Mutex<Vec<Arc<Mutex<Counter>>>>>,
    /// Its guests may reach others, whatever is asked.
    pub reaches_out: bool,
    /// So many guests that it builds from here on do not start.
    pub bad_starts: Arc<Mutex<u32>>,
    /// See [`CounterBuilder::when_built`].
    pub next: Arc<Mutex<Option<Next>>>,
}

/// Something to be done once.
pub type Next = Box<dyn FnOnce() + Send>;

impl CounterBuilder {
    /// The newest that it built.
    pub fn newest(&self) -> Arc<Mutex<Counter>> {
        self.built.lock().unwrap().last().cloned().unwrap()
    }

    /// Has this done as soon as it has built another, before that can start.
    pub fn when_built(&self, then: impl FnOnce() + Send + 'static) {
        *self.next.lock().unwrap() = Some(Box::new(then));
    }
}

struct CounterMachine {
    counter: Arc<Mutex<Counter>>,
    disk: Arc<TrackedDisk>,
}

impl Builder for CounterBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        assert!(!(plan.isolated && self.reaches_out));
        let failed = |e: std::io::Error| MachineError::Other(e.to_string());
        let image: PathBuf = plan.run.join("disk.img");
        let disk = TrackedDisk::above("disk", &image, plan.disks[0].clone()).map_err(failed)?;
        let mut counter = Counter::new(&plan.ram[0], disk.clone(), false);
        counter.run.clone_from(&plan.run);
        let mut bad_starts = self.bad_starts.lock().unwrap();
        if *bad_starts > 0 {
            *bad_starts -= 1;
            counter.fail(0, u32::MAX);
        }
        drop(bad_starts);
        let counter = Arc::new(Mutex::new(counter));
        self.built.lock().unwrap().push(counter.clone());
        let next = self.next.lock().unwrap().take();
        if let Some(then) = next {
            then();
        }
        Ok(Box::new(CounterMachine { counter, disk }))
    }

    fn can_isolate(&self) -> bool {
        !self.reaches_out
    }

    fn check(&self, definition: &Definition) -> Vec<Finding> {
        if definition.config == b"counts" {
            return Vec::new();
        }
        vec![Finding::blocks(
            "peer-counter",
            "it cannot count",
            "teach it",
        )]
    }
}

impl Machine for CounterMachine {
    fn serve(&mut self, disks: Vec<Arc<dyn BlockSource>>) -> Result<(), MachineError> {
        for below in disks {
            let replaced = self.disk.replace_below(below);
            replaced.map_err(|e| MachineError::Other(e.to_string()))?;
        }
        Ok(())
    }

    fn restore(&mut self, device_state: &[u8]) -> Result<(), MachineError> {
        let state = device_state.try_into();
        let state = state.map_err(|_| MachineError::Other("no number".to_owned()))?;
        self.counter.lock().unwrap().shared.inner.lock().unwrap().n = u64::from_le_bytes(state);
        Ok(())
    }

    fn run(&mut self) -> Result<(), MachineError> {
        Ok(self.counter.lock().unwrap().resume()?)
    }

    fn announce(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn hydrate(&mut self, bytes_per_second: u64) -> Result<(), MachineError> {
        let begun = self.disk.hydrate(bytes_per_second);
        begun.map_err(|e| MachineError::Other(e.to_string()))
    }

    fn hydration(&mut self) -> Result<Vec<Hydration>, MachineError> {
        Ok(vec![self.disk.hydration()])
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(self.counter.lock().unwrap().pause()?)
    }

    fn is_running(&mut self) -> Result<bool, MachineError> {
        Ok(self.counter.lock().unwrap().running() == Some(true))
    }

    fn kill(self: Box<Self>) {
        self.counter.lock().unwrap().end();
        self.disk.end();
    }

    fn vmm(&self) -> Option<SharedVmm> {
        Some(self.counter.clone())
    }
}
