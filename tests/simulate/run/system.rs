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
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// The monotonic clock at virtual time 0, in seconds: some days after a boot.
const BOOTED: u64 = 1_000_000;
/// The wall clock at virtual time 0, in seconds since 1970.
const WALL: u64 = 1_800_000_000;

/// Time and chance of one run, shared by all of its threads, of which one runs
/// at a time.
pub struct System {
    /// Virtual time outside of every runtime, in nanoseconds.
    now: AtomicU64,
    /// How far the wall clock of the site that has its turn is off, in nanoseconds.
    wall: AtomicI64,
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
            wall: AtomicI64::new(0),
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

    pub fn set_wall(&self, off: i64) {
        self.wall.store(off, Ordering::SeqCst);
    }

    /// The instant of a virtual time.
    pub fn instant(&self, now: u64) -> Instant {
        let origin = self.origin.get().copied().unwrap_or_else(Instant::now);
        origin + std::time::Duration::from_nanos(now)
    }

    /// Virtual time here: of the runtime that this thread is in, if it is in one.
    pub fn now(&self) -> u64 {
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
            let wall = WALL as i64 * 1_000_000_000 + system.wall.load(Ordering::SeqCst);
            wall.saturating_add_unsigned(system.now()) as u64
        }),
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME => {
            here(|system| BOOTED * 1_000_000_000 + system.now())
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
