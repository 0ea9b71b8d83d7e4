//! A WAN inside this process, for the demo and tests: a UDP relay with a rate, a delay,
//! loss, a finite queue and cuts. It needs no root.
//!
//! Clients send to [`Emulator::addr`]. A receiving thread puts every datagram into the
//! forward [`Pipe`]; a sending thread hands it to the target when it comes out. Replies
//! return through the backward pipe, which has a shape and a queue of its own. Each client
//! has its own socket towards the target, so many clients may share the link. Datagrams
//! are received and sent in batches (GRO and GSO), which is what lets one core carry
//! 1 Gbit/s.

mod pipe;
mod port;
mod shape;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_udp::RecvMeta;

use port::{Datagram, Port, RECEIVE_BYTES, send_batches};

pub use pipe::{Pipe, PipeCounters};
pub use shape::{LINK_FORM, LinkShape, LinkShapeError};

/// IPv4 and UDP headers, which a link carries too.
pub const HEADER_BYTES: u64 = 28;
/// The largest UDP payload that passes: an Ethernet path of 1,500 bytes.
pub const LARGEST_PAYLOAD: usize = 1_500 - HEADER_BYTES as usize;

/// Clients that may share one emulator; datagrams of further ones are ignored.
const CLIENT_LIMIT: usize = 256;
/// A sending thread waits this much longer than it must, and so sends several packets at
/// once: a tenth of the CPU for less than half a millisecond of delay.
const GATHER_NANOS: u64 = 300_000;

/// Where to listen, where to relay to, and over what link.
#[derive(Debug, Clone)]
pub struct EmulatorOptions {
    /// Where the clients' datagrams go.
    pub target: SocketAddr,
    /// The link, both ways.
    pub link: LinkShape,
    /// Where clients send to; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Decides which packets are lost.
    pub seed: u64,
}

impl EmulatorOptions {
    /// An emulator before `target` on a free port of the loopback interface.
    pub fn new(target: SocketAddr, link: LinkShape) -> Self {
        Self {
            target,
            link,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            seed: 1,
        }
    }
}

/// Why an emulator did not start.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// The socket for clients could not be opened.
    #[error("the emulated link cannot listen on {addr}: choose a free UDP port, or port 0")]
    Listen {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("no thread for the emulated link: raise the limit on processes (ulimit -u)")]
    Thread(#[source] io::Error),
}

/// A direction of the emulated link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the clients to the target.
    Forward,
    /// From the target to the clients.
    Backward,
}

/// What both directions carried and lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// From the clients to the target.
    pub forward: PipeCounters,
    /// From the target to the clients.
    pub backward: PipeCounters,
}

/// A running emulated link; dropping it stops its threads.
pub struct Emulator {
    addr: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Emulator {
    /// Opens the socket and starts to relay.
    pub fn start(options: EmulatorOptions) -> Result<Self, EmulatorError> {
        let listener = Port::bind(options.listen).map_err(|source| EmulatorError::Listen {
            addr: options.listen,
            source,
        })?;
        let addr = listener.addr;
        let shared = Arc::new(Shared {
            start: Instant::now(),
            target: options.target,
            listener: Arc::new(listener),
            forward: Way::new(options.link, options.seed),
            backward: Way::new(options.link, options.seed.wrapping_add(1)),
            clients: Mutex::new(HashMap::new()),
            stopping: AtomicBool::new(false),
        });
        let mut emulator = Self {
            addr,
            shared,
            threads: Vec::new(),
        };
        emulator.spawn("link-forward", |shared| shared.send_out(&shared.forward))?;
        emulator.spawn("link-backward", |shared| shared.send_out(&shared.backward))?;
        emulator.spawn("link-clients", Shared::receive_from_clients)?;
        Ok(emulator)
    }

    /// Where clients send to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes the link both ways from now on.
    pub fn set(&self, link: LinkShape) {
        self.set_direction(Direction::Forward, link);
        self.set_direction(Direction::Backward, link);
    }

    /// Changes one direction from now on.
    pub fn set_direction(&self, direction: Direction, link: LinkShape) {
        let way = match direction {
            Direction::Forward => &self.shared.forward,
            Direction::Backward => &self.shared.backward,
        };
        lock(&way.pipe).reshape(self.shared.now(), link);
        way.changed.notify_one();
    }

    /// Cuts the link (what is under way is lost) or mends it.
    pub fn cut(&self, cut: bool) {
        let now = self.shared.now();
        lock(&self.shared.forward.pipe).set_cut(now, cut);
        lock(&self.shared.backward.pipe).set_cut(now, cut);
    }

    /// What the link carried and lost so far.
    pub fn counters(&self) -> LinkCounters {
        LinkCounters {
            forward: lock(&self.shared.forward.pipe).counters(),
            backward: lock(&self.shared.backward.pipe).counters(),
        }
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Arc<Shared>) + Send + 'static,
    ) -> Result<(), EmulatorError> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&shared))
            .map_err(EmulatorError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for way in [&self.shared.forward, &self.shared.backward] {
            // Under the lock, so that no thread misses it between its check and its sleep.
            let _pipe = lock(&way.pipe);
            way.changed.notify_all();
        }
        let clients = std::mem::take(&mut *lock(&self.shared.clients));
        let replies = clients.into_values().map(|client| client.replies);
        for thread in self.threads.drain(..).chain(replies) {
            // A thread that panicked has said so already; a drop must not panic again.
            let _ = thread.join();
        }
    }
}

