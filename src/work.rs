//! Work that blocks, and who does it: the one seam between the daemon and the
//! machine's threads.
//!
//! Everything that waits for a disk, a hypervisor or another thread is begun by
//! [`spawn_blocking`], and goes to tokio's threads. Where a simulation set a
//! [`Labour`] for its thread it goes there instead: one piece at a time, in an
//! order that follows from a seed, in virtual time.

use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

/// Who does work that blocks, in place of threads.
pub trait Labour: Send + Sync {
    /// Does `work`; the future ends with it. When the future is dropped before,
    /// the work goes no further than to its next wait.
    fn perform(&self, work: Box<dyn FnOnce() + Send>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// Called from within such work: returns once `poll` is ready.
    fn wait(&self, poll: &mut dyn FnMut(&mut Context<'_>) -> Poll<()>);
}

thread_local! {
    static LABOUR: RefCell<Option<Arc<dyn Labour>>> = const { RefCell::new(None) };
}

/// Who does the work that this thread begins from now on; `None`: tokio's threads.
pub fn set_labour(labour: Option<Arc<dyn Labour>>) {
    LABOUR.with(|kept| *kept.borrow_mut() = labour);
}

fn labour() -> Option<Arc<dyn Labour>> {
    // A thread that ends has none any more.
    let kept = LABOUR.try_with(|kept| kept.borrow().clone());
    kept.ok().flatten()
}

/// Begins work that may block; within a Tokio runtime. It goes on when the
/// handle is dropped.
pub(crate) fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let Some(labour) = labour() else {
        return tokio::task::spawn_blocking(work);
    };
    let done = Arc::new(Mutex::new(None));
    let kept = done.clone();
    let performed = labour.perform(Box::new(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }));
    tokio::spawn(async move {
        performed.await;
        let outcome = done.lock().unwrap_or_else(PoisonError::into_inner).take();
        match outcome {
            Some(Ok(outcome)) => outcome,
            Some(Err(panic)) => resume_unwind(panic),
            None => panic!("work ended without an outcome"),
        }
    })
}

/// Begins work that goes on beside everything else, under this name.
///
/// # Errors
/// When no thread can be had.
pub(crate) fn spawn_beside(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<()> {
    if labour().is_some() {
        drop(spawn_blocking(work));
        return Ok(());
    }
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map(drop)
}

/// Within work that blocks: waits for a future of this runtime.
pub(crate) fn block_on<F: Future>(runtime: &Handle, future: F) -> F::Output {
    let Some(labour) = labour() else {
        return runtime.block_on(future);
    };
    let (mut future, mut outcome) = (pin!(future), None);
    labour.wait(&mut |context| match future.as_mut().poll(context) {
        Poll::Ready(ready) => {
            outcome = Some(ready);
            Poll::Ready(())
        }
        Poll::Pending => Poll::Pending,
    });
    outcome.expect("it waits until the future is ready")
}

/// Within work that blocks: takes the next of a queue; `None` when it is closed.
pub(crate) fn receive<T>(queue: &mut UnboundedReceiver<T>) -> Option<T> {
    if labour().is_none() {
        return queue.blocking_recv();
    }
    block_on(&Handle::current(), queue.recv())
}

/// Within work that blocks: lets this time pass.
pub(crate) fn sleep(time: Duration) {
    match labour() {
        None => std::thread::sleep(time),
        Some(_) => block_on(&Handle::current(), tokio::time::sleep(time)),
    }
}

/// Locks what is held over a wait, as a guest's monitor is while the other guests
/// of its group stop.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    if labour().is_none() {
        return mutex.lock().unwrap_or_else(PoisonError::into_inner);
    }
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            // Whoever holds it goes on only when this one waits.
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(1)),
        }
    }
}

/// Whether what other threads could do beside must be done in place: they would
/// end when they like, and a simulation does the same again.
pub(crate) fn in_place() -> bool {
    labour().is_some()
}

/// CPU time as decisions may rest on it: virtual time has none.
pub(crate) fn cpu_time(measured: Duration) -> Duration {
    match labour() {
        None => measured,
        Some(_) => Duration::ZERO,
    }
}

/// How many threads one piece of work may use.
pub(crate) fn threads() -> usize {
    match labour() {
        None => std::thread::available_parallelism().map_or(2, usize::from),
        Some(_) => 1,
    }
}

/// Wakes all that wait for a change of what a mutex guards.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    threads: Condvar,
    simulated: Notify,
}

impl Bell {
    /// It changed.
    pub(crate) fn ring(&self) {
        self.threads.notify_all();
        self.simulated.notify_waiters();
    }

    /// Within work that blocks: lets go of the guard until the bell rings, for
    /// so long at most, or for no reason.
    pub(crate) fn wait<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> MutexGuard<'a, T> {
        if labour().is_none() {
            let woken = self.threads.wait_timeout(guard, most);
            return woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut rung = pin!(self.simulated.notified());
        // What rings once the guard is gone is heard.
        rung.as_mut().enable();
        drop(guard);
        let _ = block_on(&Handle::current(), tokio::time::timeout(most, rung));
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
