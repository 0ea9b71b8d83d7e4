//! What a host or a machine refuses, and what it says then.

use std::path::Path;

use super::*;
use crate::guest::embedded::VmmError;
use crate::guest::kvm::facts::{KvmUnusable, facts_of};
use crate::guest::kvm::needs::check;
use crate::guest::kvm::state::State;
use crate::guest::qemu::check::Severity;

#[test]
fn a_host_without_kvm_is_told_what_to_do() {
    let absent = facts_of(Path::new("/dev/no-such-device")).unwrap_err();
    assert!(matches!(absent, KvmUnusable::Absent(_)));
    assert!(absent.to_string().contains("modprobe"), "{absent}");
    let other = facts_of(Path::new("/dev/null")).unwrap_err();
    assert!(matches!(other, KvmUnusable::NotKvm(_)), "{other}");
    let odd = facts_of(Path::new("/dev/a\0b")).unwrap_err();
    assert!(matches!(odd, KvmUnusable::Open { .. }), "{odd}");
}

fn refusal(guest: &Guest, shape: Shape, state: &State) -> String {
    let mut twin = guest.empty_twin(shape);
    let error = twin.vmm.restore(&state.encode().unwrap()).unwrap_err();
    assert!(
        matches!(error, VmmError::State(_) | VmmError::Kvm { .. }),
        "{error}"
    );
    error.to_string()
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_its_part() {
    if !here() {
        return;
    }
    let mut guest = Guest::new(SMALL, &Code::default().spin().0);
    guest.vmm.pause().unwrap();
    let good = State::decode(&guest.vmm.save().unwrap()).unwrap();

    let mut state = good.clone();
    state.vcpus[0].msrs.push((0x1234_5678, 1));
    let why = refusal(&guest, SMALL, &state);
    assert!(why.contains("MSR 0x12345678"), "{why}");

    // A value of nought in an MSR that is not here was never used.
    let mut state = good.clone();
    state.vcpus[0].msrs.push((0x1234_5678, 0));
    let mut twin = guest.empty_twin(SMALL);
    twin.vmm.restore(&state.encode().unwrap()).unwrap();

    let mut state = good.clone();
    state.vcpus[0].msrs.push(good.vcpus[0].msrs[0]);
    let why = refusal(&guest, SMALL, &state);
    assert!(why.contains("twice"), "{why}");

    let mut state = good.clone();
    let more = state.vcpus[0].clone();
    state.vcpus.push(more);
    let why = refusal(&guest, SMALL, &state);
    assert!(why.contains("2 vCPUs"), "{why}");

    let why = refusal(
        &guest,
        Shape {
            irqchip: true,
            ..SMALL
        },
        &good,
    );
    assert!(why.contains("interrupt chips"), "{why}");

    let mut state = good.clone();
    state.devices = b"no devices".to_vec();
    let why = refusal(&guest, SMALL, &state);
    assert!(why.contains("devices"), "{why}");

    let mut state = good.clone();
    let khz = state.vcpus[0].tsc_khz.map(|khz| khz / 2);
    if !facts().unwrap().tsc_control && khz.is_some() {
        state.vcpus[0].tsc_khz = khz;
        let why = refusal(&guest, SMALL, &state);
        assert!(why.contains("time stamp counter"), "{why}");
    }
}

#[test]
fn what_a_host_lacks_is_named_before() {
    if !here() {
        return;
    }
    let mut guest = Guest::new(SMALL, &Code::default().spin().0);
    let needs = guest.vmm.needs().unwrap();
    let mut host = facts().unwrap();
    assert_eq!(check(&needs, &host), []);

    // SSE2, which every host has.
    let without = |entries: &mut Vec<kvm_bindings::kvm_cpuid_entry2>| {
        let one = entries.iter_mut().filter(|entry| entry.function == 1);
        one.for_each(|entry| entry.edx &= !(1 << 26));
    };
    without(&mut host.cpuid);
    without(&mut host.found);
    let (used, unused) = (
        needs.msrs.iter().find(|msr| msr.1).unwrap().0,
        needs.msrs.iter().find(|msr| !msr.1).unwrap().0,
    );
    host.msrs.retain(|index| *index != used && *index != unused);
    host.most_vcpus = 0;
    host.xsave_bytes = 0;
    let found = check(&needs, &host);
    let says = |code: &str| {
        let finding = found.iter().find(|finding| finding.code == code).unwrap();
        (finding.severity, finding.what.clone())
    };
    assert!(
        says("kvm-cpu-feature")
            .1
            .contains("sse2 (CPUID 0x1.0 EDX bit 26)")
    );
    assert!(says("kvm-msr").1.contains(&format!("{used:#x}")));
    assert!(says("kvm-msr-unused").1.contains(&format!("{unused:#x}")));
    assert_eq!(says("kvm-msr").0, Severity::Blocks);
    assert_eq!(says("kvm-msr-unused").0, Severity::Warns);
    assert_eq!(says("kvm-vcpus").0, Severity::Blocks);
    if needs.xsave_bytes > 0 {
        assert_eq!(says("kvm-xsave").0, Severity::Blocks);
    }
}

#[test]
fn sizes_out_of_range_are_refused() {
    if !here() {
        return;
    }
    let facts = facts().unwrap();
    for (vcpus, ram, file, wanted) in [
        (0, 16 * MIB, 16 * MIB, "0 vCPUs"),
        (33, 16 * MIB, 16 * MIB, "33 vCPUs"),
        (1, 16 * MIB + 1, 32 * MIB, "4 KiB"),
        (1, 4096, 4096, "1 MiB"),
        (1, u64::MAX - 4095, 4096, "GiB"),
        (1, 16 * MIB, 4096, "the memory file has 4096"),
    ] {
        let ram_file = tempfile::tempfile().unwrap();
        ram_file.set_len(file).unwrap();
        let parts = Parts {
            vcpus,
            ram,
            ram_file,
            disk: None,
            terminal: Arc::new(Paper::default()),
            pace: PACE,
            irqchip: false,
        };
        let Err(error) = assemble(parts, &facts, Some(&[0xf4])) else {
            panic!("{wanted}: taken");
        };
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn control_flow_enforcement_is_hidden_and_refused() {
    use crate::guest::kvm::{boot, vcpu};
    assert!(vcpu::without_cet(0x7_06f0).is_ok());
    let error = vcpu::without_cet(1 << 23 | 0x6f0).unwrap_err();
    assert!(error.to_string().contains("hide SHSTK and IBT"), "{error}");
    if !here() {
        return;
    }
    let mut facts = facts().unwrap();
    // As on a host that has both.
    for entry in &mut facts.cpuid {
        if entry.function == 7 && entry.index == 0 {
            entry.ecx |= 1 << 7;
            entry.edx |= 1 << 20;
        }
    }
    let given = boot::cpuid(&facts, 0).unwrap();
    let mut leaves = given.as_slice().iter();
    let leaf = leaves.find(|entry| entry.function == 7 && entry.index == 0);
    let Some(leaf) = leaf else { return };
    assert_eq!((leaf.ecx >> 7 & 1, leaf.edx >> 20 & 1), (0, 0));
}

#[test]
fn a_string_of_commands_is_refused() {
    use crate::guest::kvm::board::Board;
    use crate::guest::kvm::dirty::TrackedMemory;
    let directory = tempfile::tempdir().unwrap();
    let disk = TrackedDisk::open("disk", &directory.path().join("image"), MIB).unwrap();
    let memory = TrackedMemory::from_ranges(&[(vm_memory::GuestAddress(0), MIB as usize)]);
    let terminal = Arc::new(Paper::default());
    let board = Board::new(memory.unwrap(), Some(disk.clone()), terminal, PACE);
    let status = || {
        let mut status = [0; 4];
        board.read(0x608, &mut status);
        u32::from_le_bytes(status)
    };
    let written = || !disk.take_changed().is_empty();
    let write = 2u32.to_le_bytes();
    board.write(0x608, &write);
    assert_eq!((status(), written()), (0, true));
    // A vCPU that does so many for one exit could not be stopped meanwhile.
    board.write(0x608, &write.repeat(1024));
    assert_eq!((status(), written()), (1, false));
    board.write(0x608, &3u32.to_le_bytes());
    assert_eq!(status(), 0);
}
