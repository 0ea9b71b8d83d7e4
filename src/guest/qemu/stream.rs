//! The device state: QEMU's migration stream of a stopped guest, without RAM.
//!
//! With `x-ignore-shared` the stream is some 300 KB of device sections, ends
//! with a JSON description, and then QEMU waits on the return path. The answer
//! there decides: SHUT with an error makes QEMU take everything back, and the
//! guest is as it was, stopped. The bytes are opaque to us and go to the peer
//! as they are.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::GuestError;

/// Return path message: type SHUT, 4 bytes, an error.
const SHUT_WITH_ERROR: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 1];

/// Longest wait for QEMU to connect.
const CONNECT: Duration = Duration::from_secs(2);

/// Where QEMU delivers one stream.
pub(super) struct Inlet {
    listener: UnixListener,
    path: std::path::PathBuf,
}

impl Inlet {
    /// Listens at `path`, replacing what a dead daemon left there.
    pub(super) fn open(path: &Path) -> Result<Self, GuestError> {
        let failed = |source| GuestError::Io {
            what: format!(
                "listening at {} for the guest's device state (the run directory must be writable)",
                path.display()
            ),
            source,
        };
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// What `migrate` is told.
    pub(super) fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Takes the whole stream, at most `limit` bytes, and has QEMU take the
    /// guest back. The caller then waits for the migration's status `failed`.
    pub(super) fn receive(&self, limit: usize, timeout: Duration) -> Result<Taken, GuestError> {
        let failed = |source| GuestError::Io {
            what: "taking the guest's device state".to_owned(),
            source,
        };
        let deadline = Instant::now() + timeout;
        // QEMU connects at once or not at all, and the guest stands still meanwhile.
        let connected_by = Instant::now() + timeout.min(CONNECT);
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() >= connected_by {
                        return Err(GuestError::State(format!(
                            "QEMU did not connect to {} to deliver its device state; may its user reach that directory?",
                            self.path.display()
                        )));
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(e) => return Err(failed(e)),
            }
        };
        stream.set_nonblocking(false).map_err(failed)?;
        Taken::off(stream, limit, timeout, deadline)
    }
}

impl Taken {
    /// Reads a stream to its end and has QEMU take the guest back.
    fn off(
        mut stream: UnixStream,
        limit: usize,
        timeout: Duration,
        deadline: Instant,
    ) -> Result<Self, GuestError> {
        let failed = |source| GuestError::Io {
            what: "taking the guest's device state".to_owned(),
            source,
        };
        let mut data: Vec<u8> = Vec::with_capacity(1 << 20);
        let mut piece = vec![0; 256 << 10];
        while !is_complete(&data) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GuestError::State(format!(
                    "QEMU did not finish its device state within {timeout:?}; it may be stuck on storage"
                )));
            }
            stream.set_read_timeout(Some(left)).map_err(failed)?;
            let count = match stream.read(&mut piece) {
                Ok(0) => {
                    return Err(GuestError::State(
                        "QEMU ended its device state early; its own log (or query-migrate) says why: usually a device that cannot be migrated".to_owned(),
                    ));
                }
                Ok(count) => count,
                Err(e) if is_timeout(&e) => continue,
                Err(e) => return Err(failed(e)),
            };
            if data.len() + count > limit {
                return Err(GuestError::State(format!(
                    "the device state is larger than {limit} bytes: does QEMU send RAM in it? Every RAM block must be a memory-backend-file with share=on"
                )));
            }
            data.extend_from_slice(&piece[..count]);
        }
        stream.write_all(&SHUT_WITH_ERROR).map_err(failed)?;
        Ok(Self { data, stream })
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A device state whose stream QEMU has not closed yet.
pub(super) struct Taken {
    data: Vec<u8>,
    stream: UnixStream,
}

impl Taken {
    /// The device state, once QEMU has closed the stream. Bytes that still came
    /// mean that the end was a forgery inside a device's own bytes.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, GuestError> {
        let _ = self.stream.set_read_timeout(Some(Duration::from_secs(2)));
        let mut more = [0; 64];
        loop {
            match self.stream.read(&mut more) {
                Ok(0) => return Ok(self.data),
                Ok(_) => {
                    return Err(GuestError::State(
                        "QEMU went on after the end of its device state; the cut was given up"
                            .to_owned(),
                    ));
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(self.data),
                Err(source) => {
                    return Err(GuestError::Io {
                        what: "waiting for QEMU to close its device state".to_owned(),
                        source,
                    });
                }
            }
        }
    }
}

pub(super) fn is_timeout(e: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(e.kind(), WouldBlock | TimedOut | Interrupted)
}

