//! The QEMU guest against a real QEMU: a boot-sector program (`busy_boot.s`)
//! keeps changing RAM and two disks while points are cut, and a model of the
//! peer must equal RAM file and disks at each held cut, bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven::guest::qemu::qmp::Qmp;
use farhaven::guest::qemu::{AttachOptions, QemuGuest};
use farhaven::guest::{After, Cut, Guest, GuestError, Sink, SinkError};
use farhaven_storage_sync::unit::{Digest, UNIT, Volume, VolumeIndex, VolumeKind};
use serde_json::json;

const KEY: [u8; 32] = [42; 32];
const RAM: u64 = 64 << 20;
const DISK_A: u64 = 16 << 20;
/// No multiple of 4 KiB: the last unit is padded.
const DISK_B: u64 = (20 << 20) + 512;

/// A QEMU that ends, with its files, when this is dropped.
struct Vm {
    child: Child,
    dir: tempfile::TempDir,
    ram: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.ram);
    }
}

fn has_qemu() -> bool {
    let found = |tool: &str| {
        Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
    };
    if found("qemu-system-x86_64") && found("qemu-img") {
        return true;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "CI must have qemu-system-x86_64 and qemu-img"
    );
    eprintln!(
        "skipped: no qemu-system-x86_64 or no qemu-img (apt-get install qemu-system-x86 qemu-utils)"
    );
    false
}

fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img")
        .args(arguments)
        .status()
        .expect("qemu-img starts");
    assert!(status.success(), "qemu-img {arguments:?}");
}

