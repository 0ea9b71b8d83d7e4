//! What a cut needs of each disk before the guest is stopped: that it is still
//! the disk it was, that its changes are being recorded, and a fleece, an empty
//! copy-before-write image that will keep what the guest overwrites.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::GuestError;
use super::disk::Disk;
use super::qmp::Qmp;
use super::tracking::{nodes, written};

/// How long a block job may take to write an empty image.
const CREATE: Duration = Duration::from_secs(20);

/// An empty image whose backing is the disk, made before the guest is stopped.
pub(super) fn prepare_fleece(
    qmp: &mut Qmp,
    disk: &Disk,
    work_dir: &Path,
) -> Result<(), GuestError> {
    let path = work_dir.join(format!("fleece-{}.qcow2", disk.volume));
    std::fs::File::create(&path).map_err(|source| GuestError::Io {
        what: format!(
            "making {}, where disk writes go during a cut",
            path.display()
        ),
        source,
    })?;
    qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "node-name": disk.fleece_file(), "filename": path,
            "cache": {"direct": false, "no-flush": true}}),
    )?;
    let job = format!("{}-create", disk.job());
    // QEMU counts image sizes in sectors.
    let size = disk.bytes.next_multiple_of(512);
    qmp.execute(
        "blockdev-create",
        json!({"job-id": job, "options": {"driver": "qcow2", "file": disk.fleece_file(), "size": size}}),
    )?;
    let deadline = Instant::now() + CREATE;
    loop {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        let ours = jobs
            .as_array()
            .and_then(|jobs| jobs.iter().find(|j| j["id"] == job.as_str()));
        match ours {
            None => break,
            Some(ended) if ended["status"] == "concluded" => {
                let error = ended["error"].as_str().map(str::to_owned);
                qmp.execute("job-dismiss", json!({"id": job}))?;
                if let Some(error) = error {
                    return Err(GuestError::State(format!(
                        "QEMU cannot make {}: {error}",
                        path.display()
                    )));
                }
                break;
            }
            Some(_) if Instant::now() > deadline => {
                return Err(GuestError::State(format!(
                    "QEMU did not make {} within {CREATE:?}; its storage is too slow for cuts",
                    path.display()
                )));
            }
            Some(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": disk.fleece(), "file": disk.fleece_file(), "backing": disk.node}),
    )?;
    Ok(())
}

/// Does the guest write to this node of each disk, `top`, and nowhere else? What goes to
/// an overlay or to a copy that was pivoted to is in no bitmap of ours.
///
/// # Errors
/// Of the first to which it does not; the sentence says what to do.
pub(super) fn written_through(
    qmp: &mut Qmp,
    disks: &[Disk],
    top: impl Fn(&Disk) -> String,
) -> Result<(), GuestError> {
    if disks.is_empty() {
        return Ok(());
    }
    let written = written(qmp)?;
    match disks.iter().find(|disk| !written.contains(&top(disk))) {
        None => Ok(()),
        Some(disk) => Err(GuestError::State(format!(
            "the guest does not write to disk node '{}' itself any more: a snapshot, a mirror or a filter of another tool is between, and what changes is not recorded. Merge it back (block-commit), or run farhaven unprotect, farhaven guest add and protect it anew",
            disk.node
        ))),
    }
}

/// Sizes and bitmaps of the disks as they are now.
pub(super) fn begin_tracking(qmp: &mut Qmp, disks: &mut [Disk]) -> Result<(), GuestError> {
    if disks.is_empty() {
        return Ok(());
    }
    let nodes = nodes(qmp)?;
    written_through(qmp, disks, |disk| disk.node.clone())?;
    for disk in disks {
        let node = nodes.iter().find(|n| n.name == disk.node).ok_or_else(|| {
            GuestError::State(format!(
                "the guest has no disk node '{}' any more; run farhaven guest add again",
                disk.node
            ))
        })?;
        if node.bytes != disk.bytes {
            return Err(GuestError::State(format!(
                "disk '{}' has {} bytes, but had {} when protection began; run farhaven unprotect, then protect it anew",
                disk.node, node.bytes, disk.bytes
            )));
        }
        match disk.chain.recording() {
            None => disk.chain.begin(qmp, &node.bitmaps)?,
            Some(name)
                if !node
                    .bitmaps
                    .iter()
                    .any(|b| b.name == name && b.usable && b.recording) =>
            {
                return Err(GuestError::State(format!(
                    "the dirty bitmap {name} of disk '{}' is gone or stopped: changes may have been missed. Farhaven attaches again and compares the disk",
                    disk.node
                )));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
