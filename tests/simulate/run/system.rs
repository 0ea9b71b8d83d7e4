//! Time and chance below the standard library: what `clock_gettime` and
//! `getrandom` answer to the threads of a run.
//!
//! A program takes the time, keys of hash maps and random numbers from dozens of
//! places, many of them in libraries. All of these end in two calls of libc, and
//! those this module answers: with the virtual time of the tokio runtime that
//! the thread is in, and from the run's seed. Threads that belong to no run get
//! the system's answers. See docs/decisions/0020-simulated-time.md.

#![allow(
    unsafe_code,
    reason = "two calls of libc are answered here, by their C interface"
)]

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use super::world::MS;

/// The monotonic clock at virtual time 0, in seconds: some days after a boot.
const BOOTED: u64 = 1_000_000;
/// The wall clock at virtual time 0, in seconds since 1970.
const WALL: u64 = 1_800_000_000;
const MILLION: i64 = 1_000_000;

/// The clocks of a site.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    /// How far its wall clock is off, in nanoseconds.
    pub wall: i64,
    /// Its time goes so many parts in a million too fast.
    pub pace: i64,
    /// Since when it does so: a time that is the same to the site and to all others.
    pub started: u64,
}

impl Clock {
    /// How far the site has come at a virtual time, as it counts: whole milliseconds, as a
    /// runtime waits for no less.
    pub fn comes_to(&self, at: u64) -> u64 {
        match self.pace {
            0 => at,
            _ => self.started + self.counts(at - self.started) / MS * MS,
        }
    }

    /// The first time of the site, as it counts, that is not before a virtual time.
    fn not_before(&self, at: u64) -> u64 {
        match self.pace {
            0 => at,
            _ => self.started + self.counts(at.saturating_sub(self.started)) + 2,
        }
    }

    /// The virtual time that the site calls so.
    fn called(&self, here: u64) -> u64 {
        let since = u128::from(here.saturating_sub(self.started));
        match self.pace {
            0 => here,
            _ => self.started + (since * MILLION as u128 / (MILLION + self.pace) as u128) as u64,
        }
    }

    fn counts(&self, time: u64) -> u64 {
        (u128::from(time) * (MILLION + self.pace) as u128 / MILLION as u128) as u64
    }
}

/// Time and chance of one run, shared by all of its threads, of which one runs
/// at a time.
pub struct System {
    /// Virtual time outside of every runtime, in nanoseconds.
    now: AtomicU64,
    /// The clocks of the site that has its turn.
    clock: Mutex<Clock>,
    random: Mutex<StdRng>,
    origin: OnceLock<Instant>,
}

thread_local! {
    static HERE: RefCell<Option<Arc<System>>> = const { RefCell::new(None) };
    /// The answer is being found: whoever asks now gets the time outside.
    static ASKING: Cell<bool> = const { Cell::new(false) };
}

impl System {
    pub fn new(seed: u64) -> Arc<System> {
        let system = Arc::new(System {
            now: AtomicU64::new(0),
            clock: Mutex::default(),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            origin: OnceLock::new(),
        });
        system.enter();
        system.origin.get_or_init(Instant::now);
        system
    }

    /// This thread belongs to the run from now on.
    pub fn enter(self: &Arc<Self>) {
        HERE.with(|here| *here.borrow_mut() = Some(self.clone()));
    }

    /// This thread belongs to no run any more.
    pub fn leave() {
        HERE.with(|here| *here.borrow_mut() = None);
    }

    /// Sets the time outside of runtimes.
    pub fn set_now(&self, now: u64) {
        self.now.store(now, Ordering::SeqCst);
    }

    /// Which site has its turn, or is asked something.
    pub fn set_clock(&self, clock: Clock) {
        *self.clock.lock().unwrap() = clock;
    }

    fn clock(&self) -> Clock {
        *self.clock.lock().unwrap()
    }

    /// The instant that a site calls so.
    pub fn instant(&self, here: u64) -> Instant {
        let origin = self.origin.get().copied().unwrap_or_else(Instant::now);
        origin + std::time::Duration::from_nanos(here)
    }

    /// The first instant, as the site that has its turn counts, not before a virtual time.
    pub fn not_before(&self, at: u64) -> Instant {
        self.instant(self.clock().not_before(at))
    }

    /// Virtual time: of the runtime that this thread is in, if it is in one.
    pub fn now(&self) -> u64 {
        match tokio::runtime::Handle::try_current() {
            Ok(_) => self.clock().called(self.here()),
            Err(_) => self.here(),
        }
    }

    /// The same as the site counts whose runtime that is.
    fn here(&self) -> u64 {
        let Some(origin) = self.origin.get().filter(|_| !ASKING.get()) else {
            return self.now.load(Ordering::SeqCst);
        };
        ASKING.set(true);
        let now = tokio::time::Instant::now().into_std();
        ASKING.set(false);
        now.saturating_duration_since(*origin).as_nanos() as u64
    }
}

/// Does this thread belong to a run?
pub fn is_here() -> bool {
    here(|_| ()).is_some()
}

fn here<T>(answer: impl FnOnce(&System) -> T) -> Option<T> {
    let system = HERE.try_with(|here| here.try_borrow().ok().and_then(|here| here.clone()));
    system.ok().flatten().map(|system| answer(&system))
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    into: *mut libc::timespec,
) -> libc::c_int {
    let told = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => here(|system| {
            let wall = WALL as i64 * 1_000_000_000 + system.clock().wall;
            wall.saturating_add_unsigned(system.now()) as u64
        }),
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME => {
            here(|system| BOOTED * 1_000_000_000 + system.here())
        }
        _ => None,
    };
    let Some(told) = told else {
        // SAFETY: the caller's promise is the kernel's.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, into) as libc::c_int };
    };
    let time = libc::timespec {
        tv_sec: (told / 1_000_000_000) as libc::time_t,
        tv_nsec: (told % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: the caller gives room for it.
    unsafe { into.write(time) };
    0
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(
    into: *mut libc::c_void,
    length: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    let told = here(|system| {
        let mut bytes = vec![0; length];
        system.random.lock().unwrap().fill_bytes(&mut bytes);
        bytes
    });
    let Some(bytes) = told else {
        // SAFETY: the caller's promise is the kernel's.
        return unsafe { libc::syscall(libc::SYS_getrandom, into, length, flags) as libc::ssize_t };
    };
    // SAFETY: the caller gives room for so many bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into.cast::<u8>(), length) };
    length as libc::ssize_t
}
