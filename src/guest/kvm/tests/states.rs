//! A vCPU's state arrives whole, and its bytes are read strictly.

use kvm_bindings::{kvm_msr_entry, kvm_regs};
use proptest::prelude::*;

use super::*;
use crate::guest::embedded::VmmError;
use crate::guest::kvm::state::{Exact, State, VcpuState};

const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

#[test]
fn registers_of_every_kind_travel() {
    if !here() {
        return;
    }
    for irqchip in [false, true] {
        let shape = Shape { irqchip, ..SMALL };
        let mut guest = Guest::new(shape, &Code::default().spin().0);
        guest.vmm.pause().unwrap();
        let gates = guest.vmm.gates().clone();
        let set = gates.on(0, |vcpu| {
            let mut debug = vcpu.get_debug_regs().unwrap();
            debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
            vcpu.set_debug_regs(&debug).unwrap();
            let msr = |index, data| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let wanted = [
                msr(LSTAR, 0xffff_8000_1234_5678),
                msr(KERNEL_GS_BASE, 0x7777),
            ];
            let msrs = kvm_bindings::Msrs::from_entries(&wanted).unwrap();
            assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 2);
            let mut regs = vcpu.get_regs().unwrap();
            regs.r15 = 0x1515_1515;
            vcpu.set_regs(&regs).unwrap();
            let mut events = vcpu.get_vcpu_events().unwrap();
            events.nmi.masked = 1;
            vcpu.set_vcpu_events(&events).unwrap();
        });
        set.unwrap();
        let twin = guest.twin(shape);
        let there = twin.vmm.gates().clone();
        let seen = there.on(0, |vcpu| {
            let debug = vcpu.get_debug_regs().unwrap();
            assert_eq!(debug.db, [0x1000, 0x2000, 0x3000, 0x4000]);
            let (msrs, _) =
                crate::guest::kvm::vcpu::read_msrs(vcpu, &[LSTAR, KERNEL_GS_BASE]).unwrap();
            assert_eq!(
                msrs,
                [(LSTAR, 0xffff_8000_1234_5678), (KERNEL_GS_BASE, 0x7777)]
            );
            assert_eq!(vcpu.get_regs().unwrap().r15, 0x1515_1515);
            assert_eq!(vcpu.get_vcpu_events().unwrap().nmi.masked, 1);
        });
        seen.unwrap();
    }
}

#[test]
fn vector_registers_travel_and_the_guest_finds_them() {
    if !here() {
        return;
    }
    // mov rax, 0x1122334455667788; movq xmm5, rax; wait for a key; movq rcx, xmm5;
    // mov [2 MiB], rcx
    let program = Code::default()
        .rax(0x1122_3344_5566_7788)
        .raw(&[0x66, 0x48, 0x0f, 0x6e, 0xe8])
        .say(b'.')
        .key()
        .raw(&[0x66, 0x48, 0x0f, 0x7e, 0xe9])
        .raw(&[0x48, 0x89, 0x0c, 0x25, 0, 0, 0x20, 0])
        .spin();
    let mut guest = Guest::running(SMALL, &program.0);
    wait("it to speak or fail", || {
        guest.paper.text() == "." || guest.vmm.running().is_none()
    });
    let runs_sse = guest.vmm.running().is_some();
    if !runs_sse {
        // A KVM that is emulated itself may not know such instructions: then
        // only what the host's side sees is looked at.
        eprintln!("guests cannot use SSE here: {}", guest.vmm.ended_because());
        guest = Guest::new(SMALL, &program.0);
    }
    guest.vmm.pause().unwrap();
    let mut state = State::decode(&guest.vmm.save().unwrap()).unwrap();
    let mut wanted = 0x1122_3344_5566_7788_u64.to_le_bytes();
    let xsave = &mut state.vcpus[0].xsave;
    if !xsave.is_empty() {
        // XMM5 of the legacy area, which the header says is in use.
        if runs_sse {
            assert_eq!(xsave[240..248], wanted);
            assert_eq!(xsave[512] & 2, 2);
        }
        xsave[240..248].copy_from_slice(&wanted);
        xsave[512] |= 2;
        xsave[240] = 0x99;
        wanted[0] = 0x99;
    }
    let mut twin = guest.empty_twin(SMALL);
    let bytes = state.encode().unwrap();
    twin.vmm.restore(&bytes).unwrap();
    let there = State::decode(&twin.vmm.save().unwrap()).unwrap();
    assert_eq!(there.vcpus[0].xsave, state.vcpus[0].xsave);
    if !runs_sse {
        return;
    }
    twin.vmm.resume().unwrap();
    twin.paper.keys.lock().unwrap().push_back(b'x');
    wait("the guest to look", || {
        twin.word(2 * MIB) == u64::from_le_bytes(wanted)
    });
}

