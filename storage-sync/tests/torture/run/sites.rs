//! From where in the store's own code the disk is called: by file and line, as far
//! as the debug information tells.

use std::backtrace::Backtrace;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use farhaven_storage_sync::disk::simulated::SimulatedDisk;

/// Call sites: what is called, and where.
#[derive(Debug, Clone, Default)]
pub struct Sites(Arc<Mutex<BTreeSet<String>>>);

impl Sites {
    /// Notes the sites of all calls to this disk, or only of those that fail.
    pub fn watch(&self, disk: &SimulatedDisk, failing: bool) {
        let sites = self.0.clone();
        disk.listen(move |what, fails| {
            if fails || !failing {
                let site = format!("{what} at {}", caller(&Backtrace::force_capture()));
                sites.lock().unwrap().insert(site);
            }
        });
    }

    /// As many as were noted.
    pub fn count(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    /// Adds another's.
    pub fn add(&self, other: &Sites) {
        let more = other.0.lock().unwrap().clone();
        self.0.lock().unwrap().extend(more);
    }

    /// Those that another lacks.
    pub fn without(&self, other: &Sites) -> Vec<String> {
        let other = other.0.lock().unwrap();
        let mine = self.0.lock().unwrap();
        mine.difference(&other).cloned().collect()
    }
}

/// The innermost place outside of the seam and of what the store wraps it in.
fn caller(trace: &Backtrace) -> String {
    let text = trace.to_string();
    let places = text.lines().filter_map(|line| {
        let (_, place) = line
            .trim()
            .strip_prefix("at ")?
            .split_once("storage-sync/src/")?;
        // Without the column.
        let (place, _) = place.rsplit_once(':')?;
        let wraps = ["disk.rs", "disk/", "files.rs"];
        (!wraps.iter().any(|of| place.starts_with(of))).then(|| place.to_owned())
    });
    places.into_iter().next().unwrap_or_else(|| "?".to_owned())
}
