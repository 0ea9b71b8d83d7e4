//! A guest without an operating system that keeps writing.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven::guest::qemu::{AttachOptions, QemuGuest};
use farhaven_storage_sync::unit::UNIT;

use crate::support::model::KEY;

pub(crate) const RAM: u64 = 64 << 20;
const DISK_A: u64 = 16 << 20;
/// No multiple of 4 KiB: the last unit is padded.
pub(crate) const DISK_B: u64 = (20 << 20) + 512;

/// A QEMU that ends, with its files, when this is dropped.
pub(crate) struct Vm {
    pub(crate) child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) ram: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.ram);
    }
}

pub(crate) fn has_qemu() -> bool {
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

pub(crate) fn qemu_img(arguments: &[&str]) {
    let status = Command::new("qemu-img")
        .args(arguments)
        .status()
        .expect("qemu-img starts");
    assert!(status.success(), "qemu-img {arguments:?}");
}

impl Vm {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        // A: raw, sparse, with the boot sector and some old content to be overwritten.
        let mut raw = vec![0; DISK_A as usize];
        raw[..512].copy_from_slice(include_bytes!("../busy_boot.bin"));
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Count, last confirmed count on disk, errors.
    pub(crate) fn counters(&self) -> [u32; 3] {
        let ram = std::fs::read(&self.ram).unwrap_or_default();
        [0x600, 0x604, 0x608].map(|at| word(&ram, at))
    }

    pub(crate) fn options(&self, qmp: &str) -> AttachOptions {
        let mut options =
            AttachOptions::new("busy", self.path(qmp), self.path("work"), "peer-1", KEY);
        options.ram = vec![("ram0".to_owned(), self.ram.clone())];
        options.disks = vec![
            ("a".to_owned(), "disk-a".to_owned()),
            ("b".to_owned(), "disk-b".to_owned()),
        ];
        options
    }

    pub(crate) fn attach(&self) -> QemuGuest {
        QemuGuest::attach(self.options("qmp.sock")).expect("attaches")
    }

    /// RAM and both disks, padded to whole units, of the stopped guest.
    pub(crate) fn content(&self) -> Vec<Vec<u8>> {
        let copy = self.path("copy.raw");
        let mut b = raw(&self.path("b.qcow2"), "qcow2", &copy);
        b.resize(b.len().next_multiple_of(UNIT), 0);
        vec![
            std::fs::read(&self.ram).expect("reads"),
            raw(&self.path("a.raw"), "raw", &copy),
            b,
        ]
    }
}

/// What a disk image holds, by way of a copy.
pub(crate) fn raw(image: &Path, format: &str, copy: &Path) -> Vec<u8> {
    let (from, to) = (image.display().to_string(), copy.display().to_string());
    qemu_img(&["convert", "-q", "-U", "-f", format, "-O", "raw", &from, &to]);
    std::fs::read(copy).expect("reads")
}

pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |w| u32::from_le_bytes(w.try_into().expect("four")))
}

/// Disk and RAM are of one instant: RAM says up to which count disks were
/// written; at most the one write under way is ahead of it.
pub(crate) fn assert_one_instant(volumes: &[Vec<u8>]) {
    let ram = &volumes[0];
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
        let disk = &volumes[volume];
        assert_eq!(
            (word(disk, at), word(disk, at + 0xffc)),
            (count, count),
            "confirmed, {back} back"
        );
    }
    let newest = (0..512)
        .flat_map(|s| [1, 2].map(|v| word(&volumes[v], (64 + 8 * s) * 512)))
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
