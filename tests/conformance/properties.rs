//! What holds of every guest while all goes well.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use farhaven::guest::After;
use farhaven::guest::gate::{CutGate, GateError, Stood};
use farhaven_storage_sync::unit::{Digest, UNIT, VolumeKind};

use crate::subject::{Subject, baseline, held_point, point, ship, works_on};
use crate::support::model::Model;

pub fn points_under_load_are_exact(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let kinds: Vec<_> = guest.volumes().iter().map(|v| v.kind).collect();
    let disks = kinds.iter().filter(|k| **k == VolumeKind::Disk).count();
    assert!(kinds.is_sorted_by_key(|kind| match kind {
        VolumeKind::Ram => 0,
        VolumeKind::Disk => 1,
        VolumeKind::DeviceState => 2,
    }));
    assert_eq!(kinds.last(), Some(&VolumeKind::DeviceState));
    assert_eq!(guest.volumes().last().map(|v| v.bytes), Some(0));
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    let copied = model.units;
    assert!(copied > 0);
    let mut pauses = Vec::new();
    for number in 1..=8 {
        if number == 4 {
            // No word of the seal of 3 came: nothing may be lost by that.
            guest.give_back();
        }
        if number % 2 == 0 {
            guest.round(&mut model).expect("a round");
        }
        works_on(subject);
        let cut = guest
            .cut(number, After::Continue, &mut model)
            .expect("cuts");
        assert_eq!(guest.running(), Some(true));
        assert_eq!(cut.disks.len(), disks);
        pauses.push(cut.times);
        // The disks are read while the guest writes on.
        works_on(subject);
        let state = ship(&mut *guest, cut, &mut model);
        assert!(!state.is_empty());
        assert_eq!(
            guest.volumes().last().map(|v| v.bytes),
            Some(state.len() as u64)
        );
        subject.assert_one_instant(&model.volumes);
        if number != 3 && number != 6 {
            guest.sealed(number);
        }
    }
    let changed = model.units - copied;
    assert!(
        changed < 8 * copied,
        "cuts hand over what changed, not everything: {changed} of {copied}"
    );
    held_point(subject, &mut *guest, 9, &mut model);
    works_on(subject);
    let state = held_point(subject, &mut *guest, 10, &mut model);
    for times in &pauses {
        eprintln!(
            "pause {:.1} ms: device state {:.1}, disks {:.1}, RAM {:.1} of {} MiB",
            times.pause.as_secs_f64() * 1e3,
            times.device_state.as_secs_f64() * 1e3,
            times.disks.as_secs_f64() * 1e3,
            times.ram_scan.as_secs_f64() * 1e3,
            times.ram_scanned_bytes >> 20,
        );
    }
    guest.detach();
    drop(guest);
    assert_eq!(subject.traces(), [""; 0], "detach removes everything");
    works_on(subject);
    subject.goes_on_elsewhere(&model.volumes, &state);
}

pub fn a_point_without_a_round_holds_the_whole_guest(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    let cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    works_on(subject);
    ship(&mut *guest, cut, &mut model);
    subject.assert_one_instant(&model.volumes);
    held_point(subject, &mut *guest, 2, &mut model);
    guest.detach();
}

/// Others of a group: late, and the first time they stop at another instant.
#[derive(Default)]
struct Others {
    /// When the guest was to be stopped, each time.
    ready: Mutex<Vec<Instant>>,
}

