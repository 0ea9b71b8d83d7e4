//! What only QEMU guests promise, against a real QEMU in which a boot-sector
//! program (`busy_boot.s`) keeps changing RAM and two disks: what a dead daemon
//! left is mended. The promises of every guest are in tests/conformance.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::process::Child;
use std::time::{Duration, Instant};

use busy_guest::{RAM, Vm, assert_one_instant, has_qemu};
use farhaven::guest::qemu::qmp::Qmp;
use farhaven::guest::qemu::{AttachOptions, QemuGuest};
use farhaven::guest::{After, Cut, Guest, GuestError, Sink, SinkError};
use farhaven_storage_sync::unit::{Digest, VolumeIndex};
use serde_json::json;
use support::model::Model;

mod busy_guest;
mod support;

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
    model.assert_is(&vm.content());
    assert_one_instant(&model.volumes);
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

#[test]
fn a_daemon_that_dies_while_it_throttles_leaves_a_guest_that_the_next_resumes() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mark = vm.path("work/throttled");
    let mut guest = vm.attach();
    guest.throttle(60).expect("throttles");
    let seen = Instant::now();
    while !mark.exists() {
        assert!(seen.elapsed() < Duration::from_secs(10), "no mark is left");
    }
    guest.throttle(0).expect("lets it run");
    assert!(!mark.exists());
    drop(guest);
    // As if the process were killed with the guest stopped.
    std::fs::write(&mark, "").expect("written");
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    qmp.execute("stop", json!({})).expect("stops");
    let mut guest = vm.attach();
    assert_eq!(guest.running(), Some(true), "the attach resumes the guest");
    assert!(!mark.exists());
    works_on(&vm);

    // Somebody else's stop is theirs to end, and is told.
    guest.throttle(30).expect("throttles");
    std::thread::sleep(Duration::from_millis(150));
    while guest.running() == Some(true) {
        // A stop while it stands for the throttle is ended with that.
        qmp.execute("stop", json!({})).expect("stops");
        std::thread::sleep(Duration::from_millis(150));
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.running(), Some(false));
    qmp.execute("cont", json!({})).expect("goes on");
    works_on(&vm);
    guest.detach();
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

#[test]
fn two_guests_are_cut_at_one_instant() {
    use farhaven::guest::gate::{Patience, Rendezvous, SKEW};

    if !has_qemu() {
        return;
    }
    let vms = [Vm::start(), Vm::start()];
    let mut guests: Vec<_> = vms
        .iter()
        .map(|vm| {
            let mut guest = vm.attach();
            let mut model = Model::new(guest.volumes());
            guest.round(&mut model).expect("first copy");
            (guest, model)
        })
        .collect();
    // A machine under load may stop one late; what the gate can do is seen once.
    let (mut skews, mut tries) = (Vec::new(), 0);
    for point in 1..=20 {
        let gate = Rendezvous::new(2, Patience::default());
        std::thread::scope(|scope| {
            for (guest, model) in &mut guests {
                let gate = &gate;
                scope.spawn(move || {
                    let cut = guest
                        .cut_at(point, After::Continue, gate, model)
                        .expect("cuts");
                    ship(guest, cut, model);
                    guest.sealed(point);
                });
            }
        });
        skews.push(gate.skew().expect("all have stopped"));
        tries += gate.tries();
    }
    skews.sort();
    println!("skew of 20 cuts: {skews:?}; stopped again: {tries} times");
    assert!(skews[0] < Duration::from_millis(5), "{skews:?}");

    // One that never comes: the other was not stopped, and goes on.
    let gate = Rendezvous::new(
        2,
        Patience {
            ready: Duration::from_millis(200),
            freeze: Duration::ZERO,
            stopped: Duration::from_millis(200),
            skew: SKEW,
        },
    );
    let (guest, model) = &mut guests[0];
    assert!(matches!(
        guest.cut_at(21, After::Continue, &gate, model),
        Err(GuestError::Gate(_))
    ));
    assert_eq!(guest.running(), Some(true));

    // One that is ready and does not stop: the cut of the other is undone.
    let gate = Rendezvous::new(
        2,
        Patience {
            ready: Duration::from_secs(20),
            freeze: Duration::ZERO,
            stopped: Duration::from_millis(200),
            skew: SKEW,
        },
    );
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            use farhaven::guest::gate::CutGate;
            gate.gather()?;
            gate.ready()
        });
        let refused = guest.cut_at(21, After::Continue, &gate, model);
        assert!(matches!(refused, Err(GuestError::Gate(_))));
        late.join().expect("waits").expect("was ready");
    });
    assert_eq!(guest.running(), Some(true));
    works_on(&vms[0]);
    check_held(&vms[0], guest, 21, model);
}

