//! The demo's stage: two daemons and the link between them. Everything on it
//! is ended when it is dropped, by process id.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven_policies::site::SiteConfig;
use farhaven_wan::emulate::{Emulator, EmulatorOptions, LinkShape};

use crate::client::Client;
use crate::site::api::{Invite, Invited, Pair};
use crate::site::files;
use crate::site::view::{PeerView, SiteView};

/// One daemon.
pub(super) struct Daemon {
    child: Child,
    pub(super) client: Client,
    pub(super) directory: PathBuf,
    ram: PathBuf,
    /// Most private memory seen, bytes.
    pub(super) memory: u64,
}

impl Daemon {
    fn start(
        name: &str,
        directory: &Path,
        listen: SocketAddr,
        advertise: SocketAddr,
    ) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("{}: {e}", directory.display());
        files::private_directory(directory).map_err(failed)?;
        let ram = directory.join("ram");
        // RAM files belong on a tmpfs; beside the rest where there is none.
        let shared = Path::new("/dev/shm");
        let ram = if shared.is_dir() {
            shared.join(format!("farhaven-demo-{}-{name}", std::process::id()))
        } else {
            ram
        };
        let config = directory.join("site.toml");
        let text = format!(
            "{}\n[listen]\naddress = \"{listen}\"\nadvertise = [\"{advertise}\"]\n[activate]\nram_dir = \"{}\"\n[store]\nmin_free = \"64MiB\"\n",
            SiteConfig::template(name, directory)
                .lines()
                .filter(|l| !l.starts_with('[') || *l == "[site]")
                .collect::<Vec<_>>()
                .join("\n"),
            ram.display()
        );
        std::fs::write(&config, text).map_err(failed)?;
        let log = File::create(directory.join("daemon.log")).map_err(failed)?;
        let program =
            std::env::current_exe().map_err(|e| format!("cannot find my own program: {e}"))?;
        let child = Command::new(program)
            .args(["site", "run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("cannot start a daemon: {e}"))?;
        let client = Client::new(&directory.join("api.sock"));
        Ok(Self {
            child,
            client,
            directory: directory.to_owned(),
            ram,
            memory: 0,
        })
    }

    async fn ready(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if self.client.get::<SiteView>("/v1/status").await.is_ok() {
                return Ok(());
            }
            if !matches!(self.child.try_wait(), Ok(None)) || Instant::now() > deadline {
                return Err(format!("a daemon does not start: {}", self.last_words()));
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// What it knows.
    pub(super) async fn view(&self) -> Result<SiteView, String> {
        let view = self.client.get("/v1/status").await;
        view.map_err(|e| format!("{e}\n{}", self.last_words()))
    }

    /// Directories of what it ran, or is about to run, newest last.
    pub(super) fn activations(&self) -> Vec<PathBuf> {
        let within = |directory: &Path| {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            let mut found: Vec<_> = entries.map(|e| e.path()).filter(|p| p.is_dir()).collect();
            found.sort();
            found
        };
        let guests = within(&self.directory.join("run"));
        guests.iter().flat_map(|guest| within(guest)).collect()
    }

    /// Directory of its RAM files.
    pub(super) fn ram(&self) -> &Path {
        &self.ram
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("daemon.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Notes how much private memory it has now.
    pub(super) fn weigh(&mut self) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let field = |name: &str| -> u64 {
            let status = status.as_deref().unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|l| l.split_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        // RssShmem is the mapped RAM file.
        self.memory = self
            .memory
            .max((field("RssAnon:") + field("RssFile:")) * 1024);
    }

    /// Ends it as a power cut would.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it by SIGTERM, and waits.
    pub(super) async fn terminate(&mut self) -> bool {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(15);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.success();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.kill();
        false
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        // A QEMU outlives the daemon that launched it, on purpose; not the demo.
        for directory in self.activations() {
            end_qemu(&directory);
        }
        let _ = std::fs::remove_dir_all(&self.ram);
    }
}

/// Ends the QEMU that was launched in this directory, if it lives.
fn end_qemu(directory: &Path) {
    let noted = std::fs::read_to_string(directory.join("qemu.pid")).unwrap_or_default();
    let line = std::fs::read(format!("/proc/{}/cmdline", noted.trim())).unwrap_or_default();
    let path = directory.as_os_str().as_encoded_bytes();
    // The number may be another's by now.
    let ours = line.windows(path.len()).any(|window| window == path);
    let pid = noted
        .trim()
        .parse()
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid.filter(|_| ours) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Two paired sites and the link.
pub(super) struct Stage {
    pub(super) east: Daemon,
    pub(super) west: Daemon,
    pub(super) link: Emulator,
}

impl Stage {
    /// Starts both daemons and pairs them over the emulated link.
    pub(super) async fn set(directory: &Path, shape: LinkShape) -> Result<Self, String> {
        let west_at = free_port()?;
        let link =
            Emulator::start(EmulatorOptions::new(west_at, shape)).map_err(|e| e.to_string())?;
        let east_at = free_port()?;
        let mut east = Daemon::start("east", &directory.join("east"), east_at, east_at)?;
        let mut west = Daemon::start("west", &directory.join("west"), west_at, link.addr())?;
        east.ready().await?;
        west.ready().await?;
        let invited: Invited = west
            .client
            .post("/v1/invitations", &Invite { valid_s: 60 })
            .await
            .map_err(|e| e.to_string())?;
        let pair = Pair {
            invitation: invited.invitation,
        };
        let _: PeerView = east
            .client
            .post("/v1/peers", &pair)
            .await
            .map_err(|e| e.to_string())?;
        Ok(Self { east, west, link })
    }
}

fn free_port() -> Result<SocketAddr, String> {
    let socket =
        UdpSocket::bind("127.0.0.1:0").map_err(|e| format!("no UDP port on loopback: {e}"))?;
    socket.local_addr().map_err(|e| e.to_string())
}
