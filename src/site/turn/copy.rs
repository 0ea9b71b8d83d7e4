//! A stopped copy of a guest: read, and ended.

use std::io::ErrorKind::{ConnectionRefused, NotFound};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::Site;
use super::super::records::GuestRecord;
use crate::guest::qemu::keep_held;
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::{Guest, GuestError};

/// QEMU answers, and ends, in this time.
const PATIENCE: Duration = Duration::from_secs(10);

impl Site {
    /// Attaches to a copy that is stopped for good, and stays so whatever a
    /// daemon that died had left of a cut.
    pub(super) fn attach_copy(&self, record: &GuestRecord) -> Result<Box<dyn Guest>, GuestError> {
        if !record.definition.is_embedded() {
            keep_held(&self.run_directory(record.id))?;
        }
        let threads = crate::work::threads();
        self.attach(record, self.tracking_key.clone(), threads)
    }
}

/// Ends a stopped QEMU that nobody is attached to; one that is gone has ended.
/// A running one is left alone: it is not what it was taken for.
///
/// # Errors
/// When it runs, or does not end.
pub(super) fn end_qemu(qmp: &Path) -> Result<(), String> {
    let mut control = match Qmp::connect(qmp, PATIENCE) {
        Ok(control) => control,
        Err(QmpError::Connect { source, .. })
            if matches!(source.kind(), ConnectionRefused | NotFound) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error.to_string()),
    };
    let status = control.execute("query-status", serde_json::json!({}));
    let status = status.map_err(|e| e.to_string())?;
    if status["running"] == true {
        return Err(format!(
            "the QEMU at {} runs; it is not ended",
            qmp.display()
        ));
    }
    match control.execute("quit", serde_json::json!({})) {
        Ok(_) | Err(QmpError::Closed { .. }) => {}
        Err(error) => return Err(error.to_string()),
    }
    let until = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(qmp).is_ok() {
        if Instant::now() > until {
            return Err(format!("the QEMU at {} does not end", qmp.display()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Is there a QEMU at that socket?
pub(super) fn qemu_lives(qmp: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(qmp).is_ok()
}
