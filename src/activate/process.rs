//! The process of a QEMU that we launched, found again by its pid file.

use std::fs;
use std::path::{Path, PathBuf};

use crate::guest::qemu::instantiate::Placement;

/// The process that was launched for this placement, if it still lives.
pub(super) fn left_running(placement: &Placement) -> Option<u32> {
    let text = fs::read_to_string(pid_path(&placement.run)).ok()?;
    let pid = text.trim().parse().ok()?;
    (is_alive(pid) && runs_with(pid, &placement.qmp)).then_some(pid)
}

/// Where its pid is noted.
pub(super) fn pid_path(run: &Path) -> PathBuf {
    run.join("qemu.pid")
}

/// Lives and is no zombie.
pub(super) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Does this process's command line name that QMP socket? A pid may have been given to another.
pub(super) fn runs_with(pid: u32, qmp: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let path = qmp.as_os_str().as_encoded_bytes();
    !path.is_empty() && line.windows(path.len()).any(|window| window == path)
}