/// The stream ends with 00 (end of file), 06 (description), a big-endian u32
/// length and that much JSON. JSON text has no byte under 0x20 but line ends
/// and tabs, so its start is found from the end, in one pass over the text.
fn is_complete(data: &[u8]) -> bool {
    if data.last() != Some(&b'}') || !data.starts_with(b"QEVM") {
        return false;
    }
    let text = |b: &u8| *b >= 0x20 || matches!(b, b'\n' | b'\r' | b'\t');
    let first = data.len() - data.iter().rev().take_while(|b| text(b)).count();
    // Low bytes of the length may look like text: the JSON starts a little later.
    for from in first..=first + 4 {
        let Some(length) = data.len().checked_sub(from) else {
            return false;
        };
        let header = from.checked_sub(6).and_then(|at| data.get(at..from));
        if let Some([0, 6, length_bytes @ ..]) = header
            && length_bytes
                .iter()
                .fold(0, |sum, b| sum << 8 | u64::from(*b))
                == length as u64
            && data.get(from) == Some(&b'{')
        {
            return true;
        }
    }
    false
}

/// The end of a stream, and now and then a whole one off a socket.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(
    bytes: &[u8],
    said: impl Fn() -> Option<(UnixStream, UnixStream)>,
    timeout: Duration,
) {
    const LIMIT: usize = 2048;
    let complete = is_complete(bytes);
    if complete {
        assert!(bytes.starts_with(b"QEVM") && bytes.ends_with(b"}"));
    }
    // A socket costs a hundred times as much as a look at the bytes.
    if !(complete || bytes.len() % 16 == 3) {
        return;
    }
    if let Some((ours, _theirs)) = said()
        && let Ok(taken) = Taken::off(ours, LIMIT, timeout, Instant::now() + timeout)
    {
        assert!(taken.data.len() <= LIMIT && is_complete(&taken.data));
        assert!(bytes.starts_with(&taken.data));
        let _ = taken.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(body: &[u8], json: &str) -> Vec<u8> {
        let mut data = b"QEVM\0\0\0\x03".to_vec();
        data.extend(body);
        data.extend([0, 6]);
        data.extend((json.len() as u32).to_be_bytes());
        data.extend(json.as_bytes());
        data
    }

    proptest! {
        #[test]
        fn the_end_is_seen_and_only_there(
            body in proptest::collection::vec(any::<u8>(), 0..300),
            fill in 0_usize..9000,
        ) {
            let json = format!("{{\"page_size\": 4096, \"devices\": [\n\"{}\"]}}", "x".repeat(fill));
            let data = stream(&body, &json);
            prop_assert!(is_complete(&data));
            for cut in 1..json.len().min(400) {
                prop_assert!(!is_complete(&data[..data.len() - cut]));
            }
        }

        #[test]
        fn any_bytes_are_judged_without_panic(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut stream = b"QEVM".to_vec();
            stream.extend(&data);
            stream.push(b'}');
            let _ = is_complete(&stream);
        }
    }

    fn receive(send: impl FnOnce(UnixStream) + Send + 'static) -> Result<Vec<u8>, GuestError> {
        let dir = tempfile::tempdir().expect("a directory");
        let inlet = Inlet::open(&dir.path().join("state.sock")).expect("listens");
        let path = inlet.path.clone();
        let sender = std::thread::spawn(move || send(UnixStream::connect(path).expect("connects")));
        let taken = inlet
            .receive(4096, Duration::from_millis(500))
            .and_then(Taken::finish);
        sender.join().expect("the sender ends");
        taken
    }

    #[test]
    fn a_whole_stream_is_taken_and_answered() {
        let state = stream(b"devices", "{\"devices\": []}");
        let sent = state.clone();
        let taken = receive(move |mut s| {
            for piece in sent.chunks(5) {
                s.write_all(piece).expect("sends");
            }
            let mut answer = [0; 8];
            s.read_exact(&mut answer)
                .expect("the return path is answered");
            assert_eq!(answer, SHUT_WITH_ERROR);
        });
        assert_eq!(taken.expect("complete"), state);
    }

    #[test]
    fn an_early_end_a_flood_and_silence_are_errors() {
        let early = receive(|mut s| s.write_all(b"QEVM....").expect("sends"));
        assert!(early.expect_err("incomplete").to_string().contains("early"));
        let flood = receive(|mut s| {
            let _ = s.write_all(&[b'x'; 9000]);
        });
        assert!(
            flood
                .expect_err("too long")
                .to_string()
                .contains("share=on")
        );
        let silent = receive(|s| {
            std::thread::sleep(Duration::from_millis(700));
            drop(s);
        });
        assert!(
            silent
                .expect_err("nothing came")
                .to_string()
                .contains("500ms")
        );
    }

    #[test]
    fn bytes_after_the_end_are_refused() {
        let state = stream(b"", "{\"devices\": []}");
        let taken = receive(move |mut s| {
            s.write_all(&state).expect("sends");
            let mut answer = [0; 8];
            s.read_exact(&mut answer).expect("answered");
            s.write_all(b"more").expect("sends");
        });
        assert!(taken.is_err());
    }
}
