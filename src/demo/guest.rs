//! The demo's guest: a Debian kernel with a workload that writes memory and
//! disks, checks itself, and counts heartbeats on its serial console.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// RAM of the guest.
pub(super) const RAM_MIB: u64 = 512;

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
    /// Its console.
    pub(super) console: Console,
}

impl Machine {
    /// Starts the guest: RAM in `ram`, a root disk (qcow2 on a backing file)
    /// and a raw disk in `directory`.
    pub(super) fn start(
        image: &Path,
        directory: &Path,
        ram: &Path,
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
            .map_err(|e| {
                format!(
                    "qemu-img: {e}. Install QEMU: apt-get install -y qemu-system-x86 qemu-utils"
                )
            })?;
        if !overlay.success() {
            return Err("qemu-img could not make the guest's root disk".to_owned());
        }
        let data = File::create(directory.join("data.raw")).map_err(failed("data.raw"))?;
        data.set_len(64 << 20).map_err(failed("data.raw"))?;
        let log = File::create(directory.join("qemu.log")).map_err(failed("qemu.log"))?;
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-name", "demo", "-machine", "pc-q35-7.2,memory-backend=ram0", "-accel", "tcg"])
            .args(["-cpu", "qemu64", "-smp", "1", "-m", &RAM_MIB.to_string()])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram0,size={RAM_MIB}M,mem-path={},share=on",
                ram.display()
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
            .args(["-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,id=nic0"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", at("qmp.sock")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("qemu-system-x86_64: {e}. Install QEMU: apt-get install -y qemu-system-x86 qemu-utils"))?;
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
        let console = Console::open(
            &directory.join("console.sock"),
            &directory.join("console.log"),
        );
        Ok(Self {
            child,
            qmp,
            console,
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

/// A line that begins with `HB`.
#[derive(Debug, Clone)]
pub(super) struct Heartbeat {
    pub(super) number: u64,
    pub(super) at: Instant,
    pub(super) line: String,
}

/// A guest's serial console: read from its log, written through its socket.
pub(super) struct Console {
    socket: PathBuf,
    log: PathBuf,
    read: u64,
    partial: String,
    /// Newest heartbeat seen.
    pub(super) last: Option<Heartbeat>,
    /// First heartbeat seen.
    pub(super) first: Option<Heartbeat>,
    /// Newest answer to a full check.
    pub(super) check: Option<String>,
}

impl Console {
    pub(super) fn open(socket: &Path, log: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            log: log.to_owned(),
            read: 0,
            partial: String::new(),
            last: None,
            first: None,
            check: None,
        }
    }

    /// Reads what is new.
    pub(super) fn poll(&mut self) {
        let Ok(mut file) = File::open(&self.log) else {
            return;
        };
        let mut bytes = Vec::new();
        if file.seek(SeekFrom::Start(self.read)).is_err() || file.read_to_end(&mut bytes).is_err() {
            return;
        }
        let at = Instant::now();
        self.read += bytes.len() as u64;
        self.partial.push_str(&String::from_utf8_lossy(&bytes));
        while let Some(end) = self.partial.find('\n') {
            let line = self.partial[..end].trim_end().to_owned();
            self.partial.drain(..=end);
            let number = line
                .strip_prefix("HB ")
                .and_then(|l| l.split(' ').next()?.parse().ok());
            if let Some(number) = number {
                let beat = Heartbeat { number, at, line };
                self.first.get_or_insert_with(|| beat.clone());
                self.last = Some(beat);
            } else if line.starts_with("CHECK ") {
                self.check = Some(line);
            }
        }
    }

    /// Waits for something on the console.
    pub(super) async fn wait<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Console) -> Option<T>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + patience;
        loop {
            self.poll();
            if let Some(found) = wanted(self) {
                return Ok(found);
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "the guest's console shows no {what} within {patience:?}; last: {}",
                    self.last.as_ref().map_or("nothing", |b| &b.line)
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Has the guest check all its memory and disks; its answer.
    pub(super) async fn full_check(&mut self) -> Result<String, String> {
        self.check = None;
        let mut stream = UnixStream::connect(&self.socket)
            .map_err(|e| format!("the guest's console {}: {e}", self.socket.display()))?;
        stream
            .write_all(b"c")
            .map_err(|e| format!("the guest's console: {e}"))?;
        // A console that nobody reads stops the guest that writes to it.
        let mut unread = stream
            .try_clone()
            .map_err(|e| format!("the guest's console: {e}"))?;
        let reading = std::thread::spawn(move || std::io::copy(&mut unread, &mut std::io::sink()));
        let answer = self.wait_for_check().await;
        let _ = stream.shutdown(std::net::Shutdown::Both);
        let _ = reading.join();
        answer
    }

    async fn wait_for_check(&mut self) -> Result<String, String> {
        self.wait("answer to a full check", Duration::from_secs(120), |c| {
            c.check.clone()
        })
        .await
    }
}
