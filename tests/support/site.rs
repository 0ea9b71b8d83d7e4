//! Whole sites for tests: daemons of the real program, an emulated link
//! between them, the command line. Everything is ended by pid when dropped,
//! QEMUs that the sites launched included.

use std::fs::{self, File};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven::site::view::{ActiveView, PeerView, SiteView, SourceView, TargetView};
use farhaven_wan::emulate::{Emulator, EmulatorOptions, LinkShape};

use super::{Console, GuestVm};

/// What a command printed.
#[derive(Debug)]
pub struct Told {
    pub ok: bool,
    /// Its exit status.
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Told {
    /// It worked.
    #[track_caller]
    pub fn good(self) -> Self {
        assert!(self.ok, "{}{}", self.out, self.err);
        self
    }

    /// It failed, with this in its words.
    #[track_caller]
    pub fn bad(self, words: &str) -> Self {
        assert!(!self.ok, "it worked: {}", self.out);
        assert!(self.err.contains(words), "no '{words}' in: {}", self.err);
        self
    }
}

/// One site: a directory, a configuration, and mostly a daemon.
pub struct TestSite {
    pub name: String,
    pub dir: PathBuf,
    pub listen: SocketAddr,
    /// For the daemon, from its next start on.
    pub environment: Vec<(String, String)>,
    child: Option<Child>,
}

pub fn free_udp() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

impl TestSite {
    /// A site that is set up and does not run yet. `more` is appended to its
    /// configuration: whole tables other than listen.
    pub fn new(
        dir: &Path,
        name: &str,
        listen: SocketAddr,
        advertise: SocketAddr,
        more: &str,
    ) -> Self {
        let dir = dir.join(name);
        let run = Command::new(env!("CARGO_BIN_EXE_farhaven"))
            .args(["site", "init", name, "--dir"])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(
            run.status.success(),
            "{}",
            String::from_utf8_lossy(&run.stderr)
        );
        // The directory's name is unique; other tests run in this process, too.
        let unique = dir.to_string_lossy().replace('/', "-");
        let ram = format!("/dev/shm/farhaven-test-{}{unique}", std::process::id());
        let text = format!(
            "[site]\nname = \"{name}\"\nstate_dir = \"{}\"\n[listen]\naddress = \"{listen}\"\nadvertise = [\"{advertise}\"]\n[activate]\nram_dir = \"{ram}\"\n{more}\n",
            dir.display()
        );
        fs::write(dir.join("site.toml"), text).unwrap();
        Self {
            name: name.to_owned(),
            dir,
            listen,
            environment: Vec::new(),
            child: None,
        }
    }

    pub fn start(&mut self) {
        self.start_silently();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.cli(&["status", "--json"]).ok {
            let ended = self
                .child
                .as_mut()
                .is_none_or(|c| !matches!(c.try_wait(), Ok(None)));
            assert!(
                !ended && Instant::now() < deadline,
                "no daemon: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Starts the daemon without waiting for it.
    pub fn start_silently(&mut self) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("daemon.log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_farhaven"))
            .args(["site", "run", "--config"])
            .arg(self.dir.join("site.toml"))
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("daemon.log")).unwrap_or_default()
    }

