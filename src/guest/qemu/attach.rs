//! Attaching to a running QEMU: is it what we are told, what did a dead daemon
//! leave, and what does QEMU need set.
//!
//! Everything of ours in a QEMU has a name that begins with `farhaven-`, so a
//! sweep finds it whatever happened before. Dirty bitmaps alone stay: they tell
//! what changed while nobody watched.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::GuestError;
use super::before::{Before, set};
use super::qmp::{Qmp, QmpError};
use super::scan::RamBlock;
use super::throttle::THROTTLE_MARK;
use super::tracking::PREFIX;

/// In the work directory while a cut has the guest stopped.
pub(super) const CUT_MARK: &str = "cut-in-progress";
/// In the work directory while a move or a fence keeps the guest stopped.
pub(super) const HELD_MARK: &str = "held";

/// Migration capabilities that must be on.
const WANTED: [&str; 3] = ["x-ignore-shared", "return-path", "events"];
/// And those that would change the stream, or act on the guest; off while we are attached.
const UNWANTED: [&str; 15] = [
    "xbzrle",
    "compress",
    "multifd",
    "postcopy-ram",
    "postcopy-preempt",
    "background-snapshot",
    "dirty-bitmaps",
    "block",
    "pause-before-switchover",
    "auto-converge",
    "x-colo",
    "mapped-ram",
    "zero-copy-send",
    "dirty-limit",
    "switchover-ack",
];