/// A state with what a test wants in it.
fn state(vcpus: Vec<VcpuState>, devices: Vec<u8>) -> State {
    State {
        vcpus,
        chips: Vec::new(),
        pit: None,
        clock: Some(Exact::default()),
        devices,
    }
}

fn vcpu(rip: u64, msrs: Vec<(u32, u64)>, xsave: Vec<u8>) -> VcpuState {
    VcpuState {
        cpuid: vec![Exact::default(); msrs.len()],
        tsc_khz: Some(2_000_000),
        regs: Exact(kvm_regs {
            rip,
            ..Default::default()
        }),
        sregs: Exact::default(),
        fpu: Some(
            kvm_bindings::kvm_fpu {
                fcw: 0x37f,
                ..Default::default()
            }
            .into(),
        ),
        xsave,
        xcrs: Some(Exact::default()),
        msrs,
        lapic: None,
        events: Exact::default(),
        debug: Exact::default(),
        mp_state: Exact::default(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        vcpus in prop::collection::vec(
            (any::<u64>(), prop::collection::vec(any::<(u32, u64)>(), 0..40), any::<u8>()), 1..4),
        devices in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let vcpus: Vec<_> = vcpus
            .into_iter()
            .map(|(rip, msrs, fill)| vcpu(rip, msrs, vec![fill; 4096]))
            .collect();
        let bytes = state(vcpus.clone(), devices.clone()).encode().unwrap();
        let read = State::decode(&bytes).unwrap();
        prop_assert_eq!(&read.vcpus, &vcpus);
        prop_assert_eq!(&read.devices, &devices);
        prop_assert_eq!(read.encode().unwrap(), bytes);
    }

    #[test]
    fn damaged_bytes_are_refused_or_read_but_never_worse(
        cut in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let bytes = state(vec![vcpu(1, vec![(2, 3)], vec![4; 4096])], vec![5; 9]).encode().unwrap();
        prop_assert!(State::decode(&bytes[..cut.index(bytes.len())]).is_err());
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(State::decode(&longer).is_err());
        let mut other = bytes.clone();
        other[at.index(bytes.len())] = value;
        let _ = State::decode(&other);
        let mut random = bytes[..8].to_vec();
        random.extend(noise);
        let _ = State::decode(&random);
    }
}

#[test]
fn states_of_other_releases_and_monitors_are_told_apart() {
    let bytes = state(vec![vcpu(1, Vec::new(), Vec::new())], Vec::new())
        .encode()
        .unwrap();
    let why = |bytes: &[u8]| match State::decode(bytes) {
        Err(VmmError::State(why)) => why,
        _ => panic!("taken"),
    };
    let mut newer = bytes.clone();
    newer[6] = 2;
    assert!(why(&newer).contains("version 2"), "{}", why(&newer));
    assert!(why(b"QEVM and so on").contains("another monitor"));
    assert!(why(&bytes[..5]).contains("cut off after 5"));
    let none = state(Vec::new(), Vec::new()).encode().unwrap();
    assert!(why(&none).contains("0 vCPUs"));
    let odd = state(vec![vcpu(1, Vec::new(), vec![0; 100])], Vec::new());
    assert!(why(&odd.encode().unwrap()).contains("XSAVE area of 100"));
}
