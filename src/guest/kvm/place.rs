//! One vCPU as its gate and who stops it both see it: what holds it, whether it
//! stands, and how to get it out of KVM_RUN.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use super::gate::KICK;
use crate::guest::embedded::VmmError;

/// Why a vCPU is held: bits, so that who lets go does not undo another's hold.
pub(super) mod hold {
    /// The guest is paused.
    pub(in super::super) const PAUSE: u8 = 1;
    /// It is being held back.
    pub(in super::super) const THROTTLE: u8 = 2;
    /// It has ended.
    pub(in super::super) const END: u8 = 4;
}

pub(super) type Work = Box<dyn FnOnce(&mut VcpuFd) + Send>;

#[derive(Default)]
pub(super) struct Place {
    pub(super) holds: u8,
    pub(super) parked: bool,
    pub(super) gone: bool,
    pub(super) inside: Option<Inside>,
    pub(super) work: Option<Work>,
}

/// A thread that is about to enter KVM_RUN, is inside, or has just left it.
pub(super) struct Inside {
    thread: libc::pthread_t,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is only used while the entry stands, under the place's
// lock; the vCPU's thread takes the entry out, under that lock, before the
// mapping it points into can go.
#[allow(unsafe_code)]
unsafe impl Send for Inside {}

#[derive(Default)]
pub(super) struct Slot {
    pub(super) place: Mutex<Place>,
    pub(super) changed: Condvar,
}

impl Slot {
    pub(super) fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, place: MutexGuard<'a, Place>) -> MutexGuard<'a, Place> {
        self.changed
            .wait(place)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until nothing holds the vCPU, and does what is asked meanwhile.
pub(super) fn park<'a>(slot: &'a Slot, mut place: MutexGuard<'a, Place>, vcpu: &mut VcpuFd) {
    place.parked = true;
    slot.changed.notify_all();
    while place.holds != 0 && place.holds & hold::END == 0 {
        if let Some(work) = place.work.take() {
            drop(place);
            work(vcpu);
            place = slot.lock();
        } else {
            place = slot.wait(place);
        }
    }
    place.parked = false;
    place.work = None;
}

impl Place {
    /// The thread that calls this is about to enter KVM_RUN. The entry is to be
    /// taken out, by setting `inside` to nothing, before the vCPU can go.
    pub(super) fn enter(&mut self, vcpu: &mut VcpuFd) {
        vcpu.set_kvm_immediate_exit(0);
        self.inside = Some(Inside {
            thread: this_thread(),
            immediate_exit: &raw mut vcpu.get_kvm_run().immediate_exit,
        });
    }

    /// Gets the vCPU out of KVM_RUN, if it is there or about to be.
    #[allow(unsafe_code)]
    pub(super) fn kick(&self) {
        let (Some(inside), Some(Ok(signal))) = (&self.inside, SIGNAL.get()) else {
            return;
        };
        if self.holds == 0 {
            return;
        }
        // SAFETY: the entry stands, and we have the lock it is taken out under:
        // the mapping is there, and the thread lives. The byte is KVM's to read
        // and ours to write; the vCPU's thread does not touch it in KVM_RUN.
        unsafe {
            AtomicU8::from_ptr(inside.immediate_exit).store(1, Ordering::SeqCst);
            libc::pthread_kill(inside.thread, *signal);
        }
    }
}

static SIGNAL: OnceLock<Result<i32, String>> = OnceLock::new();

extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The kick's signal, with its handler in place.
fn kick_signal() -> Result<i32, VmmError> {
    let signal = SIGNAL.get_or_init(|| {
        let signal = SIGRTMIN() + KICK;
        register_signal_handler(signal, nothing)
            .map(|()| signal)
            .map_err(|error| error.to_string())
    });
    signal.clone().map_err(|why| VmmError::Kvm {
        call: "handling the signal that stops vCPUs".to_owned(),
        why,
    })
}

#[allow(unsafe_code)]
pub(super) fn this_thread() -> libc::pthread_t {
    // SAFETY: it has no conditions.
    unsafe { libc::pthread_self() }
}

/// Makes sure that a kick of this thread interrupts it, and does no more.
pub(super) fn listen() -> Result<(), VmmError> {
    let signal = kick_signal()?;
    unblock_signal(signal).map_err(|error| VmmError::Kvm {
        call: format!("unblocking signal {signal}"),
        why: error.to_string(),
    })
}
