//! The systemd unit, as systemd itself judges it where it is installed.

use std::fs;
use std::process::Command;

use super::root;

/// Worst exposure, in tenths, of `systemd-analyze security`.
const EXPOSURE: &str = "25";

#[test]
fn the_service_is_one_and_stays_hardened() {
    let text = fs::read_to_string(root().join("packaging/systemd/farhaven.service")).unwrap();
    // Without these a restart of the daemon ends guests, or takes their memory.
    for line in [
        "KillMode=process",
        "RemoveIPC=no",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
    ] {
        assert!(text.lines().any(|of| of == line), "no {line}");
    }
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        eprintln!("skipped: no systemd-analyze here; apt-get install systemd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("farhaven.service");
    // The program is not installed where this runs.
    fs::write(&unit, text.replace("/usr/bin/farhaven", "/bin/true")).unwrap();
    let judge = |args: &[&str]| {
        let told = Command::new("systemd-analyze")
            .args(args)
            .arg(&unit)
            .output()
            .unwrap();
        let words = [told.stdout, told.stderr].concat();
        assert!(
            told.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&words)
        );
    };
    judge(&["verify", "--man=no"]);
    judge(&[
        "security",
        "--offline=true",
        &format!("--threshold={EXPOSURE}"),
    ]);
}