impl Vm {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        // A: raw, sparse, with the boot sector and some old content to be overwritten.
        let mut raw = vec![0; DISK_A as usize];
        raw[..512].copy_from_slice(include_bytes!("busy_boot.bin"));
        for (i, byte) in raw[8 << 20..9 << 20].iter_mut().enumerate() {
            *byte = (i * 7 + i / 4096) as u8;
        }
        std::fs::write(dir.path().join("a.raw"), raw).expect("written");
        // B: qcow2 on a qcow2 that has content.
        let base: Vec<u8> = (0..DISK_B).map(|i| (i / 512 % 251) as u8).collect();
        std::fs::write(dir.path().join("base.raw"), base).expect("written");
        qemu_img(&[
            "convert",
            "-q",
            "-O",
            "qcow2",
            &at("base.raw"),
            &at("base.qcow2"),
        ]);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &at("base.qcow2"),
            "-F",
            "qcow2",
            &at("b.qcow2"),
        ]);
        let shared = Path::new("/dev/shm");
        let ram_dir = if shared.is_dir() { shared } else { dir.path() };
        let name = dir
            .path()
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let ram = ram_dir.join(format!("farhaven-test{name}.ram"));
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "pc-q35-7.2,memory-backend=ram0",
                "-accel",
                "tcg",
                "-m",
                "64",
            ])
            .args([
                "-object",
                &format!(
                    "memory-backend-file,id=ram0,size=64M,mem-path={},share=on",
                    ram.display()
                ),
            ])
            .args(["-nodefaults", "-display", "none"])
            .args([
                "-blockdev",
                &format!(
                    "driver=raw,node-name=disk-a,file.driver=file,file.filename={}",
                    at("a.raw")
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=disk-a,bootindex=0"])
            .args([
                "-blockdev",
                &format!(
                    "driver=qcow2,node-name=disk-b,file.driver=file,file.filename={}",
                    at("b.qcow2")
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=disk-b,bootindex=1"])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", at("qmp.sock")),
            ])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", at("qmp2.sock")),
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let vm = Self { child, dir, ram };
        let deadline = Instant::now() + Duration::from_secs(30);
        while vm.counters()[1] < 64 * 20 {
            assert!(
                Instant::now() < deadline,
                "the guest does not work: {:?}",
                vm.counters()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(vm.counters()[2], 0, "the guest's disks give errors");
        vm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Count, last confirmed count on disk, errors.
    fn counters(&self) -> [u32; 3] {
        let ram = std::fs::read(&self.ram).unwrap_or_default();
        [0x600, 0x604, 0x608].map(|at| word(&ram, at))
    }

    fn options(&self, qmp: &str) -> AttachOptions {
        let mut options =
            AttachOptions::new("busy", self.path(qmp), self.path("work"), "peer-1", KEY);
        options.ram = vec![("ram0".to_owned(), self.ram.clone())];
        options.disks = vec![
            ("a".to_owned(), "disk-a".to_owned()),
            ("b".to_owned(), "disk-b".to_owned()),
        ];
        options
    }

    fn attach(&self) -> QemuGuest {
        QemuGuest::attach(self.options("qmp.sock")).expect("attaches")
    }

    fn disk(&self, name: &str, format: &str) -> Vec<u8> {
        let out = self.path("copy.raw");
        let (from, to) = (
            self.path(name).display().to_string(),
            out.display().to_string(),
        );
        qemu_img(&["convert", "-q", "-U", "-f", format, "-O", "raw", &from, &to]);
        std::fs::read(out).expect("reads")
    }

    /// The stopped guest is what the model holds.
    fn assert_is(&self, model: &Model) {
        let ram = std::fs::read(&self.ram).expect("reads");
        assert_same("RAM", &ram, &model.volumes[0]);
        assert_same("disk a", &self.disk("a.raw", "raw"), &model.volumes[1]);
        let mut b = self.disk("b.qcow2", "qcow2");
        b.resize(b.len().next_multiple_of(UNIT), 0);
        assert_same("disk b", &b, &model.volumes[2]);
    }
}

fn assert_same(what: &str, is: &[u8], model: &[u8]) {
    assert_eq!(is.len(), model.len(), "{what}");
    let differ: Vec<usize> = is
        .chunks(UNIT)
        .zip(model.chunks(UNIT))
        .enumerate()
        .filter_map(|(i, (a, b))| (a != b).then_some(i))
        .collect();
    assert!(
        differ.is_empty(),
        "{what}: {} units differ, first {:?}",
        differ.len(),
        &differ[..differ.len().min(5)]
    );
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |w| u32::from_le_bytes(w.try_into().expect("four")))
}

/// The peer: what was handed over is what it holds.
#[derive(Clone)]
struct Model {
    volumes: Vec<Vec<u8>>,
    units: u64,
    refuse_after: u64,
}

impl Model {
    fn new(volumes: &[Volume]) -> Self {
        let bytes = |v: &Volume| vec![0; (v.units() as usize) * UNIT];
        Self {
            volumes: volumes.iter().map(bytes).collect(),
            units: 0,
            refuse_after: u64::MAX,
        }
    }

    fn digests(&self, volume: usize) -> Vec<Digest> {
        let digest = |unit: &[u8]| {
            if unit.iter().all(|b| *b == 0) {
                return Digest::ZERO_UNIT;
            }
            let mut digest = Digest::default();
            digest
                .0
                .copy_from_slice(&blake3::keyed_hash(&KEY, unit).as_bytes()[..16]);
            digest
        };
        self.volumes[volume].chunks(UNIT).map(digest).collect()
    }

    /// Disk and RAM are of one instant: RAM says up to which count disks were
    /// written; at most the one write under way is ahead of it.
    fn assert_one_instant(&self) {
        let ram = &self.volumes[0];
        let (now, confirmed) = (word(ram, 0x600), word(ram, 0x604));
        assert!(
            confirmed <= now && now < confirmed + 128,
            "{confirmed} {now}"
        );
        let slot = |count: u32| {
            let which = count >> 6;
            let at = (64 + 8 * ((which >> 1 & 511) as usize)) * 512;
            (1 + (which & 1) as usize, at)
        };
        for back in 1..100 {
            let Some(count) = confirmed.checked_sub(64 * back).filter(|c| *c >= 64) else {
                break;
            };
            let (volume, at) = slot(count);
            let disk = &self.volumes[volume];
            assert_eq!(
                (word(disk, at), word(disk, at + 0xffc)),
                (count, count),
                "confirmed, {back} back"
            );
        }
        let newest = (0..512)
            .flat_map(|s| [1, 2].map(|v| word(&self.volumes[v], (64 + 8 * s) * 512)))
            .filter(|count| count % 64 == 0 && *count < 1 << 30)
            .max()
            .expect("slots");
        assert!(newest <= now, "a disk is ahead of RAM: {newest} {now}");
        let mut pages = BTreeMap::new();
        for page in 0..128_u32 {
            let at = 0x10000 + page as usize * UNIT;
            pages.insert(word(ram, at), page);
        }
        let last = *pages.keys().next_back().expect("pages");
        assert!(last <= now && now <= last + 1, "RAM is torn: {last} {now}");
    }
}

impl Sink for Model {
    fn units(
        &mut self,
        volume: VolumeIndex,
        unit: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        assert_eq!(bytes.len(), digests.len() * UNIT);
        self.units += digests.len() as u64;
        if self.units > self.refuse_after {
            return Err(SinkError::Full);
        }
        let at = unit as usize * UNIT;
        self.volumes[usize::from(volume)][at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        let at = unit as usize * UNIT;
        self.volumes[usize::from(volume)][at..at + count as usize * UNIT].fill(0);
        Ok(())
    }
}

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
    check_held(&vm, &mut guest, 4, &mut model);
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
    let lost = guest
        .cut(3, After::Continue, &mut model.clone())
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
