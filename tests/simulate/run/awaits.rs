//! Where tasks wait for something: a daemon that dies at such a place does so between
//! two polls of its tasks, with all others of them as they are.
//!
//! tokio tells when a runtime that had nothing to do goes on. From there on the future
//! that the runtime runs to its end wakes itself: it is polled again after each poll of
//! a task, if the runtime is built to look at it so often ([`Awaits::watch`]).

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use tokio::runtime::Builder;

/// Called when the moment has come, with no task being polled.
type Dies = Box<dyn FnOnce() + Send>;

/// Of a daemon's runtime.
#[derive(Clone, Default)]
pub struct Awaits(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    doomed: Option<Doomed>,
    /// Of what the runtime runs to its end.
    waker: Option<Waker>,
}

struct Doomed {
    /// How many more times the runtime goes on after it had nothing to do.
    wakes: u32,
    /// How many polls of tasks there are after that.
    polls: u32,
    dies: Dies,
}

impl Awaits {
    /// This runtime is to be watched.
    pub fn watch(&self, runtime: &mut Builder) {
        let state = self.0.clone();
        runtime.event_interval(1).on_thread_unpark(move || {
            let mut state = state.lock().unwrap();
            let Some(doomed) = &mut state.doomed else {
                return;
            };
            doomed.wakes = doomed.wakes.saturating_sub(1);
            let now = doomed.wakes == 0;
            let waker = state.waker.take_if(|_| now);
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        });
    }

    /// It dies after so many polls, from when the runtime has gone on so many times.
    pub fn die_at(&self, wakes: u32, polls: u32, dies: impl FnOnce() + Send + 'static) {
        let dies = Box::new(dies);
        self.0.lock().unwrap().doomed = Some(Doomed { wakes, polls, dies });
    }

    /// It does not die any more.
    pub fn spare(&self) {
        self.0.lock().unwrap().doomed = None;
    }

    /// Ends when `end` does, or the daemon has died.
    pub async fn until(&self, end: impl Future<Output = ()>) {
        let mut end = pin!(end);
        poll_fn(|context| match self.polled(context.waker()) {
            true => Poll::Ready(()),
            false => end.as_mut().poll(context),
        })
        .await;
    }

    /// Has it died?
    fn polled(&self, waker: &Waker) -> bool {
        let mut state = self.0.lock().unwrap();
        let Some(doomed) = &mut state.doomed else {
            return false;
        };
        if doomed.wakes > 0 {
            state.waker = Some(waker.clone());
            return false;
        }
        if doomed.polls > 0 {
            doomed.polls -= 1;
            waker.wake_by_ref();
            return false;
        }
        let doomed = state.doomed.take();
        drop(state);
        if let Some(doomed) = doomed {
            (doomed.dies)();
        }
        true
    }
}
