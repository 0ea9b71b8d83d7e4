//! The QEMU guest against a real QEMU: a boot-sector program (`busy_boot.s`)
//! keeps changing RAM and two disks while points are cut, and a model of the
//! peer must equal RAM file and disks at each held cut, bit for bit.

use std::process::Child;
use std::time::{Duration, Instant};

use busy_guest::{DISK_B, Model, RAM, Vm, assert_same, has_qemu};
use farhaven::guest::qemu::qmp::Qmp;
use farhaven::guest::qemu::{AttachOptions, QemuGuest};
use farhaven::guest::{After, Cut, Guest, GuestError, Sink, SinkError};
use farhaven_storage_sync::unit::{Digest, UNIT, VolumeIndex, VolumeKind};
use serde_json::json;

mod busy_guest;

fn ship(guest: &mut QemuGuest, mut cut: Cut, model: &mut Model) -> usize {
    for disk in &mut cut.disks {
        disk.changed(model).expect("reads");
    }
    let state = cut.device_state.len();
    guest.finish_cut(cut, true).expect("finishes");
    state
}

/// Cuts a held point, compares everything, and lets the guest go on.
fn check_held(vm: &Vm, guest: &mut QemuGuest, point: u64, model: &mut Model) {
    let cut = guest.cut(point, After::Hold, model).expect("cuts");
    assert_eq!(guest.running(), Some(false));
    ship(guest, cut, model);
    vm.assert_is(model);
    model.assert_one_instant();
    guest.sealed(point);
    guest.resume().expect("resumes");
    assert_eq!(guest.running(), Some(true));
}

fn works_on(vm: &Vm) {
    let before = vm.counters();
    let deadline = Instant::now() + Duration::from_secs(20);
    while vm.counters()[1] < before[1] + 64 * 4 {
        assert!(
            Instant::now() < deadline,
            "the guest does not go on: {before:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(vm.counters()[2], 0, "the guest's disk writes fail");
}

/// Names of everything of ours in that QEMU.
fn traces(vm: &Vm) -> Vec<String> {
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    let mut found = Vec::new();
    for query in [
        "query-block-exports",
        "query-jobs",
        "query-named-block-nodes",
    ] {
        let text = qmp.execute(query, json!({})).expect("answers").to_string();
        found.extend(
            text.split('"')
                .filter(|t| t.starts_with("farhaven-"))
                .map(str::to_owned),
        );
    }
    found
}

#[test]
fn points_under_load_are_exact() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    assert_eq!(guest.volumes().len(), 4);
    assert_eq!(guest.volumes()[0].bytes, RAM);
    assert_eq!(guest.volumes()[2].bytes, DISK_B);
    assert_eq!(guest.volumes()[3].kind, VolumeKind::DeviceState);
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    let copied = model.units;
    let mut pauses = Vec::new();
    for point in 1..=8 {
        if point == 4 {
            // No word of the seal of 3 came: nothing may be lost by that.
            guest.give_back();
        }
        let cut = guest.cut(point, After::Continue, &mut model).expect("cuts");
        assert_eq!(guest.running(), Some(true));
        pauses.push(cut.times);
        std::thread::sleep(Duration::from_millis(150));
        assert!(ship(&mut guest, cut, &mut model) > 10_000);
        model.assert_one_instant();
        if point != 3 && point != 6 {
            guest.sealed(point);
        }
    }
    let changed = model.units - copied;
    assert!(
        changed < copied,
        "cuts hand over what changed, not everything: {changed} of {copied}"
    );
    check_held(&vm, &mut guest, 9, &mut model);
    works_on(&vm);
    check_held(&vm, &mut guest, 10, &mut model);
    for times in &pauses {
        eprintln!(
            "pause {:.1} ms: device state {:.1}, disks {:.1}, RAM scan {:.1} of {} MiB",
            times.pause.as_secs_f64() * 1e3,
            times.device_state.as_secs_f64() * 1e3,
            times.disks.as_secs_f64() * 1e3,
            times.ram_scan.as_secs_f64() * 1e3,
            times.ram_scanned_bytes >> 20,
        );
    }
    guest.detach();
    drop(guest);
    assert_eq!(traces(&vm), [""; 0], "detach removes everything");
    works_on(&vm);
}

#[test]
fn a_full_sink_or_lost_disks_leave_the_guest_running_and_the_next_point_exact() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    // Pages that never change again must come with a later point all the same.
    let mut thrown = model.clone();
    thrown.refuse_after = 40;
    assert!(guest.cut(1, After::Continue, &mut thrown).is_err());
    guest.round(&mut model).expect("first copy");
    let cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    ship(&mut guest, cut, &mut model);
    guest.sealed(1);
    for after in [After::Continue, After::Hold] {
        works_on(&vm);
        // The sink's content of a failed cut is thrown away, as a capture buffer is.
        let mut thrown = model.clone();
        thrown.refuse_after = thrown.units + 20;
        let refused = guest.cut(2, after, &mut thrown);
        assert!(matches!(refused, Err(GuestError::Sink(SinkError::Full))));
        assert_eq!(guest.running(), Some(true));
    }
    works_on(&vm);
    // The link breaks while the disks are read.
    let mut thrown = model.clone();
    let mut cut = guest.cut(2, After::Continue, &mut thrown).expect("cuts");
    thrown.refuse_after = thrown.units + 5;
    assert!(
        cut.disks
            .iter_mut()
            .any(|d| d.changed(&mut thrown).is_err())
    );
    guest.finish_cut(cut, false).expect("finishes");
    guest.give_back();
    works_on(&vm);
    // A cut that nobody finishes.
    drop(
        guest
            .cut(3, After::Continue, &mut model.clone())
            .expect("cuts"),
    );
    guest.give_back();
    works_on(&vm);
    // Two that arrived as a whole, and were then lost unsealed with their RAM.
    for point in 4..=5 {
        let mut thrown = model.clone();
        guest.round(&mut thrown).expect("a round");
        let cut = guest
            .cut(point, After::Continue, &mut thrown)
            .expect("cuts");
        works_on(&vm);
        ship(&mut guest, cut, &mut thrown);
    }
    guest.give_back();
    check_held(&vm, &mut guest, 6, &mut model);
    guest.detach();
}

