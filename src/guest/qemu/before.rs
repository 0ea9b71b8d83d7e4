//! What QEMU's migrations were set to before Farhaven was attached: kept beside its
//! marks until a detach puts it back, whichever daemon makes that.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::GuestError;
use super::qmp::Qmp;

/// In the work directory, from the first attach to the detach.
pub(super) const FILE: &str = "migration-before.json";

/// Most bytes of that file.
const LONGEST: u64 = 64 << 10;

/// What QEMU had before; put back by a detach.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    /// Of this process: one that was launched since has settings of its own.
    process: Option<(u32, String)>,
    /// Those that were changed, with what they were.
    capabilities: BTreeMap<String, bool>,
    /// Bytes a second.
    bandwidth: Option<u64>,
}

impl Before {
    /// What an earlier attach to this process found, where that was not put back.
    pub(super) fn of(process: Option<&(u32, String)>, work_dir: &Path) -> Self {
        let fresh = Self {
            process: process.cloned(),
            ..Self::default()
        };
        let path = work_dir.join(FILE);
        if std::fs::metadata(&path).map_or(true, |file| file.len() > LONGEST) {
            return fresh;
        }
        let read = std::fs::read(&path).ok();
        let kept = read.and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        match kept {
            Some(kept) if process.is_some() && kept.process == fresh.process => kept,
            _ => fresh,
        }
    }

    /// These are about to be changed from what is told here; what an earlier attach
    /// had found stays. It is written down before anything changes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn changes(
        &mut self,
        capabilities: &[(String, bool)],
        bandwidth: Option<u64>,
        work_dir: &Path,
    ) -> Result<(), GuestError> {
        for (name, was) in capabilities {
            self.capabilities.entry(name.clone()).or_insert(*was);
        }
        self.bandwidth = self.bandwidth.or(bandwidth);
        let path = work_dir.join(FILE);
        // Whole or not at all, whenever this daemon ends.
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec(self).map_err(std::io::Error::from);
        let written = bytes.and_then(|bytes| std::fs::write(&new, bytes));
        let written = written.and_then(|()| std::fs::rename(&new, &path));
        written.map_err(|source| GuestError::Io {
            what: format!("writing {}", path.display()),
            source,
        })
    }

    /// Puts it back. Best effort: the guest may be gone.
    pub(super) fn put_back(&self, qmp: &mut Qmp, work_dir: &Path) {
        let capabilities: Vec<_> = self.capabilities.clone().into_iter().collect();
        let _ = set(qmp, &capabilities);
        if let Some(bandwidth) = self.bandwidth {
            let _ = qmp.execute(
                "migrate-set-parameters",
                json!({"max-bandwidth": bandwidth}),
            );
        }
        let _ = std::fs::remove_file(work_dir.join(FILE));
    }
}

/// Sets migration capabilities.
///
/// # Errors
/// When QEMU refuses one.
pub(super) fn set(qmp: &mut Qmp, capabilities: &[(String, bool)]) -> Result<(), GuestError> {
    if !capabilities.is_empty() {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        qmp.execute("migrate-set-capabilities", json!({"capabilities": list}))?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use super::*;

    #[test]
    fn what_the_first_attach_found_stays_for_that_process_only() {
        let dir = tempfile::tempdir().unwrap();
        let process = |pid| Some((pid, "4711".to_owned()));
        let found = |name: &str, was| vec![(name.to_owned(), was)];
        let mut first = Before::of(process(1).as_ref(), dir.path());
        let changed = found("events", false);
        first.changes(&changed, Some(7), dir.path()).unwrap();
        let mut second = Before::of(process(1).as_ref(), dir.path());
        assert_eq!(second, first);
        // By then it is as Farhaven set it.
        let changed = [found("events", true), found("multifd", true)].concat();
        second.changes(&changed, Some(1 << 40), dir.path()).unwrap();
        assert_eq!(second.bandwidth, Some(7));
        assert_eq!(second.capabilities.get("events"), Some(&false));
        assert_eq!(second.capabilities.get("multifd"), Some(&true));
        assert_eq!(Before::of(process(1).as_ref(), dir.path()), second);
        for other in [process(2), None] {
            let fresh = Before::of(other.as_ref(), dir.path());
            assert_eq!((fresh.bandwidth, fresh.capabilities.len()), (None, 0));
        }
        std::fs::write(dir.path().join(FILE), "{\"process\":[1,").unwrap();
        assert_eq!(Before::of(process(1).as_ref(), dir.path()).bandwidth, None);
    }
}
