//! Work that blocks, one piece at a time: threads that hand a baton to and fro
//! with the runtime, so that never two of them run at once.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use farhaven::work::{Labour, set_labour};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::system::System;

/// Who does a run's blocking work.
pub struct Fibers {
    me: Weak<Fibers>,
    system: Arc<System>,
    idle: Mutex<Vec<Worker>>,
    delays: Mutex<StdRng>,
}

struct Worker {
    orders: Sender<Order>,
    goes: Sender<bool>,
    said: Receiver<Said>,
}

struct Order {
    work: Box<dyn FnOnce() + Send>,
    runtime: Handle,
    wake: Arc<Wake>,
}

enum Said {
    Waits,
    Done,
}

struct Wake(Notify);

impl std::task::Wake for Wake {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

/// Of a worker's thread.
struct Own {
    goes: Receiver<bool>,
    said: Sender<Said>,
    wake: RefCell<Option<Arc<Wake>>>,
    /// The process that the work belongs to was killed.
    dying: Cell<bool>,
}

thread_local! {
    static OWN: RefCell<Option<std::rc::Rc<Own>>> = const { RefCell::new(None) };
}

/// What unwinds the work of a killed process.
struct Killed;

impl Fibers {
    pub fn new(system: &Arc<System>, seed: u64) -> Arc<Fibers> {
        Arc::new_cyclic(|me| Fibers {
            me: me.clone(),
            system: system.clone(),
            idle: Mutex::default(),
            delays: Mutex::new(StdRng::seed_from_u64(seed)),
        })
    }

    /// How long work waits before it begins: mostly a moment, at times a slow disk.
    fn delay(&self) -> Duration {
        let mut random = self.delays.lock().unwrap();
        match random.random_range(0..100) {
            0..60 => Duration::ZERO,
            60..97 => Duration::from_micros(random.random_range(100..4_000)),
            _ => Duration::from_millis(random.random_range(10..150)),
        }
    }

    fn begin(self: &Arc<Self>, work: Box<dyn FnOnce() + Send>) -> Baton {
        let worker = self.idle.lock().unwrap().pop();
        let worker = worker.unwrap_or_else(|| self.hire());
        let wake = Arc::new(Wake(Notify::new()));
        let order = Order {
            work,
            runtime: Handle::current(),
            wake: wake.clone(),
        };
        worker.orders.send(order).unwrap();
        Baton {
            fibers: self.clone(),
            worker: Some(worker),
            wake,
        }
    }

    fn hire(self: &Arc<Self>) -> Worker {
        let (orders, ordered) = channel::<Order>();
        let (goes, going) = channel();
        let (said, saying) = channel();
        let (me, system) = (self.me.clone(), self.system.clone());
        std::thread::spawn(move || {
            system.enter();
            let own = std::rc::Rc::new(Own {
                goes: going,
                said,
                wake: RefCell::default(),
                dying: Cell::new(false),
            });
            OWN.with(|slot| *slot.borrow_mut() = Some(own.clone()));
            while let Ok(order) = ordered.recv() {
                let Some(fibers) = me.upgrade() else { break };
                set_labour(Some(fibers));
                own.dying.set(false);
                *own.wake.borrow_mut() = Some(order.wake);
                {
                    let _within = order.runtime.enter();
                    let _ = catch_unwind(AssertUnwindSafe(order.work));
                }
                *own.wake.borrow_mut() = None;
                set_labour(None);
                drop(order.runtime);
                if own.said.send(Said::Done).is_err() {
                    break;
                }
            }
        });
        Worker {
            orders,
            goes,
            said: saying,
        }
    }
}

impl Labour for Fibers {
    fn perform(&self, work: Box<dyn FnOnce() + Send>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let (delay, fibers) = (self.delay(), self.me.upgrade().unwrap());
        Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let mut baton = fibers.begin(work);
            while baton.waits() {
                baton.wake.0.notified().await;
                baton.go_on();
            }
        })
    }

    fn wait(&self, poll: &mut dyn FnMut(&mut Context<'_>) -> Poll<()>) {
        let own = OWN.with(|own| own.borrow().clone());
        let own = own.expect("only work that blocks waits, and an async task waited");
        let wake = own.wake.borrow().clone().expect("within work");
        let waker = Waker::from(wake);
        loop {
            if own.dying.get() {
                resume_unwind(Box::new(Killed));
            }
            if poll(&mut Context::from_waker(&waker)).is_ready() {
                return;
            }
            let told = own.said.send(Said::Waits);
            if told.is_err() || !own.goes.recv().unwrap_or(false) {
                own.dying.set(true);
            }
        }
    }
}

/// The runtime's end of a piece of work.
struct Baton {
    fibers: Arc<Fibers>,
    worker: Option<Worker>,
    wake: Arc<Wake>,
}

impl Baton {
    /// Runs it until it waits or is done; whether it waits.
    fn waits(&mut self) -> bool {
        let worker = self.worker.as_ref().expect("it is not done");
        if matches!(worker.said.recv(), Ok(Said::Waits)) {
            return true;
        }
        self.fibers.idle.lock().unwrap().extend(self.worker.take());
        false
    }

    fn go_on(&self) {
        let worker = self.worker.as_ref().expect("it is not done");
        let _ = worker.goes.send(true);
    }
}

impl Drop for Baton {
    fn drop(&mut self) {
        let Some(worker) = self.worker.take() else {
            return;
        };
        // Its process was killed: the work unwinds, and is waited for.
        loop {
            let _ = worker.goes.send(false);
            match worker.said.recv() {
                Ok(Said::Waits) => {}
                Ok(Said::Done) => break,
                Err(_) => return,
            }
        }
        self.fibers.idle.lock().unwrap().push(worker);
    }
}
