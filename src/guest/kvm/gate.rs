//! Where vCPU threads stop: whoever owns a vCPU's thread calls
//! [`VcpuGate::run`] in place of `VcpuFd::run`, and a [`Gates`] can then hold
//! all vCPUs of a guest, do things on each in its own thread, and let go.
//!
//! No kick is lost: a vCPU that is about to enter, or is inside of, KVM_RUN has
//! told its gate where its `immediate_exit` is. To hold it, the flag is set
//! first, then the thread is interrupted by a signal: before KVM looks at the
//! flag the flag stops it, after that the signal does.

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kvm_error;
use super::place::{self, Place, Slot, hold, park, this_thread};
use crate::guest::embedded::VmmError;

/// The signal that kicks vCPUs is this many after `SIGRTMIN`. A program that
/// uses it for something else cannot use this module.
pub const KICK: i32 = 9;

/// Longest a vCPU may take to do one thing while it is held.
const WORK_LIMIT: Duration = Duration::from_secs(10);

/// Kicked again after this time, should a monitor have its signals blocked for a while.
const AGAIN: Duration = Duration::from_millis(5);

/// What became of one [`VcpuGate::run`].
#[derive(Debug)]
pub enum Turn<'v> {
    /// The guest wants something: handle it and call again.
    Exit(VcpuExit<'v>),
    /// Nothing happened (a kick, a signal, a pause that is over): call again.
    Again,
    /// The guest is ended: leave the thread.
    End,
}

struct Shared {
    slots: Vec<Slot>,
    ended: Mutex<Option<String>>,
}

/// The gates of all vCPUs of a guest, from the outside.
#[derive(Clone)]
pub struct Gates(Arc<Shared>);

/// A vCPU's gate; belongs to the thread that runs the vCPU. When it is dropped
/// the guest counts as ended, for a guest cannot go on without a vCPU.
pub struct VcpuGate {
    index: usize,
    all: Gates,
    /// Whether the last exit may wait for its end in the next KVM_RUN.
    pending: bool,
    /// The thread whose signals have been seen to.
    thread: Option<libc::pthread_t>,
}

impl Gates {
    /// Gates of so many vCPUs, held until [`Gates::resume`]: one for each
    /// vCPU's thread, and this for who stops them.
    pub fn new(vcpus: usize) -> (Self, Vec<VcpuGate>) {
        let slot = || Slot {
            place: Mutex::new(Place {
                holds: hold::PAUSE,
                ..Place::default()
            }),
            changed: Condvar::new(),
        };
        let all = Self(Arc::new(Shared {
            slots: (0..vcpus).map(|_| slot()).collect(),
            ended: Mutex::new(None),
        }));
        let gate = |index| VcpuGate {
            index,
            all: all.clone(),
            pending: false,
            thread: None,
        };
        let gates = (0..vcpus).map(gate).collect();
        (all, gates)
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.0.slots.len()
    }

