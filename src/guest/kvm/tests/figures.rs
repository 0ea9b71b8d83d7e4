//! What things cost; run with `--ignored --nocapture`.

use super::*;

fn memory(bytes: u64) -> File {
    let file = rustix::fs::memfd_create("figures", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(bytes).unwrap();
    file
}

#[test]
#[ignore = "measures; asserts only what would be a fault"]
fn pause_and_dirty_log() {
    if !here() {
        return;
    }
    for ram in [256, 1024, 4096] {
        let shape = Shape {
            ram: ram * MIB,
            ..SMALL
        };
        let mut guest = Guest::assemble(
            shape,
            memory(shape.ram),
            Some(&Code::default().count(2 * MIB).0),
        );
        guest.vmm.resume().unwrap();
        let median = |mut times: Vec<Duration>| {
            times.sort();
            (times[times.len() / 2], times[times.len() - 1])
        };
        let (mut stop, mut log, mut save, mut whole) = (vec![], vec![], vec![], vec![]);
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(5));
            let from = Instant::now();
            guest.vmm.pause().unwrap();
            stop.push(from.elapsed());
            let at = Instant::now();
            let dirty = guest.vmm.dirty(0).unwrap();
            log.push(at.elapsed());
            assert!(dirty.contains(0x200));
            let at = Instant::now();
            guest.vmm.save().unwrap();
            save.push(at.elapsed());
            guest.vmm.resume().unwrap();
            whole.push(from.elapsed());
        }
        eprintln!(
            "{ram} MiB (median, worst): pause {:?}, dirty log {:?}, state {:?}, all {:?}",
            median(stop),
            median(log),
            median(save),
            median(whole)
        );
    }
    let mut guest = Guest::new(SMALL, &Code::default().spin().0);
    guest.vmm.pause().unwrap();
    let state = guest.vmm.save().unwrap();
    let mut twin = guest.empty_twin(SMALL);
    let at = Instant::now();
    twin.vmm.restore(&state).unwrap();
    eprintln!(
        "state of one vCPU: {} bytes, restored in {:?}",
        state.len(),
        at.elapsed()
    );
    let at = Instant::now();
    let facts = facts().unwrap();
    eprintln!("facts in {:?}: {} MSRs", at.elapsed(), facts.msrs.len());
}
