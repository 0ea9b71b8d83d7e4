//! A guest's serial console as files beside it: `console.log` holds all it
//! wrote, whoever connects to `console.sock` sees what it writes from then on
//! and types into it.
//!
//! What the guest writes goes to the log at once and into a bounded buffer,
//! from which one thread serves the readers; what they type goes the other way
//! through another. A full log is set aside as `console.old`, so that a guest
//! that talks without end fills no disk.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A log of this many bytes is set aside, in place of the one before it.
const LONGEST_LOG: u64 = 64 << 20;
/// Readers at a time.
const MOST_READERS: usize = 16;
/// Bytes that wait for the readers.
const MOST_UNREAD: usize = 256 << 10;
/// Typed bytes that wait for the guest.
const MOST_TYPED: usize = 4096;
/// Longest path of a unix socket.
const LONGEST_PATH: usize = 107;

/// A console; ends, and removes its socket, when dropped. The log stays.
pub struct Console {
    shared: Arc<Shared>,
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Wakes the thread: something was written, or it is over.
    wake: EventFd,
    state: Mutex<State>,
}

struct State {
    log: Log,
    /// For the readers.
    written: Vec<u8>,
    /// For the guest.
    typed: VecDeque<u8>,
    readers: usize,
    over: bool,
}

struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    failed: bool,
}

impl Console {
    /// Makes both in a directory.
    ///
    /// # Errors
    /// When they cannot be made; a socket's path has at most 107 bytes.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let socket = directory.join("console.sock");
        let length = socket.as_os_str().len();
        if length > LONGEST_PATH {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} has {length} bytes, but a socket's path at most {LONGEST_PATH}; choose a shorter run directory",
                    socket.display()
                ),
            ));
        }
        let log = Log::open(directory.join("console.log"))?;
        let listener = listen(&socket)?;
        let shared = Arc::new(Shared {
            wake: EventFd::new(EFD_NONBLOCK)?,
            state: Mutex::new(State {
                log,
                written: Vec::new(),
                typed: VecDeque::new(),
                readers: 0,
                over: false,
            }),
        });
        let mut console = Self {
            shared: shared.clone(),
            socket,
            thread: None,
        };
        let mut desk = Desk::new(listener, shared)?;
        console.thread = Some(
            std::thread::Builder::new()
                .name("console".to_owned())
                .spawn(move || {
                    if let Err(error) = desk.serve() {
                        tracing::warn!(%error, "a guest's console takes no more readers; its log goes on");
                    }
                })?,
        );
        Ok(console)
    }

    /// The guest wrote this. Never waits: a reader that does not read loses it.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.shared.state();
        state.log.append(bytes);
        let room = MOST_UNREAD.saturating_sub(state.written.len());
        if state.readers == 0 || room == 0 {
            return;
        }
        let taken = bytes.get(..room.min(bytes.len())).unwrap_or(bytes);
        state.written.extend_from_slice(taken);
        drop(state);
        self.shared.wake();
    }

    /// The next byte typed, if there is one.
    pub fn typed(&self) -> Option<u8> {
        self.shared.state().typed.pop_front()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // One that panicked has ended too.
            let _ = thread.join();
        }
        // Gone already only if somebody else removed it.
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when it is full of wake-ups already.
        let _ = self.wake.write(1);
    }
}

impl Log {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            bytes,
            failed: false,
        })
    }

    fn append(&mut self, bytes: &[u8]) {
        let appended = self.make_room().and_then(|()| self.file.write_all(bytes));
        match appended {
            Ok(()) => {
                self.bytes += bytes.len() as u64;
                self.failed = false;
            }
            // Said once: a full disk must not fill the daemon's own log too.
            Err(error) if !self.failed => {
                tracing::warn!(%error, log = %self.path.display(), "a guest's console is not kept");
                self.failed = true;
            }
            Err(_) => {}
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.bytes >= LONGEST_LOG {
            std::fs::rename(&self.path, self.path.with_extension("old"))?;
            *self = Self::open(self.path.clone())?;
        }
        Ok(())
    }
}

/// Listens, for this user only, in place of a socket whose owner is gone.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!(
                        "{} is the console of a guest that runs; choose another run directory",
                        path.display()
                    ),
                ));
            }
        }
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The thread's own: who reads.
struct Desk {
    epoll: Epoll,
    listener: UnixListener,
    shared: Arc<Shared>,
    readers: BTreeMap<RawFd, UnixStream>,
}

impl Desk {
    fn new(listener: UnixListener, shared: Arc<Shared>) -> io::Result<Self> {
        let desk = Self {
            epoll: Epoll::new()?,
            listener,
            shared,
            readers: BTreeMap::new(),
        };
        desk.watch(desk.listener.as_raw_fd())?;
        desk.watch(desk.shared.wake.as_raw_fd())?;
        Ok(desk)
    }

