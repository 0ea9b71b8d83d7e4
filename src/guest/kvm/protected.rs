//! A KVM guest of any Rust monitor as a [`Vmm`]: what the monitor gives is its
//! `VmFd`, its memory, a [`Gates`] whose gates its vCPU threads run in, its
//! disks, and how its own devices are saved.

use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;

use super::chips::{self, Chips};
use super::dirty::TrackedRam;
use super::facts::{self, KvmFacts};
use super::gate::Gates;
use super::machine;
use super::needs::{self, KvmNeeds};
use super::state::{State, VcpuState};
use super::throttle::Throttle;
use super::vcpu::{self, Abilities, TSC};
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Bitmap, RamBlock, Vmm, VmmError};
use crate::guest::qemu::check::Severity;

/// Longest until all vCPUs stand: each must come back from what it does for
/// its guest, as writing a block.
const PAUSE_WITHIN: Duration = Duration::from_secs(2);

/// What of a monitor's own devices goes with the guest, and their part in
/// stopping it. Called while no vCPU runs.
pub trait DeviceState: Send {
    /// The devices as bytes, for [`DeviceState::restore`] at the peer.
    ///
    /// # Errors
    /// When a device cannot be saved; the message names it.
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// Makes the devices as they were. The bytes come from a peer.
    ///
    /// # Errors
    /// [`VmmError::State`] when they are not of such devices.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), VmmError>;

    /// The vCPUs stand. When this returns no device writes memory or disks.
    ///
    /// # Errors
    /// When one cannot be stopped; the guest goes on then.
    fn pause(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    /// The vCPUs go on after this.
    fn resume(&mut self) {}
}

/// A monitor whose devices hold nothing.
impl DeviceState for () {
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), VmmError> {
        match bytes.is_empty() {
            true => Ok(()),
            false => Err(VmmError::State(
                "it has devices, and this monitor has none".to_owned(),
            )),
        }
    }
}

/// What a [`KvmVmm`] is made of.
pub struct KvmParts {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its memory.
    pub ram: TrackedRam,
    /// Where its vCPUs stop. They are held until [`Vmm::resume`].
    pub gates: Gates,
    /// Its disks.
    pub disks: Vec<Arc<TrackedDisk>>,
    /// Its devices.
    pub devices: Box<dyn DeviceState>,
}

/// A KVM guest under protection.
pub struct KvmVmm {
    // Dropped in this order: the throttle's hold before the gates, the memory last.
    throttle: Throttle,
    parts: KvmParts,
    paused: bool,
    /// It has its state from elsewhere and has not run since.
    restored: bool,
    /// The time at which the guest stands, since it was stopped.
    stands: Option<Time>,
    /// It is of our own monitor, whose config tells its needs.
    ours: bool,
    chips: Chips,
    facts: KvmFacts,
    can: Abilities,
}

/// What goes on while a guest stands, as it was when it stopped: else its
/// state would be another each time it is taken.
#[derive(Clone)]
struct Time {
    tsc: Vec<u64>,
    clock: u64,
}

impl KvmVmm {
    /// A guest whose vCPUs are held, or wait to be started, in their gates.
    ///
    /// # Errors
    /// When KVM lacks what saving a guest needs: the message names it.
    pub fn new(parts: KvmParts) -> Result<Self, VmmError> {
        let facts = facts::facts()?;
        let chips = chips::of(&parts.vm);
        Ok(Self {
            throttle: Throttle::new(parts.gates.clone()),
            paused: parts.gates.paused(),
            restored: false,
            stands: None,
            ours: false,
            chips,
            can: facts.abilities(&parts.vm, chips.irqchip),
            facts,
            parts,
        })
    }

    /// What this guest's state asks of another host's KVM. A running guest is
    /// stopped for a moment.
    ///
    /// # Errors
    /// When its state cannot be read.
    pub fn needs(&mut self) -> Result<KvmNeeds, VmmError> {
        let ran = !self.paused;
        self.pause()?;
        let state = self.take();
        if ran {
            self.resume()?;
        }
        KvmNeeds::of_all(&state?.vcpus).ok_or_else(|| VmmError::State("it has no vCPU".to_owned()))
    }

    /// A machine of our own monitor.
    pub(super) fn of_our_own(mut self) -> Self {
        self.ours = true;
        self
    }