#[test]
fn a_point_without_a_round_holds_the_whole_guest() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    let cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    works_on(&vm);
    ship(&mut guest, cut, &mut model);
    model.assert_one_instant();
    assert_same(
        "disk b's end",
        &model.volumes[2][DISK_B as usize..],
        &vec![0; UNIT - 512],
    );
    check_held(&vm, &mut guest, 2, &mut model);
    guest.detach();
}

#[test]
fn a_restart_takes_up_the_bitmaps_or_compares() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    for point in 1..=2 {
        let cut = guest.cut(point, After::Continue, &mut model).expect("cuts");
        ship(&mut guest, cut, &mut model);
    }
    guest.sealed(1);
    // 2 was sealed too, but its word did not come; then a cut that nobody ends.
    works_on(&vm);
    // 3 was shipped to a peer that never sealed it.
    let mut thrown = model.clone();
    let cut = guest.cut(3, After::Continue, &mut thrown).expect("cuts");
    ship(&mut guest, cut, &mut thrown);
    works_on(&vm);
    let lost = guest
        .cut(4, After::Continue, &mut model.clone())
        .expect("cuts");
    drop(guest);
    drop(lost);
    works_on(&vm);

    let mut guest = vm.attach();
    for volume in 0..3 {
        guest
            .baseline(2, volume as u16, model.digests(volume))
            .expect("fits");
    }
    let before = model.units;
    guest.round(&mut model).expect("a round");
    let cut = guest.cut(3, After::Continue, &mut model).expect("cuts");
    ship(&mut guest, cut, &mut model);
    guest.sealed(3);
    let taken_up = model.units - before;
    check_held(&vm, &mut guest, 4, &mut model);
    guest.detach();
    drop(guest);
    works_on(&vm);

    // Detached meanwhile: no bitmap is left, so the disks are compared.
    let mut guest = vm.attach();
    for volume in 0..3 {
        guest
            .baseline(4, volume as u16, model.digests(volume))
            .expect("fits");
    }
    assert!(guest.baseline(4, 1, vec![Digest::UNKNOWN; 3]).is_err());
    let before = model.units;
    guest.round(&mut model).expect("a round");
    check_held(&vm, &mut guest, 5, &mut model);
    let compared = model.units - before;
    let whole = model.volumes.iter().map(|v| v.len() / UNIT).sum::<usize>() as u64;
    assert!(
        taken_up < whole / 4 && compared < whole / 4,
        "{taken_up} {compared} of {whole}"
    );
    guest.detach();
}

#[test]
fn a_daemon_that_dies_in_a_cut_leaves_nothing_that_the_next_does_not_mend() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    let cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    // As if the process were killed here, and the guest stopped by a second cut.
    std::mem::forget(cut);
    std::mem::forget(guest);
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    std::fs::write(vm.path("work/cut-in-progress"), "point 2\n").expect("written");
    qmp.execute("stop", json!({})).expect("stops");
    drop(qmp);

    let mut guest = QemuGuest::attach(vm.options("qmp2.sock")).expect("attaches");
    assert_eq!(guest.running(), Some(true), "the attach resumes the guest");
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("copies anew");
    check_held(&vm, &mut guest, 1, &mut model);

    // But a guest that a move holds stays stopped, until it is resumed.
    let cut = guest.cut(2, After::Hold, &mut model).expect("cuts");
    guest.finish_cut(cut, false).expect("finishes");
    drop(guest);
    let mut guest = QemuGuest::attach(vm.options("qmp2.sock")).expect("attaches");
    assert_eq!(guest.running(), Some(false));
    guest.resume().expect("resumes");
    works_on(&vm);
    guest.let_go().expect("ends QEMU");
    assert_eq!(guest.running(), None);
}