impl CutGate for Others {
    fn gather(&self) -> Result<(), GateError> {
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    fn ready(&self) -> Result<(), GateError> {
        std::thread::sleep(Duration::from_millis(50));
        self.ready.lock().expect("lock").push(Instant::now());
        Ok(())
    }

    fn stopped(&self, at: Instant) -> Result<Stood, GateError> {
        let ready = self.ready.lock().expect("lock");
        assert!(ready.last().is_some_and(|ready| at >= *ready));
        Ok(match ready.len() {
            1 => Stood::Apart,
            _ => Stood::Together,
        })
    }
}

pub fn a_guest_that_is_stopped_again_with_others_has_one_instant(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    for (number, after) in [(1, After::Continue), (2, After::Hold)] {
        works_on(subject);
        let others = Others::default();
        let cut = guest
            .cut_at(number, after, &others, &mut model)
            .expect("cuts");
        let ready = others.ready.into_inner().expect("lock");
        assert_eq!(ready.len(), 2);
        // It stands from its last stop on, whoever was waited for before.
        assert!(cut.stopped >= ready[1]);
        assert_eq!(guest.running(), Some(after == After::Continue));
        ship(&mut *guest, cut, &mut model);
        subject.assert_one_instant(&model.volumes);
        guest.sealed(number);
    }
    model.assert_is(&subject.content());
    guest.resume().expect("resumes");
    works_on(subject);
    guest.detach();
    drop(guest);
    assert_eq!(subject.traces(), [""; 0], "detach removes everything");
}

/// As in a planned move: the last state here is the first there.
pub fn a_point_goes_on_elsewhere_and_is_let_go_here(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    works_on(subject);
    let state = point(&mut *guest, 1, &mut model);
    let earlier = model.volumes.clone();
    works_on(subject);
    // A point of a running guest, while the guest goes on here.
    subject.goes_on_elsewhere(&earlier, &state);
    works_on(subject);

    let cut = guest.cut(2, After::Hold, &mut model).expect("cuts");
    let held = subject.work();
    let state = ship(&mut *guest, cut, &mut model);
    model.assert_is(&subject.content());
    guest.sealed(2);
    assert_eq!(subject.work(), held, "a held guest stands still");
    assert!(!subject.runs());
    guest.let_go().expect("ends");
    assert_eq!(guest.running(), None);
    drop(guest);
    subject.goes_on_elsewhere(&model.volumes, &state);
}

pub fn a_stopped_guest_stays_as_it_is(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    point(&mut *guest, 1, &mut model);
    guest.stop().expect("stops");
    guest.stop().expect("is stopped");
    assert_eq!(guest.running(), Some(false));
    let before = subject.content();
    std::thread::sleep(Duration::from_millis(300));
    assert!(before == subject.content(), "a stopped guest changes");
    // Evidence outlives the engine, and the next one.
    drop(guest);
    assert!(!subject.runs());
    let mut guest = subject.attach();
    assert_eq!(guest.running(), Some(false));
    assert!(before == subject.content(), "a stopped guest changes");
    guest.resume().expect("resumes");
    guest.resume().expect("runs");
    works_on(subject);
    guest.detach();
}

/// Every third unit of memory and disks is damaged at the peer.
fn spoil(model: &mut Model) -> Vec<(u16, u64)> {
    let mut spoilt = Vec::new();
    for (volume, bytes) in (0..).zip(&mut model.volumes) {
        let units = bytes.chunks_mut(UNIT);
        for (unit, bytes) in (0..).zip(units).skip(1).step_by(3) {
            bytes.fill(0xee);
            spoilt.push((volume, unit));
        }
    }
    spoilt
}

pub fn what_the_peer_lost_comes_with_the_next_point(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    // Before anything was handed over, and past any end: nothing comes of it.
    guest.lost_at_peer(0, 1 << 40, u64::MAX);
    guest.lost_at_peer(u16::MAX, 0, 1);
    guest.round(&mut model).expect("first copy");
    point(&mut *guest, 1, &mut model);
    let lost = spoil(&mut model);
    assert!(lost.len() > 10);
    for (volume, unit) in lost {
        guest.lost_at_peer(volume, unit, 1);
    }
    // They go with a cut that is never sealed, and then with the next.
    let cut = guest.cut(2, After::Continue, &mut model).expect("cuts");
    ship(&mut *guest, cut, &mut model);
    subject.assert_one_instant(&model.volumes);
    guest.give_back();
    spoil(&mut model);
    held_point(subject, &mut *guest, 3, &mut model);
    // Sealed, they are as any others: what changed goes, and no more.
    let before = model.units;
    works_on(subject);
    held_point(subject, &mut *guest, 4, &mut model);
    let units: usize = model.volumes.iter().map(|bytes| bytes.len() / UNIT).sum();
    assert!(
        model.units - before < units as u64 / 3,
        "all of it went again"
    );
    guest.detach();
}

pub fn a_restart_hands_over_what_differs(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    for number in 1..=2 {
        let cut = guest
            .cut(number, After::Continue, &mut model)
            .expect("cuts");
        ship(&mut *guest, cut, &mut model);
    }
    guest.sealed(1);
    // 2 was sealed too, but its word did not come; 3 was shipped to a peer that
    // never sealed it; then a cut that nobody ends.
    works_on(subject);
    let mut thrown = model.clone();
    let cut = guest.cut(3, After::Continue, &mut thrown).expect("cuts");
    ship(&mut *guest, cut, &mut thrown);
    works_on(subject);
    let lost = guest
        .cut(4, After::Continue, &mut model.clone())
        .expect("cuts");
    drop(guest);
    drop(lost);
    works_on(subject);

    let mut guest = subject.attach();
    baseline(&mut *guest, 2, &model);
    let before = model.units;
    guest.round(&mut model).expect("a round");
    point(&mut *guest, 5, &mut model);
    let taken_up = model.units - before;
    held_point(subject, &mut *guest, 6, &mut model);
    guest.detach();
    drop(guest);
    works_on(subject);

    // Detached meanwhile: no change tracking is left, so everything is compared.
    let mut guest = subject.attach();
    assert!(guest.baseline(6, 0, vec![Digest::UNKNOWN; 3]).is_err());
    assert!(guest.baseline(6, 1, vec![Digest::UNKNOWN; 3]).is_err());
    baseline(&mut *guest, 6, &model);
    let before = model.units;
    guest.round(&mut model).expect("a round");
    held_point(subject, &mut *guest, 7, &mut model);
    let compared = model.units - before;
    let whole = model.whole();
    assert!(
        taken_up < whole / 4 && compared < whole / 4,
        "{taken_up} {compared} of {whole}"
    );
    // What the peer holds but is not known is handed over again.
    guest.detach();
    drop(guest);
    let mut guest = subject.attach();
    for (volume, bytes) in model.volumes.iter().enumerate() {
        let unknown = vec![Digest::UNKNOWN; bytes.len() / UNIT];
        guest.baseline(7, volume as u16, unknown).expect("it fits");
    }
    model.volumes.iter_mut().for_each(|v| v.fill(0xa5));
    guest.round(&mut model).expect("a round");
    held_point(subject, &mut *guest, 8, &mut model);
    guest.detach();
}

/// Times a rate is measured on a host that may be busy.
const WINDOWS: usize = 6;

/// Measures until the rate is as it must be.
#[track_caller]
fn again(mut rate: impl FnMut() -> f64, is: impl Fn(f64) -> bool) -> f64 {
    let mut seen = Vec::new();
    while seen.len() < WINDOWS {
        let now = rate();
        if is(now) {
            return now;
        }
        seen.push(now);
    }
    panic!("each time, a rate of {seen:?}");
}

pub fn a_throttled_guest_runs_slowly_and_its_points_are_exact(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    point(&mut *guest, 1, &mut model);
    let rate = |subject: &dyn Subject| {
        let (begun, before) = (Instant::now(), subject.work());
        std::thread::sleep(Duration::from_millis(1500));
        let done = subject.work().memory - before.memory;
        done as f64 / begun.elapsed().as_secs_f64()
    };
    // So much that it shows on a machine whose processors are busy: a guest that
    // waited for its turn anyway loses less by standing still.
    let mut seen = Vec::new();
    let (free, slow) = loop {
        guest.throttle(0).expect("lets it run");
        let free = rate(subject);
        guest.throttle(40).expect("throttles");
        guest.throttle(97).expect("throttles more");
        let slow = rate(subject);
        eprintln!("free {free:.0}/s, throttled by 97 %: {slow:.0}/s");
        if slow < free * 0.6 {
            break (free, slow);
        }
        // Others took its time while it was free.
        seen.push((free, slow));
        assert!(seen.len() < WINDOWS, "{seen:?}");
    };
    for number in 2..6 {
        // It runs, however slowly, whenever it is asked.
        assert_eq!(guest.running(), Some(true));
        guest.round(&mut model).expect("a round");
        point(&mut *guest, number, &mut model);
        std::thread::sleep(Duration::from_millis(37));
    }
    held_point(subject, &mut *guest, 6, &mut model);
    let after = again(|| rate(subject), |after| after < free * 0.6);
    let slow = slow.min(after);
    works_on(subject);

    // Held, it stands still, throttled or not.
    let cut = guest.cut(7, After::Hold, &mut model).expect("cuts");
    let held = subject.work();
    std::thread::sleep(Duration::from_millis(250));
    assert_eq!(subject.work(), held);
    assert_eq!(guest.running(), Some(false));
    ship(&mut *guest, cut, &mut model);
    model.assert_is(&subject.content());
    guest.sealed(7);
    guest.resume().expect("resumes");

    guest.throttle(0).expect("lets it run");
    again(|| rate(subject), |freed| freed > slow * 1.5);
    // However the engine ends, the guest runs freely.
    for detach in [true, false] {
        guest.throttle(97).expect("throttles");
        std::thread::sleep(Duration::from_millis(130));
        if detach {
            guest.detach();
        }
        drop(guest);
        again(|| rate(subject), |freed| freed > slow * 1.5);
        assert!(subject.runs());
        guest = subject.attach();
    }
    // A fence stops a throttled guest for good.
    guest.throttle(50).expect("throttles");
    guest.stop().expect("stops");
    let stopped = subject.work();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(subject.work(), stopped);
    guest.resume().expect("resumes");
    works_on(subject);
    guest.detach();
}
