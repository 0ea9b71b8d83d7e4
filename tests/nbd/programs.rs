//! Programs that operators use: libnbd's and QEMU's.

use std::process::{Command, Output};
use std::sync::atomic::Ordering;
use std::time::Duration;

use farhaven::activate::nbd::BlockSource;

use crate::Test;
use crate::disk::{Disk, served};

/// Says that a test is skipped where a program is missing; with CI=true it fails.
fn lacks(program: &str) -> bool {
    let lacks = Command::new(program).arg("--version").output().is_err();
    assert!(
        !(lacks && std::env::var("CI").is_ok_and(|ci| ci == "true")),
        "{program} must be installed for CI"
    );
    if lacks {
        eprintln!("skipped: {program} is not installed (apt-get install libnbd-bin qemu-utils)");
    }
    lacks
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let command = tokio::process::Command::new(program)
        .args(arguments)
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(Duration::from_secs(60), command)
        .await
        .expect("the client hangs")
        .unwrap()
}

async fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_reads_every_byte_over_several_connections() -> Test {
    if lacks("nbdcopy") || lacks("nbdinfo") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(1, (24 << 20) + 513);
    served.server.export("vm/disk 0", disk.clone())?;
    served.server.export("other", Disk::new(2, 4096))?;
    let uri = served.uri("vm/disk%200");
    let info = succeeds("nbdinfo", &[&uri]).await;
    for expected in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        "base:allocation",
        "export-size: 25166337",
        "is_read_only: true",
        "can_multi_conn: true",
        "block_size_minimum: 1",
        "block_size_maximum: 33554432",
    ] {
        assert!(info.contains(expected), "no {expected:?} in {info}");
    }
    let list = succeeds("nbdinfo", &["--list", &served.uri("")]).await;
    assert!(
        list.contains("export=\"other\"") && list.contains("export=\"vm/disk 0\""),
        "{list}"
    );

    let copy = served.file("copy");
    succeeds("nbdcopy", &["--connections=4", &uri, &copy]).await;
    assert!(std::fs::read(&copy)? == disk.bytes, "the copy differs");
    let read = disk.reads.load(Ordering::SeqCst);
    let filled: usize = disk
        .bytes
        .chunks(disk.part)
        .filter(|part| part.iter().any(|byte| *byte != 0))
        .map(<[u8]>::len)
        .sum();
    assert!(filled < disk.bytes.len() * 2 / 3);
    assert_eq!(read, filled as u64, "zeros were read");

    let map = succeeds("nbdinfo", &["--map", &uri]).await;
    let mut at = 0;
    for line in map.lines() {
        let fields: Vec<u64> = line
            .split_whitespace()
            .take(3)
            .map(|field| field.parse().unwrap())
            .collect();
        let (offset, length, kind) = (fields[0], fields[1], fields[2]);
        assert_eq!(offset, at);
        let zero = disk.bytes[offset as usize..][..length as usize]
            .iter()
            .all(|byte| *byte == 0);
        assert_eq!(zero, kind == 3, "{line}");
        at += length;
    }
    assert_eq!(at, disk.size());
    served.server.shutdown().await;
    assert!(!served.socket.exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_works_on_an_overlay_and_hydrates_it() -> Test {
    if lacks("qemu-img") || lacks("qemu-io") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(3, 16 << 20);
    served.server.export("root", disk.clone())?;
    let backing = format!("nbd:unix:{}:exportname=root", served.socket.display());
    let (overlay, raw) = (served.file("overlay.qcow2"), served.file("raw"));
    succeeds(
        "qemu-img",
        &[
            "create", "-f", "qcow2", "-b", &backing, "-F", "raw", &overlay,
        ],
    )
    .await;
    // A write lands in the overlay, and the rest still shines through.
    succeeds(
        "qemu-io",
        &[
            "-c",
            "write -P 7 1M 64k",
            "-c",
            "read -P 7 1M 64k",
            &overlay,
        ],
    )
    .await;
    succeeds("qemu-img", &["convert", "-O", "raw", &overlay, &raw]).await;
    let mut expected = disk.bytes.clone();
    expected[1 << 20..][..64 << 10].fill(7);
    assert!(
        std::fs::read(&raw)? == expected,
        "the overlay reads otherwise than its backing"
    );
    // Without its backing it is the same: what block-stream does, in one go.
    succeeds("qemu-img", &["rebase", "-b", "", &overlay]).await;
    served.server.remove("root")?;
    succeeds("qemu-img", &["convert", "-O", "raw", &overlay, &raw]).await;
    assert!(
        std::fs::read(&raw)? == expected,
        "the hydrated overlay differs"
    );
    let zero_bytes = disk.bytes.iter().filter(|byte| **byte == 0).count() as u64;
    let size = std::fs::metadata(&overlay)?.len();
    assert!(
        size < disk.size() - zero_bytes / 2,
        "{size} bytes: zeros were hydrated"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_fails_is_an_io_error_and_the_server_goes_on() -> Test {
    if lacks("qemu-io") {
        return Ok(());
    }
    let served = served();
    let disk = Disk::new(4, 1 << 20);
    let filled = disk
        .bytes
        .chunks(disk.part)
        .position(|part| part[0] != 0)
        .unwrap()
        * disk.part;
    served.server.export("root", disk.clone())?;
    disk.broken.store(true, Ordering::SeqCst);
    let read = format!("read {filled} 4k");
    let uri = served.uri("root");
    let failed = run("qemu-io", &["-r", "-f", "raw", "-c", &read, &uri]).await;
    let told = format!(
        "{}{}",
        String::from_utf8_lossy(&failed.stdout),
        String::from_utf8_lossy(&failed.stderr)
    );
    assert!(told.contains("Input/output error"), "{told}");
    disk.broken.store(false, Ordering::SeqCst);
    succeeds("qemu-io", &["-r", "-f", "raw", "-c", &read, &uri]).await;
    Ok(())
}
