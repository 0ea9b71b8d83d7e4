//! A cut by hand, and a point served by `qemu-nbd`: what the engine does, in its
//! shortest form, so that launching can be tested by itself.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven::guest::qemu::qmp::Qmp;
use serde_json::json;

const LONG: Duration = Duration::from_secs(90);

/// The device state of a stopped guest, which stays stopped with its disks active.
pub fn device_state(qmp: &mut Qmp, directory: &Path) -> Vec<u8> {
    let capabilities =
        ["x-ignore-shared", "return-path"].map(|name| json!({"capability": name, "state": true}));
    qmp.execute(
        "migrate-set-capabilities",
        json!({"capabilities": capabilities}),
    )
    .unwrap();
    let path = directory.join("migrate.sock");
    let listener = UnixListener::bind(&path).unwrap();
    qmp.execute(
        "migrate",
        json!({"uri": format!("unix:{}", path.display())}),
    )
    .unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut state = Vec::new();
    let complete = |state: &[u8]| {
        (0..state.len().saturating_sub(5)).rev().any(|at| {
            let length = u32::from_be_bytes(state[at + 2..at + 6].try_into().unwrap()) as usize;
            state[at..at + 2] == [0, 6] && state.len() - at - 6 == length
        })
    };
    while !complete(&state) {
        let mut piece = [0; 65536];
        let read = stream.read(&mut piece).unwrap();
        assert!(read > 0, "the stream ended early");
        state.extend_from_slice(&piece[..read]);
    }
    stream.write_all(&[0, 1, 0, 4, 0, 0, 0, 1]).unwrap();
    let start = Instant::now();
    while qmp.execute("query-migrate", json!({})).unwrap()["status"] != "failed" {
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::remove_file(path).unwrap();
    state
}

/// An NBD server of one file; ends with the value.
pub struct Nbd(Child);

impl Nbd {
    pub fn serve(image: &Path, format: &str, socket: &Path, export: &str) -> Self {
        let child = Command::new("qemu-nbd")
            .args([
                "-r",
                "--persistent",
                "--shared=4",
                "-f",
                format,
                "-x",
                export,
                "-k",
            ])
            .args([socket, image])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let server = Nbd(child);
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < LONG, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