/// One direction: the pipe and the word that it is no longer empty.
struct Way {
    pipe: Mutex<Pipe<Datagram>>,
    changed: Condvar,
}

impl Way {
    fn new(shape: LinkShape, seed: u64) -> Self {
        Self {
            pipe: Mutex::new(Pipe::new(shape, seed)),
            changed: Condvar::new(),
        }
    }
}

struct Client {
    port: Arc<Port>,
    replies: JoinHandle<()>,
}

struct Shared {
    start: Instant,
    target: SocketAddr,
    listener: Arc<Port>,
    forward: Way,
    backward: Way,
    clients: Mutex<HashMap<SocketAddr, Client>>,
    stopping: AtomicBool,
}

impl Shared {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn receive_from_clients(self: &Arc<Self>) {
        let mut buffer = vec![0; RECEIVE_BYTES];
        while !self.stopping() {
            let Some((meta, contents)) = self.listener.receive(&mut buffer) else {
                continue;
            };
            if let Some(port) = self.port_of(meta.addr) {
                self.offer(&self.forward, &port, self.target, meta, &contents);
            }
        }
    }

    fn receive_replies(self: &Arc<Self>, port: &Port, client: SocketAddr) {
        let mut buffer = vec![0; RECEIVE_BYTES];
        while !self.stopping() {
            if let Some((meta, contents)) = port.receive(&mut buffer) {
                self.offer(&self.backward, &self.listener, client, meta, &contents);
            }
        }
    }

    /// The client's own port towards the target; `None` when there are too many clients.
    fn port_of(self: &Arc<Self>, client: SocketAddr) -> Option<Arc<Port>> {
        let mut clients = lock(&self.clients);
        if let Some(known) = clients.get(&client) {
            return Some(known.port.clone());
        }
        if clients.len() >= CLIENT_LIMIT || self.stopping() {
            return None;
        }
        let any_port = SocketAddr::new(self.addr_family(), 0);
        let port = Arc::new(Port::bind(any_port).ok()?);
        let (shared, socket) = (self.clone(), port.clone());
        let replies = thread::Builder::new()
            .name("link-replies".into())
            .spawn(move || shared.receive_replies(&socket, client))
            .ok()?;
        let known = Client {
            port: port.clone(),
            replies,
        };
        clients.insert(client, known);
        Some(port)
    }

    fn addr_family(&self) -> std::net::IpAddr {
        match self.target {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// Puts the datagrams of one reception into a pipe.
    fn offer(
        &self,
        way: &Way,
        port: &Arc<Port>,
        destination: SocketAddr,
        meta: RecvMeta,
        contents: &Bytes,
    ) {
        let stride = meta.stride.max(1);
        let now = self.now();
        let mut pipe = lock(&way.pipe);
        let was_idle = pipe.next().is_none();
        for start in (0..contents.len()).step_by(stride) {
            let datagram = contents.slice(start..contents.len().min(start + stride));
            if datagram.len() > LARGEST_PAYLOAD {
                continue;
            }
            let bytes = datagram.len() as u64 + HEADER_BYTES;
            let datagram = Datagram {
                port: port.clone(),
                destination,
                ecn: meta.ecn,
                contents: datagram,
            };
            pipe.offer(now, bytes, datagram);
        }
        if was_idle {
            way.changed.notify_one();
        }
    }

    /// Sends what comes out of a pipe, until the emulator stops.
    fn send_out(&self, way: &Way) {
        let mut due: Vec<Datagram> = Vec::new();
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let mut pipe = lock(&way.pipe);
        while !self.stopping() {
            let now = self.now();
            due.extend(std::iter::from_fn(|| pipe.take(now)));
            if !due.is_empty() {
                drop(pipe);
                send_batches(&due, &mut buffer);
                due.clear();
                pipe = lock(&way.pipe);
                continue;
            }
            pipe = match pipe.next() {
                None => wait(way.changed.wait(pipe)),
                Some(at) => {
                    let pause = Duration::from_nanos(at.saturating_sub(now) + GATHER_NANOS);
                    wait(way.changed.wait_timeout(pipe, pause)).0
                }
            };
        }
    }
}

/// The lock, also after a panic elsewhere: a pipe is whole between any two calls.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
