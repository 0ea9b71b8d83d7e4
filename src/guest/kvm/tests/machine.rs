//! What the machine does: it boots, stops, tells its pages, is saved and restored.

use super::*;
use crate::guest::embedded::{Bitmap, VmmError};

#[test]
fn a_program_boots_and_speaks() {
    if !here() {
        return;
    }
    let guest = Guest::running(SMALL, &Code::default().say(b'h').say(b'i').spin().0);
    guest.paper.wait_for("hi");
    assert_eq!(guest.vmm.running(), Some(true));
}

#[test]
fn a_guest_that_ends_says_why() {
    if !here() {
        return;
    }
    for (program, wanted) in [
        (Code::default().out(0x620, 0), "shut itself down"),
        // ud2, without a handler
        (Code::default().raw(&[0x0f, 0x0b]), "triple fault"),
    ] {
        let mut guest = Guest::running(SMALL, &program.0);
        wait(wanted, || guest.vmm.running().is_none());
        let why = guest.vmm.ended_because();
        assert!(why.contains(wanted), "{why}");
        assert!(matches!(guest.vmm.pause(), Err(VmmError::Ended(_))));
        assert!(matches!(guest.vmm.resume(), Err(VmmError::Ended(_))));
    }
}

#[test]
fn a_paused_guest_stands_and_goes_on() {
    if !here() {
        return;
    }
    let mut guest = Guest::running(SMALL, &Code::default().count(2 * MIB).0);
    let at = |guest: &Guest| guest.word(2 * MIB);
    wait("the first count", || at(&guest) > 0);
    for _ in 0..20 {
        guest.vmm.pause().unwrap();
        assert_eq!(guest.vmm.running(), Some(false));
        let stands = at(&guest);
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!(at(&guest), stands);
        guest.vmm.resume().unwrap();
        wait("it to go on", || at(&guest) > stands);
    }
}

#[test]
fn a_saved_guest_is_the_same_elsewhere_and_goes_on_there() {
    if !here() {
        return;
    }
    for irqchip in [false, true] {
        let shape = Shape { irqchip, ..SMALL };
        let mut guest = Guest::running(shape, &Code::default().count(2 * MIB).0);
        wait("the first count", || guest.word(2 * MIB) > 0);
        guest.vmm.pause().unwrap();
        let state = guest.vmm.save().unwrap();
        same(&guest.vmm.save().unwrap(), &state);
        let mut twin = guest.twin(shape);
        same(&twin.vmm.save().unwrap(), &state);
        let stands = guest.word(2 * MIB);
        assert_eq!(twin.word(2 * MIB), stands);
        twin.vmm.resume().unwrap();
        wait("the twin to go on", || twin.word(2 * MIB) > stands);
        assert_eq!(guest.word(2 * MIB), stands);
    }
}

#[test]
fn every_written_page_is_told_once_and_no_other() {
    if !here() {
        return;
    }
    let program = Code::default()
        .touch(4 * MIB, 100)
        .say(b'1')
        .key()
        .touch(6 * MIB, 50)
        .say(b'2')
        .spin();
    let mut guest = Guest::new(SMALL, &program.0);
    let first = guest.vmm.dirty(0).unwrap();
    assert!(
        first.contains(0x100),
        "the program was loaded by the monitor"
    );
    assert!(first.count() < 10);
    guest.vmm.resume().unwrap();
    guest.paper.wait_for("1");
    guest.vmm.pause().unwrap();
    let pages = guest.vmm.dirty(0).unwrap();
    assert_eq!(told(&pages), [(4 * MIB / 4096, 100)]);
    assert!(guest.vmm.dirty(0).unwrap().is_empty());
    guest.paper.keys.lock().unwrap().push_back(b'x');
    guest.vmm.resume().unwrap();
    guest.paper.wait_for("2");
    guest.vmm.pause().unwrap();
    assert_eq!(told(&guest.vmm.dirty(0).unwrap()), [(6 * MIB / 4096, 50)]);
}

#[test]
fn what_the_disk_writes_into_memory_is_told_too() {
    if !here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = TrackedDisk::open("data", &dir.path().join("data.img"), MIB).unwrap();
    disk.write(3 * 4096, &[7; 4096]).unwrap();
    let program = Code::default()
        // Block 3 to 5 MiB, from there to block 9, flush.
        .out(0x600, 3)
        .out(0x604, 5 << 20)
        .out(0x608, 1)
        .keep(0x608, 0x20_0000)
        .out(0x600, 9)
        .out(0x608, 2)
        .keep(0x608, 0x20_0004)
        .out(0x608, 3)
        .keep(0x608, 0x20_0008)
        // One block too many, and a buffer outside of memory.
        .out(0x600, 256)
        .out(0x608, 1)
        .keep(0x608, 0x20_000c)
        .out(0x600, 0)
        .out(0x604, 0xffff_f000)
        .out(0x608, 1)
        .keep(0x608, 0x20_0010)
        .keep(0x60c, 0x20_0014)
        .keep(0x614, 0x20_0018)
        .keep(0x618, 0x20_001c)
        .keep(0x61c, 0x20_0020)
        .keep(0x660, 0x20_0024)
        .say(b'.')
        .spin();
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(SMALL.ram).unwrap();
    let paper = Arc::new(Paper::default());
    let mut vmm = machine(
        SMALL,
        &ram,
        Some(&program.0),
        paper.clone(),
        Some(disk.clone()),
    );
    vmm.dirty(0).unwrap();
    vmm.resume().unwrap();
    paper.wait_for(".");
    vmm.pause().unwrap();
    let runs: Vec<_> = told(&vmm.dirty(0).unwrap());
    assert_eq!(runs, [(0x200, 1), (0x500, 1)]);
    let mut read = [0; 40];
    vmm.read_ram(0, 2 * MIB, &mut read).unwrap();
    let words: Vec<_> = read
        .as_chunks::<4>()
        .0
        .iter()
        .map(|w| u32::from_le_bytes(*w))
        .collect();
    assert_eq!(words, [0, 0, 0, 1, 1, 256, 7, 8, 9, u32::MAX]);
    let mut block = [0; 4096];
    disk.read(9 * 4096, &mut block).unwrap();
    assert_eq!(block, [7; 4096]);
    vmm.read_ram(0, 5 * MIB, &mut block).unwrap();
    assert_eq!(block, [7; 4096]);
}

