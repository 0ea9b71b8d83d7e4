//! The link: datagrams between the sites that are late, lost, repeated, out of
//! order, or not carried at all.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use farhaven_wan::link::Port;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{Sleep, sleep_until};

use super::system::System;

/// Bytes that wait at the narrow end at most, as a router keeps them.
const QUEUE_BYTES: u64 = 256 << 10;

/// What the link does to datagrams, each way alike.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Least time on the way, in nanoseconds.
    pub delay: u64,
    /// Most that is added to it by chance: more than the pause between two
    /// datagrams changes their order.
    pub jitter: u64,
    /// Of a thousand, how many are lost and how many come twice.
    pub lost: u32,
    pub twice: u32,
    /// Bytes a second.
    pub rate: u64,
}

struct Wires {
    system: Arc<System>,
    random: StdRng,
    shape: Shape,
    inboxes: BTreeMap<SocketAddr, Inbox>,
    /// Senders whose datagrams are not carried.
    cut: BTreeMap<SocketAddr, bool>,
    /// When the narrow end of a sender's way is free again.
    busy: BTreeMap<SocketAddr, u64>,
    order: u64,
    carried: u64,
    dropped: u64,
    digest: blake3::Hasher,
    /// Of each process, bytes that it handed over, less those that it was handed.
    handed_over: BTreeMap<u64, i64>,
    keeps: bool,
}

#[derive(Default)]
struct Inbox {
    /// By due time, then order.
    waiting: BTreeMap<(u64, u64), (SocketAddr, Bytes)>,
    waker: Option<Waker>,
    process: u64,
    /// What is kept of what came, with [`Fault::Memory`].
    kept: Vec<Bytes>,
}

/// All of the wires.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Wires>>);

impl Network {
    pub fn new(system: &Arc<System>, seed: u64, shape: Shape) -> Network {
        Network(Arc::new(Mutex::new(Wires {
            system: system.clone(),
            random: StdRng::seed_from_u64(seed),
            shape,
            inboxes: BTreeMap::new(),
            cut: BTreeMap::new(),
            busy: BTreeMap::new(),
            order: 0,
            carried: 0,
            dropped: 0,
            digest: blake3::Hasher::new(),
            handed_over: BTreeMap::new(),
            keeps: false,
        })))
    }

    /// A deliberate fault: what comes is never freed, and kept a hundred times.
    pub fn keep_all(&self) {
        self.0.lock().unwrap().keeps = true;
    }

    /// Bytes of memory that a process took for others, less those that others took for it.
    pub fn handed_over(&self, process: u64) -> i64 {
        let wires = self.0.lock().unwrap();
        wires.handed_over.get(&process).copied().unwrap_or(0)
    }

    /// A process of this number opens the port of an address.
    pub fn open(&self, address: SocketAddr, process: u64) -> Arc<dyn Port> {
        let inbox = Inbox {
            process,
            ..Inbox::default()
        };
        self.0.lock().unwrap().inboxes.insert(address, inbox);
        Arc::new(SimulatedPort {
            network: self.clone(),
            address,
            process,
            timer: Mutex::default(),
        })
    }

    /// Its process is gone.
    pub fn close(&self, address: SocketAddr) {
        self.0.lock().unwrap().inboxes.remove(&address);
    }

    /// Nothing of this sender is carried, or all is again.
    pub fn cut(&self, from: SocketAddr, cut: bool) {
        self.0.lock().unwrap().cut.insert(from, cut);
    }

    pub fn is_cut(&self, from: SocketAddr) -> bool {
        let wires = self.0.lock().unwrap();
        wires.cut.get(&from).copied().unwrap_or(false)
    }

    pub fn reshape(&self, shape: Shape) {
        self.0.lock().unwrap().shape = shape;
    }