/// What goes to an overlay is in no bitmap of ours.
#[test]
fn a_disk_of_which_another_tool_took_a_snapshot_is_not_cut_until_it_is_merged_back() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    check_held(&vm, &mut guest, 1, &mut model);
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    let overlay = vm.path("overlay.qcow2").display().to_string();
    let taken = json!({"node-name": "disk-a", "snapshot-file": overlay,
        "snapshot-node-name": "overlay", "format": "qcow2"});
    qmp.execute("blockdev-snapshot-sync", taken)
        .expect("a snapshot");
    works_on(&vm);
    for after in [After::Continue, After::Hold] {
        let Err(error) = guest.cut(2, after, &mut model) else {
            panic!("cut")
        };
        assert!(error.to_string().contains("'disk-a'"), "{error}");
        assert_eq!(guest.running(), Some(true));
        works_on(&vm);
    }

    let merged = json!({"device": "overlay", "job-id": "merge"});
    qmp.execute("block-commit", merged).expect("commits");
    let patience = Duration::from_secs(20);
    qmp.wait_event("BLOCK_JOB_READY", patience, |_| true)
        .expect("is ready");
    qmp.execute("block-job-complete", json!({"device": "merge"}))
        .expect("pivots");
    qmp.wait_event("BLOCK_JOB_COMPLETED", patience, |_| true)
        .expect("is merged");
    works_on(&vm);
    let cut = guest
        .cut(2, After::Continue, &mut model)
        .expect("cuts again");
    ship(&mut guest, cut, &mut model);
    guest.sealed(2);
    check_held(&vm, &mut guest, 3, &mut model);
}

/// Lets the guest go on at the first page it is given: in the pause.
struct Meddler(Option<Qmp>);

impl Meddler {
    fn meddle(&mut self) {
        if let Some(mut qmp) = self.0.take() {
            qmp.execute("cont", json!({})).expect("goes on");
        }
    }
}

impl Sink for Meddler {
    fn units(&mut self, _: VolumeIndex, _: u64, _: &[u8], _: &[Digest]) -> Result<(), SinkError> {
        self.meddle();
        Ok(())
    }

    fn zeros(&mut self, _: VolumeIndex, _: u64, _: u64) -> Result<(), SinkError> {
        self.meddle();
        Ok(())
    }
}

/// Its memory and its disks would be of different instants.
#[test]
fn a_guest_that_another_tool_lets_go_on_in_the_pause_gets_no_point() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut guest = vm.attach();
    for after in [After::Continue, After::Hold] {
        let qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
        let mut meddler = Meddler(Some(qmp));
        let Err(error) = guest.cut(1, after, &mut meddler) else {
            panic!("a point of more than one instant")
        };
        assert!(meddler.0.is_none());
        assert!(error.to_string().contains("another tool"), "{error}");
        assert_eq!(guest.running(), Some(true));
        works_on(&vm);
    }
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    check_held(&vm, &mut guest, 1, &mut model);
}

/// A daemon that is started anew attaches without a detach between.
#[test]
fn a_detach_puts_back_what_the_first_attach_found() {
    if !has_qemu() {
        return;
    }
    let vm = Vm::start();
    let mut qmp = Qmp::connect(&vm.path("qmp2.sock"), Duration::from_secs(5)).expect("connects");
    let list = json!([{"capability": "multifd", "state": true}]);
    qmp.execute("migrate-set-capabilities", json!({"capabilities": list}))
        .expect("set");
    let limit = json!({"max-bandwidth": 7 << 20});
    qmp.execute("migrate-set-parameters", limit).expect("set");
    let mut settings = || {
        let all = qmp.execute("query-migrate-parameters", json!({}));
        let bandwidth = all.expect("tells")["max-bandwidth"].clone();
        let capabilities = qmp.execute("query-migrate-capabilities", json!({}));
        (bandwidth, capabilities.expect("tells"))
    };
    let found = settings();
    for _ in 0..3 {
        drop(vm.attach());
        let (bandwidth, capabilities) = settings();
        assert!(bandwidth != found.0 && capabilities != found.1);
    }
    vm.attach().detach();
    assert_eq!(settings(), found);
    assert!(!vm.path("work/migration-before.json").exists());
}
