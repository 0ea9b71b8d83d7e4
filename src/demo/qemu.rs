//! The demo's QEMU guest: a Debian kernel with a workload that writes memory and
//! disks, checks itself, and counts heartbeats on its serial console.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How to get QEMU.
pub(super) const INSTALL: &str = "apt-get install -y qemu-system-x86 qemu-utils";

/// Finds or makes kernel, initrd and disk.
pub(super) fn image(wanted: Option<&Path>) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = source.join("tests/guest/make");
    let directory = wanted.map_or_else(|| source.join("target/guest"), Path::to_owned);
    let whole = ["vmlinuz", "initrd", "root.qcow2"]
        .iter()
        .all(|f| directory.join(f).is_file());
    if !script.is_file() {
        return if whole {
            Ok(directory)
        } else {
            Err(format!(
                "no guest image in {}, and no script to make one; run tests/guest/make of Farhaven's source, then name its output with --image",
                directory.display()
            ))
        };
    }
    let made = Command::new(&script)
        .arg(&directory)
        .stdout(Stdio::null())
        .status()
        .map_err(|e| format!("{}: {e}", script.display()))?;
    if made.success() {
        Ok(directory)
    } else {
        Err("the guest image could not be made; what is missing is said above".to_owned())
    }
}

/// A QEMU that is ended when this is dropped.
pub(super) struct Machine {
    child: Child,
    /// Its control socket, for the daemon.
    pub(super) qmp: PathBuf,
    _ram: RamFile,
}

impl Machine {
    /// Starts the guest: RAM in `ram`, a root disk (qcow2 on a backing file)
    /// and a raw disk in `directory`.
    pub(super) fn start(
        image: &Path,
        directory: &Path,
        ram: RamFile,
        ram_mib: u64,
        load: &str,
    ) -> Result<Self, String> {
        let at = |name: &str| directory.join(name).display().to_string();
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: std::io::Error| format!("{what}: {e}")
        };
        let overlay = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(image.join("root.qcow2"))
            .arg(at("root.qcow2"))
            .status()
            .map_err(|e| format!("qemu-img: {e}. Install QEMU: {INSTALL}"))?;
        if !overlay.success() {
            return Err("qemu-img could not make the guest's root disk".to_owned());
        }
        let data = File::create(directory.join("data.raw")).map_err(failed("data.raw"))?;
        data.set_len(64 << 20).map_err(failed("data.raw"))?;
        let log = File::create(directory.join("qemu.log")).map_err(failed("qemu.log"))?;
        let mut child = Command::new("qemu-system-x86_64")
            .args([
                "-name",
                "demo",
                "-machine",
                "pc-q35-7.2,memory-backend=ram0",
                "-accel",
                "tcg",
            ])
            .args(["-cpu", "qemu64", "-smp", "1", "-m", &ram_mib.to_string()])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram0,size={ram_mib}M,mem-path={},share=on",
                ram.0.display()
            ))
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=console,path={},server=on,wait=off,logfile={}",
                at("console.sock"),
                at("console.log")
            ))
            .args(["-serial", "chardev:console"])
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(image.join("initrd"))
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 farhaven.load={load}"))
            .arg("-blockdev")
            .arg(format!(
                "driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename={}",
                at("root.qcow2")
            ))
            .args(["-device", "virtio-blk-pci,drive=root,id=disk-root"])
            .arg("-blockdev")
            .arg(format!(
                "driver=raw,node-name=data,file.driver=file,file.filename={}",
                at("data.raw")
            ))
            .args(["-device", "virtio-blk-pci,drive=data,id=disk-data"])
            .args([
                "-netdev",
                "user,id=net0,restrict=on",
                "-device",
                "virtio-net-pci,netdev=net0,id=nic0",
            ])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", at("qmp.sock")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("qemu-system-x86_64: {e}. Install QEMU: {INSTALL}"))?;
        let qmp = directory.join("qmp.sock");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !qmp.exists() {
            if let Ok(Some(status)) = child.try_wait() {
                let words = std::fs::read_to_string(directory.join("qemu.log")).unwrap_or_default();
                return Err(format!("QEMU ended at once ({status}): {words}"));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                return Err("QEMU does not open its control socket".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self {
            child,
            qmp,
            _ram: ram,
        })
    }

    /// Is it there?
    pub(super) fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it as a power cut would.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The guest's RAM, in a file that goes with the demo.
pub(super) struct RamFile(PathBuf);

impl RamFile {
    pub(super) fn new() -> Self {
        let directory = Path::new("/dev/shm");
        let name = format!("farhaven-demo-{}.ram", std::process::id());
        if directory.is_dir() {
            Self(directory.join(name))
        } else {
            Self(std::env::temp_dir().join(name))
        }
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
