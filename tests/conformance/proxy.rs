//! Stands between an engine and QEMU's control socket, and has one request fail:
//! refused, or with the connection broken.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Serves until the process ends; one thread per connection.
pub struct Proxy {
    left: Arc<AtomicI64>,
    breaks: Arc<AtomicBool>,
}

/// No request fails.
const NONE: i64 = i64::MAX;
/// One has failed.
const MET: i64 = -1;

impl Proxy {
    pub fn serve(socket: &Path, qemu: &Path) -> Self {
        let listener = UnixListener::bind(socket).expect("listens");
        let left = Arc::new(AtomicI64::new(NONE));
        let breaks = Arc::new(AtomicBool::new(false));
        let (qemu, shared) = (qemu.to_owned(), (left.clone(), breaks.clone()));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&qemu) else {
                    return;
                };
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                    let answers = std::thread::spawn(move || pump(from, to));
                    requests(&client, &server, &shared);
                    let _ = server.shutdown(Shutdown::Both);
                    let _ = client.shutdown(Shutdown::Both);
                    let _ = answers.join();
                });
            }
        });
        Self { left, breaks }
    }

    /// The request after `after` more fails.
    pub fn fail(&self, after: u64, breaks: bool) {
        self.breaks.store(breaks, Ordering::SeqCst);
        self.left.store(after as i64, Ordering::SeqCst);
    }

    /// None fails any more; did one?
    pub fn mend(&self) -> bool {
        self.left.swap(NONE, Ordering::SeqCst) == MET
    }
}

fn pump(mut from: UnixStream, mut to: UnixStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
}

fn requests(
    client: &UnixStream,
    mut server: &UnixStream,
    (left, breaks): &(Arc<AtomicI64>, Arc<AtomicBool>),
) {
    let mut lines = BufReader::new(client);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
        let count = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            (left != NONE && left != MET).then(|| left - 1)
        });
        if count == Ok(0) {
            if breaks.load(Ordering::SeqCst) {
                return;
            }
            let request: serde_json::Value = serde_json::from_str(&line).unwrap();
            let refusal = serde_json::json!({
                "id": request["id"], "error": {"class": "GenericError", "desc": "planted"}});
            let mut client = client;
            let _ = client.write_all(format!("{refusal}\n").as_bytes());
        } else if server.write_all(line.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}
