//! A Debian guest in QEMU for tests: started, watched by its console, asked to
//! check itself, and cleaned up by pid whatever happens.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test program uses a part of it"
)]

pub mod cut;
pub mod model;
pub mod place;
pub mod site;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use farhaven::guest::qemu::qmp::Qmp;

/// What a test guest is like.
pub struct GuestOptions {
    /// MiB of memory.
    pub memory: u64,
    /// More for the kernel's command line, as `farhaven.load=noise:8`.
    pub cmdline: String,
    /// More QEMU options.
    pub extra: Vec<String>,
}

impl Default for GuestOptions {
    fn default() -> Self {
        GuestOptions {
            memory: 512,
            cmdline: "farhaven.load=database".to_owned(),
            extra: Vec::new(),
        }
    }
}

/// One heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    pub number: u64,
    pub memory_writes: u64,
    pub disk_writes: u64,
    pub memory: String,
    pub disk: String,
}

/// What the guest said when it had checked everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub beat: u64,
    pub memory: String,
    pub disk: String,
    pub pages: u64,
    pub blocks: u64,
    pub files: u64,
}

impl Check {
    /// Memory and disk are right, and were looked at.
    pub fn is_ok(&self) -> bool {
        self.memory == "ok"
            && self.disk == "ok"
            && self.pages > 1000
            && self.blocks > 1000
            && self.files > 100
    }
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn number(line: &str, name: &str) -> Option<u64> {
    field(line, name)?.parse().ok()
}

/// A guest's console: its log, and the socket that takes requests.
#[derive(Debug, Clone)]
pub struct Console {
    pub log: PathBuf,
    pub socket: PathBuf,
}

impl Console {
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.trim().to_owned()).collect()
    }

    /// The newest heartbeat.
    pub fn last_beat(&self) -> Option<Beat> {
        self.lines().iter().rev().find_map(|line| {
            Some(Beat {
                number: line.strip_prefix("HB ")?.split(' ').next()?.parse().ok()?,
                memory_writes: number(line, "seq")?,
                disk_writes: number(line, "block")?,
                memory: field(line, "mem")?.to_owned(),
                disk: field(line, "disk")?.to_owned(),
            })
        })
    }

    /// Waits until a heartbeat of at least this number was seen.
    pub fn await_beat(&self, number: u64, timeout: Duration) -> Beat {
        let start = Instant::now();
        loop {
            match self.last_beat() {
                Some(beat) if beat.number >= number => return beat,
                last => assert!(
                    start.elapsed() < timeout,
                    "no heartbeat {number} in {timeout:?}, last {last:?}: {:?}",
                    self.lines().last()
                ),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has the guest check everything.
    pub fn check(&self, timeout: Duration) -> Check {
        let checks = || {
            self.lines()
                .into_iter()
                .filter(|line| line.starts_with("CHECK "))
                .collect::<Vec<_>>()
        };
        let before = checks().len();
        let mut socket = UnixStream::connect(&self.socket).expect("the console's socket");
        socket
            .write_all(b"c")
            .expect("the guest's console takes a request");
        let start = Instant::now();
        loop {
            if let Some(line) = checks().get(before) {
                let text = |name| field(line, name).expect("a whole line").to_owned();
                let count = |name| number(line, name).expect("a count");
                let beat = line
                    .split(' ')
                    .nth(1)
                    .and_then(|word| word.parse().ok())
                    .expect("a number");
                return Check {
                    beat,
                    memory: text("mem"),
                    disk: text("disk"),
                    pages: count("pages"),
                    blocks: count("blocks"),
                    // A guest inside of the daemon has none.
                    files: number(line, "files").unwrap_or_default(),
                };
            }
            assert!(
                start.elapsed() < timeout,
                "the guest did not check itself within {timeout:?}"
            );
            // The socket must be read, or QEMU would wait for us.
            let mut rest = [0; 4096];
            socket
                .set_read_timeout(Some(Duration::from_millis(5)))
                .expect("a timeout");
            let _ = std::io::Read::read(&mut socket, &mut rest);
        }
    }
}

/// The guest's kernel, initrd and root disk, made once; or why there are none.
fn images() -> Result<PathBuf, String> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    MADE.get_or_init(|| {
        for program in ["qemu-system-x86_64", "qemu-img"] {
            let found = Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .status();
            if !found.is_ok_and(|status| status.success()) {
                return Err(format!(
                    "{program} is not installed (apt-get install -y qemu-system-x86 qemu-utils)"
                ));
            }
        }
        made_by("tests/guest/make", None)
    })
    .clone()
}

/// The guest's initrd with a guest agent in it, or why there is none.
fn with_agent(images: &Path) -> Result<PathBuf, String> {
    made_by("tests/guest/agent", Some(images))
}

/// What a script of this project makes, and says where; or its words.
fn made_by(script: &str, argument: Option<&Path>) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(root.join(script))
        .args(argument)
        .output()
        .map_err(|e| e.to_string())?;
    match output.status.success() {
        true => Ok(PathBuf::from(
            String::from_utf8_lossy(&output.stdout).trim(),
        )),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// Tells why a test is left out; with CI=true the QEMU tests never are.
pub fn skip(why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "CI=true, but {why}"
    );
    println!("skipped: {why}");
}

/// A running test guest. Ends with the value.
pub struct GuestVm {
    pub console: Console,
    pub qmp: PathBuf,
    pub ram: PathBuf,
    /// qcow2 on the shared root image; the guest's vda.
    pub root_disk: PathBuf,
    /// Raw; the guest's vdb.
    pub data_disk: PathBuf,
    /// Its own copy of the kernel.
    pub kernel: PathBuf,
    child: Child,
}

impl GuestVm {
    /// Starts a guest in a directory (with a short path: there are sockets in
    /// it); `None` if this machine lacks something, which was told.
    pub fn start(directory: &Path, options: &GuestOptions) -> Option<Self> {
        Self::start_with(directory, options, false)
    }

    /// As [`GuestVm::start`], with `qemu-guest-agent` in it, whose channel is
    /// `agent.sock` in the directory.
    pub fn start_with_agent(directory: &Path, options: &GuestOptions) -> Option<Self> {
        Self::start_with(directory, options, true)
    }

    fn start_with(directory: &Path, options: &GuestOptions, agent: bool) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let images = match images() {
            Ok(images) => images,
            Err(why) => {
                skip(&why);
                return None;
            }
        };
        let initrd = match agent {
            true => with_agent(&images),
            false => Ok(images.join("initrd")),
        };
        let initrd = match initrd {
            Ok(initrd) => initrd,
            Err(why) => {
                skip(&why);
                return None;
            }
        };
        let unique = format!(
            "farhaven-test-{}-{}.ram",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let (ram, qmp) = (
            Path::new("/dev/shm").join(unique),
            directory.join("qmp.sock"),
        );
        let (root_disk, data_disk) = (directory.join("root.qcow2"), directory.join("data.raw"));
        let console = Console {
            log: directory.join("console.log"),
            socket: directory.join("console.sock"),
        };
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(images.join("root.qcow2"))
            .arg(&root_disk)
            .status()
            .expect("qemu-img runs");
        assert!(status.success(), "qemu-img makes the root disk");
        std::fs::File::create(&data_disk)
            .and_then(|file| file.set_len(64 << 20))
            .expect("a data disk");
        let kernel = directory.join("vmlinuz");
        std::fs::copy(images.join("vmlinuz"), &kernel).expect("a kernel");
        let (memory, cmdline) = (options.memory, &options.cmdline);
        let path = |path: &Path| path.display().to_string();
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([format!("-{option}"), value]);
        add("name", "farhaven-test".into());
        add("machine", "pc-q35-7.2,memory-backend=ram0".into());
        add("accel", "tcg".into());
        add("m", memory.to_string());
        add(
            "object",
            format!(
                "memory-backend-file,id=ram0,size={memory}M,mem-path={},share=on",
                path(&ram)
            ),
        );
        add("display", "none".into());
        add("kernel", path(&kernel));
        add("initrd", path(&initrd));
        let init = if agent { "rdinit=/agent/init " } else { "" };
        add(
            "append",
            format!("console=ttyS0 quiet panic=-1 {init}{cmdline}"),
        );
        if agent {
            let socket = path(&directory.join("agent.sock"));
            add("device", "virtio-serial-pci".into());
            add(
                "chardev",
                format!("socket,id=agent,path={socket},server=on,wait=off"),
            );
            add(
                "device",
                "virtserialport,chardev=agent,name=org.qemu.guest_agent.0".into(),
            );
        }
        add(
            "blockdev",
            format!(
                "driver=qcow2,node-name=root,file.driver=file,file.filename={}",
                path(&root_disk)
            ),
        );
        add("device", "virtio-blk-pci,drive=root,id=vda".into());
        add(
            "drive",
            format!("id=data,if=none,format=raw,file={}", path(&data_disk)),
        );
        add("device", "virtio-blk-pci,drive=data,id=vdb".into());
        add("netdev", "user,id=net0,restrict=on".into());
        add("device", "virtio-net-pci,netdev=net0,romfile=".into());
        add(
            "chardev",
            format!(
                "socket,id=console,path={},server=on,wait=off,logfile={}",
                path(&console.socket),
                path(&console.log)
            ),
        );
        add("serial", "chardev:console".into());
        add("qmp", format!("unix:{},server=on,wait=off", path(&qmp)));
        let errors = std::fs::File::create(directory.join("qemu.err")).expect("a log");
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(&arguments)
            .args(&options.extra)
            .stdin(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("QEMU starts");
        Some(GuestVm {
            console,
            qmp,
            ram,
            root_disk,
            data_disk,
            kernel,
            child,
        })
    }

    /// A QMP connection; QEMU takes one at a time.
    pub fn connect(&self) -> Qmp {
        let start = Instant::now();
        loop {
            match Qmp::connect(&self.qmp, Duration::from_secs(10)) {
                Ok(qmp) => return qmp,
                Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends QEMU at once, as a power failure would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for GuestVm {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.ram);
    }
}
