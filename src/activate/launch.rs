//! Launches a guest from its definition, and takes care of it until it runs.
//!
//! [`Launched::start`] makes the disks' overlays and starts QEMU, which then
//! waits. [`Launched::restore`] feeds it the device state (memory is in the RAM
//! files already), [`Launched::run`] lets it go. [`Launched::hydrate`] copies
//! what the overlays lack, so that the store is not needed any more. QEMU runs
//! in a session of its own and outlives us; [`Launched::adopt`] finds it again.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::json;

use super::failure::{LaunchError, died, log_path};
use super::hydrate::{make_overlays, streams};
use super::process::{is_alive, left_running, pid_path, runs_with};
use crate::guest::qemu::definition::Definition;
use crate::guest::qemu::instantiate::Placement;
use crate::guest::qemu::peer::is_qemu;
use crate::guest::qemu::qmp::{Qmp, QmpError};

/// For QEMU to start and answer, its disks opened.
const START: Duration = Duration::from_secs(10);
/// For QEMU to take the device state.
const RESTORE: Duration = Duration::from_secs(30);
/// For QEMU to end after `quit`, before it is killed.
const QUIT: Duration = Duration::from_secs(5);
/// A unix socket's path has 108 bytes with its final NUL.
const LONGEST_SOCKET: usize = 107;

/// What to launch, and where its parts are.
pub struct LaunchPlan<'a> {
    /// The guest.
    pub definition: &'a Definition,
    /// Its parts here. RAM files and NBD exports must exist; overlays and the
    /// run directory are made when they do not.
    pub placement: &'a Placement,
    /// Another program than the definition's.
    pub program: Option<&'a Path>,
}

/// A QEMU that we launched.
pub struct Launched {
    pub(super) qmp: Qmp,
    pid: u32,
    /// None when adopted.
    child: Option<Child>,
    run: PathBuf,
    /// Volume name and what `block-stream` calls it, of each disk with something below.
    pub(super) disks: Vec<(String, String)>,
}

impl Launched {
    /// Starts QEMU, which then waits for [`Launched::restore`]. On an error
    /// nothing is left running.
    ///
    /// # Errors
    /// See [`LaunchError`]; QEMU's own words are in it.
    pub fn start(plan: &LaunchPlan) -> Result<Self, LaunchError> {
        let LaunchPlan {
            definition,
            placement,
            program,
        } = *plan;
        let run = &placement.run;
        let file = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| LaunchError::File { what, path, source }
        };
        let arguments = definition.instantiate(placement)?;
        for socket in [&placement.qmp, &incoming_socket(run)] {
            if socket.as_os_str().len() > LONGEST_SOCKET {
                return Err(LaunchError::LongPath(socket.clone()));
            }
        }
        let program = match program {
            Some(program) => program.to_owned(),
            None if is_qemu(&definition.program) => PathBuf::from(&definition.program),
            None => return Err(LaunchError::NotQemu(definition.program.clone())),
        };
        if let Some(pid) = left_running(placement) {
            let qmp = placement.qmp.clone();
            return Err(LaunchError::AlreadyRunning { pid, qmp });
        }
        fs::create_dir_all(run).map_err(file("make the directory", run))?;
        make_overlays(definition, placement)?;
        let _ = fs::remove_file(&placement.qmp);
        let log_path = log_path(run);
        let log = File::create(&log_path).map_err(file("make", &log_path))?;
        let errors = log.try_clone().map_err(file("use", &log_path))?;