/// Runs the guest on that a dead daemon of ours had stopped, and removes what
/// else it left but bitmaps.
pub(super) fn recover(qmp: &mut Qmp, work_dir: &Path) -> Result<(), GuestError> {
    let marks = [CUT_MARK, THROTTLE_MARK].map(|name| work_dir.join(name));
    if marks.iter().any(|mark| mark.exists()) && !work_dir.join(HELD_MARK).exists() {
        // A migration to the dead daemon's socket fails by itself, but takes a moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let status = status(qmp)?;
            match status.as_str() {
                // A migration that came to its end just as the daemon died: the
                // stream went to us and nobody else, so the guest is only here.
                // `cont` takes its disks back.
                "paused" | "postmigrate" => {
                    tracing::warn!(qmp = %qmp.path().display(), "the guest was left stopped by a daemon that died in a cut, or while it throttled the guest; it is resumed");
                    match qmp.execute("cont", json!({})) {
                        Ok(_) => break,
                        Err(QmpError::Refused { .. }) if Instant::now() < deadline => {}
                        Err(error) => return Err(super::cut::left_stopped(qmp, &error.into())),
                    }
                }
                "finish-migrate" if Instant::now() < deadline => {}
                _ => break,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for mark in marks {
        let _ = std::fs::remove_file(mark);
    }
    sweep(qmp, work_dir)
}

/// Removes exports, jobs, fleeces and their files. Safe at any time at which no
/// cut is being read; what is not there is not missed.
pub(super) fn sweep(qmp: &mut Qmp, work_dir: &Path) -> Result<(), GuestError> {
    let ours = |listed: &Value, key: &str| -> Vec<String> {
        let all = listed.as_array().map(Vec::as_slice).unwrap_or_default();
        let names = all.iter().filter_map(|v| v[key].as_str());
        names
            .filter(|n| n.starts_with(PREFIX))
            .map(str::to_owned)
            .collect()
    };
    for id in ours(&qmp.execute("query-block-exports", json!({}))?, "id") {
        qmp.execute("block-export-del", json!({"id": id, "mode": "hard"}))?;
    }
    gone(qmp, "query-block-exports", |listed| {
        ours(listed, "id").is_empty()
    })?;
    for id in ours(&qmp.execute("query-jobs", json!({}))?, "id") {
        // A job that has just ended by itself is no error.
        let _ = qmp.execute("block-job-cancel", json!({"device": id, "force": true}));
        let _ = qmp.execute("job-dismiss", json!({"id": id}));
    }
    gone(qmp, "query-jobs", |listed| ours(listed, "id").is_empty())?;
    let mut nodes = ours(
        &qmp.execute("query-named-block-nodes", json!({"flat": true}))?,
        "node-name",
    );
    // The qcow2 node goes before the file it stands on: "fleece" before "file".
    nodes.sort_by_key(|n| !n.starts_with("farhaven-fleece-"));
    for name in nodes {
        qmp.execute("blockdev-del", json!({"node-name": name}))?;
    }
    remove_fleeces(work_dir);
    Ok(())
}

/// Removes the images that took overwritten disk content.
pub(super) fn remove_fleeces(work_dir: &Path) {
    let entries = std::fs::read_dir(work_dir).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with("fleece-")) {
        let _ = std::fs::remove_file(entry.path());
    }
}

/// Waits until a query's answer shows that a removal is done.
fn gone(qmp: &mut Qmp, query: &str, done: impl Fn(&Value) -> bool) -> Result<(), GuestError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done(&qmp.execute(query, json!({}))?) {
        if Instant::now() > deadline {
            return Err(GuestError::State(format!(
                "QEMU does not let go of what an earlier cut used ({query} still lists it after 10 s); it may be stuck on storage. The guest runs on"
            )));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// `query-status`.
pub(super) fn status(qmp: &mut Qmp) -> Result<String, GuestError> {
    let answer = qmp.execute("query-status", json!({}))?;
    Ok(answer["status"].as_str().unwrap_or_default().to_owned())
}

/// Are these the RAM files that QEMU has, shared, all of them, of that size?
pub(super) fn same_ram(qmp: &mut Qmp, blocks: &[(String, RamBlock)]) -> Result<(), GuestError> {
    let listed = qmp.execute("query-memdev", json!({}))?;
    let listed = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    for memory in listed {
        let id = memory["id"].as_str().unwrap_or("(unnamed)");
        let known = blocks.iter().find(|(name, _)| name == id);
        match (memory["share"].as_bool().unwrap_or(false), known) {
            (false, Some(_)) => {
                return Err(GuestError::State(format!(
                    "RAM block {id} is private to QEMU; launch the guest with share=on on its memory-backend-file"
                )));
            }
            (true, None) => {
                return Err(GuestError::State(format!(
                    "QEMU has a shared RAM block {id} that the definition does not name; run farhaven guest add again"
                )));
            }
            (true, Some((_, block))) if memory["size"].as_u64() != Some(block.bytes()) => {
                return Err(GuestError::State(format!(
                    "the file of RAM block {id} has {} bytes, QEMU has {}; run farhaven guest add again",
                    block.bytes(),
                    memory["size"]
                )));
            }
            _ => {}
        }
    }
    for (name, _) in blocks {
        if !listed.iter().any(|m| m["id"] == name.as_str()) {
            return Err(GuestError::State(format!(
                "QEMU has no RAM block {name}; run farhaven guest add again"
            )));
        }
    }
    // Replicating another file than the one QEMU has mapped would look right until the failover.
    let maps = qmp
        .pid()
        .and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")));
    let Ok(maps) = maps else { return Ok(()) };
    let inodes: Vec<u64> = maps
        .lines()
        .filter_map(|l| l.split_ascii_whitespace().nth(4)?.parse().ok())
        .collect();
    for (name, block) in blocks {
        if let Ok(inode) = block.inode()
            && !inodes.contains(&inode)
        {
            return Err(GuestError::State(format!(
                "the file of RAM block {name} is not the one that QEMU has mapped: was it replaced? The guest must be launched again"
            )));
        }
    }
    Ok(())
}

/// Sets the capabilities of our way to take device state.
pub(super) fn prepare_migration(
    qmp: &mut Qmp,
    mut before: Before,
    work_dir: &Path,
) -> Result<Before, GuestError> {
    idle(qmp)?;
    let listed = qmp.execute("query-migrate-capabilities", json!({}))?;
    let now: BTreeMap<&str, bool> = listed
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .filter_map(|c| Some((c["capability"].as_str()?, c["state"].as_bool()?)))
        .collect();
    let mut change = Vec::new();
    for name in WANTED {
        match now.get(name) {
            Some(true) => {}
            Some(false) => change.push((name.to_owned(), true)),
            None => {
                return Err(GuestError::State(format!(
                    "this QEMU has no migration capability {name}; Farhaven needs QEMU 7.2 or newer"
                )));
            }
        }
    }
    let off = UNWANTED
        .iter()
        .filter(|name| now.get(**name) == Some(&true));
    change.extend(off.map(|name| ((*name).to_owned(), false)));
    let parameters = qmp.execute("query-migrate-parameters", json!({}))?;
    let bandwidth = parameters["max-bandwidth"].as_u64();
    let were: Vec<_> = change
        .iter()
        .map(|(name, state)| (name.clone(), !state))
        .collect();
    before.changes(&were, bandwidth, work_dir)?;
    set(qmp, &change)?;
    qmp.execute(
        "migrate-set-parameters",
        json!({"max-bandwidth": 1_u64 << 40}),
    )?;
    Ok(before)
}

/// Is no migration of somebody else's under way?
pub(super) fn idle(qmp: &mut Qmp) -> Result<(), GuestError> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        let status = answer["status"].as_str().unwrap_or("none");
        if matches!(status, "none" | "failed" | "cancelled" | "completed") {
            return Ok(());
        }
        // One to a dead daemon's socket ends in a moment.
        if Instant::now() > deadline {
            return Err(GuestError::State(format!(
                "a migration of this guest is under way (status {status}); protection waits until it has ended or was cancelled (migrate_cancel)"
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts QEMU's NBD server, or uses the one that an earlier session started.
pub(super) fn serve_nbd(qmp: &mut Qmp, work_dir: &Path) -> Result<PathBuf, GuestError> {
    let socket = work_dir.join("nbd.sock");
    let start = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    if UnixStream::connect(&socket).is_ok() {
        return Ok(socket);
    }
    let _ = std::fs::remove_file(&socket);
    match qmp.execute("nbd-server-start", start.clone()) {
        Ok(_) => return Ok(socket),
        Err(QmpError::Refused { desc, .. }) if desc.contains("already running") => {}
        Err(error) => return Err(error.into()),
    }
    // The sweep has removed every export of ours: those left are somebody else's.
    let exports = qmp.execute("query-block-exports", json!({}))?;
    if exports.as_array().is_some_and(|e| !e.is_empty()) {
        return Err(GuestError::State(
            "QEMU already serves disks of this guest over NBD to somebody else; end that first (query-block-exports shows what, nbd-server-stop ends it)".to_owned(),
        ));
    }
    qmp.execute("nbd-server-stop", json!({}))?;
    qmp.execute("nbd-server-start", start)?;
    Ok(socket)
}

/// Puts back what an attach changed. Best effort: the guest may be gone.
pub(super) fn restore(qmp: &mut Qmp, before: &Before, work_dir: &Path) {
    let _ = qmp.execute("nbd-server-stop", json!({}));
    before.put_back(qmp, work_dir);
    for name in ["nbd.sock", CUT_MARK, HELD_MARK, THROTTLE_MARK] {
        let _ = std::fs::remove_file(work_dir.join(name));
    }
}

/// Has whoever attaches next leave a stopped guest stopped, whatever a daemon
/// that died in a cut of it had left.
///
/// # Errors
/// When that cannot be written down: nobody may attach to it then.
pub(crate) fn keep_held(work_dir: &Path) -> Result<(), GuestError> {
    make_private(work_dir)?;
    let path = work_dir.join(HELD_MARK);
    let written = std::fs::File::create(&path).and_then(|file| file.sync_all());
    written.map_err(|source| GuestError::Io {
        what: format!("writing {}", path.display()),
        source,
    })
}

/// When a process started, as the kernel counts; `None` if there is none.
pub(super) fn started(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields are counted from behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    // A zombie has ended; only its parent has not looked yet.
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

/// Makes the work directory, for this user alone.
pub(super) fn make_private(dir: &Path) -> Result<(), GuestError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| GuestError::Io {
            what: format!("making the run directory {}", dir.display()),
            source,
        })
}