    /// Gives a guest that has never run the state of another, whose memory its
    /// memory holds already. It stands then, as that one did.
    ///
    /// # Errors
    /// When the state is damaged, of other hardware, or refused by KVM: the
    /// message says which part. The guest is of no use any more then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), VmmError> {
        let state = State::decode(bytes)?;
        let gates = self.parts.gates.clone();
        if state.vcpus.len() != gates.vcpus() {
            return Err(VmmError::State(format!(
                "it has {} vCPUs, this machine {}",
                state.vcpus.len(),
                gates.vcpus()
            )));
        }
        self.pause()?;
        for (index, vcpu) in state.vcpus.iter().enumerate() {
            self.fits(index, KvmNeeds::of(gates.vcpus(), vcpu))?;
        }
        let answers = gates.on_each(|index| {
            let (vcpu, can) = (state.vcpus.get(index).cloned(), self.can.clone());
            move |fd: &mut kvm_ioctls::VcpuFd| match vcpu {
                Some(vcpu) => vcpu::restore(fd, &vcpu, &can),
                None => Ok(()),
            }
        })?;
        for (index, answer) in answers.into_iter().enumerate() {
            answer.map_err(|error| of_vcpu(index, error))?;
        }
        chips::restore(&self.parts.vm, self.chips, &state)?;
        self.parts.devices.restore(&state.devices)?;
        self.stands = Some(Time::of(&state));
        self.restored = true;
        Ok(())
    }

    /// Where its vCPUs stop.
    pub fn gates(&self) -> &Gates {
        &self.parts.gates
    }

    /// Refuses a state that this host's KVM would take, but could not honour.
    fn fits(&self, index: usize, needs: KvmNeeds) -> Result<(), VmmError> {
        let found = needs::check(&needs, &self.facts);
        let stops = found.into_iter().filter(|f| f.severity == Severity::Blocks);
        let stops: Vec<_> = stops.map(|finding| finding.what).collect();
        match stops.is_empty() {
            true => Ok(()),
            false => Err(VmmError::State(format!(
                "vCPU {index}: {}",
                stops.join("; ")
            ))),
        }
    }

    fn take(&self) -> Result<State, VmmError> {
        let can = self.can.clone();
        let vcpus = self.parts.gates.on_each(|_| {
            let can = can.clone();
            move |fd: &mut kvm_ioctls::VcpuFd| vcpu::save(fd, &can)
        })?;
        let vcpus = vcpus.into_iter().enumerate();
        let vcpus: Result<Vec<_>, _> = vcpus
            .map(|(index, vcpu)| vcpu.map_err(|error| of_vcpu(index, error)))
            .collect();
        let mut state = State {
            vcpus: vcpus?,
            chips: Vec::new(),
            pit: None,
            clock: None,
            devices: Vec::new(),
        };
        chips::save(&self.parts.vm, self.chips, &mut state)?;
        Ok(state)
    }
}

impl Vmm for KvmVmm {
    fn ram(&self) -> &[RamBlock] {
        self.parts.ram.blocks()
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.parts.disks
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        if self.paused {
            return self.parts.gates.pause(PAUSE_WITHIN);
        }
        self.parts.gates.pause(PAUSE_WITHIN)?;
        if let Err(error) = self.parts.devices.pause() {
            self.parts.gates.resume();
            return Err(error);
        }
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.parts.gates.alive()?;
        if self.paused {
            if std::mem::take(&mut self.restored) {
                // So that a guest with a paravirtual clock takes the time that it
                // missed for no hang of its own. One without refuses it.
                self.parts
                    .gates
                    .on_each(|_| |fd: &mut kvm_ioctls::VcpuFd| fd.kvmclock_ctrl().is_ok())?;
            }
            self.parts.devices.resume();
            self.stands = None;
            self.paused = false;
            self.parts.gates.resume();
        }
        Ok(())
    }

    fn running(&self) -> Option<bool> {
        match self.parts.gates.ended_because() {
            Some(_) => None,
            None => Some(!self.paused),
        }
    }

    fn ended_because(&self) -> String {
        self.parts.gates.ended_because().unwrap_or_default()
    }

    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError> {
        self.parts.ram.dirty(block)
    }

    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        self.parts.ram.read(block, offset, into)
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        if !self.paused {
            return Err(VmmError::State(
                "the guest runs; pause it before its state is taken".to_owned(),
            ));
        }
        let mut state = self.take()?;
        self.stands
            .get_or_insert_with(|| Time::of(&state))
            .put(&mut state);
        state.devices = self.parts.devices.save()?;
        state.encode()
    }

    fn config(&mut self) -> Result<Option<Vec<u8>>, VmmError> {
        match self.ours {
            true => machine::config(self).map(Some),
            false => Ok(None),
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.throttle.set(percent).map_err(|source| VmmError::Io {
            what: "starting the thread that holds the guest back".to_owned(),
            source,
        })
    }

    fn end(&mut self) {
        self.parts.gates.end("it was ended by its monitor");
        self.parts.gates.wait_until_gone(PAUSE_WITHIN);
    }
}

impl Drop for KvmVmm {
    fn drop(&mut self) {
        self.end();
    }
}

impl Time {
    fn of(state: &State) -> Self {
        let tsc = |vcpu: &VcpuState| {
            let msr = vcpu.msrs.iter().find(|(index, _)| *index == TSC);
            msr.map_or(0, |(_, value)| *value)
        };
        Self {
            tsc: state.vcpus.iter().map(tsc).collect(),
            clock: state.clock.as_ref().map_or(0, |clock| clock.0.clock),
        }
    }

    fn put(&self, state: &mut State) {
        for (vcpu, tsc) in state.vcpus.iter_mut().zip(&self.tsc) {
            for (_, value) in vcpu.msrs.iter_mut().filter(|(index, _)| *index == TSC) {
                *value = *tsc;
            }
        }
        if let Some(clock) = &mut state.clock {
            clock.0.clock = self.clock;
        }
    }
}

fn of_vcpu(index: usize, error: VmmError) -> VmmError {
    match error {
        VmmError::State(why) => VmmError::State(format!("vCPU {index}: {why}")),
        VmmError::Kvm { call, why } => VmmError::Kvm {
            call: format!("vCPU {index}: {call}"),
            why,
        },
        other => other,
    }
}