    /// Holds every vCPU; when this returns none runs, and none has an exit whose
    /// end the guest has not seen.
    ///
    /// # Errors
    /// [`VmmError::DoesNotStop`] when one did not stop within that time: the
    /// others go on then. [`VmmError::Ended`] when the guest has ended.
    pub fn pause(&self, within: Duration) -> Result<(), VmmError> {
        let until = Instant::now() + within;
        self.hold(hold::PAUSE);
        for (index, slot) in self.0.slots.iter().enumerate() {
            let mut place = slot.lock();
            while !place.parked && !place.gone {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    drop(place);
                    self.let_go(hold::PAUSE);
                    return Err(VmmError::DoesNotStop {
                        what: format!("vCPU {index}"),
                        within,
                    });
                }
                let (next, waited) = slot
                    .changed
                    .wait_timeout(place, left.min(AGAIN))
                    .unwrap_or_else(PoisonError::into_inner);
                place = next;
                if waited.timed_out() {
                    place.kick();
                }
            }
        }
        self.alive()
    }

    /// Lets every vCPU go on, as far as nothing else holds it.
    pub fn resume(&self) {
        self.let_go(hold::PAUSE);
    }

    /// Whether the guest is held by [`Gates::pause`].
    pub fn paused(&self) -> bool {
        let held = |slot: &Slot| slot.lock().holds & hold::PAUSE != 0;
        self.0.slots.iter().all(held)
    }

    /// Does something on one vCPU of a paused guest, in the vCPU's own thread.
    ///
    /// # Errors
    /// When the guest is not paused, or has ended.
    pub fn on<R: Send + 'static>(
        &self,
        vcpu: usize,
        work: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VmmError> {
        let answer = self.hand(vcpu, work)?;
        self.answered(vcpu, &answer)
    }

    /// Does something on every vCPU of a paused guest at the same time, each in
    /// its own thread; `work` is made for each by its index.
    ///
    /// # Errors
    /// As for [`Gates::on`].
    pub fn on_each<R, W>(&self, mut work: impl FnMut(usize) -> W) -> Result<Vec<R>, VmmError>
    where
        R: Send + 'static,
        W: FnOnce(&mut VcpuFd) -> R + Send + 'static,
    {
        let handed: Result<Vec<_>, _> = (0..self.vcpus())
            .map(|vcpu| self.hand(vcpu, work(vcpu)))
            .collect();
        let answers = handed?.into_iter().enumerate();
        answers
            .map(|(vcpu, answer)| self.answered(vcpu, &answer))
            .collect()
    }

    /// Ends the guest: every [`VcpuGate::run`] answers [`Turn::End`] from now
    /// on. The first reason stays.
    pub fn end(&self, why: &str) {
        let mut ended = self.ended();
        ended.get_or_insert_with(|| why.to_owned());
        drop(ended);
        self.hold(hold::END);
    }

    /// Why the guest ended; nothing while it lives.
    pub fn ended_because(&self) -> Option<String> {
        self.ended().clone()
    }

    /// Waits until every vCPU's thread has left. Answers whether all have.
    pub fn wait_until_gone(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        self.0.slots.iter().all(|slot| {
            let mut place = slot.lock();
            while !place.gone {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                place.kick();
                place = slot
                    .changed
                    .wait_timeout(place, left.min(AGAIN))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            true
        })
    }

    /// Sets a reason to hold, and kicks; waits for nothing.
    pub(super) fn hold(&self, why: u8) {
        for slot in &self.0.slots {
            let mut place = slot.lock();
            place.holds |= why;
            place.kick();
            slot.changed.notify_all();
        }
    }

    /// Takes a reason to hold away.
    pub(super) fn let_go(&self, why: u8) {
        for slot in &self.0.slots {
            slot.lock().holds &= !why;
            slot.changed.notify_all();
        }
    }

    /// Fails with the reason when the guest has ended.
    pub(super) fn alive(&self) -> Result<(), VmmError> {
        match self.ended_because() {
            Some(why) => Err(VmmError::Ended(why)),
            None => Ok(()),
        }
    }

    fn hand<R: Send + 'static>(
        &self,
        vcpu: usize,
        work: impl FnOnce(&mut VcpuFd) -> R + Send + 'static,
    ) -> Result<mpsc::Receiver<R>, VmmError> {
        self.alive()?;
        let slot = self.0.slots.get(vcpu).ok_or_else(|| {
            VmmError::State(format!("the guest has {} vCPUs, no {vcpu}", self.vcpus()))
        })?;
        let mut place = slot.lock();
        if !place.parked || place.holds & hold::PAUSE == 0 {
            return Err(VmmError::State(
                "its vCPUs run; pause the guest before".to_owned(),
            ));
        }
        let (tell, answer) = mpsc::channel();
        place.work = Some(Box::new(move |fd| {
            // Who asked may have given up.
            let _ = tell.send(work(fd));
        }));
        slot.changed.notify_all();
        Ok(answer)
    }

    fn answered<R>(&self, vcpu: usize, answer: &mpsc::Receiver<R>) -> Result<R, VmmError> {
        answer
            .recv_timeout(WORK_LIMIT)
            .map_err(|_| match self.alive() {
                Err(ended) => ended,
                Ok(()) => VmmError::DoesNotStop {
                    what: format!("vCPU {vcpu}, asked for its state,"),
                    within: WORK_LIMIT,
                },
            })
    }

    fn ended(&self) -> MutexGuard<'_, Option<String>> {
        self.0.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VcpuGate {
    /// Which vCPU this is the gate of.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Lets the vCPU run until it exits, unless it is held: then waits here,
    /// for as long as that takes.
    ///
    /// # Errors
    /// When KVM_RUN fails; the vCPU is of no use any more.
    pub fn run<'v>(&mut self, vcpu: &'v mut VcpuFd) -> Result<Turn<'v>, VmmError> {
        self.listen()?;
        let all = self.all.clone();
        let Some(slot) = all.0.slots.get(self.index) else {
            return Ok(Turn::End);
        };
        let mut place = slot.lock();
        if place.holds & hold::END != 0 {
            return Ok(Turn::End);
        }
        if place.holds != 0 && self.pending {
            // What the guest was answered (a port read) reaches its registers
            // only in the next KVM_RUN: done here, before its state is looked at.
            drop(place);
            vcpu.set_kvm_immediate_exit(1);
            return match vcpu.run() {
                // The rest of an access that takes several exits.
                Ok(exit) => Ok(Turn::Exit(exit)),
                Err(error) => {
                    self.pending = false;
                    self.turn(error)
                }
            };
        }
        if place.holds != 0 {
            park(slot, place, vcpu);
            return Ok(Turn::Again);
        }
        place.enter(vcpu);
        drop(place);
        let came = vcpu.run();
        slot.lock().inside = None;
        match came {
            Ok(exit) => {
                self.pending = true;
                Ok(Turn::Exit(exit))
            }
            Err(error) => {
                self.pending = false;
                self.turn(error)
            }
        }
    }

    /// Leaves, and ends the guest for this reason.
    pub fn end(self, why: &str) {
        self.all.end(why);
    }

    /// What an error of KVM_RUN means.
    fn turn<'v>(&self, error: kvm_ioctls::Error) -> Result<Turn<'v>, VmmError> {
        match error.errno() {
            // A signal; or an application processor that waits to be started.
            libc::EINTR | libc::EAGAIN => Ok(Turn::Again),
            _ => Err(kvm_error(
                format!("KVM_RUN of vCPU {}", self.index),
                error,
                "the guest cannot go on here; look at the kernel's log",
            )),
        }
    }

    /// Makes sure, once in each thread, that the kick interrupts and does no more.
    fn listen(&mut self) -> Result<(), VmmError> {
        let thread = this_thread();
        if self.thread == Some(thread) {
            return Ok(());
        }
        place::listen()?;
        self.thread = Some(thread);
        Ok(())
    }
}

impl Drop for VcpuGate {
    fn drop(&mut self) {
        self.all
            .end(&format!("the thread of vCPU {} left it", self.index));
        if let Some(slot) = self.all.0.slots.get(self.index) {
            let mut place = slot.lock();
            place.gone = true;
            place.parked = false;
            // Whoever waits for an answer learns that none comes.
            place.work = None;
            slot.changed.notify_all();
        }
    }
}