        // A session of its own: neither our end nor our terminal's reaches it.
        let child = Command::new("setsid")
            .arg(&program)
            .args(&arguments)
            .current_dir(run)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|source| LaunchError::Program {
                program: program.display().to_string(),
                source,
            })?;
        let pid = child.id();
        let mut starting = Starting(Some(child));
        // Noted before it answers, so that it is found whenever we end.
        let pid_path = pid_path(run);
        fs::write(&pid_path, format!("{pid}\n")).map_err(file("write", &pid_path))?;
        let qmp = starting.await_qmp(&placement.qmp, run)?;
        Ok(Launched {
            qmp,
            pid,
            child: starting.0.take(),
            run: run.clone(),
            disks: streams(definition, placement),
        })
    }

    /// Takes over a QEMU that was launched before a restart of ours; `None` if
    /// it is not there any more.
    ///
    /// # Errors
    /// When its process lives but its QMP socket does not answer.
    pub fn adopt(
        definition: &Definition,
        placement: &Placement,
    ) -> Result<Option<Self>, LaunchError> {
        match Qmp::connect(&placement.qmp, START) {
            Ok(qmp) => {
                let path = placement.qmp.clone();
                let pid = qmp.pid().map_err(|source| LaunchError::File {
                    what: "ask the kernel about",
                    path,
                    source,
                })?;
                let disks = streams(definition, placement);
                Ok(Some(Launched {
                    qmp,
                    pid,
                    child: None,
                    run: placement.run.clone(),
                    disks,
                }))
            }
            Err(error) => match left_running(placement) {
                Some(_) => Err(error.into()),
                None => Ok(None),
            },
        }
    }

    /// Ends a QEMU of that directory that was launched before and was never let go.
    pub fn end_left(qmp: &Path, run: &Path) {
        let Ok(mut left) = Qmp::connect(qmp, START) else {
            return;
        };
        let status = left.execute("query-status", json!({}));
        let Ok(pid) = left.pid() else { return };
        let never_ran = |status: &str| matches!(status, "inmigrate" | "prelaunch");
        if status.is_ok_and(|status| status["status"].as_str().is_some_and(never_ran)) {
            tracing::warn!(pid, "a QEMU that was made ready before a restart is ended");
            Launched {
                qmp: left,
                pid,
                child: None,
                run: run.to_owned(),
                disks: Vec::new(),
            }
            .kill();
        }
    }

    /// Ends a QEMU of that directory that was launched before, whatever it does.
    pub fn end(qmp: &Path, run: &Path) {
        if let Ok(left) = Qmp::connect(qmp, QUIT)
            && let Ok(pid) = left.pid()
        {
            tracing::warn!(pid, "a QEMU that was left here is ended");
            Launched {
                qmp: left,
                pid,
                child: None,
                run: run.to_owned(),
                disks: Vec::new(),
            }
            .kill();
        }
        // It did not answer, or did not end.
        let placement = Placement {
            run: run.to_owned(),
            qmp: qmp.to_owned(),
            ..Placement::default()
        };
        let pid = left_running(&placement).and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Gives QEMU the device state; afterwards the guest is as it was at the
    /// cut, stopped. Memory is read from the RAM files from now on.
    ///
    /// # Errors
    /// When QEMU refuses the state or ends over it; it is of no use any more then.
    pub fn restore(&mut self, device_state: &[u8]) -> Result<(), LaunchError> {
        self.set_capabilities()?;
        let socket = incoming_socket(&self.run);
        let _ = fs::remove_file(&socket);
        self.qmp.execute(
            "migrate-incoming",
            json!({"uri": format!("unix:{}", socket.display())}),
        )?;
        let outcome = self.feed(&socket, device_state);
        let _ = fs::remove_file(&socket);
        outcome
    }

    fn set_capabilities(&mut self) -> Result<(), LaunchError> {
        let capabilities = json!([{"capability": "x-ignore-shared", "state": true}]);
        self.qmp.execute(
            "migrate-set-capabilities",
            json!({"capabilities": capabilities}),
        )?;
        Ok(())
    }

    fn feed(&mut self, socket: &Path, device_state: &[u8]) -> Result<(), LaunchError> {
        let connected = UnixStream::connect(socket).and_then(|stream| {
            stream.set_write_timeout(Some(RESTORE))?;
            Ok(stream)
        });
        let mut stream =
            connected.map_err(|e| self.failed(&format!("its incoming socket refuses: {e}")))?;
        let written = stream.write_all(device_state).and_then(|()| {
            // A state that was cut short must fail, not be waited for.
            stream.shutdown(std::net::Shutdown::Write)
        });
        let deadline = Instant::now() + RESTORE;
        loop {
            let status = match self.qmp.execute("query-status", json!({})) {
                Ok(status) => status,
                Err(error) => return Err(self.failed(&error.to_string())),
            };
            match status["status"].as_str() {
                Some("inmigrate") => {}
                Some("internal-error" | "guest-panicked" | "io-error") | None => {
                    return Err(self.failed(&format!("its status became {}", status["status"])));
                }
                Some(_) => break,
            }
            if let Some(why) = self.refusal()? {
                return Err(self.failed(&why));
            }
            if let Err(error) = &written {
                return Err(self.failed(&format!("it stopped reading the device state: {error}")));
            }
            if Instant::now() > deadline {
                return Err(self.failed(&format!(
                    "the device state was not taken within {RESTORE:?}; it may be cut short"
                )));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        match self.refusal()? {
            Some(why) => Err(self.failed(&why)),
            None => Ok(()),
        }
    }

    /// Why QEMU gave up the incoming state, if it did.
    fn refusal(&mut self) -> Result<Option<String>, LaunchError> {
        let migration = match self.qmp.execute("query-migrate", json!({})) {
            Ok(migration) => migration,
            Err(error) => return Err(self.failed(&error.to_string())),
        };
        let why = migration["error-desc"]
            .as_str()
            .unwrap_or("it does not say why")
            .to_owned();
        Ok((migration["status"] == "failed").then_some(why))
    }

    fn failed(&mut self, why: &str) -> LaunchError {
        // QEMU closes its socket before its last words are written.
        if let Some(child) = &mut self.child {
            let deadline = Instant::now() + Duration::from_millis(500);
            while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        died(&self.run, "refused the device state", why)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// When QEMU refuses; the guest is stopped then.
    pub fn run(&mut self) -> Result<(), LaunchError> {
        self.qmp.execute("cont", json!({}))?;
        let status = self.qmp.execute("query-status", json!({}))?;
        match status["running"] == true {
            true => Ok(()),
            false => Err(died(
                &self.run,
                "does not run",
                &format!("its status is {}", status["status"]),
            )),
        }
    }

    /// Tells the networks where the guest is now.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn announce(&mut self) -> Result<(), LaunchError> {
        self.qmp.execute(
            "announce-self",
            json!({"initial": 50, "max": 550, "rounds": 10, "step": 50}),
        )?;
        Ok(())
    }

    /// Stops the guest; QEMU stays.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn stop(&mut self) -> Result<(), LaunchError> {
        self.qmp.execute("stop", json!({}))?;
        Ok(())
    }

    /// Ends QEMU: asks it to, and kills it if it does not.
    pub fn kill(mut self) {
        let _ = self.qmp.execute("quit", json!({}));
        let deadline = Instant::now() + QUIT;
        while self.is_alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.is_alive() {
            let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid.filter(|_| runs_with(self.pid, self.qmp.path())) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
        let _ = fs::remove_file(pid_path(&self.run));
    }

    /// Closes the control connection; QEMU goes on. Its end is still noticed,
    /// or its process would stay in the table of them.
    pub fn release(self) {
        if let Some(mut child) = self.child {
            std::thread::spawn(move || child.wait());
        }
    }

    /// Does the guest run, by QEMU's word?
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn is_running(&mut self) -> Result<bool, LaunchError> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status["running"] == true)
    }

    /// Draws the first screen into a PNG file.
    ///
    /// # Errors
    /// When the guest has none, or this QEMU cannot write PNG (before 7.1).
    pub fn draw(&mut self, file: &Path) -> Result<(), LaunchError> {
        let arguments = json!({ "filename": file.display().to_string(), "format": "png" });
        self.qmp.execute("screendump", arguments)?;
        Ok(())
    }

    /// Does its process live?
    pub fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => is_alive(self.pid),
        }
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its QMP connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }
}

/// A QEMU that does not answer yet; killed when given up.
struct Starting(Option<Child>);

impl Starting {
    fn await_qmp(&mut self, socket: &Path, run: &Path) -> Result<Qmp, LaunchError> {
        let deadline = Instant::now() + START;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let status = self.0.as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = status {
                return Err(died(
                    run,
                    "did not start",
                    &format!("it ended with {status}"),
                ));
            }
            if left.is_zero() {
                let why = format!(
                    "it does not answer within {START:?}; is its NBD server or storage stuck?"
                );
                return Err(died(run, "did not start", &why));
            }
            match Qmp::connect(socket, left.max(START / 2)) {
                Ok(qmp) => return Ok(qmp),
                Err(QmpError::Connect { .. } | QmpError::Closed { .. } | QmpError::Busy { .. }) => {
                }
                Err(error) => return Err(error.into()),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn incoming_socket(run: &Path) -> PathBuf {
    run.join("incoming.sock")
}