    /// Datagrams may have come for this address since it last had its turn.
    pub fn rouse(&self, address: SocketAddr) {
        let mut wires = self.0.lock().unwrap();
        let waker = wires.inboxes.get_mut(&address).and_then(|i| i.waker.take());
        drop(wires);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Datagrams carried and dropped, and a digest of when and how long they were.
    pub fn sum(&self) -> (u64, u64, blake3::Hash) {
        let wires = self.0.lock().unwrap();
        (wires.carried, wires.dropped, wires.digest.finalize())
    }

    fn send(&self, from: SocketAddr, process: u64, to: SocketAddr, datagram: &[u8]) {
        let mut wires = self.0.lock().unwrap();
        let wires = &mut *wires;
        let now = wires.system.now();
        let alive = wires
            .inboxes
            .get(&from)
            .is_some_and(|i| i.process == process);
        if !alive {
            return;
        }
        wires.digest.update(&now.to_le_bytes());
        wires.digest.update(&(datagram.len() as u64).to_le_bytes());
        let shape = wires.shape;
        let cut = wires.cut.get(&from).copied().unwrap_or(false);
        let lost = wires.random.random_range(0..1000) < shape.lost;
        let copies = match wires.random.random_range(0..1000) < shape.twice {
            true => 2,
            false => 1,
        };
        let busy = wires.busy.entry(from).or_default();
        let begins = now.max(*busy);
        let full = (begins - now) * shape.rate / 1_000_000_000 > QUEUE_BYTES;
        if cut || lost || full {
            wires.dropped += 1;
            return;
        }
        *busy = begins + datagram.len() as u64 * 1_000_000_000 / shape.rate;
        let leaves = *busy;
        for _ in 0..copies {
            let late = match shape.jitter {
                0 => 0,
                most => wires.random.random_range(0..most),
            };
            wires.order += 1;
            let key = (leaves + shape.delay + late, wires.order);
            let content = (from, Bytes::copy_from_slice(datagram));
            if let Some(inbox) = wires.inboxes.get_mut(&to) {
                inbox.waiting.insert(key, content);
                wires.carried += 1;
                *wires.handed_over.entry(process).or_default() += datagram.len() as i64;
            }
        }
    }
}

/// A process's end of a wire.
struct SimulatedPort {
    network: Network,
    address: SocketAddr,
    process: u64,
    timer: Mutex<Option<Pin<Box<Sleep>>>>,
}

impl fmt::Debug for SimulatedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimulatedPort({})", self.address)
    }
}

impl Port for SimulatedPort {
    fn local_addr(&self) -> SocketAddr {
        self.address
    }

    fn send(&self, to: SocketAddr, datagram: &[u8]) {
        self.network.send(self.address, self.process, to, datagram);
    }

    fn poll_receive(&self, context: &mut Context<'_>) -> Poll<(SocketAddr, Bytes)> {
        let mut timer = self.timer.lock().unwrap();
        loop {
            let mut held = self.network.0.lock().unwrap();
            let wires = &mut *held;
            let now = wires.system.now();
            let system = wires.system.clone();
            let Some(inbox) = wires.inboxes.get_mut(&self.address) else {
                return Poll::Pending;
            };
            if inbox.process != self.process {
                return Poll::Pending;
            }
            let Some((&(due, _), _)) = inbox.waiting.first_key_value() else {
                inbox.waker = Some(context.waker().clone());
                *timer = None;
                return Poll::Pending;
            };
            if due <= now
                && let Some((_, content)) = inbox.waiting.pop_first()
            {
                let length = content.1.len();
                if wires.keeps {
                    let copies = (0..100).map(|_| Bytes::copy_from_slice(&content.1));
                    inbox.kept.extend(copies);
                }
                *wires.handed_over.entry(self.process).or_default() -= length as i64;
                return Poll::Ready(content);
            }
            inbox.waker = Some(context.waker().clone());
            drop(held);
            let at = tokio::time::Instant::from_std(system.not_before(due));
            let mut sleep = Box::pin(sleep_until(at));
            if sleep.as_mut().poll(context).is_pending() {
                *timer = Some(sleep);
                return Poll::Pending;
            }
        }
    }
}
