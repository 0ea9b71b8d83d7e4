//! What the machine does: it boots, stops, tells its pages, is saved and restored.

use super::*;
use crate::guest::embedded::VmmError;

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
        assert_eq!(guest.vmm.save().unwrap(), state, "saved twice");
        let mut twin = guest.twin(shape);
        assert_eq!(
            twin.vmm.save().unwrap(),
            state,
            "saved where it was restored"
        );
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
    // Waits for a key between two passes over other pages.
    let key = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    let program = Code::default()
        .touch(4 * MIB, 100)
        .say(b'1')
        .raw(&key)
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
    let runs = |map: &crate::guest::embedded::Bitmap| {
        // Below are page tables, whose accessed bits the processor sets.
        map.runs(u64::MAX)
            .filter(|run| run.0 >= 0x100)
            .collect::<Vec<_>>()
    };
    assert_eq!(runs(&pages), [(4 * MIB / 4096, 100)]);
    assert!(guest.vmm.dirty(0).unwrap().is_empty());
    guest.paper.keys.lock().unwrap().push_back(b'x');
    guest.vmm.resume().unwrap();
    guest.paper.wait_for("2");
    guest.vmm.pause().unwrap();
    assert_eq!(runs(&guest.vmm.dirty(0).unwrap()), [(6 * MIB / 4096, 50)]);
}