    fn watch(&self, fd: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, fd as u64);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); MOST_READERS + 2];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in events.iter().take(count) {
                let fd = event.fd();
                if fd == self.listener.as_raw_fd() {
                    self.accept();
                } else if fd == self.shared.wake.as_raw_fd() {
                    // Empty when another wake-up was taken with it.
                    let _ = self.shared.wake.read();
                } else {
                    self.hear(fd);
                }
            }
            let (written, over) = {
                let mut state = self.shared.state();
                (std::mem::take(&mut state.written), state.over)
            };
            if !written.is_empty() {
                self.tell(&written);
            }
            if over {
                return Ok(());
            }
        }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of file descriptors, most likely; others may end and free some.
                    tracing::warn!(%error, "a reader of a console could not be accepted");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    return;
                }
            };
            let fd = stream.as_raw_fd();
            // One more than there may be is closed by dropping it.
            if self.readers.len() < MOST_READERS
                && stream.set_nonblocking(true).is_ok()
                && self.watch(fd).is_ok()
            {
                self.readers.insert(fd, stream);
                self.count();
            }
        }
    }

    fn hear(&mut self, fd: RawFd) {
        let mut bytes = [0; 512];
        let Some(reader) = self.readers.get_mut(&fd) else {
            return;
        };
        match reader.read(&mut bytes) {
            Ok(0) => self.forget(fd),
            Ok(count) => {
                let mut state = self.shared.state();
                let room = MOST_TYPED.saturating_sub(state.typed.len());
                state.typed.extend(bytes.iter().take(count.min(room)));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.forget(fd),
        }
    }

    /// What a reader's socket does not take at once is lost for it.
    fn tell(&mut self, bytes: &[u8]) {
        let mut gone = Vec::new();
        for (fd, reader) in &mut self.readers {
            match reader.write(bytes) {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => gone.push(*fd),
            }
        }
        for fd in gone {
            self.forget(fd);
        }
    }

    fn forget(&mut self, fd: RawFd) {
        // Closing it takes it out of the watched.
        self.readers.remove(&fd);
        self.count();
    }

    fn count(&self) {
        self.shared.state().readers = self.readers.len();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn soon(what: &str, mut done: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn reader(directory: &Path, console: &Console, count: usize) -> UnixStream {
        let stream = UnixStream::connect(directory.join("console.sock")).expect("connects");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        soon("it was not accepted", || {
            console.shared.state().readers == count
        });
        stream
    }

    #[test]
    fn readers_see_it_and_type_and_the_log_keeps_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let console = Console::open(directory.path()).expect("opens");
        console.write(b"before\n");
        let mut first = reader(directory.path(), &console, 1);
        let mut second = reader(directory.path(), &console, 2);
        console.write(b"HB 1\n");
        for reader in [&mut first, &mut second] {
            let mut line = [0; 5];
            reader.read_exact(&mut line).expect("told");
            assert_eq!(&line, b"HB 1\n");
        }
        second.write_all(b"cd").expect("typed");
        soon("nothing was typed", || console.typed() == Some(b'c'));
        soon("half was typed", || console.typed() == Some(b'd'));
        assert_eq!(console.typed(), None);
        drop(second);
        soon("it was not forgotten", || {
            console.shared.state().readers == 1
        });
        assert!(Console::open(directory.path()).is_err(), "it is in use");
        drop(console);
        assert!(!directory.path().join("console.sock").exists());
        assert_eq!(first.read(&mut [0; 8]).expect("ends"), 0);
        let log = directory.path().join("console.log");
        assert_eq!(std::fs::read(log).expect("a log"), b"before\nHB 1\n");
    }

    #[test]
    fn a_reader_that_does_not_read_stops_nobody() {
        let directory = tempfile::tempdir().expect("a directory");
        let console = Console::open(directory.path()).expect("opens");
        let slow = reader(directory.path(), &console, 1);
        let line = [b'x'; 4096];
        let begun = Instant::now();
        for _ in 0..4096 {
            console.write(&line);
        }
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(console.shared.state().written.len() <= MOST_UNREAD);
        let log = directory.path().join("console.log");
        assert_eq!(
            std::fs::metadata(log).expect("a log").len(),
            4096 * line.len() as u64
        );
        drop(slow);
    }

    #[test]
    fn a_typist_who_does_not_stop_fills_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let console = Console::open(directory.path()).expect("opens");
        let mut typist = reader(directory.path(), &console, 1);
        typist
            .write_all(&vec![b'c'; 10 * MOST_TYPED])
            .expect("taken");
        soon("nothing was typed", || {
            console.shared.state().typed.len() == MOST_TYPED
        });
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_long_path_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        drop(UnixListener::bind(directory.path().join("console.sock")).expect("binds"));
        drop(Console::open(directory.path()).expect("the old one's owner is gone"));
        let long = directory.path().join("x".repeat(100));
        std::fs::create_dir(&long).expect("a directory");
        let refused = Console::open(&long).map(|_| ()).expect_err("too long");
        assert!(
            refused.to_string().contains("shorter run directory"),
            "{refused}"
        );
    }

    #[test]
    fn a_long_log_is_set_aside() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("console.log");
        File::create(&path)
            .and_then(|f| f.set_len(LONGEST_LOG))
            .expect("a log");
        let console = Console::open(directory.path()).expect("opens");
        console.write(b"anew");
        drop(console);
        assert_eq!(std::fs::read(&path).expect("a log"), b"anew");
        let old = directory.path().join("console.old");
        assert_eq!(std::fs::metadata(old).expect("kept").len(), LONGEST_LOG);
    }
}