/// Pages above the page tables, whose accessed bits the processor sets.
fn told(map: &Bitmap) -> Vec<(u64, u64)> {
    map.runs(u64::MAX).filter(|run| run.0 >= 0x100).collect()
}

#[test]
fn memory_goes_on_behind_the_hole_below_four_gib() {
    if !here() {
        return;
    }
    let shape = Shape {
        ram: 3 * 1024 * MIB + 8 * MIB,
        ..SMALL
    };
    let gib = 1024 * MIB;
    let program = Code::default()
        .touch(3 * gib - 4096, 1)
        .touch(4 * gib + 4096, 3)
        .say(b'.')
        .spin();
    let mut guest = Guest::new(shape, &program.0);
    assert_eq!(guest.vmm.ram()[0].bytes, shape.ram);
    guest.vmm.dirty(0).unwrap();
    guest.vmm.resume().unwrap();
    guest.paper.wait_for(".");
    guest.vmm.pause().unwrap();
    let hole = 3 * gib / 4096;
    assert_eq!(
        told(&guest.vmm.dirty(0).unwrap()),
        [(hole - 1, 1), (hole + 1, 3)]
    );
    // A read across the hole's place.
    let mut bytes = vec![0xff; 3 * 4096];
    guest.vmm.read_ram(0, 3 * gib - 4096, &mut bytes).unwrap();
    assert_eq!(bytes[0], 1);
    assert_eq!(bytes[2 * 4096], 3);
    assert_eq!(bytes[4096], 0);
    let end = shape.ram - 4096;
    assert!(guest.vmm.read_ram(0, end, &mut bytes).is_err());
    assert!(guest.vmm.read_ram(0, u64::MAX, &mut bytes).is_err());
    assert!(guest.vmm.read_ram(1, 0, &mut bytes).is_err());
}

#[test]
fn the_clock_stands_with_the_guest_and_goes_with_it() {
    if !here() {
        return;
    }
    // l: in eax, 0x610; mov [2 MiB], eax; jmp l
    let program = Code::default().keep(0x610, 0x20_0000).raw(&[0xeb, 0xf2]);
    let mut guest = Guest::running(SMALL, &program.0);
    wait("the clock", || guest.word(2 * MIB) >= 30);
    guest.vmm.pause().unwrap();
    let stood = guest.word(2 * MIB);
    std::thread::sleep(Duration::from_millis(300));
    let mut twin = guest.twin(SMALL);
    twin.vmm.resume().unwrap();
    wait("the clock there", || twin.word(2 * MIB) != stood);
    let there = twin.word(2 * MIB);
    assert!(there > stood && there < stood + 250, "{stood} to {there}");
}

#[test]
fn a_throttled_guest_does_less_and_still_stops() {
    if !here() {
        return;
    }
    let mut guest = Guest::running(SMALL, &Code::default().count(2 * MIB).0);
    let rate = |guest: &mut Guest| {
        let (from, at) = (guest.word(2 * MIB), Instant::now());
        std::thread::sleep(Duration::from_millis(600));
        (guest.word(2 * MIB) - from) as f64 / at.elapsed().as_secs_f64()
    };
    let free = rate(&mut guest);
    guest.vmm.throttle(97).unwrap();
    let held = rate(&mut guest);
    assert!(held < free / 2.0, "{held} of {free} a second");
    for _ in 0..20 {
        guest.vmm.pause().unwrap();
        let stands = guest.word(2 * MIB);
        std::thread::sleep(Duration::from_millis(12));
        assert_eq!(
            guest.word(2 * MIB),
            stands,
            "the throttle let a paused guest go"
        );
        guest.vmm.resume().unwrap();
    }
    guest.vmm.throttle(0).unwrap();
    let again = rate(&mut guest);
    assert!(again > held * 2.0, "{again} after {held}");
}

/// Bit for bit, said by part.
fn same(one: &[u8], other: &[u8]) {
    use crate::guest::kvm::state::State;
    let (left, right) = (State::decode(one).unwrap(), State::decode(other).unwrap());
    for (a, b) in left.vcpus.iter().zip(&right.vcpus) {
        assert_eq!(a.cpuid, b.cpuid);
        assert_eq!(a.regs, b.regs);
        assert_eq!(a.sregs, b.sregs);
        let at: Vec<_> = (0..a.xsave.len())
            .filter(|at| a.xsave[*at] != b.xsave[*at])
            .collect();
        assert!(at.is_empty(), "XSAVE at {at:?}");
        assert_eq!(a.xcrs, b.xcrs);
        let msrs: Vec<_> = a.msrs.iter().zip(&b.msrs).filter(|(a, b)| a != b).collect();
        assert!(msrs.is_empty(), "{msrs:x?}");
        assert_eq!(a.lapic, b.lapic);
        assert_eq!(a.events, b.events);
        assert_eq!(a.debug, b.debug);
        assert_eq!(a.mp_state, b.mp_state);
    }
    assert_eq!(left.pit, right.pit);
    assert_eq!(left.clock, right.clock);
    assert_eq!(left.devices, right.devices);
    assert!(one == other, "the interrupt chips differ");
}
