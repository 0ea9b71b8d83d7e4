//! A running Debian guest is cut, defined, and launched again elsewhere; and the
//! test guest's own check finds what is wrong with it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farhaven::activate::failure::LaunchError;
use farhaven::activate::hydrate::HydrationState;
use farhaven::activate::launch::{LaunchPlan, Launched};
use farhaven::guest::qemu::check::{Severity, check, check_live};
use farhaven::guest::qemu::definition::Definition;
use farhaven::guest::qemu::instantiate::{Backing, DiskPlacement, Placement};
use farhaven::guest::qemu::peer::{check_peer, peer_facts};
use farhaven::guest::qemu::qmp::Qmp;
use serde_json::json;
use support::cut::{Nbd, device_state};
use support::{Console, GuestOptions, GuestVm};

const LONG: Duration = Duration::from_secs(90);

/// A launched QEMU that a failing test must not leave behind, and its RAM file.
struct Cleanup {
    qmp: PathBuf,
    ram: PathBuf,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Ok(mut qmp) = Qmp::connect(&self.qmp, Duration::from_secs(2)) {
            let _ = qmp.execute("quit", json!({}));
        }
        let _ = std::fs::remove_file(&self.ram);
    }
}

#[test]
fn a_guest_goes_on_where_it_was_cut() {
    let here = tempfile::tempdir().unwrap();
    let there = tempfile::tempdir().unwrap();
    let Some(mut vm) = GuestVm::start(here.path(), &GuestOptions::default()) else {
        return;
    };
    vm.console.await_beat(20, LONG);
    let mut qmp = vm.connect();

    let definition = Definition::read(&mut qmp).unwrap();
    let again: Definition =
        serde_json::from_str(&serde_json::to_string(&definition).unwrap()).unwrap();
    assert_eq!(again, definition);
    assert_eq!(
        (
            definition.machine.as_str(),
            definition.vcpus,
            definition.ram_bytes
        ),
        ("pc-q35-7.2", 1, 512 << 20)
    );
    assert_eq!(definition.ram[0].path.as_deref(), Some(vm.ram.as_path()));
    let disks: Vec<_> = definition
        .disks
        .iter()
        .map(|disk| (disk.name.as_str(), disk.bytes, disk.format.as_str()))
        .collect();
    assert_eq!(
        disks,
        [("data", 64 << 20, "raw"), ("root", 2 << 30, "qcow2")],
        "{:?}",
        definition.disks
    );
    assert_eq!(
        definition.files.len(),
        2,
        "kernel and initrd: {:?}",
        definition.files
    );
    let mut findings = check(&definition);
    findings.extend(check_live(&mut qmp).unwrap());
    let peer = peer_facts(
        Path::new("qemu-system-x86_64"),
        &definition,
        Path::new("/dev/shm"),
        there.path(),
    );
    findings.extend(check_peer(&definition, &peer, 0));
    let blocking: Vec<_> = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Blocks)
        .collect();
    assert!(blocking.is_empty(), "{blocking:?}");

    // The cut: everything is copied while the guest is stopped.
    qmp.execute("stop", json!({})).unwrap();
    let state = device_state(&mut qmp, here.path());
    let ram = PathBuf::from(format!("{}.peer", vm.ram.display()));
    let (root, data) = (
        there.path().join("root.point"),
        there.path().join("data.point"),
    );
    std::fs::copy(&vm.ram, &ram).unwrap();
    std::fs::copy(&vm.root_disk, &root).unwrap();
    std::fs::copy(&vm.data_disk, &data).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let last = vm.console.last_beat().unwrap();
    qmp.execute("cont", json!({})).unwrap();
    vm.console.await_beat(last.number + 5, LONG);
    vm.kill();

    let run = there.path().join("run");
    let (root_socket, data_socket) = (there.path().join("root.nbd"), there.path().join("data.nbd"));
    let servers = [
        Nbd::serve(&root, "qcow2", &root_socket, "root"),
        Nbd::serve(&data, "raw", &data_socket, "data"),
    ];
    let disk = |name: &str, socket: &Path| DiskPlacement {
        overlay: there.path().join(format!("{name}.qcow2")),
        backing: Backing::Nbd {
            socket: socket.to_owned(),
            export: name.to_owned(),
        },
    };
    let placement = Placement {
        run: run.clone(),
        qmp: run.join("qmp.sock"),
        ram: [("ram0".to_owned(), ram.clone())].into(),
        disks: [
            ("root".to_owned(), disk("root", &root_socket)),
            ("data".to_owned(), disk("data", &data_socket)),
        ]
        .into(),
        ..Placement::default()
    };
    let _cleanup = Cleanup {
        qmp: placement.qmp.clone(),
        ram,
    };
    let begin = Instant::now();
    let mut launched = Launched::start(&LaunchPlan {
        definition: &definition,
        placement: &placement,
        program: None,
    })
    .unwrap();
    let started = begin.elapsed();
    launched.restore(&state).unwrap();
    let restored = begin.elapsed();
    launched.run().unwrap();
    let running = begin.elapsed();
    launched.announce().unwrap();
    println!(
        "device state {} bytes; start {started:?}, restore {:?}, cont {:?}",
        state.len(),
        restored - started,
        running - restored
    );

    let console = Console {
        log: run.join("console.log"),
        socket: run.join("console.sock"),
    };
    let first = console.await_beat(0, LONG);
    assert!(
        (last.number..=last.number + 2).contains(&first.number),
        "went on from {last:?} with {first:?}"
    );
    let checked = console.check(LONG);
    assert!(checked.is_ok(), "{checked:?}");

    launched.hydrate(0).unwrap();
    launched.hydrate(0).unwrap();
    let begin = Instant::now();
    loop {
        let progress = launched.hydration().unwrap();
        assert_eq!(progress.len(), 2);
        if progress
            .iter()
            .all(|disk| disk.state == HydrationState::Done)
        {
            break;
        }
        assert!(begin.elapsed() < LONG, "{progress:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("hydrated in {:?}", begin.elapsed());
    drop(servers);

    // A session of its own, and no second QEMU on the same memory and disks.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", launched.pid())).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .map(str::to_owned);
    assert_eq!(session, Some(launched.pid().to_string()), "{stat}");
    let plan = LaunchPlan {
        definition: &definition,
        placement: &placement,
        program: None,
    };
    assert!(matches!(
        Launched::start(&plan).err(),
        Some(LaunchError::AlreadyRunning { .. })
    ));

    // A restart of the daemon leaves the guest running, and finds it again.
    drop(launched);
    let mut adopted = Launched::adopt(&definition, &placement).unwrap().unwrap();
    assert!(adopted.is_alive());
    let checked = console.check(LONG);
    assert!(checked.is_ok(), "without the store: {checked:?}");
    let pid = adopted.pid();
    adopted.kill();
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z"), "{state}");
    assert!(Launched::adopt(&definition, &placement).unwrap().is_none());
}

#[test]
fn a_launch_that_fails_says_why_and_leaves_nothing_running() {
    let here = tempfile::tempdir().unwrap();
    let Some(vm) = GuestVm::start(
        here.path(),
        &GuestOptions {
            cmdline: "farhaven.load=idle".to_owned(),
            ..GuestOptions::default()
        },
    ) else {
        return;
    };
    vm.console.await_beat(1, LONG);
    let mut qmp = vm.connect();
    let definition = Definition::read(&mut qmp).unwrap();
    qmp.execute("stop", json!({})).unwrap();
    let state = device_state(&mut qmp, here.path());
    let run = here.path().join("run");
    let ram = PathBuf::from(format!("{}.peer", vm.ram.display()));
    std::fs::copy(&vm.ram, &ram).unwrap();
    let disk = |name: &str| DiskPlacement {
        overlay: here.path().join(format!("{name}.over")),
        backing: Backing::Nothing,
    };
    let placement = Placement {
        run: run.clone(),
        qmp: run.join("qmp.sock"),
        ram: [("ram0".to_owned(), ram.clone())].into(),
        disks: [
            ("root".to_owned(), disk("root")),
            ("data".to_owned(), disk("data")),
        ]
        .into(),
        ..Placement::default()
    };
    let _cleanup = Cleanup {
        qmp: placement.qmp.clone(),
        ram,
    };
    let start = |placement: &Placement| {
        Launched::start(&LaunchPlan {
            definition: &definition,
            placement,
            program: None,
        })
    };
    let nobody_runs = || assert!(Launched::adopt(&definition, &placement).unwrap().is_none());

    // QEMU checks its stream's form; that the bytes are right is the store's promise.
    let mut wrong_machine = state.clone();
    wrong_machine[20] ^= 0x55;
    for (what, bad) in [
        ("machine", &wrong_machine[..]),
        ("zeros", &[0; 64]),
        ("short", &state[..state.len() / 2]),
        ("empty", &[]),
    ] {
        let mut launched = start(&placement).unwrap();
        let error = launched.restore(bad).expect_err(what);
        let words = error.to_string();
        assert!(matches!(error, LaunchError::Qemu { .. }), "{what}: {words}");
        assert!(words.contains("qemu.log"), "{what}: {words}");
        println!("{what}: {words}");
        launched.kill();
        nobody_runs();
    }

    // An NBD server that is not there.
    let mut absent = placement.clone();
    let nowhere = Backing::Nbd {
        socket: here.path().join("nowhere"),
        export: "root".to_owned(),
    };
    absent.disks.insert(
        "root".to_owned(),
        DiskPlacement {
            overlay: here.path().join("absent.over"),
            backing: nowhere,
        },
    );
    let error = start(&absent).err().expect("no NBD server").to_string();
    assert!(
        error.contains("nowhere") || error.contains("No such file"),
        "{error}"
    );
    nobody_runs();

    // A RAM block without a place, a path too long, a program that is not QEMU.
    let mut unplaced = placement.clone();
    unplaced.ram.clear();
    assert!(matches!(
        start(&unplaced).err(),
        Some(LaunchError::Instantiate(_))
    ));
    let mut long = placement.clone();
    long.qmp = here.path().join("x".repeat(120));
    assert!(matches!(start(&long).err(), Some(LaunchError::LongPath(_))));
    let mut shell = definition.clone();
    "/bin/sh".clone_into(&mut shell.program);
    let refused = Launched::start(&LaunchPlan {
        definition: &shell,
        placement: &placement,
        program: None,
    });
    assert!(matches!(refused.err(), Some(LaunchError::NotQemu(_))));
    nobody_runs();
}

#[test]
fn the_guest_finds_what_is_wrong_with_it() {
    let here = tempfile::tempdir().unwrap();
    let Some(vm) = GuestVm::start(here.path(), &GuestOptions::default()) else {
        return;
    };
    vm.console.await_beat(10, LONG);
    let mut qmp = vm.connect();
    let old = std::fs::read(&vm.data_disk).unwrap();
    vm.console.await_beat(30, LONG);
    let checked = vm.console.check(LONG);
    assert!(checked.is_ok(), "{checked:?}");

    qmp.execute("stop", json!({})).unwrap();
    // A disk of an earlier instant than memory.
    let disk = std::fs::OpenOptions::new()
        .write(true)
        .open(&vm.data_disk)
        .unwrap();
    disk.write_all_at(&old, 0).unwrap();
    // One flipped bit in memory.
    let ram = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&vm.ram)
        .unwrap();
    let mut page = [0; 4096];
    let mut flipped = 0;
    for at in (0..512 << 20).step_by(4096) {
        ram.read_exact_at(&mut page, at).unwrap();
        if page.starts_with(b"table 00000005 seq ") {
            ram.write_all_at(&[page[3000] ^ 1], at + 3000).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 0, "the ledger's page is found in the RAM file");
    qmp.execute("cont", json!({})).unwrap();
    let checked = vm.console.check(LONG);
    assert!(checked.memory.starts_with("BAD:"), "{checked:?}");
    assert!(checked.disk.starts_with("BAD:"), "{checked:?}");
    let beat = vm.console.await_beat(checked.beat + 1, LONG);
    assert!(
        beat.memory.starts_with("BAD:") && beat.disk.starts_with("BAD:"),
        "{beat:?}"
    );
}