/// Found by killing the daemon at random moments: its migration had come to its end.
#[test]
fn a_guest_left_after_a_whole_migration_of_a_dead_daemon_runs_on() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    std::fs::create_dir_all(vm.path("work")).expect("made");
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    std::fs::write(vm.path("work/cut-in-progress"), "point 1\n").expect("written");
    qmp.execute("stop", json!({})).expect("stops");
    qmp.execute("migrate", json!({"uri": "exec:cat >/dev/null"}))
        .expect("migrates");
    while qmp.execute("query-status", json!({})).expect("tells")["status"] != "postmigrate" {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(qmp);

    let mut guest = QemuGuest::attach(vm.options("qmp2.sock")).expect("attaches");
    assert_eq!(guest.running(), Some(true), "the attach resumes the guest");
    works_on(&vm);
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    check_held(&vm, &mut guest, 1, &mut model);
}

#[test]
fn a_guest_that_dies_is_told_as_that() {
    if !has_qemu() {
        return;
    }
    let mut vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    let mut cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    vm.child.kill().expect("killed");
    vm.child.wait().expect("ended");
    assert!(cut.disks.iter_mut().all(|d| d.changed(&mut model).is_err()));
    let finished = guest.finish_cut(cut, false);
    assert!(matches!(finished, Err(GuestError::Gone(_))), "{finished:?}");
    assert_eq!(guest.running(), None);
    assert!(matches!(
        guest.cut(2, After::Continue, &mut model),
        Err(GuestError::Gone(_))
    ));
}

/// Ends QEMU at the first page it is given: in the pause.
struct Killer<'a>(&'a mut Child);

impl Sink for Killer<'_> {
    fn units(&mut self, _: VolumeIndex, _: u64, _: &[u8], _: &[Digest]) -> Result<(), SinkError> {
        let _ = self.0.kill();
        Ok(())
    }

    fn zeros(&mut self, _: VolumeIndex, _: u64, _: u64) -> Result<(), SinkError> {
        Ok(())
    }
}

#[test]
fn a_guest_that_dies_in_the_pause_is_told_as_that() {
    if !has_qemu() {
        return;
    }
    let mut vm = Vm::start();
    let mut guest = vm.attach();
    let begun = Instant::now();
    let died = guest.cut(1, After::Continue, &mut Killer(&mut vm.child));
    match died {
        Err(GuestError::Gone(_)) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a point of a dead guest"),
    }
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert_eq!(guest.running(), None);
    drop(guest);
    let left: Vec<_> = std::fs::read_dir(vm.path("work"))
        .expect("lists")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_guest_that_is_not_what_was_said_is_refused() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let refused = |change: &dyn Fn(&mut AttachOptions)| {
        let mut options = vm.options("qmp.sock");
        change(&mut options);
        match QemuGuest::attach(options) {
            Ok(_) => panic!("attached"),
            Err(error) => error.to_string(),
        }
    };
    let other = vm.path("other.ram");
    std::fs::File::create(&other)
        .and_then(|f| f.set_len(RAM))
        .expect("made");
    assert!(
        refused(&|o| o.ram[0].1.clone_from(&other)).contains("not the one that QEMU has mapped")
    );
    assert!(refused(&|o| o.ram[0].0 = "ram7".to_owned()).contains("ram0"));
    assert!(refused(&|o| o.disks[1].1 = "disk-c".to_owned()).contains("disk-c"));
    assert!(refused(&|o| o.qmp = vm.path("none.sock")).contains("-qmp"));
    assert!(refused(&|o| o.replica = "../x".to_owned()).contains("replica"));
    let held = Qmp::connect(&vm.path("qmp.sock"), Duration::from_secs(5)).expect("connects");
    assert!(
        refused(&|o| o.qmp_timeout = Duration::from_millis(300)).contains("another QMP client")
    );
    drop(held);
    // No room for what the guest overwrites: refused before the guest is stopped.
    let mut options = vm.options("qmp.sock");
    options.reserve = u64::MAX;
    let mut guest = QemuGuest::attach(options).expect("attaches");
    let mut model = Model::new(guest.volumes());
    let Err(error) = guest.cut(1, After::Continue, &mut model) else {
        panic!("cut")
    };
    assert!(error.to_string().contains("Free some"), "{error}");
    assert_eq!(guest.running(), Some(true));
    works_on(&vm);
}