    /// Power cut.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The daemon does nothing until it is woken: SIGSTOP.
    pub fn freeze(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    /// SIGCONT.
    pub fn wake(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM; its exit status was good.
    pub fn terminate(&mut self) -> bool {
        let Some(mut child) = self.child.take() else {
            return false;
        };
        let pid = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return status.success(),
                _ if Instant::now() > deadline => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return false;
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until the daemon ended by itself.
    pub fn exit_status(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + patience;
        let child = self.child.as_mut()?;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = child.try_wait() {
                self.child = None;
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// `farhaven --api SOCKET ARGS…`
    pub fn cli(&self, args: &[&str]) -> Told {
        let socket = self.dir.join("api.sock");
        let mut all = vec!["--api", socket.to_str().unwrap()];
        all.extend(args);
        self.cli_alone(&all)
    }

    /// `farhaven ARGS…`
    pub fn cli_alone(&self, args: &[&str]) -> Told {
        let output = Command::new(env!("CARGO_BIN_EXE_farhaven"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Told {
            ok: output.status.success(),
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn view(&self) -> SiteView {
        let told = self.cli(&["status", "--json"]).good();
        serde_json::from_str(&told.out).unwrap()
    }

    pub fn source(&self, guest: &str) -> SourceView {
        self.view()
            .guests
            .into_iter()
            .find(|g| g.name == guest)
            .expect("the guest")
    }

    pub fn target(&self, guest: &str) -> TargetView {
        self.view()
            .standbys
            .into_iter()
            .find(|g| g.name == guest)
            .expect("the guest")
    }

    pub fn peer(&self) -> PeerView {
        self.view().peers.into_iter().next().expect("a peer")
    }

    /// Waits until what is asked of the status is so.
    #[track_caller]
    pub fn until<T>(
        &self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(SiteView) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = wanted(self.view()) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "{}: not within {patience:?}: {what}\n{:#?}\n{}",
                self.name,
                self.view(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until this many points of the guest were sealed since the daemon started.
    #[track_caller]
    pub fn until_sealed(&self, guest: &str, points: u64, patience: Duration) -> SourceView {
        self.until("points sealed", patience, |view| {
            view.guests
                .into_iter()
                .find(|g| g.name == guest && g.points_sealed >= points)
        })
    }

    /// The console of a guest that was taken over here.
    pub fn console_of(active: &ActiveView) -> Console {
        let paths = active.console.clone().expect("it has a console");
        Console {
            log: paths.log,
            socket: paths.socket,
        }
    }
}

impl Drop for TestSite {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("---- log of {}\n{}", self.name, self.log());
        }
        // QEMUs that this site launched note their pid beside their sockets.
        let text = fs::read_to_string(self.dir.join("site.toml")).unwrap_or_default();
        for guest in fs::read_dir(self.dir.join("run"))
            .into_iter()
            .flatten()
            .flatten()
        {
            for term in fs::read_dir(guest.path()).into_iter().flatten().flatten() {
                let pid = fs::read_to_string(term.path().join("qemu.pid")).unwrap_or_default();
                let line = fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
                let ours = self.dir.to_string_lossy().into_owned().into_bytes();
                let ours = line.windows(ours.len()).any(|w| w == ours);
                let pid = pid
                    .trim()
                    .parse()
                    .ok()
                    .and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid.filter(|_| ours) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
        }
        if let Some(ram) = text
            .split("ram_dir = \"")
            .nth(1)
            .and_then(|t| t.split('"').next())
        {
            let _ = fs::remove_dir_all(ram);
        }
    }
}

/// Two running, paired sites; east dials west over the link.
pub struct Pair {
    pub east: TestSite,
    pub west: TestSite,
    pub link: Emulator,
    pub dir: tempfile::TempDir,
}

impl Pair {
    /// `more_*` as in [`TestSite::new`].
    pub fn start(link: &str, more_east: &str, more_west: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("fh").tempdir().unwrap();
        let shape: LinkShape = link.parse().unwrap();
        let (east_at, west_at) = (free_udp(), free_udp());
        let link = Emulator::start(EmulatorOptions::new(west_at, shape)).unwrap();
        let mut east = TestSite::new(dir.path(), "east", east_at, east_at, more_east);
        let mut west = TestSite::new(dir.path(), "west", west_at, link.addr(), more_west);
        east.start();
        west.start();
        let invited = west.cli(&["pair", "--json"]).good();
        let invited: serde_json::Value = serde_json::from_str(&invited.out).unwrap();
        east.cli(&["pair", invited["invitation"].as_str().unwrap()])
            .good();
        Self {
            east,
            west,
            link,
            dir,
        }
    }

    /// Adds a guest at east, once it works, and protects it to west.
    #[track_caller]
    pub fn protect(&self, name: &str, guest: &GuestVm, rpo: &str) {
        guest.console.await_beat(20, Duration::from_secs(120));
        let qmp = guest.qmp.to_str().unwrap();
        self.east.cli(&["guest", "add", name, "--qmp", qmp]).good();
        self.east
            .cli(&["protect", name, "--to", "west", "--rpo", rpo])
            .good();
    }
}
