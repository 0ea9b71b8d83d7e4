//! What of a VM lies outside of its vCPUs, in the kernel: three interrupt
//! chips, the timer, and the clock that paravirtual guests read.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::kvm_error;
use super::state::{Exact, State};
use crate::guest::embedded::VmmError;

const CHIPS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "second PIC"),
    (KVM_IRQCHIP_IOAPIC, "IOAPIC"),
];

/// What of it a VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chips {
    pub(super) irqchip: bool,
    pub(super) pit: bool,
}

/// Looks what a VM has; KVM refuses what was not made.
pub(super) fn of(vm: &VmFd) -> Chips {
    let mut chip = kvm_irqchip::default();
    Chips {
        irqchip: vm.get_irqchip(&mut chip).is_ok(),
        pit: vm.get_pit2().is_ok(),
    }
}

/// Takes all of it into a state.
pub(super) fn save(vm: &VmFd, has: Chips, state: &mut State) -> Result<(), VmmError> {
    let part = |what: String| {
        move |error| kvm_error(what, error, "the VM's state cannot be read on this host")
    };
    if has.irqchip {
        for (chip_id, name) in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(part(format!("KVM_GET_IRQCHIP of the {name}")))?;
            state.chips.push(Exact(chip));
        }
    }
    if has.pit {
        let mut pit = vm.get_pit2().map_err(part("KVM_GET_PIT2".to_owned()))?;
        // By this host's clock; elsewhere KVM begins to count anew.
        for channel in &mut pit.channels {
            channel.count_load_time = 0;
        }
        state.pit = Some(Exact(pit));
    }
    state.clock = Some(Exact(clock(vm)?));
    Ok(())
}

/// The paravirtual clock now, in the form in which it is set elsewhere.
pub(super) fn clock(vm: &VmFd) -> Result<kvm_clock_data, VmmError> {
    let clock = vm
        .get_clock()
        .map_err(|error| kvm_error("KVM_GET_CLOCK", error, "the host's KVM is too old"))?;
    Ok(kvm_clock_data {
        clock: clock.clock,
        // The rest tells of this host's time, which is of no use elsewhere.
        ..kvm_clock_data::default()
    })
}

/// Gives all of it to a VM whose vCPUs have their state.
pub(super) fn restore(vm: &VmFd, has: Chips, state: &State) -> Result<(), VmmError> {
    let refused = |what: String| {
        move |error| {
            kvm_error(
                what,
                error,
                "this host's KVM refuses that part of the guest's state",
            )
        }
    };
    let differ = |what: &str, there: bool| {
        let (guest, here) = if there {
            ("has", "not")
        } else {
            ("has no", "has one")
        };
        VmmError::State(format!(
            "it {guest} {what} in the kernel, this machine {here}; build the machine as at the source"
        ))
    };
    if has.irqchip == state.chips.is_empty() {
        return Err(differ("interrupt chips", !state.chips.is_empty()));
    }
    if has.pit != state.pit.is_some() {
        return Err(differ("timer", state.pit.is_some()));
    }
    for ((chip_id, name), chip) in CHIPS.into_iter().zip(&state.chips) {
        if chip.0.chip_id != chip_id {
            return Err(VmmError::State(format!(
                "where the {name} should be is chip {}",
                chip.0.chip_id
            )));
        }
        vm.set_irqchip(&chip.0)
            .map_err(refused(format!("KVM_SET_IRQCHIP of the {name}")))?;
    }
    if let Some(pit) = &state.pit {
        vm.set_pit2(&pit.0)
            .map_err(refused("KVM_SET_PIT2".to_owned()))?;
    }
    if let Some(clock) = &state.clock {
        let clock = kvm_clock_data {
            clock: clock.0.clock,
            ..kvm_clock_data::default()
        };
        vm.set_clock(&clock)
            .map_err(refused("KVM_SET_CLOCK".to_owned()))?;
    }
    Ok(())
}
