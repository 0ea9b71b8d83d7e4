//! What the suite needs of a guest, whatever its hypervisor.

use std::time::{Duration, Instant};

use farhaven::guest::{After, Cut, Guest};

use crate::support::model::Model;

/// Long enough for anything on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a guest has done since it was started: both counts grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Changes of memory.
    pub memory: u64,
    /// Changes of disks.
    pub disk: u64,
}

/// A working guest under test, and another host for its points. Whatever is
/// looked at here is read past the engine.
pub trait Subject {
    /// An engine as a daemon makes it when it (re)starts.
    fn attach(&mut self) -> Box<dyn Guest>;

    /// What it has done.
    fn work(&self) -> Work;

    /// Least work that shows that the guest goes on.
    fn some(&self) -> Work;

    /// RAM blocks and disks of the stopped guest, padded to whole units.
    fn content(&self) -> Vec<Vec<u8>>;

    /// Panics unless these volumes are of one instant.
    fn assert_one_instant(&self, volumes: &[Vec<u8>]);

    /// Brings a point to life as the peer does, has the guest go on and check
    /// itself there, and ends it. Panics if it is not sound.
    fn goes_on_elsewhere(&self, volumes: &[Vec<u8>], device_state: &[u8]);

    /// Does it run, as the hypervisor says? Stands for the throttle count as running.
    fn runs(&self) -> bool;

    /// Ends the guest under the engine's hands.
    fn end(&mut self);

    /// What protection has left in the hypervisor.
    fn traces(&self) -> Vec<String>;

    /// The hypervisor fails the request after so many more, once.
    fn fail_request(&mut self, after: u64);

    /// Nothing fails any more. Was there such a request?
    fn mend(&mut self) -> bool;

    /// It does not go on so many times from here on. False: it cannot be made to.
    fn fail_to_go_on(&mut self, times: u64) -> bool {
        let _ = times;
        false
    }

    /// Of how many requests one is made to fail.
    fn every(&self) -> usize;
}

/// Waits until it has changed memory and disks some more.
#[track_caller]
pub fn works_on(subject: &dyn Subject) {
    let (told, some) = (subject.work(), subject.some());
    // What it told last may be older than the cut before this: work is counted
    // from the next that it tells.
    let before = told_work(subject, told, |now| now != told);
    told_work(subject, before, |now| {
        now.memory >= before.memory + some.memory && now.disk >= before.disk + some.disk
    });
}

/// The first work told that `enough` accepts.
#[track_caller]
fn told_work(subject: &dyn Subject, before: Work, enough: impl Fn(Work) -> bool) -> Work {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = subject.work();
        if enough(now) {
            return now;
        }
        assert!(
            Instant::now() < deadline,
            "the guest does not go on: {before:?}, {now:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Hands a cut's disks over and ends it; returns the device state.
#[track_caller]
pub fn ship(guest: &mut dyn Guest, mut cut: Cut, model: &mut Model) -> Vec<u8> {
    for disk in &mut cut.disks {
        disk.changed(model).expect("the disk is read");
    }
    let state = std::mem::take(&mut cut.device_state);
    guest.finish_cut(cut, true).expect("the cut is finished");
    state
}

/// Cuts, ships and seals a point of the running guest.
#[track_caller]
pub fn point(guest: &mut dyn Guest, number: u64, model: &mut Model) -> Vec<u8> {
    let cut = guest.cut(number, After::Continue, model).expect("cuts");
    assert_eq!(guest.running(), Some(true));
    let state = ship(guest, cut, model);
    guest.sealed(number);
    state
}

/// Cuts and seals a held point: bit for bit what the guest is. It goes on then.
#[track_caller]
pub fn held_point(
    subject: &dyn Subject,
    guest: &mut dyn Guest,
    number: u64,
    model: &mut Model,
) -> Vec<u8> {
    let cut = guest.cut(number, After::Hold, model).expect("cuts");
    assert_eq!(guest.running(), Some(false));
    let state = ship(guest, cut, model);
    model.assert_is(&subject.content());
    subject.assert_one_instant(&model.volumes);
    guest.sealed(number);
    guest.resume().expect("resumes");
    assert_eq!(guest.running(), Some(true));
    state
}

/// Tells a new engine what the peer holds.
#[track_caller]
pub fn baseline(guest: &mut dyn Guest, point: u64, model: &Model) {
    for volume in 0..model.volumes.len() {
        guest
            .baseline(point, volume as u16, model.digests(volume))
            .expect("the table fits");
    }
}
